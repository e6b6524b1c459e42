import doctest
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest

from diffusers_dti.evaluation.store import Store

CODE = '''"""A module."""
import math  # of the standard library

class A:
    """A class."""
    def f(self, x=1):
        """A method."""
        return math.pi * x + len("text")
'''


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "checkout" / "code"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text(CODE)
    (folder / "sub" / "b.py").write_text("x = 1\n")
    (folder / "notes.md").write_text("no code")
    return folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "store.jsonl"


def start(script, *arguments):
    """Start a process that has `Store`, without the imports of the package, which take seconds."""
    lines = ["import sys, types"]
    for name in ("diffusers_dti", "diffusers_dti.evaluation"):  # empty packages: their own would import torch
        lines.append(f"sys.modules[{name!r}] = package = types.ModuleType({name!r})")
        lines.append(f"package.__path__ = {list(sys.modules[name].__path__)!r}")
    lines += ["from diffusers_dti.evaluation.store import Store", script]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines), *map(str, arguments)])


def test_finds_results_by_their_settings(path, code):
    results = Store(path, [code])
    assert results.get({"a": 1}) is None and results.rows() == []
    results.put({"rate": 0.1 + 0.2, "names": ("dog", "cat"), "deep": {"x": None, "y": True}}, {"score": 1 / 3})
    same = {"deep": {"y": True, "x": None}, "names": ["dog", "cat"], "rate": 0.30000000000000004}
    assert results.get(same) == {"score": 1 / 3} == Store(path, [code]).get(same)
    for other in (same | {"rate": 0.3}, same | {"names": ["cat", "dog"]}, same | {"more": None}, same | {"deep": {"x": None}}):
        assert results.get(other) is None
    assert results.key(same) == {"settings": same, "code": results.code}
    (line,) = path.read_text().splitlines()
    assert results.rows() == [json.loads(line)] == [results.key(same) | {"result": {"score": 1 / 3}}]
    results.get(same)["score"] = 0  # a copy
    results.rows()[0]["result"]["score"] = 0
    assert results.get(same) == {"score": 1 / 3}


def test_the_later_result_counts(path, code):
    results = Store(path, [code])
    for score in (1, 2):
        results.put({"a": 1}, {"score": score})
    assert results.get({"a": 1}) == {"score": 2} and [row["result"] for row in results.rows()] == [{"score": 2}]
    assert Store(path, [code]).get({"a": 1}) == {"score": 2} and len(path.read_text().splitlines()) == 2


def test_sees_what_other_stores_add(path, code):
    first, second = Store(path, [code]), Store(path, [code])
    for number in range(3):
        second.put({"n": number}, {"score": number})
        assert first.get({"n": number}) == {"score": number} and first.get({"n": number + 1}) is None
    assert len(first.rows()) == 3


@pytest.mark.parametrize("settings", [{"a": {1}}, {"a": object()}, {"a": math.nan}, {"a": [math.inf]}, {1: "a", "b": "c"}])
def test_rejects_settings_that_are_not_json(path, code, settings):
    results = Store(path, [code])
    for call in (results.key, results.get, lambda x: results.put(x, {})):
        with pytest.raises(ValueError, match="Settings must be JSON"):
            call(settings)
    assert not path.exists()


def test_rejects_results_that_are_not_json(path, code):
    results = Store(path, [code])
    with pytest.raises(TypeError):
        results.put({"a": 1}, {"score": object()})
    assert not path.exists()
    results.put({"a": 1}, {"loss": math.nan})  # of a run that diverged
    assert math.isnan(results.get({"a": 1})["loss"])


