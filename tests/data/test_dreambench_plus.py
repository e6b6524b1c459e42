"""DreamBench++, in the layout that its own code reads."""

import pytest
from PIL import Image

from diffusers_dti.data.subjects import lists_subjects, read_subjects, subject_names


@pytest.fixture
def folder(tmp_path):
    """Write an animal and a style, with one prompt that does not name its subject."""
    texts = {
        "live_subject/animal/00": "Sphynx Cat\nA sphynx cat in the snow.\na robot and a sphynx cat\n\na sphynx cats' show\n",
        "style/11": "impressionist\na boat, impressionist\n",
    }
    for name, text in texts.items():
        for path in (tmp_path / "captions" / f"{name}.txt", tmp_path / "images" / f"{name}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "captions" / f"{name}.txt").write_text(text)
    return tmp_path


def test_reads_the_published_layout(folder, caplog):
    assert lists_subjects(folder) and not lists_subjects(folder / "images" / "style")
    assert subject_names(folder) == ["live_subject_animal_00_sphynx_cat", "style_11_impressionist"]
    assert not caplog.text
    cat, style = read_subjects(folder)
    assert "Only 2 of 3 prompts of" in caplog.text and "00.txt name 'Sphynx Cat'; the others are left out." in caplog.text
    assert (cat.name, cat.class_noun, cat.learnable_property) == ("live_subject_animal_00_sphynx_cat", "Sphynx Cat", "object")
    assert cat.prompts == ("A {} in the snow.", "a robot and a {}") and cat.templates is None
    assert cat.files == (folder / "images" / "live_subject" / "animal" / "00.jpg",)
    assert style.learnable_property == "style" and style.prompts == ("a boat, {}",)
    assert [s.name for s in read_subjects(folder, ["style_11_impressionist"])] == ["style_11_impressionist"]
    with pytest.raises(ValueError, match="has no subject 'cat', only 'live_subject_animal_00_sphynx_cat'"):
        read_subjects(folder, ["cat"])


def test_one_subject_that_cannot_be_read_stops_no_other(folder):
    (folder / "images" / "style" / "11.jpg").unlink()
    assert len(read_subjects(folder, ["live_subject_animal_00_sphynx_cat"])) == 1
    with pytest.raises(OSError, match="'style_11_impressionist' of .*11.jpg' is neither"):
        read_subjects(folder)
    (folder / "captions" / "style" / "11.txt").write_text("impressionist\na boat\n")
    with pytest.raises(ValueError, match="11.txt has no prompts with 'impressionist', the subject in its first line"):
        read_subjects(folder, ["style_11_impressionist"])


def test_caption_files_that_name_no_subject(folder):
    (folder / "captions" / "style" / "11.txt").write_text("\n")
    with pytest.raises(ValueError, match="11.txt is empty: its first line should name the subject"):
        subject_names(folder)
    for file in (folder / "captions").rglob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match="captions has no .txt files, which name the subjects: unpack the data set again"):
        read_subjects(folder)
