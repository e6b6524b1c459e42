"""Load, unload and save on whole pipelines, compared with diffusers' own loader."""

import copy
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from helpers import differing, rows_in, same, states
from safetensors.torch import load_file
from tiny_pipelines import generate

from diffusers_dti import DirectionalInversion
from diffusers_dti.pipeline.text_encoders import find_text_encoders


def test_one_call_fills_every_encoder(pipe, concept, tmp_path):
    made = concept(pipe)
    made.save_pretrained(tmp_path)
    loaded = pipe.load_directional_inversion(str(tmp_path))
    assert pipe.directional_inversions == {"<dog>": loaded}
    for component in find_text_encoders(pipe):
        assert torch.equal(rows_in(pipe, component), made.embeddings[component][0])
    assert (generate(pipe, "a <dog>") != generate(pipe, "a dog")).any()


def test_stock_diffusers_reads_what_we_save(sdxl, concept, tmp_path):
    """With the unmodified loader, which takes one call for each encoder."""
    made = concept(sdxl)
    made.save_pretrained(tmp_path)
    stock = copy.deepcopy(sdxl)
    stock.load_textual_inversion(str(tmp_path))
    second = load_file(tmp_path / "learned_embeds_2.safetensors")
    stock.load_textual_inversion(second, tokenizer=stock.tokenizer_2, text_encoder=stock.text_encoder_2)
    sdxl.load_directional_inversion(tmp_path, pooling="legacy")  # diffusers' own loader leaves the pooling like this
    for component in ("text_encoder", "text_encoder_2"):
        assert torch.equal(rows_in(stock, component), made.embeddings[component][0])
        assert torch.equal(rows_in(stock, component), rows_in(sdxl, component))
    assert torch.equal(generate(stock, "a <dog> on the beach"), generate(sdxl, "a <dog> on the beach"))


@pytest.mark.parametrize("name", ["sana", "sprint", "wan", "wan22"])
def test_stock_diffusers_reads_what_we_save_for_sana_and_wan(name, request, concept, tmp_path):
    """With the stock method, which these pipelines have only through our mixin."""
    pipe = request.getfixturevalue(name)
    made = concept(pipe)
    made.save_pretrained(tmp_path)
    stock = copy.deepcopy(pipe)
    stock.load_textual_inversion(str(tmp_path))
    pipe.load_directional_inversion(tmp_path)
    assert torch.equal(rows_in(stock, "text_encoder"), made.embeddings["text_encoder"][0])
    assert torch.equal(generate(stock, "a <dog> on the beach"), generate(pipe, "a <dog> on the beach"))


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_tables_never_shrink(name, request, concept):
    """UMT5's table has more rows than its tokenizer has tokens."""
    pipe = request.getfixturevalue(name)
    before = len(pipe.text_encoder.get_input_embeddings().weight)
    room = before - len(pipe.tokenizer)
    assert room == {"sana": 0, "wan": 2}[name]
    for number, word in enumerate(("<a>", "<b>", "<c>"), 1):
        pipe.load_directional_inversion(concept(pipe, word))
        assert (
            len(pipe.text_encoder.get_input_embeddings().weight)
            == max(before, len(pipe.tokenizer))
            == before + max(0, number - room)
        )
    modules = find_text_encoders(pipe)["text_encoder"].embedding_modules()
    assert len({id(m) for m in modules}) == {"sana": 1, "wan": len(modules)}[name]
    assert all(m.weight is pipe.text_encoder.get_input_embeddings().weight for m in modules)  # UMT5 shares it


