"""The methods, each against its formula."""

import json
import math

import pytest
import torch

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.initializer import initial_concept
from diffusers_dti.training.optimizers import MAGNITUDE_RATE

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
METHODS = {
    "DTI": {},
    "DTI, trained magnitude": {"train_magnitude": True},
    "DTI by AdamW": {"optimizer": "adamw"},
    "DTI by Riemannian Adam": {"optimizer": "radam", "lr_scheduler": "cosine", "timestep_sampling": "stratified"},
    "DTI at the initializer's norm": {"token_scale": "initializer"},
    "TI": {"method": "ti"},
    "CrossInit": {"method": "crossinit"},
}


def initial_of(trainer):
    return initial_concept(trainer.family, trainer.config, "<dog>")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_family(pipe, photos, name):
    settings = METHODS[name]
    trainer = DTITrainer(pipe, **SETTINGS, **settings, max_train_steps=2)
    start = initial_of(trainer)
    learned = trainer.fit(photos)
    for component, text_encoder in find_text_encoders(pipe).items():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        assert not torch.equal(learned.directions[component], start.directions[component])
        fixed = torch.equal(learned.scales[component], start.scales[component])
        assert fixed == (learned.metadata["scale_rule"] != "learned")
        id = tokenizer("a dog", add_special_tokens=False).input_ids[-1]  # as it is inside a prompt: Gemma's "▁dog"
        norm = encoder.get_input_embeddings().weight[id].norm().item()
        at_the_words = start.scales[component].item() == pytest.approx(norm)
        assert at_the_words == (name in ("DTI at the initializer's norm", "TI"))
    assert learned.metadata["scale_rule"] == {
        "DTI at the initializer's norm": "initializer", "DTI, trained magnitude": "learned", "TI": "learned",
        "CrossInit": "learned",
    }.get(name, "mean")  # fmt: skip


def test_crossinit_starts_from_what_the_encoder_makes_of_the_word(pipe):
    start = initial_of(DTITrainer(pipe, **SETTINGS, method="crossinit"))
    for component, text_encoder in find_text_encoders(pipe).items():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        tokens = tokenizer("dog", return_tensors="pt")
        place = tokens.input_ids[0].tolist().index(tokenizer("dog", add_special_tokens=False).input_ids[0])
        with torch.no_grad():
            state = encoder(**tokens).last_hidden_state[0, place]
        torch.testing.assert_close(start.embeddings[component][0], state.float())


def test_crossinit_pulls_to_its_start(sdxl, photos):
    """With nothing but a strong pull in it, the loss is the squared distance, as AdamW's first steps make it."""
    trainer = DTITrainer(sdxl, **SETTINGS, method="crossinit", reg_lambda=1e6, max_train_steps=10, learning_rate=0.01)
    start = initial_of(trainer)
    plain = DTITrainer(sdxl, **SETTINGS, method="crossinit", reg_lambda=0.0, max_train_steps=10, learning_rate=0.01)
    distances = []
    for t in (trainer, plain):
        learned = t.fit(photos)
        sdxl.unload_directional_inversion()
        rows = [(learned.embeddings[c] - e).square().mean() for c, e in start.embeddings.items()]
        distances.append(sum(rows).item())
    assert distances[0] < 0.5 * distances[1]


def test_the_pull_is_the_mean_square_per_encoder(sdxl, photos):
    seen = []

    def look(trainer, step):
        (concept,) = loops[0].concepts
        expected = sum(
            ((r.direction.detach().double() - concept.initial.embeddings[c].double()) ** 2).mean()
            for c, r in concept.rows.items()
        )
        seen.append((concept.distance_to_start().item(), expected.item()))

    import diffusers_dti.training.trainer as module

    loops, original = [], module.Loop
    module.Loop = lambda *args: loops.append(original(*args)) or loops[0]
    try:
        DTITrainer(sdxl, **SETTINGS, method="crossinit", max_train_steps=3).fit(photos, callback_on_step_end=look)
    finally:
        module.Loop = original
    assert all(a == pytest.approx(b, rel=1e-5) and b > 0 for a, b in seen) and len(seen) == 3


def test_a_trained_magnitude_takes_adams_first_step(sdxl, photos):
    """Whatever the gradient's size, it is one rate long: here the factor's logarithm moves by rate x batch size."""
    trainer = DTITrainer(sdxl, **SETTINGS, train_magnitude=True, max_train_steps=1)
    learned, start = trainer.fit(photos), initial_of(trainer)
    for component, scale in learned.scales.items():
        moved = (scale / start.scales[component]).log().abs()
        # a little less where the gradient is not large beside Adam's epsilon
        assert 0.9 * MAGNITUDE_RATE * 2 < moved.item() < 1.0001 * MAGNITUDE_RATE * 2


