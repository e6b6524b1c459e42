"""What is learned and evaluated, from a JSON file in the authors' format.

    {"dog": {"path": "data/dreambooth/dog", "class": "dog", "initialization": "corgi", "template": ["my {}", "a {} on grass"]}}

"images" may name the pictures to use and "prompts" what is drawn of the subject; further fields are left alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .images import Photo, load_photos, pictures_in

BUILT_IN_TEMPLATES = "imagenet_small"  # the authors' name for their list; here it stands for ours


@dataclass(frozen=True)
class Subject:
    """A subject: its pictures and the words for it. Texts have "{}" for the placeholder."""

    name: str
    path: Path
    word: str  # its class, in plain words
    initialization: str  # the words that training starts from
    files: tuple[Path, ...]  # its pictures
    templates: tuple[str, ...] | None  # None for the built-in ones
    captions: tuple[str | None, ...] | None  # of each picture; None where templates are used
    prompts: tuple[str, ...] | None  # None for the evaluation's own
    mask_folder: Path | None = None  # holds <name>/<picture's stem>.png, white where the subject is, of any of the pictures

    @property
    def placeholder_token(self) -> str:
        return f"<{self.name}>"

    @cached_property
    def masks(self) -> tuple[Path | None, ...]:
        """The mask of each picture, where there is one."""
        if self.mask_folder is None:
            return (None,) * len(self.files)
        named = [self.mask_folder / self.name / f"{file.stem}.png" for file in self.files]
        return tuple(mask if mask.is_file() else None for mask in named)

    @cached_property
    def photos(self) -> list[Photo]:
        """The pictures, read when first asked for.

        Raises:
            OSError: for a file that is no picture.
        """
        # without any mask transparency may still be one
        return load_photos(self.files, self.captions, self.masks if any(self.masks) else None)


def read_subjects(
    path: str | Path, instances: Sequence[str] | None = None, mask_folder: str | Path | None = None
) -> list[Subject]:
    """The subjects of a JSON file. Its paths are relative to the current folder, or else to the file's own.

    Args:
        path: the JSON file.
        instances: names of the subjects wanted, in this order; None for all in the file's.
        mask_folder: folder of masks, <subject>/<picture's stem>.png, white where the subject is; pictures may lack one.

    Raises:
        ValueError: for a file in another format, an unknown subject, and fields that are missing or do not fit.
        OSError: for a file, a folder or a picture that is not there.
    """
    path, mask_folder = Path(path), None if mask_folder is None else Path(mask_folder)
    entries = _entries(path, instances)
    return [_subject(path, name, entry, mask_folder) for name, entry in entries.items()]


def subject_names(path: str | Path, instances: Sequence[str] | None = None) -> list[str]:
    """The names alone, so that one subject's mistakes need not stop the others; arguments and errors as above."""
    return list(_entries(Path(path), instances))


def _entries(path: Path, instances: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise OSError(f"{path} is not there: give a JSON file of subjects.")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, mend it: {error}") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f'{path} must map names to subjects: {{"dog": {{"path": "photos/dog", "class": "dog"}}}}.')
    if unknown := [name for name in instances or () if name not in entries]:
        raise ValueError(f"{path} has no subject {unknown[0]!r}, only {', '.join(entries)}.")
    names = list(entries if instances is None else instances)
    for name in names:  # they become folders and placeholders
        if not name.strip(" .") or name != name.strip() or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
            raise ValueError(f"{path} has the name {name!r}, which cannot be a folder's: take letters, digits, - and _.")
    return {name: entries[name] for name in names}


def _subject(source: Path, name: str, entry: dict[str, Any], mask_folder: Path | None) -> Subject:
    where = f"Subject {name!r} of {source}"
    for field, cure in (("path", "the folder of its pictures"), ("class", "a word for what it is")):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f'{where} needs a "{field}", {cure}.')
    initialization = entry.get("initialization", entry["class"])
    if not isinstance(initialization, str) or not initialization:
        raise ValueError(f'{where} has an "initialization" that is no text: give words, or leave it out for the class.')
    path = next((p for p in (Path(entry["path"]), source.parent / entry["path"]) if p.exists()), None)
    if path is None:
        raise OSError(
            f"{where}: its path {entry['path']} is neither in the current folder nor beside the file. "
            "Correct the path, or put the pictures there."
        )
    files, captions = _pictures(where, path, entry.get("images"))
    if mask_folder is not None and not any((mask_folder / name / f"{file.stem}.png").is_file() for file in files):
        raise OSError(f"{where} has no masks: {mask_folder / name} should hold {files[0].stem}.png and so on.")
    templates = _templates(where, entry.get("template"))
    if templates is not None and entry.get("images") and len(templates) == len(files):
        templates, captions = None, templates
    for text in captions or ():
        if text is not None and "{}" not in text:
            raise ValueError(f'{where}: its caption {text!r} needs a "{{}}" where the placeholder goes.')
    prompts = None if entry.get("prompts") is None else _texts(where, "prompts", entry["prompts"])
    return Subject(name, path, entry["class"], initialization, files, templates, captions, prompts, mask_folder)


def _pictures(where: str, path: Path, images: Any) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    """The subject's files, and the captions that lie beside them in a folder, if there are any."""
    if images is None and path.is_file():  # the authors' styles are a picture each
        return (path,), None
    if images is None:
        try:
            files, captions = zip(*pictures_in(path))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return files, captions if any(captions) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f'{where}: its "images" must be a list of file names; leave it out for all pictures of {path}.')
    files = tuple(path / image for image in images)
    if missing := [file.name for file in files if not file.is_file()]:
        raise OSError(f'{where}: {path} lacks {", ".join(missing)}. Put them there, or take them out of "images".')
    return files, None


def _templates(where: str, template: Any) -> tuple[str, ...] | None:
    if template is None or template == BUILT_IN_TEMPLATES:
        return None
    if isinstance(template, str) and "{}" not in template:
        raise ValueError(
            f'{where} has the template {template!r}. Understood are "{BUILT_IN_TEMPLATES}" (the built-in ones, as without '
            'the field), a prompt with "{}" for the placeholder, and a list of such prompts.'
        )
    return _texts(where, "template", [template] if isinstance(template, str) else template)


def _texts(where: str, field: str, texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: its "{field}" must be a list of prompts; leave it out for the built-in ones.')
    for text in texts:
        if "{}" not in text:
            raise ValueError(f'{where}: {text!r} in its "{field}" needs a "{{}}" where the placeholder goes.')
    return tuple(texts)
