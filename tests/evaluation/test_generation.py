import json

import pytest
import torch
from helpers import differing, states
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from diffusers_dti.evaluation import protocol
from diffusers_dti.evaluation.generation import (
    RESERVED_ARGUMENTS,
    PlannedImage,
    concepts_loaded,
    contact_sheet,
    find_adapter,
    generate_missing,
    grid,
    read_provenance,
)

CALL = {"num_inference_steps": 1, "height": 16, "width": 16}
ADAPTER = "pytorch_lora_weights.safetensors"


def plan(folder, prompts=("a dog", "a red cat", "a toy"), seeds=(3,)):
    return [PlannedImage.named(folder, i, p, p, seed) for seed in seeds for i, p in enumerate(prompts)]


def times(images):
    return [image.path.stat().st_mtime_ns for image in images]


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(list(image.tobytes()), dtype=torch.int)


def save_adapter(pipe, folder, seed):
    """Save a LoRA for the UNet with random weights, and leave the pipeline without it."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), "made")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="made"))
    pipe.save_lora_weights(folder, unet_lora_layers=layers)
    pipe.unet.unload_lora()


# ----------------------------------------------------------------------------------------------------------- the names
def test_files_are_named_by_their_words(tmp_path):
    image = PlannedImage.named(tmp_path, 7, "a <dog>: über-nice!", "a <x>: über-nice!", 12)
    assert image == PlannedImage(tmp_path / "12" / "07_a_dog_ber_nice.png", "a <x>: über-nice!", 12, "a <dog>: über-nice!")
    long = PlannedImage.named(tmp_path, 100, "word " * 99, "word " * 99, 0)
    assert long.path.name.startswith("100_word_word_") and len(long.path.stem) == 84


# -------------------------------------------------------------------------------------------------------- the concepts
def test_concepts_are_loaded_within_the_block_only(sdxl, concept, tmp_path):
    before = states(sdxl)
    concept(sdxl, "<dog>").save_pretrained(tmp_path / "dog")
    with concepts_loaded(sdxl, [str(tmp_path / "dog"), concept(sdxl, "<cat>", vectors=2, seed=1)]):
        assert list(sdxl.directional_inversions) == ["<dog>", "<cat>"]
    assert not differing(before, states(sdxl))
    with pytest.raises(KeyError, match="inside"), concepts_loaded(sdxl, [tmp_path / "dog"]):
        raise KeyError("inside")
    assert not differing(before, states(sdxl))


def test_a_source_that_cannot_be_loaded_leaves_no_concept(sdxl, concept, tmp_path):
    before = states(sdxl)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty"), concepts_loaded(sdxl, [concept(sdxl), tmp_path / "empty"]):
        raise AssertionError("the block must not run")
    assert not differing(before, states(sdxl))


def test_the_digest_identifies_what_is_loaded(sdxl, concept, tmp_path):
    dog, other = concept(sdxl, "<dog>"), concept(sdxl, "<dog>", seed=1)
    dog.save_pretrained(tmp_path / "dog")

    def digest(*arguments, **options):
        with concepts_loaded(sdxl, *arguments, **options) as found:
            return found

    cat = concept(sdxl, "<cat>", seed=2)
    expected = digest([dog])
    assert expected == digest([tmp_path / "dog"]) == digest([dog], token_scale=0.4)
    different = [digest([other]), digest([dog], "max"), digest([dog], token="<x>"), digest([dog, cat]), digest([cat, dog])]
    save_adapter(sdxl, tmp_path / "dog", 0)
    different.append(digest([tmp_path / "dog"]))
    save_adapter(sdxl, tmp_path / "dog", 1)
    different.append(digest([tmp_path / "dog"]))
    assert len({expected, *different}) == 8


def test_adapters_are_loaded_together_and_removed(sdxl, concept, tmp_path):
    for seed, name in enumerate(("dog", "cat", "toy")):
        concept(sdxl, f"<{name}>", seed=seed).save_pretrained(tmp_path / name)
        if name != "toy":
            save_adapter(sdxl, tmp_path / name, seed)
    modules = [name for name, _ in sdxl.unet.named_modules()]
    with concepts_loaded(sdxl, [tmp_path / "dog", tmp_path / "toy", tmp_path / "cat"]):
        assert sdxl.get_active_adapters() == ["adapter0", "adapter1"]
    assert [name for name, _ in sdxl.unet.named_modules()] == modules and not sdxl.get_list_adapters()


def test_loading_adapters_brings_no_notice_of_other_libraries(sdxl, concept, tmp_path, caplog, recwarn):
    for seed, name in enumerate(("dog", "cat")):
        concept(sdxl, f"<{name}>", seed=seed).save_pretrained(tmp_path / name)
        save_adapter(sdxl, tmp_path / name, seed)
    with concepts_loaded(sdxl, [tmp_path / "dog", tmp_path / "cat"]):
        assert sdxl.get_active_adapters() == ["adapter0", "adapter1"]
    assert not caplog.messages and not recwarn.list


def test_finds_the_adapter_next_to_a_concept(sdxl, tmp_path):
    assert find_adapter(tmp_path) is None
    (tmp_path / ADAPTER).touch()
    assert find_adapter(tmp_path) == find_adapter(str(tmp_path)) == tmp_path / ADAPTER
    (tmp_path / "learned_embeds.safetensors").touch()
    assert find_adapter(tmp_path / "learned_embeds.safetensors") is None  # a file alone has none


# ---------------------------------------------------------------------------------------------------------- the images
def test_images_are_what_the_pipeline_generates_from_their_seeds(sdxl, tmp_path):
    images = plan(tmp_path, seeds=(3, 8))
    generate_missing(sdxl, images, {}, 4, CALL)
    for image in images:
        generator = torch.Generator("cpu").manual_seed(image.seed)
        expected = sdxl(image.prompt, generator=generator, **CALL).images[0]
        assert (pixels(image.path) - torch.tensor(list(expected.tobytes()), dtype=torch.int)).abs().max() <= 1
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == sorted(image.path.name for image in images)


def test_only_missing_images_are_generated(sdxl, tmp_path):
    images = plan(tmp_path)
    generate_missing(sdxl, images, {"model": "a"}, 2, CALL)
    first = times(images)
    generate_missing(sdxl, images, {"model": "a"}, 3, dict(reversed(CALL.items())))
    assert times(images) == first
    images[1].path.unlink()
    generate_missing(sdxl, images, {"model": "a"}, 2, CALL)
    assert times(images)[::2] == first[::2] and images[1].path.is_file()


@pytest.mark.parametrize("changed", ["prompt", "seed", "origin", "call"])
def test_images_from_something_else_are_generated_again(sdxl, tmp_path, changed):
    (image,) = images = plan(tmp_path, ["a dog"])
    generate_missing(sdxl, images, {"model": "a"}, 1, CALL)
    before = read_provenance(image.path)
    origin = {"model": "b" if changed == "origin" else "a"}
    call = CALL | ({"guidance_scale": 2.0} if changed == "call" else {})
    prompt, seed = "a cat" if changed == "prompt" else "a dog", 4 if changed == "seed" else 3
    generate_missing(sdxl, [PlannedImage(image.path, prompt, seed)], origin, 1, call)
    found = json.loads(read_provenance(image.path))
    assert (found["prompt"], found["seed"], found["call"]) == (prompt, seed, call) and read_provenance(image.path) != before


def test_files_do_not_name_the_origin(sdxl, tmp_path):
    (image,) = images = plan(tmp_path, ["a dog"])
    generate_missing(sdxl, images, {"model": "/home/somebody/models"}, 1, CALL)
    assert b"somebody" not in image.path.read_bytes()
    assert json.loads(read_provenance(image.path)).keys() == {"prompt", "seed", "origin", "call"}


def test_files_without_provenance(tmp_path):
    assert read_provenance(tmp_path / "missing.png") is None
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_provenance(tmp_path / "plain.png") is None
    info = PngInfo()
    info.add_text("dti", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=info)
    assert read_provenance(tmp_path / "bomb.png") is None


def test_an_interrupted_run_keeps_its_finished_batches(sdxl, tmp_path):
    images = plan(tmp_path)
    sdxl.set_progress_bar_config(leave=False)

    def stop_at_the_second_batch(module, args):
        if images[0].path.exists():
            raise KeyboardInterrupt

    handle = sdxl.unet.register_forward_pre_hook(stop_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        generate_missing(sdxl, images, {}, 1, CALL)
    handle.remove()
    assert [p.name for p in tmp_path.rglob("*.*")] == [images[0].path.name]
    assert sdxl._progress_bar_config == {"leave": False}


def test_an_interrupted_write_leaves_no_file(sdxl, tmp_path, monkeypatch):
    def write_half(image, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", write_half)
    with pytest.raises(OSError, match="no space left"):
        generate_missing(sdxl, plan(tmp_path), {}, 1, CALL)
    assert not list(tmp_path.rglob("*.*"))


def test_a_video_has_all_its_frames(wan, tmp_path):
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "num_frames": 5}
    (image,) = images = plan(tmp_path, ["a dog"])
    generate_missing(wan, images, {}, 1, call)
    expected = wan(image.prompt, generator=torch.Generator().manual_seed(image.seed), output_type="pil", **call).frames[0]
    with Image.open(image.path) as video:
        assert (video.format, video.n_frames, video.info["loop"]) == ("PNG", 5, 0) and 62 <= video.info["duration"] <= 63
        for number, frame in enumerate(expected):
            video.seek(number)
            assert video.convert("RGB").tobytes() == frame.tobytes()
    first = times(images)
    generate_missing(wan, images, {}, 1, call)
    assert times(images) == first  # it says what it was generated from
    assert contact_sheet(images).size == contact_sheet(plan(tmp_path, ["a dog"])).size
    generate_missing(wan, images, {}, 1, call | {"num_frames": 1})
    with Image.open(image.path) as still:
        assert still.n_frames == 1


def test_videos_have_one_frame(wan, tmp_path):
    frames = []
    wan.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: frames.append(kwargs["hidden_states"].shape[2]), with_kwargs=True
    )
    images = plan(tmp_path, ["a dog", "a cat"])
    generate_missing(wan, images, {}, 2, {"num_inference_steps": 1, "height": 32, "width": 32})
    assert set(frames) == {1} and [Image.open(image.path).size for image in images] == [(32, 32)] * 2


@pytest.mark.parametrize("name", ["guidance_scal", "kwargs", *RESERVED_ARGUMENTS])
def test_rejects_arguments_that_the_call_does_not_take(sdxl, tmp_path, name):
    with pytest.raises(ValueError, match=f"StableDiffusionXLPipeline cannot be called with {name}.*guidance_scale"):
        generate_missing(sdxl, plan(tmp_path), {}, 1, CALL | {name: 1})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- the sheets
def paint(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


def test_a_contact_sheet_has_a_row_for_each_prompt_and_a_column_for_each_seed(tmp_path):
    colors = {("a dog", 0): "red", ("a dog", 9): "lime", ("a cat", 0): "blue", ("a cat", 9): "black"}
    images = []
    for number, ((prompt, seed), color) in enumerate(colors.items()):
        images.append(PlannedImage(paint(tmp_path / f"{number}.png", color), prompt, seed))
    sheet = contact_sheet(images)
    tiles = [sheet.getpixel((200 + x * 196 + 90, 23 + y * 196 + 90)) for y in range(2) for x in range(2)]
    assert tiles == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)] and sheet.size == (200 + 2 * 196, 23 + 2 * 196)


def test_a_grid_leaves_missing_cells_empty(tmp_path):
    red, blue = paint(tmp_path / "red.png", "red"), paint(tmp_path / "blue.png", "blue")
    sheet = grid({"first": {"a": red}, "second": {"b": blue, "a": red}})
    tiles = [sheet.getpixel((200 + x * 196 + 90, 23 + y * 196 + 90)) for y in range(2) for x in range(2)]
    assert tiles == [(255, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)]


def test_a_torn_picture_is_drawn_again(sd, tmp_path):
    """Cut anywhere: before its text, within it, and in its pixels."""
    (image,) = plan(tmp_path, prompts=("a dog",))
    generate_missing(sd, [image], {}, 1, CALL)
    whole = image.path.read_bytes()
    for data in (b"", whole[:10], whole[:50], whole[: len(whole) // 2], whole[:-5], b"\xff" * 100, whole[:-30] + bytes(30)):
        image.path.write_bytes(data)
        assert read_provenance(image.path) is None
    generate_missing(sd, [image], {}, 1, CALL)
    assert image.path.read_bytes() == whole and read_provenance(image.path)


@pytest.mark.parametrize("text", ["3", "[]", "not JSON", '{"prompt": 3}'])
def test_a_picture_of_another_program_is_not_generated(tmp_path, text):
    (image,) = plan(tmp_path, prompts=("a dog",))
    info = PngImagePlugin.PngInfo()
    info.add_text("dti", text)
    image.path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image.path, pnginfo=info)
    assert not protocol._is_generated(image)
