import json
from dataclasses import FrozenInstanceError

import pytest
from PIL import Image

from diffusers_dti.data.subjects import read_subjects, subject_names


@pytest.fixture
def write(tmp_path):
    """Write subjects to a file and return its path; photos/dog has 0.png, 1.png and 2.png, photos/cat has a.jpg."""
    for name in ("dog/0.png", "dog/1.png", "dog/2.png", "cat/a.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / name)

    def to_file(subjects):
        path = tmp_path / "subjects.json"
        path.write_text(subjects if isinstance(subjects, str) else json.dumps(subjects))
        return path

    return to_file


def dog(**more):
    return {"dog": {"path": "photos/dog", "class": "dog"} | more}


def test_reads_subjects_in_order(write, tmp_path):
    cat = {"path": "photos/cat", "class": "cat", "initialization": "grey cat", "template": "imagenet_small", "url": None}
    path = write(dog(prompts=["a {} in the snow", "a red {}"]) | {"cat": cat})
    rex, tom = read_subjects(path)
    assert (rex.name, rex.class_noun, rex.initializer, rex.placeholder_token) == ("dog", "dog", "dog", "<dog>")
    assert rex.path == tmp_path / "photos" / "dog" and [f.name for f in rex.files] == ["0.png", "1.png", "2.png"]
    assert rex.templates is None and rex.captions is None and rex.prompts == ("a {} in the snow", "a red {}")
    assert (tom.class_noun, tom.initializer, tom.templates, tom.prompts) == ("cat", "grey cat", None, None)
    assert [s.name for s in read_subjects(str(path), ["cat", "dog"])] == ["cat", "dog"]
    assert [s.name for s in read_subjects(path, ["cat"])] == ["cat"]
    assert [p.image.size for p in rex.photos] == [(8, 8)] * 3 and rex.photos is rex.photos
    assert {p.caption for p in rex.photos} == {p.mask for p in rex.photos} == {None}
    with pytest.raises(FrozenInstanceError):
        rex.name = "cat"


def test_paths_are_relative_to_the_current_folder_or_to_the_file(write, tmp_path, monkeypatch):
    path = write(dog())
    (tmp_path / "here" / "photos" / "dog").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "here" / "photos" / "dog" / "mine.png")
    assert len(read_subjects(path)[0].files) == 3
    monkeypatch.chdir(tmp_path / "here")
    assert [f.name for f in read_subjects(path)[0].files] == ["mine.png"]
    assert len(read_subjects(write(dog(path=str(tmp_path / "photos" / "dog"))))[0].files) == 3


def test_a_template_for_each_named_image_is_its_caption(write):
    texts = ["a {} on grass", "a {} indoors"]
    (subject,) = read_subjects(write(dog(images=["2.png", "0.png"], template=texts)))
    assert [f.name for f in subject.files] == ["2.png", "0.png"]
    assert subject.captions == tuple(texts) and subject.templates is None
    assert [p.caption for p in subject.photos] == texts
    for more in (
        {"images": ["2.png"], "template": texts},
        {"template": [*texts, "my {}"]},
        {"images": None, "template": texts},
    ):
        (subject,) = read_subjects(write(dog(**more)))
        assert subject.captions is None and subject.templates == tuple(more["template"])


def test_an_image_instead_of_a_folder_and_a_prompt_instead_of_a_list(write):
    (subject,) = read_subjects(write(dog(path="photos/dog/1.png", images=None, template="a house in {} style")))
    assert [f.name for f in subject.files] == ["1.png"] and subject.templates == ("a house in {} style",)
    assert len(subject.photos) == 1


def test_the_authors_list_of_styles(write):
    """The fields of their styledrop.json: an image each, no list of images, a prompt as its caption, and an address."""
    entry = {"url": None, "path": "photos/dog/1.png", "images": None, "class": "oil painting"}
    more = {"initialization": "painting in oil", "template": "A village in {} style."}
    path = write({"04": entry | more})
    (style,) = read_subjects(path, learnable_property="style")
    assert (style.placeholder_token, style.class_noun, style.initializer) == ("<04>", "oil painting", "painting in oil")
    assert [f.name for f in style.files] == ["1.png"] and style.templates == ("A village in {} style.",)
    assert style.learnable_property == "style" and read_subjects(path)[0].learnable_property == "object"


def test_the_authors_list_of_textual_inversions_subjects(write):
    entry = {"path": "photos/dog", "class": "statue", "subject": "cat statue", "initialization": "statue"}
    (subject,) = read_subjects(write({"cat_statue": entry}))
    assert (subject.class_noun, subject.initializer, subject.templates) == ("statue", "statue", None)
    assert len(subject.files) == 3 and subject.learnable_property == "object" and subject.description == "cat statue"