def test_two_processes_write_at_once(path, code):
    script = """
results, me = Store(sys.argv[1], [sys.argv[2]]), sys.argv[3]
for number in range(200):
    results.put({"process": me, "number": number}, {"text": me * (1 + 97 * number)})  # up to 19 KB, beyond any buffer
"""
    processes = [start(script, path, code, me) for me in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    results = Store(path, [code])
    assert len(results.rows()) == len(list(filter(None, path.read_text().splitlines()))) == 400
    for me in "ab":
        for number in range(200):
            assert results.get({"process": me, "number": number}) == {"text": me * (1 + 97 * number)}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes end in other ways")
def test_a_process_killed_while_it_writes(path, code):
    before = Store(path, [code])
    before.put({"n": 0}, {"text": "whole"})
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel cuts the write short and kills the process
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
Store(sys.argv[1], [sys.argv[2]]).put({"n": 1}, {"text": "x" * 5000})
"""
    assert start(script, path, code).wait(timeout=60) == -signal.SIGXFSZ
    assert path.stat().st_size == 1000 and not path.read_bytes().endswith(b"\n")
    after = Store(path, [code])
    for results in (before, after):
        assert results.get({"n": 0}) == {"text": "whole"} and results.get({"n": 1}) is None and len(results.rows()) == 1
    after.put({"n": 2}, {"text": "next"})
    for results in (before, after, Store(path, [code])):
        assert [row["settings"]["n"] for row in results.rows()] == [0, 2] and results.get({"n": 2}) == {"text": "next"}


@pytest.mark.parametrize("depth", [400, 100_000])
def test_lines_nested_too_deeply_are_passed_over(path, code, depth):
    results = Store(path, [code])
    results.put({"n": 0}, {"score": 1})
    line = path.read_text().replace('"n": 0', '"n": 1').replace('"score": 1', '"score": ' + "[" * depth + "]" * depth)
    with path.open("a") as file:
        file.write(line)
    assert [row["settings"]["n"] for row in results.rows()] == [0] and results.get({"n": 1}) is None


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", '"code"', "null", "{}", '{"code": CODE}', '{"code": CODE, "settings": {"a": 1}}', "\\xff\\xfe", "[" * 100_000],
)
def test_a_line_that_is_no_result_is_passed_over(path, code, line):
    results = Store(path, [code])
    results.put({"a": 1}, {"score": 1})
    with path.open("ab") as file:
        file.write(line.replace("CODE", json.dumps(results.code)).encode().replace(b"\\xff\\xfe", b"\xff\xfe") + b"\n")
    results.put({"a": 2}, {"score": 2})
    for store_ in (results, Store(path, [code])):
        assert store_.get({"a": 1}) == {"score": 1} and store_.get({"a": 2}) == {"score": 2} and len(store_.rows()) == 2


def test_reads_a_line_once_it_is_complete(path, code):
    results = Store(path, [code])
    results.put({"n": 0}, {})
    line = path.read_bytes().replace(b'"n": 0', b'"n": 1')
    for part, expected in ((line[:30], None), (line[30:-1], None), (line[-1:], {})):
        with path.open("ab") as file:
            file.write(part)
        assert results.get({"n": 1}) == expected


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("A method", "What it does, in better words", True),
        ('    """A class."""\n', "", True),
        ("# of the standard library", "", True),
        ("import math", "import math\n\n'a remark'", True),
        ("math.pi * x", "(math.pi*x)", True),
        ("x=1", "x=2", False),
        ("x=1", "x=1.0", False),
        ("x=1", "x=True", False),
        ("x=1", "x=None", False),
        ('len("text")', 'len("Text")', False),
        ("math.pi", "math.e", False),
        ("* x", "+ x", False),
        ("(self, x=1)", "(self, *, x=1)", False),
    ],
)
def test_code_counts_but_comments_and_docstrings_do_not(path, code, before, after, kept):
    Store(path, [code]).put({"a": 1}, {"score": 1})
    assert before in CODE
    (code / "a.py").write_text(CODE.replace(before, after))
    assert (Store(path, [code]).get({"a": 1}) is not None) == kept
    (code / "a.py").write_text(CODE)  # earlier results are found again
    assert Store(path, [code]).get({"a": 1}) == {"score": 1}


def test_contents_and_names_count_but_locations_do_not(path, code, tmp_path):
    weights = code.parent / "weights.bin"
    weights.write_bytes(b"\xff\x00")
    Store(path, [code, weights]).put({"a": 1}, {"score": 1})

    def found(folder):
        return Store(path, [folder / "code", folder / "weights.bin"]).get({"a": 1}) is not None

    other = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(code.parent, other)
    assert found(other) and found(other / "code" / "..")
    (other / "code" / "notes.md").write_text("others")
    assert found(other)
    assert Store(path, [weights, code / "sub", code, code / "a.py"]).code == Store(path, [code, weights]).code
    (other / "weights.bin").write_bytes(b"\xff\x01")
    assert not found(other)
    (other / "weights.bin").write_bytes(b"\xff\x00")
    (other / "code" / "sub" / "b.py").rename(other / "code" / "b.py")
    assert not found(other)
    (other / "code" / "b.py").rename(other / "code" / "sub" / "b.py")
    assert found(other)
    (other / "code" / "c.py").touch()
    assert not found(other)


def test_rejects_missing_code(path, tmp_path):
    with pytest.raises(ValueError, match="No code was given: name the Python files"):
        Store(path, [])
    with pytest.raises(OSError, match=r"nowhere\.py"):
        Store(path, [tmp_path / "nowhere.py"])


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = re.search("```py\n(.*?)```", Store.__doc__, re.S)[1]
    example = doctest.DocTestParser().get_doctest(text, {}, "Store", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 7) and (tmp_path / "out" / "results.jsonl").is_file()
