import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from diffusers_dti import DirectionalInversion
from diffusers_dti.sphere import angle


def make(word="<dog>", vectors=2, seed=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "text_encoder": torch.randn(vectors, 16, generator=generator),
        "text_encoder_2": torch.randn(vectors, 24, generator=generator),
    }
    return DirectionalInversion.from_embeddings(word, rows, metadata)


def test_embeddings_are_scale_times_direction():
    concept = make()
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(concept.embeddings["text_encoder"], torch.randn(2, 16, generator=generator))
    assert concept.num_vectors == 2
    torch.testing.assert_close(concept.directions["text_encoder_2"].norm(dim=-1), torch.ones(2))


def test_files_go_round_to_float32_rounding(tmp_path):
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
    (tmp_path / "learned_embeds.safetensors").unlink()
    assert list(DirectionalInversion.from_pretrained(tmp_path).directions) == ["text_encoder_2"]


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


def test_what_is_no_concept_is_refused(tmp_path):
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
    with pytest.raises(ValueError, match="different placeholders"):
        DirectionalInversion.from_pretrained(tmp_path)
    assert DirectionalInversion.from_pretrained(tmp_path, "<c>").placeholder_token == "<c>"


def test_the_hub_is_asked_for_each_file(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError

    make(vectors=1).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, subfolder=None, **kwargs):
        asked.append((repo_id, filename, subfolder, kwargs))
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    read = DirectionalInversion.from_pretrained("user/dti-dog", revision="v1", token="hf_x")
    assert sorted(read.directions) == ["text_encoder", "text_encoder_2"]
    assert [f for _, f, *_ in asked] == [f"learned_embeds{n}.safetensors" for n in ("", "_2", "_3")]
    assert all(k == {"revision": "v1", "token": "hf_x"} for *_, k in asked)
    (tmp_path / "learned_embeds.safetensors").unlink()
    (tmp_path / "learned_embeds_2.safetensors").unlink()
    with pytest.raises(OSError, match="user/dti-dog has no learned_embeds.safetensors or"):
        DirectionalInversion.from_pretrained("user/dti-dog")
    monkeypatch.undo()
    with pytest.raises(OSError, match="neither a file or folder"):
        DirectionalInversion.from_pretrained("no/such/folder")


def test_what_is_no_sample_is_refused_before_anything_is_sent():
    with pytest.raises(TypeError, match="pairs of a prompt and a picture; got str"):
        make().push_to_hub("user/dti-dog", images=["dog.png"])


def test_rescale_and_slerp():
    a, b = make(), make(seed=1)
    scaled = a.rescale({"text_encoder": 0.4, "text_encoder_2": 0.5})
    assert torch.equal(scaled.directions["text_encoder"], a.directions["text_encoder"])
    torch.testing.assert_close(scaled.embeddings["text_encoder_2"].norm(dim=-1), torch.full((2,), 0.5))
    middle = a.slerp(b, 0.5)
    for component in a.directions:
        torch.testing.assert_close(
            middle.directions[component], normalize(a.directions[component] + b.directions[component], dim=-1)
        )
        torch.testing.assert_close(middle.scales[component], (a.scales[component] + b.scales[component]) / 2)
    with pytest.raises(ValueError, match="same encoders"):
        a.slerp(make(vectors=1), 0.5)


def test_slerp_beyond_the_other_and_by_degrees():
    a, b = make().rescale(0.4), make(seed=1).rescale(0.4)
    whole = {c: torch.rad2deg(angle(v, b.directions[c])) for c, v in a.directions.items()}
    beyond, moved, back = a.slerp(b, 1.2), a.slerp(b, degrees=25), a.slerp(b, degrees=-25)
    for c, v in a.directions.items():
        torch.testing.assert_close(torch.rad2deg(angle(beyond.directions[c], b.directions[c])), 0.2 * whole[c])
        torch.testing.assert_close(torch.rad2deg(angle(moved.directions[c], v)), torch.full((2,), 25.0))
        torch.testing.assert_close(torch.rad2deg(angle(moved.directions[c], b.directions[c])), whole[c] - 25)
        torch.testing.assert_close(torch.rad2deg(angle(back.directions[c], moved.directions[c])), torch.full((2,), 50.0))
        torch.testing.assert_close(beyond.scales[c], torch.full((2,), 0.4))
    for kwargs in ({}, {"t": 0.5, "degrees": 3}):
        with pytest.raises(ValueError, match="either `t`"):
            a.slerp(b, **kwargs)
    with pytest.raises(ValueError, match="there is no way"):
        a.slerp(a, degrees=5)
    with pytest.raises(ValueError, match="scales must be positive"):
        a.slerp(b.rescale(0.1), 2)


def test_the_mean_of_concepts():
    a, b, c = (make(f"<{i}>", seed=i, pooling="legacy", initializer=i) for i in range(3))
    middle, arc = DirectionalInversion.mean([a, b], [3, 1]), a.slerp(b, 0.25)
    for k in a.directions:
        torch.testing.assert_close(middle.directions[k], arc.directions[k])
        torch.testing.assert_close(middle.scales[k], arc.scales[k])
    # what is said of the mixture is what is true of all
    assert middle.placeholder_token == arc.placeholder_token == "<0>"
    assert middle.metadata == arc.metadata == {"pooling": "legacy"}
    assert a.slerp(make(), 0.5).metadata == {"pooling": "legacy"}  # a mixture was not trained
    three = DirectionalInversion.mean([a, b, c])
    torch.testing.assert_close(three.scales["text_encoder"], sum(x.scales["text_encoder"] for x in (a, b, c)) / 3)
    opposite = DirectionalInversion("<o>", {k: -v for k, v in a.directions.items()}, a.scales)
    for concepts, weights, message in (
        ([], None, "at least one concept"),
        ([a, make(vectors=1)], None, "same encoders"),
        ([a, DirectionalInversion.from_embeddings("<x>", {"text_encoder": torch.ones(2, 16)})], None, "same encoders"),
        ([a, b], [1], "as many weights"),
        ([a, b], [1, -1], "not negative"),
        ([a, opposite], None, "opposite"),
    ):
        with pytest.raises(ValueError, match=message):
            DirectionalInversion.mean(concepts, weights)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(torch.zeros(1, 4), "not zero"), (torch.full((1, 4), float("nan")), "finite")],
)
def test_rows_without_a_direction_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        DirectionalInversion.from_embeddings("<dog>", {"text_encoder": rows})


def test_inconsistent_parts_are_refused():
    v, m = torch.nn.functional.normalize(torch.randn(2, 4)), torch.ones(2)
    for args, message in (
        (("", {"text_encoder": v}, {"text_encoder": m}), "placeholder"),
        (("<a>", {"text_encoder": v}, {}), "needs a scale"),
        (("<a>", {"text_encoder": 2 * v}, {"text_encoder": m}), "unit rows"),
        (("<a>", {"text_encoder": v}, {"text_encoder": m[:1]}), r"\(n, d\)"),
        (("<a>", {"text_encoder": v}, {"text_encoder": -m}), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DirectionalInversion(*args)
