"""The settings: what they default to, what they refuse, and what they say about themselves."""

import inspect
import math
import re
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
import torch

from diffusers_dti import DirectionalInversion, DTIConfig
from diffusers_dti.concept.methods import METHODS, Method
from diffusers_dti.families import FAMILIES
from diffusers_dti.families.sana import Sana
from diffusers_dti.families.stable_diffusion import StableDiffusion
from diffusers_dti.families.stable_diffusion import StableDiffusionXL as SDXL
from diffusers_dti.families.wan import Wan
from diffusers_dti.training.config import ResolvedConfig


def test_the_family_fills_in_defaults():
    config = DTIConfig(train_batch_size=2).resolve(SDXL)
    assert (config.resolution, config.gradient_accumulation_steps, config.kappa) == (768, 1, 1e-4)
    assert config.train_batch_size == 2 and config.learning_rate == 0.1
    assert DTIConfig(method="ti").resolve(SDXL).learning_rate == 0.005


@pytest.mark.parametrize("family", [SDXL, Wan])
def test_the_rate_of_dti_goes_with_its_steps(family):
    """rate x sqrt(steps) stays. Whatever else walks, and a run that may be made longer, has the authors' rate and steps."""
    for given, expected in (({}, (100, 0.1)), ({"max_train_steps": 25}, (25, 0.2)), ({"max_train_steps": 400}, (400, 0.05))):
        config = DTIConfig(**given).resolve(family)
        assert (config.max_train_steps, config.learning_rate, config.lr_scheduler) == (*expected, "cosine")
    assert DTIConfig(lr_scheduler="linear").resolve(family).learning_rate == 0.1
    assert DTIConfig(learning_rate=0.3).resolve(family).learning_rate == 0.3
    others = [{"lr_scheduler": "constant"}, {"optimizer": "adamw"}, {"optimizer": "radam"}, {"preset": "paper"}]
    for given in [*others, {"adapter": "lora"}]:
        config = DTIConfig(**given).resolve(family)
        assert (config.max_train_steps, config.learning_rate) == (family.defaults["max_train_steps"], 0.01)
        assert config.lr_scheduler == "constant"


def test_methods_are_settings():
    """The authors' launchers."""
    for settings, expected in (
        ({}, {"optimizer": "rsgd", "adapter": None, "dco_beta": 0, "reg_lambda": 0}),
        ({"preset": "paper"}, {"learning_rate": 0.01, "max_train_steps": 400}),
        ({}, {"context_lambda": 0, "context_prompts": None}),
        ({"method": "ti"}, {"optimizer": "adamw", "learning_rate": 0.005, "reg_lambda": 0, "max_train_steps": 400}),
        ({"method": "ti"}, {"kappa": 0, "token_scale": "mean"}),
        ({"method": "crossinit", "kappa": 0.0, "token_scale": "mean"}, {"kappa": 0}),
        ({"method": "crossinit"}, {"optimizer": "adamw", "learning_rate": 0.005, "reg_lambda": 1e-5}),
        ({"method": "dco"}, {"adapter": "lora", "adapter_rank": 4, "dco_beta": 1000, "max_train_steps": 250}),
        ({"method": "dco"}, {"learning_rate": 0.01, "lr_scheduler": "constant"}),
        ({"method": "oft"}, {"adapter": "oft", "adapter_learning_rate": 5e-5, "dco_beta": 0, "max_train_steps": 150}),
        ({"method": "dco", "max_train_steps": 9, "dco_beta": 0}, {"max_train_steps": 9, "dco_beta": 0, "adapter": "lora"}),
        ({"method": "ti", "adapter": "oft"}, {"adapter": "oft", "optimizer": "adamw", "max_train_steps": 400}),
    ):
        config = DTIConfig(**settings).resolve(SDXL)
        assert {k: getattr(config, k) for k in expected} == expected