def test_a_subject_may_say_that_it_is_a_style(write):
    """The field goes before what is said for all subjects of the file."""
    path = write({"a": dog(learnable_property="style")["dog"], "b": dog(learnable_property="object")["dog"], "c": dog()["dog"]})
    assert [s.learnable_property for s in read_subjects(path)] == ["style", "object", "object"]
    assert [s.learnable_property for s in read_subjects(path, learnable_property="style")] == ["style", "object", "style"]


def test_a_description_in_words(write):
    plain, own = read_subjects(write(dog() | {"own": dog(description="brown dog", subject="dog")["dog"]}))
    assert plain.description is None and own.description == "brown dog"


def test_photos_that_are_held_out(write, tmp_path):
    """Training does not get them, and a caption stays with its photo."""
    texts = ["a {} on grass", "a {} indoors", "a {} asleep"]
    named = {"images": ["2.png", "0.png", "1.png"], "template": texts, "held_out": ["0.png"]}
    (subject,) = read_subjects(write(dog(**named)))
    assert [f.name for f in subject.files] == ["2.png", "1.png"] and subject.captions == (texts[0], texts[2])
    unseen = subject.with_held_out_photos()
    assert [f.name for f in unseen.files] == ["0.png"] and len(unseen.photos) == 1 and len(subject.photos) == 2
    (tmp_path / "photos" / "dog" / "1.txt").write_text("a {} asleep")
    (subject,) = read_subjects(write(dog(held_out=["0.png"])))
    assert [f.name for f in subject.files] == ["1.png", "2.png"] and subject.captions == ("a {} asleep", None)
    (plain,) = read_subjects(write(dog(held_out=None)))
    with pytest.raises(ValueError, match='dog has no "held_out": name the photos to keep from training'):
        plain.with_held_out_photos()


def test_captions_with_the_word_itself_and_empty_ones(write, tmp_path):
    for name, text in (("0", "a <dog> asleep"), ("1", ""), ("2", "a {}")):
        (tmp_path / "photos" / "dog" / f"{name}.txt").write_text(text)
    (subject,) = read_subjects(write(dog()))
    assert subject.captions == ("a {} asleep", None, "a {}") == tuple(p.caption for p in subject.photos)


def test_masks_beside_the_photos_are_no_photos(write, tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "photos" / "dog" / "1-masklabel.png")
    (subject,) = read_subjects(write(dog()))
    assert [f.name for f in subject.files] == ["0.png", "1.png", "2.png"]
    assert [p.mask and p.mask.getextrema() for p in subject.photos] == [None, (7, 7), None]


def test_captions_next_to_the_photos(write, tmp_path):
    path = write(dog())
    (tmp_path / "photos" / "dog" / "1.txt").write_text("a {} asleep\n")
    (subject,) = read_subjects(path)
    assert subject.captions == (None, "a {} asleep", None) == tuple(p.caption for p in subject.photos)
    (tmp_path / "photos" / "dog" / "1.txt").write_text("a dog asleep\n")
    with pytest.raises(ValueError, match="'dog' of .*: its caption 'a dog asleep' needs a"):
        read_subjects(path)


def test_masks_of_some_photos(write, tmp_path):
    see_through = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    see_through.putpixel((0, 0), (0, 0, 0, 0))
    see_through.save(tmp_path / "photos" / "cat" / "a.png")
    path = write(dog() | {"cat": {"path": "photos/cat", "class": "cat"}})
    (tmp_path / "masks" / "dog").mkdir(parents=True)
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "masks" / "dog" / "1.png")
    (rex,) = read_subjects(path, ["dog"], mask_folder=tmp_path / "masks")
    tom = read_subjects(path)[1]
    assert [p.mask is None for p in rex.photos] == [True, False, True]
    assert rex.photos[1].mask.getpixel((0, 0)) == 255 and rex.photos[1].mask.getpixel((7, 7)) == 0
    assert [p.mask is None for p in tom.photos] == [True, False]  # transparency
    assert all(p.mask is None for p in read_subjects(path)[0].photos)
    with pytest.raises(OSError, match="'cat' of .* has no masks: .*cat should hold a.png"):
        read_subjects(path, mask_folder=tmp_path / "masks")