def test_the_dco_loss(sdxl, photos):
    """It starts at log 2, where its gradient is beta / 2 times the plain one: the same first step on the sphere."""
    common = SETTINGS | {"kappa": 0.0, "max_train_steps": 1, "adapter_start_step": 0, "learning_rate": 0.01}
    plain = DTITrainer(sdxl, **common).fit(photos)
    sdxl.unload_directional_inversion()
    trainer = DTITrainer(sdxl, **common, method="dco")
    learned = trainer.fit(photos)
    sdxl.unload_lora_weights()
    assert trainer.history[-1]["loss"] == pytest.approx(math.log(2))
    for component, v in plain.directions.items():
        torch.testing.assert_close(learned.directions[component], v, rtol=0, atol=1e-6)


def test_the_dco_loss_of_a_changed_adapter(sdxl, photos):
    """-log sigmoid(-beta (with - without)), each the plain loss of the same batch."""
    import diffusers_dti.training.trainer as module

    loops, original = [], module.Loop
    module.Loop = lambda *args: loops.append(original(*args)) or loops[0]
    generator = torch.Generator().manual_seed(0)

    def look(trainer, step):
        (loop,) = loops
        (concept,) = loop.concepts
        for p in loop.adapter.parameters.values():
            p.data.normal_(0, 3.0, generator=generator)  # a difference far above rounding, in every tiny pipeline
        batch = concept.samples.batch(0, 2, torch.device("cpu"))
        with torch.no_grad():
            conditioning = loop.family.encode_prompts(batch.prompts, batch.zero_pads)
            with_it = loop.family.loss(batch, conditioning)
            sdxl.unet.disable_adapters()
            without = loop.family.loss(batch, conditioning)
            sdxl.unet.enable_adapters()
            found = loop.stepper._loss(concept, 0)
        expected = math.log1p(math.exp(100.0 * (with_it.double() - without.double())))
        assert found.item() == pytest.approx(expected, rel=1e-3) and abs(expected - math.log(2)) > 1e-3
        seen.append(step)

    seen = []
    try:
        trainer = DTITrainer(sdxl, **SETTINGS, method="dco", dco_beta=100.0, max_train_steps=1, adapter_start_step=0)
        trainer.fit(photos, callback_on_step_end=look)
    finally:
        module.Loop = original
    assert seen == [1]


@pytest.mark.parametrize("name", ["TI", "DTI by AdamW", "DTI, trained magnitude", "DTI with a LoRA"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_gradient_that_is_not_finite_costs_nothing(sdxl, photos, monkeypatch, name, precision):
    """No optimizer steps, and what is learned stays finite; in float16 the samples come again."""
    settings = METHODS.get(name, {"adapter": "lora", "adapter_start_step": 0})
    if precision == "float16":
        sdxl.to(torch.float16)
    trainer = DTITrainer(sdxl, **SETTINGS, **settings, max_train_steps=5)
    original, calls, moved = trainer.family.loss, [], []

    def loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(trainer.family, "loss", loss)
    learned = trainer.fit(photos, callback_on_step_end=lambda t, step: moved.append(step))
    assert all(v.isfinite().all() for v in [*learned.directions.values(), *learned.scales.values()])
    if trainer.adapter is not None:
        assert all(p.isfinite().all() for p in trainer.adapter.parameters.values())
    assert moved == [1, 2, 3, 4, 5]
    assert len(calls) >= 6 if precision == "float16" else trainer.history[-1]["skipped"] == 1


@pytest.mark.parametrize("name", ["DTI", "TI", "DTI with a LoRA"])
@pytest.mark.parametrize(("precision", "steps", "lost"), [("float32", 40, 20), ("float32", 7, 7), ("float16", 40, 20)])
def test_a_run_that_learns_nothing_ends(sdxl, photos, tmp_path, monkeypatch, name, precision, steps, lost):
    """Nothing is saved as learned, and the log is JSON."""
    settings = METHODS.get(name, {"adapter": "lora", "adapter_start_step": 0})
    sdxl.to(getattr(torch, precision))
    trainer = DTITrainer(sdxl, **SETTINGS, **settings, max_train_steps=steps, output_dir=tmp_path)
    original = trainer.family.loss
    monkeypatch.setattr(trainer.family, "loss", lambda *args: original(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match=f"<dog>: the gradients of {lost} steps in a row were not finite.* float32"):
        trainer.fit(photos)
    assert trainer.inversions == sdxl.directional_inversions == {}
    assert [path.name for path in tmp_path.iterdir()] == ["train_log.jsonl"]
    lines = (tmp_path / "train_log.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(lines) and json.loads(lines[-1])["loss"] is None
    assert json.loads(lines[-1])["skipped"] >= lost


def test_a_run_that_loses_some_steps_goes_on(sdxl, photos, monkeypatch):
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=40)
    original, calls = trainer.family.loss, []

    def loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if 2 < len(calls) < 21 else 1.0)

    monkeypatch.setattr(trainer.family, "loss", loss)
    trainer.fit(photos)
    assert trainer.history[-1]["step"] == 40 and trainer.history[-1]["skipped"] >= 15
