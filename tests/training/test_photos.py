"""The photos of a run: what the settings say about them."""

import pytest
from PIL import Image

from diffusers_dti import DTIConfig
from diffusers_dti.families.stable_diffusion import StableDiffusionXL
from diffusers_dti.training.photos import logger, photos_by_placeholder


def load(images, **settings):
    return photos_by_placeholder(DTIConfig(initializer_token="dog", **settings).resolve(StableDiffusionXL), images, None, None)


@pytest.mark.parametrize(
    ("sizes", "counts", "smallest", "better"),
    [
        ([(640, 320), (320, 320)], None, "", 0),
        ([(640, 319), (900, 700)], "1 of 2", "640 x 319", 576),
        ([(20, 30)], "1 of 1", "20 x 30", 64),
    ],
)
def test_small_photos_are_said(sizes, counts, smallest, better, caplog):
    logger.addHandler(caplog.handler)
    try:
        load([Image.new("RGB", size) for size in sizes], placeholder_token="<dog>", resolution=640)
    finally:
        logger.removeHandler(caplog.handler)
    said = (
        f"{counts} photos are enlarged more than twice for the resolution of 640, the smallest one from {smallest} pixels: "
        f"larger photos or resolution={better} would be better."
    )
    assert {record.message for record in caplog.records} == ({said} if counts else set())


def test_captions_may_hold_each_concepts_own_placeholder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
        (tmp_path / name / "0.txt").write_text(f"a <{name}> on grass")
    found = load({"<a>": tmp_path / "a", "<b>": tmp_path / "b"}, resolution=16)
    assert [photo.caption for own in found.values() for photo in own] == ["a {} on grass"] * 2
