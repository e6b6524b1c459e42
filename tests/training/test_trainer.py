"""`DTITrainer` on tiny pipelines: what it computes, and what it leaves behind."""

import json
import math
import re
from contextlib import ExitStack

import pytest
import torch
from helpers import differing, everything, same, states, written_method
from PIL import Image
from tiny_pipelines import build_sdxl, generate

from diffusers_dti import DirectionalInversion, DTIConfig, DTITrainer
from diffusers_dti.data.images import Photo
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.crops import make_crops
from diffusers_dti.training.initializer import initial_concept
from diffusers_dti.training.samples import OBJECT_TEMPLATES, TrainingSamples

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 2}


def initial_of(trainer):
    return initial_concept(trainer.family, trainer.config, "<dog>")


def test_fit_learns_loads_and_leaves_the_rest_as_it_was(sdxl, photos):
    sdxl.encode_prompt("a dog")  # transformers' own hooks come with the first call
    sdxl.unet.train()
    sdxl.vae.requires_grad_(False)
    before = everything(sdxl)
    vocabulary_before = states(sdxl)
    learned = DTITrainer(sdxl, **SETTINGS, max_train_steps=3).fit(photos)
    assert same(everything(sdxl), before)
    for component, text_encoder in find_text_encoders(sdxl).items():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<dog>")]
        assert torch.equal(row, learned.embeddings[component][0])
        mean = text_encoder.norm("mean")
        assert learned.scales[component].item() == pytest.approx(mean, rel=1e-6)
    assert sdxl.directional_inversions == {"<dog>": learned}
    sdxl.unload_directional_inversion()
    assert not differing(states(sdxl), vocabulary_before)


def test_training_is_the_written_method(sdxl, photos):
    """The whole trainer against the formulas: gradients from plain rows in the table, steps in float64."""
    steps = 5
    settings = SETTINGS | {"max_train_steps": steps, "pooling": "legacy", "kappa": 1e-3, "lr_scheduler": "constant"}
    learned = DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()

    trainer = DTITrainer(sdxl, **settings)
    c, family = trainer.config, trainer.family
    initial = initial_of(trainer)
    crops = make_crops([Photo(p) for p in photos], 16, c.crops_per_image, c.seed)
    encoded = family.encode_images([x.pixels for x in crops])
    samples = TrainingSamples(crops, encoded, OBJECT_TEMPLATES, [None] * 3, "<dog>", 1000, c.seed)
    sdxl.load_directional_inversion(initial, pooling="legacy")
    pairs = find_text_encoders(sdxl)
    widths = [initial.directions[n].shape[1] for n in pairs]

    def loss(v, t):  # v: both encoders' directions end to end, in one row each
        parts = dict(zip(pairs, v.split(1)))
        with ExitStack() as stack:
            for (name, encoder), width in zip(pairs.items(), widths):
                embedding, id = encoder.model.get_input_embeddings(), encoder.tokenizer.convert_tokens_to_ids("<dog>")
                row = (parts[name][0, :width] * initial.scales[name]).float()
                table = torch.cat([embedding.weight[:id].detach(), row[None], embedding.weight[id + 1 :].detach()])
                stack.enter_context(swapped(embedding, table))
            batch = samples.batch(t * 2, 2, torch.device("cpu"))
            return family.loss(batch, family.encode_prompts(batch.prompts, batch.zero_pads))

    start = torch.zeros(2, max(widths))
    for i, (name, width) in enumerate(zip(pairs, widths)):
        start[i, :width] = initial.directions[name][0]
    expected = written_method(start, loss, start, 0.02, 1e-3, 0.0, steps)
    for i, (name, width) in enumerate(zip(pairs, widths)):
        assert (learned.directions[name][0] - expected[i, :width]).abs().max() < 1e-5


class swapped:
    """An embedding looking up in another table, all of it in the graph: what the trainer must not need."""

    def __init__(self, embedding, table):
        self.embedding, self.table = embedding, table

    def __enter__(self):
        self.handle = self.embedding.register_forward_hook(lambda m, args, out: self.table[args[0]])

    def __exit__(self, *error):
        self.handle.remove()


