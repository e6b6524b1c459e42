"""Common mistakes get one clear error that says what to do, and leave the pipeline unchanged."""

import diffusers
import pytest
import torch
from helpers import differing, everything, same, states
from PIL import Image

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline.text_encoders import find_text_encoders

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 1}

TABLE = {
    "an empty folder": (
        {},
        "empty",
        "ValueError: empty has no images (.avif, .bmp, .gif, .heic, .heif, .jpeg, .jpg, .png, .tif, .tiff, .webp): give a "
        "folder of 3 to 6 photos.",
    ),
    "a broken image": (
        {},
        "broken",
        "OSError: broken/0.png is not an image that can be opened, replace or remove it: cannot identify image file "
        "'broken/0.png'",
    ),
    "a placeholder that is a word": (
        {"placeholder_token": "dog</w>"},
        "photos",
        "ValueError: dog</w> is in the vocabulary of text_encoder already, with another meaning: choose another placeholder "
        "(`token`, in training `placeholder_token`). If stock `load_textual_inversion` put it there, "
        "`unload_textual_inversion` takes it out.",
    ),
    "an empty initializer": (
        {"initializer_token": " "},
        "photos",
        "ValueError: The initializer ' ' has no known tokens: give a word for what the photos show.",
    ),
    "a resolution the VAE cannot take": (
        {"resolution": 15},
        "photos",
        "ValueError: This pipeline needs a resolution that is a multiple of 2, got 15: 14 would do.",
    ),
    "a Hub credential as placeholder": (
        {"placeholder_token": "hf_secret"},
        "photos",
        "ValueError: A placeholder that starts with hf_ looks like a Hub credential: pass that as `hf_token`.",
    ),
    "0 steps": ({"max_train_steps": 0}, "photos", "ValueError: max_train_steps must be at least 1, got 0."),
    "templates without a placeholder": (
        {"templates": ["a photo"]},
        "photos",
        'ValueError: templates need a "{}" where the placeholder goes.',
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_message(case, sdxl, concept, photos, tmp_path, monkeypatch):
    settings, folder, message = TABLE[case]
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"png?")
    for i, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / f"{i}.png")
    sdxl.load_directional_inversion(concept(sdxl, "<cat>"))
    before, vocabulary_before = everything(sdxl), states(sdxl)
    with pytest.raises((ValueError, OSError)) as caught:
        DTITrainer(sdxl, **SETTINGS | settings).fit(folder)
    said = f"{'OSError' if isinstance(caught.value, OSError) else 'ValueError'}: {caught.value}"
    print(f"{case}: {said}")
    assert said == message
    assert same(everything(sdxl), before) and not differing(states(sdxl), vocabulary_before)
    assert "secret" not in said


def test_an_unsupported_pipeline():
    pipe = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"Training supports SDXL, .*; DDPMPipeline is not one of them"):
        DTITrainer(pipe)


def test_saving_several_vectors_warns(sdxl, concept, tmp_path, caplog):
    from diffusers_dti.pipeline.tokenizer import logger

    sdxl.load_directional_inversion(concept(sdxl, "<cat>"))
    sdxl.load_directional_inversion(concept(sdxl, "<rex>", vectors=2))
    logger.addHandler(caplog.handler)
    try:
        sdxl.save_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "<rex>: the vectors of concepts with several vectors" in caplog.text and "<cat>" not in caplog.text


@pytest.mark.parametrize("name", ["sdxl", "sana", "wan"])
def test_no_table_is_made_in_a_step(name, request):
    """No operation of three steps, forward and backward, has a result as large as the vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    pipe = request.getfixturevalue(name)
    rows, largest, dtypes = 60_000, [], set()
    for text_encoder in find_text_encoders(pipe).values():
        encoder = text_encoder.model
        encoder.resize_token_embeddings(rows, mean_resizing=False)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, torch.Tensor)]
            dtypes.update(x.dtype for x in tensors)
            if func.__name__ != "detach.default":  # shares its memory
                largest.append(max((x.numel() for x in tensors), default=0))
            return out

    counting = Count()
    trainer = DTITrainer(pipe, **SETTINGS | {"max_train_steps": 4, "resolution": 32})

    def callback(trainer, step):
        if step == 1:
            counting.__enter__()
        if step == 4:
            counting.__exit__(None, None, None)

    trainer.fit([Image.new("RGB", (32, 32))], callback_on_step_end=callback)
    print(
        f"{name}: {len(largest)} operations in three steps, the largest result has {max(largest)} numbers, a table {rows * 16}"
    )
    assert len(largest) > 1000 and max(largest) < rows
    assert torch.float64 not in dtypes  # which MPS does not have
