"""The concepts at hand."""

import pytest
import torch
from conftest import WORLD

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept.convert import convert
from diffusers_dti.studio.job import Job
from diffusers_dti.studio.shelf import Shelf

pytestmark = pytest.mark.studio


@pytest.fixture
def made():
    rows = {"text_encoder": torch.ones(1, 768), "text_encoder_2": torch.ones(1, 1280)}
    return DirectionalInversion.from_embeddings("<dog>", rows)


def test_what_is_kept_is_offered(made, star, tmp_path):
    shelf = Shelf(tmp_path / "concepts", tmp_path / "jobs")
    assert shelf.choices() == []
    path = shelf.keep(made, "my dog")
    job = Job.create(tmp_path / "jobs", star, str(WORLD), {"placeholder_token": "<star>"})
    assert shelf.choices() == [("my dog", str(path))]
    made.save_pretrained(job.run)
    assert shelf.choices()[1:] == [(f"<star> ({job.name})", str(job.run))]
    with pytest.raises(ValueError, match="is kept already"):
        shelf.keep(made, "my dog")


@pytest.mark.parametrize("name", ["", "../dog", "a/b", ".hidden", "a\nb"])
def test_a_name_is_not_a_path(made, name, tmp_path):
    with pytest.raises(ValueError, match="cannot name a concept"):
        Shelf(tmp_path, tmp_path).keep(made, name)
    assert list(tmp_path.iterdir()) == []


def test_uploads_in_any_format(made, tmp_path):
    shelf = Shelf(tmp_path / "concepts", tmp_path / "jobs")
    made.save_pretrained(tmp_path / "ours")
    files = [str(path) for path in sorted((tmp_path / "ours").iterdir())]
    assert len(files) == 2
    path = shelf.upload(files[::-1])
    assert path.name == "dog"
    kept = DirectionalInversion.from_pretrained(path)
    assert set(kept.embeddings) == {"text_encoder", "text_encoder_2"}
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises((ValueError, OSError)):
        shelf.upload([str(tmp_path / "text.safetensors")])
    (tmp_path / "out").mkdir()
    convert(tmp_path / "ours", "comfyui", tmp_path / "out" / "rex.safetensors")
    (path,) = [shelf.upload([str(tmp_path / "out" / "rex.safetensors")])]
    assert path.name == "rex" and set(DirectionalInversion.from_pretrained(path).embeddings) == set(kept.embeddings)
