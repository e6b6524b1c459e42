"""Compare reports with numpy in float64 and scipy's percentiles, and run `dti inspect` on folders without denoiser and VAE."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import percentileofscore

from diffusers_dti import DirectionalInversion
from diffusers_dti.cli import main
from diffusers_dti.pipeline.inspection import family, figure, from_vocabulary, inspect, table
from diffusers_dti.pipeline.text_encoders import find_text_encoders


def vocabulary(tokenizer, encoder):
    """Return the ids of the words whose rows are not zero, and the rows in float64."""
    rows = encoder.get_input_embeddings().weight.detach().double().numpy()[: len(tokenizer)]
    ids = [i for i in range(len(rows)) if np.linalg.norm(rows[i]) > 0 and tokenizer.convert_ids_to_tokens(i)[:1] != "⟦"]
    return ids, rows[ids]


def test_the_report_on_each_vector(pipe, concept):
    """Wan's table also has rows without a word."""
    made = concept(pipe, vectors=2, scale=1.0, initializer="dog cat")
    some = {c: m * torch.tensor([0.38, 0.45]) for c, m in made.scales.items()}
    made = replace(made, scales=some)
    found = inspect(made, pipe, nearest=3)
    assert json.loads(json.dumps(found)) == found
    assert (found["placeholder_token"], found["num_vectors"], found["metadata"]) == ("<dog>", 2, {"initializer": "dog cat"})
    for component, text_encoder in find_text_encoders(pipe).items():
        encoder, (ids, rows) = found["encoders"][component], vocabulary(text_encoder.tokenizer, text_encoder.model)
        norms = np.linalg.norm(rows, axis=1)
        words = encoder["vocabulary"]
        assert words["words"] == sum(words["counts"]) == len(norms) and len(words["edges"]) == len(words["counts"]) + 1
        np.testing.assert_allclose([words[k] for k in ("min", "mean", "max")], [norms.min(), norms.mean(), norms.max()], 1e-5)
        own = text_encoder.weight.detach().double().numpy()
        for i, vector in enumerate(encoder["vectors"]):
            v = made.embeddings[component][i].double().numpy()
            assert vector["norm"] == pytest.approx(np.linalg.norm(v))
            assert vector["percentile"] == pytest.approx(percentileofscore(norms, np.linalg.norm(v)), abs=0.1)
            assert vector["times_mean"] == pytest.approx(np.linalg.norm(v) / norms.mean())
            word = own[text_encoder.tokenizer("dog cat", add_special_tokens=False).input_ids[i]]
            cosine = v @ word / np.linalg.norm(v) / np.linalg.norm(word)
            assert vector["angle"] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-3)
            cosines = rows @ v / norms / np.linalg.norm(v)
            best = np.argsort(-cosines)[:3]
            tokens = [text_encoder.tokenizer.convert_ids_to_tokens(ids[k]) for k in best]
            assert [x["token"] for x in vector["nearest"]] == tokens
            np.testing.assert_allclose([x["cosine"] for x in vector["nearest"]], cosines[best], 1e-4)


def test_a_word_is_found_to_be_itself(pipe):
    word = from_vocabulary(pipe, "dog", 2)
    assert word.num_vectors == 2
    word = replace(word, metadata={"initializer": "dog", "training": {"initializer_context": True}})
    for encoder in inspect(word, pipe)["encoders"].values():
        for vector in encoder["vectors"]:
            assert vector["angle"] < 1e-3 and vector["nearest"][0]["cosine"] == pytest.approx(1)
            assert vector["nearest"][0]["token"].strip("▁").removesuffix("</w>") == "dog"
            assert "normal word" in encoder["verdict"]
    with pytest.raises(ValueError, match="num_vectors"):
        from_vocabulary(pipe, "dog cat", 1)


def test_moving_towards_a_word(sdxl, concept):
    """A concept moves towards a word with `from_vocabulary` and `slerp`."""
    dog = concept(sdxl, pooling="legacy")
    nearer = dog.slerp(from_vocabulary(sdxl, "red"), degrees=20)
    assert nearer.placeholder_token == "<dog>" and nearer.metadata == {"pooling": "legacy"}
    before, after = (
        inspect(replace(x, metadata={"initializer": "red"}), sdxl)["encoders"]["text_encoder"] for x in (dog, nearer)
    )
    assert before["vectors"][0]["angle"] - after["vectors"][0]["angle"] == pytest.approx(20, abs=1e-3)


