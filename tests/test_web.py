"""The demo page: whom its server answers, what it says, and that a person gets through it in a
browser by file, camera and keyboard."""

import http.client
import io
import re
import socket
import struct
import threading
from urllib.parse import quote

import pytest
from browser import Browser, needs_chromium
from conftest import run_program
from PIL import Image
from test_live_server import client_of, configure

from export.archive import build_archive
from handler.client.connection import ServerError
from handler.errors import UserError
from handler.image_preprocess import MAX_BYTES
from handler.serve import server as serve
from handler.web.server import WebServer, host_headers, serve_page

TOKENS = ["a", "red", "<b>"]
MAPS = [[1 / 16] * 16, [0.85] + [0.01] * 15, [0.01] * 15 + [0.85]]
CAPTION = {
    "caption": "a red <b>", "score": -0.4, "log_prob": -1.2, "tokens": TOKENS,
    "token_log_probs": [-0.4, -0.4, -0.4], "attention": {"grid": [4, 4], "maps": MAPS},
}  # fmt: skip
ANSWER = {
    "caption": "a red <b>",
    "captions": [CAPTION, {**CAPTION, "score": -0.9}],
    "model": {"name": "captioner", "version": "1.0", "checkpoint": "sha256:1", "precision": "fp32"},
}


class FakeClient:
    """A client of a server that says what it is told to."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.options: dict = {}
        self.photos: list[bytes] = []
        self.card: dict = {"preprocessing": {"resize": "squash"}}

    def caption(self, photo: bytes, **options):
        self.photos.append(photo)
        self.options = options
        if self.failure:
            raise self.failure
        return ANSWER

    def model_card(self):
        return self.card


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def page(client):
    """The server of the page, running."""
    server = WebServer(client, port=0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((120, 80)).save(path)
    return path


def ask(page, method="POST", path="/caption", body=b"", key=None, prompt=None, **headers):
    """(status, headers, body) of a request as the page itself would send it, but for `headers`."""
    key = page.key if key is None else key
    path += f"?key={key}" if key else ""
    path += "" if prompt is None else f"&prompt={quote(prompt)}"
    given = {"Host": f"127.0.0.1:{page.port}", "Origin": f"http://127.0.0.1:{page.port}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Content-Length": str(len(body))} | given).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, content


def seen_in(html: str) -> list[float]:
    """The part of the photo that the maps of a card lie over."""
    [seen] = set(re.findall('data-seen="([^"]+)"', html))
    return [float(share) for share in seen.split()]


def test_a_photo_becomes_a_card(page, client, photo_file):
    status, headers, html = ask(page, body=photo_file.read_bytes())
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert client.options == {"num_beams": 5, "num_return_sequences": 3, "attention": True}
    assert client.photos == [photo_file.read_bytes()]
    assert html.count('class="word"') == 6 and "score -0.90" in html
    assert "<b>" not in html and "&lt;b&gt;" in html
    assert 'width="480" height="320"' in html and seen_in(html) == [0, 0, 1, 1]


def test_a_prompt_stands_before_the_words(page, client, photo_file, monkeypatch):
    """It is no button: what was given has no map."""
    caption = {**CAPTION, "caption": "a <i> & a red <b>"}
    monkeypatch.setitem(ANSWER, "captions", [caption])
    _, _, html = ask(page, body=photo_file.read_bytes(), prompt="a <i> & é")
    assert client.options["prompt"] == "a <i> & é"
    assert html.count('class="word"') == 3
    assert '<span class="quiet">a &lt;i&gt; &amp;</span>\n<span class="word"' in html
    ask(page, body=photo_file.read_bytes(), prompt="")
    assert "prompt" not in client.options


@pytest.mark.parametrize("key", ["", "x", "é"])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/caption"), ("GET", "/x"), ("POST", "/x")]
)
def test_without_the_key_nothing_is_answered(page, client, photo_file, method, path, key):
    """Other users of the machine could caption with the key of the one who started the page."""
    key = key.encode().hex() if key == "é" else key
    status, _, said = ask(page, method, path, photo_file.read_bytes(), key=key)
    assert (status, "make web" in said) == (403, True)
    assert client.photos == [] and page.key not in said


def test_the_key_is_in_the_address_that_is_printed(client, monkeypatch, capsys):
    monkeypatch.setattr(WebServer, "serve_forever", lambda self: None)
    serve_page(client, 0)
    [key] = re.findall(
        r"http://127\.0\.0\.1:\d+/\?key=([\w-]{32})(?![\w-])", capsys.readouterr().out
    )
    with WebServer(client, port=0) as other:
        assert other.key != key


@pytest.mark.parametrize(
    ("preprocessing", "seen"),
    [
        ({"resize": "squash"}, [0, 0, 1, 1]),
        ({"resize": "crop"}, [1 / 6, 0, 5 / 6, 1]),
        ({"image_size": 224, "resize_to": 256}, [1 / 16, 1 / 16, 15 / 16, 15 / 16]),
    ],
)
def test_the_map_lies_where_the_model_saw(page, client, photo_file, preprocessing, seen):
    """Of a model that resizes to 256 and sees the middle 224, it lay over the whole photo."""
    client.card = {"preprocessing": preprocessing}
    html = ask(page, body=photo_file.read_bytes())[2]
    # Cut to whole pixels of the resized photo, as Hugging Face does.
    assert seen_in(html) == pytest.approx(seen, abs=1 / 224)


def test_without_a_model_card_the_default_is_taken(page, client, photo_file):
    client.card = {}
    assert seen_in(ask(page, body=photo_file.read_bytes())[2]) == [0, 0, 1, 1]


def test_port_80_is_not_in_the_name():
    """Browsers leave it out, and were sent to an address that they shorten again."""
    assert host_headers(80) >= {"127.0.0.1", "localhost", "localhost:80"}
    assert "localhost" not in host_headers(8090)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", None])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_names_are_refused(page, client, host, method):
    """A name of somebody else's that resolves to this machine (DNS rebinding)."""
    host = host and host.format(port=page.port)
    path = "/" if method == "GET" else "/caption"
    status, _, said = ask(page, method, path, Host=host, Origin=f"http://{host}")
    assert (status, client.photos) == (421, []) and "<" not in said


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://localhost"]
)
def test_photos_of_other_pages_are_refused(page, client, origin, photo_file):
    status, _, _ = ask(
        page, body=photo_file.read_bytes(), Origin=origin and origin.format(port=page.port)
    )
    assert (status, client.photos) == (403, [])


