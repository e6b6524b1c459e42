"""Other programs' files, written by hand in their formats. Stock diffusers reads those that it knows as a cross-check."""

import copy
import json

import pytest
import torch
from helpers import differing, rows_in, states
from safetensors.torch import save_file
from tiny_pipelines import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from torch import nn

import diffusers_dti
from diffusers_dti import DirectionalInversion
from diffusers_dti.concept import third_party


def rows(width, vectors=2, seed=0):
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed + width))


L, H, G, T5, GEMMA, QWEN, MISTRAL = (rows(width) for width in (768, 1024, 1280, 4096, 2304, 2560, 5120))
ONE, TWO, THREE, FOUR = third_party.COMPONENTS
# what a program writes, the placeholder in it, and the rows by component with the encoder that they are for
FILES = {
    "diffusers": ({"<dog>": L}, "<dog>", {ONE: (None, L)}),
    "diffusers, one vector": ({"<dog>": L[0]}, "<dog>", {ONE: (None, L[:1])}),
    "diffusers, half precision": ({"<dog>": L.half()}, "<dog>", {ONE: (None, L.half().float())}),
    "diffusers, a name each": ({"<dog>": L[0], "<dog>_1": L[1]}, "<dog>", {ONE: (None, L)}),
    "diffusers pivotal": ({"clip_l": L, "clip_g": G}, None, {ONE: ("clip_l", L), TWO: ("clip_g", G)}),
    "diffusers pivotal, early": ({"text_encoders_0": L, "text_encoders_1": G}, None, {ONE: ("clip_l", L), TWO: ("clip_g", G)}),
    "diffusers pivotal, Flux": ({"clip_l": L, "t5": T5}, None, {ONE: ("clip_l", L), TWO: ("t5xxl", T5)}),
    "ComfyUI, SD3": (
        {"clip_l": L, "clip_g": G, "t5xxl": T5}, None,
        {ONE: ("clip_l", L), TWO: ("clip_g", G), THREE: ("t5xxl", T5)},
    ),
    "ComfyUI, SD3 in part": ({"clip_g": G, "t5xxl": T5}, None, {TWO: ("clip_g", G), THREE: ("t5xxl", T5)}),
    "ComfyUI, SD2": ({"clip_l": H}, None, {ONE: ("clip_l", H)}),
    "ComfyUI, bigG alone": ({"clip_g": G}, None, {TWO: ("clip_g", G)}),
    "ComfyUI, Wan": ({"umt5xxl": T5}, None, {ONE: ("umt5xxl", T5)}),
    "ComfyUI, Gemma": ({"gemma2_2b": GEMMA}, None, {ONE: ("gemma2_2b", GEMMA)}),
    "ComfyUI, klein": ({"qwen3_4b": QWEN}, None, {ONE: ("qwen3_4b", QWEN)}),
    "ComfyUI, klein 9B": ({"qwen3_8b": T5}, None, {ONE: ("qwen3_8b", T5)}),
    "ComfyUI, FLUX.2 dev": ({"mistral3_24b": MISTRAL}, None, {ONE: ("mistral3_24b", MISTRAL)}),
    "ComfyUI, HunyuanVideo": ({"clip_l": L, "llama": T5}, None, {ONE: ("llama", T5), TWO: ("clip_l", L)}),
    "OneTrainer, HiDream": (
        {"llama": T5, "t5": T5 + 1, "clip_g": G, "clip_l": L}, None,
        {ONE: ("clip_l", L), TWO: ("clip_g", G), THREE: ("t5xxl", T5 + 1), FOUR: ("llama", T5)},
    ),
    "kohya, InvokeAI": ({"emb_params": L}, None, {ONE: (None, L)}),
    "OneTrainer": ({"emp_params": L}, None, {ONE: (None, L)}),
    "OneTrainer, SANA": ({"gemma": GEMMA}, None, {ONE: ("gemma2_2b", GEMMA)}),
    "OneTrainer, SD3": (
        {"clip_l": L, "clip_g": G, "t5": T5}, None, {ONE: ("clip_l", L), TWO: ("clip_g", G), THREE: ("t5xxl", T5)},
    ),
    "OneTrainer, in a LoRA": (
        {"lora_unet_a.alpha": torch.ones(1), "bundle_emb.<d.og>.clip_l": L, "bundle_emb.<d.og>.clip_g": G}, "<d.og>",
        {ONE: ("clip_l", L), TWO: ("clip_g", G)},
    ),
    "OneTrainer, in a LoRA of SD": ({"bundle_emb.<dog>.string_to_param.*": L}, "<dog>", {ONE: (None, L)}),
}  # fmt: skip
PICKLES = {
    "A1111": (
        {
            "string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(L)}, "name": "dog-style", "step": 499,
            "sd_checkpoint": "abc", "sd_checkpoint_name": "some model",
        },
        "dog-style", {ONE: (None, L)},
    ),
    "the first textual inversion": (
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(L)})}, None,
        {ONE: (None, L)},
    ),
    "a bare tensor": (L, None, {ONE: (None, L)}),
}  # fmt: skip


