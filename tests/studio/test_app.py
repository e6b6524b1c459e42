"""How the page is served: to whom, and with what."""

import urllib.error
import urllib.parse
import urllib.request

import gradio as gr
import pytest
from conftest import Server

from diffusers_dti.studio.app import check_host
from diffusers_dti.studio.page import enlarged, errors_shown

pytestmark = pytest.mark.studio


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_this_machine_needs_no_password(host):
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
@pytest.mark.parametrize("password", [None, ""])
def test_other_machines_need_a_password(host, password):
    with pytest.raises(ValueError, match="give a --password as well"):
        check_host(host, password)
    check_host(host, "secret")


def test_the_password(tmp_path):
    server = Server(tmp_path / "out", None, "--password", "secret")
    try:
        for url in ("/config", "/gradio_api/info", f"/gradio_api/file={tmp_path}/out/jobs/.lock"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(server.url + url)
        login = server.url + "/login"
        wrong = urllib.parse.urlencode({"username": "me", "password": "guess"}).encode()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(login, wrong)
        right = urllib.parse.urlencode({"username": "me", "password": "secret"}).encode()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"true" in opener.open(login, right).read()
        assert opener.open(server.url + "/config").status == 200
    finally:
        server.kill()


def test_errors_are_shown_as_text():
    @errors_shown
    def refuse(error):
        raise error

    with pytest.raises(gr.Error, match="&lt;dog&gt; is taken"):
        refuse(ValueError("<dog> is taken"))
    with pytest.raises(ZeroDivisionError):
        refuse(ZeroDivisionError())


def test_tiny_images_are_enlarged(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (100, 50), "red")
    image.save(tmp_path / "image.png")
    assert enlarged(tmp_path / "image.png").size == (300, 150) == enlarged(image).size
    assert enlarged(large := Image.new("RGB", (300, 300))) is large
