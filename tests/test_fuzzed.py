"""Thousands of damaged inputs: each is read, or refused by an error that names it. Nothing else happens."""

import dataclasses
import io
import json
import random
import unicodedata

import pytest
import torch
from fuzzing import WEIRD, damaged_bytes, damaged_json, damaged_safetensors, hostile_pickle
from PIL import Image

from diffusers_dti import DirectionalInversion, DTIConfig
from diffusers_dti.concept.convert import convert
from diffusers_dti.data.images import load_photos
from diffusers_dti.data.subjects import read_subjects
from diffusers_dti.evaluation.prompts import read_prompts
from diffusers_dti.evaluation.store import Store
from diffusers_dti.families import find_family
from diffusers_dti.training import checkpoint

REFUSALS = (ValueError, OSError, TypeError)
SHORT, LONG = 1, 100  # times the number of inputs of each test
AMOUNTS = [SHORT, pytest.param(LONG, marks=pytest.mark.long)]


def check_message(error, name):
    """One clear error: it names what is wrong, it can be read at a glance, and it does nothing to a terminal."""
    text = str(error)
    assert name in text, text[:500]
    assert len(text) < 1000 and not [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"], repr(text[:500])


def tree(folder):
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def concept_files(tmp_path_factory):
    """Valid files of every format, as bytes by name."""
    folder = tmp_path_factory.mktemp("valid")
    generator = torch.Generator().manual_seed(0)
    rows = {"text_encoder": torch.randn(2, 16, generator=generator), "text_encoder_2": torch.randn(2, 24, generator=generator)}
    made = DirectionalInversion.from_embeddings(
        "<dog>", rows, {"encoders": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}}
    )
    made.save_pretrained(folder / "diffusers")
    for program in ("comfyui", "a1111", "onetrainer"):
        convert(folder / "diffusers", program, folder / program)
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[f"{path.parent.name}-{path.name}"] = path.read_bytes()
    return files


@pytest.mark.parametrize("amount", AMOUNTS)
def test_concept_files(concept_files, amount, tmp_path):
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    marker = tmp_path / "marker"
    for number in range(300 * amount):
        if rng.random() < 0.3:
            path, data = tmp_path / "concept.pt", hostile_pickle(rng, str(marker))
        else:
            valid = concept_files[rng.choice(sorted(concept_files))]
            path, data = tmp_path / "concept.safetensors", damaged_safetensors(valid, rng)
        path.write_bytes(data)
        before = tree(tmp_path)
        try:
            read = DirectionalInversion.from_pretrained(path, allow_pickle=True)
        except REFUSALS as error:
            check_message(error, path.name)
            outcomes["refused"] += 1
        else:
            assert all(rows.isfinite().all() and (rows.norm(dim=-1) > 0).all() for rows in read.embeddings.values()), number
            assert len(repr(read)) < 2000
            outcomes["read"] += 1
        assert tree(tmp_path) == before, number
        path.unlink()
    assert min(outcomes.values()) > 20 * amount, outcomes


@pytest.mark.parametrize("amount", AMOUNTS)
def test_settings(sdxl, amount):
    """A setting of another type is refused by its name. Nothing is trained with it."""
    rng, family, refused = random.Random(1), find_family(sdxl), 0
    names = [f.name for f in dataclasses.fields(DTIConfig)]
    for _ in range(300 * amount):
        name, value = rng.choice(names), rng.choice(WEIRD)
        try:
            resolved = dataclasses.replace(DTIConfig(), **{name: value}).resolve(family)
        except (ValueError, TypeError) as error:
            check_message(error, "")
            assert name.removesuffix("_token") in str(error).lower()
            refused += 1
        else:
            assert value is None or type(getattr(resolved, name)) is type(value) or isinstance(value, str | int), (name, value)
    assert refused > 100 * amount


@pytest.mark.parametrize("amount", AMOUNTS)
def test_subjects(photos, amount, tmp_path):
    rng, path, refused = random.Random(2), tmp_path / "subjects.json", 0
    (tmp_path / "dog").mkdir()
    for number, photo in enumerate(photos[:2]):
        photo.save(tmp_path / "dog" / f"{number}.png")
    entry = {"path": "dog", "class": "dog", "initialization": "corgi", "template": ["my {}", "a {} here"], "images": ["0.png"]}
    valid = json.dumps({"dog": entry, "cat": {"path": "dog", "class": "cat", "prompts": ["a {} there"]}})
    for _ in range(200 * amount):
        path.write_bytes(damaged_json(valid, rng))
        try:
            read_subjects(path)
        except REFUSALS as error:
            check_message(error, path.name)
            refused += 1
    assert refused > 60 * amount


@pytest.mark.parametrize("amount", AMOUNTS)
def test_prompts(amount, tmp_path):
    rng, path = random.Random(3), tmp_path / "prompts.txt"
    for _ in range(100 * amount):
        valid = "a {} on the beach\na café for {}\n# a comment\n".encode(rng.choice(["utf-8", "utf-16"]))
        path.write_bytes(damaged_bytes(valid, rng))
        try:
            read_prompts(path)
        except REFUSALS as error:
            check_message(error, path.name)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_photos(amount, tmp_path):
    rng, folder, refused = random.Random(4), tmp_path / "photos", 0
    folder.mkdir()
    files = {}
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp"):
        buffer = io.BytesIO()
        Image.effect_noise((24, 16), 90).convert("RGB").save(buffer, kind)
        files[kind] = buffer.getvalue()
    for _ in range(100 * amount):
        kind = rng.choice(sorted(files))
        path = folder / f"photo.{kind}"
        path.write_bytes(damaged_bytes(files[kind], rng))
        (folder / "photo.txt").write_bytes(damaged_bytes("a {} in Kraków".encode(), rng))
        try:
            (photo,) = load_photos(folder)
            assert photo.image.mode == "RGB"
        except REFUSALS as error:
            check_message(error, "photo")
            refused += 1
        path.unlink()
    assert refused > 20 * amount


@pytest.mark.parametrize("amount", AMOUNTS)
def test_stores(amount, tmp_path):
    """A store with torn lines still has the others."""
    rng, path, code = random.Random(5), tmp_path / "store.jsonl", tmp_path / "code.py"
    code.write_text("x = 1")
    Store(path, [code]).put({"a": 1}, {"loss": 0.5})
    valid = path.read_bytes()
    for _ in range(100 * amount):
        path.write_bytes(damaged_json(valid.decode(), rng) + b"\n")
        store = Store(path, [code])
        store.put({"a": 2}, {"loss": 0.25})
        assert store.get({"a": 2}) == {"loss": 0.25}
        assert len(store.rows()) <= 2


@pytest.mark.parametrize("amount", AMOUNTS)
def test_checkpoints(sdxl, photos, amount, tmp_path):
    """A damaged one is passed over, and can't be named either."""
    from diffusers_dti import DTITrainer

    settings = {"initializer_token": "dog", "resolution": 16, "train_batch_size": 1, "max_train_steps": 1}
    DTITrainer(sdxl, **settings, checkpointing_steps=1, output_dir=tmp_path).fit(photos[:1])
    path, rng, passed = tmp_path / "checkpoint-1" / checkpoint.STATE, random.Random(6), 0
    valid = path.read_bytes()
    for _ in range(100 * amount):
        path.write_bytes(damaged_safetensors(valid, rng))
        passed += checkpoint.find_checkpoint(tmp_path, "latest") is None
        try:
            checkpoint.read_settings(tmp_path, "checkpoint-1")
        except REFUSALS as error:
            check_message(error, "checkpoint-1")
    assert passed > 20 * amount
