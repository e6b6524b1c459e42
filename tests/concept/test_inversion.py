"""Concepts to files and back, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_dti import DirectionalInversion


def make(word="<dog>", vectors=2, seed=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "text_encoder": torch.randn(vectors, 16, generator=generator),
        "text_encoder_2": torch.randn(vectors, 24, generator=generator),
    }
    return DirectionalInversion.from_embeddings(word, rows, metadata)


def test_files_restore_a_concept_to_float32_rounding(tmp_path):
    concept = make(initializer="dog", pooling="eos").rescale(0.387)
    concept.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    again = DirectionalInversion.from_pretrained(tmp_path)
    assert again.placeholder_token == "<dog>" and again.metadata == {"initializer": "dog", "pooling": "eos"}
    for component in concept.directions:
        assert torch.equal(again.scales[component], concept.scales[component])
        assert (again.directions[component] - concept.directions[component]).abs().max() < 1e-7
    one = DirectionalInversion.from_pretrained(tmp_path / "learned_embeds_2.safetensors", "<rex>")
    assert one.placeholder_token == "<rex>" and list(one.directions) == ["text_encoder_2"]


def test_the_second_file_alone_is_read(tmp_path):
    concept = make()
    concept.save_pretrained(tmp_path)
    for source, name in ((tmp_path / "learned_embeds_2.safetensors", None), (tmp_path, "learned_embeds_2.safetensors")):
        assert list(DirectionalInversion.from_pretrained(source, weight_name=name).directions) == ["text_encoder_2"]
    (tmp_path / "learned_embeds.safetensors").unlink()
    assert list(DirectionalInversion.from_pretrained(tmp_path / "learned_embeds_2.safetensors").directions) == [
        "text_encoder_2"
    ]
    with pytest.raises(ValueError, match=r"lacks learned_embeds.safetensors: save the concept there again.*weight_name"):
        DirectionalInversion.from_pretrained(tmp_path)


def test_files_of_two_saves_are_refused(tmp_path):
    """A process was killed between the renames of a save."""
    make().save_pretrained(tmp_path)
    first = (tmp_path / "learned_embeds.safetensors").read_bytes()
    make(seed=1).save_pretrained(tmp_path)
    DirectionalInversion.from_pretrained(tmp_path)
    (tmp_path / "learned_embeds.safetensors").write_bytes(first)
    with pytest.raises(ValueError, match="its files are of several saves, not of one"):
        DirectionalInversion.from_pretrained(tmp_path)


def test_the_files_of_a_concept_are_always_the_same(tmp_path):
    concept = make()
    saves = []
    for _ in range(8):
        concept.save_pretrained(tmp_path)
        saves.append([path.read_bytes() for path in sorted(tmp_path.iterdir())])
    assert all(save == saves[0] for save in saves)


def test_plain_diffusers_files_and_state_dicts_are_read(tmp_path):
    rows = torch.randn(1, 16)
    save_file({"<cat>": rows[0]}, tmp_path / "mine.safetensors")
    for source, kwargs in (
        (tmp_path, {"weight_name": "mine.safetensors"}),
        (tmp_path / "mine.safetensors", {}),
        (tmp_path.parent, {"subfolder": tmp_path.name, "weight_name": "mine.safetensors"}),
        (load_file(tmp_path / "mine.safetensors"), {}),
        ({"text_encoder": rows}, {"placeholder_token": "<cat>"}),
    ):
        read = DirectionalInversion.from_pretrained(source, **kwargs)
        assert read.placeholder_token == "<cat>"
        torch.testing.assert_close(read.embeddings["text_encoder"], rows)


def test_sources_that_are_not_concepts_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"has no learned_embeds.safetensors.*weight_name"):
        DirectionalInversion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no placeholder"):
        DirectionalInversion.from_pretrained({"text_encoder": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="one tensor"):
        DirectionalInversion.from_pretrained({"a": torch.ones(1), "b": torch.ones(1)})
    make("<a>").save_pretrained(tmp_path)
    (tmp_path / "x").mkdir()
    make("<b>").save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "learned_embeds.safetensors").rename(tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="of several saves"):
        DirectionalInversion.from_pretrained(tmp_path)
    for name, word in (("learned_embeds.safetensors", "<a>"), ("learned_embeds_2.safetensors", "<b>")):
        save_file({word: load_file(tmp_path / name).popitem()[1]}, tmp_path / name)  # as diffusers' scripts write them
    with pytest.raises(ValueError, match="different placeholders"):
        DirectionalInversion.from_pretrained(tmp_path)
    assert DirectionalInversion.from_pretrained(tmp_path, "<c>").placeholder_token == "<c>"


def test_a_sample_that_is_not_an_image_is_refused_before_anything_is_sent():
    with pytest.raises(TypeError, match="pairs of a prompt and an image; got str"):
        make().push_to_hub("user/dti-dog", images=["dog.png"])
