"""Kill the process at many points: what was there before is there still, or what was being written, and never a mixture."""

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from injection import in_child, killed, run

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.atomic import tidy
from diffusers_dti.concept.convert import convert
from diffusers_dti.training.checkpoint import find_checkpoint, read_settings
from diffusers_dti.training.output import writing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied by fork")

WRITING = ("atomic.py", "concept/", "training/checkpoint.py")


def made(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = {"text_encoder": torch.randn(2, 16, generator=generator), "text_encoder_2": torch.randn(2, 24, generator=generator)}
    return DirectionalInversion.from_embeddings("<dog>", rows, {"seed": seed})


def read(source):
    """Return which of `made` is stored; None if there is nothing, "refused" if it does not belong together."""
    try:
        found = DirectionalInversion.from_pretrained(source)
    except ValueError as error:
        assert "are of several saves, not of one" in str(error) or " lacks learned_embeds" in str(error)
        return "refused"
    except OSError:
        return None
    seed = found.metadata["seed"]
    for component, rows in made(seed).embeddings.items():
        torch.testing.assert_close(found.embeddings[component], rows)
    return seed


def save(folder):
    made(2).save_pretrained(folder)


def rewrite(folder):
    made(2).save_pretrained(folder.with_name("source"))
    convert(folder.with_name("source"), "diffusers", folder)


@pytest.mark.parametrize(
    ("write", "every"),  # every so many lines
    [(save, 13), (rewrite, 97), *(pytest.param(write, 1, marks=pytest.mark.long) for write in (save, rewrite))],
)
def test_a_concept_of_two_files(write, every, tmp_path):
    folder = tmp_path / "dog"
    count, found = run(lambda: write(folder), parts=WRITING), set()
    assert read(folder) == 2 and count > 100
    for at in range(0, count, every):
        for earlier in (1, None):
            shutil.rmtree(folder)
            folder.mkdir()
            if earlier:
                made(1).save_pretrained(folder)
            assert killed(lambda: write(folder), at, parts=WRITING)
            left = read(folder)
            assert left in (earlier, 2, "refused"), (at, left)
            found.add(left)
            tidy(folder)
            write(folder)
            assert read(folder) == 2 and len(list(folder.iterdir())) == 2
    assert found >= {1, None}  # the points before the last rename


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.long)])
def test_a_checkpoint_that_is_written_again(sdxl, photos, every, tmp_path):
    """The run starts anew in its folder: there is the earlier checkpoint or the new one."""
    whole = tmp_path / "run"

    def fit(folder=whole):
        settings = SMALL | {"max_train_steps": 1, "checkpointing_steps": 1}
        DTITrainer(sdxl, **settings, output_dir=folder).fit(photos[:1])

    def count():
        (tmp_path / "count").write_text(str(run(fit, parts=("atomic.py",))))

    assert not in_child(count)
    points = int((tmp_path / "count").read_text())
    assert points > 50
    for at in range(0, points, every):
        folder = shutil.copytree(whole, tmp_path / str(at))
        assert killed(lambda folder=folder: fit(folder), at, parts=("atomic.py",))
        tidy(folder)
        found = find_checkpoint(folder, "latest")
        assert found is not None and read_settings(folder, found), at


# ----------------------------------------------------------------------------------------------------------- training
SMALL = {"initializer_token": "dog", "resolution": 16, "train_batch_size": 1, "max_train_steps": 6, "checkpointing_steps": 2}
RUNS = {
    "dti": ("sdxl", {}),
    "ti in two parts": ("sdxl", {"method": "ti", "gradient_accumulation_steps": 2}),
    "vectors": ("sdxl", {"num_vectors": 2, "optimizer": "radam", "checkpoints_total_limit": 1}),
    "adapter": ("sdxl", {"method": "dco", "adapter_rank": 2}),
    "starts": ("sdxl", {"num_starts": 2, "heldout_loss_steps": 3}),
    "sana": ("sana", {}),
    "wan": ("wan", {"timestep_sampling": "stratified"}),
    "two concepts": ("sdxl", {}),
}


def trained(folder):
    """Return the learned rows of a run, bit for bit, by file."""
    files = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        if "checkpoint" not in str(path):
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n not in ("dti", "sana"))) for n in RUNS])
@pytest.mark.parametrize("times", [3, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("stop", "parts"), [(kill, ("",)), (interrupt, ("",)), (interrupt, ("training/optim.py", "training/step.py"))]
)
def test_a_stopped_run_resumes(name, stop, parts, times, request, photos, tmp_path):
    """It is stopped at random lines, again and again, and then ends as if nothing had happened."""
    family, settings = RUNS[name]
    pipe, rng = request.getfixturevalue(family), random.Random(name)
    images, settings = list(photos[:2]), SMALL | settings
    if name == "two concepts":
        images = {"<a>": photos[:2], "<b>": photos[2:4]}
        settings = settings | {"initializer_token": {"<a>": "dog", "<b>": "cat"}}

    def fit(folder, at=None):
        def train():
            DTITrainer(pipe, **settings, output_dir=folder, resume_from_checkpoint="latest").fit(images)

        with contextlib.suppress(KeyboardInterrupt), writing(None):  # also before and after the run, the signal interrupts
            return run(train, at, parts=parts, stop=stop)

    def count():
        (tmp_path / "count").write_text(str(fit(tmp_path / "whole")))

    assert not in_child(count)
    points, expected = int((tmp_path / "count").read_text()), trained(tmp_path / "whole")
    assert points > 50 and expected
    stopped = 0
    while stopped < times:
        folder = tmp_path / str(stopped)
        for _ in range(min(3, times - stopped)):  # a series in one folder
            point = rng.randrange(points)
            was_killed = in_child(lambda folder=folder, point=point: fit(folder, point))
            stopped += was_killed or stop is interrupt
        assert not in_child(lambda folder=folder: fit(folder))
        assert trained(folder) == expected
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder)
