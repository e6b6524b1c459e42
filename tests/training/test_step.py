"""A training step: the device is never waited for."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_dti
from diffusers_dti import DTITrainer
from diffusers_dti.families import sana, wan
from diffusers_dti.training import samples

SETTINGS = {
    "placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 4, "heldout_loss_steps": 0,
}  # fmt: skip
PACKAGE = str(Path(diffusers_dti.__file__).parent)


class Reads(TorchDispatchMode):
    """List where the package reads a tensor's values, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.lines, self.on_host = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal") and not self.on_host:
            frame = sys._getframe(1)
            while frame is not None and "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):  # transformers has its own
                self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {name}")
        return func(*args, **(kwargs or {}))

    def unread(self, function):
        """Return a function whose reads are of tensors that never left the host: draws and tokens."""

        def wrapped(*args, **kwargs):
            self.on_host = True
            try:
                return function(*args, **kwargs)
            finally:
                self.on_host = False

        return wrapped


@pytest.mark.parametrize("options", [{}, {"train_batch_size": 2, "gradient_accumulation_steps": 2, "kappa": 1e-3}])
def test_a_step_reads_no_tensor(pipe, photos, monkeypatch, options):
    reads = Reads()
    monkeypatch.setattr(samples.TrainingSamples, "batch", reads.unread(samples.TrainingSamples.batch))
    for family in (sana, wan):
        monkeypatch.setattr(family, "encoder_inputs", reads.unread(family.encoder_inputs))
    trainer = DTITrainer(
        pipe,
        placeholder_token="<dog>",
        initializer_token="dog",
        resolution=32,
        max_train_steps=4,
        heldout_loss_steps=0,
        **options,
    )

    def between(trainer, step):  # the third step alone, in which nothing is logged
        if step == 2:
            reads.__enter__()
        elif step == 3:
            reads.__exit__(None, None, None)

    trainer.fit(photos, callback_on_step_end=between)
    assert reads.lines == []


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(pipe, photos):
    """torch itself raises where a step waits."""
    pipe.to("cuda")

    def between(trainer, step):
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")

    trainer = DTITrainer(pipe, **SETTINGS)
    try:
        trainer.fit(photos, callback_on_step_end=between)
    finally:
        torch.cuda.set_sync_debug_mode("default")
