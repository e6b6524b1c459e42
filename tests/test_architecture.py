"""The rules of the tree, kept by reading the source: who imports whom, the size of files, their docstrings, ignored types."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusers_dti"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 250
MAX_TYPE_IGNORES = 20

# The folders that each folder imports. The files at the top (sphere, atomic, parsing, figures, notices) are imported by all.
ALLOWED = {
    "concept": set(),
    "data": set(),
    "pipeline": {"concept"},
    "families": {"concept", "pipeline"},
    "evaluation": {"concept", "pipeline", "families", "data"},
    "training": {"concept", "pipeline", "families", "data"},
    "studio": {"concept", "pipeline", "families", "data", "evaluation", "training"},
    "cli": {"concept", "pipeline", "families", "data", "evaluation", "training", "studio"},
}


def module_name(file):
    """Return the name of a module in the package: "concept.hub", or "" for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imported_modules(source, module, is_package):
    """Return the modules of the package that a source imports anywhere: at the top, in functions, or for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("diffusers_dti").lstrip(".") for n in names if n.split(".")[0] == "diffusers_dti"}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".") if module else []
                up = node.level - is_package
                anchor = anchor[: len(anchor) - up]
                base = ".".join([*anchor, *filter(None, [node.module])])
            elif base.split(".")[0] == "diffusers_dti":
                base = base.removeprefix("diffusers_dti").lstrip(".")
            else:
                continue
            for alias in node.names:  # `from . import hub` imports a module, `from .hub import push` imports from one
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else base)
    return found


IMPORTS = {m: imported_modules(f.read_text(), m, f.name == "__init__.py") for m, f in MODULES.items()}


def folder_of(module):
    return module.partition(".")[0]


def is_allowed(module, other):
    here, there = folder_of(module), folder_of(other)
    if here not in ALLOWED:  # the package itself imports all but the command; sphere and its neighbors import nothing
        return module == "" and there != "cli"
    if other == "":  # the public names
        return here == "cli"
    return there == here or there not in ALLOWED or there in ALLOWED[here]


def broken_rules(imports):
    """Return the imports that the rules forbid, as "importer -> imported"."""
    return [f"{module} -> {other}" for module, others in imports.items() for other in others if not is_allowed(module, other)]


def test_folders_import_only_what_they_may():
    assert not broken_rules(IMPORTS)


def test_only_the_studio_imports_gradio():
    importing = {
        folder_of(m) for m, file in MODULES.items() if re.search(r"^\s*(import|from) gradio\b", file.read_text(), re.M)
    }
    assert importing == {"studio"}


def test_there_is_no_circle():
    assert len(IMPORTS) > 50
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("concept.hub", "from ..pipeline.loading import inject", "concept.hub -> pipeline.loading"),
        ("concept.hub", "from ..pipeline import loading", "concept.hub -> pipeline.loading"),
        ("concept.hub", "def f():\n    from ..training import config", "concept.hub -> training.config"),
        ("concept.hub", "if TYPE_CHECKING:\n    import diffusers_dti.families.base", "concept.hub -> families.base"),
        ("concept.hub", "from .. import DTIConfig", "concept.hub -> "),
        ("families.sana", "from ..evaluation.store import Store", "families.sana -> evaluation.store"),
        ("training.loop", "from diffusers_dti.cli import main", "training.loop -> cli"),
        ("training.loop", "from ..studio import job", "training.loop -> studio.job"),
        ("studio.app", "from ..cli import arguments", "studio.app -> cli.arguments"),
        ("sphere", "from .concept import hub", "sphere -> concept.hub"),
        ("", "from .cli import main", " -> cli"),
    ],
)
def test_a_broken_rule_is_found(module, source, broken):
    imports = imported_modules(source, module, module == "")
    assert broken_rules({module: imports}) == [broken]


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_is_in_it(module):
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text()))
    words = 8 if MODULES[module].name == "__init__.py" else 5
    assert docstring and len(docstring.split()) >= words and docstring.split("\n\n")[0].rstrip().endswith((".", ":"))


def test_every_folder_is_in_the_rules():
    folders = {file.parent.relative_to(PACKAGE).as_posix() for file in FILES}
    assert folders == {".", *ALLOWED}


def test_few_types_are_ignored_and_each_has_a_reason():
    ignored, bare = [], []
    for file in FILES:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"#\s*type:\s*ignore", line):
                ignored.append(f"{file.relative_to(PACKAGE)}:{number}")
                if not re.search(r"# type: ignore\[[\w, -]+\]  # \w+", line):
                    bare.append(ignored[-1])
    assert not bare, "each needs its error's code and a reason: # type: ignore[code]  # reason"
    assert len(ignored) <= MAX_TYPE_IGNORES, ignored
