"""Download from the Hub, and turn what the Hub or the connection refuses into one error with a hint."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of requests, httpx or httpx2, by version
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
CREDENTIAL = re.compile(r"hf_\w{4,}", re.ASCII)
STATUS_HINTS = {
    401: "no valid token was sent, and without one a private repository looks like a missing one: check the id, then log in "
    "with `hf auth login` or pass a token",
    403: "your token lacks permission: pushing needs a token with write access, and a gated repository needs your consent on "
    "its page",
    404: "the repository does not exist, or your token may not see it: check the id and the token",
    409: "someone else is changing the repository: try again",
    412: "the repository has changed in the meantime: try again",
    429: "there were too many requests: wait a few minutes and try again",
}


# --------------------------------------------------------------------------------------------------------- credentials
def checked_token(token: str | bool | None) -> str | bool | None:
    """Return an access token without the white space around it, which one from a file has.

    Args:
        token: the token, or whether to use the one of `hf auth login`.

    Raises:
        ValueError: if it cannot be a token. The message does not repeat it.
    """
    if not isinstance(token, str):
        return token
    if not re.fullmatch(r"[!-~]+", token.strip()):  # it would appear in the error of whoever sends it
        raise ValueError("The Hub's access token has characters that no token has: copy it again from your Hub settings.")
    return token.strip()


def redacted(text: str) -> str:
    """Return a text of others in one line, without the credentials in it."""
    return CREDENTIAL.sub("hf_***", " ".join(text.split()))


# --------------------------------------------------------------------------------------------------------- downloading
def download(repo_id: str, candidates: Sequence[Sequence[str]], **hub_kwargs: Any) -> list[Path]:
    """Download the first group of files that the repository has any of. All files come from one commit.

    Args:
        repo_id: "user/name".
        candidates: groups of paths in the repository, the preferred one first.
        hub_kwargs: arguments of `huggingface_hub.hf_hub_download`: `token`, `revision`, `cache_dir`, and so on.

    Returns:
        The files that exist, in the Hub's cache.

    Raises:
        EntryNotFoundError: if the repository has none of the files.
        OSError: if the id is not a repository id, or the Hub refuses or cannot be reached.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise OSError(f"{repo_id} is neither a file or folder here nor a repository id on the Hub.")
    hub_kwargs["token"] = checked_token(hub_kwargs.get("token"))
    offline = hub_kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE
    missing: EntryNotFoundError | None = None
    for names in candidates:
        try:
            return _download_group(repo_id, names, hub_kwargs)
        except EntryNotFoundError as error:
            missing = error
    if offline and isinstance(missing, LocalEntryNotFoundError):
        raise OSError(f"{repo_id} is not in the cache, and the Hub is offline here: load it once while online.") from missing
    assert missing is not None, "no candidates"
    raise missing


def _download_group(repo_id: str, names: Sequence[str], hub_kwargs: Mapping[str, Any]) -> list[Path]:
    """Download the files of a group that exist, or raise the last `EntryNotFoundError` if none does."""
    files: list[Path] = []
    missing: EntryNotFoundError | None = None
    commit: str | None = None
    for name in names:
        # A commit never changes: a file that it is known to lack need not be asked for, even while the Hub is down.
        if commit and try_to_load_from_cache(repo_id, name, hub_kwargs.get("cache_dir"), commit) is _CACHED_NO_EXIST:
            continue
        try:
            with hub_errors(repo_id):
                file = Path(hf_hub_download(repo_id, name, **hub_kwargs))
        except EntryNotFoundError as error:
            missing = error
            continue
        except HFValidationError as error:
            raise OSError(f"{repo_id} is neither a file or folder here nor a repository id on the Hub.") from error
        files.append(file)
        snapshot = file.parents[name.count("/")]
        if snapshot.parent.name == "snapshots":  # not with `local_dir`
            commit = snapshot.name
            hub_kwargs = {**hub_kwargs, "revision": commit}
    if not files and missing is not None:
        raise missing
    return files


# ------------------------------------------------------------------------------------------------------------- refusals
@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client within the block into an OSError of one line that says what to do.

    A missing file (`EntryNotFoundError`), invalid arguments and errors of the disk pass unchanged.

    Args:
        repo_id: the repository that the message names.

    Raises:
        OSError: if the Hub refuses or the connection fails.
    """
    try:
        yield
    except (OSError, HTTPError, RuntimeError, EntryNotFoundError, json.JSONDecodeError) as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        hint = _hint(chain)
        if hint is None:
            raise
        raise OSError(f"{repo_id}: {hint}.") from error


def _hint(chain: Sequence[BaseException]) -> str | None:
    """Say what to do about an error, given with its causes; None if neither the Hub nor the connection is at fault."""
    error = chain[0]
    if _is_missing_file(chain) or _is_disk_error(error):
        return None
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. The repository's page lists its branches and tags"
    for cause in chain:
        response = getattr(cause, "response", None)
        if response is None:
            continue
        status = response.status_code
        other = "it is out of order: try again later" if status >= 500 else redacted(str(error))
        return f"the Hub answers {status}, {STATUS_HINTS.get(status, other)}"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub's answer is not what its client expects: try again later"
    return f"the connection to the Hub failed ({redacted(str(chain[-1]))}): check it and try again"


def _is_missing_file(chain: Sequence[BaseException]) -> bool:
    """Return whether a file is missing, as opposed to a Hub that could not be asked for it."""
    if not isinstance(chain[0], EntryNotFoundError):
        return False
    if not isinstance(chain[0], LocalEntryNotFoundError):
        return True
    # The file is not in the cache. A cause means that asking the Hub failed, unless it was not to be asked.
    return len(chain) == 1 or isinstance(chain[1], OfflineModeIsEnabled)


def _is_disk_error(error: BaseException) -> bool:
    """Return whether an error is the operating system's, such as a full disk, and not the connection's."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
