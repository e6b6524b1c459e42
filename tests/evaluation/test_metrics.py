import json
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import clip_tokenizer, t5_tokenizer

from diffusers_dti.data.images import Photo
from diffusers_dti.evaluation import metrics

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
TEXTS = ["a dog near the tower", "a dog on the beach.", "a red dog in a chef outfit"]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(model, folder, **processor):
    """Save a model with a `preprocessor_config.json` like those on the Hub, which are older than the library."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # initial weights are so small that all images look alike
            weight.copy_(torch.randn_like(weight))
    model.half().save_pretrained(folder)
    settings = {"do_resize": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 3} | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(**{k: v for k, v in TOWER.items() if "inter" not in k}, image_size=28, patch_size=14))
    shape = {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}}
    return save(model, tmp_path_factory.mktemp("dinov2"), image_processor_type="BitImageProcessor", **shape)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip") / "model"
    text = TOWER | {"vocab_size": len(t5_tokenizer(folder)), "max_position_embeddings": 64}
    config = SiglipConfig(text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8})
    size = {"height": 32, "width": 32}
    return save(SiglipModel(config), folder, image_processor_type="SiglipImageProcessor", size=size)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder / "tokenizer")
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": 2, "projection_dim": 16}
    vision = TOWER | {"image_size": 28, "patch_size": 14, "projection_dim": 16}
    tokenizer.save_pretrained(folder)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 28, "size": 28}
    return save(model, folder, **old)


@pytest.fixture
def images():
    """Make more images than a batch has."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (metrics.BATCH + 2, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(block.repeat(10, axis=0).repeat(10, axis=1)) for block in blocks]


@pytest.fixture
def subject(photos):
    mask = Image.new("L", photos[2].size)
    mask.paste(255, (5, 0, 16, 16))
    return SimpleNamespace(name="dog", photos=[Photo(photos[0]), Photo(photos[1]), Photo(photos[2], mask=mask)])


def pixels(image, side, crop):
    """(1, 3, crop, crop) in float64: shorter side to `side`, the middle, normalized."""
    scale = side / min(image.size)
    image = image.resize([int(scale * s) for s in image.size], Image.Resampling.BICUBIC)
    left, top = ((s - crop) // 2 for s in image.size)
    array = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.float64) / 255
    return torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1)[None]


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    return math.fsum(x * y for x, y in zip(a, b)) / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


@torch.no_grad()
def test_dinov2_is_the_mean_cosine_with_the_photos(dinov2, images, subject):
    from transformers import Dinov2Model

    metric = metrics.get_metric(f"dinov2={dinov2}", "cpu")
    got = metric(images, [""] * len(images), subject)
    model = Dinov2Model.from_pretrained(dinov2).double().eval()

    def cls(image):
        return model(pixels(image, 32, 28)).last_hidden_state[0, 0]

    wide = np.asarray(subject.photos[2].image).copy()
    wide[:, :5] = wide[:, 16:] = 0
    references = [cls(photo) for photo in (subject.photos[0].image, subject.photos[1].image, Image.fromarray(wide))]
    expected = [sum(cosine(cls(image), reference) for reference in references) / 3 for image in images]
    assert list(got) == ["dinov2"] and got["dinov2"] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01 and all(isinstance(x, float) for x in got["dinov2"])


def test_photos_are_encoded_once(dinov2, images, subject):
    metric, seen = metrics.ImageSimilarity(dinov2, "cpu"), []
    metric.model.register_forward_hook(lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True)
    for _ in range(2):
        metric(images[:4], TEXTS, subject)
    metric(images[:1], TEXTS, SimpleNamespace(name="cat", photos=subject.photos[:2]))
    assert seen == [3, 4, 4, 2, 1]


@torch.no_grad()
def test_siglip_is_the_probability_of_the_text(siglip, images, subject):
    from transformers import AutoTokenizer, SiglipModel

    texts = (TEXTS * 6)[: len(images)]
    got = metrics.get_metric(f"siglip={siglip}", "cpu")(images, texts, subject)
    tokenizer, model = AutoTokenizer.from_pretrained(siglip), SiglipModel.from_pretrained(siglip).double().eval()
    scale, bias, expected = model.logit_scale.exp().item(), model.logit_bias.item(), []
    for image, text in zip(images, texts):
        ids = tokenizer(text.rstrip(".") + ".")["input_ids"]
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (64 - len(ids))])
        image = model.vision_model(pixels(image, 32, 32)).pooler_output
        logit = scale * cosine(image, model.text_model(ids).pooler_output) + bias
        expected.append(1 / (1 + math.exp(-logit)))
    assert list(got) == ["siglip"] and got["siglip"] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


