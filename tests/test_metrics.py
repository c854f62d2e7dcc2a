"""The scores agree with pycocoevalcap's own evaluation, and survive what breaks it."""

import logging
import stat
import unicodedata
from pathlib import Path

import psutil
import pycocoevalcap.eval
import pytest
from pycocotools.coco import COCO

from handler.errors import UserError
from training.scores import metrics
from training.scores.metrics import score, score_each

REFERENCES = {
    "1": ["A dog runs through the tall grass.", "The brown dog is running outside."],
    "2": ["Two children play with a red ball .", "Kids playing ball in a park"],
    "3": ['A man says "hello" to a woman; she smiles.', "People talking (outdoors)"],
    "4": ["A café at night isn't empty", "Someone's drinking coffee at 3.5 euros"],
    "5": ["A surfer rides a big wave.", "The man surfs.", "A person on a surfboard in the sea"],
}
PREDICTIONS = {
    "1": "a dog is running through the grass",
    "2": "two children are playing with a ball",
    "3": "a man and a woman are talking outdoors.",
    "4": "a man drinking coffee at a café",
    "5": "a surfer rides a wave",
}
NAMES = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4"}
NAMES |= {"METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}


class NoSpice:
    """In place of pycocoevalcap's, which downloads its models on construction."""

    def method(self) -> str:
        return "none"

    def compute_score(self, references, predictions):
        return 0.0, [0.0] * len(references)


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(script: str) -> None:
        path = tmp_path / "java"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(metrics, "find_java", lambda: str(path))

    return install


def test_agrees_with_pycocoevalcap_for_the_corpus_and_each_photo(monkeypatch, capfd):
    monkeypatch.setattr(pycocoevalcap.eval, "Spice", NoSpice)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": int(key)} for key in REFERENCES],
        "annotations": [
            {"id": 10 * int(key) + n, "image_id": int(key), "caption": caption}
            for key, captions in REFERENCES.items()
            for n, caption in enumerate(captions)
        ],
    }
    truth.createIndex()
    results = truth.loadRes(
        [{"image_id": int(key), "caption": caption} for key, caption in PREDICTIONS.items()]
    )
    theirs = pycocoevalcap.eval.COCOEvalCap(truth, results)
    theirs.evaluate()
    capfd.readouterr()
    ours, each = score_each(PREDICTIONS, REFERENCES)
    assert capfd.readouterr() == ("", "")
    assert ours.pop("tokenizer") == "ptb"
    assert ours == {NAMES[name]: theirs.eval[name] for name in NAMES}
    for key, scores in each.items():
        assert scores == {NAMES[name]: theirs.imgToEval[int(key)][name] for name in NAMES}


@pytest.fixture(scope="module")
def plain():
    """METEOR takes Java half a minute: its scores are computed once for the tests that compare."""
    return score_each(PREDICTIONS, REFERENCES, ("bleu", "meteor"))


def test_awkward_captions_keep_their_neighbours_scores(plain):
    """pycocoevalcap's tokenizer works line by line: a carriage return or a form feed inside a
    caption gives every later photo its neighbour's caption."""
    awkward = ("", "\r", "a\rb\nc\u2028d\x0be\x85f\x00", "😀 日本語", "a ||| b", "\ud800", "")
    odd = {f"odd {number}": text for number, text in enumerate(awkward)}
    keys = [*list(odd)[:4], *PREDICTIONS, *list(odd)[4:]]
    truths = {**REFERENCES, **{key: ["a b", text, "c\r\nd"] for key, text in odd.items()}}
    each = score_each({key: (PREDICTIONS | odd)[key] for key in keys}, truths, ("bleu", "meteor"))[
        1
    ]
    for key, scores in plain[1].items():
        assert each[key] == scores


def test_accents_score_however_they_are_encoded():
    truth = "un garçon près du château est à côté de la forêt"
    apart = unicodedata.normalize("NFD", truth)
    assert apart != truth
    scores = score_each({"1": apart}, {"1": [truth]}, ("bleu",))[1]["1"]
    assert scores["BLEU-4"] > 0.99