def test_gemmas_scaling_survives(sana, concept, photos):
    """The embedding module multiplies by √d in transformers 5, and the model does in 4."""
    from diffusers_dti import DTITrainer

    embedding, ids = sana.text_encoder.get_input_embeddings(), torch.tensor([[2, 300]])
    kind, looked_up = type(embedding), embedding(ids)
    ratio = (looked_up.norm() / embedding.weight[ids].norm()).item()
    assert ratio == pytest.approx(4.0 if kind is not torch.nn.Embedding else 1.0)  # √16
    states_before = sana.text_encoder(ids).last_hidden_state
    sana.load_directional_inversion(concept(sana, vectors=2))
    sana.unload_directional_inversion()
    DTITrainer(sana, placeholder_token="<cat>", initializer_token="cat", resolution=32, max_train_steps=2).fit(photos)
    for _ in range(2):  # with the token, and without
        now = sana.text_encoder.get_input_embeddings()
        assert now is embedding and type(now) is kind and torch.equal(now(ids), looked_up)
        assert torch.equal(sana.text_encoder(ids).last_hidden_state, states_before)
        sana.unload_directional_inversion()


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_instruction_before_the_prompt(sana, concept, vectors):
    """SANA puts an instruction before prompts by default, unlike training. The concept works after it."""
    import inspect

    made = concept(sana, vectors=vectors)
    sana.load_directional_inversion(made)
    instruction = inspect.signature(sana.__call__).parameters["complex_human_instruction"].default
    assert len(instruction) > 5
    seen = []
    embedding = sana.text_encoder.get_input_embeddings()
    with embedding.register_forward_hook(lambda module, args, out: seen.append(args[0])):
        with_it = generate(sana, "a <dog>", max_sequence_length=300)
    ids = find_text_encoders(sana)["text_encoder"].token_ids("<dog>")
    found = [i for i in seen[0][0].tolist() if i in ids]
    assert found == ids and seen[0].shape[1] > 1000
    assert not torch.equal(with_it, generate(sana, "a <dog>", complex_human_instruction=None))
    assert not torch.equal(with_it, generate(sana, "a dog", max_sequence_length=300))


@pytest.mark.parametrize("name", ["sdxl", "sana", "wan"])
def test_ordinary_prompts_keep_their_embeddings(name, request, concept, photos):
    """Bit for bit: before, while concepts are loaded, during training, and after."""
    from diffusers_dti import DTITrainer

    pipe = request.getfixturevalue(name)

    def encoded():
        with torch.no_grad():
            return [x for x in pipe.encode_prompt("a dog on the beach", device="cpu") if x is not None]

    before, in_training = encoded(), []
    pipe.load_directional_inversion(concept(pipe, "<rex>", vectors=2))
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 2}
    DTITrainer(pipe, **settings).fit(photos, callback_on_step_end=lambda *_: in_training.append(encoded()))
    loaded = encoded()
    pipe.unload_directional_inversion("<rex>")
    one = encoded()
    pipe.unload_directional_inversion()
    for now in (*in_training, loaded, one, encoded()):
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert len(in_training) == 2


def test_text_after_the_token_reaches_the_pooled_vector(sdxl, concept):
    """With legacy pooling, prompts of different endings have equal pooled vectors. With ours they differ."""
    made = concept(sdxl)
    ordinary = sdxl.encode_prompt("a dog on the beach")
    pooled = {}
    for pooling in ("legacy", "eos"):
        sdxl.load_directional_inversion(made, pooling=pooling)
        pooled[pooling] = [sdxl.encode_prompt(f"a <dog> on the {where}")[2] for where in ("beach", "tower")]
        for was, now in zip(ordinary, sdxl.encode_prompt("a dog on the beach")):
            assert (was is None and now is None) or torch.equal(was, now)  # ordinary prompts stay bit for bit
        sdxl.unload_directional_inversion()
    assert torch.equal(*pooled["legacy"])
    assert not torch.equal(*pooled["eos"])


def test_pooling_is_the_concepts_own_by_default(sdxl, concept):
    made = concept(sdxl, pooling="legacy")
    sdxl.load_directional_inversion(made)
    assert sdxl.text_encoder_2.config.eos_token_id == 2
    sdxl.load_directional_inversion(made, token="<cat>", pooling="eos")
    assert sdxl.text_encoder_2.config.eos_token_id == sdxl.tokenizer_2.eos_token_id
    with pytest.raises(ValueError, match='pooling must be "eos"'):
        sdxl.load_directional_inversion(made, token="<rex>", pooling="mean")


