"""Share what several tests need: the state of a pipeline before and after, batches, and the method as written formulas."""

import copy
import json
import math
import signal
from contextlib import contextmanager
from dataclasses import replace

import torch

from diffusers_dti.families import Batch, find_family
from diffusers_dti.pipeline.offload import module_hooks
from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders


@contextmanager
def no_hanging(seconds=5):
    """Fail instead of waiting for ever, as for a pipe that nobody writes to."""

    def stop(signum, frame):
        raise AssertionError(f"it hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(tokenizer, encoder):
    """Return all that unloading must put back, as values that can be compared."""
    if hasattr(tokenizer, "_tokenizer"):
        tokens = json.loads(tokenizer._tokenizer.to_str())
        tokens.pop("padding"), tokens.pop("truncation")  # changed by every call
    else:
        tokens = {
            "decoder": {i: repr(t) for i, t in tokenizer._added_tokens_decoder.items()},
            "encoder": dict(tokenizer._added_tokens_encoder),
            "trie": copy.deepcopy(tokenizer.tokens_trie.data),
            "total": tokenizer.total_vocab_size,
        }
    weight = TextEncoder("", tokenizer, encoder).weight
    tables = [m for m in encoder.modules() if isinstance(m, torch.nn.Embedding) and m.weight is weight]
    return {
        "tokens": tokens,
        "tokenizer_class": type(tokenizer),
        "tokenizer_attributes": sorted(vars(tokenizer)),
        "length": len(tokenizer),
        "table": weight.detach().view(torch.uint8).numpy().tobytes(),
        "modules": [(n, type(m)) for n, m in encoder.named_modules()],
        "parameters": [(n, tuple(p.shape), p.requires_grad, p.dtype) for n, p in encoder.named_parameters()],
        "ties": sum(p is weight for m in encoder.modules() for p in m._parameters.values()),
        "num_embeddings": [m.num_embeddings for m in tables],
        "config": encoder.config.to_dict(),
        "eos": [getattr(m, "eos_token_id", None) for m in encoder.modules()],
        "attributes": sorted(vars(encoder)),
    }


def states(pipe):
    """Return `state` of every text encoder, by component and name, for each of its tokenizers."""
    found = {}
    for component, encoder in find_text_encoders(pipe).items():
        for number, tokenizer in enumerate(encoder.tokenizers):
            found |= {f"{component} {k}" + "'" * number: v for k, v in state(tokenizer, encoder.model).items()}
    return found


def differing(a, b):
    """Return the names of the values that differ; the values themselves are long."""
    return [k for k in a | b if a.get(k) != b.get(k)]


def encoded(pipe, prompt):
    """Return all that the encoders of an SDXL pipeline output for a prompt."""
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt)
    return torch.cat([states.flatten(), pooled.flatten()])


def everything(pipe):
    """Return all that `fit` must leave as it was."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        "weights": {
            f"{n}.{k}": (v.dtype, v.device, v.clone())
            for n, m in modules.items()
            for k, v in m.state_dict().items()
            if "token_embedding" not in k
        },
        "requires_grad": [p.requires_grad for m in modules.values() for p in m.parameters()],
        "grad": [p.grad for m in modules.values() for p in m.parameters()],
        "training": [x.training for m in modules.values() for x in m.modules()],
        "hooks": [(len(x._forward_hooks), len(x._forward_pre_hooks)) for m in modules.values() for x in m.modules()],
        "padding_side": (pipe.tokenizer.padding_side, pipe.tokenizer_2.padding_side),
        "scheduler": dict(pipe.scheduler.config),
        "random": torch.get_rng_state(),
    }


def same(a, b):
    """Compare nested values that may be tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def written_method(v, loss, prior, lr, kappa, beta, steps):
    """Take the steps of the method one row at a time, in float64 (paper, section 4)."""
    v = v.double().clone()
    s = [0.0] * len(v)
    for t in range(1, steps + 1):
        v.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(v, t - 1), v)
        v = v.detach()
        for i in range(len(v)):
            g = grad[i] - kappa * prior[i].double()
            g = g - torch.dot(g, v[i]) * v[i]
            s[i] = beta * s[i] + (1 - beta) * float(g @ g)
            g = g / (math.sqrt(s[i] / (1 - beta**t)) + 1e-8)
            w = v[i] - lr * g
            v[i] = w / w.norm()
    return v


def hooks(pipe):
    """Return accelerate's hooks on each component of a pipeline, comparable."""
    return {
        name: [
            (n, type(h).__name__, getattr(h, "execution_device", None), getattr(h, "offload", None))
            for n, m in part.named_modules()
            for h in module_hooks(m)
        ]
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def rows_in(pipe, component, word="<dog>"):
    """Return the row of a token in an encoder's table."""
    encoder = find_text_encoders(pipe)[component]
    return encoder.weight[encoder.tokenizer.convert_tokens_to_ids(word)].detach()


def family_batch(pipe, size=2, **changes):
    """Make a batch of samples for a pipeline's family, the same for every call."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"WanPipeline": (size, 16, 1, 4, 4), "Flux2KleinPipeline": (size, 16, 8, 8)}
    shape = shapes.get(type(pipe).__name__, (size, 4, 8, 8))
    latents, noise = torch.randn(2, *shape, generator=generator)
    timesteps = torch.tensor([100, 900, 400, 0])[:size]
    plain = Batch(
        latents, noise, None, timesteps, ["a dog on the beach"] * size, [(16, 16)] * size, [(0, 0)] * size, (32, 32), [0] * size
    )
    return replace(plain, **changes)


def family_loss(pipe, batch):
    """Return the loss of a batch, as training computes it."""
    family = find_family(pipe)
    conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
    return family.loss(batch, conditioning)
