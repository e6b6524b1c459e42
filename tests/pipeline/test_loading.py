"""The loader on whole pipelines, against diffusers' own."""

import copy
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionXLImg2ImgPipeline
from helpers import differing, rows_in, states
from safetensors.torch import load_file
from tiny_pipelines import generate

import diffusers_dti
from diffusers_dti import DirectionalInversion, DirectionalTextualInversionMixin, register
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
    """T17: with the unmodified loader, a call per encoder."""
    made = concept(sdxl)
    made.save_pretrained(tmp_path)
    stock = copy.deepcopy(sdxl)
    stock.load_textual_inversion(str(tmp_path))
    second = load_file(tmp_path / "learned_embeds_2.safetensors")
    stock.load_textual_inversion(second, tokenizer=stock.tokenizer_2, text_encoder=stock.text_encoder_2)
    sdxl.load_directional_inversion(tmp_path, pooling="legacy")  # stock's pooling
    for component in ("text_encoder", "text_encoder_2"):
        assert torch.equal(rows_in(stock, component), made.embeddings[component][0])
        assert torch.equal(rows_in(stock, component), rows_in(sdxl, component))
    assert torch.equal(generate(stock, "a <dog> on the beach"), generate(sdxl, "a <dog> on the beach"))


@pytest.mark.parametrize("name", ["sana", "sprint", "wan", "wan22"])
def test_stock_diffusers_reads_what_we_save_for_sana_and_wan(name, request, concept, tmp_path):
    """By the method that these pipelines have through the mixin alone."""
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
    """T4: UMT5's is larger than its tokenizer."""
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
    assert all(m.weight is pipe.text_encoder.get_input_embeddings().weight for m in modules)  # UMT5's ties


def test_gemmas_scaling_survives(sana, concept, photos):
    """T3: √d is the embedding module's business in transformers 5, the model's in 4."""
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


def test_upper_case_is_refused_where_prompts_are_lower_cased(sana, wan, concept, photos):
    """T7: SANA would never see `<Dog>`; Wan does, and it is not `<dog>`."""
    from diffusers_dti import DTITrainer

    before = states(sana)
    message = "SanaPipeline lower-cases prompts, so <Dog> would never match: use <dog>"
    with pytest.raises(ValueError, match=message):
        sana.load_directional_inversion(concept(sana, "<Dog>"))
    with pytest.raises(ValueError, match=message):
        DTITrainer(sana, placeholder_token="<Dog>", initializer_token="dog", resolution=32).fit(photos)
    assert not differing(states(sana), before)
    sana.load_directional_inversion(concept(sana, "<Dog>"), token="<dog>")
    assert torch.equal(generate(sana, "A <DOG> on the beach"), generate(sana, "a <dog> on the beach"))
    for vectors in (1, 3):
        wan.load_directional_inversion(concept(wan, "<Dog>", vectors))
        upper, lower = generate(wan, "a <Dog> on the beach"), generate(wan, "a <dog> on the beach")
        assert not torch.equal(upper, lower)
        wan.unload_directional_inversion()
        assert torch.equal(generate(wan, "a <dog> on the beach"), lower) and not torch.equal(generate(wan, "a <Dog>"), upper)


@pytest.mark.parametrize("word", ["“dog”", "＜dog＞", "<my  dog>", "<a&amp;b>", "<cafe\u0301>"])
def test_placeholders_that_would_not_come_through(wan, concept, photos, word):
    """Wan's pipelines mend quotes, spaces, entities and accents before they read a prompt."""
    from diffusers_dti import DTITrainer

    before = states(wan)
    with pytest.raises(ValueError, match="cleans prompts before tokenizing them, which would remove .*plain letters"):
        wan.load_directional_inversion(concept(wan), token=word)
    with pytest.raises(ValueError, match="cleans prompts"):
        DTITrainer(wan, placeholder_token=word, initializer_token="dog", resolution=32).fit(photos)
    assert not differing(states(wan), before)


