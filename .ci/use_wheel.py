"""Use the installed wheel as a newcomer does: `make wheel` runs this file where only the declared dependencies are.

mypy checks it against the wheel as well, strictly and without a configuration. Without py.typed, that fails.
"""

import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import distribution, distributions, version
from pathlib import Path
from pkgutil import walk_packages

import torch
from diffusers import DiffusionPipeline
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from typing_extensions import assert_type

import diffusers_dti
from diffusers_dti import DirectionalInversion, DTITrainer, load_directional_inversion
from diffusers_dti.cli import main

ROOT = Path(__file__).parents[1]


def check_files() -> None:
    """Check that Python runs the wheel, and that it has every file of the package and no other."""
    files = {Path(str(file)) for file in distribution("diffusers-dti").files or []}
    packed = {file for file in files if file.parts[0] == "diffusers_dti" and "__pycache__" not in file.parts}
    source = {file.relative_to(ROOT) for file in (ROOT / "diffusers_dti").rglob("*") if file.is_file()}
    assert packed == {file for file in source if "__pycache__" not in file.parts}, packed ^ source
    strange = {file.parts[0] for file in files} - {"diffusers_dti", f"diffusers_dti-{version('diffusers-dti')}.dist-info", ".."}
    assert not strange, strange
    assert Path(diffusers_dti.__file__).is_relative_to(sys.prefix), diffusers_dti.__file__
    assert diffusers_dti.__version__ == version("diffusers-dti")


def check_dependencies() -> None:
    """Check that no extra is installed, and that every module can be imported without one."""
    optional = set()
    for line in distribution("diffusers-dti").requires or []:
        if "extra ==" in line and "test" not in line:  # what tests need may be a dependency's dependency, as markdown-it-py is
            optional.add(canonicalize_name(Requirement(line).name))
    installed = {canonicalize_name(found.metadata["Name"]) for found in distributions()}
    assert optional and not optional & installed, f"extras came along: {optional & installed}"
    for module in walk_packages(diffusers_dti.__path__, "diffusers_dti."):
        if module.name.endswith(".__main__"):
            continue
        try:
            import_module(module.name)
        except ModuleNotFoundError as error:  # a module that serves one extra
            if canonicalize_name(error.name or "") not in optional:
                raise
    print(f"{len(installed)} packages are installed, and none of the {len(optional)} that only extras need.")


def learn_and_use(folder: Path) -> None:
    """Learn a word in the small SDXL world, save it, load it again, and generate an image."""
    torch.set_num_threads(1)  # the world is so small that more threads are slower
    world = ROOT / "examples" / "worlds" / "sdxl"
    pipe = DiffusionPipeline.from_pretrained(world, dtype=torch.float32)
    trainer = DTITrainer(pipe, placeholder_token="<x>", initializer_token="star", resolution=32, max_train_steps=1)
    learned = trainer.fit([Image.new("RGB", (32, 32), "red")])
    assert_type(learned, DirectionalInversion)
    learned.save_pretrained(folder / "x")
    pipe.unload_directional_inversion()
    loaded = load_directional_inversion(pipe, folder / "x")
    assert_type(loaded, DirectionalInversion)
    for component, rows in loaded.embeddings.items():
        assert rows.shape == (1, getattr(pipe, component).config.hidden_size)
    image = pipe("a <x> on the beach", num_inference_steps=1, height=32, width=32).images[0]
    assert image.size == (32, 32)


def run_command() -> None:
    """Run `dti`, as it was installed, and print what a report of a failure needs."""
    dti = Path(sys.executable).with_name("dti")
    done = subprocess.run([dti, "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: dti "), done.stdout
    assert main(["env"]) == 0


if __name__ == "__main__":
    check_files()
    check_dependencies()
    with tempfile.TemporaryDirectory() as tmp:
        learn_and_use(Path(tmp))
    run_command()
