"""Image files that Pillow opens only with the help of another package."""

import re
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from diffusers_dti.data.images import load_photos


@pytest.fixture(params=["IMG_1.HEIC", "IMG_1.heif"])
def heic(request, tmp_path, monkeypatch):
    """A file of that name, in a process where nobody has registered the format yet."""
    others = {k: v for k, v in Image.registered_extensions().items() if k not in (".heic", ".heif")}
    monkeypatch.setattr(Image, "EXTENSION", others)
    path = tmp_path / request.param
    Image.new("RGB", (8, 4), "red").save(path, "PNG")  # Pillow goes by the content
    return path


def test_heic_needs_a_package_that_is_named(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    cure = 'HEIC needs the package pillow-heif: `pip install "diffusers-dti[heif]"`'
    with pytest.raises(OSError, match=rf"^{re.escape(str(heic))} is not an image .*: {re.escape(cure)}$"):
        load_photos(heic.parent)


def test_the_opener_of_heic_is_registered_once(heic, monkeypatch):
    calls = []

    def register_heif_opener():
        calls.append("registered")
        Image.EXTENSION |= {".heic": "HEIF", ".heif": "HEIF"}

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    Image.new("RGB", (8, 4)).save(heic.with_name("a.png"))
    load_photos(heic.with_name("a.png"))
    assert not calls
    assert [photo.image.size for photo in load_photos([heic, heic])] == [(8, 4)] * 2 and calls == ["registered"]


def test_a_real_heic_file(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 32), (250, 10, 10))).save(tmp_path / "a.heic")
    (photo,) = load_photos(tmp_path)
    assert photo.image.size == (64, 32)
    assert max(abs(a - b) for a, b in zip(photo.image.getpixel((5, 5)), (250, 10, 10))) < 10
