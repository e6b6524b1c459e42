"""Read the subjects to learn and to evaluate from a JSON file in the authors' format.

    {"dog": {"path": "data/dreambooth/dog", "class": "dog", "initialization": "corgi", "template": ["my {}", "a {} on grass"]}}

Optional fields are "images", the file names to use, and "prompts", for the evaluation. Other fields are ignored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..parsing import parse_json
from .images import Photo, images_in_folder, load_photos

BUILT_IN_TEMPLATES = "imagenet_small"  # the authors' name for their list; here it selects ours


@dataclass(frozen=True)
class Subject:
    """A subject: its photos and the words for it. Texts have "{}" for the placeholder.

    Args:
        name: its name in the file, which also names its folder and placeholder.
        path: the folder of its photos, or a single image file.
        class_noun: what it is an instance of.
        initializer: the words that training starts from.
        files: its photos.
        templates: prompts for training; None for the built-in templates.
        captions: a caption for each photo, None where templates are used; None if no photo has a caption.
        prompts: prompts for the evaluation; None for the evaluation's own.
        mask_folder: holds <name>/<photo's stem>.png for some or all photos, white where the subject is.
    """

    name: str
    path: Path
    class_noun: str
    initializer: str
    files: tuple[Path, ...]
    templates: tuple[str, ...] | None
    captions: tuple[str | None, ...] | None
    prompts: tuple[str, ...] | None
    mask_folder: Path | None = None

    @property
    def placeholder_token(self) -> str:
        """The subject's name in prompts."""
        return f"<{self.name}>"

    @cached_property
    def masks(self) -> tuple[Path | None, ...]:
        """The mask file of each photo, or None if it has no mask."""
        masks: list[Path | None] = []
        for file in self.files:
            mask = None if self.mask_folder is None else self.mask_folder / self.name / f"{file.stem}.png"
            masks.append(mask if mask is not None and mask.is_file() else None)
        return tuple(masks)

    @cached_property
    def photos(self) -> list[Photo]:
        """The photos, which are read at first use.

        Raises:
            OSError: if a file is not an image.
        """
        # Without masks, transparency still counts as one.
        return load_photos(self.files, self.captions, self.masks if any(self.masks) else None)


def read_subjects(
    path: str | Path, instances: Sequence[str] | None = None, mask_folder: str | Path | None = None
) -> list[Subject]:
    """Read the subjects of a JSON file. Its paths are relative to the current folder, or else to the file's own.

    Args:
        path: the JSON file.
        instances: names of the subjects to read, in this order; None for all, in the order of the file.
        mask_folder: folder of masks, <subject>/<photo's stem>.png, white where the subject is. Not every photo needs one.

    Raises:
        ValueError: if the file has another format, a subject is unknown, or a field is missing or does not fit.
        OSError: if a file, a folder or a photo does not exist.
    """
    path = Path(path)
    masks = None if mask_folder is None else Path(mask_folder)
    subjects = []
    for name, entry in _select(path, instances).items():
        try:
            subjects.append(_read_subject(path, name, entry, masks))
        except OSError as error:
            if error.errno is None:  # one of ours
                raise
            raise OSError(f"Subject {name!r:.80} of {path}: {error.strerror}, in {error.filename!s:.200}.") from error
    return subjects


def subject_names(path: str | Path, instances: Sequence[str] | None = None) -> list[str]:
    """Read only the names, so that a mistake in one subject need not stop the others.

    Arguments and errors are those of `read_subjects`, except that fields and photos are not checked.
    """
    return list(_select(Path(path), instances))


