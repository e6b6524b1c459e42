"""Several runs at a time against each of them alone: what they learn, write, and lose."""

import json

import pytest
import torch
from helpers import differing, states
from PIL import Image

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.families.stable_diffusion import StableDiffusionXL
from diffusers_dti.training.distributed import processes
from diffusers_dti.training.together import fit_together

SETTINGS = {"resolution": 16, "train_batch_size": 2, "max_train_steps": 4, "heldout_loss_steps": 4}
WORDS = {"<rex>": "dog", "<tom>": "red cat", "<toy2>": "toy"}


def make(pipe, **own):
    """Make a trainer for each of WORDS; `own` has further settings, a mapping of settings by placeholder among them."""
    by_word = own.pop("by_word", {})
    trainers = []
    for word, initializer in WORDS.items():
        settings = SETTINGS | {"placeholder_token": word, "initializer_token": initializer} | own | by_word.get(word, {})
        trainers.append(DTITrainer(pipe, **settings))
    return trainers


@pytest.fixture
def images(photos):
    return [photos[:2], photos[1:], photos[:1]]


def assert_same(found, expected):
    assert found.placeholder_token == expected.placeholder_token and found.metadata == expected.metadata
    for component, v in expected.directions.items():
        torch.testing.assert_close(found.directions[component], v, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.scales[component], expected.scales[component])


def test_each_run_learns_and_writes_what_it_does_alone(sdxl, images, tmp_path, monkeypatch):
    """With settings and lengths of their own."""
    monkeypatch.setattr(StableDiffusionXL, "generate", lambda *args: Image.new("RGB", (16, 16)))
    by_word = {
        "<rex>": {"method": "ti", "templates": ["my {}"]},
        "<tom>": {"learnable_property": "style", "max_train_steps": 5, "validation_prompt": "a {}"},
        "<toy2>": {"initializer_token": ["dog", "toy"], "train_batch_size": 3},
    }
    folders = {way: {word: {"output_dir": tmp_path / way / word[1:-1]} for word in WORDS} for way in ("alone", "together")}
    settings = {way: {word: by_word[word] | folders[way][word] for word in WORDS} for way in folders}
    alone = make(sdxl, checkpointing_steps=2, by_word=settings["alone"])
    captions = [["a photo of my {}", None], None, None]
    expected = []
    for trainer, own, texts in zip(alone, images, captions):
        expected.append(trainer.fit(own, texts))
        sdxl.unload_directional_inversion()
    before = states(sdxl)
    together = make(sdxl, checkpointing_steps=2, by_word=settings["together"])
    found = fit_together(together, images, captions)
    assert list(sdxl.directional_inversions) == list(WORDS)
    for trainer, other, concept, whole in zip(together, alone, found, expected):
        assert_same(concept, whole)
        assert_same(sdxl.directional_inversions[concept.placeholder_token], concept)
        assert [sorted(entry) for entry in trainer.history] == [sorted(entry) for entry in other.history]
        for entry, its in zip(trainer.history, other.history):
            assert entry == pytest.approx(its, rel=1e-4, abs=1e-2)  # an angle in degrees is rounded near 0
    sdxl.unload_directional_inversion()
    assert not differing(states(sdxl), before)
    written = {
        way: sorted(str(path.relative_to(tmp_path / way)) for path in (tmp_path / way).rglob("*") if path.is_file())
        for way in folders
    }
    assert written["together"] == written["alone"] and "tom/validation.png" in written["alone"]
    for word, concept in zip(WORDS, found):
        assert_same(DirectionalInversion.from_pretrained(tmp_path / "together" / word[1:-1]), concept)


