"""Metrics of pictures, one number a picture: likeness to the photos by DINOv2, to the text by SigLIP or CLIP, or your own."""

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image, ImageChops
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..data.images import Photo

if TYPE_CHECKING:
    from ..data.subjects import Subject

BATCH = 16

# Always PIL, which the published numbers were computed with: torchvision, where there is one, resizes a little differently.
# transformers 5 says that in other words.
PIL_BACKEND = {"backend": "pil"} if find_spec("transformers.image_processing_backends") else {"use_fast": False}


class Metric(Protocol):
    """What a metric is: a function, or an object that can be called like one."""

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], subject: "Subject") -> dict[str, list[float]]:
        """Under the name of each score, a number for each picture.

        Args:
            pictures: what was drawn, RGB.
            texts: what each of them was to show, with the class word in the token's place: "a dog in the jungle".
            subject: whose `photos` and `name` may be used.
        """
        ...


class _Model:
    """A model of transformers in float32, with what prepares pictures for it.

    Args:
        model: id on the Hub, or a folder.
        device: where it computes; by default the GPU where there is one.

    Raises:
        OSError: for a model that cannot be had.
    """

    def __init__(self, model: str | Path, device: str | torch.device | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = _open(AutoImageProcessor.from_pretrained, model, **PIL_BACKEND)
        self.model = _open(AutoModel.from_pretrained, model, dtype=torch.float32).to(self.device).eval()

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, 3, height, width) as the model wants them."""
        images = [picture.convert("RGB") for picture in pictures]
        return self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)


class ImageSimilarity(_Model):
    """Score "dinov2": cosine between a picture and each photo of the subject, the mean over photos.

    Features are the CLS token of the last hidden state. What a photo's mask leaves out is black. Those of photos are computed
    once per name of a subject.
    """

    def __init__(self, model: str | Path = "facebook/dinov2-base", device: str | torch.device | None = None):
        super().__init__(model, device)
        self._references: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], subject: "Subject") -> dict[str, list[float]]:
        if subject.name not in self._references:
            self._references[subject.name] = self._features([_masked(photo) for photo in subject.photos])
        cosines = self._features(pictures) @ self._references[subject.name].T  # (pictures, photos)
        return {"dinov2": cosines.mean(1).tolist()}

    def _features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, width), of length 1."""
        states = [self.model(pixel_values=self.pixels(batch)).last_hidden_state[:, 0] for batch in _batches(pictures)]
        return normalize(torch.cat(states), dim=-1)


class _PictureText(_Model):
    """A model of pictures and texts. As in the authors' evaluation a text ends with a full stop."""

    def __init__(self, model: str | Path, device: str | torch.device | None = None):
        super().__init__(model, device)
        self.tokenizer = _open(AutoTokenizer.from_pretrained, model)

    @torch.inference_mode()
    def _outputs(self, pictures: Sequence[Image.Image], texts: Sequence[str], **padding: Any) -> Iterator[Any]:
        """What the model makes of each batch of pictures and their texts."""
        for batch in _batches(list(zip(pictures, texts, strict=True))):
            images, sentences = zip(*batch)
            sentences = [f"{text.removesuffix('.')}." for text in sentences]
            ids = self.tokenizer(sentences, truncation=True, return_tensors="pt", **padding)["input_ids"]
            # No attention mask: SigLIP never saw one in training, and CLIP reads nothing after its end token.
            yield self.model(input_ids=ids.to(self.device), pixel_values=self.pixels(images))


class SigLIP(_PictureText):
    """Score "siglip": the probability that a picture and its text belong together."""

    def __init__(self, model: str | Path = "google/siglip-base-patch16-512", device: str | torch.device | None = None):
        super().__init__(model, device)

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], subject: "Subject") -> dict[str, list[float]]:
        # the length that it was trained with: its text vector is read at the last position
        batches = self._outputs(pictures, texts, padding="max_length", max_length=64)
        return {"siglip": [x for out in batches for x in out.logits_per_image.diagonal().sigmoid().tolist()]}


class CLIP(_PictureText):
    """Score "clip": cosine between a picture and its text."""

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14", device: str | torch.device | None = None):
        super().__init__(model, device)

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str], subject: "Subject") -> dict[str, list[float]]:
        batches = self._outputs(pictures, texts, padding=True)
        cosines = (torch.cosine_similarity(out.image_embeds, out.text_embeds) for out in batches)
        return {"clip": [x for batch in cosines for x in batch.tolist()]}


METRICS: dict[str, Callable[..., Metric]] = {"dinov2": ImageSimilarity, "siglip": SigLIP, "clip": CLIP}


def get_metric(spec: str, device: str | torch.device | None = None) -> Metric:
    """The metric that a word stands for.

    Args:
        spec: "dinov2", "siglip" or "clip", alone or with another model, "dinov2=folder-or-id"; or "path/to/file.py:function"
            for one of your own (see `Metric`).
        device: of the model.

    Raises:
        ValueError: for anything else. OSError: for a model or a file that cannot be had.
    """
    file, _, function = spec.rpartition(":")
    if file.endswith(".py"):
        return _own(Path(file), function)
    name, equals, model = spec.partition("=")
    if name not in METRICS or (equals and not model):
        raise ValueError(
            f'There is no metric {spec!r}: give one of {", ".join(METRICS)}, alone or with a model, "{next(iter(METRICS))}='
            'folder-or-id", or "path/to/file.py:function" for one of your own.'
        )
    return METRICS[name](*([model] if model else []), device=device)


def _own(file: Path, function: str) -> Metric:
    """From a file that may import its neighbours."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file} to take the metric {function!r} from.")
    spec = spec_from_file_location(f"diffusers_dti_own_{file.stem}", file)
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, folder := str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    metric = getattr(module, function, None)
    if not callable(metric):
        there = [
            name for name, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == spec.name
        ]
        raise ValueError(f"{file} has no function {function!r}; it has {', '.join(there) or 'none'}.")
    return metric


def _open(opener: Callable[..., Any], model: str | Path, **kwargs: Any) -> Any:
    try:
        return opener(model, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"{model} needs a package that is not there (pip install sentencepiece protobuf?): {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(
            f"The model {model} cannot be had: check its name and your connection, or give the folder of a copy. {error}"
        ) from error


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _masked(photo: Photo) -> Image.Image:
    if photo.mask is None:
        return photo.image
    return ImageChops.multiply(photo.image, Image.merge("RGB", [photo.mask] * 3))
