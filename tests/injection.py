"""Raise an exception, or be killed, at a chosen line or bytecode of this package."""

import contextlib
import os
import signal
import sys
import warnings
from pathlib import Path

import diffusers_dti

PACKAGE = str(Path(diffusers_dti.__file__).parent)


class Injected(BaseException):
    """Raised by `run`: like `KeyboardInterrupt`, no exception that code may handle."""


def fail():
    raise Injected


def run(function, at=None, opcodes=False, parts=("",), stop=fail):
    """Call a function, and stop it at a point.

    Args:
        function: the function, without arguments.
        at: the number of the point, from 0; None to count them.
        opcodes: points are bytecodes instead of lines.
        parts: only points in files below these paths of the package.
        stop: what happens at the point; by default, `Injected` is raised.

    Returns:
        The number of points that were passed.
    """
    folders = tuple(f"{PACKAGE}/{part}" for part in parts)
    passed, raised = 0, False

    def trace(frame, event, argument):
        nonlocal passed, raised
        if raised or not frame.f_code.co_filename.startswith(folders):
            return None
        frame.f_trace_opcodes = opcodes
        if event == ("opcode" if opcodes else "line"):
            passed += 1
            if at is not None and passed > at:
                raised = True
                stop()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return passed


def outcomes(function, observe, restore, every=1, opcodes=False, parts=("",)):
    """Call a function once for each point, and look at what is left.

    Args:
        function: changes something.
        observe: returns what it changes, as a value that can be compared.
        restore: undoes a call of `function` that did all of it.
        every, opcodes, parts: the points: every so many, and see `run`.

    Returns:
        The number of points, and those at which something was neither as before nor as after.
    """
    before = observe()
    count = run(function, opcodes=opcodes, parts=parts)
    after = observe()
    assert after != before
    restore()
    assert observe() == before
    torn = []
    for at in range(0, count, every):
        with contextlib.suppress(Injected):
            run(function, at, opcodes, parts)
        left = observe()
        if left == after:
            restore()
        elif left != before:
            torn.append(at)
            break
    return count, torn


def in_child(function):
    """Call a function in a copy of this process, which leaves this one as it is.

    Returns:
        Whether it was killed. An exception in it fails the test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which pytest-xdist has
        child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def killed(function, at, opcodes=False, parts=("",)):
    """Call a function in a copy of this process, which is killed at a point of it; see `run`. Return whether it got there."""
    return in_child(lambda: run(function, at, opcodes, parts, stop=lambda: os.kill(os.getpid(), signal.SIGKILL)))
