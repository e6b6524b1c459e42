"""Generate the images of prompts, each once and from its own seed, and lay them out on a sheet."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image, PngImagePlugin

from ..atomic import atomic_file
from ..concept.hub import hub_errors
from ..concept.inversion import DirectionalInversion
from ..figures import SheetRow, paint_sheet
from ..notices import notice_dropped
from ..pipeline.protocols import Pipeline
from .progress import Bar, own_bar_hidden, pass_over, progress_bar

RESERVED_ARGUMENTS = (
    "self",
    "prompt",
    "generator",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
    "num_videos_per_prompt",
)
FRAME_MS = 1000 / 16  # of a video, at the 16 frames a second of Wan
PROVENANCE_KEY = "dti"  # of the PNG text that says what an image was generated from


@dataclass(frozen=True)
class PlannedImage:
    """An image to generate.

    Args:
        path: the PNG file for it.
        prompt: the prompt, with placeholders.
        seed: the seed of its noise.
        words: what names the file, and what metrics read.
    """

    path: Path
    prompt: str
    seed: int
    words: str = ""

    @classmethod
    def named(cls, folder: Path, number: int, words: str, prompt: str, seed: int) -> "PlannedImage":
        """Name the file `folder`/<seed>/<number>_<words>.png."""
        name = re.sub(r"[^A-Za-z0-9]+", "_", words).strip("_")[:80]
        return cls(folder / str(seed) / f"{number:02}_{name}.png", prompt, seed, words)


# -------------------------------------------------------------------------------------------------------- the concepts
@contextmanager
def concepts_loaded(
    pipe: Pipeline,
    sources: Sequence[str | Path | DirectionalInversion],
    token_scale: str | float | None = None,
    token: str | None = None,
    loras: Sequence[str | Path] = (),
) -> Iterator[str]:
    """Load concepts temporarily, with any adapters saved next to them.

    Args:
        pipe: the pipeline.
        sources: folders, Hub ids, or concepts.
        token_scale, token: see `load_directional_inversion`.
        loras: further adapters: files, or folders and Hub ids that have a `pytorch_lora_weights.safetensors`.

    Yields:
        A digest that identifies the concepts and adapters.

    Raises:
        OSError: if a source has no concept, or one of `loras` no adapter.
    """
    placeholders: list[str] = []
    adapters: list[str] = []
    files = [_adapter_of(source) for source in loras]
    digest = hashlib.sha256()
    try:
        for source in sources:
            concept = pipe.load_directional_inversion(source, token=token, token_scale=token_scale)
            placeholders.append(concept.placeholder_token)
            for component, rows in concept.embeddings.items():
                digest.update(f"{concept.placeholder_token} {component}".encode() + rows.numpy().tobytes())
            file = None if isinstance(source, DirectionalInversion) else find_adapter(source)
            if file is not None:
                files.append(file)
        for file in files:
            name = f"adapter{len(adapters)}"
            adapters.append(name)
            _load_adapter(pipe, file, name)
            digest.update(file.read_bytes())
        if len(adapters) > 1:
            pipe.set_adapters(adapters)  # loading an adapter deactivates those before it
        yield digest.hexdigest()
    finally:
        if placeholders:
            pipe.unload_directional_inversion(placeholders)
        if adapters:
            pipe.unload_lora_weights()


def _load_adapter(pipe: Pipeline, file: Path, name: str) -> None:
    """Load an adapter. Drop the notices that it has no part for the text encoders, and that there is another adapter."""
    # No argument turns them off. `load_lora_into_unet` has no such notice, but skips a LoRA's part for the text encoders.
    with notice_dropped("diffusers.loaders.lora_base", "No LoRA keys associated to"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)


def _adapter_of(source: str | Path) -> Path:
    """Return the file of an adapter, from itself, a folder or the Hub."""
    file = Path(source) if Path(source).is_file() else find_adapter(source)
    if file is None:
        raise OSError(f"{source} has no {LORA_WEIGHT_NAME_SAFE}: give the file of the LoRA.")
    return file


def find_adapter(source: str | Path) -> Path | None:
    """Find the adapter's file next to a concept, in a folder or on the Hub; None if there is no adapter.

    Raises:
        OSError: if the Hub cannot be reached or refuses.
    """
    if Path(source).exists():
        file = Path(source) / LORA_WEIGHT_NAME_SAFE
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with hub_errors(str(source)):
            return Path(hf_hub_download(str(source), LORA_WEIGHT_NAME_SAFE))
    except EntryNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------- the images
def generate_missing(
    pipe: Pipeline,
    images: Sequence[PlannedImage],
    origin: Mapping[str, Any],
    batch_size: int,
    call: Mapping[str, Any],
    bar: Bar | None = None,
) -> None:
    """Generate the images that do not exist yet, in batches, and save each batch as soon as it is finished.

    Args:
        pipe: the pipeline, with all concepts loaded.
        images: what to generate. Of a video, the first frame is kept.
        origin: what else the images depend on, as JSON values. An image whose file names another prompt, origin or call is
            generated again.
        batch_size: the number of images in a batch. Each has its own seed, so this does not change them.
        call: arguments of the pipeline's call.
        bar: the bar to advance by each image; by default one of its own.

    Raises:
        ValueError: if the call does not have an argument, or the argument is reserved.
    """
    call = _check_call(pipe, call)
    # The origin is hashed: it may name folders of this machine, and images are shared.
    common = {"origin": hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest(), "call": call}
    provenance = {}
    for planned in images:
        provenance[planned] = json.dumps({"prompt": planned.prompt, "seed": planned.seed, **common}, sort_keys=True)
    missing = [planned for planned, text in provenance.items() if read_provenance(planned.path) != text]
    with own_bar_hidden(pipe), progress_bar(len(provenance), "Generating", bar) as bar:
        pass_over(bar, len(provenance) - len(missing))
        for first in range(0, len(missing), batch_size):
            batch = missing[first : first + batch_size]
            for planned, frames in zip(batch, _generate_batch(pipe, batch, call), strict=True):
                _save(frames, planned.path, provenance[planned])
            bar.update(len(batch))


def _check_call(pipe: Pipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments and return them, for video pipelines by default with one frame."""
    parameters = signature(pipe.__call__).parameters
    allowed = []
    for name, parameter in parameters.items():
        # `**kwargs` does not count: it would hide misspelled names.
        if name not in RESERVED_ARGUMENTS and parameter.kind is not parameter.VAR_KEYWORD:
            allowed.append(name)
    wrong = [name for name in call if name not in allowed]
    if wrong:
        raise ValueError(f"{type(pipe).__name__} cannot be called with {', '.join(wrong)}. Choose from {', '.join(allowed)}.")
    if "num_frames" in parameters:
        return {"num_frames": 1, **call}
    return dict(call)