def test_accumulated_batches_are_one_large_batch(sdxl, photos):
    """T14: no step is lost, and the gradients are averaged before the prior is added."""
    common = {**SETTINGS, "max_train_steps": 4, "kappa": 1e-3, "learning_rate": 0.01, "scale_lr": False}
    large = DTITrainer(sdxl, **common | {"train_batch_size": 4}).fit(photos)
    sdxl.unload_directional_inversion()
    trainer = DTITrainer(sdxl, **common | {"train_batch_size": 2, "gradient_accumulation_steps": 2})
    small = trainer.fit(photos)
    assert trainer.history[-1]["step"] == 4
    for component, v in large.directions.items():
        torch.testing.assert_close(small.directions[component], v, rtol=0, atol=1e-5)


def test_a_batch_larger_than_the_photos(sdxl, photos):
    learned = DTITrainer(sdxl, **SETTINGS | {"train_batch_size": 7}, max_train_steps=2).fit(photos[:2])
    assert learned.directions["text_encoder"].isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_schedulers_prediction_type_is_the_target(tmp_path, photos, prediction_type):
    from diffusers import DDPMScheduler

    pipe = build_sdxl(tmp_path, prediction_type)
    seen = []
    pipe.unet.register_forward_hook(lambda m, args, kwargs, out: seen.append((args[0], args[1], out.sample)), with_kwargs=True)
    trainer = DTITrainer(pipe, **SETTINGS, max_train_steps=1, scale_lr=False)
    batches = []
    original = TrainingSamples.batch
    TrainingSamples.batch = lambda self, *args: batches.append(original(self, *args)) or batches[-1]
    try:
        trainer.fit(photos)
    finally:
        TrainingSamples.batch = original
    (noisy, t, prediction), batch = seen[0], batches[0]
    alpha = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod[t].double()[:, None, None, None]
    a, s, x, e = alpha.sqrt(), (1 - alpha).sqrt(), batch.latents.double(), batch.noise.double()
    torch.testing.assert_close(noisy.double(), a * x + s * e, rtol=0, atol=1e-5)
    target = {"epsilon": e, "v_prediction": a * e - s * x, "sample": x}[prediction_type]
    assert trainer.history[0]["loss"] == pytest.approx((prediction.double() - target).square().mean().item(), rel=1e-4)


def test_ti_is_adamw_on_the_raw_row(sdxl, photos):
    trainer = DTITrainer(sdxl, **SETTINGS, method="ti", max_train_steps=20, learning_rate=0.1)
    learned = trainer.fit(photos)
    dog = sdxl.text_encoder.get_input_embeddings().weight[sdxl.tokenizer.convert_tokens_to_ids("dog</w>")]
    assert initial_of(trainer).scales["text_encoder"].item() == pytest.approx(dog.norm().item())
    assert learned.scales["text_encoder"].item() > 2 * dog.norm().item()  # the inflation that DTI cures
    assert trainer.history[-1]["norm"] > trainer.history[0]["norm"]


@pytest.mark.parametrize("how", ["bfloat16 pipeline", "float16 pipeline", "autocast"])
def test_half_precision_keeps_the_rows_in_float32(sdxl, photos, how):
    precision = {"mixed_precision": "bf16"} if how == "autocast" else {}
    dtype = {"bfloat16 pipeline": torch.bfloat16, "float16 pipeline": torch.float16}.get(how, torch.float32)
    sdxl.to(dtype)
    learned = DTITrainer(sdxl, **SETTINGS, max_train_steps=30, learning_rate=1e-4, **precision).fit(photos)
    for component, v in learned.directions.items():
        assert v.dtype == torch.float32 and (v.norm(dim=-1) - 1).abs().max() < 1e-6
        # steps of 2e-4 vanish in bfloat16; 30 of them must not
        trainer = DTITrainer(sdxl, **SETTINGS)
        start = initial_of(trainer).directions[component]
        assert 2e-4 < (v - start).norm() < 30 * 2e-4
    assert {p.dtype for p in sdxl.vae.parameters()} == {dtype}
    assert generate(sdxl, "a <dog>").isfinite().all()


