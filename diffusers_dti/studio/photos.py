"""Uploaded photos: checked, copied, and shown with the crops that training cuts from them."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..data.images import IMAGE_SUFFIXES, Photo, images_in_folder, load_photos
from ..training.config import DTIConfig
from ..training.crops import Crop, make_crops

MAX_MEGABYTES = 50  # of a file
TILE = 320  # pixels of a thumbnail's short side
LINE = (255, 140, 0)  # the color of a crop's outline
CAPTION = ".txt"


def copy_uploads(uploads: Sequence[str | Path], folder: Path) -> None:
    """Copy uploaded files into a folder, where masks and captions are beside their photos.

    Raises:
        ValueError: if there are none, or one has the wrong kind or size, or two have one name.
    """
    files = [Path(upload) for upload in uploads]
    if not files:
        raise ValueError("No photos yet: add 3 to 6 photos of the subject.")
    for name, count in Counter(file.name for file in files).items():
        if count > 1:
            raise ValueError(f"{count} files are named {name}: give each a name of its own.")
    for file in files:
        if file.suffix.lower() not in {*IMAGE_SUFFIXES, CAPTION}:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{file.name} is not a photo ({kinds}), nor a caption ({CAPTION}): remove it.")
        if (size := file.stat().st_size / 1e6) > MAX_MEGABYTES:
            raise ValueError(f"{file.name} has {size:.0f} MB, and {MAX_MEGABYTES} MB is the most: make it smaller.")
        shutil.copyfile(file, folder / file.name)


def read_photos(folder: Path, resolution: int | None, placeholder: str | None) -> list[Photo]:
    """Read the photos of a folder as training does.

    Raises:
        ValueError: if there are none, or a photo, mask or caption cannot be used.
        OSError: if a file is not an image.
    """
    try:
        return load_photos(folder, resolution=resolution, placeholder=placeholder)
    except (OSError, ValueError) as error:  # of which the user knows the name, and not the folder
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(str(error).replace(f"{folder}/", "").replace(str(folder), "The upload")) from error


def preview(uploads: Sequence[str | Path], resolution: int, placeholder: str | None) -> list[tuple[Image.Image, str]]:
    """Show what training will see of uploaded photos.

    Args:
        uploads: the files of the photos, with masks and captions.
        resolution: the side of the crops in pixels.
        placeholder: a word that captions may have in place of "{}".

    Returns:
        A thumbnail of each photo with its name and how often it is cut. Crops are outlined, and what is masked out is pale.

    Raises:
        ValueError: if a file has the wrong kind or size, or a photo, mask or caption cannot be used.
        OSError: if a file is not an image.
    """
    defaults = DTIConfig()
    with tempfile.TemporaryDirectory(prefix="dti-") as temporary:
        folder = Path(temporary)
        copy_uploads(uploads, folder)
        names = [path.name for path, _ in images_in_folder(folder)]
        photos = read_photos(folder, resolution, placeholder)
    crops = make_crops(photos, resolution, defaults.crops_per_image, defaults.seed)
    shown = []
    for number, (name, photo) in enumerate(zip(names, photos, strict=True)):
        own = [crop for crop in crops if crop.photo == number]
        text = f"{len(own)} crop{'s' if len(own) > 1 else ''}{', masked' if photo.mask else ''} · {name}"
        shown.append((_thumbnail(photo, own, resolution), text))
    return shown


def _thumbnail(photo: Photo, crops: Sequence[Crop], resolution: int) -> Image.Image:
    image = photo.image
    if photo.mask is not None:
        pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.75)
        image = Image.composite(image, pale, photo.mask)
    scale = TILE / resolution
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    canvas = ImageDraw.Draw(image)
    for crop in crops:
        top, left = crop.corner
        box = [left, top, left + resolution, top + resolution]
        canvas.rectangle([round(x * scale) - (x > resolution) for x in box], outline=LINE, width=2)
    return image