@pytest.mark.parametrize("vectors", [2, 3])
def test_several_vectors_work_in_the_prompt(pipe, concept, vectors):
    pipe.load_directional_inversion(concept(pipe, "<rex>", vectors))
    pipe.load_directional_inversion(concept(pipe, "<cat>", seed=3))
    names = find_text_encoders(pipe)["text_encoder"].concepts["<rex>"].tokens
    written_out = generate(pipe, f"a {''.join(names)} near a <cat>")
    assert torch.equal(generate(pipe, "a <rex> near a <cat>"), written_out)
    assert torch.equal(generate(pipe, ["a <rex> near a <cat>"]), written_out)
    assert not torch.equal(generate(pipe, "a dog", negative_prompt="a <rex>"), generate(pipe, "a dog"))


def test_a_failure_half_way_leaves_the_pipeline_as_it_was(sdxl, concept, monkeypatch):
    sdxl.load_directional_inversion(concept(sdxl, "<cat>"))
    before = states(sdxl)
    add_tokens = type(sdxl.tokenizer_2).add_tokens

    def fail(self, *args, **kwargs):
        if self is sdxl.tokenizer_2:
            raise RuntimeError("out of memory")
        return add_tokens(self, *args, **kwargs)

    monkeypatch.setattr(type(sdxl.tokenizer_2), "add_tokens", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    monkeypatch.undo()
    assert not differing(states(sdxl), before)


def test_credentials_are_not_placeholders(sdxl, concept):
    with pytest.raises(ValueError, match="hf_token"):
        sdxl.load_directional_inversion(concept(sdxl), token="hf_abcdef")


def test_unloading_what_is_not_loaded_is_an_error(sdxl, concept):
    sdxl.load_directional_inversion(concept(sdxl, "<cat>"))
    with pytest.raises(ValueError, match="<dog> is not loaded; loaded are: <cat>"):
        sdxl.unload_directional_inversion(["<cat>", "<dog>"])
    assert list(sdxl.directional_inversions) == ["<cat>"]


def test_from_pipe_shares_what_is_loaded(sdxl, concept):
    sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(sdxl)
    assert list(other.directional_inversions) == ["<dog>"]
    other.unload_directional_inversion()
    assert sdxl.directional_inversions == {}


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_other_pipelines_of_the_same_parts_use_the_concept(unet_pipe, kind, concept):
    pipe = unet_pipe
    from PIL import Image

    other = getattr(diffusers, type(pipe).__name__.removesuffix("Pipeline") + kind + "Pipeline").from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.load_directional_inversion(concept(pipe, vectors=3))
    names = "".join(find_text_encoders(pipe)["text_encoder"].concepts["<dog>"].tokens)
    inputs = {"image": Image.new("RGB", (16, 16), "red"), "strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
    if kind == "Inpaint":
        inputs |= {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}

    def generate_with(prompt, **more):
        return torch.tensor(other(prompt, generator=torch.Generator().manual_seed(0), **inputs, **more).images)

    image = generate_with(["a <dog> on the beach"])
    assert torch.equal(image, generate_with(f"a {names} on the beach"))
    assert not torch.equal(image, generate_with("a dog on the beach"))
    assert not torch.equal(generate_with("a cat", negative_prompt="<dog>"), generate_with("a cat"))


def test_save_and_reopen(sdxl, concept, tmp_path):
    """A pipeline that is saved with concepts in it keeps single vectors. Loading a concept again reuses its rows."""
    single, several = concept(sdxl), concept(sdxl, "<rex>", vectors=2, seed=5)
    before = states(sdxl)
    for made in (single, several):
        sdxl.load_directional_inversion(made)
    image, pair = generate(sdxl, "a <dog> on the beach"), generate(sdxl, "a <dog> near <rex>")
    sdxl.save_pretrained(tmp_path)
    reopened = DiffusionPipeline.from_pretrained(tmp_path)
    reopened.set_progress_bar_config(disable=True)
    close = {"rtol": 0, "atol": 1e-5}  # a table from disk has another memory layout, which rounds differently
    torch.testing.assert_close(generate(reopened, "a <dog> on the beach"), image, **close)
    rows = len(reopened.tokenizer)
    for made in (several, single):
        reopened.load_directional_inversion(made)
    assert len(reopened.tokenizer) == rows
    torch.testing.assert_close(generate(reopened, "a <dog> near <rex>"), pair, **close)
    reopened.unload_directional_inversion()
    for component, text_encoder in find_text_encoders(reopened).items():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        assert len(tokenizer) == before[f"{component} length"] == len(encoder.get_input_embeddings().weight)
        assert (
            encoder.get_input_embeddings().weight.detach().view(torch.uint8).numpy().tobytes() == before[f"{component} table"]
        )


def test_stock_diffusers_reopens_a_saved_pipeline(sdxl, concept, tmp_path):
    """In a process that never imports this package."""
    made = concept(sdxl)
    sdxl.load_directional_inversion(made)
    sdxl.save_pretrained(tmp_path)
    script = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert "diffusers_dti" not in sys.modules and not hasattr(pipe, "load_directional_inversion")
(id,) = pipe.tokenizer_2("<dog>", add_special_tokens=False).input_ids
row = pipe.text_encoder_2.get_input_embeddings().weight[id].detach()
torch.save((row, pipe.encode_prompt("a <dog> on the beach")[2].detach()), sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, tmp_path, tmp_path / "out.pt"], check=True, capture_output=True, cwd=tmp_path)
    row, pooled = torch.load(tmp_path / "out.pt")
    assert torch.equal(row, made.embeddings["text_encoder_2"][0])
    # Pooling at the end of the prompt is kept too.
    torch.testing.assert_close(pooled, sdxl.encode_prompt("a <dog> on the beach")[2], rtol=0, atol=1e-5)


def test_from_single_file(sdxl, concept, tmp_path):
    """With the pipeline's own components, since converting the original format's weights is up to diffusers."""
    from safetensors.torch import save_file

    sdxl.save_pretrained(tmp_path / "config")
    marks = ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", "model.diffusion_model.out.0.bias")
    save_file({name: torch.zeros(1) for name in marks}, tmp_path / "one.safetensors")
    parts = {k: v for k, v in sdxl.components.items() if v is not None}
    pipe = type(sdxl).from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "config"), **parts)
    pipe.set_progress_bar_config(disable=True)
    made = concept(pipe, vectors=2)
    pipe.load_directional_inversion(made)
    names = "".join(find_text_encoders(pipe)["text_encoder"].concepts["<dog>"].tokens)
    assert torch.equal(generate(pipe, "a <dog>"), generate(pipe, f"a {names}"))