def test_the_prior_never_sees_the_loss_scale(sdxl, photos):
    """In float16 the losses are scaled by thousands; against gradients so scaled the prior would not count at all."""
    settings = SETTINGS | {"max_train_steps": 6, "kappa": 0.05}
    exact = DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    free = DTITrainer(sdxl, **settings | {"kappa": 0.0}).fit(photos)
    sdxl.unload_directional_inversion()
    half = DTITrainer(sdxl.to(torch.float16), **settings).fit(photos)
    for component, v in exact.directions.items():
        gap = (free.directions[component] - v).norm()
        assert (half.directions[component] - v).norm() < 0.2 * gap


def test_overflow_costs_no_step(sdxl, photos, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, init_scale, enabled: scaler(device, 2.0**40, enabled=enabled))
    sdxl.to(torch.float16)
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=4)
    learned = trainer.fit(photos)
    assert trainer.history[-1]["step"] == 4 and "skipped" not in trainer.history[-1]
    monkeypatch.undo()
    sdxl.unload_directional_inversion()
    again = DTITrainer(sdxl, **SETTINGS, max_train_steps=4).fit(photos)
    for component, v in again.directions.items():
        assert (learned.directions[component] - v).norm() < 0.01


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("EDMEulerScheduler", "EDMEulerScheduler with prediction_type 'epsilon'"),
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler with prediction_type None"),
    ],
)
def test_schedulers_without_a_known_forward_process(sdxl, scheduler, message):
    import diffusers

    sdxl.scheduler = getattr(diffusers, scheduler)()
    with pytest.raises(ValueError, match=message):
        DTITrainer(sdxl, **SETTINGS)
    flow = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    sdxl.scheduler = flow
    with pytest.raises(ValueError, match="'flow_prediction'"):
        DTITrainer(sdxl, **SETTINGS)


def test_several_vectors(sdxl, photos):
    words = DTITrainer(sdxl, **SETTINGS | {"initializer_token": "red toy dog"}, max_train_steps=2).fit(photos)
    assert words.num_vectors == 3
    sdxl.unload_directional_inversion()
    same_word = DTITrainer(sdxl, **SETTINGS, num_vectors=2, max_train_steps=2).fit(photos)
    assert same_word.num_vectors == 2
    a, b = same_word.directions["text_encoder"]
    assert not torch.equal(a, b)  # one start, but each its own place in the prompt


def test_the_log_the_bar_and_the_files(sdxl, tmp_path, photos, capsys):
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=12, output_dir=tmp_path)
    learned = trainer.fit(photos)
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert log == trainer.history and [x["step"] for x in log] == [10, 12]
    assert set(log[0]) == {"step", "loss", "angle", "norm"}
    assert 0 < log[0]["angle"] < 10 * math.degrees(math.atan(trainer.config.effective_learning_rate)) + 1e-3
    bar = capsys.readouterr().err
    assert "<dog>" in bar and "loss=" in bar and "angle=" in bar
    read = DirectionalInversion.from_pretrained(tmp_path)
    assert torch.equal(read.scales["text_encoder"], learned.scales["text_encoder"])
    assert read.metadata["initializer"] == "dog" and read.metadata["training"]["max_train_steps"] == 12


def test_nothing_of_this_machine_is_in_the_file(sdxl, photos, tmp_path):
    sdxl.save_pretrained(tmp_path / "secret" / "base")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "secret" / "base")
    learned = DTITrainer(pipe, **SETTINGS, max_train_steps=1, output_dir=tmp_path / "out").fit(photos)
    assert learned.metadata["base_model"] == "base"
    assert b"secret" not in (tmp_path / "out" / "learned_embeds.safetensors").read_bytes()


