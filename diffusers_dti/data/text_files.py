"""Read text files in the encodings that editors save them in."""

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 if it starts with a byte order mark.

    Args:
        path: the file.

    Returns:
        The text, without a byte order mark.

    Raises:
        ValueError: if it has another encoding. Single-byte encodings cannot be distinguished.
        OSError: if the file cannot be read, or is a pipe, which might never end.
    """
    if not path.is_file():
        raise OSError(f"{path} is not a file: give a text file.")
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 or UTF-16: save it in UTF-8.") from error