def test_localhost_is_a_name_of_its_own(page, photo_file):
    name = f"localhost:{page.port}"
    assert ask(page, body=photo_file.read_bytes(), Host=name, Origin=f"http://{name}")[0] == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"path": "/../key_file.json"}, 404),
        ({"method": "GET", "path": "/key_file.json"}, 404),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": str(MAX_BYTES + 1)}, 413),
        ({"method": "PUT"}, 501),
    ],
)
def test_what_else_is_refused(page, client, changes, status):
    assert ask(page, **changes)[0] == status
    assert client.photos == []


def test_a_tab_that_is_closed_is_no_error(page, client, photo_file, capfd):
    """It printed a traceback; half of a photo was sent to TorchServe."""
    content = photo_file.read_bytes()
    head = (
        f"POST /caption?key={page.key} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n"
        f"Origin: http://127.0.0.1:{page.port}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    for body in (content[:100], content):
        with socket.create_connection(("127.0.0.1", page.port)) as connection:
            # Closed with a reset, as by a browser that does not wait for what is still to come.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head.encode() + body)
            if body != content:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == b""
    assert ask(page, body=content)[0] == 200
    assert set(client.photos) == {content}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("failure", "status", "says"),
    [
        (ServerError("UnsupportedMediaType", 415, "the content is no photo"), 415,
         "This file cannot be captioned: the content is no photo."),
        (ServerError("InvalidParameter", 400, "prompt: no word 'x'"), 400,
         "These words cannot be used: prompt: no word 'x'."),
        (ServerError("InvalidKeyException", 400, "no"), 502, "make serve"),
        (ServerError("ServiceUnavailableException", 503, "x"), 503, "try again"),
        (ServerError("ModelNotFoundException", 404, "x"), 502, "make mar"),
        (ServerError("InternalError", 500, "x"), 502, "the logs of TorchServe"),
        (UserError("http://127.0.0.1:8080: no answer"), 502, "Http://127.0.0.1:8080: no answer."),
    ],
)  # fmt: skip
def test_errors_are_sentences(page, client, failure, status, says, photo_file):
    client.failure = failure
    answered, _, said = ask(page, body=photo_file.read_bytes())
    assert answered == status and says in said and said.endswith(".")


def test_only_loopback_listens(page):
    assert page.server_address[0] == "127.0.0.1"