def test_the_vocabulary_is_the_models_own(sdxl, concept):
    """Loaded concepts are not words of it, and inspecting changes nothing."""
    dog, cat = concept(sdxl, vectors=2), concept(sdxl, "<cat>", scale=99.0, seed=1)
    before = inspect(dog, sdxl)
    sdxl.load_directional_inversion(cat)
    sdxl.load_directional_inversion(dog)
    table = sdxl.text_encoder.get_input_embeddings().weight.clone()
    assert inspect(dog, sdxl) == before
    assert torch.equal(sdxl.text_encoder.get_input_embeddings().weight, table)
    sdxl.unload_directional_inversion()
    sdxl.text_encoder.to(torch.bfloat16)
    again = inspect(dog, sdxl)["encoders"]["text_encoder"]["vocabulary"]
    assert again["mean"] == pytest.approx(before["encoders"]["text_encoder"]["vocabulary"]["mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [
        (0.4, r"norm is at the \d+(st|nd|rd|th) percentile: a normal word"),
        (0.503, r"norm is at the 100th percentile: a normal word"),  # above the vocabulary's largest by rounding
        (9.6, r"norm is 2[45] times the vocabulary's mean: inflated; load with token_scale='mean'"),
        (0.8, r"norm is 2(\.\d)? times the vocabulary's mean: inflated; load with token_scale='mean'"),
        (0.04, r"norm is 0.1 times the vocabulary's mean: shrunken; load with token_scale='mean'"),
    ],
)
def test_the_verdict(sdxl, concept, scale, verdict):
    import re

    odd = concept(sdxl, vectors=3, scale=scale)
    for encoder in inspect(odd, sdxl)["encoders"].values():
        assert re.fullmatch(verdict, encoder["verdict"]), encoder["verdict"]
    repaired = sdxl.load_directional_inversion(odd, token_scale="mean")
    assert "normal" in inspect(repaired, sdxl)["encoders"]["text_encoder"]["verdict"]


def test_the_verdict_is_of_the_worst_vector(sdxl, concept):
    made = concept(sdxl, vectors=2)
    made = replace(made, scales={c: torch.tensor([0.4, 4.0]) for c in made.scales})
    assert "inflated" in inspect(made, sdxl)["encoders"]["text_encoder"]["verdict"]


@pytest.mark.parametrize("initializer", [None, "<other>", "dog cat"])
def test_an_initializer_without_rows_has_no_angle(sdxl, concept, initializer):
    made = concept(sdxl, **({"initializer": initializer} if initializer else {}))
    assert inspect(made, sdxl)["encoders"]["text_encoder"]["vectors"][0]["angle"] is None


