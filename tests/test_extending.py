"""A family, a method and another program's format are each added in one place, and found everywhere from there."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
from tiny_pipelines import build_unet, build_vae, t5_encoder, t5_tokenizer

import diffusers_dti
from diffusers_dti import DirectionalInversion, DTIConfig, DTITrainer, families
from diffusers_dti.cli import main
from diffusers_dti.concept.convert import convert
from diffusers_dti.concept.methods import METHODS, Method
from diffusers_dti.concept.model_card import model_card
from diffusers_dti.concept.registry import MODEL_FAMILIES, ModelFamily
from diffusers_dti.concept.third_party import FORMATS, Format
from diffusers_dti.families.ddpm import DDPMFamily
from diffusers_dti.pipeline.inspection import inspect, table

CITATION = "Made-Up Inversion ([Nobody, 2030](https://example.org/made-up))"


class MadeUpPipeline(StableDiffusionPipeline):
    """A UNet that is told of the prompt by T5: no family of the package accepts it."""


class MadeUp(DDPMFamily):
    name = "Made-Up"
    denoisers = ("unet",)
    text_length = 24
    defaults = {  # noqa: RUF012 (as in the other families)
        "resolution": 16,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 3,
        "kappa": 1e-3,
    }

    @classmethod
    def matches(cls, pipe):
        return isinstance(pipe, MadeUpPipeline)

    def encode_prompts(self, prompts, zero_pads):
        tokens = self.pipe.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return {"context": self.pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state}

    def predict(self, batch, conditioning):
        return self.pipe.unet(self.noisy_latents(batch), batch.timesteps, conditioning["context"]).sample


@pytest.fixture
def made_up(monkeypatch):
    """Each of the three is one entry in one registry; the family's class has a row for what its files and cards say."""
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, MadeUp])
    row = ModelFamily("Made-Up", {"text_encoder": "t5xxl"}, tags=("made-up-model",), declares_encoders=True)
    monkeypatch.setitem(MODEL_FAMILIES, row.name, row)
    method = Method("learns by made-up steps", CITATION, {"max_train_steps": 2, "learning_rate": 0.02})
    monkeypatch.setitem(METHODS, "made_up_method", method)
    monkeypatch.setitem(FORMATS, "made_up_program", Format("Made-Up Program", "made_up_rows", {"t5xxl": "made_up_t5"}))


@pytest.fixture
def pipe(tmp_path):
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(tmp_path / "t5")
    pipe = MadeUpPipeline(
        vae=build_vae(), text_encoder=t5_encoder(tokenizer, 16), tokenizer=tokenizer, unet=build_unet(16),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def learned(made_up, pipe, photos):
    return DTITrainer(pipe, method="made_up_method", placeholder_token="<dog>", initializer_token="dog").fit(photos)


def test_none_of_them_is_known_before(pipe, tmp_path):
    with pytest.raises(ValueError, match="Training supports .*; MadeUpPipeline is not one of them"):
        DTITrainer(pipe)
    with pytest.raises(ValueError, match="method must be one of dti, .*, got 'made_up_method'"):
        DTIConfig(method="made_up_method")
    with pytest.raises(ValueError, match="not for 'made_up_program'"):
        convert(tmp_path, "made_up_program", tmp_path / "out")


def test_training(learned, pipe):
    assert list(pipe.directional_inversions) == ["<dog>"]
    metadata = learned.metadata
    assert (metadata["family"], metadata["method"]) == ("Made-Up", "made_up_method")
    settings = metadata["training"]  # the method's defaults come before the family's, and the family's before the general ones
    assert (settings["max_train_steps"], settings["learning_rate"], settings["kappa"]) == (2, 0.02, 1e-3)
    assert not torch.allclose(learned.directions["text_encoder"], first_row(pipe, "dog"), atol=1e-3)


def first_row(pipe, word):
    weight = pipe.text_encoder.get_input_embeddings().weight
    row = weight[pipe.tokenizer(word, add_special_tokens=False).input_ids[0]].detach()
    return torch.nn.functional.normalize(row, dim=-1)[None]


def test_the_message_for_other_pipelines_names_the_family(made_up):
    unknown = DDPMPipeline(unet=torch.nn.Identity(), scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="Training supports SDXL, .*, Made-Up, with all"):
        DTITrainer(unknown)


def test_the_model_card(learned):
    card = model_card(learned, "user/dti-dog")
    assert {"made-up-model", "text-to-image", "directional-textual-inversion"} <= set(card.data.tags)
    assert f"learned from a few photos by {CITATION}" in card.text
    assert "Made-Up, learned" in card.text  # it has no base model on the Hub, so the family is named


def test_inspection(learned, pipe):
    assert "family      Made-Up\n" in table(inspect(learned, pipe))


def test_inspection_by_the_widths_alone(made_up):
    """The row says which encoders the family has, so a concept that fits no other family is recognized by its widths."""
    row = ModelFamily("Made-Up 2", {"text_encoder": "gemma2_2b", "text_encoder_2": "clip_l"}, label="Made-Up 2 or 3")
    rows = {"text_encoder": torch.ones(1, 2304), "text_encoder_2": torch.ones(1, 768)}
    concept = DirectionalInversion.from_embeddings("<dog>", rows)
    assert inspect(concept)["family"] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_FAMILIES, row.name, row)
        assert inspect(concept)["family"] == "Made-Up 2 or 3"


def test_conversion_there_and_back(learned, tmp_path, capsys):
    learned.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), "--to", "made_up_program", "--output", str(tmp_path / "theirs")]) == 0
    file = tmp_path / "theirs" / "dog.safetensors"
    assert f"Wrote {file}." in capsys.readouterr().out
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    assert set(header) - {"__metadata__"} == {"made_up_t5"}
    again = DirectionalInversion.from_pretrained(file)
    assert again.placeholder_token == "<dog>" and again.metadata["family"] == "Made-Up"
    torch.testing.assert_close(again.embeddings, learned.embeddings, rtol=1e-6, atol=0)
    # the same from a file without our header, as the program itself would write it
    plain = DirectionalInversion.from_pretrained({"made_up_t5": learned.embeddings["text_encoder"]}, "<dog>")
    assert plain.metadata["encoders"] == {"text_encoder": "t5xxl"}


def test_the_commands_help(made_up, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert '"made_up_method", learns by made-up steps' in text and "oft,made_up_method}" in text
    assert "Families: SDXL, " in text and "Made-Up." in text
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "onetrainer,made_up_program}" in capsys.readouterr().out


def test_the_command_trains_with_them(made_up, pipe, photos, tmp_path, monkeypatch):
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: pipe)
    command = [
        "train",
        str(tmp_path),
        "--model",
        "made-up",
        "--method",
        "made_up_method",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--placeholder_token", "<dog>", "--initializer_token", "dog"]) == 0
    concept = DirectionalInversion.from_pretrained(tmp_path / "out")
    assert (concept.metadata["family"], concept.metadata["method"]) == ("Made-Up", "made_up_method")
    assert diffusers_dti.load_directional_inversion(pipe, concept).placeholder_token == "<dog>"
