"""Training through layers whose weights are quantized, by each package that is there. The rows stay in float32."""

import importlib.util

import pytest
import torch
from tiny_pipelines import fresh_copy
from torch import nn

from diffusers_dti import DTITrainer

SETTINGS = {
    "placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 2, "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "heldout_loss_steps": 0,
}  # fmt: skip


def by_torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def by_quanto(model):
    from optimum.quanto import QLinear, freeze, qint8, quantize

    quantize(model, weights=qint8, include=[name for name, m in model.named_modules() if type(m) is nn.Linear])
    freeze(model)
    return [m.weight for m in model.modules() if isinstance(m, QLinear)]


def by_bitsandbytes(model):
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = []
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                own = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4")
                own.weight, own.bias = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4"), layer.bias
                setattr(module, name, own.to("cpu"))
                made.append(own.weight)
    return made


WAYS = {"torchao": by_torchao, "optimum": by_quanto, "bitsandbytes": by_bitsandbytes}


def dequantized(pipe, way):
    """Return a copy of a pipeline whose layers compute with what the quantized weights stand for."""
    plain = fresh_copy(pipe)
    for component in ("unet", "text_encoder"):
        quantized, model = getattr(pipe, component), getattr(plain, component)
        layers = [m for m in model.modules() if type(m) is nn.Linear]
        weights = way(quantized)
        assert len(weights) == len(layers)
        twins = [m for m in quantized.modules() if isinstance(m, nn.Linear)]
        for layer, twin in zip(layers, twins):
            unit = torch.eye(layer.in_features)
            with torch.no_grad():
                bias = 0 if layer.bias is None else layer.bias
                layer.weight.copy_((twin(unit) - bias).T)
    return plain


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("package", WAYS)
def test_gradients_pass_quantized_layers(sd, photos, package, checkpointing):
    """What is learned is what the same pipeline learns with the rounded weights, in float32."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    plain = dequantized(sd, WAYS[package])
    made = DTITrainer(sd, **SETTINGS, gradient_checkpointing=checkpointing).fit(photos)
    expected = DTITrainer(plain, **SETTINGS).fit(photos)
    rows = made.embeddings["text_encoder"]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected.embeddings["text_encoder"], rtol=0, atol=1e-3)
    start = DTITrainer(plain, **SETTINGS | {"placeholder_token": "<other>"}, learning_rate=0.0).fit(photos)
    assert (rows - start.embeddings["text_encoder"]).abs().max() > 0.05  # what is compared has moved
