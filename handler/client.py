"""`python -m handler.client`, behind `make caption`: asks a running TorchServe for captions, by
REST or gRPC, one photo or a whole folder."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from handler.errors import ArgumentParser, UserError, run_command
from handler.grpc_stubs import load
from handler.request import OPTION_TYPES

REPOSITORY = Path(__file__).parent.parent
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# A wrong configuration can leave the server silent for ever.
TIMEOUT_SECONDS = 60
# Requests in flight for a folder: enough to fill the server's batches.
IN_FLIGHT = 8


class ServerError(UserError):
    """The server refused the request; `body` is what it said."""

    def __init__(self, message: str, body: dict[str, Any]) -> None:
        super().__init__(message)
        self.body = body


@dataclass
class Client:
    """`url` is the inference address, https with `certificate` (the server's, in PEM) where it has
    a self-signed one; `key_file` is found by itself when left out."""

    url: str = "http://127.0.0.1:8080"
    grpc_target: str = "127.0.0.1:7070"
    model: str = "captioner"
    key_file: Path | None = None
    certificate: Path | None = None
    _session: requests.Session = field(default_factory=requests.Session, repr=False)

    def key(self) -> str:
        """The inference key, read anew each time, since keys expire and are rotated."""
        places = [Path("key_file.json"), REPOSITORY / "key_file.json"]
        for path in [self.key_file] if self.key_file else places:
            try:
                return str(json.loads(path.read_text())["inference"]["key"])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: no field inference.key; start the server again"
                ) from error
        raise UserError(
            f"{self.key_file or places[0]}: missing; TorchServe writes it where it is started "
            "(make serve), name it with --key-file"
        )

    def caption(self, photo: bytes, **options: Any) -> dict[str, Any]:
        """The answer by REST. Raises ServerError for a refused request, UserError where no server
        answers."""
        url = f"{self.url}/predictions/{self.model}"
        form = {name: _text(value) for name, value in options.items()}
        answer = self._post(url, photo, form, {})
        return dict(self._checked(answer.status_code, answer.content))

    def picture(self, photo: bytes, **options: Any) -> bytes:
        """The attention heat maps of the best caption, as PNG."""
        url = f"{self.url}/explanations/{self.model}"
        form = {name: _text(value) for name, value in options.items()}
        answer = self._post(url, photo, form, {"Accept": "image/png"})
        if answer.status_code != 200:
            self._checked(answer.status_code, answer.content)
        return answer.content

    def _post(
        self, url: str, photo: bytes, form: dict[str, str], headers: dict[str, str]
    ) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key()}", **headers}
        try:
            return self._session.post(
                url,
                files={"image": ("photo", photo)},
                data=form,
                headers=headers,
                timeout=TIMEOUT_SECONDS,
                verify=str(self.certificate) if self.certificate else True,
            )
        except requests.RequestException as error:
            reason = type(error).__name__
            raise UserError(
                f"{self.url}: no answer ({reason}); is it running? make serve"
            ) from error

    def caption_grpc(self, photo: bytes, **options: Any) -> dict[str, Any]:
        """The answer by gRPC; the same errors."""
        import grpc

        messages, stubs = load()
        if self.certificate:
            credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
            channel = grpc.secure_channel(self.grpc_target, credentials)
        else:
            channel = grpc.insecure_channel(self.grpc_target)
        given = {name: _text(value).encode() for name, value in options.items()}
        request = messages.PredictionsRequest(
            model_name=self.model, input={"image": photo, **given}
        )
        metadata = (("authorization", f"Bearer {self.key()}"),)
        try:
            with channel:
                answer = stubs.InferenceAPIsServiceStub(channel).Predictions(
                    request, metadata=metadata, timeout=TIMEOUT_SECONDS
                )
        except grpc.RpcError as error:
            details = " ".join(str(error.details()).split())[:300]
            raise UserError(f"{self.grpc_target}: {error.code().name}: {details}") from error
        body = answer.prediction
        code = json.loads(body).get("code", 200)
        return dict(self._checked(code, body))

    def _checked(self, status: int, content: bytes) -> dict[str, Any]:
        try:
            body = json.loads(content)
        except ValueError:
            body = {}
        if status == 200:
            return dict(body)
        message = body.get("message", "no reason given") if isinstance(body, dict) else ""
        kind = body.get("type", "") if isinstance(body, dict) else ""
        raise ServerError(f"the server answered {status} {kind}: {message}", body)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a photo's path") from error


def caption_folder(client: Client, folder: Path, out: Path, options: dict[str, Any]) -> None:
    """Captions every photo below `folder` into `out`, one JSON line each; photos that stand there
    already are not asked for again, unreadable ones get a line with their error."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; IMAGES must name one")
    photos = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file()
    )
    if not photos:
        raise UserError(f"{folder}: no photos there ({', '.join(sorted(PHOTO_SUFFIXES))})")
    done = _done(out)
    todo = [p for p in photos if p.relative_to(folder).as_posix() not in done]

    def ask(photo: Path) -> dict[str, Any]:
        line: dict[str, Any] = {"image": photo.relative_to(folder).as_posix()}
        try:
            answer = client.caption(read_file(photo), **options)
            return line | {"caption": answer["caption"], "captions": answer["captions"]}
        except ServerError as error:
            if error.body.get("type") not in (
                "InvalidImage",
                "UnsupportedMediaType",
                "ImageTooLarge",
                "MissingImage",
            ):
                raise
            return line | {"error": str(error)}

    failed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file, ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers: Iterator[dict[str, Any]] = pool.map(ask, todo)
        for line in tqdm(answers, total=len(todo), desc="captions", unit="photo"):
            failed += "error" in line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{out}: {len(todo) - failed} captioned, {failed} unreadable, {len(done)} there already")


def _done(out: Path) -> set[str]:
    """The photos that an earlier run answered; a last line that it could not finish is cut off."""
    if not out.exists():
        return set()
    data = out.read_bytes()
    if data and not data.endswith(b"\n"):
        with out.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
        data = data[: data.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            done.add(str(json.loads(line)["image"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out}: line {number} is no caption of an earlier run; name another OUT"
            ) from error
    return done


def main() -> None:
    parser = ArgumentParser(prog="handler.client", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, help="a photo")
    what.add_argument("--images", type=Path, help="a folder of photos")
    parser.add_argument("--out", type=Path, default=Path("captions.jsonl"), help="of --images")
    parser.add_argument("--grpc", action="store_true", help="ask by gRPC")
    parser.add_argument("--json", action="store_true", help="print the whole answer")
    parser.add_argument("--attention", type=Path, metavar="PNG", help="write heat maps there")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--grpc-target", default="127.0.0.1:7070", metavar="HOST:PORT")
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="of a TLS server")
    for name in OPTION_TYPES:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help="decoding option")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in OPTION_TYPES}
    options = {name: value for name, value in options.items() if value is not None}
    client = Client(
        arguments.url,
        arguments.grpc_target,
        key_file=arguments.key_file,
        certificate=arguments.certificate,
    )
    if arguments.images:
        caption_folder(client, arguments.images, arguments.out, options)
        return
    photo = read_file(arguments.image)
    ask = client.caption_grpc if arguments.grpc else client.caption
    answer = ask(photo, **options)
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("\n".join(caption["caption"] for caption in answer["captions"]))
    if arguments.attention:
        temporary = arguments.attention.with_name(f".{arguments.attention.name}")
        temporary.write_bytes(client.picture(photo, **options))
        os.replace(temporary, arguments.attention)
        print(f"{arguments.attention}: written", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
