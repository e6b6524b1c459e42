"""Nothing that the package does is deprecated, in the oldest and in the newest releases of what it builds on."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("warning_free.py")


def run(*arguments):
    root = SCRIPT.parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{SCRIPT.parent}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def test_using_the_package_is_not_warned_about():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_deprecated_call_by_the_package_is_found():
    done = run("call")
    assert done.returncode == 1 and "FutureWarning" in done.stdout and "planted" in done.stdout


def test_a_warning_while_another_library_is_imported_is_not():
    done = run("import")
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr[-3000:]
