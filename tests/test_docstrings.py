"""Run the examples in the docstrings of what users touch, with a tiny SDXL pipeline and a local Hub."""

import doctest
import inspect
import pydoc
import re

import pytest
from diffusers import DiffusionPipeline

import diffusers_dti
from diffusers_dti import DirectionalInversion, DirectionalTextualInversionMixin, DTITrainer, atomic
from diffusers_dti.concept.concept import Concept
from diffusers_dti.families.stable_diffusion import StableDiffusionXL
from diffusers_dti.pipeline import inspection, inspection_report
from diffusers_dti.training import defaults

NEED_AN_EXAMPLE = [
    "DTIConfig", "DTITrainer", "DTITrainer.fit", "DirectionalInversion", "DirectionalInversion.from_embeddings",
    "DirectionalInversion.from_pretrained", "DirectionalInversion.mean", "DirectionalInversion.push_to_hub",
    "DirectionalInversion.rescale", "DirectionalInversion.save_pretrained", "DirectionalInversion.slerp",
    "DirectionalTextualInversionMixin.directional_inversions",
    "DirectionalTextualInversionMixin.hold_directional_inversions",
    "DirectionalTextualInversionMixin.load_directional_inversion",
    "DirectionalTextualInversionMixin.save_directional_inversion",
    "DirectionalTextualInversionMixin.unload_directional_inversion", "RiemannianSGD", "atomic.atomic_files",
    "hold_directional_inversions", "inspection.from_vocabulary", "inspection.inspect", "inspection_report.table",
    "load_directional_inversion", "register", "save_directional_inversion", "slerp", "unload_directional_inversion",
]  # fmt: skip


def public_functions(module):
    """Return the public functions that a module defines, by name."""
    functions = {}
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            functions[name] = value
    return functions


def public_methods(*classes):
    """Return the public methods and properties that classes define themselves, by name. Later classes do not override."""
    methods = {}
    for cls in classes:
        for name, value in vars(cls).items():
            if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod | staticmethod)):
                methods.setdefault(name, value)
    return methods


def find_docstrings():
    """Return the docstrings of what users touch, by name."""
    objects = {name: getattr(diffusers_dti, name) for name in diffusers_dti.__all__}
    for cls, classes in (
        (DirectionalInversion, (DirectionalInversion, Concept)),
        (DirectionalTextualInversionMixin, (DirectionalTextualInversionMixin,)),
        (DTITrainer, (DTITrainer,)),
    ):
        objects |= {f"{cls.__name__}.{name}": method for name, method in public_methods(*classes).items()}
    for module in (atomic, inspection, inspection_report):
        short = module.__name__.rpartition(".")[2]
        objects |= {f"{short}.{name}": function for name, function in public_functions(module).items()}
    return {name: inspect.cleandoc(value.__doc__ or "") for name, value in objects.items()}


def find_examples(docstring):
    """Return the ```py blocks of a docstring that have >>> lines."""
    blocks = re.findall(r"^[ ]*```py\n(.*?)^[ ]*```", docstring, re.S | re.M)
    return [block for block in blocks if ">>>" in block]


DOCSTRINGS = find_docstrings()
EXAMPLES = {name: blocks for name, docstring in DOCSTRINGS.items() if (blocks := find_examples(docstring))}


class OutputChecker(doctest.OutputChecker):
    """Compare an output only if the example shows one."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture
def names(sdxl, concept, photos, local_hub, tmp_path, monkeypatch):
    """Set the stage for an example: a folder with photos and concepts, small settings, and `pipe`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "dog").mkdir(parents=True)
    for i, photo in enumerate(photos):
        photo.save(f"photos/dog/{i}.jpg")
    concept(sdxl, "<dog>").save_pretrained("user/dti-dog")
    concept(sdxl, "<cat>", seed=1).save_pretrained("user/dti-cat")
    small = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 2}
    monkeypatch.setattr(StableDiffusionXL, "defaults", StableDiffusionXL.defaults | small)
    monkeypatch.setattr(defaults, "STEPS", 2)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: sdxl)
    monkeypatch.setattr(type(sdxl), "to", lambda self, *args, **kwargs: self)
    call, quick = type(sdxl).__call__, {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(type(sdxl), "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs | quick))
    return {"pipe": sdxl}


def run(name, names):
    """Run the blocks of one docstring, one after the other, and return what doctest reports."""
    report = []
    runner = doctest.DocTestRunner(OutputChecker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for i, block in enumerate(EXAMPLES[name]):
        test = doctest.DocTestParser().get_doctest(block, names, f"{name}[{i}]", None, 0)
        runner.run(test, out=report.append, clear_globs=False)
        names.update(test.globs)
    assert runner.tries > 0
    return "".join(report)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, names, local_hub):
    report = run(name, names)
    assert not report, report
    assert list(local_hub.repos) == (["user/dti-dog"] if "push_to_hub" in DOCSTRINGS[name] else [])


def test_wrong_examples_fail(names, monkeypatch):
    """An output that differs and an error are reported. An output that is not shown is not compared."""
    for block, expected in ((">>> 1 + 1\n3\n", "Got:\n    2"), (">>> 1 / 0\n", "ZeroDivisionError"), (">>> 1 + 1\n", "")):
        monkeypatch.setitem(EXAMPLES, "wrong", [block])
        report = run("wrong", names)
        assert expected in report and bool(report) == bool(expected)


@pytest.mark.parametrize("name", NEED_AN_EXAMPLE)
def test_what_users_touch_has_an_example(name):
    assert name in DOCSTRINGS
    assert name in EXAMPLES


def test_help_answers_by_itself(sdxl):
    """`help(pipe.load_directional_inversion)` explains every argument, and does not send the reader elsewhere."""
    text = pydoc.plain(pydoc.render_doc(sdxl.load_directional_inversion))
    for section in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
        assert section in text
    for parameter in inspect.signature(sdxl.load_directional_inversion).parameters:
        assert re.search(rf"^\s*{parameter}: ", text, re.M), parameter
    for error in ("ValueError: if", "TypeError: if", "OSError: if"):
        assert error in text
    assert not re.search(r"\bsee\b|docs/|https?://", text, re.I)
