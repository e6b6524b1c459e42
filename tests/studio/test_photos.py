"""Uploads: what is refused, and what the thumbnails show."""

import pytest
from PIL import Image

from diffusers_dti.data.images import load_photos
from diffusers_dti.studio.photos import LINE, MAX_MEGABYTES, TILE, copy_uploads, preview, read_photos
from diffusers_dti.training.crops import make_crops

pytestmark = pytest.mark.studio


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "dog.png")
    return tmp_path / "dog.png"


def test_good_uploads_are_copied(photo, tmp_path):
    (tmp_path / "dog.txt").write_text("a photo of {}")
    (folder := tmp_path / "copies").mkdir()
    copy_uploads([photo, tmp_path / "dog.txt"], folder)
    (loaded,) = read_photos(folder, 16, "<dog>")
    assert loaded.caption == "a photo of {}" and loaded.image.size == (32, 16)


def test_bad_uploads_are_named(photo, tmp_path):
    (folder := tmp_path / "copies").mkdir()
    (tmp_path / "other").mkdir()
    (twin := tmp_path / "other" / "dog.png").write_bytes(photo.read_bytes())
    (pdf := tmp_path / "dog.pdf").write_bytes(b"%PDF")
    with (large := tmp_path / "large.png").open("wb") as file:
        file.truncate(int((MAX_MEGABYTES + 1) * 1e6))
    for files, message in [
        ([], "No photos yet"),
        ([photo, twin], "2 files are named dog.png"),
        ([pdf], "dog.pdf is not a photo"),
        ([large], "large.png has 51 MB, and 50 MB is the most"),
    ]:
        with pytest.raises(ValueError, match=message):
            copy_uploads(files, folder)


def test_errors_do_not_name_the_folder(photo, tmp_path):
    photo.write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"^dog.png is not an image that can be opened") as caught:
        read_photos(tmp_path, 16, None)
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "dog.txt").write_bytes(b"\xff\xfe\x00")  # its decoding fails with an error of three arguments
    with pytest.raises((OSError, ValueError)):
        read_photos(tmp_path, 16, None)


def test_thumbnails_show_the_crops_of_training(photo, tmp_path):
    ((image, text),) = preview([photo], 16, None)
    assert image.size == (2 * TILE, TILE) and text == "8 crops · dog.png"
    scale = TILE / 16
    for crop in make_crops(load_photos([photo], resolution=16), 16, 8, 42):
        assert image.getpixel((round(crop.corner[1] * scale), TILE // 2)) == LINE
    mask = Image.new("L", (40, 20))
    mask.paste(255, (0, 0, 20, 20))
    mask.save(tmp_path / "dog-masklabel.png")
    ((image, text),) = preview([photo, tmp_path / "dog-masklabel.png"], 16, None)
    assert "masked" in text
    colors = {image.getpixel((x, 10)) for x in range(2 * TILE)}
    assert (0, 0, 255) in colors and (191, 191, 255) in colors  # blue where the subject is, and pale elsewhere
