"""Compare prompts at their real length with the padded prompts of the pipelines, forward and backward."""

import pytest
import torch
from torch import nn

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.families.unpadded import encoder_inputs
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.trainable import TrainableRows

PROMPTS = ["a photo of a <dog> on the beach near the red tower", "a <dog>", "a cat and a <dog>, <dog>"]


def padded(pipe, prompts):
    """Return the conditioning of the pipeline's own `encode_prompt`, with 300 or 512 positions, and its mask."""
    if "Sana" in type(pipe).__name__:
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")[:2]
    states = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu", max_sequence_length=512)[0]
    return states, torch.ones(states.shape[:2])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("name", ["sana", "wan"])
def test_conditioning_and_gradient_are_those_of_padded_prompts(name, vectors, side, request, concept):
    pipe = request.getfixturevalue(name)
    made = concept(pipe, vectors=vectors)
    pipe.load_directional_inversion(made)
    entry = find_text_encoders(pipe)["text_encoder"].concepts["<dog>"]
    results = []
    for how in ("padded", "real"):
        rows = TrainableRows(entry.ids, made.directions["text_encoder"], made.scales["text_encoder"])
        with rows.swapped_in(find_text_encoders(pipe)["text_encoder"]):
            if how == "padded":
                pipe.tokenizer.padding_side = "right"  # Wan's pipeline relies on this, and SANA's sets it
                states, mask = padded(pipe, PROMPTS)
            else:
                pipe.tokenizer.padding_side = side
                made_here = find_family(pipe).encode_prompts(PROMPTS, [0, 0, 0])
                assert pipe.tokenizer.padding_side == side
                states, mask = made_here["context"], made_here.get("mask", torch.ones(made_here["context"].shape[:2]))
        real = [s[m > 0] for s, m in zip(states, mask)]
        weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(i)) for i, r in enumerate(real)]
        sum((r * w).sum() for r, w in zip(real, weights)).backward()
        results.append((torch.cat(real), rows.direction.grad))
    (states, gradient), (our_states, our_gradient) = results
    differences = relative(our_states, states), relative(our_gradient, gradient)
    print(f"{name}, {vectors} vectors, {side} padding: conditioning {differences[0]:.1e}, gradient {differences[1]:.1e}")
    assert our_states.shape == states.shape and gradient.norm() > 0
    assert max(differences) < 1e-4
    if name == "sana":
        assert made_here["context"].shape[1] == mask.sum(-1).max() < 300


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_the_denoiser_predicts_the_same(name, request):
    """SANA masks the padding, so it can be left out. Wan does not, so it is added."""
    pipe = request.getfixturevalue(name)
    prompts = [p.replace("<dog>", "dog") for p in PROMPTS]
    ours = find_family(pipe).encode_prompts(prompts, [0, 0, 0])
    states, mask = padded(pipe, prompts)
    shape = (3, 4, 8, 8) if name == "sana" else (3, 16, 1, 4, 4)
    arguments = {"hidden_states": torch.randn(shape), "timestep": torch.tensor([900.0, 500.0, 10.0])}

    def predict(states, mask):
        masked = {"encoder_attention_mask": mask} if name == "sana" else {}
        return pipe.transformer(encoder_hidden_states=states, **masked, **arguments).sample

    with torch.no_grad():
        assert relative(predict(ours["context"], ours.get("mask")), predict(states, mask)) < 1e-5


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_zero_pads_are_tokens_with_a_zero_row(name, request):
    """The authors add a token whose embedding is zero, and put it before the first word."""
    pipe = request.getfixturevalue(name)
    prompts, zeros = ["a dog on the beach", "a cat", "a"], [2, 0, 15]
    ours = find_family(pipe).encode_prompts(prompts, zeros)
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    tokenizer.add_tokens(["<zero>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[-1] = 0
    start = 1 if name == "sana" else 0  # after <bos>
    for number, (prompt, count) in enumerate(zip(prompts, zeros)):
        ids = tokenizer(prompt).input_ids
        ids = [*ids[:start], *[len(tokenizer) - 1] * count, *ids[start:]]
        with torch.no_grad():
            expected = encoder(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(ours["context"][number, : len(ids)], expected, rtol=1e-5, atol=1e-5)
        if name == "sana":
            assert ours["mask"][number].sum() == len(ids)
        else:
            assert not ours["context"][number, len(ids) :].any()


def test_long_prompts_are_cut_off(sana, wan):
    long = "a dog " * 400
    assert find_family(sana).encode_prompts([long], [0])["context"].shape[1] == 300
    assert find_family(sana).encode_prompts([long, "a"], [3, 1])["mask"].sum(-1).tolist() == [300, 3]
    assert find_family(wan).encode_prompts([long], [2])["context"].shape[1] == 512


def test_cut_prompts_keep_their_end(wan):
    """T5's `</s>` is kept, also with zeros."""
    long = ["a dog " * 400, "a cat"]
    for zeros in ([0, 0], [5, 0]):
        inputs = encoder_inputs(find_family(wan), wan.tokenizer, wan.text_encoder, long, 512, zeros)
        last = wan.text_encoder.get_input_embeddings()(torch.tensor(1))
        rows = inputs.get("inputs_embeds")
        rows = wan.text_encoder.get_input_embeddings()(inputs["input_ids"]) if rows is None else rows
        assert rows.shape[1] == 512 and torch.equal(rows[0, -1], last)


def test_a_placeholder_behind_the_cut_is_refused(sana, photos):
    """Zeros before the prompt count too: 290 words and 15 zeros are too many."""
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 1}
    late = "a " * 290 + "{}"
    DTITrainer(sana, **settings, templates=[late], zero_pad=False).fit(photos)
    sana.unload_directional_inversion()
    with pytest.raises(ValueError, match="the placeholder comes after 285 tokens"):
        DTITrainer(sana, **settings, templates=[late]).fit(photos)


def test_an_embedding_is_looked_up_once(sana):
    """A hook swaps in the concept's rows, so it has to run when zeros are inserted, and only once."""
    looked_up = []
    module: nn.Module = sana.text_encoder.get_input_embeddings()
    with module.register_forward_hook(lambda *args: looked_up.append(args[1][0].shape)):
        inputs = encoder_inputs(find_family(sana), sana.tokenizer, sana.text_encoder, ["a dog", "a"], 300, [0, 4])
        sana.text_encoder(**inputs)
    assert looked_up == [(2, 3)] and inputs["inputs_embeds"].shape[:2] == (2, 6)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_zero_padding_leaves_nothing_behind(name, request, photos):
    pipe = request.getfixturevalue(name)
    rows, tokens = len(pipe.text_encoder.get_input_embeddings().weight), len(pipe.tokenizer)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 3}
    lengths = []

    def note(trainer, step):
        lengths.append(len(pipe.tokenizer))

    learned = DTITrainer(pipe, **settings, zero_pad=True).fit(photos, callback_on_step_end=note)
    assert lengths == [tokens + 1] * 3 and len(pipe.tokenizer) == tokens + 1
    assert len(pipe.text_encoder.get_input_embeddings().weight) == max(rows, tokens + 1)  # UMT5's table has spare rows
    assert learned.num_vectors == 1 and learned.metadata["training"]["zero_pad"] is True
    pipe.unload_directional_inversion()
    assert (len(pipe.text_encoder.get_input_embeddings().weight), len(pipe.tokenizer)) == (rows, tokens)


def test_zero_padding_is_refused_for_padded_families(sdxl):
    with pytest.raises(ValueError, match="zero_pad is for SANA and Wan: SDXL"):
        DTITrainer(sdxl, zero_pad=True)
