"""Training in any torch mode, and models without gradients."""

import copy

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from helpers import differing, states
from tiny_pipelines import fresh_copy
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_dti import DTITrainer

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "max_train_steps": 2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_in_every_mode(sd, concept, photos, mode):
    """It gives the same concept as outside of the mode, which is still on afterwards, and no trace of it stays."""
    other = copy.deepcopy(sd)
    expected = DTITrainer(other, **SETTINGS).fit(photos).embeddings["text_encoder"]
    with mode():
        sd.load_directional_inversion(concept(sd, "<a>"))
        sd.unload_directional_inversion()
        made = DTITrainer(sd, **SETTINGS).fit(photos)
        assert not torch.is_grad_enabled()
        sd.load_directional_inversion(concept(sd, "<a>"))
        sd.unload_directional_inversion("<dog>")
    assert torch.equal(made.embeddings["text_encoder"], expected)
    assert not any(parameter.is_inference() for parameter in sd.text_encoder.parameters())
    DTITrainer(sd, **SETTINGS).fit(photos)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_made_under_inference_mode_are_refused(sd, photos, component):
    with torch.inference_mode():
        setattr(sd, component, copy.deepcopy(getattr(sd, component)))
    before = states(sd)
    with pytest.raises(ValueError, match=rf"^The weights of {component} were made under `torch.inference_mode\(\)`"):
        DTITrainer(sd, **SETTINGS).fit(photos)
    assert not differing(states(sd), before)


@pytest.mark.parametrize(
    ("dtype", "component", "options"),
    [
        (torch.float32, "unet", {}),
        (torch.bfloat16, "unet", {"gradient_checkpointing": True}),
        (torch.bfloat16, "unet", {"adapter": "lora", "adapter_start_step": 1}),
        (torch.bfloat16, "text_encoder", {}),
    ],
)
def test_layers_stored_in_float8(sd, photos, dtype, component, options):
    """They train as layers whose weights were rounded to float8 once."""
    sd.to(dtype)
    rounded = fresh_copy(sd)
    model = getattr(sd, component)
    skipped = ("norm", "embed")
    apply_layerwise_casting(model, torch.float8_e4m3fn, dtype, skipped)
    assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}
    dtypes = [p.dtype for p in model.parameters()]
    getattr(rounded, component).load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
    made, expected = (DTITrainer(pipe, **SETTINGS, **options).fit(photos).embeddings["text_encoder"] for pipe in (sd, rounded))
    assert torch.equal(made, expected)
    sd.unload_lora_weights()
    assert [p.dtype for p in model.parameters()] == dtypes


def test_layers_stored_in_float8_are_so_after_an_interruption(sd, photos):
    apply_layerwise_casting(sd.unet, torch.float8_e4m3fn, torch.float32)
    dtypes = [p.dtype for p in sd.unet.parameters()]
    attention = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q

    def interrupt(module, args):
        assert module.weight.dtype == torch.float8_e4m3fn  # torch's hooks come before diffusers'
        raise KeyboardInterrupt

    handle = attention.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        DTITrainer(sd, **SETTINGS).fit(photos)
    handle.remove()
    assert [p.dtype for p in sd.unet.parameters()] == dtypes


def test_a_table_stored_in_float8_is_refused(sd, photos):
    apply_layerwise_casting(sd.text_encoder, torch.float8_e4m3fn, torch.float32)
    before = states(sd)
    with pytest.raises(
        ValueError, match=r"^text_encoder stores its table of embeddings in torch.float8_e4m3fn .*leave the table"
    ):
        DTITrainer(sd, **SETTINGS).fit(photos)
    assert not differing(states(sd), before)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends(wan, photos, backend, monkeypatch):
    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)  # for all models, and put back afterwards
    expected = DTITrainer(fresh_copy(wan), **SETTINGS | {"resolution": 32}).fit(photos).embeddings["text_encoder"]
    wan.transformer.set_attention_backend(backend)
    made = DTITrainer(wan, **SETTINGS | {"resolution": 32}).fit(photos).embeddings["text_encoder"]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert wan.transformer.blocks[0].attn1.processor._attention_backend == backend


def test_attention_without_a_backward_pass_is_refused(wan, photos):
    for module in wan.transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = AttentionBackendName.SAGE  # diffusers' setter needs the package
    with pytest.raises(ValueError, match=r"^The attention of transformer is SageAttention.*pipe.transformer.reset_attention"):
        DTITrainer(wan, **SETTINGS | {"resolution": 32}).fit(photos)


def test_blocks_compiled_by_region(wan, photos):
    """By diffusers' `compile_repeated_blocks`, forward and backward, one block with checkpointing and one without."""
    settings = SETTINGS | {"resolution": 32, "train_batch_size": 1, "gradient_accumulation_steps": 1, "heldout_loss_steps": 0}
    expected = DTITrainer(fresh_copy(wan), **settings).fit(photos).embeddings["text_encoder"]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    wan.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    made = (
        DTITrainer(wan, **settings, gradient_checkpointing=True, gradient_checkpointing_interval=2)
        .fit(photos)
        .embeddings["text_encoder"]
    )
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert graphs.frame_count == 2  # the first block's input needs no gradient; a second step compiles nothing
