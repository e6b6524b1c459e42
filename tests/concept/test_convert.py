"""Concepts rewritten for other programs: keys, shapes and bits. Stock diffusers loads what is written for it."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import rows_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_third_party import FOUR, ONE, THREE, TWO, rows

from diffusers_dti import DirectionalInversion
from diffusers_dti.cli import main
from diffusers_dti.concept.convert import convert, programs
from diffusers_dti.concept.source import read_stored
from diffusers_dti.pipeline.tokenizer import token_names

L, H, G, T5, GEMMA = (rows(width) for width in (768, 1024, 1280, 4096, 2304))
FOUR_PARTS = {ONE: L, TWO: G, THREE: T5, FOUR: rows(4096, seed=1)}
SMALL = {ONE: rows(16), TWO: rows(24)}
NO_GEMMA, NO_UMT5 = "Gemma 2 2B (SANA, Lumina 2)", "UMT5-XXL (Wan)"
NO_T5 = "T5-XXL (Flux, SD3, PixArt, Chroma, LTX-Video)"
NO_QWEN4, NO_QWEN8, NO_QWEN25 = (
    "Qwen3 4B (Z-Image, FLUX.2 klein 4B)",
    "Qwen3 8B (FLUX.2 klein 9B)",
    "Qwen2.5-VL 7B (Qwen-Image)",
)
NO_LLAMA, NO_MISTRAL = "Llama 3 8B (HiDream, HunyuanVideo)", "Mistral Small 3 (FLUX.2 dev)"
NO_GEMMA3 = "Gemma 3 12B (LTX-2)"
BOTH = ["clip_l", "clip_g"]
CONCEPTS = {  # metadata, rows, and the keys for ComfyUI, A1111 and OneTrainer by component, or what the program cannot use
    "SD1": ({}, {ONE: L}, ["emb_params"], ["emb_params"], ["emp_params"]),
    "SD2": ({}, {ONE: H}, ["emb_params"], ["emb_params"], ["emp_params"]),
    "SDXL": ({}, {ONE: L, TWO: G}, BOTH, BOTH, BOTH),
    "bigG alone": ({}, {TWO: G}, ["clip_g"], ["clip_g"], ["clip_g"]),
    "SD3": ({}, {ONE: L, TWO: G, THREE: T5}, [*BOTH, "t5xxl"], NO_T5, [*BOTH, "t5"]),
    "Flux": ({}, {ONE: L, TWO: T5}, ["clip_l", "t5xxl"], NO_T5, ["clip_l", "t5"]),
    "SANA": ({}, {ONE: GEMMA}, NO_GEMMA, NO_GEMMA, ["gemma"]),
    "Wan": ({"family": "Wan"}, {ONE: T5}, NO_UMT5, NO_UMT5, NO_UMT5),
    "Wan, by its file": ({"encoders": {ONE: "umt5xxl"}}, {ONE: T5}, NO_UMT5, NO_UMT5, NO_UMT5),
    "PixArt, by its file": ({"encoders": {ONE: "t5xxl"}}, {ONE: T5}, ["t5xxl"], NO_T5, ["t5"]),
    "T5 or UMT5": ({}, {ONE: T5}, ["emb_params"], f"{NO_T5} or {NO_UMT5} or {NO_QWEN8} or {NO_LLAMA}", ["emp_params"]),
    "Z-Image": ({"family": "Z-Image"}, {ONE: rows(2560)}, "Z-Image", NO_QWEN4, NO_QWEN4),
    "klein": ({"family": "FLUX.2 klein"}, {ONE: rows(2560)}, ["qwen3_4b"], NO_QWEN4, NO_QWEN4),
    "klein 9B": ({"family": "FLUX.2 klein"}, {ONE: T5}, ["qwen3_8b"], NO_QWEN8, NO_QWEN8),
    "FLUX.2 dev": ({}, {ONE: rows(5120)}, ["mistral3_24b"], NO_MISTRAL, NO_MISTRAL),
    "Qwen-Image": ({"family": "Qwen-Image"}, {ONE: rows(3584)}, NO_QWEN25, NO_QWEN25, NO_QWEN25),
    "Lumina 2": ({"family": "Lumina 2"}, {ONE: GEMMA}, NO_GEMMA, NO_GEMMA, "Lumina 2"),
    "LTX-2": ({}, {ONE: rows(3840)}, NO_GEMMA3, NO_GEMMA3, NO_GEMMA3),
    "HunyuanVideo": ({}, {ONE: T5, TWO: L}, ["llama", "clip_l"], NO_LLAMA, ["llama", "clip_l"]),
    "HiDream": ({}, FOUR_PARTS, [*BOTH, "t5xxl", "llama"], f"{NO_T5}, {NO_LLAMA}", [*BOTH, "t5", "llama"]),
    "small Flux": ({"family": "Flux"}, SMALL, ["clip_l", "t5xxl"], NO_T5, ["clip_l", "t5"]),
    "small SD": ({}, {ONE: rows(16)}, ["emb_params"], ["emb_params"], ["emp_params"]),
    "small SDXL": ({}, SMALL, BOTH, BOTH, BOTH),
    "small SANA": ({"family": "SANA"}, {ONE: rows(16)}, NO_GEMMA, NO_GEMMA, ["gemma"]),
    "small Wan": ({"family": "Wan"}, {ONE: rows(16)}, NO_UMT5, NO_UMT5, NO_UMT5),
}
OTHERWISE = {"comfyui": " It would read `embedding:NAME` as plain words, without a warning."}
TITLES = {"comfyui": "ComfyUI", "a1111": "A1111", "onetrainer": "OneTrainer"}


def saved(folder, metadata, truth, word="<dog>"):
    DirectionalInversion.from_embeddings(word, truth, metadata).save_pretrained(folder)
    return read_stored(folder).rows


@pytest.mark.parametrize("kind", CONCEPTS)
def test_the_keys_of_each_program(kind, tmp_path):
    """ComfyUI's tokenizers of UMT5 and Gemma drop the folder of embeddings, and A1111 has them in CLIP alone."""
    metadata, truth, *by_program = CONCEPTS[kind]
    truth = saved(tmp_path / "ours", metadata, truth)
    for (program, title), keys in zip(TITLES.items(), by_program):
        if isinstance(keys, str):
            said = f"{title} has no embeddings for {keys}.{OTHERWISE.get(program, '')}"
            with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
                convert(tmp_path / "ours", program, tmp_path / program)
            assert not (tmp_path / program).exists()
            continue
        (path,) = convert(tmp_path / "ours", program, tmp_path / program)
        assert path == tmp_path / program / "dog.safetensors"
        written = load_file(path)
        assert written.keys() == set(keys)
        for key, expected in zip(keys, truth.values()):
            assert written[key].dtype == torch.float32 and torch.equal(written[key], expected)