def test_the_effective_rate_is_the_authors():
    paper = DTIConfig(preset="paper")
    assert paper.resolve(SDXL).effective_learning_rate == pytest.approx(0.04)
    assert replace(paper, gradient_accumulation_steps=2).resolve(SDXL).effective_learning_rate == pytest.approx(0.08)
    assert replace(paper, scale_lr=False).resolve(SDXL).effective_learning_rate == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora"}, "method must be one of dti, ti, crossinit, dco, oft, got 'lora'"),
        ({"pooling": "mean"}, "pooling must be one of None, eos, legacy, got 'mean'"),
        ({"method": None}, "method must be one of dti, .*, got None"),
        ({"learnable_property": "face"}, "learnable_property must be one of object, style, got 'face'"),
        (
            {"token_scale": "median"},
            "token_scale must be one of mean, min, max, initializer, or a positive number, got",
        ),
        ({"token_scale": 0.0}, "token_scale must be .* a positive number, got 0.0"),
        ({"token_scale": float("nan")}, "token_scale must be .* a positive number, got nan"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1, got 0"),
        ({"resolution": -1}, "resolution must be at least 1"),
        ({"checkpointing_steps": 10}, "output_dir"),
        ({"templates": ["a photo"]}, "templates need a"),
        ({"context_prompts": ["a {}", "a photo"]}, "context_prompts need a"),
        ({"context_lambda": -1e-4}, "context_lambda must be at least 0, got -0.0001"),
        ({"context_lambda": float("nan")}, "context_lambda must be at least 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of None, rsgd, radam, adamw"),
        ({"adapter": "loha"}, "adapter must be one of None, lora, oft"),
        ({"method": "ti", "optimizer": "rsgd"}, "trains raw rows"),
        ({"method": "ti", "optimizer": "radam"}, "trains raw rows"),
        ({"method": "crossinit", "train_magnitude": True}, "trains raw rows"),
        ({"reg_lambda": 1e-5}, "kappa"),
        ({"method": "ti", "kappa": 0.1}, 'method "ti" trains raw rows, .* no prior .* leave out `kappa`'),
        ({"method": "crossinit", "token_scale": "min"}, "no fixed norm: leave out .*`token_scale`"),
        ({"method": "ti", "token_scale": 0.4}, "no fixed norm: leave out .*`token_scale`"),
        ({"dco_beta": 1000.0}, 'use adapter="lora"'),
        ({"adapter_rank": 0}, "adapter_rank must be at least 1"),
        ({"validation_steps": None}, "validation_steps must be at least 1, got None"),
        ({"dco_beta": -5.0, "adapter": "lora"}, "dco_beta must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0"),
        ({"beta": 1.0}, "beta must be"),
        ({"method": "oft", "adapter": "lora"}, "has its own adapter, oft"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DTIConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_train_steps": "300"}, "max_train_steps must be int | None, got '300'."),
        ({"max_train_steps": 1.5}, "max_train_steps must be int | None, got 1.5."),
        ({"max_train_steps": True}, "max_train_steps must be int | None, got True."),
        ({"seed": None}, "seed must be int, got None."),
        ({"learning_rate": "0.1"}, "learning_rate must be float | None, got '0.1'."),
        ({"random_flip": "no"}, "random_flip must be bool, got 'no'."),
        ({"scale_lr": 1}, "scale_lr must be bool, got 1."),
        ({"token_scale": True}, "token_scale must be str | float, got True."),
        ({"token_scale": None}, "token_scale must be str | float, got None."),
        ({"placeholder_token": 3}, "placeholder_token must be str | None, got 3."),
        ({"templates": "a {}"}, "templates must be Sequence[str] | None, got 'a {}'."),
        ({"templates": ["a {}", 3]}, "templates must be Sequence[str] | None, got ['a {}', 3]."),
        ({"output_dir": 3}, "output_dir must be str | Path | None, got 3."),
        ({"report_to": "x" * 80 + "y", "seed": "x" * 5000}, f"seed must be int, got '{'x' * 79}."),
    ],
)
def test_values_of_another_type_are_refused(settings, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        DTIConfig(**settings)


@pytest.mark.parametrize("word", [3, ["dog", 3], {"<a>": 3}, {3: "dog"}, {"<a>": ["dog", None]}, b"dog"])
def test_an_initializer_of_another_type_is_refused(word):
    with pytest.raises(TypeError, match=r"^initializer_token must be str \| DirectionalInversion \| Sequence\[.*, got .*\.$"):
        DTIConfig(initializer_token=word)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_whole_numbers_of_more_than_64_bits_are_refused(value):
    """torch would refuse them amid the run, and numpy count a seed modulo 2⁶⁴."""
    with pytest.raises(
        ValueError, match=f"^seed must be a whole number of 64 bits, from -2\\*\\*63 to 2\\*\\*63 - 1, got {value}.$"
    ):
        DTIConfig(seed=value)
    assert (
        DTIConfig(seed=2**63 - 1).seed == 2**63 - 1 and DTIConfig(seed=-(2**63), learning_rate=10**20).learning_rate == 10**20
    )


def test_values_of_a_fitting_type_are_taken(tmp_path):
    """A whole number for a float, a tuple for a list, a path for text."""
    dog = DirectionalInversion.from_embeddings("<dog>", {"text_encoder": torch.ones(1, 16)})
    config = DTIConfig(
        learning_rate=1,
        token_scale=2,
        templates=("a {}",),
        output_dir=tmp_path,
        initializer_token={"<a>": [dog, "cat"], "<b>": "b"},
    )
    assert (config.resolve(SDXL).learning_rate, config.token_scale) == (1, 2)
    assert DTIConfig(seed=-(2**40), validation_prompt=["a {}"]).seed == -(2**40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be finite, got inf."),
        ({"learning_rate": 10**400}, f"learning_rate must be finite, got {'1' + '0' * 79}."),
        ({"kappa": math.inf}, "kappa must be finite, got inf."),
        ({"kappa": math.nan}, "kappa must be at least 0, got nan."),
        ({"beta": math.nan}, "beta must be at least 0, got nan."),
        ({"token_scale": math.inf}, "token_scale must be from 1e-10 to 1e+10, got inf."),
        ({"token_scale": 1e39}, "token_scale must be from 1e-10 to 1e+10, got 1e+39."),
        ({"token_scale": 1e-39}, "token_scale must be from 1e-10 to 1e+10, got 1e-39."),
        ({"placeholder_token": ""}, "The placeholder token must be a word such as '<dog>', got ''."),
        ({"placeholder_token": "\ud800"}, "The placeholder token must be a word such as '<dog>', got '\\ud800'."),
        ({"initializer_token": ""}, 'initializer_token must name a word: leave it out for "object" or "style".'),
        ({"initializer_token": []}, 'initializer_token must name a word: leave it out for "object" or "style".'),
        ({"initializer_token": ["dog", ""]}, 'initializer_token must name a word: leave it out for "object" or "style".'),
        ({"initializer_token": {"<a>": ""}}, 'initializer_token must name a word: leave it out for "object" or "style".'),
    ],
)
def test_values_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DTIConfig(**settings)