def test_the_machines_locale_changes_nothing(plain, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv(
        "JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=ISO-8859-1"
    )
    assert score_each(PREDICTIONS, REFERENCES, ("bleu", "meteor")) == plain


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    package = Path(pycocoevalcap.eval.__file__).parent
    before = {path for path in package.rglob("*") if path.suffix != ".pyc"}
    score(PREDICTIONS, REFERENCES)
    assert {path for path in package.rglob("*") if path.suffix != ".pyc"} == before
    assert list(tmp_path.iterdir()) == []
    assert [child.name() for child in psutil.Process().children() if child.name() == "java"] == []


def test_without_java_the_rest_is_scored_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(metrics, "find_java", lambda: None)
    with caplog.at_level(logging.WARNING):
        result = score(PREDICTIONS, REFERENCES)
    assert result["tokenizer"] == "python"
    assert "METEOR" not in result and result["BLEU-4"] > 0 and result["CIDEr"] > 0
    assert "no Java found (make setup installs one): METEOR and SPICE are left out" in caplog.text
    with pytest.raises(UserError, match="meteor needs Java 11 or later; make setup installs one"):
        score(PREDICTIONS, REFERENCES, ("meteor",))


def test_a_java_that_fails_is_one_clear_error(fake_java):
    fake_java("echo 'UnsupportedClassVersionError: too old' >&2; exit 1")
    with pytest.raises(UserError, match=r"PTB tokenizer failed \(UnsupportedClass.*Java 11"):
        score(PREDICTIONS, REFERENCES)


def test_a_java_that_is_no_program_is_one_clear_error(tmp_path, monkeypatch):
    """Its OSError was a traceback."""
    java = tmp_path / "java"
    java.write_bytes(b"\x7fELF of another machine")
    java.chmod(0o755)
    monkeypatch.setattr(metrics, "find_java", lambda: str(java))
    for call in (
        lambda: score(PREDICTIONS, REFERENCES),
        lambda: metrics._meteor(str(java), [["a b"]], [["a b"]]),
        metrics.choose_tokenizer,
    ):
        with pytest.raises(UserError, match=r"java: .* failed \(Exec format error\); Java 11"):
            call()


@pytest.fixture
def only_java(tmp_path, monkeypatch):
    """The one place where a `java` may be."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    return tmp_path / "java"


def test_a_java_that_cannot_be_run_is_not_passed_over(only_java):
    """Figures were of plain words, where make setup had linked a Java that was removed later."""
    only_java.symlink_to("gone/bin/java")
    with pytest.raises(UserError, match=r"java: a link to gone/bin/java, which is missing; make"):
        score(PREDICTIONS, REFERENCES)
    only_java.unlink()
    only_java.write_text("#!/bin/sh\n")
    only_java.chmod(0o644)
    with pytest.raises(UserError, match=r"java: not executable; chmod \+x it"):
        metrics.choose_tokenizer()
    only_java.chmod(0o755)
    assert metrics.find_java() == str(only_java)
    only_java.unlink()
    only_java.mkdir()  # a folder of that name is nobody's Java
    assert metrics.find_java() is None and metrics.choose_tokenizer() == "python"


def test_a_tokenizer_that_was_chosen_is_kept(monkeypatch, caplog):
    """Java that came or went between two epochs changed what their figures meant."""
    plain = score(PREDICTIONS, REFERENCES, tokenizer="python")
    assert plain["tokenizer"] == "python" and "METEOR" not in plain
    assert score(PREDICTIONS, REFERENCES, ("cider",))["tokenizer"] == "ptb"
    monkeypatch.setattr(metrics, "find_java", lambda: None)
    assert score(PREDICTIONS, REFERENCES, tokenizer="python") == plain
    assert not caplog.records
    with pytest.raises(UserError, match="java: not found, .* make setup installs one"):
        score(PREDICTIONS, REFERENCES, tokenizer="ptb")


def test_a_meteor_that_dies_is_an_error_and_not_a_hang(fake_java):
    fake_java("read line; echo 'out of memory' >&2; exit 3")
    with pytest.raises(UserError, match="METEOR failed"):
        metrics._meteor(metrics.find_java() or "", [["a b"]] * 3, [["a b"]] * 3)


def test_spice_runs_only_where_it_is_installed(monkeypatch):
    """Its own wrapper downloads half a gigabyte on construction, and answers in sorted order."""
    with pytest.raises(UserError, match="spice needs Java and pycocoevalcap's SPICE models"):
        score(PREDICTIONS, REFERENCES, ("spice",))

    class Sorting:
        def compute_score(self, references, predictions):
            keys = sorted(references)
            values = [{"All": {"f": float(len(predictions[key][0]))}} for key in keys]
            return 0.5, values

    monkeypatch.setattr(metrics, "has_spice", lambda: True)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", Sorting)
    unsorted = {key: PREDICTIONS[key] for key in ("5", "1", "3")}
    result, each = score_each(unsorted, REFERENCES, ("spice",))
    assert result["SPICE"] == 0.5
    assert each["5"]["SPICE"] == len(PREDICTIONS["5"])


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "message"),
    [
        ({}, {}, ("bleu",), "there are none to score"),
        ({"a": "x"}, {}, ("bleu",), "none for photo 'a'"),
        ({"a": "x"}, {"a": []}, ("bleu",), "none for photo 'a'"),
        ({"a": "x"}, {"a": ["."]}, ("bleu",), "none of them contains a word"),
        ({"a": "x"}, {"a": ["x"]}, ("blue",), "'blue' is unknown; choose from bleu, meteor"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, metrics, message):
    with pytest.raises(UserError, match=message):
        score(predictions, references, metrics)
