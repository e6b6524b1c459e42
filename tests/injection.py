"""Raise an exception at a chosen line, or a chosen bytecode, of this package."""

import contextlib
import sys
from pathlib import Path

import diffusers_dti

PACKAGE = str(Path(diffusers_dti.__file__).parent)


class Injected(BaseException):
    """Raised by `run`: like `KeyboardInterrupt`, no exception that code may handle."""


def run(function, at=None, opcodes=False, parts=("",)):
    """Call a function, and raise `Injected` at a point of it.

    Args:
        function: the function, without arguments.
        at: the number of the point, from 0; None to count them.
        opcodes: points are bytecodes instead of lines.
        parts: only points in files below these paths of the package.

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
                raise Injected
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
