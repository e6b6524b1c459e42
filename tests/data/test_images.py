import os
import re
import weakref

import numpy as np
import pytest
import torch
from helpers import no_hanging
from PIL import Image

from diffusers_dti.data import images as images_module
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
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
        ({"captions": ["a {}", "a <cat>"], "placeholder": "<dog>"}, "caption of photo 2, 'a <cat>', needs .* or <dog>"),
        ({"masks": [None]}, "masks must be a list"),
    ],
)
def test_rejects_captions_and_masks_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_photos([Image.new("RGB", (4, 4))] * 2, **arguments)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_pictures_of_16_bits_keep_their_range(tmp_path, name):
    """Pillow itself would cut them off at 255."""
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / name)
    (photo,) = load_photos(tmp_path / name)
    assert photo.image.mode == "RGB"
    for channel in np.moveaxis(np.asarray(photo.image), -1, 0):
        np.testing.assert_allclose(channel, ramp / 257, atol=0.5001)
    (masked,) = load_photos(Image.new("RGB", (64, 64)), masks=[tmp_path / name])
    assert len(np.unique(np.asarray(masked.mask))) == 256


@pytest.mark.parametrize(
    ("pixels", "mode", "expected"),
    [
        (np.array([[0, 32896, 65535]], np.uint16), "I;16", [0, 128, 255]),
        (np.array([[0, 4095, 4095]], np.uint16), "I;16", [0, 16, 16]),  # dark, as any viewer shows it
        (np.array([[0, 32896, 65535]], np.dtype(">u2")), "I;16B", [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int32), "I", [0, 128, 255]),
        (np.array([[-5, 32896, 65535]], np.int32), "I", [0, 128, 255]),
        (np.array([[0, 2**20, 2**21]], np.int32), "I", [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), "F", [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), "F", [0, 128, 255]),
        (np.array([[0, 32896, np.nan]], np.float32), "F", [0, 128, 0]),
        (np.zeros((1, 3), np.float32), "F", [0, 0, 0]),
        (np.full((1, 3), np.nan, np.float32), "F", [0, 0, 0]),
    ],
)
def test_every_range_of_gray_is_converted(pixels, mode, expected):
    image = Image.frombytes(mode, (3, 1), pixels.tobytes())
    assert [p[0] for p in np.asarray(load_photos(image)[0].image)[0].tolist()] == expected


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (np.zeros((8, 8, 3), np.uint8), "ndarray"),
        ([np.zeros((8, 8, 3), np.uint8)], "ndarray"),
        (torch.zeros(3, 8, 8), "Tensor"),
        ([torch.zeros(3, 8, 8)], "Tensor"),
        ([None], "NoneType"),
        (None, "NoneType"),
        (3, "int"),
        (b"photo.png", "bytes"),
    ],
)
def test_what_is_no_photo_is_named(images, kind):
    with pytest.raises(TypeError, match=rf"^A photo is a path or a PIL image, not {kind}\b.*Image\.fromarray"):
        load_photos(images)


def test_photos_may_come_from_an_iterator(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(load_photos(Image.new("RGB", (4, 4)) for _ in range(3))) == 3
    assert len(load_photos(iter([tmp_path / "a.png", str(tmp_path / "a.png")]))) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
def test_captions_in_the_encodings_of_common_editors(tmp_path, encoding):
    text = "a {} au café, 犬\r\n"
    data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    assert load_photos(tmp_path)[0].caption == "a {} au café, 犬"


def test_a_caption_in_an_unknown_encoding_is_refused(tmp_path):
    """Latin-1 cannot be told from other encodings of one byte for each letter."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a {} au café".encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path / 'a.txt'))} is not in UTF-8 or UTF-16: save it in UTF-8\."
    ):
        load_photos(tmp_path)


@pytest.mark.parametrize("captions", [["a {}", 3], (x for x in ["a {}", "a {}"]), {"a {}": 1, "b {}": 2}])
def test_captions_that_are_no_texts_are_refused(captions):
    with pytest.raises(ValueError, match="caption"):
        load_photos([Image.new("RGB", (4, 4))] * 2, captions)


def test_a_damaged_picture_is_named_whatever_is_wrong_with_it(tmp_path):
    """Pillow has many kinds of errors for them."""
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 90).save(whole)
    data = whole.read_bytes()
    for number, torn in enumerate((b"", data[:30], data[:40], data[:12] + b"\xff" * 9 + data[21:], data[:60] + data[90:])):
        path = tmp_path / f"{number}.png"
        path.write_bytes(torn)
        with pytest.raises(OSError, match=rf"^{re.escape(str(path))} is not an image that can be opened"):
            load_photos(path)


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"a\.png is not an image that can be opened.*64 pixels"):
        load_photos(tmp_path)


def test_one_photo_at_a_time_is_in_memory_in_full_size(tmp_path, monkeypatch):
    """40 photos of 12 megapixels took 2.6 GB."""
    large, most = [], []
    original = images_module.open_image

    def opened(source):
        image = original(source)
        large.append(weakref.ref(image))
        most.append(sum(ref() is not None for ref in large))
        return image

    monkeypatch.setattr(images_module, "open_image", opened)
    for i in range(4):
        Image.new("RGB", (40, 20)).save(tmp_path / f"{i}.png")
    assert [photo.image.size for photo in load_photos(tmp_path, resolution=8)] == [(16, 8)] * 4
    assert max(most) <= 2  # the one before goes when the next one has been opened


def test_captions_may_hold_the_placeholder_or_nothing(tmp_path):
    for name, caption in (("a", "a photo of <dog>, a {}"), ("b", " \n"), ("c", "a {}")):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    assert [p.caption for p in load_photos(tmp_path, placeholder="<dog>")] == ["a photo of {}, a {}", None, "a {}"]
    given = [Image.new("RGB", (4, 4))] * 2
    assert [p.caption for p in load_photos(given, ["my <dog>", ""], placeholder="<dog>")] == ["my {}", None]


def test_masks_beside_photos_are_found(tmp_path, caplog):
    """As OneTrainer names them. A mask beside a photo replaces its transparency, and given masks replace both."""
    for name, alpha in (("a.jpg", None), ("b.png", 90), ("c.png", 90)):
        image = Image.new("RGB", (4, 4)) if alpha is None else Image.new("RGBA", (4, 4), (0, 0, 0, alpha))
        image.save(tmp_path / name)
    for name in ("a", "b"):
        Image.new("L", (8, 8), 200).save(tmp_path / f"{name}-masklabel.png")
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}-condlabel.png")  # OneTrainer's, for models of another kind
    logger.addHandler(caplog.handler)
    try:
        photos = load_photos(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.text and [p.mask.size for p in photos] == [(4, 4)] * 3
    assert [p.mask.getextrema()[0] for p in photos] == [200, 200, 90]
    assert [p.mask for p in load_photos([tmp_path / "b.png"], masks=[None])] == [None]
    assert load_photos([str(tmp_path / "a.jpg")])[0].mask.getextrema() == (200, 200)


def test_a_missing_folder_is_not_taken_for_an_image(tmp_path):
    with pytest.raises(OSError, match="dgo does not exist: give a folder of 3 to 6 photos"):
        load_photos(tmp_path / "dgo")