@torch.no_grad()
def test_clip_is_the_cosine_with_the_text(clip, images, subject):
    from transformers import CLIPModel, CLIPTokenizer

    texts = (TEXTS * 6)[: len(images)]
    got = metrics.get_metric(f"clip={clip}", "cpu")(images, texts, subject)
    tokenizer, model = CLIPTokenizer.from_pretrained(clip), CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
    model.vision_model.double(), model.visual_projection.double()  # transformers 4's mask of the text overflows in float64
    expected = []
    for image, text in zip(images, texts):
        states = model.text_model(torch.tensor([tokenizer(text.rstrip(".") + ".")["input_ids"]])).last_hidden_state
        image = model.visual_projection(model.vision_model(pixels(image, 28, 28)).pooler_output)
        expected.append(cosine(image, model.text_projection(states[:, -1])))
    assert list(got) == ["clip"] and got["clip"] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_texts_must_be_as_many_as_images(siglip, images, subject):
    with pytest.raises(ValueError):
        metrics.SigLIP(siglip, "cpu")(images, TEXTS, subject)


def test_models_compute_in_float32_with_pil(siglip):
    metric = metrics.SigLIP(siglip, "cpu")
    assert metric.model.dtype == torch.float32 and not metric.model.training
    assert "torchvision" not in sys.modules and "Fast" not in type(metric.processor).__name__
    wide = Image.new("RGBA", (9, 30))
    assert metric.pixels([wide, wide.convert("L")]).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("model", ["nobody/nothing", "{tmp}/nothing/at/all", "{tmp}"])
@pytest.mark.parametrize("name", ["dinov2", "siglip", "clip"])
def test_models_that_cannot_be_loaded(tmp_path, name, model):
    model = model.format(tmp=tmp_path)
    with pytest.raises(OSError, match=f"{model} cannot be loaded.*give the folder of a copy"):
        metrics.get_metric(f"{name}={model}", "cpu")


def test_the_default_models_are_the_papers(monkeypatch):
    opened = []
    monkeypatch.setattr(metrics, "_open", lambda opener, model, **kwargs: opened.append(model) or torch.nn.Identity())
    for name in metrics.METRICS:
        metrics.get_metric(name, "cpu")
    assert list(dict.fromkeys(opened)) == [
        "facebook/dinov2-base",
        "google/siglip-base-patch16-512",
        "openai/clip-vit-large-patch14",
    ]


def test_a_tokenizer_that_needs_a_package(siglip, monkeypatch):
    def need(*args, **kwargs):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(metrics.AutoTokenizer, "from_pretrained", need)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        metrics.SigLIP(siglip, "cpu")


@pytest.mark.parametrize("spec", ["dino", "", "dinov2=", "lpips=folder", "metric.txt:score"])
def test_unknown_metrics(spec):
    with pytest.raises(ValueError, match="dinov2, siglip, clip.*path/to/file.py:function"):
        metrics.get_metric(spec)


def test_a_function_as_a_metric(tmp_path, images, subject):
    word = f"neighbour{random.randrange(10**9)}"
    (tmp_path / f"{word}.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "json.py").write_text(  # does not replace the module of that name
        f"from __future__ import annotations\nfrom dataclasses import dataclass\nfrom {word} import WEIGHT\n"
        "@dataclass\nclass Width:\n    factor: float\n"
        "def width(images, texts, subject):\n"
        "    return {'width': [Width(WEIGHT).factor * p.width + len(subject.photos) for p in images]}\n"
    )
    path = list(sys.path)
    metric = metrics.get_metric(f"{tmp_path}/json.py:width", "cpu")
    assert metric(images[:2], TEXTS[:2], subject) == {"width": [83.0, 83.0]}
    assert sys.path == path and sys.modules["json"] is json
    with pytest.raises(ValueError, match="no function 'height'; it has Width, width"):
        metrics.get_metric(f"{tmp_path}/json.py:height")
    with pytest.raises(OSError, match="no file .*none.py"):
        metrics.get_metric(f"{tmp_path}/none.py:width")
