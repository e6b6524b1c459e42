"""Load, generate, train, save and unload on a tiny pipeline, and fail if that causes a warning. `test_warnings.py` runs this.

A warning counts if it comes from the package, or from a call that the package makes. It does not count if another library
raises it while it is imported, or in a call of this script: the package cannot avoid those. Notices that libraries log are in
this script's output; what building the pipeline prints is between two marks.
"""

import importlib
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import diffusers_dti
from diffusers_dti.cli import main

PACKAGE = str(Path(diffusers_dti.__file__).parent)
# Warnings that other libraries cause themselves, even if they are called correctly: a part of the message, and the file.
UPSTREAM = (("__array__ implementation doesn't accept", "scheduling_euler_discrete.py"),)
found = []


def is_ours(frames):
    """Whether the package, and not an import, led to the innermost of the frames."""
    for frame in reversed(frames):
        if frame.filename.startswith("<frozen importlib"):
            return False
        if frame.filename.startswith(PACKAGE):
            return True
    return False


def record(message, category, filename, lineno, file=None, line=None):
    frames = traceback.extract_stack()[:-1]
    if not is_ours(frames):
        return
    if any(text in str(message) and filename.endswith(name) for text, name in UPSTREAM):
        return
    caller = [frame for frame in frames if frame.filename.startswith(PACKAGE)][-1]
    found.append(f"{category.__name__} in {filename}:{lineno} by {caller.filename}:{caller.lineno}: {message}")


def use(folder):
    from PIL import Image
    from tiny_pipelines import build_sdxl

    (folder / "parts").mkdir()
    print("\n--- building", file=sys.stderr, flush=True)
    build_sdxl(folder / "parts").save_pretrained(folder / "model")
    print("\n--- built", file=sys.stderr, flush=True)
    (folder / "photos").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "photos" / "0.png")
    # the command opens the pipeline, trains, saves, loads with an adapter, generates and unloads
    model = ["--model", str(folder / "model")]
    small = ["--resolution", "16", "--train_batch_size", "1", "--max_train_steps", "2", "--method", "dco"]
    words = ["--placeholder_token", "<dog>", "--initializer_token", "dog", "--validation_prompt", "a {}"]
    assert main(["train", str(folder / "photos"), *model, *small, *words, "--output_dir", str(folder / "dog")]) == 0
    call = ["--call", "num_inference_steps=1", "height=16", "width=16"]
    lora = ["--lora", str(folder / "dog" / "pytorch_lora_weights.safetensors")]
    command = ["generate", *model, "--concepts", str(folder / "dog"), *lora, "--prompts", "a <dog>", *call]
    assert main([*command, "--output_dir", str(folder / "images")]) == 0
    assert main(["inspect", str(folder / "dog"), *model]) == 0
    # and the same by its methods
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / "model")
    pipe.load_directional_inversion(folder / "dog", token_scale="mean")
    pipe("a <dog>", num_inference_steps=1, height=16, width=16)
    pipe.save_directional_inversion(folder / "again")
    pipe.unload_directional_inversion()
    settings = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 2, "placeholder_token": "<cat>"}
    diffusers_dti.DTITrainer(pipe, initializer_token="cat", **settings).fit(folder / "photos")


def plant_a_call_that_is_deprecated():
    """Call something deprecated from a file of the package: this must be found."""
    source = "from diffusers.utils import deprecate\ndeprecate('planted', '99.0.0', 'planted', standard_warn=False)"
    exec(compile(source, f"{PACKAGE}/planted.py", "exec"), {})


def plant_an_import_that_warns(folder):
    """Import a module that warns while it is imported, from a file of the package: this must not be found."""
    (folder / "upstream_module.py").write_text("import warnings\nwarnings.warn('upstream', FutureWarning)\n")
    sys.path.insert(0, str(folder))
    exec(compile("import upstream_module", f"{PACKAGE}/planted.py", "exec"), {})
    importlib.import_module("upstream_module")


if __name__ == "__main__":
    warnings.simplefilter("always")
    warnings.showwarning = record
    with tempfile.TemporaryDirectory() as name:
        if "call" in sys.argv:
            plant_a_call_that_is_deprecated()
        elif "import" in sys.argv:
            plant_an_import_that_warns(Path(name))
        else:
            use(Path(name))
    print("\n".join(found))
    raise SystemExit(bool(found))