def _generate_batch(pipe: Pipeline, batch: Sequence[PlannedImage], call: Mapping[str, Any]) -> list[list[Image.Image]]:
    """Return the frames of each image, which are several if it is a video."""
    generators = [torch.Generator("cpu").manual_seed(planned.seed) for planned in batch]
    out = pipe([planned.prompt for planned in batch], generator=generators, output_type="pil", **call)
    return out.frames if "frames" in out else [[image] for image in out.images]


def read_provenance(path: Path) -> str | None:
    """Return the JSON text that says what an image was generated from, or None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.verify()  # checksums only, which is much faster than decoding
            return image.info.get(PROVENANCE_KEY)
    except Exception:  # damaged bytes lead to errors of many kinds
        return None


# A video is an animated PNG: it needs no other package, loses nothing, and says what it was generated from as any image does.
# MP4 needs imageio with ffmpeg, or OpenCV, and another place for that text; GIF has 256 colors.
def _save(frames: Sequence[Image.Image], path: Path, provenance: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text(PROVENANCE_KEY, provenance)
    video = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MS, "loop": 0} if len(frames) > 1 else {}
    with atomic_file(path) as temporary:
        frames[0].save(temporary, format="PNG", pnginfo=text, **video)


# ---------------------------------------------------------------------------------------------------------- the sheets
def contact_sheet(images: Iterable[PlannedImage]) -> Image.Image:
    """Paint a sheet of generated images: a row for each prompt, a column for each seed."""
    rows: dict[str, dict[str, Path]] = {}
    for image in images:
        rows.setdefault(image.prompt, {})[f"seed {image.seed}"] = image.path
    return grid(rows)


def grid(rows: Mapping[str, Mapping[str, Path]]) -> Image.Image:
    """Paint a sheet of image files.

    Args:
        rows: by the row's label, the files by the titles of their columns. A row may lack some of the columns.
    """
    titles: dict[str, None] = {}  # in the order in which they come up
    for row in rows.values():
        titles.update(dict.fromkeys(row))
    return paint_sheet([SheetRow([row.get(title) for title in titles], label) for label, row in rows.items()], list(titles))