def test_captions_that_are_cleaned(sana, concept, caplog, tmp_path):
    """T7, T27: `clean_caption=True` takes `<dog>` for HTML. A name of letters stays; where it is the default, it is said."""
    from tiny_pipelines import t5_encoder, t5_tokenizer

    for word, vectors in (("<dog>", 1), ("<rex>", 3), ("mydog", 1), ("myrex", 3)):
        sana.load_directional_inversion(concept(sana, word, vectors))
    for word in ("<dog>", "<rex>", "mydog", "myrex"):
        kept = generate(sana, f"a {word} on the beach", clean_caption=True)
        same = torch.equal(kept, generate(sana, "a on the beach", clean_caption=True))
        assert same == word.startswith("<")
        assert not torch.equal(generate(sana, f"a {word} on the beach"), generate(sana, "a on the beach"))
    tokenizer = t5_tokenizer(tmp_path / "t")
    pixart = diffusers.PixArtSigmaPipeline(tokenizer, t5_encoder(tokenizer, 16), None, None, diffusers.DDIMScheduler())
    diffusers_dti.pipeline.loading.logger.addHandler(caplog.handler)
    try:
        pixart.load_directional_inversion(concept(pixart, "mydog"))
        assert not caplog.text
        pixart.load_directional_inversion(concept(pixart))
        assert "PixArtSigmaPipeline removes <dog> from prompts unless it is called with clean_caption=False" in caplog.text
    finally:
        diffusers_dti.pipeline.loading.logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_instruction_before_the_prompt(sana, concept, vectors):
    """T10: SANA's default, which training does not use: the concept is found behind it."""
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


@pytest.mark.parametrize("vectors", [1, 3])
def test_prompts_that_ftfy_mends(wan, concept, vectors):
    """Wan's pipeline mends text before it comes to the tokenizer; the placeholder is not harmed, nor are its vectors."""
    wan.load_directional_inversion(concept(wan, "<dog>", vectors))
    plain = generate(wan, "a <dog> on the beach & a cat")
    assert torch.equal(generate(wan, "  a <dog>\n on the   beach &amp; a cat "), plain)
    assert not torch.equal(generate(wan, "a dog on the beach & a cat"), plain)


@pytest.mark.parametrize("name", ["sdxl", "sana", "wan"])
def test_ordinary_prompts_keep_their_embeddings(name, request, concept, photos):
    """To the bit: before, while concepts are loaded, in training, and after."""
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
    """T1: with legacy pooling different endings give equal pooled vectors, with ours they do not."""
    made = concept(sdxl)
    ordinary = sdxl.encode_prompt("a dog on the beach")
    pooled = {}
    for pooling in ("legacy", "eos"):
        sdxl.load_directional_inversion(made, pooling=pooling)
        pooled[pooling] = [sdxl.encode_prompt(f"a <dog> on the {where}")[2] for where in ("beach", "tower")]
        for was, now in zip(ordinary, sdxl.encode_prompt("a dog on the beach")):
            assert (was is None and now is None) or torch.equal(was, now)  # ordinary prompts: the same bits
        sdxl.unload_directional_inversion()
    assert torch.equal(*pooled["legacy"])
    assert not torch.equal(*pooled["eos"])


def test_pooling_is_the_concepts_own_unless_said(sdxl, concept):
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


def test_a_concept_for_fewer_or_more_encoders_warns(sdxl, sd, concept, caplog):
    both = concept(sdxl)
    diffusers_logger = diffusers_dti.pipeline.loading.logger
    diffusers_logger.addHandler(caplog.handler)
    try:
        sd.load_directional_inversion(both)
        assert "StableDiffusionPipeline has no text_encoder_2" in caplog.text
        part = DirectionalInversion.from_embeddings("<cat>", {"text_encoder_2": both.embeddings["text_encoder_2"]})
        sdxl.load_directional_inversion(part)
        assert "<cat> has nothing for text_encoder" in caplog.text
        with pytest.raises(ValueError, match="<cat> is for text_encoder_2, and StableDiffusionPipeline has only text_encoder"):
            sd.load_directional_inversion(part)
    finally:
        diffusers_logger.removeHandler(caplog.handler)


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