def test_two_words_say_it_all_but_naming_them_is_better(sdxl, photos, caplog):
    from diffusers_dti.training.photos import logger

    logger.addHandler(caplog.handler)
    try:
        learned = DTITrainer(sdxl, resolution=16, max_train_steps=1).fit(photos)
    finally:
        logger.removeHandler(caplog.handler)
    assert "No placeholder_token given." in caplog.text and "No initializer_token given." in caplog.text
    assert learned.placeholder_token == "<concept>" and learned.metadata["initializer"] == "object"
    style = DTITrainer(sdxl, learnable_property="style", placeholder_token="<s>", resolution=16, max_train_steps=1)
    assert style.fit(photos).metadata["initializer"] == "style"


@pytest.mark.parametrize(
    ("change", "images", "captions", "error", "message"),
    [
        ({}, [], None, ValueError, "No images"),
        ({}, ["nowhere.png"], None, OSError, "nowhere.png"),
        ({}, None, ["a {}"], ValueError, "each of the 3 photos"),
        ({}, None, ["a", "b", "c"], ValueError, "caption of photo 1, 'a', needs"),
        ({"placeholder_token": "dog</w>"}, None, None, ValueError, "in the vocabulary"),
        ({"initializer_token": " "}, None, None, ValueError, "has no known tokens"),
        ({"token_scale": "median"}, None, None, ValueError, "token_scale must be"),
        ({"initializer_token": "red toy dog", "num_vectors": 2}, None, None, ValueError, "num_vectors must be 3 or more"),
        ({"num_vectors": 1000}, None, None, ValueError, "room for 18 beside 'a photo of a': use fewer"),
        ({"num_vectors": 1000, "method": "crossinit"}, None, None, ValueError, "room for 18 beside 'a photo of a': use fewer"),
        ({}, None, ["a dog " * 20 + "{}", None, None], ValueError, "comes after 24 tokens"),
        ({"templates": ["a dog " * 20 + "{}"]}, None, None, ValueError, "shorten it"),
    ],
)
def test_errors_come_before_anything_changes(sdxl, photos, change, images, captions, error, message):
    before, vocabulary_before = everything(sdxl), states(sdxl)
    with pytest.raises(error, match=message):
        DTITrainer(sdxl, **SETTINGS | change).fit(photos if images is None else images, captions)
    assert same(everything(sdxl), before) and not differing(states(sdxl), vocabulary_before)


def test_a_failing_step_leaves_the_pipeline_as_it_was(sdxl, photos, monkeypatch):
    sdxl.encode_prompt("a dog")
    before, vocabulary_before = everything(sdxl), states(sdxl)
    trainer = DTITrainer(sdxl, **SETTINGS)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.family, "loss", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(photos)
    assert same(everything(sdxl), before) and not differing(states(sdxl), vocabulary_before)


def test_unknown_settings_and_pipelines_are_refused(sdxl):
    with pytest.raises(ValueError, match="multiple of 2, got 15: 14 would do"):
        DTITrainer(sdxl, resolution=15)
    with pytest.raises(TypeError, match="learning_rat"):
        DTITrainer(sdxl, learning_rat=1)
    with pytest.raises(ValueError, match="Exactly one concept can be pushed"):
        DTITrainer(sdxl, DTIConfig(placeholder_token="<a>", initializer_token="dog")).push_to_hub("user/dog")


