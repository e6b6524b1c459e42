"""Download from a local server, which sends a small archive with the layout of the real one."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest

from diffusers_dti.data import dreambooth
from diffusers_dti.data.subjects import read_subjects

LIST = """Classes

subject_name,class
backpack_dog,backpack
dog,dog
teapot,teapot
wolf_plushie,stuffed animal

Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
"""


PHOTO = b"P6 32 8 255\n" + bytes(range(256)) * 3  # Pillow goes by the content; a JPEG would differ from release to release
TREE = "5f607b1491bdb9a851a61e139b6ed94d37eacf2a"  # `git write-tree` says so of the folder `dataset` below


def pack_archive(more=None, zeros=0):
    files = {"README.md": "not used here", "LICENSE.md": "", "dataset/prompts_and_classes.txt": LIST}
    files |= {"dataset/references_and_licenses.txt": "CC BY", "dataset/unlisted/00.jpg": PHOTO}
    files |= {f"dataset/{name}/0{i}.jpg": PHOTO for name in ("dog", "wolf_plushie", "backpack_dog") for i in range(4)}
    files |= {"dataset/dog/zeros.jpg": bytes(zeros)} if zeros else {}
    archive = io.BytesIO()
    with ZipFile(archive, "w", ZIP_DEFLATED if zeros else ZIP_STORED) as file:
        for folder in ("", "dataset/", "dataset/dog/"):
            file.writestr(f"dreambooth-main/{folder}", "")
        for name, content in files.items():
            file.writestr(f"dreambooth-main/{name}", content)
        for name in more or ():
            file.writestr(name, "from outside")
    return archive.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Start a server whose `reply` is (status, body, headers), and whose `asked` counts its requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            made.asked += 1
            status, body, headers = made.reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *arguments):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.reply = 0, None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(dreambooth, "ARCHIVE", f"http://127.0.0.1:{made.server_port}/main.zip")
    monkeypatch.setattr(dreambooth, "TREE", TREE)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def with_length(body):
    return 200, body, {"Content-Length": len(body)}


@pytest.mark.parametrize("chunked", [False, True])  # as a file, and as GitHub sends archives that it packs while sending
def test_downloads_the_data_set_and_lists_its_subjects(server, tmp_path, chunked):
    body = pack_archive()
    server.reply = with_length(body)
    if chunked:
        server.reply = 200, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), {"Transfer-Encoding": "chunked"}
    folder = tmp_path / "data" / "dreambooth"
    path = dreambooth.download(folder)
    assert path == tmp_path / "data" / "dreambooth.json"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["dreambooth", "dreambooth.json"]
    names = ["backpack_dog", "dog", "prompts_and_classes.txt", "references_and_licenses.txt", "unlisted", "wolf_plushie"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert sorted(p.name for p in (folder / "dog").iterdir()) == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    assert json.loads(path.read_text())["wolf_plushie"] == {
        "path": "dreambooth/wolf_plushie",
        "class": "stuffed animal",
        "initialization": "stuffed animal",
    }
    subjects = read_subjects(path)
    assert [(s.name, s.class_noun, len(s.photos)) for s in subjects] == [
        ("backpack_dog", "backpack", 4),
        ("dog", "dog", 4),
        ("wolf_plushie", "stuffed animal", 4),
    ]


def test_downloads_nothing_twice(server, tmp_path):
    server.reply = with_length(pack_archive())
    path = dreambooth.download(str(tmp_path / "dreambooth"))
    written = path.read_text()
    path.write_text("{}")
    assert dreambooth.download(tmp_path / "dreambooth") == path and path.read_text() == "{}"
    path.unlink()
    assert dreambooth.download(tmp_path / "dreambooth") == path and path.read_text() == written
    assert server.asked == 1


def test_fills_an_empty_folder_and_keeps_an_existing_list(server, tmp_path):
    server.reply = with_length(pack_archive())
    (tmp_path / "dreambooth").mkdir()
    (tmp_path / "dreambooth.json").write_text("{}")
    assert dreambooth.download(tmp_path / "dreambooth").read_text() == "{}"
    assert (tmp_path / "dreambooth" / "dog").is_dir()


def test_rejects_another_folder(tmp_path):
    folder = tmp_path / "dreambooth"
    (folder / "dog").mkdir(parents=True)
    with pytest.raises(OSError, match=r"not DreamBooth's data set, it has no prompts_and_classes\.txt\. Remove .*, or unpack"):
        dreambooth.download(folder)
    (folder / "prompts_and_classes.txt").write_text(LIST)
    with pytest.raises(OSError, match="no photos of the subjects .* Remove"):
        dreambooth.download(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["dreambooth"]


FLIPPED = bytearray(pack_archive())
FLIPPED[FLIPPED.index(PHOTO) + 400] ^= 255


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ((404, b"", {"Content-Length": 0}), "HTTP Error 404"),
        ((503, b"", {"Content-Length": 0}), "HTTP Error 503"),
        ((200, pack_archive()[:700], {"Content-Length": 5000}), r"cut after 700 of 5000 bytes|IncompleteRead\(700 bytes"),
        ((200, b"1388\r\n" + pack_archive()[:700], {"Transfer-Encoding": "chunked"}), "IncompleteRead"),
        ((200, pack_archive()[:700], {}), "not a zip file"),
        (with_length(b"<html>Sign in to the network of this hotel</html>"), "not a zip file"),
        (with_length(bytes(FLIPPED)), "Bad CRC-32"),
        (with_length(pack_archive(["dreambooth-main/dataset/../../../evil.txt"])), r"leaves its folder, .*evil\.txt"),
        (with_length(pack_archive(["../evil.txt"])), r"leaves its folder, \.\./evil\.txt"),
        (with_length(pack_archive(["dreambooth-main/dataset\\..\\..\\evil.txt"])), r"leaves its folder, .*evil\.txt"),
        (with_length(pack_archive(["/evil.txt"])), r"leaves its folder, /evil\.txt"),
        (with_length(pack_archive().replace(b"/dataset/", b"/elsewhr/")), "`dataset` is not the one of commit 4f887af"),
        (with_length(pack_archive(["dreambooth-main/dataset/dog/04.jpg"])), "`dataset` is not the one of commit 4f887af"),
    ],
)
def test_failed_downloads_leave_nothing_behind(server, tmp_path, reply, why):
    server.reply = reply
    with pytest.raises(OSError, match=rf"(?s)could not be downloaded from {dreambooth.ARCHIVE}: .*({why})") as error:
        dreambooth.download(tmp_path / "data" / "dreambooth")
    assert f"unpack its folder `dataset` as {tmp_path / 'data' / 'dreambooth'}, and run this again" in str(error.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["data"]


def test_archives_that_are_too_large_are_refused_early(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dreambooth, "SIZE", 20_000)
    monkeypatch.setattr(dreambooth.shutil, "copyfileobj", lambda *files: pytest.fail("unpacked"))
    for zeros, reply, why in (
        (100_000, with_length, "would unpack to 11[0-9]{4} bytes, and the data set has 20000"),
        (0, lambda body: (200, body + bytes(10**6), {}), "more than 40000 bytes were sent"),
    ):
        server.reply = reply(pack_archive(zeros=zeros))
        with pytest.raises(OSError, match=why):
            dreambooth.download(tmp_path / "dreambooth")
        assert not list(tmp_path.iterdir())


def test_hashes_are_those_of_git(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert dreambooth.git_hash(empty).hex() == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # known to all users of git
    (empty / "file").touch()
    assert dreambooth.git_hash(empty / "file").hex() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    with ZipFile(io.BytesIO(pack_archive())) as packed:
        packed.extractall(tmp_path)
    assert dreambooth.git_hash(tmp_path / "dreambooth-main" / "dataset").hex() == TREE


def test_no_server_and_a_silent_server(tmp_path, monkeypatch):
    silent = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # listens but never answers
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(dreambooth, "ARCHIVE", f"http://127.0.0.1:{silent.server_port}/main.zip")
    monkeypatch.setattr(dreambooth, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match="could not be downloaded from http.*timed out.* unpack its folder"):
        dreambooth.download(tmp_path / "dreambooth")
    silent.server_close()
    with pytest.raises(OSError, match="could not be downloaded from http.*refused.* unpack its folder"):
        dreambooth.download(tmp_path / "dreambooth")
    assert not list(tmp_path.iterdir())
