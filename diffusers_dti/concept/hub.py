"""The Hub: a concept pushed as one commit, and what the Hub or the connection refuses as one error that names the cure."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image

from . import formats

if TYPE_CHECKING:
    from ..training.adapter import Adapter
    from .inversion import DirectionalInversion

SampleImages = Sequence[Image.Image | tuple[str, Image.Image]]

IMAGES = "images"  # the samples' folder
REPO_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
STATUS_HINTS = {
    401: "it knows no token of yours, and without one a private repository and none look alike: check the id, and log in by "
    "`hf auth login` or give a token",
    403: "your token may not do that: pushing needs one with write access, and a gated repository your consent on its page",
    404: "there is no such repository, or your token may not see it: check the id, and the token",
    409: "something else is changing the repository: try again",
    412: "the repository has changed meanwhile: try again",
    429: "these were too many requests: wait some minutes and try again",
}


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises inside becomes an OSError in one line that names the cure.

    A single file that is not there (`EntryNotFoundError`), invalid arguments and errors of the disk pass as they are.
    """
    from huggingface_hub.errors import EntryNotFoundError, HTTPError  # of its HTTP library, one of three: also lost connections

    try:
        yield
    except (OSError, HTTPError, RuntimeError, EntryNotFoundError, json.JSONDecodeError) as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        if (cure := _cure(chain)) is None:
            raise
        raise OSError(f"{repo_id}: {cure}.") from error


def _cure(chain: Sequence[BaseException]) -> str | None:
    """What to do about an error, given with its causes; None where it is not the Hub's or the connection's."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    error = chain[0]
    local = isinstance(error, LocalEntryNotFoundError)  # not cached, and the Hub could not be asked, or was not to be
    if isinstance(error, EntryNotFoundError) and (not local or len(chain) == 1 or isinstance(chain[1], OfflineModeIsEnabled)):
        return None
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return None  # a full disk
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Its branches and tags are on its page"
    responses = [r for r in (getattr(e, "response", None) for e in chain) if r is not None]
    if responses:
        status = responses[0].status_code
        other = "it is out of order: try again later" if status >= 500 else " ".join(str(error).split())
        return f"the Hub answers {status}, {STATUS_HINTS.get(status, other)}"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub's answer is not what its client expects: try again later"
    return f"the connection to the Hub failed ({' '.join(str(chain[-1]).split())}): check it and try again"


def push(
    concept: "DirectionalInversion",
    repo_id: str,
    *,
    images: SampleImages | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    adapter: "Adapter | None" = None,
    angle: float | None = None,
) -> str:
    """Create the repository if need be and commit a concept's files, samples and card; see `DirectionalInversion.push_to_hub`.

    Args:
        adapter: what was trained together with it.
        angle: to the initializer, degrees, mean over the vectors.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from .model_card import model_card

    samples = [s if isinstance(s, tuple) else (None, s) for s in images or ()]
    for prompt, picture in samples:
        if not isinstance(prompt, str | None) or not isinstance(picture, Image.Image):
            raise TypeError(f"`images` takes PIL pictures, or pairs of a prompt and a picture; got {type(picture).__name__}.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = Path(temporary), PurePosixPath(subfolder or "")
        base = str(concept.metadata.get("base_model") or "")
        if set(base) & set("/\\") and not re.fullmatch(REPO_ID, base, re.ASCII):  # a folder of this machine
            concept = replace(concept, metadata={k: v for k, v in concept.metadata.items() if k != "base_model"})
        concept.save_pretrained(folder)
        if adapter is not None:
            adapter.save(folder)
        for i, (_, picture) in enumerate(samples):
            (folder / IMAGES).mkdir(exist_ok=True)
            plain = picture.convert("RGB")
            plain.info = {}  # a camera's place and time, a program's settings
            plain.save(folder / IMAGES / f"{i}.png")
        with hub_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision not in (None, "main") and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = api.list_repo_files(repo_id, revision=revision)
        prompts = [prompt for prompt, _ in samples]
        model_card(concept, repo_id, prompts, license, subfolder, adapter is not None, angle).save(folder / "README.md")

        files = {str(root / p.relative_to(folder).as_posix()): p for p in sorted(folder.rglob("*")) if p.is_file()}
        # not an adapter that is there: only a trainer knows whether there is a new one
        own = {str(root / name) for name in map(formats.file_name, formats.COMPONENTS)}
        samples_there = re.compile(re.escape(str(root / IMAGES)) + r"/\d+\.png")
        old = [p for p in there if p in own or samples_there.fullmatch(p)]
        # one commit, unlike `upload_folder`'s, so that nobody loads half of a concept, or halves of two
        operations = [CommitOperationDelete(p) for p in old if p not in files]
        operations += [CommitOperationAdd(p, path) for p, path in files.items()]
        with hub_errors(repo_id):
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload {concept.placeholder_token}",
                revision=revision,
                create_pr=create_pr,
            )
