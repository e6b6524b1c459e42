"""A store of results, so that what has been run is not run again: a file of JSON lines that several processes may write to."""

import ast
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Store:
    """Results by their settings and by the code they come from, in a file with a line for each.

    Settings are the same where they are equal as JSON: their order does not matter, and 1 and 1.0 are two things. Of a
    result that was put twice the later one counts. The code is read once, here.

    Args:
        path: the file; it need not be there yet.
        code: what a result depends on: Python files, folders of them, and any other files, such as weights. Comments and
            docstrings do not count, nor does where all this lies.

    Raises:
        ValueError: for no code at all. OSError: for code that is not there.
    """

    def __init__(self, path: str | Path, code: Iterable[str | Path]):
        self.path = Path(path)
        self.code = _digest(code)
        self._rows: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes of the file that are in `_rows`

    def key(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a result is found by: the settings as JSON gives them back, and the digest of the code.

        Raises:
            ValueError: for settings that are not JSON.
        """
        try:
            text = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Settings must be JSON: texts, finite numbers, lists and mappings of them. {error}") from error
        return {"settings": json.loads(text), "code": self.code}

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of these settings and this code, None where there is none yet."""
        self._update()
        row = self._rows.get(_text(self.key(settings)))
        return None if row is None else copy.deepcopy(row["result"])

    def put(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Add a result; when this returns it is on the disk.

        Raises:
            ValueError: for settings that are not JSON. TypeError: for a result that is not; infinite numbers and NaN may be
                in one.
        """
        line = (json.dumps(self.key(settings) | {"result": dict(result)}) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # somebody was killed while writing, or is writing: empty lines do no harm
                    line = b"\n" + line
            file.write(line)  # at the end, wherever that is by now, and at once: another process' line cannot come between
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All results of this code: {"settings": ..., "code": ..., "result": ...} each."""
        self._update()
        return copy.deepcopy(list(self._rows.values()))

    def _update(self) -> None:
        """Read what has come to the file, by whomever."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # not written to its end yet
                    break
                self._read += len(line)
                try:
                    row = json.loads(line)
                except ValueError:  # what somebody was killed over
                    continue
                if row["code"] == self.code:
                    self._rows[_text({"settings": row["settings"], "code": row["code"]})] = row


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(code: Iterable[str | Path]) -> str:
    """SHA-256 of the files' names, relative to the folder they share, and of what they say."""
    files: set[Path] = set()
    for path in (Path(os.path.abspath(entry)) for entry in code):  # abspath leaves links alone, so that names stay
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    if not files:
        raise ValueError("No code was given: name the Python files and folders that the results depend on.")
    common = os.path.commonpath([file.parent for file in files])
    contents = {file.relative_to(common).as_posix(): _content(file) for file in files}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _content(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".py":
        content = _meaning(ast.parse(content, file)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()


def _meaning(node: Any) -> str:
    """`ast.dump` without docstrings and empty fields, of which every release of Python has others."""
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        return f"{type(node).__name__}({', '.join(f'{name}={_meaning(value)}' for name, value in fields.items())})"
    if isinstance(node, list):
        return f"[{', '.join(_meaning(entry) for entry in node if not _is_docstring(entry))}]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """Whether it is a statement of nothing but text."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