@pytest.mark.parametrize("kind", CONCEPTS)
def test_round_trips_keep_every_bit(kind, tmp_path):
    metadata, truth, *by_program = CONCEPTS[kind]
    metadata = metadata | {"pooling": "legacy", "base_model": "user/model"}
    truth, source = saved(tmp_path / "ours", metadata, truth), tmp_path / "ours"
    able = [program for program, keys in zip(TITLES, by_program) if not isinstance(keys, str)]
    for program in ["diffusers", *able]:  # one after the other, and back
        there = convert(source, program, tmp_path / program)
        convert(there[0].parent if program == "diffusers" else there[0], "diffusers", tmp_path / f"from {program}")
        again = read_stored(tmp_path / f"from {program}")
        assert again.placeholder == "<dog>"
        assert again.metadata | metadata | {"encoders": None} == again.metadata | {"encoders": None}
        assert again.rows.keys() == truth.keys()
        assert all(torch.equal(again.rows[c], truth[c]) for c in truth)
        source = tmp_path / f"from {program}"


@pytest.mark.parametrize(
    ("saved_as", "component"), [({"clip_l": rows(16), "clip_g": rows(24)}, None), ({"<zo>": rows(16)}, ONE)]
)
def test_stock_diffusers_reads_what_is_written_for_it(saved_as, component, sdxl, tmp_path):
    save_file(saved_as, tmp_path / "zo.safetensors")
    files = convert(tmp_path / "zo.safetensors", "diffusers", tmp_path / "out", "<zo>")
    assert [f.name for f in files] == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"][: len(files)]
    parts = {ONE: (sdxl.tokenizer, sdxl.text_encoder), TWO: (sdxl.tokenizer_2, sdxl.text_encoder_2)}
    for file, (place, (tokenizer, encoder)), truth in zip(files, parts.items(), saved_as.values()):
        sdxl.load_textual_inversion(str(file), tokenizer=tokenizer, text_encoder=encoder)
        for name, row in zip(("<zo>", "<zo>_1"), truth):
            assert torch.equal(rows_in(sdxl, place, name), row)