def test_several_tokens_in_one_fit(sdxl, photos, tmp_path):
    """Each learns what it learns alone, from its own photos, and their losses are kept apart."""
    own = {"<dog>": photos[:2], "<cat>": photos[2:]}
    common = SETTINGS | {
        "placeholder_token": None,
        "initializer_token": {"<dog>": "dog", "<cat>": "cat"},
        "max_train_steps": 12,
    }
    trainer = DTITrainer(sdxl, **common, output_dir=tmp_path, checkpointing_steps=5)
    learned = trainer.fit(own)
    assert list(learned) == ["<dog>", "<cat>"] == list(sdxl.directional_inversions)
    last = trainer.history[-1]
    assert last["loss"] == pytest.approx((last["loss/<dog>"] + last["loss/<cat>"]) / 2)
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        assert {p.name for p in folder.iterdir() if p.is_dir()} >= {"dog", "cat"}
    sdxl.unload_directional_inversion()
    resumed = DTITrainer(sdxl, **common, output_dir=tmp_path, resume_from_checkpoint="checkpoint-5").fit(own)
    sdxl.unload_directional_inversion()
    for word, initializer in common["initializer_token"].items():
        settings = SETTINGS | {"placeholder_token": word, "initializer_token": initializer, "max_train_steps": 12}
        alone = DTITrainer(sdxl, **settings).fit(own[word])
        sdxl.unload_directional_inversion()
        for component, v in alone.directions.items():
            torch.testing.assert_close(learned[word].directions[component], v, rtol=0, atol=1e-5)
            assert torch.equal(resumed[word].directions[component], learned[word].directions[component])
    with pytest.raises(ValueError, match="With several concepts"):
        DTITrainer(sdxl, **common).fit(own, captions=["a {}"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initializer_token": {"<Dog>": "dog"}}, ["<dog>"]),
        ({"placeholder_token": "<dog>", "initializer_token": "dog"}, ["train"]),
        ({}, []),
    ],
)
def test_mappings_that_do_not_fit_the_settings(sdxl, photos, settings, words):
    with pytest.raises(ValueError, match="A mapping goes from placeholders to photos"):
        DTITrainer(sdxl, resolution=16, **settings).fit(dict.fromkeys(words, photos))


def test_a_tracker_that_fails_costs_no_result(sdxl, photos, tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def offline(self):
        raise RuntimeError("offline")

    monkeypatch.setattr(TensorBoardTracker, "finish", offline)
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=2, report_to="tensorboard", output_dir=tmp_path)
    assert trainer.fit(photos) is trainer.inversion is sdxl.directional_inversions["<dog>"]


def test_training_adopts_nothing(sdxl, photos, tmp_path):
    """A token of a reopened pipeline that is not known to be a concept is neither trained over nor taken out by a failure."""
    learned = DTITrainer(sdxl, **SETTINGS, max_train_steps=1).fit(photos)
    sdxl.save_pretrained(tmp_path)
    again = type(sdxl).from_pretrained(tmp_path)
    for encoder in (again.text_encoder, again.text_encoder_2):  # as earlier versions saved it
        del encoder.config.directional_inversions
    before = states(again)
    with pytest.raises(ValueError, match="<dog> is in the vocabulary"):
        DTITrainer(again, **SETTINGS | {"initializer_token": learned}).fit(photos)
    assert not differing(states(again), before)


def test_training_starts_from_a_concept(sdxl, photos, concept):
    start = concept(sdxl, "<rex>", vectors=2)
    learned = DTITrainer(sdxl, **SETTINGS | {"initializer_token": start}, max_train_steps=1, learning_rate=0.01).fit(photos)
    for component, v in start.directions.items():
        assert learned.directions[component].shape == v.shape
        assert (learned.directions[component] - v).norm(dim=-1).max() < 0.021
    assert learned.metadata["initializer"] == "<rex>"


def test_callbacks_and_gradient_checkpointing(sdxl, photos):
    plain = DTITrainer(sdxl, **SETTINGS, max_train_steps=3).fit(photos)
    sdxl.unload_directional_inversion()
    seen = []
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=3, gradient_checkpointing=True)
    learned = trainer.fit(
        photos, callback_on_step_end=lambda t, step: seen.append((t, step, t.pipe.unet.is_gradient_checkpointing))
    )
    assert seen == [(trainer, i, True) for i in (1, 2, 3)] and not sdxl.unet.is_gradient_checkpointing
    for component, v in plain.directions.items():
        torch.testing.assert_close(learned.directions[component], v, rtol=0, atol=1e-6)


