"""One step of several runs against the steps that they take alone."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_modern import PIPELINES as MODERN

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.pipeline.exchange import inject, withdraw
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.frozen import frozen
from diffusers_dti.training.joint_step import join, take_together
from diffusers_dti.training.loop import Loop
from diffusers_dti.training.photos import photos_by_placeholder
from diffusers_dti.training.samples import prepare_all_samples
from diffusers_dti.training.starts import choose_starts, make_concepts

SETTINGS = {"resolution": 32, "train_batch_size": 2, "max_train_steps": 4, "heldout_loss_steps": 0}
# The words have one and two vectors, a mask or none, and captions of different lengths.
WORDS = {"<rex>": "dog", "<tom>": "red cat", "<toy2>": "toy"}
SMALL = ("sdxl", "sd", "sana", "sprint", "wan", "wan22")
ALL_LOSSES = {
    "method": "crossinit", "reg_lambda": 1e3, "context_lambda": 0.1, "context_prompts": ["a {} in a toy"],
    "gradient_accumulation_steps": 2,
}  # fmt: skip
LONG = "a photo of this {} with the red dog and a blue cat on the beach"


@pytest.fixture
def stage(photos):
    """Return a function that makes the loops of three runs on a pipeline, with their rows swapped in."""
    with ExitStack() as stack:

        def make(pipe, settings=None, **overrides):
            masked = Image.new("L", (16, 16))
            masked.paste(255, (0, 0, 8, 16))
            images = [(photos[:2], None, None), (photos[1:], [LONG, None], None), (photos[:1], None, [masked])]
            encoders, loops = find_text_encoders(pipe), []
            stack.callback(withdraw, pipe, list(WORDS))  # the modern pipelines are the session's
            for (word, initializer), own, given in zip(WORDS.items(), images, settings or [{}] * 3):
                common = SETTINGS | {"placeholder_token": word, "initializer_token": initializer}
                trainer = DTITrainer(pipe, **common | overrides | given)
                loaded = photos_by_placeholder(trainer.config, *own)
                config, starts = choose_starts(trainer.family, trainer.config, loaded)
                inject(pipe, [(own[0], config.pooling) for own in starts.values()], reuse_existing=False)
                with frozen(trainer.family):
                    samples = prepare_all_samples(trainer.family, config, loaded)
                    concepts = make_concepts(trainer.family, config, starts, samples)
                    loops.append(Loop(trainer.family, config, concepts, None, None))
            stack.enter_context(frozen(trainer.family))
            for loop in loops:
                stack.enter_context(loop.concepts[0].swapped_in(encoders))
            return loops

        yield make


def parameters(loop):
    """Return what a run trains."""
    return [p for rows in loop.concepts[0].rows.values() for p in rows.parameters()]


def gradients(loops, monkeypatch, takers):
    """Return the losses and gradients of a step in which nothing moves, for each loop."""
    for loop in loops:
        monkeypatch.setattr(loop.stepper, "update", lambda step: True)
    losses = takers()
    found = []
    for loop, loss in zip(loops, losses):
        found.append((loss, [p.grad.clone() for p in parameters(loop)]))
        for p in parameters(loop):
            p.grad = None
    return found


@pytest.mark.parametrize("name", [*SMALL, *MODERN])
def test_loss_and_gradient_are_those_of_the_run_alone(name, request, stage, monkeypatch):
    """In every family, with masks, captions of another length, several vectors, and steps of their own."""
    pipe = request.getfixturevalue(name) if name in SMALL else request.getfixturevalue("modern")(name)
    if name in ("klein", "flux"):  # which pad to 512 tokens
        monkeypatch.setattr(type(find_family(pipe)), "text_length", 128)
    compare(pipe, stage, monkeypatch, train_magnitude=True)


def test_all_terms_of_the_loss_are_those_of_the_run_alone(pipe, stage, monkeypatch):
    compare(pipe, stage, monkeypatch, **ALL_LOSSES)


def compare(pipe, stage, monkeypatch, **overrides):
    """Compare a joint step with steps alone."""
    settings = [{}, {"train_batch_size": 3}, {"zero_pad": True} if "Sana" in type(pipe).__name__ else {"seed": 7}]
    loops, steps = stage(pipe, settings, **overrides), [0, 2, 1]
    alone = gradients(loops, monkeypatch, lambda: [loop.stepper.take(step) for loop, step in zip(loops, steps)])
    joint = gradients(loops, monkeypatch, lambda: take_together([loop.stepper for loop in loops], steps))
    for (loss, own), (expected, grads) in zip(joint, alone):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert len(own) == len(grads) > 0 and all(g.abs().max() > 0 for g in grads)
        for found, g in zip(own, grads):
            # SANA's attention divides by small sums, Wan's zeros are many: rounding is that of the largest entry
            torch.testing.assert_close(found, g, rtol=1e-4, atol=2e-5 * g.abs().max().item())


@pytest.mark.parametrize("method", ["dti", "ti"])
def test_what_is_not_finite_stays_where_it_is(pipe, stage, method):
    """A NaN in the photos of one run: the others move as if it were not there, and it does not."""
    loops, others = stage(pipe, method=method), [0, 2]
    before = [[p.detach().clone() for p in parameters(loop)] for loop in loops]
    samples = loops[1].concepts[0].samples
    samples.posteriors = [(mean * float("nan"), std) for mean, std in samples.posteriors]
    losses = take_together([loop.stepper for loop in loops], [0, 0, 0])
    assert [bool(loss.isnan()) for loss in losses] == [False, True, False]
    assert all(torch.equal(p, old) for p, old in zip(parameters(loops[1]), before[1]))
    assert loops[1]._skipped_by_all_and_worst()[1] == 1
    joint = [[p.detach().clone() for p in parameters(loops[n])] for n in others]
    for n in others:  # again from the start, two by two
        with torch.no_grad():
            for p, old in zip(parameters(loops[n]), before[n]):
                p.copy_(old)
        for optimizer in loops[n].stepper.optimizers:
            optimizer.state.clear()
        assert loops[n]._skipped_by_all_and_worst()[1] == 0
    take_together([loops[n].stepper for n in others], [0, 0])
    for n, found in zip(others, joint):
        for p, own, old in zip(parameters(loops[n]), found, before[n]):
            assert not torch.equal(own, old)
            torch.testing.assert_close(own, p.detach(), rtol=0, atol=1e-5)


def test_a_single_run_is_the_run_alone(sdxl, stage):
    (first, *_) = stage(sdxl)
    calls = []
    first.stepper.take = lambda step: calls.append(step) or torch.ones(1)
    assert take_together([first.stepper], [3])[0].item() == 1 and calls == [3]


def test_float16_scales_each_run_by_itself(sdxl, stage):
    """An overflow in one of them brings only its samples again."""
    loops = stage(sdxl.to(torch.float16))
    assert all(loop.stepper.scaler.is_enabled() for loop in loops)
    samples = loops[1].concepts[0].samples
    samples.posteriors = [(mean * float("inf"), std) for mean, std in samples.posteriors]
    losses = take_together([loop.stepper for loop in loops], [0, 0, 0])
    assert [loss is None for loss in losses] == [False, True, False]
    assert [loop.stepper.scaler.get_scale() for loop in loops] == [2.0**14, 2.0**13, 2.0**14]


def test_join_fills_missing_weights_with_ones(sdxl, stage):
    loops = stage(sdxl)
    batches = [loop.concepts[0].samples.batch(0, 2, torch.device("cpu")) for loop in loops]
    assert [batch.weights is None for batch in batches] == [True, True, False]
    batch = join(batches)
    assert torch.equal(batch.weights[:4], torch.ones(4, 1, *batch.latents.shape[-2:]))
    assert torch.equal(batch.weights[4:], batches[2].weights) and not torch.equal(batch.weights[4:], batch.weights[:2])
    assert join([replace(b, weights=None) for b in batches]).weights is None
    assert len({len(getattr(batch, name)) for name in ("latents", "noise", "timesteps", "prompts", "zero_pads")}) == 1
