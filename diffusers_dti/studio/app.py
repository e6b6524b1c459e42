"""The page: its tabs, and how it is served."""

import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from . import blend_tab, inspect_tab, photos, play_tab, train_tab
from .models import Models, Opening
from .page import Studio
from .runner import Runner
from .shelf import Shelf

CSS = """
footer { display: none !important; }
#bar progress { width: 100%; height: 10px; appearance: none; border: none; border-radius: 5px; overflow: hidden; }
#bar progress::-webkit-progress-bar { background: var(--border-color-primary); }
#bar progress::-webkit-progress-value { background: var(--color-accent); }
#bar progress::-moz-progress-bar { background: var(--color-accent); }
#bar p { margin: 0.25rem 0 0; }
#bar p.failed { color: var(--error-text-color); }
/* Below the label, and as tall as its images. */
.gallery-container .grid-wrap { min-height: 160px !important; max-height: none !important; padding-top: 36px; }
@media (max-width: 640px) {
  #samples .grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important; }
}
#download td:has(button) { display: none; }  /* a cross that would only hide the file from view */
.beside { align-self: flex-end; height: 42px; }
"""
DAY = 24 * 60 * 60  # seconds


def make_studio(output_dir: Path, opening: Opening, resolutions: Mapping[str, int | None]) -> Studio:
    """Make what the page works on, and let go on what another server has left.

    Args:
        output_dir: the folder of jobs and concepts.
        opening: how models are opened.
        resolutions: the models to offer, each with its resolution of training, or None for that of its family.

    Raises:
        OSError: if another server uses the folder, or it cannot be written to.
    """
    models, jobs = Models(opening), output_dir / "jobs"
    return Studio(Runner(jobs, models, opening), models, Shelf(output_dir / "concepts", jobs), resolutions)


def build(studio: Studio) -> gr.Blocks:
    """Build the page."""
    # Uploads are copied into the jobs' folders; Gradio deletes its own copies after a day.
    with gr.Blocks(title="DTI studio", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown("# DTI studio\nShow a model a few photos, and it learns a word for what they show.")
        with gr.Tab("Train", id="train", elem_id="tab-train"):
            train_tab.build(studio, page)
        with gr.Tab("Play", id="play", elem_id="tab-play") as play:
            play_tab.build(studio, play)
        with gr.Tab("Blend", id="blend", elem_id="tab-blend") as blend:
            blend_tab.build(studio, blend)
        with gr.Tab("Inspect", id="inspect", elem_id="tab-inspect") as inspect:
            inspect_tab.build(studio, inspect)
    return page


def check_host(host: str, password: str | None) -> None:
    """Check that a page which others can reach has a password.

    Raises:
        ValueError: if it has none.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anybody's
        local = False
    if not local and not password:
        raise ValueError(f"--host {host} lets other machines open the page: give a --password as well.")


def serve(studio: Studio, host: str, port: int, password: str | None) -> None:
    """Serve the page until the process is interrupted.

    Args:
        studio: what the page works on.
        host: the address to listen at.
        port: the port.
        password: what to ask for, with any user's name, or None.

    Raises:
        ValueError: if other machines can reach the host and there is no password.
        OSError: if the port is taken.
    """
    check_host(host, password)
    auth: dict[str, Any] = {}
    if password:
        auth["auth"] = lambda user, given: hmac.compare_digest(given.encode(), password.encode())
        auth["auth_message"] = "Any name, and the password that the studio was started with."
    build(studio).queue().launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, show_error=True, css=CSS, footer_links=[],
        allowed_paths=[str(studio.runner.root.parent)], max_file_size=f"{photos.MAX_MEGABYTES}mb", **auth,
    )  # fmt: skip
