"""Going on from a checkpoint is as if the run had never stopped."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.training import checkpoint

REGRESSION = Path(__file__).parents[1] / "regression"
SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 2}
SETTINGS |= {"lr_scheduler": "constant"}  # so that a run may be made longer


@pytest.mark.parametrize("method", ["dti", "ti", "crossinit", "dco", "oft", "adamw", "radam", "magnitude"])
def test_a_resumed_run_is_the_whole_run(sdxl, photos, tmp_path, method):
    optimizers = {name: {"optimizer": name, "timestep_sampling": "stratified"} for name in ("adamw", "radam")}
    more = {**optimizers, "magnitude": {"train_magnitude": True}}.get(method, {"method": method})
    settings = SETTINGS | {"beta": 0.9} | more

    def clear():
        if method in ("dco", "oft"):
            sdxl.unload_lora_weights()
        sdxl.unload_directional_inversion()

    trainer = DTITrainer(sdxl, **settings, max_train_steps=8)
    whole = trainer.fit(photos)
    adapted = {k: p.clone() for k, p in trainer.adapter.parameters.items()} if trainer.adapter else {}
    clear()
    first = DTITrainer(sdxl, **settings, max_train_steps=4, output_dir=tmp_path, checkpointing_steps=2).fit(photos)
    clear()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    early = sdxl.load_directional_inversion(tmp_path / "checkpoint-2", token="<early>")  # a snapshot that may be chosen
    assert not torch.equal(early.embeddings["text_encoder"], first.embeddings["text_encoder"])
    sdxl.unload_directional_inversion()
    read = DirectionalInversion.from_pretrained(tmp_path / "checkpoint-4")  # a concept by itself
    torch.testing.assert_close(read.embeddings["text_encoder"], first.embeddings["text_encoder"])
    torch.manual_seed(99)  # no global state plays a part
    beside = {"validation_prompt": "a {}", "validation_steps": 4}  # changes no sample
    resumed = DTITrainer(sdxl, **settings, max_train_steps=8, output_dir=tmp_path, resume_from_checkpoint="latest", **beside)
    again = resumed.fit(photos)
    assert resumed.history[-1]["step"] == 8
    for component, rows in whole.embeddings.items():
        assert torch.equal(again.embeddings[component], rows)
    for name, parameter in adapted.items():
        assert torch.equal(resumed.adapter.parameters[name], parameter)
    if adapted:
        assert (tmp_path / "checkpoint-4" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["rsgd", "radam"])
def test_a_run_with_a_falling_rate_resumes_and_cannot_be_made_longer(sdxl, photos, tmp_path, optimizer):
    settings = SETTINGS | {"optimizer": optimizer, "lr_scheduler": "cosine", "learning_rate": 0.05}
    settings |= {"output_dir": tmp_path, "checkpointing_steps": 3}
    whole = DTITrainer(sdxl, **settings, max_train_steps=8).fit(photos)
    sdxl.unload_directional_inversion()
    resume = settings | {"resume_from_checkpoint": "checkpoint-3"}
    again = DTITrainer(sdxl, **resume, max_train_steps=8).fit(photos)
    sdxl.unload_directional_inversion()
    for component, rows in whole.embeddings.items():
        assert torch.equal(again.embeddings[component], rows)
    with pytest.raises(ValueError, match=r"other settings: <dog> max_train_steps \(the rate falls towards the last one\)"):
        DTITrainer(sdxl, **resume, max_train_steps=9).fit(photos)


def test_only_the_newest_checkpoints_are_kept(sdxl, photos, tmp_path):
    settings = SETTINGS | {"max_train_steps": 12, "checkpointing_steps": 2, "output_dir": tmp_path}
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    DTITrainer(sdxl, **settings, checkpoints_total_limit=2).fit(photos)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12", "checkpoint-best"]
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-12"
    sdxl.unload_directional_inversion()  # a run from the start in the same folder does not lose its own to the older one's
    DTITrainer(sdxl, **settings | {"max_train_steps": 4}, checkpoints_total_limit=1).fit(photos)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-[0-9]*")) == ["checkpoint-10", "checkpoint-12", "checkpoint-4"]


def test_an_interrupted_run_keeps_what_it_learned(sdxl, photos, tmp_path, monkeypatch):
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=8, output_dir=tmp_path)
    loss, calls = trainer.family.loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(trainer.family, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(photos)
    monkeypatch.undo()
    assert sdxl.directional_inversions == {} and "<dog>" not in sdxl.tokenizer.get_vocab()
    saved = DirectionalInversion.from_pretrained(tmp_path / "checkpoint-3")
    torch.testing.assert_close(saved.embeddings["text_encoder_2"], trainer.inversion.embeddings["text_encoder_2"])
    whole = DTITrainer(sdxl, **SETTINGS, max_train_steps=8).fit(photos)
    sdxl.unload_directional_inversion()
    resumed = DTITrainer(sdxl, **SETTINGS, max_train_steps=8, output_dir=tmp_path, resume_from_checkpoint="checkpoint-3").fit(
        photos
    )
    assert torch.equal(resumed.directions["text_encoder"], whole.directions["text_encoder"])


def test_another_runs_checkpoint_is_refused(sdxl, photos, tmp_path):
    DTITrainer(sdxl, **SETTINGS, max_train_steps=2, output_dir=tmp_path, checkpointing_steps=2).fit(photos)
    sdxl.unload_directional_inversion()
    other = DTITrainer(sdxl, **SETTINGS | {"seed": 1}, output_dir=tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="other settings: .*<dog> seed"):
        other.fit(photos)
    assert sdxl.directional_inversions == {}
    for others, captions in ((photos[:2], None), (photos, ["my {}", None, None])):
        resuming = DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match="other settings: <dog> photos"):
            resuming.fit(others, captions)
    with pytest.raises(OSError, match="not a checkpoint"):
        checkpoint.find_checkpoint(tmp_path, "checkpoint-99")
    assert checkpoint.find_checkpoint(tmp_path / "empty", "latest") is None


def test_a_checkpoint_of_a_version_with_other_samples_is_refused(sdxl, tmp_path):
    """The run of tests/regression/write.py: all its settings are the same."""
    shutil.copytree(REGRESSION / "0.1.0.dev0" / "checkpoint-2", tmp_path / "checkpoint-2")
    rng = random.Random(0)
    photos = [Image.new("RGB", (16, 16), tuple(rng.randrange(256) for _ in "rgb")) for _ in range(2)]
    settings = SETTINGS | {"train_batch_size": 1, "max_train_steps": 4, "output_dir": tmp_path}
    with pytest.raises(ValueError, match=r"checkpoint-2 was written by another version .* other samples .* Start anew"):
        DTITrainer(sdxl, **settings, resume_from_checkpoint="latest").fit(photos)
    assert sdxl.directional_inversions == {} and [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert DirectionalInversion.from_pretrained(tmp_path / "checkpoint-2").placeholder_token == "<dog>"
    anew = DTITrainer(sdxl, **settings)  # in the same folder
    anew.fit(photos)
    assert anew.history[-1]["step"] == 4


@pytest.mark.parametrize("version", [None, "1", "3"])
def test_the_version_of_the_samples_is_compared(sdxl, photos, tmp_path, version):
    settings = SETTINGS | {"max_train_steps": 2, "output_dir": tmp_path, "checkpointing_steps": 2}
    DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    state = tmp_path / "checkpoint-2" / checkpoint.STATE
    with safe_open(state, framework="pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    assert metadata.pop("samples_version") == "2"
    save_file(tensors, state, metadata=metadata | ({} if version is None else {"samples_version": version}))
    with pytest.raises(ValueError, match="another version"):
        DTITrainer(sdxl, **settings, resume_from_checkpoint="latest").fit(photos)
    save_file(tensors, state, metadata=metadata | {"samples_version": "2"})
    DTITrainer(sdxl, **settings | {"max_train_steps": 3}, resume_from_checkpoint="latest").fit(photos)


def test_a_full_disk_leaves_no_checkpoint_and_does_not_end_the_run(sdxl, photos, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    learned = DTITrainer(sdxl, **SETTINGS, max_train_steps=4, output_dir=tmp_path, checkpointing_steps=2).fit(photos)
    assert not list(tmp_path.glob("*checkpoint*")) and not list(tmp_path.glob(".*"))
    assert caplog.text.count("but training goes on: no space left on device") == 2
    saved = DirectionalInversion.from_pretrained(tmp_path)
    assert torch.equal(learned.embeddings["text_encoder"], saved.embeddings["text_encoder"])


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_the_umask_decides_who_may_read_a_checkpoint(sdxl, photos, tmp_path, umask, mode, set_umask):
    """safetensors itself writes private files."""
    set_umask(umask)
    settings = SETTINGS | {"max_train_steps": 2, "checkpointing_steps": 2, "output_dir": tmp_path / "run"}
    DTITrainer(sdxl, **settings, adapter="lora").fit(photos)
    folder = tmp_path / "run" / "checkpoint-2"
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) == 8  # of the result and the checkpoint: two encoders, an adapter; and the state, and the log
    assert {p.stat().st_mode & 0o777 for p in files} == {mode}
    assert folder.stat().st_mode & 0o777 == mode | (0o100 if umask == 0o077 else 0o111)


def test_the_log_is_of_one_run(sdxl, photos, tmp_path):
    common = SETTINGS | {"output_dir": tmp_path, "train_batch_size": 1, "checkpointing_steps": 10}
    for more, expected in (
        ({"max_train_steps": 21}, [10, 20, 21]),
        ({"max_train_steps": 30, "resume_from_checkpoint": "checkpoint-10"}, [10, 20, 30]),
        ({"max_train_steps": 5}, [5]),
    ):
        trainer = DTITrainer(sdxl, **common | more)
        trainer.fit(photos)
        sdxl.unload_directional_inversion()
        log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
        assert log == trainer.history and [x["step"] for x in log] == expected


def test_a_run_resumes_with_its_batch_split_otherwise(sdxl, photos, tmp_path):
    """As on one GPU after two: it is the samples of a step that must stay."""
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 2, "max_train_steps": 4, "train_batch_size": 4}
    whole = DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    resume = settings | {"resume_from_checkpoint": "checkpoint-2", "train_batch_size": 2}
    with pytest.raises(ValueError, match=r"other settings: .*samples a step \(batch size x accumulation x processes\)"):
        DTITrainer(sdxl, **resume).fit(photos)
    again = DTITrainer(sdxl, **resume, gradient_accumulation_steps=2).fit(photos)
    for component, rows in whole.directions.items():
        torch.testing.assert_close(again.directions[component], rows, rtol=0, atol=1e-5)


def test_several_tokens_resume_in_their_order_and_from_their_start(sdxl, photos, concept, tmp_path):
    settings = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 2, "output_dir": tmp_path, "checkpointing_steps": 2}
    both = {"<a>": photos[:2], "<b>": photos[2:]}
    DTITrainer(sdxl, **settings, initializer_token="dog").fit(both)
    sdxl.unload_directional_inversion()
    for order, initializer, differing in (
        (["<b>", "<a>"], "dog", "tokens"),
        (["<a>", "<b>"], concept(sdxl, "dog"), "<a> start, <b> start"),
    ):
        resuming = DTITrainer(sdxl, **settings, initializer_token=initializer, resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match=f"other settings: .*{differing}"):
            resuming.fit({word: both[word] for word in order})


def test_names_that_differ_in_punctuation_alone(sdxl, photos, tmp_path):
    settings = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 1, "output_dir": tmp_path}
    learned = DTITrainer(sdxl, **settings, initializer_token="dog").fit({"<my-dog>": photos[:1], "<mydog>": photos[1:]})
    for name, word in (("mydog", "<my-dog>"), ("mydog-1", "<mydog>")):
        read = DirectionalInversion.from_pretrained(tmp_path / name)
        assert read.placeholder_token == word
        torch.testing.assert_close(read.directions["text_encoder"], learned[word].directions["text_encoder"])


def test_a_torn_log_does_not_stop_a_run(sdxl, photos, tmp_path):
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 10, "max_train_steps": 10}
    DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    log = tmp_path / "train_log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 20, "lo')
    with pytest.raises(ValueError, match="nonsense"):
        DTITrainer(sdxl, **settings, report_to="nonsense").fit(photos)
    assert log.read_text().startswith(whole)
    resumed = DTITrainer(sdxl, **settings | {"max_train_steps": 12}, resume_from_checkpoint="latest")
    resumed.fit(photos)
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [10, 12]


def test_other_programs_checkpoints_are_left_alone(sdxl, photos, tmp_path, caplog):
    """Diffusers' own trainers call their folders checkpoint-100 as well."""
    for name in ("checkpoint-2", "checkpoint-900"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("precious")
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    DTITrainer(sdxl, **settings, max_train_steps=4, resume_from_checkpoint="latest").fit(photos)
    assert "checkpoint-2 is another program's, and is not replaced" in caplog.text
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-900"]
    assert all((tmp_path / f"checkpoint-{step}" / "model.safetensors").is_file() for step in (2, 900))
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"


def rewritten(state, change):
    """Change a checkpoint's tensors and metadata."""
    with safe_open(state, framework="pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    change(tensors, metadata)
    save_file(tensors, state, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(step="-1"), "damaged: 'it says that it is at step -1'"),
        (lambda t, m: m.update(step="999999999999"), "is at step 999999999999, and `max_train_steps` is 4"),
        (lambda t, m: m.update(settings="[" * 100_000), "damaged: 'it is nested too deeply'"),
        (lambda t, m: m.pop("settings"), "damaged"),
        (lambda t, m: t.update({"rows.0.text_encoder.direction": torch.ones(1)}), "does not hold what this run trains"),
        (lambda t, m: t.pop("rows.0.text_encoder.direction"), "does not hold what this run trains"),
        (lambda t, m: [t.pop(k) for k in list(t) if k.startswith("optimizer")], "does not hold what this run trains"),
        (lambda t, m: t.update({"optimizer.7.0.t": torch.ones(1)}), "does not hold what this run trains"),
        (lambda t, m: t.update({"optimizer.x": torch.ones(1)}), "does not hold what this run trains"),
    ],
)
def test_the_contents_of_a_checkpoint_are_not_believed(sdxl, photos, tmp_path, change, message):
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 2, "max_train_steps": 4}
    DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    rewritten(tmp_path / "checkpoint-2" / checkpoint.STATE, change)
    with pytest.raises(ValueError, match=message):
        DTITrainer(sdxl, **settings, resume_from_checkpoint="checkpoint-2").fit(photos)
    assert sdxl.directional_inversions == {}


