import json
import math

import pytest
import torch
from helpers import differing, states
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_dti.data.subjects import read_subjects
from diffusers_dti.evaluation.generation import PlannedImage, read_provenance
from diffusers_dti.evaluation.prompts import LIVE_PROMPTS, OBJECT_PROMPTS, STYLE_PROMPTS
from diffusers_dti.evaluation.protocol import BASELINES, Baseline, Run, generate_subject, plan_images, prompts_of, score
from diffusers_dti.evaluation.store import Store
from diffusers_dti.evaluation.summary import summarize

CALL = {"num_inference_steps": 1, "height": 16, "width": 16}
PROMPTS = ["a {} on the beach", "a red {}"]


@pytest.fixture
def subject(tmp_path, photos):
    """Read the subject "rex", a dog with three photos, from a file."""
    folder = tmp_path / "photos" / "rex"
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.png")
    file = tmp_path / "subjects.json"
    file.write_text(json.dumps({"rex": {"path": "photos/rex", "class": "dog"}}))
    (subject,) = read_subjects(file)
    return subject


@pytest.fixture
def run(tmp_path, sdxl, concept):
    """Make a run that has learned the subject, under another placeholder than the protocol's."""
    concept(sdxl, "<learned>", initializer="dog").save_pretrained(tmp_path / "runs" / "dti" / "rex")
    return Run("dti", tmp_path / "runs" / "dti")


@pytest.fixture
def images(tmp_path, subject, run):
    """Plan two prompts from two seeds."""
    return plan_images(run, subject, PROMPTS, [0, 5], tmp_path / "images")


@pytest.fixture
def generated(sdxl, run, subject, images):
    generate_subject(sdxl, run, subject, images, {"model": "tiny"}, 4, CALL)
    return images


class Brightness:
    """A metric that remembers what it was asked."""

    def __init__(self, name="brightness", photos=3):
        self.name, self.photos, self.asked = name, photos, []

    def __call__(self, images, texts, subject):
        assert all(image.mode == "RGB" for image in images) and len(subject.photos) == self.photos
        self.asked += texts
        return {self.name: [sum(image.convert("L").tobytes()) / (16 * 16) for image in images]}


def store(tmp_path, name="scores"):
    return Store(tmp_path / f"{name}.jsonl", [__file__])


# ------------------------------------------------------------------------------------------------------------- the plan
def test_a_run_has_a_folder_for_each_subject(run, subject):
    assert run.folder_of(subject) == run.folder / "rex"
    (run.folder / "rex" / "learned_embeds.safetensors").rename(run.folder / "rex" / "other.safetensors")
    assert run.folder_of(subject) == run.folder / "rex"  # it still has learned_embeds_2.safetensors
    (run.folder / "rex" / "learned_embeds_2.safetensors").unlink()
    with pytest.raises(OSError, match="dti has not learned rex: `dti train` it first"):
        run.folder_of(subject)


@pytest.mark.parametrize(("class_noun", "built_in"), [("dog", LIVE_PROMPTS), ("stuffed animal", OBJECT_PROMPTS)])
def test_prompts_of_a_subject(tmp_path, photos, class_noun, built_in):
    photos[0].save(tmp_path / "0.png")
    plain = {"path": str(tmp_path), "class": class_noun}
    (tmp_path / "subjects.json").write_text(json.dumps({"plain": plain, "own": plain | {"prompts": ["my {}"]}}))
    plain, own = read_subjects(tmp_path / "subjects.json")
    assert prompts_of(plain, None) == built_in and prompts_of(own, None) == ("my {}",)
    given = {"object": ["a {} at sea"], "live": ["a {} asleep"]}
    expected = ["a {} asleep"] if class_noun == "dog" else ["a {} at sea"]
    assert prompts_of(plain, given) == prompts_of(own, given) == expected


def test_a_style_has_its_own_prompts_whatever_its_class(tmp_path, photos):
    """A style named after a living thing is not a living thing, and DreamBooth's prompts are not for styles."""
    photos[0].save(tmp_path / "0.png")
    entry = {"path": str(tmp_path / "0.png"), "class": "cartoon cat", "learnable_property": "style"}
    (tmp_path / "subjects.json").write_text(json.dumps({"toon": entry}))
    (style,) = read_subjects(tmp_path / "subjects.json")
    assert prompts_of(style, None) == STYLE_PROMPTS
    assert prompts_of(style, {"object": ["a {}"], "live": ["my {}"], "style": ["a hut in {} style"]}) == ["a hut in {} style"]
    with pytest.raises(ValueError, match="no prompts for toon, which is a style: give a text file"):
        prompts_of(style, {"object": ["a {}"], "live": ["a {}"]})