def test_save_directional_inversion(sdxl, concept, tmp_path):
    sdxl.load_directional_inversion(concept(sdxl), token="<rex>")
    sdxl.save_directional_inversion(tmp_path)
    assert DirectionalInversion.from_pretrained(tmp_path).placeholder_token == "<rex>"
    sdxl.load_directional_inversion(concept(sdxl, "<cat>"))
    with pytest.raises(ValueError, match="loaded are: <rex>, <cat>"):
        sdxl.save_directional_inversion(tmp_path)
    sdxl.save_directional_inversion(tmp_path, "<cat>")
    assert DirectionalInversion.from_pretrained(tmp_path).placeholder_token == "<cat>"


def test_concepts_loaded_file_by_file_are_saved_whole(sdxl, concept, tmp_path):
    made = concept(sdxl)
    made.save_pretrained(tmp_path)
    for name in ("learned_embeds.safetensors", "learned_embeds_2.safetensors"):
        sdxl.load_directional_inversion(tmp_path, weight_name=name)
    sdxl.save_directional_inversion(tmp_path / "again")
    again = DirectionalInversion.from_pretrained(tmp_path / "again")
    for component, rows in made.embeddings.items():
        assert torch.equal(again.embeddings[component], rows)
    sdxl.unload_directional_inversion()
    sdxl.load_directional_inversion(tmp_path, token_scale="max")
    assert sdxl.directional_inversions["<dog>"].metadata["scale_rule"] == "max"


