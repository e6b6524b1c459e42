"""The card: what it says, and that user text stays text."""

import ast
import html
import re
from itertools import groupby

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept.model_card import escaped, model_card

HOSTILE = [
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}{# no #}",
    "---\ntags: [stolen]\n---",
    "a: b # c\n- d: &x !!python/object/apply:os.system ['false']",
    "```\n# heading\n```python\nimport os",
    "**bold** _it_ __b__ [link](javascript:alert(1)) ![p](http://x/y.png) | cell | `code` ~~s~~ <!-- --> &lt; \\*",
    '"quoted" \'single\' """triple""" \\" \\\\ %s ${HOME} $(id)',
    "null",
    "1.50",
    "ünïcode 犬 🐕 \u2028 \x85 tab\there",
    "</code></pre><img src=x onerror=alert(1)>",
    "| --- |\n| x |",
]


def concept(word="<dog>", vectors=1, **metadata):
    generator = torch.Generator().manual_seed(0)
    rows = {"text_encoder": torch.randn(vectors, 16, generator=generator), "text_encoder_2": torch.randn(1, 24)}
    return DirectionalInversion.from_embeddings(word, rows, metadata).rescale({"text_encoder": 0.3871, "text_encoder_2": 0.452})


TRAINED = {
    "initializer": "dog",
    "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
    "family": "SDXL",
    "method": "dti",
    "scale_rule": "mean",
    "pooling": "eos",
    "training": {
        "learning_rate": 0.01,
        "max_train_steps": 400,
        "scale_lr": True,
        "templates": ["a photo of a {}"],
        "beta": None,
    },
    "versions": {"diffusers": "0.42.1", "torch": "2.13.0"},
}


def front_matter(card):
    """The YAML as the Hub cuts it out (the expression is its own), read by PyYAML."""
    found = re.search(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", card)
    return yaml.safe_load(found[2]), card[found.end() :]


def test_the_card_of_a_trained_concept():
    text = str(model_card(concept(**TRAINED), "user/dti-dog", ["a <dog> in the snow", None], "openrail++", angle=61.26))
    print(text)
    data, body = front_matter(text)
    assert data == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "library_name": "diffusers",
        "license": "openrail++",
        "tags": ["textual_inversion", "directional-textual-inversion", "stable-diffusion-xl", "text-to-image"],
        "instance_prompt": "<dog>",
        "widget": [
            {"text": "a <dog> in the snow", "output": {"url": "images/0.png"}},
            {"text": " ", "output": {"url": "images/1.png"}},
        ],
    }
    for line in (
        "| text_encoder | 1 | 16 | 0.3871 |",
        "| text_encoder_2 | 1 | 24 | 0.452 |",
        "Norm: the mean of the encoder's vocabulary.",
        "Angle to the initializer: 61.3° on average.",
        "| learning_rate | 0.01 |",
        "| scale_lr | true |",
        "<Gallery />",
        "diffusers 0.42.1, torch 2.13.0.",
    ):
        assert f"\n{line}\n" in f"{body}\n", line
    assert "reg_lambda" not in body
    blocks = re.findall(r"```python\n(.*?)```", body, re.S)
    assert len(blocks) == 2 and all(len(b.splitlines()) <= 10 for b in blocks)
    assert 'load_directional_inversion("user/dti-dog")' in blocks[0] and blocks[1].count("load_textual_inversion") == 2
    assert ModelCard(text).data.to_dict() == data


def test_unknown_values_are_left_out():
    data, body = front_matter(str(model_card(concept(), "user/dti-dog")))
    assert data.keys() == {"library_name", "tags", "instance_prompt"}
    for word in ("Gallery", "Training", "Norm:", "Angle", "None", ", learned", "{{", "\n\n\n"):
        assert word not in body, word
    data, body = front_matter(str(model_card(concept(method="ti", scale_rule="learned"), "user/dti-dog", adapter=True)))
    assert data["tags"] == ["textual_inversion", "lora"]
    assert body.count('pipe.load_lora_weights("user/dti-dog", weight_name="pytorch_lora_weights.safetensors")') == 2
    card = str(model_card(concept(family="Wan"), "user/dti-dog", subfolder="cats/cat"))
    assert 'load_directional_inversion("user/dti-dog", subfolder="cats/cat")' in card
    assert "load_textual_inversion" not in card and ".frames[0]" in card