def test_a_torn_checkpoint_is_passed_over(sdxl, photos, tmp_path, caplog):
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 2}
    DTITrainer(sdxl, **settings, max_train_steps=4).fit(photos)
    sdxl.unload_directional_inversion()
    state = tmp_path / "checkpoint-4" / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-7])
    trainer = DTITrainer(sdxl, **settings, max_train_steps=6, resume_from_checkpoint="latest")
    trainer.fit(photos)
    assert "checkpoint-4 cannot be resumed" in caplog.text and trainer.history[-1]["step"] == 6


def test_fewer_steps_than_the_checkpoint_has_are_refused(sdxl, photos, tmp_path):
    settings = SETTINGS | {"output_dir": tmp_path, "checkpointing_steps": 4}
    DTITrainer(sdxl, **settings, max_train_steps=4).fit(photos)
    sdxl.unload_directional_inversion()
    with pytest.raises(ValueError, match="checkpoint-4 is at step 4, and `max_train_steps` is 3: raise that"):
        DTITrainer(sdxl, **settings, max_train_steps=3, resume_from_checkpoint="latest").fit(photos)


def test_the_latest_of_no_checkpoints_is_a_warning(sdxl, photos, tmp_path, caplog):
    from diffusers_dti.training.loop import logger

    settings = SETTINGS | {"max_train_steps": 2, "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    said = f'{tmp_path} has no checkpoint yet (resume_from_checkpoint="latest"): training starts from the beginning.'
    logger.addHandler(caplog.handler)
    try:
        DTITrainer(sdxl, **settings, checkpointing_steps=1).fit(photos)
        assert said in caplog.messages
        sdxl.unload_directional_inversion()
        caplog.clear()
        DTITrainer(sdxl, **settings).fit(photos)
        assert said not in caplog.messages
    finally:
        logger.removeHandler(caplog.handler)