def test_a_pipeline_gets_the_same_from_every_file(sdxl, tmp_path):
    saved(tmp_path / "ours", {}, SMALL)
    for program in programs():
        (path, *_) = convert(tmp_path / "ours", program, tmp_path / program)
        pipe = copy.deepcopy(sdxl)
        pipe.load_directional_inversion(path)
        for component, truth in SMALL.items():
            found = torch.stack([rows_in(pipe, component, name) for name in token_names("<dog>", 2)])
            torch.testing.assert_close(found, truth)


def test_files_and_names(tmp_path):
    saved(tmp_path / "ours", {}, SMALL, "<my cat/dog>")
    (path,) = convert(tmp_path / "ours", "comfyui", tmp_path)
    assert path == tmp_path / "my_cat_dog.safetensors"
    (path,) = convert(tmp_path / "ours", "a1111", tmp_path / "new" / "rex.safetensors", "<rex>")
    assert path.is_file() and [p.name for p in path.parent.iterdir()] == ["rex.safetensors"]
    with safe_open(path, framework="pt") as f:
        assert json.loads(f.metadata()["dti"])["placeholder_token"] == "<rex>"
    with pytest.raises(ValueError, match="give a folder"):
        convert(path, "diffusers", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="diffusers, comfyui, a1111, onetrainer, not for 'invoke'"):
        convert(path, "invoke", tmp_path / "out")
    save_file({"clip_l": torch.zeros(1, 8)}, tmp_path / "zero.safetensors")
    with pytest.raises(ValueError, match="not zero"):
        convert(tmp_path / "zero.safetensors", "diffusers", tmp_path / "out")
    save_file({"clip_l": torch.ones(1, 8)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="--placeholder"):
        convert(tmp_path / "learned_embeds.safetensors", "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_encoders_of_one_name(tmp_path):
    saved(tmp_path / "ours", {}, {ONE: L, TWO: L + 1})
    with pytest.raises(ValueError, match="would be called clip_l and clip_l"):
        convert(tmp_path / "ours", "comfyui", tmp_path / "out")


def test_the_command(tmp_path, capsys):
    torch.save({"string_to_param": {"*": L}, "name": "dog"}, tmp_path / "dog.pt")
    command = ["convert", str(tmp_path / "dog.pt"), "--to", "diffusers", "--output", str(tmp_path / "out")]
    assert main(command) == 1 and "--allow_pickle" in capsys.readouterr().err
    assert main([*command, "--allow_pickle", "--placeholder", "<dog>"]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'out' / 'learned_embeds.safetensors'}.\n"
    assert torch.equal(load_file(tmp_path / "out" / "learned_embeds.safetensors")["<dog>"], L)
    command = ["convert", str(tmp_path), "--weight_name", "dog.pt", "--allow_pickle", "--to", "onetrainer"]
    assert main([*command, "--output", str(tmp_path / "dog.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "dog.safetensors")["emp_params"], L)


def test_the_commands_and_the_code_of_the_docs(sdxl, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "out" / "dog", {}, SMALL)
    torch.save({"string_to_param": {"*": rows(16)}, "name": "dog"}, "old-dog.pt")
    save_file(
        {f"bundle_emb.<{w}>.clip_{k}": rows(n) for w in ("cat", "rex") for k, n in (("l", 16), ("g", 24))}, "lora.safetensors"
    )
    commands = [shlex.split(c) for block in re.findall(r"```bash\n(.*?)```", page, re.S) for c in block.splitlines()]
    assert len(commands) == 4
    for name, *command in commands:
        assert name == "dti" and main(command) == 0
    assert load_file("out/dog.safetensors").keys() == {"clip_l", "clip_g"}
    assert (load_file("out/cat/learned_embeds.safetensors")["<cat>"] == rows(16)).all()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, {"pipe": sdxl})
    assert list(sdxl.directional_inversions) == ["<dog>", "<old-dog>", "<cat>"]


def test_a_part_of_a_folder_is_not_converted_over_the_whole(tmp_path):
    folder = tmp_path / "dog"
    made = DirectionalInversion.from_embeddings(
        "<dog>", {"text_encoder": torch.ones(1, 16), "text_encoder_2": torch.ones(1, 24)}
    )
    made.save_pretrained(folder)
    with pytest.raises(ValueError, match="would lose its other files"):
        convert(folder, "diffusers", folder, weight_name="learned_embeds_2.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]


@pytest.mark.parametrize("program", ["comfyui", "onetrainer"])
def test_an_encoder_that_no_program_knows_is_named_by_its_place(tmp_path, program):
    """A file of a later version may be for an encoder that is not in the registry."""
    metadata = {"encoders": {ONE: "clip_l", TWO: "later"}}
    DirectionalInversion.from_embeddings("<dog>", SMALL, metadata).save_pretrained(tmp_path / "dog")
    with pytest.raises(ValueError, match=r"has no embeddings for text_encoder_2 \(24 wide\)\."):
        convert(tmp_path / "dog", program, tmp_path / "out")


@pytest.mark.parametrize("program", ["comfyui", "a1111", "onetrainer", "diffusers"])
def test_another_concepts_file_is_not_overwritten(program, tmp_path, capsys):
    """ComfyUI's folder of embeddings holds files of everybody, under the words for them."""
    source, output = tmp_path / "ours", tmp_path / "embeddings"
    saved(source, {}, {ONE: L})
    output.mkdir()
    name = "learned_embeds.safetensors" if program == "diffusers" else "dog.safetensors"
    command = ["convert", str(source), "--to", program, "--output", str(output)]
    for number, write in enumerate((
        lambda path: save_file({"emb_params": L + 1}, path),  # a stranger's, and ours of another word
        lambda path: saved_as(path, program, "dog"),
        lambda path: path.write_bytes(b"not a concept at all"),
    )):  # fmt: skip
        write(output / name)
        before = (output / name).read_bytes()
        assert main(command) == 1
        said = f"{output / name} exists and is not <dog>'s: choose another output, or pass `overwrite` (`--overwrite`)."
        assert said in capsys.readouterr().err and (output / name).read_bytes() == before, number
    assert main([*command, "--overwrite"]) == 0
    saved(source, {}, {ONE: L + 2})  # trained again
    assert main(command) == 0
    (found,) = load_file(output / name).values()
    assert torch.equal(found, read_stored(source).rows[ONE])


def saved_as(path, program, word):
    saved(path.parent.parent / "other", {}, {ONE: L}, word)
    convert(path.parent.parent / "other", program, path.parent, overwrite=True)
