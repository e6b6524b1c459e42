"""Find text encoders and measure their vocabularies."""

import inspect

import diffusers
import pytest
import torch
from helpers import differing, rows_in, states

from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders


def test_a_pipeline_without_text_is_refused():
    pipe = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline has no text encoder.*neither"):
        pipe.load_directional_inversion({"<dog>": torch.ones(4)})


@pytest.mark.parametrize("kind", ["no text", "no encoder", "not loaded yet"])
def test_a_pipeline_without_text_encoders_has_no_concepts(kind, sd, tmp_path):
    """So that tools can look at any pipeline. Loading still says what is missing."""
    if kind == "no text":
        pipe = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    elif kind == "no encoder":
        sd.text_encoder, pipe = None, sd
    else:
        pipe = diffusers.StableDiffusionXLModularPipeline()
    assert pipe.directional_inversions == {} and hasattr(pipe, "directional_inversions")
    assert dict(inspect.getmembers(pipe))["directional_inversions"] == {}
    pipe.unload_directional_inversion()
    with pytest.raises(ValueError, match="<dog> is not loaded; loaded are: none"):
        pipe.unload_directional_inversion("<dog>")
    with pytest.raises(ValueError, match="loaded are: none"):
        pipe.save_directional_inversion(tmp_path)
    with pytest.raises(ValueError, match="has no text encoder|are not loaded yet"):
        pipe.load_directional_inversion({"<dog>": torch.ones(4)})


def test_the_scale_is_over_the_original_vocabulary(pipe, concept):
    """Concepts, stock textual inversions, rows of norm 0 and rows without a token (UMT5's) do not count."""
    for text_encoder in find_text_encoders(pipe).values():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        norms = encoder.get_input_embeddings().weight.detach()[: len(tokenizer)].double().norm(dim=-1)
        expected = {r: getattr(norms[norms > 0], r)().item() for r in ("mean", "min", "max")}
        for word in ("<a>", "<b>"):
            pipe.load_directional_inversion(concept(pipe, word, scale=20.0, vectors=2))
        pipe.load_textual_inversion(
            {"<stock>": torch.full((encoder.config.hidden_size,), 9.0)}, tokenizer=tokenizer, text_encoder=encoder
        )
        for rule, value in expected.items():
            assert text_encoder.norm(rule) == pytest.approx(value, rel=1e-6)
        pipe.unload_directional_inversion()
    with pytest.raises(ValueError, match='must be "mean"'):
        text_encoder.norm("median")


def test_token_scale_repairs_an_inflated_embedding(sdxl, concept):
    inflated = concept(sdxl, scale=20.0)
    sdxl.load_directional_inversion(inflated, token_scale="mean")
    for component, encoder in find_text_encoders(sdxl).items():
        norm = encoder.norm("mean")
        assert rows_in(sdxl, component).norm().item() == pytest.approx(norm, rel=1e-6)
    sdxl.unload_directional_inversion()
    sdxl.load_directional_inversion(inflated, token_scale=0.5)
    assert rows_in(sdxl, "text_encoder_2").norm().item() == pytest.approx(0.5, rel=1e-6)
    sdxl.unload_directional_inversion()
    before = states(sdxl)
    for bad in ("median", 0, -1.0):
        with pytest.raises(ValueError, match="token_scale must be"):
            sdxl.load_directional_inversion(inflated, token_scale=bad)
    assert not differing(states(sdxl), before)


def test_encoders_are_found_with_their_tokenizers(sdxl):
    encoders = find_text_encoders(sdxl)
    assert list(encoders) == ["text_encoder", "text_encoder_2"]
    for component, encoder in encoders.items():
        assert encoder.component == component and encoder.model is getattr(sdxl, component)
        assert encoder.tokenizer is getattr(sdxl, component.replace("text_encoder", "tokenizer"))
        assert encoder.width == encoder.weight.shape[1] == {"text_encoder": 16, "text_encoder_2": 24}[component]
    sdxl.tokenizer = None
    assert list(find_text_encoders(sdxl)) == ["text_encoder_2"]


def test_the_state_is_the_encoders_own(sdxl, concept):
    """A second `TextEncoder` of the same model sees what is loaded, and there is no state without concepts."""
    sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    again = TextEncoder("text_encoder", sdxl.tokenizer, sdxl.text_encoder)
    assert list(again.concepts) == ["<dog>"] and again.token_ids("<dog>") == again.concepts["<dog>"].ids
    sdxl.unload_directional_inversion()
    assert again.state is None and again.concepts == {}
