"""Whole or not at all, with the modes that ordinary files have."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_dti.atomic import atomic_file, atomic_files, atomic_folder, tidy


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def tree(folder):
    """All files below a folder, hidden ones too, with their contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    if os.name != "posix":
        pytest.skip("files have other permissions")
    earlier = os.umask(request.param)
    yield request.param
    os.umask(earlier)


# --------------------------------------------------------------------------------------------------------------- files
def test_files_appear_at_the_end_with_their_content(tmp_path):
    targets = [tmp_path / "new" / "a.txt", tmp_path / "b.txt"]
    targets[1].write_text("old")
    with atomic_files(targets) as (a, b):
        a.write_text("one"), b.write_text("two")
        assert not targets[0].exists() and targets[1].read_text() == "old"
        # libraries choose a format by the suffix, and a rename is atomic within one file system only
        assert (a.parent, a.suffix) == (targets[0].parent, ".txt") and (b.parent, b.suffix) == (tmp_path, ".txt")
    assert tree(tmp_path) == {"new/a.txt": b"one", "b.txt": b"two"}


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_files_stay_as_they_were_if_the_block_fails(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)), atomic_files([tmp_path / "a.txt", tmp_path / "b.txt"]) as (a, _):
        a.write_text("new")
        raise error
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_no_file_takes_its_place_if_one_was_not_written(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_files([tmp_path / "a.txt", tmp_path / "b.txt"]) as (a, _):
        a.write_text("new")
    assert tree(tmp_path) == {"a.txt": b"old"}


def test_nothing_is_left_if_a_file_cannot_take_its_place(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt" / "inside").write_text("here")
    with pytest.raises(OSError), atomic_file(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert tree(tmp_path) == {"a.txt/inside": b"here"}


def test_one_file(tmp_path):
    with atomic_file(str(tmp_path / "a.txt")) as path:
        path.write_text("one")
    assert tree(tmp_path) == {"a.txt": b"one"}


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    """As in the Hub's cache, where files are links to blobs that other revisions share."""
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "a.txt").symlink_to(tmp_path / "blob")
    with atomic_file(tmp_path / "a.txt") as path:
        path.write_text("new")
    assert tree(tmp_path) == {"a.txt": b"new", "blob": b"shared"} and not (tmp_path / "a.txt").is_symlink()


# --------------------------------------------------------------------------------------------------------------- modes
def private_writer(path):
    path.write_text("secret")
    path.chmod(0o600)


@pytest.mark.parametrize("write", [lambda path: path.write_text("x"), private_writer], ids=["plain", "private"])
def test_files_have_the_mode_of_ordinary_files(tmp_path, umask, write):
    with atomic_files([tmp_path / "a.txt", tmp_path / "b.txt"]) as paths:
        for path in paths:
            write(path)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        write(folder / "sub" / "c.txt")
    (tmp_path / "ordinary.txt").touch()
    (tmp_path / "ordinary").mkdir()
    assert mode(tmp_path / "ordinary.txt") == 0o666 & ~umask
    for name in ("a.txt", "b.txt", "folder/sub/c.txt"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "sub") == mode(tmp_path / "ordinary") == 0o777 & ~umask


def test_safetensors_files_have_the_mode_of_ordinary_files(tmp_path, umask):
    with atomic_file(tmp_path / "a.safetensors") as path:
        save_file({"x": torch.ones(2)}, path)
    assert mode(tmp_path / "a.safetensors") == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(2))


@pytest.mark.parametrize("writer", ["files", "folder"])
def test_other_threads_keep_their_umask(tmp_path, umask, monkeypatch, writer):
    """The umask belongs to the process: whoever sets it to see it opens the files of all other threads."""
    found = []

    def create_elsewhere():
        path = tmp_path / f"other{len(found)}"
        path.touch()
        found.append(mode(path))

    def in_another_thread():
        thread = threading.Thread(target=create_elsewhere)
        thread.start()
        thread.join()

    original = os.umask

    def umask_with_company(mask):
        earlier = original(mask)
        in_another_thread()  # at the worst moment
        return earlier

    monkeypatch.setattr(os, "umask", umask_with_company)
    if writer == "files":
        with atomic_file(tmp_path / "a.txt") as path:
            path.write_text("x")
            in_another_thread()
    else:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "a.txt").write_text("x")
            in_another_thread()
    monkeypatch.undo()
    assert found and set(found) == {0o666 & ~umask}


# -------------------------------------------------------------------------------------------------------------- folders
def test_a_folder_replaces_an_earlier_one_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "parent" / "folder") as folder:
            assert folder.parent == tmp_path / "parent" and not list(folder.iterdir())
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
            assert (tmp_path / "parent" / "folder").exists() == (content == "two")
        assert tree(tmp_path) == {f"parent/folder/sub/{content}": content.encode()}
    assert [p.name for p in (tmp_path / "parent").iterdir()] == ["folder"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_stays_as_it_was_if_the_block_fails(tmp_path, earlier):
    if earlier:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert tree(tmp_path) == ({"folder/a": b"old"} if earlier else {})
    assert len(list(tmp_path.iterdir())) == earlier


def test_the_earlier_folder_is_whole_until_the_new_one_takes_its_place(tmp_path, monkeypatch):
    """If the last rename fails, the earlier folder comes back."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    path_class = type(tmp_path)
    rename = path_class.rename

    def failing(self, target):
        if (self / "new").exists():
            raise OSError("input/output error")
        return rename(self, target)

    monkeypatch.setattr(path_class, "rename", failing)
    with pytest.raises(OSError, match="input/output"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "new").write_text("new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"folder/a": b"old"} and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]


# ---------------------------------------------------------------------------------------------------- after a killed process
def test_a_folder_that_was_moved_aside_is_put_back(tmp_path, monkeypatch):
    """The process is killed between the two renames."""
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a.txt").write_text("old")
    rename, calls = Path.rename, []

    def killed(self, target):
        calls.append(self.name)
        if len(calls) > 1:
            raise SystemExit
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # no cleaning up
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a.txt").write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "folder").exists()
    tidy(tmp_path)
    assert tree(tmp_path) == {"folder/a.txt": b"old"}


def test_tidying_leaves_what_is_not_ours(tmp_path):
    names = (".hidden", ".a.txt.partial", ".a.0123456789ab", ".git.0123456789ab.partially")
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".a.txt.0123456789ab.partial.txt").write_text("half")
    tidy(tmp_path)
    assert tree(tmp_path).keys() == set(names)
