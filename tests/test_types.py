"""The types that users get: the Python of the README and the quick start as mypy reads it, and the names to import."""

import re
import tempfile
from pathlib import Path

import pytest

import diffusers_dti

pytestmark = pytest.mark.xdist_group("mypy")  # in one process: mypy runs once, and its cache has one writer
ROOT = Path(__file__).parents[1]
USER_CODE = {
    page: "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S))
    for page in ("README.md", "docs/quickstart.md")
} | {
    "one concept or several": """
import torch
from typing_extensions import assert_type

from diffusers_dti import DirectionalInversion, DTITrainer, load_directional_inversion, slerp

def use(trainer: DTITrainer) -> None:
    assert_type(trainer.fit("photos/dog"), DirectionalInversion)
    assert_type(trainer.fit(["photos/0.jpg", "photos/1.jpg"]), DirectionalInversion)
    assert_type(trainer.fit({"<dog>": "photos/dog"}), dict[str, DirectionalInversion])
    assert_type(trainer.inversion, DirectionalInversion | None)
    assert_type(load_directional_inversion(trainer.pipe, "out/dog", token=["<a>"]), DirectionalInversion)
    assert_type(load_directional_inversion(trainer.pipe, ["out/dog", "out/cat"]), list[DirectionalInversion])
    dog = DirectionalInversion.from_pretrained("out/dog")
    assert_type(dog.slerp(dog, 0.5), DirectionalInversion)
    assert_type(slerp(torch.ones(2), torch.ones(2), 0.5), torch.Tensor)
""",
    "every name": "from diffusers_dti import *\n\n" + "\n".join(diffusers_dti.__all__),
}
WRONG_CODE = {
    "an unknown name": ("import diffusers_dti\ndiffusers_dti.DTITrainr", 'has no attribute "DTITrainr"'),
    "an unknown method": (
        'from diffusers_dti import DirectionalInversion\nDirectionalInversion.from_pretrained("out/dog").save("out")',
        '"DirectionalInversion" has no attribute "save"',
    ),
    "an argument of another type": (
        "from diffusers_dti import DirectionalInversion\nDirectionalInversion.from_pretrained(3)",
        'incompatible type "int"',
    ),
    "another choice": (
        "from diffusers_dti import DTITrainer, load_directional_inversion\n"
        'def use(trainer: DTITrainer) -> None:\n    load_directional_inversion(trainer.pipe, "out/dog", pooling="mean")',
        'No overload variant of "load_directional_inversion"',
    ),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The errors in each source, from one run of mypy with the package's own configuration."""
    api = pytest.importorskip("mypy.api")
    sources = USER_CODE | {name: source for name, (source, _) in WRONG_CODE.items()}
    folder = tmp_path_factory.mktemp("types")
    for number, source in enumerate(sources.values()):
        (folder / f"user{number}.py").write_text(source)
    # a cache in the temporary folder that all runs share, so that only the first one reads torch
    cache = Path(tempfile.gettempdir()) / "diffusers-dti-mypy-cache"
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), "--no-error-summary"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        out, crash, _ = api.run([*options, *map(str, sorted(folder.glob("*.py")))])
    assert not crash
    found = {name: [] for name in sources}
    for line in out.splitlines():
        error = re.search(r"user(\d+)\.py:\d+: error: (.*)", line)
        if error:  # not one in the package itself, which `make lint` finds
            found[list(sources)[int(error[1])]].append(error[2])
    return found


@pytest.mark.parametrize("name", USER_CODE)
def test_right_code_has_no_errors(name, errors):
    assert errors[name] == []


@pytest.mark.parametrize("name", WRONG_CODE)
def test_wrong_code_has_one(name, errors):
    (error,) = errors[name]
    assert WRONG_CODE[name][1] in error


def test_the_public_names():
    assert (ROOT / "diffusers_dti" / "py.typed").is_file()
    names = {}
    exec("from diffusers_dti import *", names)
    assert names.keys() - {"__builtins__"} == set(diffusers_dti.__all__)
    assert dir(diffusers_dti) == sorted([*diffusers_dti.__all__, "__version__"])
    for name in dir(diffusers_dti):
        assert getattr(diffusers_dti, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DTITrainr'"):
        diffusers_dti.DTITrainr  # noqa: B018
