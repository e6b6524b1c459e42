import pytest

from diffusers_dti.data.photo_record import check_held_out, write_record

UNKNOWN = "does not tell which photos its concept was trained on"


@pytest.fixture
def files(tmp_path):
    """Write a concept and three photos, and return the photos."""
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"rows")
    photos = [tmp_path / f"{number}.jpg" for number in range(3)]
    for photo in photos:
        photo.write_bytes(photo.name.encode())
    return photos


def test_a_photo_is_known_by_its_content(tmp_path, files):
    write_record(tmp_path, files[:2])
    check_held_out(tmp_path, files[2:])
    with pytest.raises(ValueError, match=r"was trained on 1\.jpg, which is under \"held_out\" now: train it again"):
        check_held_out(tmp_path, files[1:])
    files[0].rename(tmp_path / "copy.jpg")
    with pytest.raises(ValueError, match=r"was trained on copy\.jpg"):
        check_held_out(tmp_path, [tmp_path / "copy.jpg"])


def test_the_record_is_of_this_concept(tmp_path, files):
    with pytest.raises(ValueError, match=UNKNOWN):
        check_held_out(tmp_path, files)
    write_record(tmp_path, files[:1])
    (tmp_path / "learned_embeds_2.safetensors").write_bytes(b"another program's")
    with pytest.raises(ValueError, match=UNKNOWN):
        check_held_out(tmp_path, files[1:])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"photos": []}', "[" * 100_000], ids=lambda text: text[:20])
def test_a_damaged_record_tells_nothing(tmp_path, files, text):
    (tmp_path / "photos.json").write_text(text)
    with pytest.raises(ValueError, match=UNKNOWN):
        check_held_out(tmp_path, files)