def test_images_are_named_by_the_class_noun_and_generated_with_the_placeholder(tmp_path, images):
    folder = tmp_path / "images" / "dti" / "rex"
    expected = []
    for seed in (0, 5):
        for name, prompt, words in (
            ("00_a_dog_on_the_beach.png", "a <rex> on the beach", "a dog on the beach"),
            ("01_a_red_dog.png", "a red <rex>", "a red dog"),
        ):
            expected.append(PlannedImage(folder / str(seed) / name, prompt, seed, words))
    assert images == expected


# ------------------------------------------------------------------------------------------------------------ the images
def test_generates_with_the_concept_at_the_scale_of_the_run(sdxl, run, subject, generated):
    before = states(sdxl)
    for token_scale in (None, "max"):
        scaled = Run("dti", run.folder, token_scale)
        generate_subject(sdxl, scaled, subject, generated, {"model": "tiny"}, 1, CALL)
        assert not differing(before, states(sdxl))
        sdxl.load_directional_inversion(run.folder / "rex", token="<rex>", token_scale=token_scale)
        for image in generated:
            expected = sdxl(image.prompt, generator=torch.Generator("cpu").manual_seed(image.seed), **CALL).images[0]
            with Image.open(image.path) as found:
                values, others = (torch.tensor(list(x.tobytes()), dtype=torch.int) for x in (found, expected))
            assert (values - others).abs().max() <= 1
        sdxl.unload_directional_inversion()


def test_another_concept_or_model_is_generated_again(sdxl, concept, run, subject, generated):
    found = [read_provenance(generated[0].path)]
    generate_subject(sdxl, run, subject, generated, {"model": "tiny"}, 4, CALL)
    assert read_provenance(generated[0].path) == found[0]
    generate_subject(sdxl, run, subject, generated, {"model": "other"}, 4, CALL)
    found.append(read_provenance(generated[0].path))
    concept(sdxl, "<learned>", seed=1).save_pretrained(run.folder / "rex")
    generate_subject(sdxl, run, subject, generated, {"model": "other"}, 4, CALL)
    found.append(read_provenance(generated[0].path))
    assert len(set(found)) == 3


def test_baselines_show_words_and_are_scored_by_the_same_text(tmp_path, sdxl, photos):
    """The words are in the prompt alone: metrics read the class noun, as for a run."""
    photos[0].save(tmp_path / "0.png")
    entry = {"path": str(tmp_path / "0.png"), "class": "dog", "initialization": "red dog", "description": "small red dog"}
    (tmp_path / "subjects.json").write_text(json.dumps({"rex": entry, "bare": {"path": entry["path"], "class": "dog"}}))
    rex, bare = read_subjects(tmp_path / "subjects.json")
    found = {}
    for name in BASELINES:
        baseline, asked = Baseline(name), Brightness(photos=1)
        images = plan_images(baseline, rex, ["a red {}"], [3], tmp_path / "images")
        assert images[0].path == tmp_path / "images" / name / "rex" / "3" / "00_a_red_dog.png"
        generate_subject(sdxl, baseline, rex, images, {"model": "tiny"}, 1, CALL)
        (record,) = score(baseline, rex, images, {"a": (asked, store(tmp_path))})
        assert record["run"] == name and asked.asked == ["a red dog"]
        expected = sdxl(f"a red {entry[name]}", generator=torch.Generator("cpu").manual_seed(3), **CALL).images[0]
        with Image.open(images[0].path) as image:
            found[name] = image.tobytes()
        assert found[name] == expected.tobytes()
    assert len(set(found.values())) == 3
    assert plan_images(Baseline("initialization"), bare, ["a {}"], [0], tmp_path)[0].prompt == "a dog"
    with pytest.raises(ValueError, match='bare has no "description" for the baseline: add the field to its entry'):
        plan_images(Baseline("description"), bare, ["a {}"], [0], tmp_path)


# ------------------------------------------------------------------------------------------------------------ the scores
def test_scores_every_image(tmp_path, run, subject, generated):
    brightness, count = Brightness(), Brightness("other")
    metrics = {"a": (brightness, store(tmp_path, "a")), "b": (count, store(tmp_path, "b"))}
    records = score(run, subject, generated, metrics)
    assert (
        brightness.asked == count.asked == ["a dog on the beach", "a red dog"] * 2
    )  # the class noun in the placeholder's place
    assert [(r["run"], r["subject"], r["seed"]) for r in records] == [("dti", "rex", seed) for seed in (0, 0, 5, 5)]
    for record, image in zip(records, generated, strict=True):
        with Image.open(image.path) as opened:
            expected = sum(opened.convert("L").tobytes()) / (16 * 16)
        assert record["scores"] == {"brightness": expected, "other": expected}
    summary = summarize(records)["dti"]
    assert summary["pictures"] == 4
    assert summary["mean"]["other"]["mean"] == pytest.approx(sum(r["scores"]["other"] for r in records) / 4)