def test_tensorboard(sdxl, photos, tmp_path):
    """The real tracker: its own reader finds the figures of the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=12, output_dir=tmp_path, report_to="tensorboard")
    trainer.fit(photos)
    (events,) = (
        p for p in tmp_path.rglob("events.out.tfevents.*") if p.stat().st_size > 0 and p.parent.name == "diffusers-dti"
    )
    read = EventAccumulator(str(events)).Reload()
    (settings,) = tmp_path.rglob("hparams.yml")
    assert "initializer_token: dog" in settings.read_text()
    for name in ("loss", "angle", "norm"):
        logged = [(e.step, pytest.approx(e.value)) for e in read.Scalars(name)]
        assert [(x["step"], x[name]) for x in trainer.history] == logged


def test_the_loss_counts_inside_the_mask_alone(sdxl):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=1)
    seen = []
    sdxl.unet.register_forward_hook(lambda m, args, kwargs, out: seen.append(out.sample), with_kwargs=True)
    batches = []
    original = TrainingSamples.batch
    TrainingSamples.batch = lambda self, *args: batches.append(original(self, *args)) or batches[-1]
    try:
        trainer.fit([Image.new("RGB", (16, 16), "red")], masks=[mask])
    finally:
        TrainingSamples.batch = original
    error = (seen[0].double() - batches[0].noise.double()).square()
    inside = error[..., :4].mean()  # the latents are 8 wide
    assert trainer.history[0]["loss"] == pytest.approx(inside.item(), rel=1e-4)
    assert inside.item() != pytest.approx(error.mean().item(), rel=1e-3)


def test_photos_are_encoded_once(sdxl, photos):
    """T13: the VAE sees each crop once, not each step."""
    calls = []
    sdxl.vae.encoder.register_forward_hook(lambda *a: calls.append(1))
    DTITrainer(sdxl, **SETTINGS, max_train_steps=12, crops_per_image=4).fit([*photos, Image.new("RGB", (16, 16))])
    assert len(calls) == 3 + 4  # three square photos, four crops of the other


def test_a_cell_that_runs_again_learns_the_same(sdxl, photos, tmp_path, caplog):
    """The earlier concept is neither its start nor in its way, and it is replaced at the end."""
    sdxl.load_directional_inversion(DirectionalInversion.from_pretrained({"<cat>": torch.ones(16)}, "<cat>"))
    settings = SETTINGS | {"max_train_steps": 4, "checkpointing_steps": 2, "output_dir": tmp_path}
    first = DTITrainer(sdxl, **settings).fit(photos)
    before, cat = states(sdxl), sdxl.directional_inversions["<cat>"]
    assert "has an earlier run's" not in caplog.text
    for again in ({}, {"num_vectors": 2}, {}, {"resume_from_checkpoint": "latest"}):
        caplog.clear()
        trainer = DTITrainer(sdxl, **settings | again)
        learned = trainer.fit(photos)
        assert trainer.history[-1]["step"] == 4 and learned.num_vectors == again.get("num_vectors", 1)
        assert sdxl.directional_inversions == {"<cat>": cat, "<dog>": learned}
        assert "<dog> is loaded already: it is trained anew" in caplog.text
        kept = "checkpoint-2, checkpoint-4, learned_embeds.safetensors, learned_embeds_2.safetensors: this one starts anew"
        assert (kept in caplog.text) == ("resume_from_checkpoint" not in again)
        read = DirectionalInversion.from_pretrained(tmp_path)
        for component, v in learned.directions.items():
            torch.testing.assert_close(read.directions[component], v, rtol=0, atol=1e-7)
            assert again.get("num_vectors") or torch.equal(v, first.directions[component])
    assert not differing(states(sdxl), before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_second_run_that_fails_leaves_the_first_ones_concept(sdxl, photos, tmp_path, concept, error):
    def fail(trainer, step):
        if step == 2:
            raise error

    settings = SETTINGS | {"max_train_steps": 3, "output_dir": tmp_path}
    DTITrainer(sdxl, **settings, pooling="legacy").fit(photos)
    sdxl.load_directional_inversion(concept(sdxl, "<cat>", vectors=2))
    sdxl.encode_prompt("a dog")
    before, vocabulary_before, loaded = everything(sdxl), states(sdxl), sdxl.directional_inversions
    saved = {p.name: p.read_bytes() for p in tmp_path.glob("learned_embeds*")}
    with pytest.raises(error):
        DTITrainer(sdxl, **settings, num_vectors=2).fit(photos, callback_on_step_end=fail)
    assert same(everything(sdxl), before) and not differing(states(sdxl), vocabulary_before)
    assert sdxl.directional_inversions == loaded and list(sdxl.directional_inversions) == ["<dog>", "<cat>"]
    assert {p.name: p.read_bytes() for p in tmp_path.glob("learned_embeds*")} == saved
    assert (tmp_path / "checkpoint-2").is_dir()  # the second one's, to go on from
    with pytest.raises(ValueError, match="checkpoint-2 was written with other settings"):
        DTITrainer(sdxl, **settings, resume_from_checkpoint="latest").fit(photos)
    assert not differing(states(sdxl), vocabulary_before)


@pytest.mark.parametrize("word", ["<dog>", "auto"])
def test_the_earlier_concept_is_no_start(sdxl, photos, monkeypatch, word):
    """Not even if the initializer is written like the placeholder: the first run has read that as other tokens."""
    from diffusers_dti.training import propose

    monkeypatch.setattr(propose, "candidate_words", lambda encoders: ["cat", "dog"])
    settings = SETTINGS | {"initializer_token": word, "max_train_steps": 2}
    first, again = (DTITrainer(sdxl, **settings).fit(photos) for _ in range(2))
    assert first.metadata == again.metadata and first.num_vectors == again.num_vectors
    for component, v in first.directions.items():
        assert torch.equal(again.directions[component], v)


def test_one_of_several_concepts_may_be_trained_anew(sdxl, photos):
    common = SETTINGS | {"placeholder_token": None, "initializer_token": {"<dog>": "dog", "<cat>": "cat"}, "max_train_steps": 2}
    both = DTITrainer(sdxl, **common).fit({"<dog>": photos[:2], "<cat>": photos[2:]})
    sdxl.unload_directional_inversion("<cat>")
    again = DTITrainer(sdxl, **common).fit({"<dog>": photos[:2], "<cat>": photos[2:]})
    assert sdxl.directional_inversions == again
    for word, concept in both.items():
        assert all(torch.equal(again[word].directions[c], v) for c, v in concept.directions.items())


def test_a_trainer_follows_its_pipeline_to_another_dtype(sana, photos):
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 1}
    trainer = DTITrainer(sana, **settings)
    trainer.fit(photos)
    sana.unload_directional_inversion()
    sana.to(torch.bfloat16)
    again = trainer.fit(photos)
    sana.unload_directional_inversion()
    assert torch.equal(again.directions["text_encoder"], DTITrainer(sana, **settings).fit(photos).directions["text_encoder"])


def test_nothing_is_saved_before_fit(sdxl, tmp_path):
    with pytest.raises(ValueError, match="Nothing has been learned yet: call `fit` first"):
        DTITrainer(sdxl, placeholder_token="<dog>").save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (None, {"learning_rat": 0.1}, "There is no setting learning_rat. Did you mean learning_rate?"),
        (None, {"steps": 10}, "There is no setting steps. Did you mean max_train_steps?"),
        (None, {"xyz": 10}, "There is no setting xyz."),
        ("<dog>", {}, "`config` must be a `DTIConfig`, got '<dog>': give single settings by their names."),
    ],
)
def test_misspelled_settings(sdxl, config, overrides, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        DTITrainer(sdxl, config, **overrides)


def test_a_name_is_no_pipeline():
    with pytest.raises(TypeError, match="A pipeline is needed, got 'user/model': open it"):
        DTITrainer("user/model")
