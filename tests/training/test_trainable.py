"""The rows in training against plain rows in the table."""

import pytest
import torch
from tiny_pipelines import clip_encoder, clip_tokenizer, gemma_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer

from diffusers_dti.pipeline.text_encoders import TextEncoder
from diffusers_dti.training.trainable import TrainableRows


def made(kind, folder):
    torch.manual_seed(0)
    tokenizer = {"clip": clip_tokenizer, "gemma": gemma_tokenizer}.get(kind, t5_tokenizer)(folder / "t")
    encoder = {
        "clip": lambda: clip_encoder(tokenizer, 16),
        "gemma": lambda: gemma_encoder(tokenizer, 16),
        "t5": lambda: t5_encoder(tokenizer, 16),
        "umt5": lambda: t5_encoder(tokenizer, 16, spare_rows=2, umt5=True),
    }[kind]()
    return tokenizer, encoder.requires_grad_(False)


def ids_of(tokenizer, *words):
    return [tokenizer(w, add_special_tokens=False).input_ids[-1] for w in words]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["clip", "gemma", "t5", "umt5"])
def parts(request, dtype, tmp_path):
    tokenizer, encoder = made(request.param, tmp_path)
    return tokenizer, encoder.to(dtype)


def test_swapped_rows_are_plain_rows(parts):
    """To the bit, also where the embedding scales by √d (T3) or is not the one that the encoder names (T2)."""
    tokenizer, encoder = parts
    ids = ids_of(tokenizer, " dog", " cat")
    rows = TrainableRows(ids, torch.nn.functional.normalize(torch.randn(2, 16)), torch.tensor([0.4, 0.5]))
    text = tokenizer(["a dog near a cat", "a cat dog dog toy", "a toy"], padding=True, return_tensors="pt")
    with rows.swapped_in(TextEncoder("text_encoder", tokenizer, encoder)):
        swapped = encoder(**text).last_hidden_state
    ordinary = encoder(**text).last_hidden_state
    with torch.no_grad():
        encoder.get_input_embeddings().weight[ids] = rows().to(encoder.dtype)
    plain = encoder(**text).last_hidden_state
    print(f"{type(encoder).__name__}, {encoder.dtype}: greatest difference {(swapped - plain).abs().max().item()}")
    assert torch.equal(swapped, plain)
    assert torch.equal(swapped[2], ordinary[2]) and not torch.equal(swapped[:2], ordinary[:2])


def test_only_the_rows_get_a_gradient_and_it_is_the_tables(parts):
    tokenizer, encoder = parts
    ids = ids_of(tokenizer, " dog", " cat")
    start = encoder.get_input_embeddings().weight[ids].float()
    scale = start.norm(dim=-1)
    rows = TrainableRows(ids, start / scale[:, None], scale)
    text = tokenizer(["a dog near a cat dog"], return_tensors="pt").input_ids
    weights = torch.randn(*text.shape, 16)  # the states' norms are the same for any row

    def backward():
        (encoder(text).last_hidden_state.float() * weights).sum().backward()

    with rows.swapped_in(TextEncoder("text_encoder", tokenizer, encoder)):
        backward()
    assert encoder.get_input_embeddings().weight.grad is None
    assert rows.direction.grad.dtype == torch.float32
    encoder.requires_grad_(True)
    backward()
    expected = encoder.get_input_embeddings().weight.grad[ids].float() * scale[:, None]
    difference = ((rows.direction.grad - expected).norm() / expected.norm()).item()
    print(f"{type(encoder).__name__}, {encoder.dtype}: relative difference of the gradients {difference:.1e}")
    assert difference < (1e-5 if encoder.dtype == torch.float32 else 0.1)


def test_no_tensor_of_the_tables_size_is_made():
    """T12: counted over a forward and a backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    embedding = torch.nn.Embedding(10_000, 8).requires_grad_(False)
    holder = torch.nn.Module()
    holder.embedding, holder.get_input_embeddings = embedding, lambda: embedding
    rows = TrainableRows([9_999], torch.nn.functional.normalize(torch.ones(1, 8)), torch.ones(1))
    made, size = [], embedding.weight.numel()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.numel() >= size:
                    made.append((func, tuple(x.shape)))
            return out

    with Count(), rows.swapped_in(TextEncoder("text_encoder", None, holder)):
        embedding(torch.tensor([[1, 9_999]])).sum().backward()
    assert not made and rows.direction.grad.abs().sum() > 0


def test_a_padding_row_gets_its_gradient_too():
    """Gemma's embedding pads with id 0: among our rows that is the first, whose gradient torch would drop."""
    embedding = torch.nn.Embedding(8, 4, padding_idx=0).requires_grad_(False)
    holder = torch.nn.Module()
    holder.embedding, holder.get_input_embeddings = embedding, lambda: embedding
    rows = TrainableRows([5], torch.nn.functional.normalize(torch.ones(1, 4)), torch.ones(1))
    with rows.swapped_in(TextEncoder("text_encoder", None, holder)):
        embedding(torch.tensor([5])).sum().backward()
    assert rows.direction.grad.tolist() == [[1, 1, 1, 1]] and embedding.padding_idx == 0


def test_the_hook_goes_also_after_an_error(parts):
    tokenizer, encoder = parts
    rows = TrainableRows([3], torch.nn.functional.normalize(torch.ones(1, 16)), torch.ones(1))
    with pytest.raises(RuntimeError), rows.swapped_in(TextEncoder("text_encoder", tokenizer, encoder)):
        raise RuntimeError
    assert not encoder.get_input_embeddings()._forward_hooks
