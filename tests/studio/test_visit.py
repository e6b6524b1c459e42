"""The whole page in a real browser, on the world of SDXL."""

import re
import time

import pytest
import torch
from conftest import WORLD, Server
from diffusers import DiffusionPipeline
from hub_server import HubServer

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.pipeline.inspection import from_vocabulary, inspect
from diffusers_dti.studio.job import Job

pytestmark = pytest.mark.studio


def fill_in(page, files, steps, placeholder="<star>", initializer="star", prompts="a photo of a {}"):
    """Fill in the form of the first tab."""
    page.set_input_files("#photos input[type=file]", [str(file) for file in files])
    page.fill("#placeholder :is(input, textarea)", placeholder)
    page.fill("#initializer :is(input, textarea)", initializer)
    page.fill("#prompts textarea", prompts)
    page.fill("#steps input", str(steps))


def wait_for(page, text):
    page.wait_for_function("text => document.querySelector('#bar')?.innerText.includes(text)", arg=text, timeout=120_000)


def step(page):
    """Return the step that the bar shows."""
    return int(page.get_attribute("#bar progress", "value"))


def choose(page, field, *options):
    """Choose options of a dropdown by the beginnings of their labels."""
    for option in options:
        page.click(f"#{field} input")
        page.locator(f"#{field} ul [role=option]", has_text=option).first.click()
    page.keyboard.press("Escape")


