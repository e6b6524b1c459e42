"""The world's drawings, captions and verifier; its gates are in the long tests."""

import importlib
import random
from dataclasses import replace

import asides
import captions
import coverage
import gates
import learned
import measure
import pytest
import report
import rows
import scenes
import study
import torch
import verifier
import walk

from diffusers_dti import DTIConfig
from diffusers_dti.families.sana import Sana
from diffusers_dti.families.stable_diffusion import StableDiffusionXL
from diffusers_dti.families.wan import Wan


def test_the_verifier_reads_fresh_renders_and_noisy_ones():
    rng = random.Random(1)
    drawn = [scenes.random_scene(rng, list(scenes.BUNDLES)) for _ in range(100)]
    pictures = torch.stack([scenes.render(s, 32) for s in drawn])
    noisy = (pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert {s.has_second for s in drawn} == {True, False}
    for images in (pictures, noisy):
        assert verifier.read(images) == [whole(s) for s in drawn]


def whole(scene):
    """The attributes of a scene, with those that a caption cannot choose."""
    return scene.attributes() | {key: getattr(scene, key) for key in ("size", "second_shape", "second_fill")}


def test_the_verifier_says_when_it_cannot_tell():
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for found in verifier.read(noise):
        assert found["shape"] == found["pattern"] == "unclear"
    scene = scenes.Scene(scenes.SEEN_BUNDLES[5], "small", "on the left", "pink", "striped", "circle", "blue")
    picture, orange = scenes.render(scene, 32), torch.tensor([1.0, 0.45, 0.0])[:, None, None]
    _, fill, _ = scenes.masks(scene.bundle.shape, scenes.SIZES["small"], scene.place, 32)
    second = scenes.second_mask("circle", scene.place, 32)
    for mask, attribute in ((fill, "fill"), (second, "second_fill")):
        found = verifier.read((picture * (1 - mask) + orange * mask)[None])[0]
        assert {key for key, value in found.items() if value != whole(scene)[key]} == {attribute}
        assert found[attribute] == "unclear"


def test_a_wrong_picture_scores_what_it_has_right():
    bundle = scenes.TEST_SUBJECTS[0]
    asked = measure.prompts(bundle, measure.TOKEN)
    right = torch.stack([scenes.render(p.scene, 32) for p in asked])
    assert measure.scores(right, asked) == {"subject": 1.0, "prompt": 1.0}
    other = scenes.Bundle(bundle.shape, bundle.fill, "no", "no")
    bare = torch.stack([scenes.render(replace(p.scene, bundle=other), 32) for p in asked])
    found = measure.scores(bare, asked)
    # 10 x 4 subject attributes less 10 changed ones are 30, 14 of them borders and dots. The others are 10 changes, 4 of them
    # fills, 3 x 4 of scenes with one object and 7 x 5 of scenes with two.
    assert found == pytest.approx({"subject": 1 - 14 / 30, "prompt": 1 - 4 / 57})
    texts = [p.text for p in asked]
    assert texts[0] == "a large <thing> on the left on a striped pink background"
    assert texts[3] == "a <thing> left of a tiny purple square on a checkered mint background"
    assert texts[9].startswith("on a striped mint background a tiny ") and texts[9].endswith(
        " left of a <thing> with no border and no dot"
    )


def test_a_second_object_is_opposite_and_tiny():
    rng = random.Random(2)
    for scene in (s for s in (scenes.random_scene(rng) for _ in range(60)) if s.has_second):
        first = scenes.masks(scene.bundle.shape, scenes.SIZES["small"], scene.place, 32).sum(0)
        second = scenes.second_mask(scene.second_shape, scene.place, 32)
        assert not (first * second).any() and 0.04 < second.mean() < 0.12
        dx, dy = scenes.PLACES[scene.place]
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        apart = [(m * axis).sum() / m.sum() for axis in (x, y) for m in (first, second)]
        assert dx * (apart[0] - apart[1]) + dy * (apart[2] - apart[3]) > 10
        text = scene.caption("<thing>")
        relation = {"on the left": "left of", "on the right": "right of", "at the top": "above", "at the bottom": "below"}
        assert f"a <thing> {relation[scene.place]} a tiny {scene.second_fill} {scene.second_shape} on a " in text


def test_subjects_are_kept_out_of_pretraining():
    kept = scenes.DEV_SUBJECTS + scenes.TEST_SUBJECTS + scenes.FRESH_SUBJECTS
    assert len(set(kept)) == 18 and set(kept) <= set(scenes.HELD_BUNDLES)
    assert not set(scenes.HELD_BUNDLES) & set(scenes.SEEN_BUNDLES) and len(scenes.SEEN_BUNDLES) == 270
    assert set(captions.NOUNS.values()) <= set(scenes.SEEN_BUNDLES)
    rng = random.Random(0)
    assert all(scenes.random_scene(rng).bundle in scenes.SEEN_BUNDLES for _ in range(2000))


def test_photos_show_one_subject_in_different_scenes():
    found = verifier.read(torch.stack([gates_tensor(p) for p in scenes.photos(scenes.DEV_SUBJECTS[2])]))
    for attribute, value in vars(scenes.DEV_SUBJECTS[2]).items():
        assert {f[attribute] for f in found} == {value}
    for attribute, count in (("size", 2), ("place", 5), ("background", 5), ("pattern", 3)):
        assert len({f[attribute] for f in found}) == count


def gates_tensor(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


WORLDS = [name for name in gates.WORLDS if gates.folder_of(name).is_dir()]


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return gates.open_world(request.param)


def test_every_word_of_the_world_is_one_token(world):
    rng = random.Random(5)
    for _ in range(200):
        caption, _ = captions.random_caption(scenes.random_scene(rng, list(scenes.BUNDLES)), rng, 0.8)
        for tokenizer, _ in gates.encoders_of(world).values():
            pieces = len(tokenizer.tokenize("beside")) - 1 if "beside" in caption else 0  # the only word that is cut
            assert len(tokenizer.tokenize(caption)) == len(caption.split()) + pieces < tokenizer.model_max_length - 2


# mean (at least, at most) and largest spread of the vocabulary's norms
NORMS = {
    "sdxl": {"text_encoder": (0.37, 0.41, 0.03), "text_encoder_2": (0.43, 0.47, 0.03)},
    "sana": {"text_encoder": (1.7, 1.85, 0.25)},
    "wan": {"text_encoder": (7.9, 8.1, 0.45)},
    "zimage": {"text_encoder": (1.15, 1.25, 0.15)},
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_world_is_like_the_real_thing(name):
    world = gates.open_world(name)
    assert type(world).__name__ == gates.WORLDS[name].pipeline
    for encoder, (low, high, spread) in NORMS[name].items():
        norms = getattr(world, encoder).get_input_embeddings().weight.norm(dim=-1)
        assert low < norms.mean() < high and norms.std() < spread and norms.min() > low / 2
    assert sum(f.stat().st_size for f in gates.folder_of(name).rglob("*.safetensors")) <= 12e6
    if name == "sdxl":
        assert world.text_encoder.config.eos_token_id == 2 == world.text_encoder_2.config.eos_token_id
        assert world.unet.config.addition_embed_type == "text_time"
    if name == "sana":
        assert world.scheduler.config.use_flow_sigmas and world.scheduler.config.prediction_type == "flow_prediction"
        assert world.tokenizer("").input_ids == [world.tokenizer.bos_token_id]
        assert not {"<unused0>", "\n"} & set(world.tokenizer.all_special_tokens)
        assert world.tokenizer("\n").input_ids[1] == world.tokenizer.convert_tokens_to_ids("\n")
        long = world("a red star", num_inference_steps=1, height=32, width=32, use_resolution_binning=False)
        assert long.images[0].size == (32, 32)  # also with the instruction that the call puts before every prompt
    if name == "wan":
        encoder = world.text_encoder
        assert len(encoder.shared.weight) == len(world.tokenizer) + 84  # spare rows
        assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
        assert world.tokenizer("").input_ids == [world.tokenizer.eos_token_id] == [1]
        assert world.scheduler.config.use_flow_sigmas and world.scheduler.config.prediction_type == "flow_prediction"
        assert (world.vae_scale_factor_spatial, world.vae_scale_factor_temporal) == (8, 4)
    if name == "zimage":
        message = [{"role": "user", "content": "a star"}]
        text = world.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        assert text == "<|im_start|>user\na star<|im_end|>\n<|im_start|>assistant\n"
        pieces = ["<|im_start|>", "user", "Ċ", "a", "Ġstar", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
        assert world.tokenizer.tokenize(text) == pieces
        ((states,), _) = world.encode_prompt("a star", do_classifier_free_guidance=False)
        assert states.shape == (len(pieces), 128)


def test_a_clip_is_of_its_subject():
    world = gates.open_world("wan")
    scene = scenes.Scene(scenes.DEV_SUBJECTS[0], "large", "on the left", "pink", "plain")
    settings = {"num_inference_steps": 12, "guidance_scale": 3.0} | gates.WORLDS["wan"].call | {"num_frames": 5}
    generator = torch.Generator().manual_seed(0)
    (frames,) = world(scene.caption(), generator=generator, output_type="pt", **settings).frames
    assert frames.shape == (5, 3, 64, 64)
    for found in verifier.read(frames[:2]):
        assert found["shape"] == scene.bundle.shape and found["fill"] == scene.bundle.fill and found["background"] == "pink"


def test_drawn_clips_start_as_the_picture_and_move():
    rng = random.Random(4)
    for scene in (scenes.random_scene(rng) for _ in range(10)):
        drawn = scenes.clip(scene, 64, 9)
        assert torch.equal(drawn[:, 0], scenes.render(scene, 64))
        assert torch.equal(drawn[:, 0], drawn[:, 8]) == scene.has_second
        assert torch.equal(drawn[:, :, 0, 0], drawn[:, :1, 0, 0].expand(-1, 9))  # a corner: the object never comes there


def test_a_few_pictures_follow_their_prompts(world):
    """A glance at gate 3; all of it is a long test."""
    rng = random.Random(8)
    held = [scenes.random_scene(rng, scenes.HELD_BUNDLES) for _ in range(8)]
    shares = gates.accuracy(gates.generate(world, [s.caption() for s in held]), [s.attributes() for s in held])
    assert shares["shape, fill, background"] >= 7 / 8


@pytest.mark.long
def test_the_gates(world):
    for tokenizer, _ in gates.encoders_of(world).values():
        assert min(coverage.coverage(tokenizer, gates.world_of(world).quoted).values()) > 0
    measured = gates.measure(world, 512)
    assert min(measured["renders"].values()) >= 0.99
    assert min(measured["reconstructions"].values()) >= 0.98
    held = measured["prompts"]
    assert min(held["shape"], held["fill"], held["background"]) >= 0.95
    assert held["shape, fill, background"] >= gates.world_of(world).jointly


@pytest.mark.parametrize("name", WORLDS)
def test_pretraining_runs_from_the_start(name, tmp_path):
    """Two steps of each stage, and the folder that comes of it; how well it learns is what the gates measure."""
    script = importlib.import_module(f"pretrain_{name}")
    denoise = script.train_unet if name == "sdxl" else script.train_transformer
    script.train_vae(tmp_path, steps=2)
    script.train_text(tmp_path, steps=2)
    denoise(tmp_path, steps=2, batch=4)
    denoise(tmp_path, steps=3, batch=4)  # goes on from the checkpoint
    script.export(tmp_path, tmp_path / "world")
    made, side = gates.open_world(tmp_path / "world"), gates.WORLDS[name].pixels
    assert gates.generate(made, ["a large red star"]).shape == (1, 3, side, side)
    assert len(made.tokenizer) == len(gates.open_world(name).tokenizer)


def test_the_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """With less of everything."""
    monkeypatch.setattr(coverage, "BATCHES", 20)
    monkeypatch.setattr(gates, "RENDERS", 20)
    monkeypatch.setattr("sys.argv", ["gates.py", "--prompts", "4"])
    gates.main()
    printed = capsys.readouterr().out
    assert "norms of text_encoder_2, 921 rows" in printed and "meet all of 162 reachable rows" in printed


def test_the_sheet_of_a_learned_subject(tmp_path, monkeypatch, capsys):
    black, asked = torch.zeros(10, 3, 32, 32), []
    monkeypatch.setattr(measure, "learn", lambda pipe, subject, seed: (black, {"subject": 0.5, "prompt": 1.0}, None))

    def in_words(pipe, subject, word, seed):
        asked.append((subject, word))
        return black, {"subject": 0.25, "prompt": 1.0}

    monkeypatch.setattr(measure, "in_words", in_words)
    monkeypatch.setattr("sys.argv", ["learned.py", "--world", "sdxl", "--subject", "1", "--out", str(tmp_path / "sheet.png")])
    learned.main()
    subject = scenes.DEV_SUBJECTS[1]
    assert asked == [(subject, subject.shape), (subject, None)]
    assert "Directional Textual Inversion   subject 0.50  prompt 1.00" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").is_file()


def test_the_study(tmp_path, monkeypatch, capsys):
    """One subject of one world, a few rows and steps; the second time from the results kept."""
    ti = {"method": "ti", "learning_rate": 0.02}
    few = [
        rows.Row(rows.FLOOR),
        rows.Row("DTI", {"lr_scheduler": "linear"}, (2, 4)),
        rows.Row("DTI, the old default", {"lr_scheduler": "constant"}, (2, 4)),
        rows.Row("TI, best rate", ti | {"lr_scheduler": "cosine"}, (2, 4), rows.RESCALED),
        rows.Row("from another noun", {"method": "dco"}, (2,), start=rows.RANDOM),
    ]
    monkeypatch.setitem(study.PARTS, "main", rows.Part({"sdxl": few}, ("test",), 1))
    subjects = {key: [] for key in study.SUBJECTS} | {"test": scenes.TEST_SUBJECTS[:1]}
    monkeypatch.setattr(study, "SUBJECTS", subjects)
    monkeypatch.setattr(measure, "PROMPTS", measure.PROMPTS[:1])
    monkeypatch.setitem(asides.ASIDES, "photo", lambda world: [["a", "b"], ["photos of", world]])
    monkeypatch.setattr(report, "STUDIED", ("sdxl",))
    monkeypatch.setattr(report, "FINAL", {"sdxl": 4})
    monkeypatch.setattr(report, "OURS", "DTI @4")
    page = tmp_path / "study.md"
    names = ("summary", "main sdxl test", "differences sdxl", "seeds", "heldout", "photo sdxl", "prior sdxl")
    page.write_text("Before." + "".join(f"<!-- table: {name} -->\nold\n<!-- end -->" for name in names) + "After.")
    arguments = [
        "--parts",
        "main",
        "photo",
        "--worlds",
        "sdxl",
        "--results",
        str(tmp_path / "study.jsonl"),
        "--pages",
        str(page),
    ]
    for missing in (7, 0):
        monkeypatch.setattr("sys.argv", ["study.py", *arguments])
        study.main()
        assert f"{missing} of 7 runs to make" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.") and "old\n" not in text
    assert text.count("\n| DTI @") == 2 and "| TI, best rate, rescaled @4 | " in text and "| photos of | sdxl |" in text
    assert "| test | DTI, the old default @4 | +" in text and "Not measured yet." in text
    assert page.with_suffix(".png").is_file()


def test_paired_differences():
    def record(run, subject, seed, score):
        return {"run": run, "subject": subject, "prompt": "", "seed": seed, "scores": {"subject": score, "prompt": 1.0}}

    of = [record("a", "x", 0, 0.9), record("b", "x", 0, 0.5), record("a", "y", 0, 0.2), record("b", "y", 1, 0.9)]
    (found,) = report.differences(of, "a", "b")
    assert found["subject"] == "x" and found["scores"] == pytest.approx({"subject": 0.4, "prompt": 0.0})


@pytest.mark.parametrize("family", [StableDiffusionXL, Sana, Wan])
def test_the_defaults_of_the_study_are_the_trainers(family):
    for steps in (None, 25, 400):
        config = DTIConfig(max_train_steps=steps).resolve(family)
        assert config.max_train_steps == (steps or 100)
        expected = rows.new(config.max_train_steps)
        assert {name: getattr(config, name) for name in expected} == expected
    paper = DTIConfig(preset="paper").resolve(family)
    assert {name: getattr(paper, name) for name in rows.OLD} == rows.OLD
    assert paper.max_train_steps == {StableDiffusionXL: 400, Sana: 500, Wan: 500}[family]


def test_quotes_teach_the_rows_of_words_without_their_space(monkeypatch):
    """Without them the first world of SANA never met "star" and the lone space, where training began."""
    monkeypatch.setattr(coverage, "BATCHES", 20)
    tokenizer = gates.open_world("sana").tokenizer
    without, quoted = (coverage.coverage(tokenizer, style) for style in ("{}", gates.WORLDS["sana"].quoted))
    assert {"▁", "star", "▁star"} <= quoted.keys() == without.keys()
    assert without["▁"] == without["star"] == 0 and without["▁star"] > 20
    assert quoted["▁"] > 100 and quoted["star"] > 0


@pytest.mark.long
def test_the_study_of_walks(tmp_path, monkeypatch, capsys):
    """One subject of one world, a few walks and steps; the second time from the results kept."""
    few = ["rsgd constant 0.01", "rsgd constant 0.01 mean of the path", "radam cosine 0.05 antithetic", "ti constant 0.001"]
    monkeypatch.setattr(walk, "STUDIED", ("sana",))
    monkeypatch.setattr(walk, "WALKS", {name: walk.WALKS[name] for name in (walk.FLOOR, walk.CEILING, *few)})
    monkeypatch.setattr(walk, "STAGES", {1: ((5,), 1, 1), 2: ((5, 10), 1, 1), 3: ((5, 10), 1, 1)})
    monkeypatch.setattr(measure, "PROMPTS", measure.PROMPTS[:1])
    monkeypatch.setattr(walk.Study.best, "__defaults__", (5,))
    arguments = ["--worlds", "sana", "--results", str(tmp_path / "walk.jsonl")]
    for stage, missing in (("1", 6), ("1", 0), ("2", 6)):
        monkeypatch.setattr("sys.argv", ["walk.py", stage, *arguments])
        walk.main()
        assert f"6 walks, {missing} runs to make" in capsys.readouterr().out
