"""What no request may do: get a 5xx, touch its neighbours, end the worker, or fill its memory.

Mutated photographs, and every option and field with any value, through TorchServe's own loader and
protocol. A short form runs with the other tests, the long one as `slow`."""

import base64
import io
import json
import random
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
import torch
from cost import INTERPRETER_MIB, cost_of
from hostile import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import OTHER_CONTENT, bombs, greatest, mutants, originals
from PIL import Image
from worker import Answer, Worker, by_grpc, rest

from export.archive import build_archive
from handler.beam_search import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags

TYPES = {
    "MissingImage": 400,
    "InvalidImage": 400,
    "UnsupportedMediaType": 415,
    "ImageTooLarge": 413,
    "ImageTooComplex": 413,
    "InvalidParameter": 400,
}
BATCH = 8
MOST_GROWTH = 2**30


@pytest.fixture(scope="module")
def worker(tiny_export, tmp_path_factory) -> Worker:
    folder = tmp_path_factory.mktemp("fuzzed")
    with zipfile.ZipFile(build_archive(tiny_export, folder / "captioner.mar", "1.0")) as archive:
        archive.extractall(folder / "unpacked")
    loaded = Worker(folder / "unpacked")
    # Two threads wait for each other longer than so small a model works, beside other load.
    torch.set_num_threads(1)
    return loaded


@pytest.fixture(scope="module")
def photo(tiny_data) -> bytes:
    return (tiny_data / "images/17.png").read_bytes()


@pytest.fixture(scope="module")
def caption(worker, photo) -> str:
    return worker.predict(rest({"image": photo}))[0].json["caption"]


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fails where the process grew by more than MOST_GROWTH, were it for a moment."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024

    clear.write_text("5")  # resets the peak
    before = peak()
    yield
    assert peak() - before < MOST_GROWTH


def transports(data: bytes, chance: random.Random) -> dict[str, Any]:
    """A photograph in one of the ways it can be sent."""
    encoded = base64.b64encode(data).decode()
    if chance.random() < 0.02:  # drawing takes longer than all the rest
        return rest({"image": data}, accept="image/png", explain="True")
    return chance.choice(
        (
            lambda: rest({"body": data}, "image/jpeg"),
            lambda: rest({"body": data}),
            lambda: rest({"image": data}, "multipart/form-data"),
            lambda: rest({"data": data, "num_beams": b"2"}, "multipart/form-data"),
            lambda: rest({"body": {"image": encoded}}, "application/json"),
            lambda: rest({"body": data}, "application/json"),
            lambda: rest({"image": data, "stream": b"1", "num_beams": b"1"}),
            lambda: by_grpc({"image": data}),
        )
    )()


def check(answer: Answer, what: str) -> None:
    """An answer of the contract: a caption, or a typed error of the client's."""
    assert "\n" not in "".join(answer.headers.values()), what
    if answer.status == 200 and answer.headers["content-type"] == "image/png":
        assert answer.body.startswith(b"\x89PNG"), what
        return
    body = answer.json
    if answer.status == 200:
        assert body["caption"] == body["captions"][0]["caption"], what
        return
    assert set(body) == {"code", "type", "message"}, what
    assert TYPES.get(body["type"]) == body["code"] == answer.status, (what, body)
    assert answer.phrase.isascii() and answer.phrase.isprintable(), what
    assert len(body["message"]) < 500 and body["message"].isprintable(), what


def fuzz(
    worker: Worker, photo: bytes, caption: str, cases: Iterable[tuple[str, bytes]], seed: int
) -> dict[int, int]:
    """Sends the cases in batches, each with a sound photo among them; counts the statuses."""
    chance, cases = random.Random(seed), iter(cases)
    statuses: dict[int, int] = {}
    with bounded_memory():
        while batch := list(islice(cases, BATCH - 1)):
            witness = chance.randrange(len(batch) + 1)
            requests = [transports(data, chance) for _, data in batch]
            requests.insert(witness, rest({"image": photo}))
            answers = worker.predict(*requests)
            assert answers.pop(witness).json["caption"] == caption, batch
            for (what, _), answer in zip(batch, answers, strict=True):
                check(answer, what)
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
    return statuses


