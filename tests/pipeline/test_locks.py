"""Several threads on one pipeline."""

import contextlib
import threading

import pytest
import torch
from helpers import differing, encoded, states
from injection import Injected, run

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline import locks

SETTINGS = {"initializer_token": "dog", "resolution": 16, "train_batch_size": 1, "max_train_steps": 2}


def in_threads(*functions):
    """Run functions in a thread each, and return the errors."""
    errors = []

    def guarded(function):
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_several_loaders(sdxl, concept):
    """Each loads and unloads its own word, and the words of the others stay."""
    sdxl.load_directional_inversion(concept(sdxl, "<stays>", vectors=2))
    before = states(sdxl)

    def work(word, seed):
        made = concept(sdxl, word, vectors=1 + seed % 3, seed=seed)
        for _ in range(15):
            sdxl.load_directional_inversion(made)
            sdxl.unload_directional_inversion(word)

    assert in_threads(*(lambda word=f"<{i}>", seed=i: work(word, seed) for i in range(4))) == []
    assert not differing(states(sdxl), before)


def test_a_second_fit_is_refused(sdxl, photos):
    def second(trainer, step):
        errors.extend(in_threads(lambda: DTITrainer(sdxl, **SETTINGS, placeholder_token="<b>").fit(photos)))

    errors = []
    DTITrainer(sdxl, **SETTINGS, placeholder_token="<a>").fit(photos, callback_on_step_end=second)
    assert len(errors) == 2 and all("is being trained already: wait for that run to end" in str(error) for error in errors)
    assert list(sdxl.directional_inversions) == ["<a>"]
    DTITrainer(sdxl, **SETTINGS, placeholder_token="<b>").fit(photos)  # and afterwards it works


def test_unloading_while_a_word_is_trained_is_refused(sdxl, photos, concept):
    """Training goes by the numbers of its tokens. Loading adds at the end, and is allowed."""

    def unload(trainer, step):
        with pytest.raises(RuntimeError, match="being trained: unload or replace concepts when that run has ended"):
            sdxl.unload_directional_inversion("<first>")
        with pytest.raises(RuntimeError, match="being trained: unload or replace concepts when that run has ended"):
            sdxl.load_directional_inversion(concept(sdxl, "<first>"), replace=True)
        if step == 1:
            sdxl.load_directional_inversion(concept(sdxl, "<new>"), replace=True)  # which replaces nothing

    sdxl.load_directional_inversion(concept(sdxl, "<first>"))
    learned = DTITrainer(sdxl, **SETTINGS, placeholder_token="<a>").fit(photos, callback_on_step_end=unload)
    assert list(sdxl.directional_inversions) == ["<first>", "<a>", "<new>"]
    sdxl.unload_directional_inversion(["<first>", "<new>", "<a>"])
    again = DTITrainer(sdxl, **SETTINGS, placeholder_token="<a>").fit(photos)
    assert (learned.directions["text_encoder"] - again.directions["text_encoder"]).abs().max() < 1e-6


def test_a_failed_fit_frees_the_encoders(sdxl, photos):
    def fail(trainer, step):
        raise ZeroDivisionError

    before = states(sdxl)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            DTITrainer(sdxl, **SETTINGS, placeholder_token="<a>").fit(photos, callback_on_step_end=fail)
    assert sdxl.directional_inversions == {} and states(sdxl).keys() == before.keys()


def test_held_concepts_keep_their_tokens(sdxl, concept):
    """Unloading an earlier word renumbers the later ones: it waits for a prompt that is between tokenizing and its rows."""
    sdxl.load_directional_inversion(concept(sdxl, "<first>"))
    sdxl.load_directional_inversion(concept(sdxl, "<second>", seed=1))
    expected, tokens = encoded(sdxl, "a <second>"), sdxl.tokenizer("a <second>").input_ids
    with sdxl.hold_directional_inversions():
        other = threading.Thread(target=lambda: sdxl.unload_directional_inversion("<first>"))
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive() and sdxl.tokenizer("a <second>").input_ids == tokens
        assert torch.equal(encoded(sdxl, "a <second>"), expected)
    other.join()
    assert sdxl.tokenizer("a <second>").input_ids != tokens and torch.equal(encoded(sdxl, "a <second>"), expected)


def test_prompts_beside_reloading(sdxl, concept):
    """As a server does: one thread encodes, and others load and unload words before and after its own."""
    sdxl.load_directional_inversion([concept(sdxl, "<first>"), concept(sdxl, "<second>", seed=1)])
    expected, wrong, done = encoded(sdxl, "a <second>"), [], threading.Event()

    def encode():
        for _ in range(40):
            with sdxl.hold_directional_inversions():
                if "<second>" not in sdxl.directional_inversions:  # held by the same thread, a word can be loaded
                    sdxl.load_directional_inversion(concept(sdxl, "<second>", seed=1))
                wrong.append(not torch.equal(encoded(sdxl, "a <second>"), expected))
        done.set()

    def reload(word, vectors):
        made = concept(sdxl, word, vectors=vectors)
        while not done.is_set():
            if word in sdxl.directional_inversions:
                sdxl.unload_directional_inversion(word)
            sdxl.load_directional_inversion(made)

    assert in_threads(encode, lambda: reload("<first>", 1), lambda: reload("<third>", 3)) == []
    assert wrong == [False] * 40


def test_no_interrupt_leaves_an_encoder_locked(sdxl, concept):
    """At no line of loading and unloading: another thread must get the lock afterwards."""
    made = concept(sdxl)

    def both():
        sdxl.load_directional_inversion(made)
        sdxl.unload_directional_inversion()

    count = run(both, parts=("pipeline/",))
    for at in range(0, count, 29):
        with contextlib.suppress(Injected):
            run(both, at, parts=("pipeline/",))
        if sdxl.directional_inversions:
            sdxl.unload_directional_inversion()
        free = [lock for lock in list(locks._locks.values()) if not held_by_anyone(lock)]
        assert len(free) == len(locks._locks) and not locks._in_training


def held_by_anyone(lock):
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(timeout=1) and (lock.release() or True)))
    thread.start()
    thread.join()
    return got != [True]