def test_scores_nothing_twice(tmp_path, run, subject, generated):
    brightness = Brightness()
    first = score(run, subject, generated[:2], {"a": (brightness, store(tmp_path))})
    again = score(run, subject, generated, {"a": (brightness, store(tmp_path))})
    assert brightness.asked == ["a dog on the beach", "a red dog"] * 2 and again[:2] == first
    score(run, subject, generated, {"another spec": (brightness, store(tmp_path))})
    assert len(brightness.asked) == 8


@pytest.mark.parametrize("changed", ["image", "photo", "mask"])
def test_scores_again_what_has_changed(tmp_path, run, subject, generated, changed):
    brightness = Brightness()
    score(run, subject, generated, {"a": (brightness, store(tmp_path))})
    if changed == "image":
        provenance = {"prompt": generated[1].prompt, "seed": generated[1].seed}
        info = PngInfo()
        info.add_text("dti", json.dumps(provenance))
        Image.new("RGB", (16, 16), "red").save(generated[1].path, pnginfo=info)
    elif changed == "photo":
        Image.new("RGB", (16, 16), "red").save(subject.files[0])
    masks = tmp_path / "masks"
    if changed == "mask":
        (masks / "rex").mkdir(parents=True)
        Image.new("L", (16, 16), 255).save(masks / "rex" / "1.png")
    (fresh,) = read_subjects(tmp_path / "subjects.json", mask_folder=masks if changed == "mask" else None)
    score(run, fresh, generated, {"a": (brightness, store(tmp_path))})
    assert len(brightness.asked) == 4 + (1 if changed == "image" else 4)


def test_images_that_are_missing_or_from_something_else(tmp_path, run, subject, generated):
    metrics = {"a": (Brightness(), store(tmp_path))}
    other = PlannedImage(generated[1].path, "another <rex>", generated[1].seed)
    with pytest.raises(OSError, match=r"1 of 4 images of rex are missing, the first is .*01_a_red_dog\.png"):
        score(run, subject, [generated[0], other, *generated[2:]], metrics)
    with pytest.raises(OSError, match="1 of 1 images"):
        score(run, subject, [PlannedImage(generated[1].path, generated[1].prompt, 77)], metrics)
    Image.new("RGB", (16, 16)).save(generated[2].path)  # an image that does not say what it is from
    generated[3].path.unlink()
    with pytest.raises(OSError, match="2 of 4 images of rex are missing"):
        score(run, subject, generated, metrics)
    assert not metrics["a"][0].asked and not (tmp_path / "scores.jsonl").exists()


@pytest.mark.parametrize("text", ["painted by hand", "[1]", "null", "[" * 100_000], ids=["text", "list", "null", "nested"])
def test_an_image_with_another_programs_text_is_missing(tmp_path, run, subject, images, text):
    info = PngInfo()
    info.add_text("dti", text)
    images[0].path.parent.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(images[0].path, pnginfo=info)
    with pytest.raises(OSError, match="1 of 1 images of rex are missing"):
        score(run, subject, images[:1], {"a": (Brightness(), store(tmp_path))})


def test_two_metrics_with_the_same_score(tmp_path, run, subject, generated):
    metrics = {"a": (Brightness(), store(tmp_path)), "b": (Brightness(), store(tmp_path))}
    with pytest.raises(ValueError, match="b returns the score 'brightness', and so does another metric: use only one"):
        score(run, subject, generated, metrics)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        None,
        [1.0] * 4,
        {"a": [1.0] * 3},
        {"a": [1.0] * 4, "b": [1.0] * 5},
        {"a": [1.0, 1.0, 1.0, math.nan]},
        {"a": [math.inf] * 4},
    ],
)
def test_rejects_metrics_that_return_something_else(tmp_path, run, subject, generated, columns):
    with pytest.raises(ValueError, match="mine must return a finite number for each of 4 images under each score's name"):
        score(run, subject, generated, {"mine": (lambda *args: columns, store(tmp_path))})
    assert not (tmp_path / "scores.jsonl").exists()
