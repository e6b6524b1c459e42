"""The rows in training against plain rows in the table, and the concept that they make up."""

from contextlib import ExitStack

import pytest
import torch
from tiny_pipelines import clip_encoder, clip_tokenizer, gemma_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer

from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders
from diffusers_dti.training.crops import Crop
from diffusers_dti.training.samples import TrainingSamples
from diffusers_dti.training.trainable import TrainableConcept, TrainableRows


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
    """Bit for bit, also where the embedding scales by √d (T3) or is not the one that the encoder names (T2)."""
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


def test_every_concept_costs_one_lookup(parts, monkeypatch):
    """Not one for each concept that is swapped in beside it, and so on."""
    tokenizer, encoder = parts
    holder, calls = TextEncoder("text_encoder", tokenizer, encoder), []
    tables = holder.embedding_modules()
    original = type(tables[0]).forward

    def counted(module, ids):
        calls.extend(1 for table in tables if table is module)
        return original(module, ids)

    monkeypatch.setattr(type(tables[0]), "forward", counted)
    with ExitStack() as stack:
        for id in ids_of(tokenizer, " dog", " cat", " toy", " red", " blue"):
            stack.enter_context(TrainableRows([id], torch.ones(1, 16) / 4, torch.ones(1)).swapped_in(holder))
        encoder(**tokenizer(["a dog near a cat"], return_tensors="pt"))
    assert len(calls) == 1 + 5


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


def training_samples(value=0.0, captions=("a {}",)):
    crops = [Crop(0, torch.full((3, 8, 8), value), None, (8, 8), (0, 0))]
    return TrainingSamples(crops, [(torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4))], ["a {}"], list(captions), "<dog>", 10, 0)


def trainable(pipe, made, **more):
    pipe.load_directional_inversion(made)
    return TrainableConcept.start(made, training_samples(), find_text_encoders(pipe), **more)


def move(concept, size=0.1):
    """A step of the parameters, of the directions along the sphere."""
    generator = torch.Generator().manual_seed(1)
    for rows in concept.rows.values():
        step = size * torch.randn(rows.direction.shape, generator=generator)
        moved = rows.direction.detach() + step
        rows.direction.data = moved if concept.raw else torch.nn.functional.normalize(moved, dim=-1)
        if rows.log_factor is not None:
            rows.log_factor.data += 0.5


@pytest.mark.parametrize("kind", ["direction", "raw", "magnitude"])
def test_a_concept_starts_as_it_was_loaded_and_follows_its_rows(sdxl, concept, kind):
    start = concept(sdxl, vectors=2)
    trained = trainable(sdxl, start, raw=kind == "raw", train_magnitude=kind == "magnitude")
    for component, rows in start.embeddings.items():
        torch.testing.assert_close(trained.current().embeddings[component], rows, rtol=0, atol=1e-6)
    move(trained)
    now = trained.current()
    assert now.placeholder_token == "<dog>" and now.metadata == start.metadata
    for component, rows in trained.rows.items():
        torch.testing.assert_close(now.embeddings[component], rows().detach(), rtol=0, atol=1e-6)
        assert (now.directions[component] - start.directions[component]).norm() > 0.01
        expected = {
            "direction": start.scales[component],
            "raw": rows.direction.detach().norm(dim=-1),
            "magnitude": start.scales[component] * torch.tensor(0.5).exp(),
        }[kind]
        torch.testing.assert_close(now.scales[component], expected)


def test_what_was_read_does_not_move_with_the_rows(sdxl, concept):
    trained = trainable(sdxl, concept(sdxl))
    read = trained.current()
    before = {c: v.clone() for c, v in read.directions.items()}
    for rows in trained.rows.values():
        rows.direction.data.neg_()
    assert all(torch.equal(read.directions[c], v) for c, v in before.items())


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_raw_rows_without_a_direction_are_no_concept(sdxl, concept, value):
    trained = trainable(sdxl, concept(sdxl), raw=True)
    trained.rows["text_encoder_2"].direction.data.fill_(value)
    with pytest.raises(ValueError, match="text_encoder_2: rows must be finite and not zero"):
        trained.current()


def test_the_rows_are_swapped_into_every_encoder(sdxl, concept):
    trained = trainable(sdxl, concept(sdxl))
    move(trained)
    encoders = find_text_encoders(sdxl)

    def encoded():
        with torch.no_grad():
            return {c: e.model(e.tokenizer("a <dog>", return_tensors="pt").input_ids)[0] for c, e in encoders.items()}

    before = encoded()
    with trained.swapped_in(encoders):
        inside = encoded()
    after = encoded()
    for component in encoders:
        assert not torch.equal(inside[component], before[component])
        assert torch.equal(after[component], before[component])


def test_the_metrics_are_means_over_all_vectors(sdxl, concept):
    trained = trainable(sdxl, concept(sdxl, vectors=2, scale=0.4))
    assert trained.metrics() == {"angle": pytest.approx(0, abs=1e-2), "norm": pytest.approx(0.4)}
    quarter = trained.rows["text_encoder"].direction
    start = quarter.detach()[0].clone()
    other = torch.zeros_like(start)
    other[0], other[1] = -start[1], start[0]
    quarter.data[0] = torch.nn.functional.normalize(other, dim=-1)  # a right angle
    angle = trained.metrics()["angle"]
    assert angle == pytest.approx(90 / 4, abs=1e-2)  # one of four vectors


def test_the_distance_is_a_mean_of_squares_for_each_encoder(sdxl, concept):
    trained = trainable(sdxl, concept(sdxl, vectors=2), raw=True)
    assert trained.distance_to_start().item() == 0
    for rows, step in zip(trained.rows.values(), (0.1, 0.3)):
        rows.direction.data += step
    distance = trained.distance_to_start()
    assert distance.item() == pytest.approx(0.1**2 + 0.3**2, rel=1e-4)
    distance.backward()
    assert all(rows.direction.grad.abs().sum() > 0 for rows in trained.rows.values())


def test_the_fingerprint_knows_photos_captions_and_start(sdxl, concept):
    sdxl.load_directional_inversion(concept(sdxl))
    encoders = find_text_encoders(sdxl)

    def fingerprint(made, **samples):
        return TrainableConcept.start(made, training_samples(**samples), encoders).fingerprint()

    start = concept(sdxl)
    first = fingerprint(start)
    assert first == fingerprint(concept(sdxl)) and first.keys() == {"photos", "start"}
    for changed in (fingerprint(start, value=0.5), fingerprint(start, captions=("my {}",))):
        assert changed["photos"] != first["photos"] and changed["start"] == first["start"]
    other = fingerprint(concept(sdxl, seed=1))
    assert other["start"] != first["start"] and other["photos"] == first["photos"]