def test_a_run_that_fails_ends_alone(sdxl, images, tmp_path, monkeypatch):
    """Before the first step and after some; the third one learns what it learns without them."""
    short = {"max_train_steps": 20, "train_batch_size": 1, "heldout_loss_steps": 0}
    whole = make(sdxl, **short)[2].fit(images[2])
    sdxl.unload_directional_inversion()
    before = states(sdxl)
    trainers = make(sdxl, **short, by_word={word: {"output_dir": tmp_path / word[1:-1]} for word in WORDS})
    (tmp_path / "torn.png").write_bytes(b"no picture")
    loss = StableDiffusionXL.sample_losses

    def lost(family, batch, conditioning):
        return loss(family, batch, conditioning) * torch.tensor([float("nan") if "<tom>" in p else 1.0 for p in batch.prompts])

    monkeypatch.setattr(StableDiffusionXL, "sample_losses", lost)
    found = fit_together(trainers, [[tmp_path / "torn.png"], *images[1:]])
    assert [type(result) for result in found] == [OSError, FloatingPointError, DirectionalInversion]
    assert "<tom>: the gradients of 20 steps in a row were not finite" in str(found[1])
    assert_same(found[2], whole)
    assert list(sdxl.directional_inversions) == ["<toy2>"]
    sdxl.unload_directional_inversion()
    assert not differing(states(sdxl), before)
    learned = {path.parent.name for path in tmp_path.rglob("learned_embeds*.safetensors")}
    assert learned == {"toy2"} and not list(tmp_path.rglob(".lock"))


def test_an_interrupted_batch_leaves_a_checkpoint_of_each(sdxl, images, tmp_path, monkeypatch):
    """From it, one goes on alone, and the others together: all learn what they learn in one go."""
    whole = fit_together(make(sdxl), images)
    sdxl.unload_directional_inversion()
    before = states(sdxl)
    by_word = {word: {"output_dir": tmp_path / word[1:-1], "resume_from_checkpoint": "latest"} for word in WORDS}
    trainers = make(sdxl, by_word=by_word)
    loss, calls = StableDiffusionXL.sample_losses, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(StableDiffusionXL, "sample_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        fit_together(trainers, images)
    monkeypatch.setattr(StableDiffusionXL, "sample_losses", loss)
    assert not differing(states(sdxl), before) and sdxl.directional_inversions == {}
    assert sorted(path.parent.name for path in tmp_path.glob("*/checkpoint-2")) == ["rex", "tom", "toy2"]
    first, *others = make(sdxl, by_word=by_word)
    for concept, expected in zip([first.fit(images[0]), *fit_together(others, images[1:])], whole):
        assert_same(concept, expected)
    log = [json.loads(line)["step"] for line in (tmp_path / "tom" / "train_log.jsonl").read_text().splitlines()]
    assert log == [4]


def test_models_that_fail_leave_the_pipeline_as_it_was(sdxl, images, monkeypatch):
    trainers = make(sdxl)
    sdxl.encode_prompt("a dog")  # transformers marks an encoder at its first call
    before = states(sdxl)

    def full(*args):
        raise torch.OutOfMemoryError("too many subjects")

    monkeypatch.setattr(StableDiffusionXL, "predict", full)
    with pytest.raises(RuntimeError, match="too many subjects"):
        fit_together(trainers, images)
    assert not differing(states(sdxl), before) and processes().num_processes == 1
    assert all(not p.requires_grad or p.grad is None for p in sdxl.unet.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dco"}, "An adapter changes the denoiser, which the subjects of a batch share"),
        ({"report_to": "tensorboard", "output_dir": "out"}, "A tracker follows one run: leave out report_to"),
        ({"by_word": {"<tom>": {"resolution": 32}}}, "Subjects of one batch have the same resolution"),
        ({"by_word": {"<tom>": {"pooling": "legacy"}}}, "Subjects of one batch have the same pooling"),
        ({"by_word": {"<tom>": {"placeholder_token": "<rex>"}}}, "a placeholder of its own, got <rex>, <rex>, <toy2>"),
    ],
)
def test_runs_that_cannot_share_a_call_are_refused(sdxl, images, settings, message):
    before = states(sdxl)
    with pytest.raises(ValueError, match=message):
        fit_together(make(sdxl, **settings), images)
    assert not differing(states(sdxl), before)


def test_other_pipelines_and_loaded_words_are_refused(sdxl, sd, images, concept):
    with pytest.raises(ValueError, match="in one pipeline, and these trainers have several"):
        fit_together([make(sdxl)[0], make(sd)[1]], images[:2])
    sdxl.load_directional_inversion(concept(sdxl, "<tom>"))
    with pytest.raises(ValueError, match="<tom> is loaded already: unload it first"):
        fit_together(make(sdxl), images)
    assert list(sdxl.directional_inversions) == ["<tom>"]


def test_photos_are_as_many_as_trainers(sdxl, photos):
    with pytest.raises(ValueError):
        fit_together(make(sdxl), [[Image.new("RGB", (16, 16))]])
