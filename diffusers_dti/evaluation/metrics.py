"""Metrics, which compute a number for each image.

DINOv2 compares images with the photos, SigLIP and CLIP compare them with the prompts, and a function of yours can be a metric.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..data.images import Photo
from ..data.subjects import Subject

BATCH = 16

# Always PIL, which the published numbers were computed with: torchvision resizes a little differently. transformers 5 has
# another argument for that.
PIL_BACKEND = {"backend": "pil"} if find_spec("transformers.image_processing_backends") else {"use_fast": False}

T = TypeVar("T")


class Metric(Protocol):
    """A metric: a function, or an object that can be called like one."""

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], subject: Subject, /) -> dict[str, list[float]]:
        """Score images.

        Args:
            images: the generated images, RGB.
            texts: the prompt of each, with the class noun in the placeholder's place: "a dog in the jungle".
            subject: what the images should show, with its `name` and `photos`.

        Returns:
            For the name of each score, a finite number for each image.
        """
        ...


class _VisionModel:
    """A model of transformers in float32, with its image processor.

    Args:
        model: id on the Hub, or a folder.
        device: the device to compute on; by default a GPU if there is one.

    Raises:
        OSError: if the model cannot be loaded.
    """

    def __init__(self, model: str | Path, device: str | torch.device | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = _open(AutoImageProcessor.from_pretrained, model, **PIL_BACKEND)
        self.model = _open(AutoModel.from_pretrained, model, dtype=torch.float32).to(self.device).eval()

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return n images as the model expects them, (n, 3, height, width)."""
        converted = [image.convert("RGB") for image in images]
        return self.processor(images=converted, return_tensors="pt")["pixel_values"].to(self.device)


class ImageSimilarity(_VisionModel):
    """Score "dinov2": the mean cosine between an image and the photos of the subject.

    Features are the CLS token of the last hidden state. Parts of a photo outside its mask are black. The photos of a subject
    are encoded once for its name.

    Args:
        model, device: see `get_metric`.
    """

    def __init__(self, model: str | Path = "facebook/dinov2-base", device: str | torch.device | None = None):
        super().__init__(model, device)
        self._references: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], subject: Subject, /) -> dict[str, list[float]]:
        if subject.name not in self._references:
            self._references[subject.name] = self._features([_masked(photo) for photo in subject.photos])
        cosines = self._features(images) @ self._references[subject.name].T  # (images, photos)
        return {"dinov2": cosines.mean(1).tolist()}

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return n features of length 1, (n, width)."""
        states = [self.model(pixel_values=self.pixels(batch)).last_hidden_state[:, 0] for batch in _batches(images)]
        return normalize(torch.cat(states), dim=-1)


class _ImageTextModel(_VisionModel):
    """A model of images and texts. As in the authors' evaluation, a text ends with a period."""

    def __init__(self, model: str | Path, device: str | torch.device | None = None):
        super().__init__(model, device)
        self.tokenizer = _open(AutoTokenizer.from_pretrained, model)

    @torch.inference_mode()
    def _outputs(self, images: Sequence[Image.Image], texts: Sequence[str], **padding: Any) -> Iterator[Any]:
        """Yield the model's output for each batch of images and their texts."""
        for batch in _batches(list(zip(images, texts, strict=True))):
            sentences = [f"{text.removesuffix('.')}." for _, text in batch]
            ids = self.tokenizer(sentences, truncation=True, return_tensors="pt", **padding)["input_ids"]
            # Without an attention mask: SigLIP was trained without one, and CLIP reads nothing after its end token.
            yield self.model(input_ids=ids.to(self.device), pixel_values=self.pixels([image for image, _ in batch]))


class SigLIP(_ImageTextModel):
    """Score "siglip": the probability that an image and its text belong together.

    Args:
        model, device: see `get_metric`.
    """

    def __init__(self, model: str | Path = "google/siglip-base-patch16-512", device: str | torch.device | None = None):
        super().__init__(model, device)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], subject: Subject, /) -> dict[str, list[float]]:
        probabilities: list[float] = []
        # The length of its training: its text vector is read at the last position.
        for out in self._outputs(images, texts, padding="max_length", max_length=64):
            probabilities += out.logits_per_image.diagonal().sigmoid().tolist()
        return {"siglip": probabilities}


class CLIP(_ImageTextModel):
    """Score "clip": the cosine between an image and its text.

    Args:
        model, device: see `get_metric`.
    """

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14", device: str | torch.device | None = None):
        super().__init__(model, device)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], subject: Subject, /) -> dict[str, list[float]]:
        cosines: list[float] = []
        for out in self._outputs(images, texts, padding=True):
            cosines += torch.cosine_similarity(out.image_embeds, out.text_embeds).tolist()
        return {"clip": cosines}


METRICS: dict[str, Callable[..., Metric]] = {"dinov2": ImageSimilarity, "siglip": SigLIP, "clip": CLIP}


def get_metric(spec: str, device: str | torch.device | None = None) -> Metric:
    """Return a metric by its name.

    Args:
        spec: "dinov2", "siglip" or "clip", alone or with another model, "dinov2=folder-or-id"; or "path/to/file.py:function"
            for a metric of yours (see `Metric`).
        device: the device to compute on; by default a GPU if there is one.

    Raises:
        ValueError: if there is no such metric.
        OSError: if the model or the file cannot be loaded.
    """
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        return _load_function(Path(file), function)
    name, equals, model = spec.partition("=")
    if name not in METRICS or (equals and not model):
        raise ValueError(
            f'There is no metric {spec!r}: give one of {", ".join(METRICS)}, alone or with a model, "{next(iter(METRICS))}='
            'folder-or-id", or "path/to/file.py:function" for a metric of yours.'
        )
    return METRICS[name](model, device=device) if model else METRICS[name](device=device)


def _load_function(file: Path, function: str) -> Metric:
    """Load a function from a file, which may import its neighbors."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file} to load the metric {function!r} from.")
    # The prefix keeps apart a file and an installed module of the same name.
    spec = spec_from_file_location(f"diffusers_dti_own_{file.stem}", file)
    assert spec is not None and spec.loader is not None, f"{file} is not a Python file"
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    metric = getattr(module, function, None)
    if not callable(metric):
        own = []
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == spec.name:
                own.append(name)
        raise ValueError(f"{file} has no function {function!r}; it has {', '.join(own) or 'none'}.")
    return metric


def _open(opener: Callable[..., Any], model: str | Path, **kwargs: Any) -> Any:
    try:
        return opener(model, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"{model} needs a package that is not installed (pip install sentencepiece protobuf?): {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(
            f"The model {model} cannot be loaded: check its name and your connection, or give the folder of a copy. {error}"
        ) from error


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]


def _masked(photo: Photo) -> Image.Image:
    if photo.mask is None:
        return photo.image
    return ImageChops.multiply(photo.image, Image.merge("RGB", [photo.mask] * 3))
