"""Where concepts are found: state dicts, files, folders, and the Hub by its real client."""

import json

import pytest
import torch
from hub_server import WRITE, reset_client
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept import hub
from diffusers_dti.concept.source import describe_source, read_stored

ONE, TWO = "text_encoder", "text_encoder_2"


def rows(width, vectors=2, seed=0):
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed + width))


def make(word="<dog>", seed=0, **metadata):
    return DirectionalInversion.from_embeddings(word, {ONE: rows(16, seed=seed), TWO: rows(24, seed=seed)}, metadata)


def upload(repo_id, files, **kwargs):
    """Put files into a repository of the local Hub, by the real client."""
    api = HfApi(token=WRITE)
    api.create_repo(repo_id, exist_ok=True)
    for name, path in files.items():
        api.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repo_id, **kwargs)


def asked(server, method="HEAD"):
    """The paths in the repository that the client has asked for."""
    return [path.split("/resolve/")[1] for kind, path, *_ in server.requests if kind == method and "/resolve/" in path]


# ------------------------------------------------------------------------------------------------------------- locally
def test_files_of_ours_are_read_bit_for_bit(tmp_path):
    concept = make(pooling="eos").rescale(0.387)
    concept.save_pretrained(tmp_path / "a" / "b")
    for source, kwargs in (
        (tmp_path / "a" / "b", {}),
        (str(tmp_path / "a" / "b"), {}),
        (tmp_path / "a", {"subfolder": "/b/"}),
        (tmp_path / "a" / "b" / "learned_embeds.safetensors", {}),
    ):
        stored = read_stored(source, **kwargs)
        assert stored.placeholder == "<dog>" and stored.metadata == {"pooling": "eos"}
        assert list(stored.rows) == list(stored.scales) == [ONE, TWO]
        for component, expected in concept.embeddings.items():
            assert torch.equal(stored.rows[component], expected)
            assert torch.equal(stored.scales[component], concept.scales[component])


def test_state_dicts_by_component_and_by_a_programs_keys():
    stored = read_stored({ONE: rows(16), TWO: rows(24)})
    assert stored.placeholder is None and torch.equal(stored.rows[TWO], rows(24)) and not stored.metadata
    stored = read_stored({"clip_l": rows(16), "clip_g": rows(24)}, "<dog>")
    assert stored.placeholder == "<dog>" and stored.metadata == {"encoders": {ONE: "clip_l", TWO: "clip_g"}}
    with pytest.raises(ValueError, match="This state dict cannot be used: it must hold one tensor"):
        read_stored({})
    assert describe_source({}) == "This state dict" and describe_source("user/dog") == "user/dog"


@pytest.mark.parametrize("source", [None, 3, [rows(16)], rows(16)])
def test_other_types_are_refused(source):
    with pytest.raises(TypeError, match=f"One concept at a time, .*; got a {type(source).__name__}"):
        read_stored(source)