def test_a_taken_port_is_one_line_and_status_2(page, tmp_path):
    done = run_program("handler.web", "--port", str(page.port), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(page.port) in done.stderr and "PORT=" in done.stderr


# --- in a browser


@needs_chromium
def test_a_file_by_keyboard_alone(page, photo_file):
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{page.port}/?key={page.key}")
        browser.press("Tab")
        assert browser.run("document.activeElement.id") == "file"
        browser.give_files("#file", photo_file)
        browser.wait("document.querySelector('#result .card')")
        assert browser.run("document.getElementById('status').textContent") == "Caption: a red <b>"
        for _ in range(9):  # the camera's button, the prompt, then the words
            browser.press("Tab")
            if browser.run("document.activeElement.textContent") == "red":
                break
        assert browser.run("document.activeElement.getAttribute('aria-label')") == (
            "red: looked at the upper left"
        )
        browser.wait("document.querySelector('.map canvas')")
        browser.press("Enter", "\r")
        assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
        assert browser.problems == []


@needs_chromium
def test_the_map_is_drawn_where_the_model_saw(page, client, photo_file):
    client.card = {"preprocessing": {"image_size": 16, "resize_to": 32, "resize": "crop"}}
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{page.port}/?key={page.key}")
        browser.give_files("#file", photo_file)
        browser.wait("document.querySelector('#result .card')")
        browser.point(".captions button.word")
        browser.wait("document.querySelector('.map canvas')")
        shares = browser.run(
            "(() => { const [map, photo] = ['.map', '.card img'].map((name) => "
            "document.querySelector(name).getBoundingClientRect()); "
            "return [(map.left - photo.left) / photo.width, (map.top - photo.top) / photo.height, "
            "map.width / photo.width, map.height / photo.height]; })()"
        )
        assert shares == pytest.approx([1 / 3, 1 / 4, 1 / 3, 1 / 2], abs=0.02)


@needs_chromium
@pytest.mark.parametrize("width", [1200, 360])
def test_camera_and_drop(page, client, width):
    """The fake camera of Chromium, on a desk and a phone; a drop of a file."""
    with Browser() as browser:
        browser.resize(width, 800, mobile=width < 500)
        browser.open(f"http://localhost:{page.port}/?key={page.key}")
        browser.run("document.getElementById('camera').click()")
        browser.wait("document.getElementById('video').videoWidth > 0")
        browser.run("document.getElementById('shoot').click()")
        browser.wait("document.querySelector('#result .card')")
        assert Image.open(io.BytesIO(client.photos[0])).format == "JPEG"
        assert browser.run("document.getElementById('viewfinder').hidden")
        browser.run(
            "const files = new DataTransfer(); files.items.add(new File(['hello'], 'x.jpg'));"
            "document.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true}));"
        )
        browser.wait("document.getElementById('error').textContent")
        assert client.photos[1] == b"hello"
        assert browser.overflow() == 0


@needs_chromium
def test_another_prompt_captions_the_photo_again(page, client, photo_file):
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{page.port}/?key={page.key}")
        browser.give_files("#file", photo_file)
        browser.wait("document.querySelector('#result .card')")
        browser.run(
            "const prompt = document.getElementById('prompt'); prompt.value = ' a & b ';"
            "document.querySelector('#result .card').remove();"
            "prompt.dispatchEvent(new Event('change'));"
        )
        browser.wait("document.querySelector('#result .card')")
        assert client.options["prompt"] == "a & b" and len(client.photos) == 2
        assert browser.problems == []


@needs_chromium
def test_an_error_is_read_out_and_the_page_goes_on(page, client, photo_file):
    client.failure = ServerError("InvalidImage", 400, "the image is damaged")
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{page.port}/?key={page.key}")
        browser.give_files("#file", photo_file)
        said = "document.querySelector('[role=alert]').textContent"
        assert "the image is damaged." in browser.wait(said)
        client.failure = None
        browser.give_files("#file", photo_file)
        browser.wait("document.querySelector('#result .card')")
        assert browser.run(said) == ""


@needs_chromium
@pytest.mark.slow
@pytest.mark.live
def test_a_photo_through_a_live_server(tiny_export, tiny_data, tmp_path):
    build_archive(tiny_export, tmp_path / "model_store/captioner.mar", "1.0")
    ts_config = configure(tmp_path)
    try:
        client = client_of(serve.start(ts_config, home=tmp_path), tmp_path)
        page = WebServer(client, port=0)
        threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True).start()
        photo = tiny_data / "images/18.png"
        expected = client.caption(photo.read_bytes(), num_beams=5, num_return_sequences=3)
        with Browser() as browser:
            browser.open(f"http://127.0.0.1:{page.port}/?key={page.key}")
            browser.give_files("#file", photo)
            browser.wait("document.querySelector('#result .card')")
            for number, caption in enumerate(expected["captions"], start=1):
                words = browser.run(
                    f"[...document.querySelectorAll('.captions > li:nth-child({number}) .word')]"
                    ".map((word) => word.textContent)"
                )
                assert words == caption["tokens"]
            browser.point(".captions button.word")
            browser.wait("document.querySelector('.map canvas')")
            browser.give_files("#file", ts_config)
            browser.wait("document.querySelector('[role=alert]').textContent")
            assert "Authorization" not in browser.run("document.documentElement.outerHTML")
        page.shutdown()
        page.server_close()
    finally:
        serve.stop(tmp_path)