@pytest.mark.parametrize(
    ("widths", "name"),
    [
        ({"text_encoder": 768}, "Stable Diffusion 1.x"),
        ({"text_encoder": 1024}, "Stable Diffusion 2.x"),
        ({"text_encoder_2": 1280, "text_encoder": 768}, "SDXL"),
        ({"text_encoder_2": 1280}, "SDXL, its second encoder alone"),
        ({"text_encoder": 2304}, "SANA"),
        ({"text_encoder": 4096}, "Wan, or another with a T5-XXL or UMT5-XXL"),
        ({"text_encoder": 768, "text_encoder_2": 4096}, "Flux"),
        ({"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}, "Stable Diffusion 3"),
        ({"text_encoder": 77}, None),
    ],
)
def test_the_family(widths, name):
    made = DirectionalInversion.from_embeddings("<x>", {c: torch.ones(d) for c, d in widths.items()})
    assert family(made) == name
    assert family(replace(made, metadata={"family": "own"})) == "own"


def test_a_model_that_it_is_not_for(sdxl, sd, concept):
    assert list(inspect(concept(sdxl), sd)["encoders"]) == ["text_encoder"]  # the part that is for the pipeline
    wide = DirectionalInversion.from_embeddings("<x>", {"text_encoder": torch.ones(768)})
    with pytest.raises(ValueError, match=r"is for CLIP-L .*768 wide, and StableDiffusionPipeline has only .*16 wide"):
        inspect(wide, sd)
    with pytest.raises(ValueError, match="is for UMT5-XXL"):  # known from the family, not from the width
        inspect(concept(sd, family="Wan"), sd)


def test_the_verdict_is_of_the_vector_farthest_outside(sdxl, concept):
    """A vector with the norm of the smallest word does not count."""
    two = concept(sdxl, vectors=2)
    words = inspect(two, sdxl)["encoders"]["text_encoder"]["vocabulary"]
    scales = {c: torch.tensor([words["min"], 1.2 * words["max"]]) for c in two.scales}
    assert "inflated" in inspect(replace(two, scales=scales), sdxl)["encoders"]["text_encoder"]["verdict"]


def test_under_offload(sdxl, concept):
    dog = concept(sdxl, initializer="dog")
    before = inspect(dog, sdxl)
    from accelerate import cpu_offload

    for encoder in (sdxl.text_encoder, sdxl.text_encoder_2):
        cpu_offload(encoder, torch.device("cpu"))
    assert sdxl.text_encoder.get_input_embeddings().weight.device.type == "meta"
    assert inspect(dog, sdxl) == before
    assert sdxl.text_encoder.get_input_embeddings().weight.device.type == "meta"


def test_table_and_figure(sdxl, concept, tmp_path):
    training = {"learning_rate": 0.01, "templates": ["a photo of {}"], "adapter": None}
    made = concept(sdxl, "<$dog$>", vectors=2, initializer="dog", base_model="some/sdxl", training=training)
    report = inspect(made, sdxl)
    text = table(report)
    for said in ("<$dog$>: 2 vectors", "some/sdxl", "learning_rate=0.01", "text_encoder_2 (24 wide)", "percentile", "normal"):
        assert said in text
    assert "photo of" not in text and "adapter" not in text
    figure(report, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 600
    alone = inspect(made)
    assert "percentile" not in table(alone) and "norm 0.4" in table(alone)
    with pytest.raises(ValueError, match="no vocabulary"):
        figure(alone, tmp_path / "y.png")


@pytest.mark.parametrize("name", ["sdxl", "sd", "sana", "wan"])
def test_the_command_needs_only_the_text_side(name, request, concept, tmp_path, capsys):
    pipe = request.getfixturevalue(name)
    concept(pipe, initializer="dog").save_pretrained(tmp_path / "dog")
    pipe.save_pretrained(tmp_path / "model")
    for folder in ("unet", "transformer", "vae", "image_encoder"):
        shutil.rmtree(tmp_path / "model" / folder, ignore_errors=True)
    command = ["inspect", str(tmp_path / "dog"), "--model", str(tmp_path / "model"), "--dtype", "float32"]
    assert main([*command, "--output", str(tmp_path / "out" / "dog.png"), "--nearest", "2"]) == 0
    assert "percentile" in capsys.readouterr().out and Image.open(tmp_path / "out" / "dog.png").width > 300
    assert main([*command, "--json"]) == 0
    found, expected = json.loads(capsys.readouterr().out), inspect(concept(pipe, initializer="dog"), pipe)
    assert found["metadata"] == expected["metadata"] and found["encoders"].keys() == expected["encoders"].keys()
    for component, encoder in expected["encoders"].items():
        assert found["encoders"][component]["verdict"] == encoder["verdict"]
        (one,), (other,) = found["encoders"][component]["vectors"], encoder["vectors"]
        assert [x["token"] for x in one.pop("nearest")] == [x["token"] for x in other.pop("nearest")]
        assert one == pytest.approx(other)


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(tmp_path, capsys):
    """Escapes that clear the screen, bells, and line breaks that would add lines to the report."""
    odd = {"initializer": "dog\nfamily      trusted", "base_model": "\x07x", "family": "\x9b31m", "method": "a\u202eb"}
    odd["training"] = {"\x1b[2J": "\x1b]0;title\x07"}
    rows = {"text_encoder": torch.ones(1, 8)}
    DirectionalInversion.from_embeddings("<\x1b[31mdog>", rows, odd).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert not set(text) - set(map(chr, range(32, 127))) - {"\n"}
    for said in (
        r"<\x1b[31mdog>: 1 vector",
        r"initializer dog\nfamily",
        r"base_model  \x07x",
        r"family      \x9b31m",
        r"a\u202eb",
        r"\x1b[2J=",
    ):
        assert said in text
    save_file({"x\x1b[2J": torch.ones(1), "y": torch.ones(1)}, tmp_path / "two.safetensors")
    assert main(["inspect", str(tmp_path / "two.safetensors")]) == 1
    assert main(["inspect", str(tmp_path / "no\x1b[2J")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_letters_of_any_language_are_shown_as_they_are(tmp_path, capsys):
    rows = {"text_encoder": torch.ones(1, 8)}
    DirectionalInversion.from_embeddings("<chien été>", rows, {"initializer": "犬 ▁собака"}).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "<chien été>: 1 vector" in (text := capsys.readouterr().out) and "initializer 犬 ▁собака" in text


def test_what_loading_refuses_is_refused(sdxl, concept):
    """With the same words, so that nobody finds out only when the concept is loaded."""
    wrong = concept(sdxl, pooling="mean")
    rows = concept(sdxl).embeddings | {"text_encoder_2": torch.ones(1, 8)}
    narrow = DirectionalInversion.from_embeddings("<dog>", rows)
    for given, message in (
        (wrong, 'pooling must be "eos" or "legacy", got \'mean\'.'),
        (narrow, "<dog> is 8 wide for text_encoder_2"),
    ):
        said = set()
        for call in (sdxl.load_directional_inversion, lambda made: inspect(made, sdxl)):
            with pytest.raises(ValueError, match=f"^{message}") as caught:
                call(given)
            said.add(str(caught.value))
        assert len(said) == 1
    with pytest.raises(ValueError, match="pooling must be"):
        inspect(wrong)


def test_the_command_without_a_model(sdxl, concept, tmp_path, capsys):
    concept(sdxl).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "norm 0.4" in (out := capsys.readouterr().out) and "percentile" not in out
    assert main(["inspect", str(tmp_path), "--output", "x.png"]) == 1 and "say with --model" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == 1 and capsys.readouterr().err.startswith("dti inspect: ")
