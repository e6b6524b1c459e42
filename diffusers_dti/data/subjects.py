"""Read the subjects to learn and to evaluate from a JSON file in the authors' format, or from DreamBench++.

    {"dog": {"path": "data/dreambooth/dog", "class": "dog", "initialization": "corgi", "template": ["my {}", "a {} on grass"]}}

Optional fields are "images", the file names to use, "learnable_property", "style" for a style, and for the evaluation
"description", called "subject" in the authors' ti.json, "prompts", and "held_out", the file names to keep from training. Other
fields are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..parsing import parse_json
from . import dreambench_plus
from . import subject_fields as fields
from .images import Photo, load_photos
from .subject_fields import LearnableProperty


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
        learnable_property: whether it is an object or a style, which chooses built-in templates and prompts.
        description: words for what it looks like, a baseline of the evaluation.
        held_out: further photos, which are kept from training.
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
    learnable_property: LearnableProperty = "object"
    description: str | None = None
    held_out: tuple[Path, ...] = ()

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

    def with_held_out_photos(self) -> "Subject":
        """Return the subject with its held-out photos in place of those to train on.

        Raises:
            ValueError: if it has none.
        """
        if not self.held_out:
            raise ValueError(
                f'{self.name} has no "held_out": name the photos to keep from training in that field, such as ["04.jpg"], and '
                "train again."
            )
        return replace(self, files=self.held_out, captions=None, held_out=())


def read_subjects(
    path: str | Path,
    instances: Sequence[str] | None = None,
    mask_folder: str | Path | None = None,
    learnable_property: LearnableProperty = "object",
) -> list[Subject]:
    """Read the subjects of a JSON file. Its paths are relative to the current folder, or else to the file's own.

    Args:
        path: the JSON file, or the folder of DreamBench++.
        instances: names of the subjects to read, in this order; None for all, in the order of the file.
        mask_folder: folder of masks, <subject>/<photo's stem>.png, white where the subject is. Not every photo needs one.
        learnable_property: what the subjects are that do not have the field.

    Raises:
        ValueError: if the file has another format, a subject is unknown, or a field is missing or does not fit.
        OSError: if a file, a folder or a photo does not exist.
    """
    path = Path(path)
    masks = None if mask_folder is None else Path(mask_folder)
    subjects = []
    for name, entry in _select(path, instances).items():
        try:
            if isinstance(entry, Path):
                entry = dreambench_plus.read_entry(path, entry)
            subjects.append(_read_subject(path, name, {"learnable_property": learnable_property} | entry, masks))
        except OSError as error:
            if error.errno is None:  # one of ours
                raise
            raise OSError(f"Subject {name!r:.80} of {path}: {error.strerror}, in {error.filename!s:.200}.") from error
    return subjects


def lists_subjects(path: Path) -> bool:
    """Return whether a path can be read by `read_subjects`, and is not a folder of one subject's photos."""
    return path.is_file() or dreambench_plus.is_dreambench_plus(path)


def subject_names(path: str | Path, instances: Sequence[str] | None = None) -> list[str]:
    """Read only the names, so that a mistake in one subject need not stop the others.

    Arguments and errors are those of `read_subjects`, except that fields and photos are not checked.
    """
    return list(_select(Path(path), instances))


def _select(path: Path, instances: Sequence[str] | None) -> dict[str, dict[str, Any] | Path]:
    """Return the entries of the subjects with these names, for DreamBench++ the files to read them from."""
    entries: Mapping[str, dict[str, Any] | Path]
    entries = dreambench_plus.find_subjects(path) if dreambench_plus.is_dreambench_plus(path) else _read_entries(path)
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
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise OSError(f"{path} {problem}: give a JSON file of subjects.")
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
    class_noun, initializer = fields.read_words(where, entry)
    path = fields.find_path(where, source, entry["path"])
    files, captions = fields.find_files(where, path, entry.get("images"))
    if mask_folder is not None:
        fields.check_masks(where, mask_folder / name, files)
    templates = fields.read_templates(where, entry.get("template"))
    if templates is not None and entry.get("images") and len(templates) == len(files):
        templates, captions = None, templates  # in the authors' files, a template for each named image is its caption
    if captions is not None:  # which may have the word itself
        captions = tuple(text and text.replace(f"<{name}>", "{}") for text in captions)
    fields.check_captions(where, captions or ())
    held_out: tuple[Path, ...] = ()
    if entry.get("held_out") is not None:
        held_out = fields.find_named_files(where, path, "held_out", entry["held_out"])
        files, captions = fields.without(where, held_out, files, captions)
    prompts = None if entry.get("prompts") is None else fields.read_prompts(where, "prompts", entry["prompts"])
    return Subject(
        name,
        path,
        class_noun,
        initializer,
        files,
        templates,
        captions,
        prompts,
        mask_folder,
        learnable_property=fields.read_learnable_property(where, entry["learnable_property"]),
        description=fields.read_description(where, entry),
        held_out=held_out,
    )