def test_safetensors_are_preferred_to_pickles(tmp_path):
    torch.save({"<old>": rows(16)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(ValueError, match="learned_embeds.bin is a pickle"):
        read_stored(tmp_path)
    assert read_stored(tmp_path, allow_pickle=True).placeholder == "<old>"
    make().save_pretrained(tmp_path)
    assert read_stored(tmp_path, allow_pickle=True).placeholder == "<dog>"


def test_files_of_several_encoders_become_one_concept(tmp_path):
    save_file({"clip_l": rows(16)}, tmp_path / "learned_embeds.safetensors")
    save_file({"clip_g": rows(24)}, tmp_path / "learned_embeds_2.safetensors")
    stored = read_stored(tmp_path, "<dog>")
    assert stored.metadata["encoders"] == {ONE: "clip_l", TWO: "clip_g"} and list(stored.rows) == [ONE, TWO]
    save_file({"clip_g": rows(24)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="two of its files are for text_encoder_2"):
        read_stored(tmp_path, "<dog>")


def test_a_folder_of_concepts_names_them(tmp_path):
    for name in ("cat", "dog"):
        make().save_pretrained(tmp_path / name)
    with pytest.raises(OSError, match=r"has no learned_embeds\.safetensors or .*Concepts are in its folders cat, dog\."):
        read_stored(tmp_path)
    with pytest.raises(OSError, match=r"has no dog\.safetensors; give the file's name"):
        read_stored(tmp_path, weight_name="dog.safetensors")


# ---------------------------------------------------------------------------------------------------------- on the Hub
def test_each_file_is_downloaded_from_one_commit(local_hub, tmp_path):
    make().save_pretrained(tmp_path / "dog")
    upload("user/dti-dog", {p.name: p for p in (tmp_path / "dog").iterdir()})
    commit = local_hub.repos["user/dti-dog"].refs["main"]
    read = DirectionalInversion.from_pretrained("user/dti-dog", token=WRITE)
    for component, expected in make().embeddings.items():
        torch.testing.assert_close(read.embeddings[component], expected)
    first, *others = (f"learned_embeds{n}.safetensors" for n in ("", "_2", "_3", "_4"))
    assert asked(local_hub) == [f"main/{first}", *(f"{commit}/{other}" for other in others)]
    assert {authorization for *_, authorization in local_hub.requests if authorization} == {f"Bearer {WRITE}"}


def test_a_push_in_the_middle_of_a_download_does_not_mix_two_concepts(local_hub, monkeypatch):
    make().push_to_hub("user/dti-dog")
    download, pushed = hub.hf_hub_download, []

    def download_and_push(*args, **kwargs):
        path = download(*args, **kwargs)
        if not pushed:
            pushed.append(make(seed=1).push_to_hub("user/dti-dog"))
        return path

    monkeypatch.setattr(hub, "hf_hub_download", download_and_push)
    for seed in (0, 1):
        read = DirectionalInversion.from_pretrained("user/dti-dog")
        for component, expected in make(seed=seed).embeddings.items():
            torch.testing.assert_close(read.embeddings[component], expected)
    assert len(pushed) == 1


def test_a_branch_and_a_folder_of_a_repository(local_hub, tmp_path):
    make("<cat>").save_pretrained(tmp_path / "cat")
    upload("user/animals", {"README.md": __file__})
    HfApi(token=WRITE).create_branch("user/animals", branch="v1")
    upload("user/animals", {f"cats/cat/{p.name}": p for p in (tmp_path / "cat").iterdir()}, revision="v1")
    assert read_stored("user/animals", subfolder="cats/cat/", revision="v1").placeholder == "<cat>"
    one = read_stored("user/animals", subfolder="cats/cat", revision="v1", weight_name="learned_embeds_2.safetensors")
    assert list(one.rows) == [TWO]
    to = tmp_path / "here"
    assert list(read_stored("user/animals", subfolder="cats/cat", revision="v1", local_dir=to).rows) == [ONE, TWO]
    assert (to / "cats" / "cat" / "learned_embeds.safetensors").is_file()
    with pytest.raises(OSError, match=r"user/animals has no learned_embeds\.safetensors or .*`weight_name`; pickles"):
        read_stored("user/animals")


def test_a_pickle_on_the_hub(local_hub, tmp_path):
    torch.save({"<dog>": rows(16)}, tmp_path / "learned_embeds.bin")
    upload("user/dog", {"learned_embeds.bin": tmp_path / "learned_embeds.bin"})
    with pytest.raises(OSError, match=r"learned_embeds\.bin are read only with `allow_pickle=True`"):
        read_stored("user/dog")
    local_hub.requests.clear()
    read = read_stored("user/dog", allow_pickle=True)
    assert read.placeholder == "<dog>" and torch.equal(read.rows[ONE], rows(16))
    assert [path.split("/")[1] for path in asked(local_hub)][:5] == [
        "learned_embeds.safetensors", "learned_embeds_2.safetensors", "learned_embeds_3.safetensors",
        "learned_embeds_4.safetensors", "learned_embeds.bin",
    ]  # fmt: skip


def test_a_cached_concept_needs_no_hub(local_hub, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "dog")
    upload("user/dti-dog", {p.name: p for p in (tmp_path / "dog").iterdir()})
    read_stored("user/dti-dog")
    local_hub.faults[:] = [{"match": ".", "status": 500, "times": 10**6}]
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its tries
    local_hub.requests.clear()
    assert list(read_stored("user/dti-dog").rows) == [ONE, TWO]
    # the third file is known to be missing from this commit, and not asked for
    assert not any("learned_embeds_3" in path for _, path, *_ in local_hub.requests)
    local_hub.requests.clear()
    assert list(read_stored("user/dti-dog", local_files_only=True).rows) == [ONE, TWO] and not local_hub.requests
    with pytest.raises(OSError, match="user/never-seen is not in the cache, and the Hub is offline here"):
        read_stored("user/never-seen", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_client()
    with pytest.raises(OSError, match="user/never-seen is not in the cache, and the Hub is offline here"):
        read_stored("user/never-seen")


@pytest.mark.parametrize("source", ["no/such/folder", "C:\\dog", "dog file", ""])
def test_neither_a_path_nor_a_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="neither a file or folder here nor a repository id|has no learned_embeds"):
        read_stored(source)


def test_headers_of_both_files_count(tmp_path):
    header = {"version": 1, "scale": [1.0]}
    for component, name, more in ((ONE, "learned_embeds", {"a": 1}), (TWO, "learned_embeds_2", {"b": 2})):
        row = torch.nn.functional.normalize(rows(16, vectors=1))
        text = json.dumps(header | more | {"component": component})
        save_file({"<dog>": row}, tmp_path / f"{name}.safetensors", metadata={"dti": text})
    assert read_stored(tmp_path).metadata == {"a": 1, "b": 2}


# --------------------------------------------------------------------------------------------------------- credentials
@pytest.mark.parametrize("token", ["hf_abc\ndef", "hf_abc def", "hf_äbc", "hf_abc\x00", " "])
def test_a_token_that_cannot_be_one_is_not_repeated(local_hub, token):
    make().push_to_hub("user/dti-dog")
    for use in (
        lambda: DirectionalInversion.from_pretrained("user/dti-dog", token=token),
        lambda: make().push_to_hub("user/dti-dog", token=token),
    ):
        with pytest.raises(ValueError, match="characters that no token has") as caught:
            use()
        assert "hf_" not in str(caught.value) and "abc" not in str(caught.value)


def test_a_token_from_a_file_has_a_newline(local_hub):
    make().push_to_hub("user/dti-dog", token=f"{WRITE}\n")
    assert DirectionalInversion.from_pretrained("user/dti-dog", token=f" {WRITE}\n").placeholder_token == "<dog>"


def test_a_token_as_the_source_is_not_sent(local_hub):
    before = len(local_hub.requests)
    with pytest.raises(ValueError, match="looks like a Hub credential") as caught:
        DirectionalInversion.from_pretrained("hf_abcdefghij")
    assert "abcdefghij" not in str(caught.value) and len(local_hub.requests) == before


def test_credentials_in_others_messages():
    assert hub.redacted("Header\n 'Bearer hf_abcDEF123' is  bad") == "Header 'Bearer hf_***' is bad"
    assert hub.redacted("half_finished") == "half_finished"


def test_a_mistyped_path_is_not_asked_for(local_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("out/dog")
    before = len(local_hub.requests)
    for source, message in (
        ("out/dgo", "out/dgo does not exist. Beside it there are dog"),
        ("dog", "neither a file or folder"),
    ):
        with pytest.raises(OSError, match=message):
            DirectionalInversion.from_pretrained(source)
    assert len(local_hub.requests) == before
