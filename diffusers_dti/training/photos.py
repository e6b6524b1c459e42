"""The photos of a run, by the placeholder of the concept that they show."""

from collections.abc import Mapping, Sequence

from diffusers.utils import logging

from ..data.images import ImageInput, ImageSource, Photo, load_photos
from .config import ResolvedConfig

logger = logging.get_logger(__name__)

MAX_ENLARGEMENT = 2  # without a warning; what is blurred in all photos is learned as well

Images = ImageSource
Captions = Sequence[str | None]
Masks = Sequence[ImageInput | None]


def photos_by_placeholder(
    config: ResolvedConfig,
    images: Images | Mapping[str, Images],
    captions: Captions | None,
    masks: Masks | None,
) -> dict[str, list[Photo]]:
    """Load the photos of each concept.

    Args:
        config: the settings of the run.
        images, captions, masks: see `DTITrainer.fit`.

    Raises:
        ValueError: if photos, captions or masks do not fit together, or a mapping does not fit the settings.
        OSError: if a file is not an image.
    """
    if not isinstance(images, Mapping):
        placeholder = _single_placeholder(config)
        return {placeholder: _load(config, placeholder, images, captions, masks)}
    if captions is not None or masks is not None:
        raise ValueError("With several concepts, captions are `.txt` files or a column, and masks are the photos' own.")
    _check_placeholders(config, images)
    return {placeholder: _load(config, placeholder, own, None, None) for placeholder, own in images.items()}


def _load(
    config: ResolvedConfig, placeholder: str, images: Images, captions: Captions | None, masks: Masks | None
) -> list[Photo]:
    """Load the photos of a concept, and warn if they are much smaller than the crops."""
    photos = load_photos(images, captions, masks, config.resolution, placeholder)
    sizes = [photo.original_size or photo.image.size for photo in photos]
    small = sorted((size for size in sizes if MAX_ENLARGEMENT * min(size) < config.resolution), key=min)
    if small:
        width, height = small[0]
        better = max(MAX_ENLARGEMENT * min(small[0]) // 64, 1) * 64  # a multiple that every family takes
        logger.warning(
            f"{len(small)} of {len(photos)} photos are enlarged more than twice for the resolution of {config.resolution}, the "
            f"smallest one from {width} x {height} pixels: larger photos or resolution={better} would be better."
        )
    return photos


def _single_placeholder(config: ResolvedConfig) -> str:
    """Return the placeholder of the only concept, and warn about names that the user should choose."""
    if config.placeholder_token is None:
        logger.warning("No placeholder_token given. Prompts call the concept by its placeholder, so choose one of your own.")
    if config.initializer_token is None:
        logger.warning(
            'No initializer_token given. An initializer, a word such as "dog" for what the photos show, lets training start '
            'close to its goal; "auto" finds one.'
        )
    return config.placeholder_token or "<concept>"


def _check_placeholders(config: ResolvedConfig, images: Mapping[str, Images]) -> None:
    """Check that the keys of a mapping are the placeholders that the settings are for."""
    given = config.initializer_token
    others = sorted(given.keys() - images.keys()) if isinstance(given, Mapping) else []
    if not images or others or config.placeholder_token is not None:
        raise ValueError(
            "A mapping goes from placeholders to photos. It needs at least one placeholder, initializers for no other ones "
            f"({', '.join(others) or 'none here'}), and no `placeholder_token`. To train on a `DatasetDict`, give one split."
        )
