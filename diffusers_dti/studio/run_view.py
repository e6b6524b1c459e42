"""A run as it goes: its bar, its curves, its drawings, and what it yields. All of it is read from the job's folder."""

import html
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..concept import publish
from .job import WORD, Job, all_jobs
from .page import Studio, enlarged, errors_shown, gallery

CURVES = {"loss": "Loss", "angle": "Angle (°)", "norm": "Norm"}
ENDED = ("done", "stopped", "failed")
SECONDS = 1.0  # between two looks at the folder


class RunView:
    """The components of the view, which are created where it is made.

    Args:
        studio: what the page works on.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.runs = gr.Dropdown([], label="Run", elem_id="runs")
        self.bar = gr.HTML(elem_id="bar")
        with gr.Row():
            self.stop = gr.Button("Stop, and keep what was learned so far", visible=False, elem_id="stop")
            self.go_on = gr.Button("Go on", visible=False, elem_id="go-on")
        self.samples = gallery("As it learns, beside the initializer's word alone", "samples", 1 + 4)
        with gr.Row(elem_id="curves"):
            self.curves = [
                gr.LinePlot(
                    _points([], key),
                    x="step",
                    y=key,
                    title=title,
                    height=180,
                    min_width=140,
                    y_title=" ",
                    elem_id=f"curve-{key}",
                )
                for key, title in CURVES.items()
            ]
        with gr.Column(visible=False, elem_id="result") as self.result:
            self.files = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="download")
            with gr.Row():
                self.name = gr.Textbox(label="Name", info="to keep it under, for the other tabs", elem_id="name", scale=3)
                self.save = gr.Button("Save", elem_id="save", min_width=80, elem_classes="beside")
            with gr.Row():
                self.repo = gr.Textbox(label="Repository on the Hub", placeholder="user/dti-dog", elem_id="repo", scale=3)
                self.private = gr.Checkbox(True, label="Private", elem_id="private", min_width=80)
                self.push = gr.Button("Push", elem_id="push", min_width=80, elem_classes="beside")
            self.outcome = gr.Markdown(elem_id="outcome")
        with gr.Accordion("Messages", open=False, elem_id="messages"):
            self.notices = gr.Textbox(lines=4, max_lines=12, show_label=False, container=False, elem_id="notices")
        self.shown = gr.State({})  # what each part shows now, so that only what has changed is sent

    def listen(self, page: gr.Blocks, started: Any) -> None:
        """Connect the components.

        Args:
            page: the page, on whose load the newest run is shown.
            started: the event after which another run is shown.
        """
        own: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        parts = [self.runs, self.bar, self.stop, self.go_on, self.samples, *self.curves, self.result, self.files, self.notices]
        look: dict[str, Any] = {
            "fn": self.refresh, "inputs": [self.runs, self.shown], "outputs": [*parts, self.shown],
            "concurrency_limit": None, **own,
        }  # fmt: skip
        page.load(self.choose, None, self.runs, **own).then(**look)
        started.then(**look)
        gr.Timer(SECONDS).tick(**look)
        self.runs.input(**look)
        self.stop.click(self._stop, self.runs, None, **own).then(**look)
        self.go_on.click(self._go_on, self.runs, None, **own).then(**look)
        self.save.click(self._save, [self.runs, self.name], self.outcome, **own)
        self.push.click(self._push, [self.runs, self.repo, self.private], self.outcome, **own)

    def choose(self, name: str | None = None) -> Any:
        """Return the list of runs, with one of them chosen: by default the one that runs, or else the newest."""
        jobs = all_jobs(self.studio.runner.root)
        if name is None and jobs:
            name = next((job.name for job in jobs if job.status == "running"), jobs[-1].name)
        return gr.Dropdown(choices=_labels(jobs), value=name)

    def refresh(self, name: str | None, shown: dict[str, Any]) -> list[Any]:
        """Return what has changed of each part, and what is shown now."""
        jobs = all_jobs(self.studio.runner.root)
        job = next((job for job in jobs if job.name == name), None)
        labels = _labels(jobs)
        updates: list[Any] = [gr.skip() if shown.get("labels") == labels else gr.Dropdown(choices=labels)]
        now: dict[str, Any] = {"labels": labels}
        for key, (state, update) in self._parts(job, jobs).items():
            now[key] = (name, state)
            updates.append(gr.skip() if shown.get(key) == now[key] else update())
        return [*updates, now]

    def _parts(self, job: Job | None, jobs: list[Job]) -> dict[str, tuple[Any, Callable[[], Any]]]:
        """Return for each part what it depends on, and a function that makes its update."""
        status = job.status if job else ""
        text = _bar(job, jobs) if job else '<p class="bar">No run yet. Add photos, and start.</p>'
        history = job.history if job else []
        samples = _samples(job) if job else []
        folder = job.concept_folder if job and status in ENDED else None
        notices = job.notices if job else ""
        parts: dict[str, tuple[Any, Callable[[], Any]]] = {
            "bar": (text, lambda: text),
            "stop": (status in ("waiting", "running"), lambda: gr.Button(visible=status in ("waiting", "running"))),
            "go on": (status, lambda: gr.Button(visible=status in ("stopped", "failed"))),
            "samples": ([str(path) for path, _ in samples], lambda: _gallery(job, samples)),
        }
        for key in CURVES:
            parts[key] = (len(history), partial(_curve, history, key))
        files = [str(path) for path in sorted(folder.glob("learned_embeds*.safetensors"))] if folder else None
        parts["result"] = (folder is None, lambda: gr.Column(visible=folder is not None))
        parts["files"] = (files, lambda: files)
        parts["notices"] = (notices, lambda: notices)
        return parts

    def _job(self, name: str | None) -> Job:
        job = next((job for job in all_jobs(self.studio.runner.root) if job.name == name), None)
        if job is None:
            raise gr.Error("Choose a run.")
        return job

    def _stop(self, name: str | None) -> None:
        self.studio.runner.stop(self._job(name))

    def _go_on(self, name: str | None) -> None:
        self.studio.runner.resume(self._job(name))

    @errors_shown
    def _save(self, run: str | None, name: str) -> str:
        return f"Saved: {html.escape(str(self.studio.shelf.keep(self._job(run).concept(), name.strip())))}"

    @errors_shown
    def _push(self, run: str | None, repo: str, private: bool) -> str:
        job = self._job(run)
        concept, images = job.concept(), []
        for number, prompt in enumerate(job.prompts):
            drawn = list(job.samples(number).values())
            images.append((prompt.replace("{}", concept.placeholder_token), enlarged(drawn[-1])))
        angle = job.history[-1]["angle"] if job.history else None
        commit = publish.push(concept, repo.strip(), images=images, private=private, angle=angle)
        return f"Pushed: {commit}"


def _labels(jobs: list[Job]) -> list[tuple[str, str]]:
    """Return what to show for each run and its name, the newest first."""
    return [(f"{job.settings['placeholder_token']} · {job.status} · {job.name}", job.name) for job in reversed(jobs)]


def _bar(job: Job, jobs: list[Job]) -> str:
    """Return a bar and a line about a run."""
    status, progress = job.status, job.progress
    step, steps = progress.get("step", 0), progress.get("steps", job.settings.get("max_train_steps", 1))
    if status in ("stopped", "failed"):  # the worker reports less often than it steps
        step = job.kept_step
    start = f" It started from “{progress['initializer']}”." if "initializer" in progress else ""
    if status == "waiting":
        before = sum(other.status in ("waiting", "running") for other in jobs[: jobs.index(job)])
        text = f"Waiting for its turn: {before} before it." if before else "Waiting for its turn."
    elif status == "running" and step:
        left = progress.get("seconds_left")
        text = f"Step {step} of {steps}{'' if left is None else f', about {_duration(left)} left'}.{start}"
    elif status == "running":
        text = f"{progress.get('phase', 'Starting')} …"
    elif status == "done":
        text = f"Learned in {steps} steps.{start}"
    elif status == "stopped":
        kept = f" at step {step}. What was learned so far is below." if step else " before the first step."
        text = f"Stopped{kept}"
    else:
        text = f"Failed: {job.error}"
    return (
        f'<progress max="{steps}" value="{steps if status == "done" else step}" aria-label="Steps"></progress>'
        f'<p class="bar {status}">{html.escape(text, quote=False)}</p>'
    )


def _duration(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _curve(history: list[dict[str, float]], key: str) -> Any:
    """Return the update of a curve."""
    values = [entry[key] for entry in history if entry[key] is not None]
    bounds = None if key == "loss" or not values else [0, 1.1 * max(values)]
    return gr.LinePlot(value=_points(history, key), y_lim=bounds)


def _points(history: list[dict[str, float]], key: str) -> pd.DataFrame:
    """Return the points of a curve: none rather than None, since Gradio's plot fails if it loses its value while it draws."""
    return pd.DataFrame(history, columns=["step", key], dtype=float)


def _gallery(job: Job | None, samples: list[tuple[Path, str]]) -> Any:
    """Return the update of the drawings, with a row for each prompt also while the later steps are missing."""
    columns = max(len(job.samples(0)) if job else 0, 1)
    return gr.Gallery(value=[(enlarged(path), caption) for path, caption in samples], columns=columns)


def _samples(job: Job) -> list[tuple[Path, str]]:
    """Return the drawings of a run with their captions, prompt by prompt."""
    shown = []
    for number, prompt in enumerate(job.prompts):
        word = job.progress.get("initializer", "the word")
        for step, path in job.samples(number).items():
            caption = prompt.replace("{}", word) if step == WORD else f"step {step}"
            shown.append((path, caption))
    return shown
