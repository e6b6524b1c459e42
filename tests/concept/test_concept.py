"""`Concept`: its checks and its geometry."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept.concept import Concept
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


def test_slerp_beyond_the_other_concept_and_by_degrees():
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
    with pytest.raises(ValueError, match="Equal directions have no arc"):
        a.slerp(a, degrees=5)
    with pytest.raises(ValueError, match="scales must be positive"):
        a.slerp(b.rescale(0.1), 2)


def test_the_mean_of_concepts():
    a, b, c = (make(f"<{i}>", seed=i, pooling="legacy", initializer=i) for i in range(3))
    middle, arc = DirectionalInversion.mean([a, b], [3, 1]), a.slerp(b, 0.25)
    for k in a.directions:
        torch.testing.assert_close(middle.directions[k], arc.directions[k])
        torch.testing.assert_close(middle.scales[k], arc.scales[k])
    # the metadata keeps what is true of both
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


def test_methods_return_the_class_that_they_are_called_on():
    a, b = make(), make(seed=1)
    for made in (a.rescale(0.4), a.slerp(b, 0.5), DirectionalInversion.mean([a, b])):
        assert type(made) is DirectionalInversion
    assert type(Concept.from_embeddings("<dog>", a.embeddings).slerp(b, 0.5)) is Concept


def test_a_concept_does_not_change():
    concept, before = make(), make()
    concept.rescale(0.1), concept.slerp(make(seed=1), 0.5)
    for component, v in before.directions.items():
        assert torch.equal(concept.directions[component], v)
        assert torch.equal(concept.scales[component], before.scales[component])
    with pytest.raises(AttributeError):
        concept.placeholder_token = "<cat>"


def test_rescale_needs_a_positive_norm_for_each_component():
    with pytest.raises(ValueError, match="scales must be positive"):
        make().rescale(-0.4)
    with pytest.raises(KeyError, match="text_encoder_2"):
        make().rescale({"text_encoder": 0.4})


@pytest.mark.parametrize("word", ["", " <dog>", "<dog>\n", "hf_abcdefgh", "<\ud800>", "x" * 256])
def test_words_that_cannot_be_placeholders(word):
    with pytest.raises(ValueError, match="placeholder"):
        make(word)


def test_unusual_words_can_be_placeholders():
    """A joined emoji has a character that is not printable, and is a word all the same."""
    for word in ("👩‍🚀", "x" * 255, "<chien été>"):
        assert make(word).placeholder_token == word


@pytest.mark.parametrize("scale", [1e39, 1e-39, 2e10, 5e-11, math.inf, math.nan])
def test_scales_that_float32_cannot_square_are_refused(scale):
    """Their file would say other norms than float32 measures, so that it could not be read."""
    with pytest.raises(ValueError, match=r"^text_encoder: scales must be positive, from 1e-10 to 1e\+10, got"):
        make().rescale(scale)
    assert make().rescale(1e10).scales["text_encoder"][0] == pytest.approx(1e10)


def test_the_largest_and_smallest_scales_survive_a_file(tmp_path):
    for scale in (9e9, 2e-10):
        made = make().rescale(scale)
        made.save_pretrained(tmp_path)
        again = DirectionalInversion.from_pretrained(tmp_path)
        for component, v in made.directions.items():
            torch.testing.assert_close(again.directions[component], v)


def test_the_repr_is_one_line():
    rows = {"text_encoder": torch.ones(2, 768), "text_encoder_2": torch.ones(1, 1280)}
    dog = DirectionalInversion.from_embeddings("<dog>", rows, {"family": "SDXL"})
    assert repr(dog) == "DirectionalInversion('<dog>', text_encoder 2 x 768, text_encoder_2 1 x 1280)"
    assert repr(Concept.from_embeddings("<dog>", rows)).startswith("Concept('<dog>', ")


def test_a_notebook_shows_a_table_of_plain_text():
    """What a file's author wrote is text in it, never markup."""
    from html.parser import HTMLParser

    found = {"tags": set(), "texts": []}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found["tags"].add(tag)
            assert not attributes

        def handle_data(self, data):
            found["texts"].append(data)

    rows = {"text_encoder": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "text_encoder_2": torch.tensor([[0.0, 0.0, 0.5]])}
    made = DirectionalInversion.from_embeddings("<script>", rows, {"base_model": "<img src=x onerror=alert(1)> & co"})
    Reader().feed(made._repr_html_())
    assert found["tags"] == {"table", "caption", "tr", "th", "td"}
    assert found["texts"] == [
        "<script>, learned with <img src=x onerror=alert(1)> & co", "text encoder", "vectors", "width", "mean norm",
        "text_encoder", "2", "2", "3", "text_encoder_2", "1", "3", "0.5",
    ]  # fmt: skip
    found["texts"].clear()
    Reader().feed(DirectionalInversion.from_embeddings("<dog>", rows)._repr_html_())
    assert found["texts"][0] == "<dog>"
