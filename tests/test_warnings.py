"""Using the package causes no warning and no notice of another library, in the oldest and newest releases that it builds on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# What a user sees: the package's own lines, progress bars, and what transformers says wherever torchvision is not installed.
EXPECTED = re.compile(
    r".*%\|[^\[]*\[[^\]]*\](\x1b\[A)?|See .*|\d of \d learned\.|photos: learned, in .*"
    r"|<dog>: 1 vector for each of .*|\[transformers\] `\w+ImageProcessor` requires torchvision.*"
)
SCRIPT = Path(__file__).with_name("warning_free.py")


def run(*arguments):
    root = SCRIPT.parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{SCRIPT.parent}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def used():
    return run()


def test_using_the_package_is_not_warned_about(used):
    assert used.returncode == 0, used.stdout + used.stderr[-3000:]


def test_nothing_is_printed_but_our_own_lines_and_bars(used):
    shown = re.sub("--- building.*--- built", "", used.stderr, flags=re.DOTALL)
    report = used.stdout.partition("<dog>: 1 vector")[0] + shown  # without the lines of `dti inspect`
    other = [line for line in re.split("[\r\n]+", report) if line.strip() and not EXPECTED.fullmatch(line.strip())]
    assert not other and "Encoding photos" in shown


def test_a_deprecated_call_by_the_package_is_found():
    done = run("call")
    assert done.returncode == 1 and "FutureWarning" in done.stdout and "planted" in done.stdout


def test_a_warning_while_another_library_is_imported_is_not():
    done = run("import")
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr[-3000:]
