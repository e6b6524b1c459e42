"""`dti env`: print what a bug report needs."""

import argparse
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

EXAMPLE = "dti env"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti env`: there are none."""


def run(args: argparse.Namespace) -> int:
    """Print the versions of Python and of each dependency, the devices and the platform."""
    # Not huggingface_hub's `dump_environment_info`: it also prints folders and the name of the account.
    lines = {"diffusers-dti": version("diffusers-dti"), "Python": platform.python_version(), "platform": platform.platform()}
    lines |= {"devices": _devices()} | _versions(requires("diffusers-dti") or [])
    for name, value in lines.items():
        print(f"{name + ':':<18}{value}")
    return 0


def _devices() -> str:
    """Return what torch can compute on, with the memory of each GPU."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found.append(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)")
    if found:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return f"{', '.join(found)}, {build}"
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else "CPU"


def _versions(requirements: list[str]) -> dict[str, str]:
    """Return the version of each requirement, with the extra that it belongs to. Extras for tests are left out."""
    versions = {}
    for requirement in map(Requirement, requirements):
        name, extra = requirement.name, re.search(r"extra == .([\w-]+)", str(requirement.marker))
        if name in versions or (extra and extra[1].startswith("test")):
            continue
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed" + (f" (extra {extra[1]})" if extra else "")
    return versions
