"""A demo page for the running TorchServe. Drop a photo on it, or take one, and see the captions and
where the model looked for each word.

A browser cannot send requests to TorchServe itself, which requires a token and refuses preflight
requests. This process has the token, listens only on loopback, and forwards the requests. It
refuses requests with a foreign host name (which may resolve to 127.0.0.1), without the key in the
address, and photos that another page sends.
"""

import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from handler.client.connection import Client, ServerError
from handler.errors import UserError
from handler.image_preprocess import MAX_BYTES, PreprocessConfig, decode, seen_region
from handler.web.page import HEAT, TEMPLATES, page, photo, templates
from handler.web.word_maps import prompt_of
from handler.words import words_of

HOST, PORT = "127.0.0.1", 8090
HERE = Path(__file__).parent
# The best N_BEST of BEAMS are shown.
BEAMS, N_BEST = 5, 3
PHOTO_SIDE = 480
# Errors whose message is shown to the person who chose the photo.
SHOWN_ERRORS = (
    *("InvalidImage", "UnsupportedMediaType", "MissingImage"),
    *("ImageTooLarge", "ImageTooComplex"),
)
# A connection without a request is closed after this time.
SILENCE_SECONDS = 60
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WebServer(ThreadingHTTPServer):
    """The server of the page; `names` are the values of the Host header that it accepts."""

    daemon_threads = True

    def __init__(self, client: Client, port: int = PORT) -> None:
        self.client = client
        super().__init__((HOST, port), PageHandler)
        self.port = self.server_address[1]
        # Like Jupyter's token: other users of this machine, and other pages, do not know it.
        self.key = secrets.token_urlsafe(24)
        self.names = host_headers(self.port)
        self.page = page(
            TEMPLATES / "demo.html",
            [HERE / "web.css"],
            [HEAT, HERE / "web.js"],
            title="Captioner",
            limit=MAX_BYTES,
        ).encode()
        self.preprocessings: dict[str, PreprocessConfig] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that was closed before its answer came is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def preprocessing(self, checkpoint: str) -> PreprocessConfig:
        """The preprocessing of a checkpoint's model, from its model card."""
        if checkpoint not in self.preprocessings:
            card = self.client.model_card()
            if not card:
                return PreprocessConfig()
            self.preprocessings[checkpoint] = PreprocessConfig.from_dict(card["preprocessing"])
        return self.preprocessings[checkpoint]


def host_headers(port: int) -> set[str]:
    """The values of the Host header for this machine, from which browsers leave out port 80."""
    hosts = (HOST, "localhost")
    return {f"{host}:{port}" for host in hosts} | (set(hosts) if port == 80 else set())


class PageHandler(BaseHTTPRequestHandler):
    """GET / returns the page. POST /caption takes the bytes of a photo, with a prompt in the query
    string, and returns the HTML of the photo's card, or an error status and a sentence."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE_SECONDS
    server: WebServer

    def do_GET(self) -> None:
        if not self.is_ours():
            return
        if urlsplit(self.path).path != "/":
            self.answer(404, "The only page is /.")
            return
        self.answer(200, self.server.page, "text/html")

    def do_POST(self) -> None:
        if not self.is_ours():
            return
        host, address = self.headers.get("Host", ""), urlsplit(self.path)
        if self.headers.get("Origin") != f"http://{host}":
            self.refuse(403, "Only this server's own page can send photos.")
        elif address.path != "/caption":
            self.refuse(404, "Send photos to /caption.")
        elif not self.headers.get("Content-Length", "").isdecimal():
            self.refuse(411, "The header Content-Length is missing.")
        elif int(self.headers["Content-Length"]) > MAX_BYTES:
            self.refuse(413, f"The photo has more than {MAX_BYTES // 2**20} MiB; make it smaller.")
        else:
            photo = self.rfile.read(int(self.headers["Content-Length"]))
            if len(photo) < int(self.headers["Content-Length"]):  # the tab was closed
                self.close_connection = True
                return
            [prompt] = parse_qs(address.query).get("prompt", [""])[:1]
            try:
                self.answer(200, card(self.server, photo, prompt), "text/html")
            except UserError as error:
                self.answer(*sentence(error))

    def is_ours(self) -> bool:
        """Whether the request names this server as its host and has its key. A page of another
        host name could read the answers (DNS rebinding); other users do not have the key."""
        if self.headers.get("Host") not in self.server.names:
            self.refuse(421, f"Use the address http://{HOST}:{self.server.port}/ instead.")
            return False
        [key] = parse_qs(urlsplit(self.path).query).get("key", [""])[:1]
        if not secrets.compare_digest(key.encode(), self.server.key.encode()):
            self.refuse(403, "The key is missing; open the address that make web printed.")
            return False
        return True

    def refuse(self, status: int, message: str) -> None:
        """Answers without reading the request's body, and so has to close the connection."""
        self.close_connection = True
        self.answer(status, message)

    def answer(self, status: int, content: bytes | str, kind: str = "text/plain") -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Logs nothing, to keep the users' requests private."""


def card(server: WebServer, data: bytes, prompt: str) -> str:
    """Requests the captions of a photo, which begin with `prompt` unless it is empty, and returns
    the HTML of the photo with its captions."""
    options: dict[str, Any] = {"num_beams": BEAMS, "num_return_sequences": N_BEST}
    if prompt:
        options["prompt"] = prompt
    answer = server.client.caption(data, attention=True, **options)
    image = decode(data)
    return (
        templates(TEMPLATES)
        .get_template("card.html")
        .render(
            shown=photo(image, PHOTO_SIDE, answer["caption"]),
            captions=[words_of_answer(caption) for caption in answer["captions"]],
            seen=seen_region(image.size, server.preprocessing(answer["model"]["checkpoint"])),
            model=answer["model"],
        )
    )


def words_of_answer(caption: dict[str, Any]) -> dict[str, Any]:
    """A caption of the API with its prompt, and with the generated words and their maps."""
    attention = caption["attention"]
    maps_Tgg = torch.tensor(attention["maps"]).reshape(-1, *attention["grid"])
    words = words_of(caption["tokens"], caption["token_log_probs"], maps_Tgg)
    return caption | {"words": words, "prompt": prompt_of(caption["caption"], caption["tokens"])}


def sentence(error: UserError) -> tuple[int, str]:
    """The status and the sentence that the page shows for an error."""
    if not isinstance(error, ServerError):
        return 502, f"{str(error)[:1].upper()}{str(error)[1:]}."
    if error.kind in SHOWN_ERRORS:
        return error.code, f"This file cannot be captioned: {error.message}."
    if error.kind == "InvalidParameter" and error.message.startswith("prompt"):
        return error.code, f"These words cannot be used: {error.message}."
    if error.kind == "InvalidKeyException":
        return 502, "TorchServe refused this page's key; restart TorchServe with make serve."
    if error.code == 503:
        return 503, "TorchServe is overloaded, or has no worker; try again in a moment."
    if error.code == 404:
        return 502, "TorchServe has not loaded this model; run make mar and make serve."
    return 502, f"The captioner failed ({error.kind}); the logs of TorchServe say why."


def serve_page(client: Client, port: int) -> None:
    try:
        server = WebServer(client, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"port {port}: {reason}; set another one with PORT=") from error
    print(f"http://{HOST}:{server.port}/?key={server.key} (Ctrl-C ends the server)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