def test_credentials_are_no_placeholders(sdxl, concept):
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
def test_other_pipelines_of_the_same_parts_draw_the_token(unet_pipe, kind, concept):
    pipe = unet_pipe
    from PIL import Image

    other = getattr(diffusers, type(pipe).__name__.removesuffix("Pipeline") + kind + "Pipeline").from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.load_directional_inversion(concept(pipe, vectors=3))
    names = "".join(find_text_encoders(pipe)["text_encoder"].concepts["<dog>"].tokens)
    inputs = {"image": Image.new("RGB", (16, 16), "red"), "strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
    if kind == "Inpaint":
        inputs |= {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}

    def draw(prompt, **more):
        return torch.tensor(other(prompt, generator=torch.Generator().manual_seed(0), **inputs, **more).images)

    picture = draw(["a <dog> on the beach"])
    assert torch.equal(picture, draw(f"a {names} on the beach"))
    assert not torch.equal(picture, draw("a dog on the beach"))
    assert not torch.equal(draw("a cat", negative_prompt="<dog>"), draw("a cat"))


def test_save_and_reopen(sdxl, concept, tmp_path):
    """A pipeline saved with tokens in it keeps single vectors; loading the same concept again adopts its rows."""
    single, several = concept(sdxl), concept(sdxl, "<rex>", vectors=2, seed=5)
    before = states(sdxl)
    for made in (single, several):
        sdxl.load_directional_inversion(made)
    picture, pair = generate(sdxl, "a <dog> on the beach"), generate(sdxl, "a <dog> near <rex>")
    sdxl.save_pretrained(tmp_path)
    reopened = DiffusionPipeline.from_pretrained(tmp_path)
    reopened.set_progress_bar_config(disable=True)
    close = {"rtol": 0, "atol": 1e-5}  # a table read from disk lies otherwise in memory, and rounds otherwise
    torch.testing.assert_close(generate(reopened, "a <dog> on the beach"), picture, **close)
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
    # the pooling at the prompt's end is kept as well
    torch.testing.assert_close(pooled, sdxl.encode_prompt("a <dog> on the beach")[2], rtol=0, atol=1e-5)


def test_from_single_file(sdxl, concept, tmp_path):
    """The pipeline's own parts handed over: converting weights of the original format is diffusers' business."""
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


def test_the_refiner_takes_what_is_for_it(sdxl, concept, caplog):
    made = concept(sdxl)
    refiner = StableDiffusionXLImg2ImgPipeline(**sdxl.components | {"text_encoder": None, "tokenizer": None})
    logger = diffusers_dti.pipeline.loading.logger
    logger.addHandler(caplog.handler)
    try:
        loaded = refiner.load_directional_inversion(made)
    finally:
        logger.removeHandler(caplog.handler)
    assert list(loaded.directions) == ["text_encoder_2"]
    assert "StableDiffusionXLImg2ImgPipeline has no text_encoder: that part of the concept stays unused" in caplog.text
    assert torch.equal(rows_in(refiner, "text_encoder_2"), made.embeddings["text_encoder_2"][0])


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
    with pytest.raises(TypeError, match="One concept at a time"):
        sd.load_directional_inversion([tmp_path])
    assert sd.directional_inversions == {}


def test_half_precision_pipelines_load(sdxl, concept):
    made = concept(sdxl)
    for dtype in (torch.bfloat16, torch.float16):
        sdxl.to(dtype)
        sdxl.load_directional_inversion(made)
        assert torch.equal(rows_in(sdxl, "text_encoder"), made.embeddings["text_encoder"][0].to(dtype))
        sdxl.unload_directional_inversion()


def test_every_pipeline_class_speaks_dti():
    for base in (DiffusionPipeline, ModularPipeline):
        assert issubclass(base, DirectionalTextualInversionMixin)
    names = [n for n in dir(diffusers) if n.endswith("Pipeline")]
    assert len(names) > 200
    for name in ("StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline", "SanaPipeline", "WanPipeline", "FluxPipeline"):
        cls = getattr(diffusers, name)
        assert cls.load_directional_inversion is DirectionalTextualInversionMixin.load_directional_inversion

    class Later(DiffusionPipeline):
        pass

    assert issubclass(Later, DirectionalTextualInversionMixin)


def test_register_is_idempotent_and_overwrites_nobody():
    mro = DiffusionPipeline.__mro__
    register(DiffusionPipeline)
    assert DiffusionPipeline.__mro__ == mro

    class Base:
        pass

    class Theirs(Base):
        def load_directional_inversion(self):
            return "theirs"

    with pytest.raises(TypeError, match="has its own load_directional_inversion"):
        register(Theirs)
    assert Theirs().load_directional_inversion() == "theirs"


def test_a_pipeline_without_text_is_refused():
    pipe = diffusers.DDPMPipeline(unet=torch.nn.Identity(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline has no text encoder.*neither"):
        pipe.load_directional_inversion({"<dog>": torch.ones(4)})
