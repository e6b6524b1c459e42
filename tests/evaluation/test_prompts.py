import os

import pytest
from helpers import no_hanging

from diffusers_dti.evaluation.prompts import LIVE_PROMPTS, OBJECT_PROMPTS, STYLE_PROMPTS, is_live, read_prompts

DREAMBOOTH = """Classes

subject_name,class
can,can
cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} under water'.format(unique_token, class_token),
'a yellow {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} under water'.format(unique_token, class_token),
"a {0} {1} in a jester's cap".format(unique_token, class_token),
'a tall {0} {1}'.format(unique_token, class_token)
]
"""


@pytest.mark.parametrize("prompts", [OBJECT_PROMPTS, LIVE_PROMPTS])
def test_there_are_as_many_prompts_as_in_the_paper(prompts):
    assert len(prompts) == len(set(prompts)) == 41
    for prompt in prompts:
        before, after = prompt.split("{}")
        assert prompt.format("dog") == f"{before}dog{after}" and before.endswith(" ") and prompt == prompt.strip()
        assert len(prompt.split()) < 25  # fits into 64 tokens
    assert sum(prompt.endswith("{}") for prompt in prompts) >= 5  # the placeholder late


def test_a_style_has_as_many_prompts_as_an_object():
    assert len(STYLE_PROMPTS) == len(set(STYLE_PROMPTS)) == 41
    for prompt in STYLE_PROMPTS:
        assert prompt.endswith(" in {} style") and prompt.count("{") == 1 and len(prompt.split()) < 25


@pytest.mark.parametrize(
    ("word", "live"),
    [
        *(("dog", True), ("Cat", True), ("old woman", True)),
        *(("teapot", False), ("stuffed animal", False), ("teddy bear", False), ("dog toy", False), ("", False)),
    ],
)
def test_the_last_word_decides_whether_it_is_alive(word, live):
    assert is_live(word) is live


def test_recognizes_the_living_classes_of_dreambooth():
    things = "backpack,stuffed animal,bowl,can,candle,clock,sneaker,toy,boot,glasses,cartoon,teapot,vase".split(",")
    assert not any(map(is_live, things)) and is_live("cat") and is_live("dog")


def test_reads_the_file_of_dreambooth(tmp_path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(DREAMBOOTH)
    assert read_prompts(path) == {
        "object": ["a {} under water", "a yellow {}"],
        "live": ["a {} under water", "a {} in a jester's cap", "a tall {}"],
    }


def test_reads_a_prompt_from_each_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\n a {} in a café \nbeside a tree, a {}\n", encoding="utf-8")
    assert read_prompts(path) == {kind: ["a {} in a café", "beside a tree, a {}"] for kind in ("object", "live", "style")}


@pytest.mark.parametrize("line", ["a dog", "a {} and a {}", "a {0}", "a {} in {place}", "a { } here"])
def test_errors_name_a_line_without_exactly_one_place(tmp_path, line):
    path = tmp_path / "mine.txt"
    path.write_text(f"a {{}} at sea\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3: .*exactly one"):
        read_prompts(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_rejects_what_is_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(OSError, match=rf"{path.name} is not a file: give a text file"), no_hanging():
            read_prompts(path)


def test_rejects_files_without_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no prompts for object and live"):
        read_prompts(path)
    path.write_text(DREAMBOOTH.split("Live")[0])
    with pytest.raises(ValueError, match="no prompts for live"):
        read_prompts(path)
    path.write_text(DREAMBOOTH.replace("a tall {0} {1}", "a tall {0}"))
    with pytest.raises(ValueError, match="line 21: .*exactly one"):
        read_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_in_the_encodings_of_common_editors(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("# été\na {} au café\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt")["live"] == ["a {} au café"]


def test_prompts_in_an_unknown_encoding_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a {} au café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not in UTF-8 or UTF-16: save it in UTF-8\."):
        read_prompts(tmp_path / "prompts.txt")
