"""Fixtures for the studio: a server of its own process, Debian's Chromium, and photos of a subject of the worlds.

These tests need Gradio and a browser, and run by `make test-studio` alone; there they fail if either is missing.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "examples/worlds/sdxl"


def pytest_ignore_collect(config):
    """Leave these files alone, and Gradio unneeded, unless they are asked for by their mark."""
    return None if re.search(r"(?<!not )studio", config.getoption("markexpr")) else True


@pytest.fixture(scope="session")
def star(tmp_path_factory):
    """Three photos of a subject that the world has never seen, the last one wide and with a mask beside it."""
    import scenes
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("star")
    for number, image in enumerate(scenes.photos(scenes.TEST_SUBJECTS[3], pixels=32, seed=0)[:3]):
        image = image.resize((48, 32)) if number == 2 else image
        image.save(folder / f"photo{number}.png")
    mask = Image.new("L", (48, 32))
    ImageDraw.Draw(mask).rectangle([12, 4, 36, 28], fill=255)
    mask.save(folder / "photo2-masklabel.png")
    return sorted(folder.iterdir())


class Server:
    """`dti studio` on a free port, which is found again after it was killed.

    Args:
        output_dir: the folder of its jobs.
        environment: variables for it.
        options: further options of the command.
    """

    def __init__(self, output_dir, environment=None, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.output_dir, self.url = Path(output_dir), f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "diffusers_dti.cli", "studio", "--models", f"{WORLD}=32", "--dtype", "float32"]
        self.command += ["--output_dir", str(output_dir), "--port", str(self.port), *options]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | (environment or {})
        self.start()

    def start(self):
        log = (self.output_dir.parent / "server.log").open("ab")
        self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        for _ in range(600):
            assert self.process.poll() is None, (self.output_dir.parent / "server.log").read_text()
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def jobs(self):
        from diffusers_dti.studio.job import all_jobs

        return all_jobs(self.output_dir / "jobs")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("studio") / "out")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def browser():
    """Start Debian's Chromium, never one that Playwright would download."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        pytest.fail("Chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        # The sandbox refuses to start as root, as in CI.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page, and check that none had an error or asked another machine for anything."""
    contexts, wrong = [], []

    def note_request(request):
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            wrong.append(request.url)

    def open_page(url, width=1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", note_request)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#bar p")  # it has heard from the server
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