def test_the_code_names_the_dtype_as_diffusers_does():
    body = str(model_card(concept(), "user/dti-dog"))
    assert body.count(", dtype=torch.bfloat16)") == 2 and "torch_dtype" not in body


@pytest.mark.parametrize("base", ["out/my/model", "/home/me/model", "C:\\me", "..", "model", "a/b\nc", 5, ["x"], '"a/b"'])
def test_a_base_model_that_is_not_a_repository_is_left_out(base):
    data, body = front_matter(str(model_card(concept(base_model=base), "user/dti-dog")))
    assert "base_model" not in data and body.count('from_pretrained("path/of/the/base-model"') == 2
    assert str(base) not in body.replace("path/of/the/base-model", "").replace("text-to-image model", "") or base in (5, "..")


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_is_text(text):
    word = text.strip()
    settings = {"templates": [text], text: text, "nested": {text: [text]}}
    everywhere = {k: text for k in ("initializer", "base_model", "family", "method", "scale_rule")}
    card = str(model_card(concept(word, training=settings, versions={text: text}, **everywhere), "user/dti-dog", [text]))
    data, body = front_matter(card)
    assert data["instance_prompt"] == word and data["widget"][0]["text"] == text
    assert data.keys() == {"library_name", "tags", "instance_prompt", "widget"} and "stolen" not in data["tags"]
    assert "49" not in body
    # outside code: entities, on one line
    assert f"# {escaped(word)}\n" in body
    assert html.unescape(escaped(text)) == " ".join(text.split())
    assert not re.search(r"[<>\[\]`*|~\\!:#&](?!#?\d+;)", re.sub(r"&#\d+;", "", escaped(text)))
    # inside code: calls of ours, with the text as one literal
    for block in re.findall(r"```python\n(.*?)\n```", body, re.S):
        tree = ast.parse(block)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert {ast.unparse(c.func).split(".")[-1] for c in calls} <= {
            "from_pretrained", "to", "load_directional_inversion", "load_textual_inversion", "pipe"
        }  # fmt: skip
        assert [c.args[0].value for c in calls if ast.unparse(c.func) == "pipe"] == [text]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_parser_of_markdown_sees_text(text):
    """Headings, paragraphs, tables and fences are those of a harmless card, and the text is what was given."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])

    def tokens(word, other):
        card = model_card(concept(word, training={other: other}, initializer=other, family=other), "user/dti-dog", [other])
        return parser.parse(front_matter(str(card))[1])

    def inner(token):  # an entity makes a token of its own, which is text
        kinds = ["text" if c.type == "text_special" else c.type for c in token.children or ()]
        return [kind for kind, _ in groupby(kinds)]

    found, expected = tokens(text.strip(), text), tokens("W", "T")
    structure = [[(t.type, t.tag, inner(t)) for t in each if t.type != "fence"] for each in (found, expected)]
    assert structure[0] == structure[1]
    allowed = {"text", "html_inline", "code_inline", "link_open", "link_close"}
    assert {kind for t in found for kind in inner(t)} <= allowed
    assert {c.content for t in found for c in t.children or () if c.type == "html_inline"} <= {"<code>", "</code>"}
    heading = found[1]
    assert "".join(c.content for c in heading.children) == " ".join(text.split())


def test_a_concept_of_another_program_is_not_called_directional():
    made = DirectionalInversion.from_embeddings("<x>", {"text_encoder": torch.ones(1, 2304)})
    card = str(model_card(made, "user/x"))
    assert "directional-textual-inversion" not in card.split("---")[1]
    assert "load_textual_inversion" not in card  # SANA's pipelines have no such method