def test_unknown_arguments_are_refused(sd, concept, tmp_path):
    made = concept(sd)
    made.save_pretrained(tmp_path)
    for source, arguments in ((made, {"weight_name": "a"}), (tmp_path, {"scale": "mean"}), (tmp_path, {"tokenizer": 1})):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            sd.load_directional_inversion(source, **arguments)
    assert sd.directional_inversions == {}


def test_half_precision_pipelines_load(sdxl, concept):
    made = concept(sdxl)
    for dtype in (torch.bfloat16, torch.float16):
        sdxl.to(dtype)
        sdxl.load_directional_inversion(made)
        assert torch.equal(rows_in(sdxl, "text_encoder"), made.embeddings["text_encoder"][0].to(dtype))
        sdxl.unload_directional_inversion()


def test_several_at_once_are_as_one_by_one(pipe, concept):
    made = [concept(pipe, f"<{name}>", vectors=1 + i % 3, seed=i) for i, name in enumerate("abcd")]
    before, single = states(pipe), copy.deepcopy(pipe)
    for one in made:
        single.load_directional_inversion(one)
    loaded = pipe.load_directional_inversion(made)
    assert [one.placeholder_token for one in loaded] == list(pipe.directional_inversions) == ["<a>", "<b>", "<c>", "<d>"]
    assert not differing(states(pipe), states(single))
    pipe.unload_directional_inversion(["<c>", "<a>"])
    single.unload_directional_inversion("<a>")
    single.unload_directional_inversion("<c>")
    assert not differing(states(pipe), states(single))
    pipe.unload_directional_inversion()
    assert not differing(states(pipe), before)


@pytest.mark.parametrize(("count", "seconds", "shown"), [(3, 2, True), (3, 0.01, False), (1, 2, False)])
def test_a_bar_where_reading_several_takes_long(sdxl, concept, tmp_path, monkeypatch, capsys, count, seconds, shown):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    read = DirectionalInversion.from_pretrained

    def read_slowly(*args, **kwargs):
        now[0] += seconds
        return read(*args, **kwargs)

    monkeypatch.setattr(DirectionalInversion, "from_pretrained", read_slowly)
    folders = []
    for number in range(count):
        folders.append(tmp_path / str(number))
        concept(sdxl, f"<w{number}>", seed=number).save_pretrained(folders[-1])
    sdxl.load_directional_inversion(folders)
    captured = capsys.readouterr()
    assert not captured.out and ("Reading concepts:" in captured.err) == shown == bool(captured.err)
    assert not shown or captured.err.rstrip(" ").endswith("\r")  # the line is empty again


def test_several_at_once_under_other_names(sdxl, concept):
    a, b = sdxl.load_directional_inversion((concept(sdxl), concept(sdxl, seed=1)), token=["<a>", "<b>"], token_scale=2.0)
    assert list(sdxl.directional_inversions) == ["<a>", "<b>"] and a.scales["text_encoder"].item() == pytest.approx(2.0)
    assert sdxl.load_directional_inversion(concept(sdxl), token=["<c>"]).placeholder_token == "<c>"  # as stock takes it
    before = states(sdxl)
    for wrong in ("<d>", ["<d>"], ["<d>", "<e>", "<f>"]):
        with pytest.raises(ValueError, match="needs a placeholder for each of 2 concepts"):
            sdxl.load_directional_inversion([a, b], token=wrong)
    for second, message in (
        ("<d>", "<d> is the placeholder of two of the concepts"),
        ("<d>_1", "<d>_1 and <d> cannot be loaded together"),
    ):
        with pytest.raises(ValueError, match=message):
            sdxl.load_directional_inversion([a, b], token=["<d>", second])
    assert not differing(states(sdxl), before)
    assert sdxl.load_directional_inversion([]) == []