@pytest.mark.parametrize("name", ["", "..", "../out", "a/b", "dog\n", " dog", "a:b"])
def test_rejects_names_that_cannot_name_a_folder(write, name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        read_subjects(write({name: dog()["dog"]}))


def test_reads_only_the_names(write):
    """A mistake in one subject does not stop the others."""
    path = write(dog() | {"cat": {"path": "photos/nowhere", "class": "cat"}})
    assert subject_names(path) == ["dog", "cat"] and subject_names(path, ["cat"]) == ["cat"]
    assert read_subjects(path, ["dog"])[0].name == "dog"
    with pytest.raises(ValueError, match="no subject 'fish'"):
        subject_names(path, ["fish"])


@pytest.mark.parametrize(
    ("subjects", "error", "message"),
    [
        ("{'dog': 1}", ValueError, r"subjects\.json is not valid JSON"),
        pytest.param("[" * 100_000, ValueError, r"subjects\.json is not valid JSON: it is nested too deeply", id="nested"),
        ("[]", ValueError, "must map names to subjects"),
        ({"dog": "photos/dog"}, ValueError, "must map names to subjects"),
        ({"dog": {"class": "dog"}}, ValueError, "'dog' of .* needs a \"path\""),
        ({"dog": {"path": "photos/dog"}}, ValueError, "'dog' of .* needs a \"class\""),
        (dog(**{"class": ""}), ValueError, "'dog' of .* needs a \"class\""),
        (dog(initialization=3), ValueError, "'dog' of .*\"initialization\" that is not text: give words, or remove it"),
        (
            dog(path="photos/doge"),
            OSError,
            "'dog' of .*photos/doge' is neither in the current folder nor next to the file. Correct",
        ),
        (dog(path="."), ValueError, r"'dog' of .* has no images"),
        (dog(images=["0.png", "7.png", "8.png"]), OSError, r"'dog' of .* lacks '7\.png', '8\.png'\. Put them there, or remove"),
        (dog(images=[]), ValueError, "'dog' of .*\"images\" must be a list of file names; remove it"),
        (dog(images="0.png"), ValueError, "'dog' of .*\"images\" must be a list of file names"),
        (dog(template="imagenet_large"), ValueError, "'dog' of .*template 'imagenet_large'. It can be \"imagenet_small\""),
        (dog(template=["a {}", "a dog"]), ValueError, "'dog' of .*'a dog' in its \"template\" needs"),
        (dog(template=[]), ValueError, "'dog' of .*\"template\" must be a list of prompts; remove it"),
        (dog(template={"a": 1}), ValueError, "'dog' of .*\"template\" must be a list of prompts"),
        (
            dog(learnable_property="face"),
            ValueError,
            "'dog' of .* has the \"learnable_property\" 'face': it can be \"object\" or",
        ),
        (dog(description=" "), ValueError, "'dog' of .* has a \"description\" that is not text: give words for"),
        (dog(held_out="0.png"), ValueError, "'dog' of .*\"held_out\" must be a list of file names; remove it"),
        (dog(held_out=["7.png"]), OSError, r"'dog' of .* lacks '7\.png'\. Put them there, or remove them from \"held_out\""),
        (dog(held_out=["0.png", "1.png", "2.png"]), ValueError, "'dog' of .*\"held_out\" leaves no photo to train on"),
        (dog(prompts=["a dog"]), ValueError, "'dog' of .*'a dog' in its \"prompts\" needs"),
        (dog(prompts="a {}"), ValueError, "'dog' of .*\"prompts\" must be a list of prompts"),
    ],
)
def test_mistakes_have_one_clear_error(write, subjects, error, message):
    with pytest.raises(error, match=message):
        read_subjects(write(subjects))


def test_unknown_subjects_and_missing_files(write, tmp_path):
    path = write({"cat": {"path": "photos/gone", "class": "cat"}} | dog())
    with pytest.raises(ValueError, match=r"subjects\.json has no subject 'rex', only 'cat', 'dog'\."):
        read_subjects(path, ["dog", "rex"])
    assert [s.name for s in read_subjects(path, ["dog"])] == ["dog"]  # the cat's photos need not exist
    with pytest.raises(OSError, match=r"is a folder: give a JSON file"):
        read_subjects(tmp_path)
    with pytest.raises(OSError, match=r"nowhere\.json does not exist: give a JSON file"):
        read_subjects(tmp_path / "nowhere.json")


def test_a_file_that_is_not_an_image_raises_when_it_is_read(write, tmp_path):
    path = write(dog())
    (tmp_path / "photos" / "dog" / "1.png").write_bytes(b"png?")
    (subject,) = read_subjects(path)
    with pytest.raises(OSError, match=r"1\.png is not an image"):
        _ = subject.photos