def test_an_adapter_that_would_never_be_trained_is_refused():
    with pytest.raises(ValueError, match="join in at step 9, and there are only 9"):
        DTIConfig(adapter="lora", adapter_start_step=9, max_train_steps=9).resolve(SDXL)


def test_every_setting_is_in_the_docstring_with_its_help():
    doc = inspect.getdoc(DTIConfig)
    args = doc.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^ {4}(\w+): ", args, re.M) == [f.name for f in fields(DTIConfig)]
    words = " ".join(args.split())
    for f in fields(DTIConfig):
        assert f"{f.name}: {' '.join(f.metadata['help'].split())}." in words and "%" not in f.metadata["help"]
    assert doc.endswith("```") and "Raises:" in doc and max(map(len, doc.splitlines())) <= 128


def test_choices_can_be_read_from_the_fields():
    choices = {f.name: f.metadata["choices"] for f in fields(DTIConfig) if "choices" in f.metadata}
    assert choices.pop("method")() == ("dti", "ti", "crossinit", "dco", "oft")
    assert choices == {
        "optimizer": ("rsgd", "radam", "adamw"), "lr_scheduler": ("constant", "linear", "cosine", "late"),
        "timestep_sampling": ("uniform", "stratified"), "adapter": ("lora", "oft"), "learnable_property": ("object", "style"),
        "pooling": ("eos", "legacy"), "mixed_precision": ("bf16",), "prefix_space": ("absorbed", "kept"), "preset": ("paper",),
    }  # fmt: skip


def test_a_method_that_is_registered_later_is_a_choice(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("made up", "nobody", {"learning_rate": 0.5}))
    assert DTIConfig(method="mine").resolve(SDXL).learning_rate == 0.5
    with pytest.raises(ValueError, match="dco, oft, mine, got 'other'"):
        DTIConfig(method="other")


def test_settings_that_do_not_affect_the_result():
    """Any other one in a concept's metadata, or required to be the same when a run is resumed, would be a nuisance."""
    assert [f.name for f in fields(DTIConfig) if not f.metadata["affects_result"]] == [
        "heldout_loss_steps", "gradient_checkpointing", "gradient_checkpointing_interval", "output_dir", "checkpointing_steps",
        "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompt", "validation_steps", "report_to",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_resolved_settings_are_complete(family, method):
    config = DTIConfig(method=method).resolve(family)
    hints = get_type_hints(ResolvedConfig)
    for name in ResolvedConfig.__annotations__:
        assert getattr(config, name) is not None and type(None) not in getattr(hints[name], "__args__", ())
    assert isinstance(config, ResolvedConfig) and config.resolve(family) == config


def test_the_papers_preset_and_where_it_differs():
    """A list of every field in which the authors' code and our defaults differ."""
    for family in (StableDiffusion, SDXL, Sana, Wan):
        ours, paper = DTIConfig().resolve(family), DTIConfig(preset="paper").resolve(family)
        differing = {f.name: (getattr(ours, f.name), getattr(paper, f.name)) for f in fields(DTIConfig)}
        differing = {name: both for name, both in differing.items() if both[0] != both[1]}
        assert differing == {
            "preset": (None, "paper"),
            "max_train_steps": (100, family.defaults["max_train_steps"]),
            "learning_rate": (0.1, 0.01),
            "lr_scheduler": ("cosine", "constant"),
            "pooling": ("eos", "legacy"),
            "initializer_context": (True, False),
            "prefix_space": ("absorbed", "kept"),
        }
    own = DTIConfig(preset="paper", pooling="eos").resolve(SDXL)  # what is given comes first
    assert (own.pooling, own.prefix_space) == ("eos", "kept")
