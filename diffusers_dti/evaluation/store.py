"""Store results, so that nothing is computed twice: a file of JSON lines that several processes can write to."""

import ast
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..parsing import parse_json


class Store:
    """A file of results, which are found by their settings and by the code that computed them.

    Settings are the same if they are equal as JSON: their order does not matter, but 1 and 1.0 differ. If a result was put
    twice, the later one counts. The code is read once, when the store is opened.

    Args:
        path: the file; `put` creates it.
        code: what the results depend on: Python files, folders of Python files, and other files, such as weights. Comments,
            docstrings and the location of the code do not count, but the paths of the files relative to each other do.

    Attributes:
        path: the file.
        code: the digest of the code.

    Raises:
        ValueError: if there is no code.
        OSError: if a file of the code does not exist.

    Example:

        ```py
        >>> from pathlib import Path

        >>> from diffusers_dti.evaluation.store import Store

        >>> written = Path("experiment.py").write_text("def run(rate): return {'loss': 1 / rate}")
        >>> store = Store("out/results.jsonl", ["experiment.py"])
        >>> store.get({"rate": 2}) is None
        True
        >>> store.put({"rate": 2}, {"loss": 0.5})
        >>> store.get({"rate": 2})
        {'loss': 0.5}
        ```
    """

    def __init__(self, path: str | Path, code: Iterable[str | Path]):
        self.path = Path(path)
        self.code = _digest(code)
        self._rows: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes of the file that are in `_rows`

    def key(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a result is found by: the settings as JSON, and the digest of the code.

        Raises:
            ValueError: if the settings are not JSON.
        """
        try:
            text = json.dumps(dict(settings), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Settings must be JSON: strings, finite numbers, lists and mappings of them. {error}") from error
        return {"settings": json.loads(text), "code": self.code}

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result for these settings and this code, or None if there is no result yet.

        Raises:
            ValueError: if the settings are not JSON.
        """
        self._update()
        row = self._rows.get(_text(self.key(settings)))
        return None if row is None else copy.deepcopy(row["result"])

    def put(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Add a result, and return when it is on the disk.

        Args:
            settings: what the result is found by.
            result: JSON values, which may contain infinite numbers and NaN.

        Raises:
            ValueError: if the settings are not JSON.
            TypeError: if the result is not JSON.
        """
        line = (json.dumps(self.key(settings) | {"result": dict(result)}) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    # Another process was killed while it wrote, or is still writing. Empty lines do no harm.
                    line = b"\n" + line
            # One write in append mode: the lines of other processes cannot come in between.
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Return all results of this code, each as {"settings": ..., "code": ..., "result": ...}."""
        self._update()
        return copy.deepcopy(list(self._rows.values()))

    def _update(self) -> None:
        """Read what this and other processes have added to the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._read += len(line)
                try:
                    row = parse_json(line)
                except ValueError:  # a process was killed while it wrote this
                    continue
                if self._is_result(row):
                    self._rows[_text({"settings": row["settings"], "code": row["code"]})] = row

    def _is_result(self, row: Any) -> bool:
        """Return whether a line is a result of this code, and not another program's."""
        if not isinstance(row, dict) or row.get("code") != self.code:
            return False
        return isinstance(row.get("settings"), dict) and isinstance(row.get("result"), dict)


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(code: Iterable[str | Path]) -> str:
    """Return the SHA-256 of the files' contents and of their paths below the folder that they share."""
    files: set[Path] = set()
    for entry in code:
        path = Path(os.path.abspath(entry))  # not `resolve()`, which would replace the names of links
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    if not files:
        raise ValueError("No code was given: name the Python files and folders that the results depend on.")
    common = os.path.commonpath([file.parent for file in files])
    contents = {file.relative_to(common).as_posix(): _content(file) for file in files}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _content(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".py":
        content = _meaning(ast.parse(content, file)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()


def _meaning(node: Any) -> str:
    """Write out a syntax tree, like `ast.dump` but without docstrings and empty fields.

    Every release of Python has other empty fields, and `ast.dump` would write them.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                fields.append(f"{name}={_meaning(value)}")
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(_meaning(entry) for entry in node if not _is_docstring(entry))}]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """Return whether a node is a statement that consists of a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
