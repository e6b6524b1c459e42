import os

import pytest
from helpers import no_hanging
from PIL import Image

from diffusers_dti.data.images import load_photos, logger


def test_loads_folders_files_and_images(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (20, 10), "red").save(tmp_path / "b.jpg", exif=exif)
    Image.new("P", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("a {} on grass\n")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / ".hidden").write_text("neither")
    logger.addHandler(caplog.handler)
    try:
        loaded = load_photos(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "because they are not images: notes.md." in caplog.text
    assert [p.image.size for p in loaded] == [(8, 8), (10, 20)] and {p.image.mode for p in loaded} == {"RGB"}
    assert [p.caption for p in loaded] == [None, "a {} on grass"]
    assert [p.image.size for p in load_photos(tmp_path / "b.jpg")] == [(10, 20)]
    assert len(load_photos(Image.new("L", (4, 4)))) == 1
    both = load_photos([Image.new("L", (4, 4)), str(tmp_path / "a.png")], captions=["a {}", None])
    assert [p.caption for p in both] == ["a {}", None]


def test_loads_data_sets():
    class Dataset(list):  # what is used of `datasets.Dataset`
        column_names = ("image", "text")

    rows = Dataset({"image": Image.new("RGB", (4, 4)), "text": f"a {{}}, {i}"} for i in range(3))
    assert [p.caption for p in load_photos(rows)] == ["a {}, 0", "a {}, 1", "a {}, 2"]
    rows.column_names = ("pixels",)
    with pytest.raises(ValueError, match='needs a column "image"; it has pixels'):
        load_photos(rows)


def test_loads_a_real_data_set():
    import datasets

    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "caption": ["a {}"]})
    assert [p.caption for p in load_photos(rows.cast_column("image", datasets.Image()))] == ["a {}"]


def test_transparency_becomes_a_mask_and_white_pixels():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    assert load_photos(image)[0].mask is None
    image.putpixel((0, 0), (0, 0, 0, 0))
    (photo,) = load_photos(image)
    assert photo.image.getpixel((0, 0)) == (255, 255, 255) and photo.image.getpixel((1, 1)) == (255, 0, 0)
    assert photo.mask.getpixel((0, 0)) == 0 and photo.mask.getpixel((1, 1)) == 255
    (given,) = load_photos(image, masks=[Image.new("L", (8, 8), 255)])
    assert given.mask.size == (4, 4) and given.mask.getextrema() == (255, 255)
    assert load_photos(image, masks=[None])[0].mask is None


def test_rejects_files_that_are_not_images(tmp_path):
    with pytest.raises(ValueError, match=r"has no images.*3 to 6 photos"):
        load_photos(tmp_path)
    with pytest.raises(ValueError, match="No images were given"):
        load_photos([])
    (tmp_path / "broken.png").write_bytes(b"png?")
    with pytest.raises(OSError, match=r"broken\.png is not an image"):
        load_photos(tmp_path)
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 90).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(OSError, match=r"cut\.png is not an image"):
        load_photos([tmp_path / "cut.png"])
    with pytest.raises(OSError, match=r"nowhere\.png"):
        load_photos(tmp_path / "nowhere.png")


@pytest.mark.parametrize("size", [(1, 11), (110, 10), (400, 3)])
def test_rejects_strips(tmp_path, size):
    """Enlarged to a short side of 512 pixels, 1 x 3,000 pixels would take 14 GB."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    width, height = size
    message = rf" is {width} x {height} pixels: cut it, so that its long side is at most 10 times its short side"
    with pytest.raises(ValueError, match=rf"strip\.png{message}"):
        load_photos(tmp_path)
    with pytest.raises(ValueError, match=f"Photo 2{message}"):
        load_photos([Image.new("RGB", (4, 4)), Image.new("L", size)])
    assert load_photos(Image.new("RGB", (10, 100))) and load_photos(Image.new("RGB", (4, 4)), masks=[Image.new("L", size)])


def test_rejects_what_is_not_a_regular_file(tmp_path):
    """A pipe is not opened, which would wait for somebody to write."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for photos, masks in ((pipe, None), ([str(pipe)], None), (Image.new("RGB", (4, 4)), [pipe])):
        with pytest.raises(OSError, match=r"pipe\.png is not an image .*: there is no regular file"), no_hanging():
            load_photos(photos, masks=masks)


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "huge.png")
    with pytest.raises(OSError, match=r"huge\.png is not an image that can be opened.*decompression bomb"):
        load_photos(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": ["a {}"]}, "captions must be a list with an entry .* each of the 2 photos"),
        ({"captions": "a {}"}, "captions must be a list"),
        ({"captions": ["a {}", "a dog"]}, "caption of photo 2, 'a dog', needs"),
        ({"masks": [None]}, "masks must be a list"),
    ],
)
def test_rejects_captions_and_masks_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_photos([Image.new("RGB", (4, 4))] * 2, **arguments)