def _select(path: Path, instances: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return the entries of the subjects with these names."""
    entries = _read_entries(path)
    names = list(entries) if instances is None else list(instances)
    for name in names:
        if name not in entries:
            raise ValueError(f"{path} has no subject {name!r:.80}, only {', '.join(map(repr, entries)):.500}.")
    for name in names:  # names become folders and placeholders
        if not _can_name_folder(name):
            raise ValueError(f"{path} has the name {name!r:.80}, which cannot name a folder: use letters, digits, - and _.")
    return {name: entries[name] for name in names}


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise OSError(f"{path} does not exist: give a JSON file of subjects.")
    try:
        entries = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f'{path} must map names to subjects: {{"dog": {{"path": "photos/dog", "class": "dog"}}}}.')
    return entries


def _can_name_folder(name: str) -> bool:
    return bool(name.strip(" .")) and name == name.strip() and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _read_subject(source: Path, name: str, entry: Mapping[str, Any], mask_folder: Path | None) -> Subject:
    where = f"Subject {name!r:.80} of {source}"
    class_noun, initializer = _read_words(where, entry)
    path = _find_path(where, source, entry["path"])
    files, captions = _find_files(where, path, entry.get("images"))
    if mask_folder is not None:
        _check_masks(where, mask_folder / name, files)
    templates = _read_templates(where, entry.get("template"))
    if templates is not None and entry.get("images") and len(templates) == len(files):
        templates, captions = None, templates  # in the authors' files, a template for each named image is its caption
    if captions is not None:  # which may have the word itself
        captions = tuple(text and text.replace(f"<{name}>", "{}") for text in captions)
    _check_captions(where, captions or ())
    prompts = None if entry.get("prompts") is None else _read_prompts(where, "prompts", entry["prompts"])
    return Subject(name, path, class_noun, initializer, files, templates, captions, prompts, mask_folder)


def _read_words(where: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """Check the fields that must have text, and return the class noun and the initializer."""
    for field, meaning in (("path", "the folder of its photos"), ("class", "a word for what it is")):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f'{where} needs a "{field}", {meaning}.')
    initializer = entry.get("initialization", entry["class"])
    if not isinstance(initializer, str) or not initializer:
        raise ValueError(f'{where} has an "initialization" that is not text: give words, or remove it to use the class.')
    return entry["class"], initializer


def _find_path(where: str, source: Path, path: str) -> Path:
    for candidate in (Path(path), source.parent / path):
        if candidate.exists():
            return candidate
    raise OSError(
        f"{where}: its path {path!r:.200} is neither in the current folder nor next to the file. "
        "Correct the path, or put the photos there."
    )


def _find_files(where: str, path: Path, images: Any) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    """Return the files of a subject, and the captions next to them if there are any."""
    if images is None:
        return _find_all_files(where, path)
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f'{where}: its "images" must be a list of file names; remove it to use all images of {path!s:.200}.')
    files = tuple(path / image for image in images)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OSError(
            f'{where}: {path} lacks {", ".join(map(repr, missing)):.200}. Put them there, or remove them from "images".'
        )
    return files, None


def _find_all_files(where: str, path: Path) -> tuple[tuple[Path, ...], tuple[str | None, ...] | None]:
    if path.is_file():  # the authors' styles are an image each
        return (path,), None
    try:
        found = images_in_folder(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    captions = tuple(caption or None for _, caption in found)  # an empty one is for templates
    return tuple(file for file, _ in found), captions if any(captions) else None


def _check_masks(where: str, folder: Path, files: Sequence[Path]) -> None:
    if not any((folder / f"{file.stem}.png").is_file() for file in files):
        raise OSError(f"{where} has no masks: {folder} should hold {files[0].stem}.png and so on.")


def _check_captions(where: str, captions: Iterable[str | None]) -> None:
    for text in captions:
        if text is not None and "{}" not in text:
            raise ValueError(f'{where}: its caption {text!r:.80} needs a "{{}}" where the placeholder goes.')


def _read_templates(where: str, template: Any) -> tuple[str, ...] | None:
    """Return the templates, or None for the built-in ones."""
    if template is None or template == BUILT_IN_TEMPLATES:
        return None
    if isinstance(template, str) and "{}" not in template:
        raise ValueError(
            f'{where} has the template {template!r:.80}. It can be "{BUILT_IN_TEMPLATES}" (the built-in templates, as without '
            'the field), a prompt with "{}" for the placeholder, or a list of such prompts.'
        )
    return _read_prompts(where, "template", [template] if isinstance(template, str) else template)


def _read_prompts(where: str, field: str, prompts: Any) -> tuple[str, ...]:
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f'{where}: its "{field}" must be a list of prompts; remove it to use the built-in ones.')
    for text in prompts:
        if "{}" not in text:
            raise ValueError(f'{where}: {text!r:.80} in its "{field}" needs a "{{}}" where the placeholder goes.')
    return tuple(prompts)
