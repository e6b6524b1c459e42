"""Run the jobs of a folder one after the other, each in a process of its own."""

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .job import Job, all_jobs
from .models import Models, Opening
from .worker import ERROR, STOPPED


class Runner:
    """The queue of jobs. What another server has left waiting or running goes on.

    Args:
        root: the folder of all jobs.
        models: the pipeline of the page, which makes way for a run.
        opening: how models are opened.

    Raises:
        OSError: if another server uses the folder, or it cannot be written to.
    """

    def __init__(self, root: Path, models: Models, opening: Opening):
        root.mkdir(parents=True, exist_ok=True)
        self.root, self._models, self._opening = root, models, opening
        self._lock = FileLock(root / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise OSError(f"Another studio uses {root}: choose another --output_dir, or close that one.") from error
        for job in all_jobs(root):
            if job.status == "running":
                job.set_status("waiting")
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._current: Job | None = None
        self._stopping = False
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, uploads: Sequence[str | Path], model: str, settings: Mapping[str, Any]) -> Job:
        """Add a job, see `Job.create`."""
        job = Job.create(self.root, uploads, model, settings)
        with self._changed:
            self._changed.notify()
        return job

    def stop(self, job: Job) -> None:
        """Stop a job, which keeps what was learned so far. Nothing happens if it neither waits nor runs."""
        with self._changed:
            if job == self._current:
                self._stopping = True
                if self._process is not None and self._process.stdin is not None:
                    self._process.stdin.close()
            elif job.status == "waiting":
                job.set_status("stopped")

    def resume(self, job: Job) -> None:
        """Let a job go on that was stopped or has failed."""
        with self._changed:
            if job.status in ("stopped", "failed"):
                job.set_status("waiting")
                self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self._next()) is None:
                    self._changed.wait()
                self._current, self._stopping = job, False
                job.set_status("running")
            try:
                with self._models.put_away():
                    self._run(job)
            except OSError as error:
                job.set_status("failed", str(error))
            with self._changed:
                self._current = self._process = None

    def _is_stopping(self) -> bool:
        return self._stopping

    def _next(self) -> Job | None:
        return next((job for job in all_jobs(self.root) if job.status == "waiting"), None)

    def _run(self, job: Job) -> None:
        command = [sys.executable, "-m", "diffusers_dti.studio.worker", str(job.folder)]
        command += [self._opening.dtype or "", self._opening.device or ""]
        with job.log.open("ab") as log:
            start = log.tell()
            with self._changed:
                if self._is_stopping():
                    job.set_status("stopped")
                    return
                # A session of its own: Ctrl-C in the terminal ends the server, and the worker by its input.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            status = self._process.wait()
        if status == 0:
            job.set_status("done")
        elif self._is_stopping() and status == STOPPED:
            job.set_status("stopped")
        else:
            job.set_status("failed", _reason(job, start) or f"The run ended unexpectedly (status {status}).")


def _reason(job: Job, start: int) -> str:
    """Return why a run failed, from what it has written to the log."""
    lines = job.log.read_bytes()[start:].decode(errors="replace").splitlines()
    return next((line.removeprefix(ERROR) for line in reversed(lines) if line.startswith(ERROR)), "")