def test_several_by_placeholder(sdxl, concept, tmp_path):
    """A mapping of sources is not a state dict, whose values are tensors."""
    made = concept(sdxl, seed=1)
    made.save_pretrained(tmp_path / "dog")
    loaded = sdxl.load_directional_inversion({"<a>": str(tmp_path / "dog"), "<b>": made, "<c>": tmp_path / "dog"})
    assert list(loaded) == list(sdxl.directional_inversions) == ["<a>", "<b>", "<c>"]
    assert all(same(one.embeddings, made.embeddings) for one in loaded.values())
    before = states(sdxl)
    with pytest.raises(TypeError, match="leave out `token`"):
        sdxl.load_directional_inversion({"<d>": made}, token="<e>")
    with pytest.raises(ValueError, match="<b> is already loaded"):
        sdxl.load_directional_inversion({"<d>": made, "<b>": made})
    assert not differing(states(sdxl), before)
    (again,) = sdxl.load_directional_inversion({"<b>": concept(sdxl, seed=2)}, replace=True, token_scale=2.0).values()
    assert again.scales["text_encoder"].item() == pytest.approx(2.0)
    parts = {f"{c}": rows for c, rows in made.embeddings.items()}
    assert sdxl.load_directional_inversion(parts, token="<f>").placeholder_token == "<f>"


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e-8), (torch.float16, 1e7), (torch.float16, 3e-7)], ids=["zero", "infinite", "coarse"]
)
def test_norms_that_an_encoder_cannot_hold_are_refused(sdxl, concept, dtype, scale):
    """Its table would have a row that is zero, infinite, or points elsewhere."""
    sdxl.text_encoder_2.to(dtype)
    before = states(sdxl)
    odd, message = (
        concept(sdxl, scale=scale),
        rf"^<dog> has a norm of {re.escape(f'{scale:g}')}, which text_encoder_2 cannot hold in {dtype}: ",
    )
    with pytest.raises(ValueError, match=message + 'choose another `token_scale`, such as "mean"'):
        sdxl.load_directional_inversion(odd)
    with pytest.raises(ValueError, match=message):
        sdxl.load_directional_inversion(concept(sdxl), token_scale=scale)
    assert not differing(states(sdxl), before)
    sdxl.load_directional_inversion(odd, token_scale="mean")


def test_other_precisions_hold_ordinary_norms(sdxl, concept):
    for dtype, scale in ((torch.float16, 100.0), (torch.bfloat16, 1e-8), (torch.bfloat16, 1e7)):
        sdxl.text_encoder_2.to(dtype)
        sdxl.load_directional_inversion(concept(sdxl, scale=scale))
        sdxl.unload_directional_inversion()


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e39, 1e-39, 10**400, True, [1.0]])
def test_a_token_scale_that_is_no_norm_is_refused(sdxl, concept, scale):
    before = states(sdxl)
    with pytest.raises(
        ValueError, match=r'^token_scale must be "mean", "min", "max" or a positive number up to 1e\+10, got'
    ) as caught:
        sdxl.load_directional_inversion(concept(sdxl), token_scale=scale)
    assert len(str(caught.value)) < 200 and not differing(states(sdxl), before)


def test_a_number_of_numpy_is_a_token_scale(sdxl, concept, tmp_path):
    """It is saved as a plain number."""
    import numpy as np

    sdxl.load_directional_inversion(concept(sdxl), token_scale=np.float32(0.5)).save_pretrained(tmp_path)
    assert DirectionalInversion.from_pretrained(tmp_path).metadata["scale_rule"] == 0.5


@pytest.mark.parametrize("token", [["<rex>"], ("<rex>",)])
def test_a_list_of_one_token_is_one_token(sdxl, concept, token):
    """As stock `load_textual_inversion` takes it."""
    assert sdxl.load_directional_inversion(concept(sdxl), token=token).placeholder_token == "<rex>"
