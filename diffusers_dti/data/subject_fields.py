"""Check the fields of a subject in a JSON file. Errors name the subject, the file and the field."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from .images import images_in_folder

BUILT_IN_TEMPLATES = "imagenet_small"  # the authors' name for their list; here it selects ours

LearnableProperty = Literal["object", "style"]


def read_words(where: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """Check the fields that must have text, and return the class noun and the initializer."""
    for field, meaning in (("path", "the folder of its photos"), ("class", "a word for what it is")):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f'{where} needs a "{field}", {meaning}.')
    initializer = entry.get("initialization", entry["class"])
    if not isinstance(initializer, str) or not initializer:
        raise ValueError(f'{where} has an "initialization" that is not text: give words, or remove it to use the class.')
    return entry["class"], initializer


def read_description(where: str, entry: Mapping[str, Any]) -> str | None:
    """Return the words for what a subject looks like, or None if it has none."""
    description = entry.get("description", entry.get("subject"))
    if description is not None and (not isinstance(description, str) or not description.strip()):
        raise ValueError(f'{where} has a "description" that is not text: give words for what it looks like, or remove it.')
    return description


def read_learnable_property(where: str, value: Any) -> LearnableProperty:
    """Check the field that says whether the subject is an object or a style."""
    if value not in get_args(LearnableProperty):
        raise ValueError(f'{where} has the "learnable_property" {value!r:.80}: it can be "object" or "style".')
    return value


def find_path(where: str, source: Path, path: str) -> Path:
    """Return the folder or file of a subject, from the current folder or from the one of the JSON file."""
    for candidate in (Path(path), source.parent / path):
        if candidate.exists():
            return candidate
    raise OSError(
        f"{where}: its path {path!r:.200} is neither in the current folder nor next to the file. "
        "Correct the path, or put the photos there."
    )


def find_files(where: str, path: Path, images: Any) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    """Return the files of a subject, and the captions next to them if there are any."""
    if images is None:
        return _find_all_files(where, path)
    return find_named_files(where, path, "images", images), None


def find_named_files(where: str, path: Path, field: str, names: Any) -> tuple[Path, ...]:
    """Return the files in the folder of a subject that a field names."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: its "{field}" must be a list of file names; remove it to use all images of {path!s:.200}.')
    files = tuple(path / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OSError(
            f'{where}: {path} lacks {", ".join(map(repr, missing)):.200}. Put them there, or remove them from "{field}".'
        )
    return files


def _find_all_files(where: str, path: Path) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    if path.is_file():  # the authors' styles are an image each
        return (path,), None
    try:
        found = images_in_folder(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    captions = tuple(caption or None for _, caption in found)  # an empty one is for templates
    return tuple(file for file, _ in found), captions if any(captions) else None


def without(
    where: str, held_out: Sequence[Path], files: Sequence[Path], captions: tuple[str | None, ...] | None
) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    """Return the photos to train on and their captions, without the photos that are held out."""
    kept = [number for number, file in enumerate(files) if file not in held_out]
    if not kept:
        raise ValueError(f'{where}: its "held_out" leaves no photo to train on.')
    return tuple(files[i] for i in kept), captions and tuple(captions[i] for i in kept)


def check_masks(where: str, folder: Path, files: Sequence[Path]) -> None:
    """Check that at least one photo has a mask."""
    if not any((folder / f"{file.stem}.png").is_file() for file in files):
        raise OSError(f"{where} has no masks: {folder} should hold {files[0].stem}.png and so on.")


def check_captions(where: str, captions: Iterable[str | None]) -> None:
    """Check that every caption has a place for the placeholder."""
    for text in captions:
        if text is not None and "{}" not in text:
            raise ValueError(f'{where}: its caption {text!r:.80} needs a "{{}}" where the placeholder goes.')


def read_templates(where: str, template: Any) -> tuple[str, ...] | None:
    """Return the templates, or None for the built-in ones."""
    if template is None or template == BUILT_IN_TEMPLATES:
        return None
    if isinstance(template, str) and "{}" not in template:
        raise ValueError(
            f'{where} has the template {template!r:.80}. It can be "{BUILT_IN_TEMPLATES}" (the built-in templates, as without '
            'the field), a prompt with "{}" for the placeholder, or a list of such prompts.'
        )
    return read_prompts(where, "template", [template] if isinstance(template, str) else template)


def read_prompts(where: str, field: str, prompts: Any) -> tuple[str, ...]:
    """Check that a field is a list of prompts with a place for the placeholder."""
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f'{where}: its "{field}" must be a list of prompts; remove it to use the built-in ones.')
    for text in prompts:
        if "{}" not in text:
            raise ValueError(f'{where}: {text!r:.80} in its "{field}" needs a "{{}}" where the placeholder goes.')
    return tuple(prompts)