def check(read, name, expected):
    assert read.placeholder_token == name
    assert read.metadata["encoders"] == {c: key for c, (key, _) in expected.items()}
    assert read.embeddings.keys() == expected.keys()
    for component, (_, truth) in expected.items():
        torch.testing.assert_close(read.embeddings[component], truth)


@pytest.mark.parametrize("kind", FILES)
def test_every_format_is_read(kind, tmp_path):
    tensors, name, expected = FILES[kind]
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "rex.safetensors", metadata={"ss_epoch": "1"})
    torch.save(tensors, tmp_path / "rex.pt")
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "rex.bin")  # by what is in it, not by its name
    check(DirectionalInversion.from_pretrained(tmp_path / "rex.safetensors"), name or "rex", expected)
    check(DirectionalInversion.from_pretrained(tmp_path, weight_name="rex.bin"), name or "rex", expected)
    check(DirectionalInversion.from_pretrained(tmp_path / "rex.pt", allow_pickle=True), name or "rex", expected)
    check(DirectionalInversion.from_pretrained(tmp_path / "rex.safetensors", "<mine>"), "<mine>", expected)
    check(DirectionalInversion.from_pretrained(tensors, "<mine>"), "<mine>", expected)
    if name is None:
        with pytest.raises(ValueError, match="names no placeholder: give one with `token`"):
            DirectionalInversion.from_pretrained(tensors)
        (tmp_path / "rex.safetensors").rename(tmp_path / "learned_embeds.safetensors")
        with pytest.raises(ValueError, match="names no placeholder: give one with `token`"):
            DirectionalInversion.from_pretrained(tmp_path)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_are_read_for_their_tensors(kind, old, tmp_path):
    saved, name, expected = PICKLES[kind]
    if old and isinstance(saved, dict) and isinstance(saved["string_to_param"], nn.Module):
        pytest.skip("torch before 1.6 saved a module's code with it, which its own weights_only refuses")
    for file in ("rex.pt", "learned_embeds.bin", "rex.safetensors"):
        torch.save(saved, tmp_path / file, _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=rf"{file} is a pickle.*`allow_pickle=True`"):
            DirectionalInversion.from_pretrained(tmp_path / file, "<mine>")
        check(DirectionalInversion.from_pretrained(tmp_path / file, "<mine>", allow_pickle=True), "<mine>", expected)
    check(DirectionalInversion.from_pretrained(tmp_path / "rex.pt", allow_pickle=True), name or "rex", expected)
    # a folder with nothing else
    (tmp_path / "learned_embeds_2.bin").write_bytes((tmp_path / "rex.pt").read_bytes())
    read = DirectionalInversion.from_pretrained(tmp_path, "<mine>", allow_pickle=True)
    assert list(read.directions) == [ONE, TWO]


class Evil:
    def __reduce__(self):
        return open, (Evil.path, "w")