def check_statuses(statuses: dict[int, int], count: int) -> None:
    """The mutations neither miss nor kill everything, and all kinds of refusal occur."""
    assert sum(statuses.values()) == count
    assert statuses[200] > 0.1 * count
    assert statuses[400] > 0.2 * count
    assert statuses[415] > 0.02 * count


def test_mutated_photos(worker, photo, caption):
    check_statuses(fuzz(worker, photo, caption, mutants(400, seed=1), seed=1), 400)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutated_photos(worker, photo, caption):
    check_statuses(fuzz(worker, photo, caption, mutants(10_000, seed=2), seed=2), 10_000)


def megapixels_of(data: bytes) -> float:
    """Of a photo's header, 0 where it has none."""
    pillow_heif.register_heif_opener()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height / 1e6
    except Exception:
        return 0


def check_costs(cases: Iterable[tuple[str, bytes]]) -> None:
    """Every photo is answered within its processor time and memory."""
    costs = {}
    for what, data in cases:
        cost = costs[what] = cost_of(data)
        if cost.seconds > 2 or cost.mib > 512:
            megapixels = megapixels_of(data)
            assert cost.seconds < 2 + megapixels / 16, (what, cost)
            assert cost.mib < max(512, 12 * megapixels * 10**6 / 2**20) + INTERPRETER_MIB, (
                what,
                cost,
            )
    slowest = max(costs, key=lambda what: costs[what].seconds)
    largest = max(costs, key=lambda what: costs[what].mib)
    print(f"{len(costs)} photos; the slowest, {costs[slowest].seconds:.2f} s: {slowest};", end=" ")
    print(f"the largest, {costs[largest].mib:.0f} MiB: {largest}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants_are_answered_within_their_limits():
    check_costs(mutants(10_000, seed=6))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutants_of_hostile_photos_are_answered_within_their_limits():
    made = {name: make() for name, make in HOSTILE.items()}
    small = {name: data for name, data in made.items() if len(data) < 2**20}
    large = {name: data for name, data in made.items() if len(data) >= 2**20}
    check_costs([*mutants(100, 7, small), *mutants(100, 8, large)])


def test_originals_are_sound(worker, photo, caption):
    """What the mutants are made of: every format of the contract has its caption."""
    statuses = fuzz(worker, photo, caption, originals().items(), seed=0)
    assert statuses == {200: len(originals())}


def test_other_content_and_bombs(worker, photo, caption):
    assert set(fuzz(worker, photo, caption, OTHER_CONTENT.items(), seed=3)) <= {400, 415}
    statuses = fuzz(worker, photo, caption, bombs().items(), seed=4)
    assert statuses[413] == 7
    assert statuses[400] >= 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_greatest_photos(worker, photo, caption):
    """Eight photographs of 64 megapixels in one batch: decoded one after the other, a worker is
    done with them before the response timeout, and never holds more than one."""
    for name, data in greatest().items():
        assert fuzz(worker, photo, caption, [(name, data)] * 7, seed=5) == {200: 7}


# --- options and fields

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LIKELY_NUMBERS = [0, 1, 2, 5, 16, 17, -1, 0.5, 1e-9, 1e308, 2**63, 10**40, True, False, None]
LIKELY_TEXTS = ["", " ", "3", "3.0", "true", "never", "NaN", "-inf", "1e5", "٣", "0x1", "1_0", "\0"]
LIKELY_TEXTS += ["a\r\nSet-Cookie: x", "9" * 5000]
likely = st.sampled_from(LIKELY_NUMBERS + LIKELY_TEXTS)
names = st.sampled_from([*OPTIONS, "attention", "stream"])
fields = st.dictionaries(names | st.text(max_size=12), anything | likely, max_size=4)
headers = st.dictionaries(
    st.sampled_from(["accept", "explain", "describe", "content-type", "x"]),
    st.sampled_from(["True", "image/png", "application/json", "text/plain", "é", "", "*/*"]),
    max_size=3,
)


def as_text(value: Any) -> bytes:
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "replace")


