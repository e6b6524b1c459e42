"""Loading and unloading change everything or nothing: an exception is raised at every line of them, and at many bytecodes."""

import contextlib
import dataclasses
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from helpers import states
from injection import outcomes

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline import transaction

SHARE = 23  # one point in so many in the short tests; a prime, so that it meets every part of a loop


def test_changes_are_undone_in_reverse():
    holder, mapping, table = SimpleNamespace(a=1), {"x": 1}, torch.zeros(3, 2)
    with contextlib.suppress(ZeroDivisionError), ExitStack() as undo:
        transaction.change(undo, holder, "a", 2)
        transaction.change(undo, holder, "b", 3)
        transaction.drop(undo, holder, "a")
        transaction.change_entry(undo, mapping, "y", 2)
        transaction.change_entry(undo, mapping, "x", 3)
        transaction.drop_entry(undo, mapping, "x")
        transaction.write_rows(undo, table, torch.tensor([2, 0]), torch.ones(2, 2))
        assert vars(holder) == {"b": 3} and mapping == {"y": 2} and table.sum() == 4
        raise ZeroDivisionError
    assert vars(holder) == {"a": 1} and mapping == {"x": 1} and table.sum() == 0


@pytest.fixture(params=["sdxl", "sana"])
def changed(request):
    return request.getfixturevalue(request.param)


def check_loading(pipe, made, every, opcodes):
    words = [concept.placeholder_token for concept in made]
    count, torn = outcomes(
        lambda: [pipe.load_directional_inversion(concept) for concept in made[:1]],
        lambda: states(pipe),
        lambda: pipe.unload_directional_inversion(words[0]),
        every,
        opcodes,
        ("pipeline/",),
    )
    assert count > 100 and not torn


def check_unloading(pipe, made, every, opcodes):
    """The one that was loaded first goes, and the others move up."""
    for concept in made:
        pipe.load_directional_inversion(concept)

    def restore():
        pipe.unload_directional_inversion()
        for concept in made:
            pipe.load_directional_inversion(concept)

    first = made[0].placeholder_token
    count, torn = outcomes(
        lambda: pipe.unload_directional_inversion(first), lambda: states(pipe), restore, every, opcodes, ("pipeline/",)
    )
    assert count > 100 and not torn


def check_replacing(pipe, made, every, opcodes):
    """The one that was loaded first goes, and another comes in."""
    for concept in made:
        pipe.load_directional_inversion(concept)
    other = dataclasses.replace(made[1], placeholder_token=made[0].placeholder_token)

    def restore():
        pipe.unload_directional_inversion()
        for concept in made:
            pipe.load_directional_inversion(concept)

    count, torn = outcomes(
        lambda: pipe.load_directional_inversion(other, replace=True),
        lambda: states(pipe) | {"concepts": list(pipe.directional_inversions)},
        restore,
        every,
        opcodes,
        ("pipeline/",),
    )
    assert count > 200 and not torn


@pytest.mark.parametrize("check", [check_loading, check_unloading, check_replacing])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("every", "opcodes"), [(SHARE, False), (SHARE * 19, True)])
def test_a_share_of_the_points(changed, concept, check, vectors, every, opcodes):
    check(changed, [concept(changed, "<a>", vectors), concept(changed, "<b>", 2, seed=1)], every, opcodes)


@pytest.mark.long
@pytest.mark.parametrize("check", [check_loading, check_unloading, check_replacing])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("every", "opcodes"), [(1, False), (7, True)])
def test_every_point(changed, concept, check, vectors, every, opcodes):
    check(changed, [concept(changed, "<a>", vectors), concept(changed, "<b>", 2, seed=1)], every, opcodes)


def test_a_torn_change_is_found():
    holder = SimpleNamespace(a=1, b=1)

    def both(value):
        transaction._set(holder, "a", value)
        transaction._set(holder, "b", value)

    count, torn = outcomes(lambda: both(2), lambda: dict(vars(holder)), lambda: both(1))
    assert count == 4 and torn == [2]  # the first attribute is set, and the second is not


def check_fit(pipe, photos, every, earlier=None):
    """The start and the end of training, also in the place of an earlier concept; the same lines roll back what is between."""
    settings = {"placeholder_token": "<a>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 1}

    def fit():
        DTITrainer(pipe, **settings, max_train_steps=1, heldout_loss_steps=0).fit(photos[:1])

    fit()

    def restore():  # encoders install hooks of their own at their first call
        pipe.unload_directional_inversion()
        if earlier is not None:
            pipe.load_directional_inversion(earlier)

    restore()
    count, torn = outcomes(
        fit,
        lambda: states(pipe),
        restore,
        every,
        parts=("pipeline/", "training/trainer.py", "training/frozen.py", "training/loop.py", "training/trainable.py"),
    )
    assert count > 500 and not torn


@pytest.mark.parametrize("again", [False, True])
def test_a_share_of_the_points_of_fit(changed, photos, concept, again):
    check_fit(changed, photos, 251, concept(changed, "<a>", 2) if again else None)


@pytest.mark.long
@pytest.mark.parametrize("again", [False, True])
def test_every_point_of_fit(changed, photos, concept, again):
    check_fit(changed, photos, 1, concept(changed, "<a>", 2) if again else None)