def test_code_in_pickles_is_never_run(sd, tmp_path):
    Evil.path = str(tmp_path / "owned")
    torch.save({"<dog>": torch.ones(16), "x": Evil()}, tmp_path / "evil.pt")
    torch.save({"<dog>": torch.ones(16)}, tmp_path / "torn.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:200])
    (tmp_path / "torn.bin").write_bytes(b"\x80\x02")
    before = states(sd)
    for name in ("evil.pt", "torn.pt", "torn.bin"):
        with pytest.raises(ValueError, match=f"{name} is a pickle, which is read only with `allow_pickle=True`"):
            sd.load_directional_inversion(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is damaged, or a pickle of more than tensors"):
            sd.load_directional_inversion(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "owned").exists() and not differing(states(sd), before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emp_params_out": L}, "emp_params_out replace the encoder's output"),
        ({"clip_l": L, "clip_l_out": L}, "clip_l_out replace"),
        ({"t5": T5, "t5xxl": T5}, "not clear which encoders t5, t5xxl"),
        ({"emb_params": L, "clip_g": G}, "not clear which encoders"),
        ({"bundle_emb.<dog>.clip_x": L}, "no encoder called clip_x"),
        ({"lora_unet_a.up": L, "lora_unet_a.down": L}, "must hold one tensor.*clip_l"),
        ({}, "must hold one tensor"),
        ({"<dog>": torch.ones(1, 1, 8)}, r"rows \(n, d\) expected, got \(1, 1, 8\)"),
        ({"<dog>": torch.ones(8, dtype=torch.long)}, "expected"),
        ({"<dog>": "rows"}, "expected, got str"),
        ({"string_to_param": {"a": L, "b": L}}, "rows of one word"),
        ({"string_to_param": L}, "rows of one word"),
        ({"clip_l": L, "clip_g": G, "t5": T5, "gemma": GEMMA, "llama": T5}, "no pipeline has all of"),
        ([L], "it holds a list"),
        ({0: L}, "it holds a dict, not tensors by name"),
    ],
)
def test_what_cannot_be_a_concept_says_why(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt cannot be read: .*{message}"):
        DirectionalInversion.from_pretrained(tmp_path / "a.pt", "<mine>", allow_pickle=True)


def test_several_words_in_a_lora(tmp_path):
    bundle = {f"bundle_emb.{word}.clip_l": value for word, value in (("<dog>", L), ("<cat>", L + 1))}
    save_file(bundle | {"lora_unet_a.down": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="holds <.*>, <.*>: say which with `token`"):
        DirectionalInversion.from_pretrained(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="say which"):
        DirectionalInversion.from_pretrained(tmp_path / "lora.safetensors", "<rex>")
    check(DirectionalInversion.from_pretrained(tmp_path / "lora.safetensors", "<cat>"), "<cat>", {ONE: ("clip_l", L + 1)})


def test_the_files_beside_a_concepts_first_one(sdxl, concept, tmp_path):
    concept(sdxl).save_pretrained(tmp_path)
    first = tmp_path / "learned_embeds.safetensors"
    assert list(DirectionalInversion.from_pretrained(first).directions) == [ONE, TWO]
    assert list(DirectionalInversion.from_pretrained(tmp_path, weight_name=first.name).directions) == [ONE]
    assert list(DirectionalInversion.from_pretrained(tmp_path / "learned_embeds_2.safetensors").directions) == [TWO]


# ------------------------------------------------------------------------------------------------------ into a pipeline
@pytest.fixture
def said(caplog):
    diffusers_dti.pipeline.exchange.logger.addHandler(caplog.handler)
    yield caplog
    diffusers_dti.pipeline.exchange.logger.removeHandler(caplog.handler)


def build(kind, tmp):
    """A pipeline of text encoders alone: CLIP 16 wide, bigG 24, T5 32."""
    import diffusers

    clip, t5 = clip_tokenizer(tmp / "clip"), t5_tokenizer(tmp / "t5")
    first, second = clip_encoder(clip, 16, projected=kind == "sd3"), clip_encoder(clip, 24, projected=True)
    kinds = {
        "flux": (diffusers.FluxPipeline, [(clip, first), (t5, t5_encoder(t5, 32))]),
        "sd3": (diffusers.StableDiffusion3Pipeline, [(clip, first), (copy.deepcopy(clip), second), (t5, t5_encoder(t5, 32))]),
        "pixart": (diffusers.PixArtSigmaPipeline, [(t5, t5_encoder(t5, 32))]),
        "wan": (diffusers.WanPipeline, [(t5, t5_encoder(t5, 32, umt5=True))]),
    }
    cls, pairs = kinds[kind]
    parts = {c: encoder for c, (_, encoder) in zip(third_party.COMPONENTS, pairs)}
    parts |= {c.replace("text_encoder", "tokenizer"): tokenizer for c, (tokenizer, _) in zip(third_party.COMPONENTS, pairs)}
    return cls(vae=None, transformer=None, scheduler=None, **parts)


@pytest.mark.parametrize(
    ("kind", "key", "component"),
    [
        ("flux", "t5", TWO), ("flux", "t5xxl", TWO), ("sd3", "t5xxl", THREE), ("sd3", "t5", THREE), ("pixart", "t5", ONE),
        ("wan", "umt5xxl", ONE),
    ],
)  # fmt: skip
def test_the_same_key_is_another_component_elsewhere(kind, key, component, tmp_path, said):
    pipe, truth = build(kind, tmp_path), rows(32, vectors=1)
    save_file({key: truth}, tmp_path / "zo.safetensors")
    loaded = pipe.load_directional_inversion(tmp_path / "zo.safetensors", token="<zo>")
    torch.testing.assert_close(rows_in(pipe, component, "<zo>"), truth[0])
    assert list(loaded.directions) == [component]
    assert loaded.metadata["encoders"] == {component: third_party.known_keys()[key]}
    missing = {"flux": "text_encoder", "sd3": "text_encoder, text_encoder_2"}.get(kind)
    assert (f"<zo> has nothing for {missing}:" in said.text) if missing else ("has nothing" not in said.text)
    # once more through our own file
    pipe.save_directional_inversion(tmp_path / "again")
    pipe.unload_directional_inversion()
    assert list(pipe.load_directional_inversion(tmp_path / "again").directions) == [component]


def test_sd3_without_its_t5(tmp_path, said):
    pipe = build("sd3", tmp_path)
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    parts = {"clip_l": rows(16), "clip_g": rows(24), "t5xxl": T5}
    assert list(pipe.load_directional_inversion(parts, token="<zo>").directions) == [ONE, TWO]
    assert "has no T5-XXL (Flux, SD3, PixArt, Chroma, LTX-Video): that part of the concept stays unused" in said.text


def test_fewer_encoders_than_the_pipeline(sdxl, said):
    sdxl.load_directional_inversion({"clip_l": rows(16)}, token="<one>")
    assert "<one> has nothing for text_encoder_2: there it remains an ordinary, unknown word" in said.text
    sdxl.load_directional_inversion({"clip_g": rows(24)}, token="<two>")
    assert "<two> has nothing for text_encoder:" in said.text
    sdxl.load_directional_inversion({"<three>": rows(24, vectors=1)})  # a file that says nothing goes by width
    torch.testing.assert_close(rows_in(sdxl, TWO, "<three>"), rows(24, vectors=1)[0])


@pytest.mark.parametrize(
    ("pipe", "tensors", "message"),
    [
        (
            "sd",
            {"<dog>": H},
            r"for CLIP-H \(Stable Diffusion 2\), 1024 wide, and StableDiffusionPipeline .*text_encoder \(16 wide",
        ),
        ("sd", {"<dog>": L}, r"for CLIP-L \(Stable Diffusion 1, SDXL, SD3, Flux\), 768 wide"),
        ("sd", {"clip_l": H}, r"for CLIP-H \(Stable Diffusion 2\)"),
        ("sd", {"clip_l": L, "clip_g": G}, r"for CLIP-L .* and CLIP bigG \(SDXL, SD3\), and Stable.* has only text_encoder"),
        ("sdxl", {"gemma": GEMMA}, r"for Gemma 2 2B \(SANA, .*\), 2304 wide, and StableDiffusionXLPipeline has only .*24 wide"),
        ("sana", {"<dog>": T5}, r"for T5-XXL \(Flux, .*\) or UMT5-XXL \(Wan\) or .* 4096 wide, and SanaPipeline"),
        ("sana", {"umt5xxl": T5}, r"for UMT5-XXL \(Wan\), 4096 wide, and SanaPipeline"),
        ("wan", {"t5xxl": rows(16)}, r"for T5-XXL \(Flux, .*\), 16 wide, and WanPipeline"),  # the width alone is right
        ("wan", {"clip_l": rows(16)}, r"for CLIP-L .*, and WanPipeline"),
    ],
)
def test_another_family_is_refused_by_name(pipe, tensors, message, request):
    pipe = request.getfixturevalue(pipe)
    before = states(pipe)
    with pytest.raises(ValueError, match=f"<dog> is {message}"):
        pipe.load_directional_inversion(tensors, token="<dog>")
    assert not differing(states(pipe), before)


def test_wans_own_concept_is_not_pixarts(tmp_path):
    """Both encoders have the same width, 4096 in the real models: only the family in the file distinguishes them."""
    made = DirectionalInversion.from_embeddings("<x>", {ONE: rows(32, vectors=1)}, {"family": "Wan"})
    (tmp_path / "other").mkdir()
    pixart, wan = build("pixart", tmp_path), build("wan", tmp_path / "other")
    with pytest.raises(ValueError, match="<x> is for UMT5-XXL"):
        pixart.load_directional_inversion(made)
    assert wan.load_directional_inversion(made) is made


def test_vectors_of_different_widths():
    with pytest.raises(ValueError, match=r"vectors have different widths, \[16, 24\]"):
        DirectionalInversion.from_pretrained({"<t>": torch.ones(1, 16), "<t>_1": torch.ones(1, 24)})


def test_our_own_concept_of_another_family(sd, sdxl, concept):
    sana = DirectionalInversion.from_embeddings("<dog>", {ONE: GEMMA}, {"base_model": "user/sana"})
    with pytest.raises(ValueError, match=r"<dog> is for Gemma 2 2B \(SANA, Lumina 2\), 2304 wide, .*another model, user/sana"):
        sd.load_directional_inversion(sana)
    half = DirectionalInversion.from_embeddings("<dog>", {ONE: rows(16), TWO: rows(16)})  # of two, one that fits
    with pytest.raises(ValueError, match="16 wide for text_encoder_2, whose embeddings are 24 wide"):
        sdxl.load_directional_inversion(half)


@pytest.mark.parametrize("kind", ["plain", "bin", "A1111"])
def test_stock_diffusers_reads_the_same(kind, sd, tmp_path):
    truth = rows(16, vectors=1)
    if kind == "plain":
        save_file({"<zo>": truth[0]}, tmp_path / "zo.safetensors")
    else:
        saved = {"<zo>": truth[0]} if kind == "bin" else {"string_to_param": {"*": truth}, "name": "<zo>", "step": 1}
        torch.save(saved, tmp_path / "zo.bin")
    name = "zo.safetensors" if kind == "plain" else "zo.bin"
    stock = copy.deepcopy(sd)
    stock.load_textual_inversion(str(tmp_path), weight_name=name)
    sd.load_directional_inversion(tmp_path, weight_name=name, allow_pickle=True)
    torch.testing.assert_close(rows_in(sd, ONE, "<zo>"), rows_in(stock, ONE, "<zo>"))


@pytest.mark.parametrize(
    "header", [{"version": 2}, {"placeholder_token": 3}, {"encoders": {"text_encoder": []}}, {"encoders": ["clip_l"]}]
)
def test_headers_of_ours_in_other_programs_files(header, tmp_path):
    header = {"version": 1, "placeholder_token": "<dog>"} | header
    save_file({"clip_l": L, "clip_g": G}, tmp_path / "a.safetensors", metadata={"dti": json.dumps(header)})
    with pytest.raises(ValueError, match="header that cannot be used" + (".*update" if header["version"] > 1 else "")):
        DirectionalInversion.from_pretrained(tmp_path / "a.safetensors")