def send(worker: Worker, photo: bytes, given: dict[str, Any], headers: dict[str, str]) -> None:
    form = {name: as_text(value) for name, value in given.items() if name != "image"}
    encoded = {"image": base64.b64encode(photo).decode(), **given}
    content_type = headers.get("content-type", "application/json")
    headers = {name: value for name, value in headers.items() if name != "content-type"}
    answers = worker.predict(
        rest({"image": photo, **form}, "multipart/form-data", **headers),
        by_grpc({"image": photo, **form}),
        rest({"body": json.dumps(encoded).encode()}, content_type, **headers),
        rest({"image": photo}),
    )
    for answer in answers:
        check(answer, f"{given} {headers} {content_type}")
    assert answers[-1].status == 200


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=80, **FUZZ)
@given(given=fields, headers=headers)
def test_any_field_with_any_value(worker, photo, given, headers):
    send(worker, photo, given, headers)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_fields(worker, photo):
    @settings(max_examples=3000, **FUZZ)
    @given(given=fields, headers=headers)
    def run(given, headers):
        send(worker, photo, given, headers)

    with bounded_memory():
        run()


@settings(max_examples=60, **FUZZ)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,image0123\\u \n').map(str.encode))
def test_any_body_as_json(worker, photo, body):
    answers = worker.predict(rest({"body": body}, "application/json"), rest({"image": photo}))
    check(answers[0], repr(body))
    assert [answer.status >= 400 for answer in answers] == [True, False]


@st.composite
def sound_options(draw: Any) -> dict[str, Any]:
    """Options within the ranges of the contract, for the tiny model (9 new tokens at most)."""
    sampling = draw(st.booleans())
    beams = draw(st.integers(1, 16))
    longest = draw(st.integers(1, 9))
    chosen = {
        "num_beams": 1 if sampling else beams,
        "num_return_sequences": draw(st.integers(1, 16 if sampling else beams)),
        "max_new_tokens": longest,
        "min_new_tokens": draw(st.integers(0, longest)),
        "length_penalty": draw(st.floats(-5, 5)),
        "early_stopping": draw(st.sampled_from([True, False, "never"])),
        "no_repeat_ngram_size": draw(st.integers(0, 10)),
        "repetition_penalty": draw(st.floats(0.01, 10)),
        "do_sample": sampling,
        "temperature": draw(st.floats(0.01, 10)),
        "top_k": draw(st.integers(0, 5)),
        "top_p": draw(st.floats(0.01, 1)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "attention": draw(st.booleans()),
    }
    left_out = draw(st.sets(st.sampled_from(list(set(chosen) - {"num_beams", "max_new_tokens"}))))
    if "do_sample" in left_out:
        left_out.add("num_return_sequences")
    if sampling and "seed" in left_out:
        left_out.discard("seed")  # three samples without a seed may differ
    return {name: value for name, value in chosen.items() if name not in left_out}


@settings(max_examples=60, **FUZZ)
@given(options=sound_options())
def test_sound_options_have_one_answer_by_form_json_and_grpc(worker, photo, options):
    form = {"image": photo, **{name: as_text(value) for name, value in options.items()}}
    body = {"image": base64.b64encode(photo).decode(), **options}
    by_form, by_json, over_grpc = worker.predict(
        rest(form, "multipart/form-data"), rest({"body": body}, "application/json"), by_grpc(form)
    )
    assert by_form.status == 200, by_form.body
    assert by_form.json == by_json.json == over_grpc.json
    captions = by_form.json["captions"]
    assert 1 <= len(captions) <= options.get("num_return_sequences", 1)
    assert all(len(c["tokens"]) <= options["max_new_tokens"] for c in captions)
    assert all(("attention" in c) == options.get("attention", False) for c in captions)