def test_a_whole_visit(star, open_page, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(WORLD, dtype=torch.float32)
    from_vocabulary(pipe, "square").save_pretrained(tmp_path / "square")
    with HubServer() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        server = Server(tmp_path / "out", env | {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"})
        try:
            learned = train_tab(open_page(server.url), server, star, tmp_path)
            assert "user/dti-star" in hub.repos and hub.repos["user/dti-star"].private
            other_tabs(open_page(server.url), pipe, learned, tmp_path)
        finally:
            server.kill()


def train_tab(page, server, star, tmp_path):
    """Learn, download, keep and push; return what was learned."""
    fill_in(page, star, 20, prompts="a photo of a {}\na red {}")
    page.wait_for_function("document.querySelectorAll('#crops .grid-container img').length == 3")
    assert "8 crops, masked · photo2.png" in page.inner_text("#crops") and "1 crop · photo0.png" in page.inner_text("#crops")
    page.click("#start")
    wait_for(page, "Learned in 20 steps. It started from “star”.")
    (job,) = server.jobs()
    page.wait_for_function("document.querySelectorAll('#samples .grid-container img').length == 2 * (1 + 4)")
    texts = page.inner_text("#samples")
    assert "a red star" in texts and "step 5" in texts and "step 20" in texts
    assert page.locator("#curves canvas, #curves svg.marks").count() == 3
    with page.expect_download() as download:
        page.locator("#download a[download]").first.click()
    download.value.save_as(tmp_path / "downloaded" / "learned_embeds.safetensors")
    assert download.value.suggested_filename == "learned_embeds.safetensors"
    assert (tmp_path / "downloaded/learned_embeds.safetensors").read_bytes() == (
        job.run / "learned_embeds.safetensors"
    ).read_bytes()
    assert page.locator("#download a[download]").count() == 2  # one for each encoder
    page.fill("#name :is(input, textarea)", "my star")
    page.click("#save")
    page.wait_for_selector("#outcome:has-text('Saved')")
    page.fill("#repo :is(input, textarea)", "user/dti-star")
    page.click("#push")
    page.wait_for_selector("#outcome:has-text('Pushed')")
    return job.concept()


def other_tabs(page, pipe, learned, tmp_path):
    """Play with what was learned, blend it with a word, and inspect it."""
    page.get_by_role("tab", name="Play").click()
    files = sorted((tmp_path / "square").iterdir())
    page.set_input_files("#play-upload input[type=file]", [str(file) for file in files])
    page.wait_for_selector("#play-concepts :text('square')")
    choose(page, "play-concepts", "my star")
    page.fill("#play-prompt :is(input, textarea)", "a <star> and a square")
    page.fill("#play-count input[type=number]", "1")
    page.click("#play")
    page.wait_for_function("document.querySelectorAll('#play-images .grid-container img').length == 2", timeout=120_000)
    texts = page.inner_text("#play-images")
    assert "a <star> and a square · seed 0" in texts and "a star and a square · seed 0" in texts
    page.get_by_role("tab", name="Blend").click()
    choose(page, "blend-first", "my star")
    choose(page, "blend-second", "square")
    page.wait_for_selector("#blend-degrees:has-text('The second is')")
    page.fill("#blend-degrees input[type=number]", "-20")
    page.click("#blend")
    page.wait_for_function("document.querySelectorAll('#blend-images .grid-container img').length == 3", timeout=120_000)
    assert "-20° · seed 0" in page.inner_text("#blend-images")
    page.get_by_role("tab", name="Inspect").click()
    choose(page, "inspect-concept", "my star")
    page.click("#inspect")
    page.wait_for_selector("#plot img")
    report = inspect(learned, pipe)
    assert all(found["verdict"] in page.inner_text("#verdict") for found in report["encoders"].values())
    assert report["encoders"]["text_encoder"]["vectors"][0]["nearest"][0]["token"] in page.inner_text("#details")


def test_a_bad_upload(server, star, open_page, tmp_path):
    (tmp_path / "torn.png").write_bytes(star[0].read_bytes()[:99])
    page = open_page(server.url)
    fill_in(page, [star[0], tmp_path / "torn.png"], 5)
    page.wait_for_selector("#photos-message:has-text('torn.png is not an image that can be opened')")
    before = server.jobs()
    page.click("#start")
    page.wait_for_selector("[data-testid=toast-body]:has-text('torn.png is not an image')")
    assert server.jobs() == before
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    page = open_page(server.url)
    page.set_input_files("#photos input[type=file]", [str(tmp_path / "notes.pdf")])
    page.wait_for_selector(":text('Invalid file type')")


def test_reload_and_stop_in_the_middle(server, star, open_page):
    page = open_page(server.url)
    fill_in(page, star, 5000, "<stopped>", prompts="")
    page.click("#start")
    wait_for(page, " left.")
    page.reload()
    page.wait_for_selector("#bar progress")
    wait_for(page, " left.")
    job = server.jobs()[-1]
    assert job.name in page.inner_text("#runs") + page.input_value("#runs input")
    second = open_page(server.url)  # waits in the queue
    fill_in(second, star, 5, "<second>", prompts="")
    second.click("#start")
    wait_for(second, "Waiting for its turn: 1 before it.")
    second.click("#stop")
    wait_for(second, "Stopped before the first step.")
    page.click("#stop")
    wait_for(page, "Stopped at step")
    at = int(re.search(r"Stopped at step (\d+)", page.inner_text("#bar"))[1])
    page.wait_for_selector("#download a[download]")
    concept = DirectionalInversion.from_pretrained(job.run / f"checkpoint-{at}")
    assert 0 < at < 5000 and concept.placeholder_token == "<stopped>"
    page.click("#go-on")
    page.wait_for_function("at => document.querySelector('#bar progress').value > at", arg=at, timeout=60_000)
    page.click("#stop")
    wait_for(page, "Stopped at step")


def test_a_killed_server_loses_nothing(star, open_page, tmp_path):
    server = Server(tmp_path / "out")
    try:
        page = open_page(server.url)
        fill_in(page, star, 120, prompts="")
        page.click("#start")
        page.wait_for_function("document.querySelector('#bar progress')?.value >= 20", timeout=60_000)
        server.kill()
        (job,) = server.jobs()
        before = job.progress["step"]
        server.start()
        page.goto(server.url)
        wait_for(page, "Step ")
        assert before <= step(page) < 120
        wait_for(page, "Learned in 120 steps.")
    finally:
        server.kill()
    assert "Stopped at step" in job.log.read_text()  # by the worker, when its server was gone
    pipe = DiffusionPipeline.from_pretrained(WORLD, dtype=torch.float32)
    settings = {"placeholder_token": "<star>", "initializer_token": "star", "max_train_steps": 120, "resolution": 32}
    expected = DTITrainer(pipe, **settings).fit(Job(job.folder).photos)
    for component, rows in job.concept().embeddings.items():
        torch.testing.assert_close(rows, expected.embeddings[component])


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_does_not_scroll_sideways(server, open_page, width):
    page = open_page(server.url, width)
    for name in ("Train", "Play", "Blend", "Inspect"):
        tab = page.get_by_role("tab", name=name)
        if not tab.is_visible():  # behind the menu of tabs that do not fit
            page.locator(".overflow-menu button").first.click()
        tab.first.click() if tab.is_visible() else page.locator(".overflow-dropdown button", has_text=name).click()
        time.sleep(0.5)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_the_keyboard_alone(server, star, open_page):
    page = open_page(server.url)

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} cannot be reached by Tab")

    tab_to("#photos")
    with page.expect_file_chooser() as chooser:
        page.wait_for_timeout(500)  # until Chromium is told to hand the chooser over
        page.keyboard.press("Enter")
    chooser.value.set_files([str(file) for file in star])
    page.wait_for_selector("#crops img")
    for field, text in {"placeholder": "<keys>", "initializer": "star", "prompts": "a {}", "steps": "2"}.items():
        tab_to(f"#{field}")
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
    tab_to("#start")
    page.keyboard.press("Enter")
    wait_for(page, "Learned in 2 steps.")
    assert server.jobs()[-1].concept().placeholder_token == "<keys>"
    tab_to("#name")
    page.keyboard.type("by keys")
    tab_to("#save")
    page.keyboard.press("Enter")
    page.wait_for_selector("#outcome:has-text('Saved')")
