"""Many clients at one server: what they ask, what is right, and what came back."""

import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import requests
from live import key

from handler.client.connection import Client
from handler.client.stubs import load

SECONDS_TO_WAIT = 300
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 8, "length_penalty": -0.5, "early_stopping": True},
    {"do_sample": True, "seed": 7, "temperature": 0.8, "top_p": 0.9},
    {"num_beams": 4, "prompt": "the square"},
    {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 2},
)


@dataclass(frozen=True)
class Case:
    """One request, and its answer: a caption, or the code and type of an error."""

    fields: dict[str, Any]  # the photo as `image`, options
    expected: str | tuple[int, str]


@dataclass
class Outcome:
    """What became of the requests of all clients."""

    good: int = 0
    tokens: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    # Answers other than the right one: start and end (monotonic seconds), what came, what was due.
    failed: list[tuple[float, float, str, str]] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return self.good + self.bad.total()


def good_cases(captioner: Any, photos: Iterable[bytes]) -> list[Case]:
    """Every photo with all sets of options, and the captions that `captioner` gives them."""
    return [
        Case({"image": photo, **options}, captioner.caption([photo], **options)[0][0].text)
        for photo in photos
        for options in OPTIONS
    ]


def bad_cases(photo: bytes) -> list[Case]:
    return [
        Case({"image": b"\x89PNG\r\n\x1a\n damaged"}, (400, "InvalidImage")),
        Case({"image": photo[: len(photo) // 2]}, (400, "InvalidImage")),
        Case({"image": b"%PDF-1.7"}, (415, "UnsupportedMediaType")),
        Case({"image": b""}, (400, "MissingImage")),
        Case({"num_beams": 3}, (400, "MissingImage")),
        Case({"image": photo, "num_beams": 17}, (400, "InvalidParameter")),
        Case({"image": photo, "beams": 3}, (400, "InvalidParameter")),
        Case({"image": b"BM" + bytes(12) + b"\x28\0\0\0" + b"\xff\xff\0\0" * 2 + b"\1\0\x18\0"
              + bytes(24)}, (413, "ImageTooLarge")),
    ]  # fmt: skip


class Sender:
    """One client's connections."""

    def __init__(self, client: Client, channel: grpc.Channel) -> None:
        self.url, self.key = f"{client.url}/predictions/captioner", key(client)
        self.session = requests.Session()
        messages, stubs = load()
        self.request, self.stub = (
            messages.PredictionsRequest,
            stubs.InferenceAPIsServiceStub(channel),
        )

    def send(self, case: Case, way: str) -> tuple[int, Any]:
        """(code, body) of the answer by `form`, `json`, `raw` or `grpc`."""
        text = {n: str(v).lower() for n, v in case.fields.items() if n != "image"}
        photo = {n: v for n, v in case.fields.items() if n == "image"}
        if way == "grpc":
            given = {**photo, **{name: value.encode() for name, value in text.items()}}
            try:
                answer = self.stub.Predictions(
                    self.request(model_name="captioner", input=given),
                    metadata=[("authorization", f"Bearer {self.key}")],
                    timeout=SECONDS_TO_WAIT,
                )
            except grpc.RpcError as error:
                return 500, str(error.code())
            body = json.loads(answer.prediction)
            return body.get("code", 200), body
        headers = {"Authorization": f"Bearer {self.key}"}
        content: dict[str, Any] = {}
        if way == "json":
            encoded = {name: base64.b64encode(data).decode() for name, data in photo.items()}
            content["json"] = {**case.fields, **encoded}
        elif way == "raw":
            content["data"] = photo["image"]
            headers["Content-Type"] = "image/jpeg"
        else:
            content["files"] = {n: (None, v) for n, v in {**photo, **text}.items()}
        answer = self.session.post(self.url, headers=headers, timeout=SECONDS_TO_WAIT, **content)
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, answer.text


def run_load(
    client: Client,
    good: list[Case],
    bad: list[Case],
    clients: int,
    more: Callable[[int], bool],
    seed: int = 0,
) -> Outcome:
    """`clients` threads ask, one request in ten a bad one, while `more(requests so far)`."""
    outcome, lock, started = Outcome(), threading.Lock(), 0

    def one_client(number: int, channel: grpc.Channel) -> None:
        nonlocal started
        chance, sender = random.Random(seed * 1000 + number), Sender(client, channel)
        while True:
            with lock:
                if not more(started):
                    return
                started += 1
            case = chance.choice(bad if chance.random() < 0.1 else good)
            ways = ["form", "json", "grpc"] + (["raw"] if set(case.fields) == {"image"} else [])
            start = time.monotonic()
            try:
                code, body = sender.send(case, chance.choice(ways))
            except requests.RequestException as error:
                code, body = 0, type(error).__name__
            end = time.monotonic()
            with lock:
                if code == 200 and body["caption"] == case.expected:
                    outcome.good += 1
                    outcome.tokens += sum(len(c["tokens"]) for c in body["captions"])
                elif isinstance(body, dict) and (code, body.get("type")) == case.expected:
                    outcome.bad[body["type"]] += 1
                else:
                    came = f"{code} {body}"[:300]
                    outcome.failed.append((start, end, came, str(case.expected)))

    with grpc.insecure_channel(client.grpc_target) as channel, ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(one_client, n, channel) for n in range(clients)]:
            future.result()
    assert started == outcome.answered + len(outcome.failed)  # none is lost
    return outcome
