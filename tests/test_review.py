"""The blind sheet and what its ratings say: deterministic, blind, usable offline, and statistics
that agree with published examples."""

import json
import math
import re

import pytest
from browser import Browser, needs_chromium
from conftest import run_program

import training.review
from handler.errors import UserError, run_command
from training.data.manifest import Row, read_manifest
from training.pages.review import key_of, make_items, plain, read_systems, render
from training.review_score import main
from training.scores.agreement import kendall, krippendorff_alpha, spearman
from training.scores.captions import evaluated_name, write_predictions
from training.scores.ratings import (
    HUMAN,
    Ratings,
    by_system,
    correlations,
    mean_of,
    preference,
    read_ratings,
)

# Krippendorff 2011, section C and following: 4 observers, 12 units, missing ratings.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[v for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]


@pytest.mark.parametrize(("level", "alpha"), [("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_worked_example(level, alpha):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=0.0005)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[1, 1], [5, 5], [3, 3]]) == 1
    assert krippendorff_alpha([[1, 5], [5, 1], [1, 5], [5, 1]]) < 0
    assert math.isnan(krippendorff_alpha([[3, 3], [3, 3]]))
    assert math.isnan(krippendorff_alpha([[3], [4]]))


def test_correlations_of_ranks():
    """Kendall's tau-b by hand: 5 concordant, 1 tie on each side of 6 pairs."""
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert kendall([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(kendall([1, 1], [1, 2]))


ROWS = [
    Row(str(n), f"images/{n}.png", (f"A photo of number {n}.", f"number {n} again"), "val")
    for n in range(16, 20)
]
SYSTEMS = {
    "good": {row.id: f"number {row.id} again" for row in ROWS},
    "bad": {row.id: "a zebra" for row in ROWS},
}


def test_the_same_seed_gives_the_same_sheet():
    first, second = (make_items(SYSTEMS, ROWS, 3, seed=1) for _ in range(2))
    assert first == second and len(first) == 3
    assert make_items(SYSTEMS, ROWS, 3, seed=2) != first


def test_places_are_random_and_equal_captions_stand_once():
    places = []
    for item in make_items(SYSTEMS, ROWS, 4, seed=0):
        names = [sorted(names) for _, names in item.captions]
        assert sorted(names) in ([["bad"], ["good"], [HUMAN]], [["bad"], ["good", HUMAN]])
        places.append(names.index(["bad"]))
    assert len(set(places)) > 1


def test_spelling_does_not_tell_whose_it_is():
    assert plain("  A dog  runs. ") == plain("a dog runs") == "a dog runs"


def test_the_page_does_not_hold_the_key(tiny_data):
    manifest = read_manifest(tiny_data)
    rows = manifest.split("val")
    systems = {"secret-system": {row.id: f"it is {row.id}" for row in rows}}
    items = make_items(systems, rows, 4, seed=3)
    html = render(items, manifest)
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>|base64,[^\"]*", "", html, flags=re.S)
    assert "secret-system" not in html and HUMAN not in text.lower()
    key = key_of(items, manifest, "val")
    assert "secret-system" in json.dumps(key)
    # The references that a person did not write on the sheet are those of the metrics.
    for item, entry in zip(items, key["items"], strict=True):
        assert len(entry["references"]) == len(item.row.captions) - 1
        assert item.row.captions[item.human] not in entry["references"]


def test_a_system_without_a_caption_is_named():
    with pytest.raises(UserError, match="system 'bad': no caption for photo"):
        make_items({"bad": {}}, ROWS, 4, seed=0)


# --- scores

KEY = {
    "sheet": "x",
    "items": [
        {
            "photo": str(n),
            "captions": [
                {"text": f"number {n} again", "systems": ["good"]},
                {"text": "a zebra", "systems": ["bad"]},
                {"text": f"a photo of number {n}", "systems": [HUMAN]},
            ],
            "references": [f"number {n} again", f"this is number {n}"],
        }
        for n in ("one", "two", "three", "four")
    ],
}
FIRST = Ratings("a", {(n, c): (4, 1, 5)[c] for n in range(4) for c in range(3)})
SECOND = Ratings("b", {(n, c): (4, 2, 4)[c] for n in range(3) for c in range(3)})


def test_means_and_preferences():
    rated = by_system(KEY, [FIRST, SECOND])
    bad = mean_of(rated["bad"])
    assert bad["mean"] == pytest.approx((1.5 * 3 + 1) / 4) and bad["photos"] == 4
    assert bad["interval"][0] < bad["mean"] < bad["interval"][1]
    found = preference(rated["good"], rated[HUMAN])
    assert found and (found["preferred"], found["pairs"]) == (0, 7)
    assert found["ties"] == pytest.approx(3 / 7)
    found = preference(rated["good"], rated["bad"])
    assert found and (found["preferred"], found["interval"]) == (1, [1, 1])
    assert preference([{"a": 1}], [{"b": 2}]) is None


def test_metrics_that_follow_people_correlate():
    found = correlations(KEY, [FIRST, SECOND])
    assert {"BLEU-4", "ROUGE-L", "CIDEr"} <= found.keys()
    assert found["ROUGE-L"]["spearman"] > 0.3


def test_a_rating_of_no_caption_is_named():
    with pytest.raises(UserError, match="ratings of z: no caption 9-0"):
        by_system(KEY, [Ratings("z", {(9, 0): 3})])


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"sheet": "x", "rater": "a"}', '{"sheet": "x", "rater": "a", "ratings": {}}',
     '{"sheet": "x", "rater": "a", "ratings": {"0-0": 9}}',
     '{"sheet": "x", "rater": "a", "ratings": {"0": 3}}',
     '{"sheet": "x", "rater": "a", "ratings": {"0-0": true}}'],
)  # fmt: skip
def test_damaged_ratings_are_named(tmp_path, content):
    path = tmp_path / "ratings.json"
    path.write_text(content)
    with pytest.raises(UserError, match="ratings.json"):
        read_ratings(path)


# --- the whole way


@pytest.fixture
def sheet(tiny_data, tmp_path):
    """A folder in which a sheet was made."""
    rows = read_manifest(tiny_data).split("val")
    for name in ("left", "right"):
        folder = tmp_path / "build/evaluate" / name
        folder.mkdir(parents=True)
        write_predictions(folder / "predictions.json", {r.id: f"a {name} {r.id}" for r in rows})
    done = run_program(
        "training.review", "--data", str(tiny_data), "--predictions",
        "build/evaluate/left/predictions.json", "build/evaluate/right/predictions.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 photos, 2 systems and a person" in done.stdout
    return tmp_path


@needs_chromium
def test_a_person_fills_the_sheet_in_and_it_is_scored(sheet, monkeypatch, capsys):
    page = sheet / "build/review/tiny/sheet.html"
    with Browser(390, 844, downloads=sheet) as browser:
        browser.open(page.as_uri())
        visible = "[...document.querySelectorAll('.item')].filter((item) => !item.hidden).length"
        assert browser.run(visible) == 1
        assert browser.overflow() == 0
        browser.run("document.getElementById('save').click()")
        assert "name" in browser.run("document.getElementById('status').textContent")
        browser.run(
            "rater.value = 'Zoë K'; document.getElementById('rater').dispatchEvent("
            "new Event('input', {bubbles: true})); document.activeElement.blur()"
        )
        for digit in "123":
            browser.press(digit, digit)
        browser.open(page.as_uri())  # what was rated is still there
        assert browser.run("document.querySelectorAll(':checked').length") == 3
        assert "Photo 2 of 4; 1 rated" in browser.run("document.getElementById('status').innerText")
        for _ in range(3):
            for digit in "555":
                browser.press(digit, digit)
            browser.run("document.getElementById('next').click()")
        assert "4 rated. All are rated" in browser.run("document.body.innerText")
        browser.run("document.getElementById('save').click()")
        for _ in range(100):
            saved = list(sheet.glob("ratings-*.json"))
            if saved:
                break
            browser.run("new Promise((done) => setTimeout(done, 50))")
        assert browser.problems == []
    [file] = saved
    assert json.loads(file.read_text())["rater"] == "Zoë K"
    monkeypatch.chdir(sheet)
    monkeypatch.setattr("sys.argv", ["review_score", file.name])
    run_command(main)
    said = capsys.readouterr().out
    assert all(name in said for name in ("left", "right", HUMAN, "alpha", "CIDEr"))
    scores = json.loads((sheet / "build/review/tiny/scores.json").read_text())
    assert scores["alpha"]["ordinal"] is None  # one rater agrees with nobody
    total = sum(system["mean"] for system in scores["systems"].values())
    assert total == pytest.approx((1 + 2 + 3 + 45) / 4)


def test_a_second_sheet_keeps_the_first_and_its_key(sheet, tiny_data, monkeypatch, capsys):
    """The key was overwritten: what people had rated could not be scored."""
    folder = sheet / "build/review/tiny"
    monkeypatch.chdir(sheet)
    files = [f"build/evaluate/{name}/predictions.json" for name in ("left", "right")]

    def review(*arguments: str) -> int:
        command = ["review", "--data", str(tiny_data), "--predictions", *files, *arguments]
        monkeypatch.setattr("sys.argv", command)
        try:
            run_command(training.review.main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def score(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["review_score", *arguments])
        run_command(main)

    first = json.loads((folder / "key.json").read_text())
    page = (folder / "sheet.html").read_bytes()
    assert review("--seed", "0") == 0  # the same sheet: nothing to set aside
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "sheet.html"]
    for number, name in enumerate(("old", "new")):
        if number:
            assert review("--seed", "7") == 0
        key = json.loads((folder / "key.json").read_text())
        ratings = {"sheet": key["sheet"], "rater": "a", "ratings": {"0-0": 3}}
        (sheet / f"{name}.json").write_text(json.dumps(ratings))
        score(f"{name}.json")
    old = first["sheet"]
    assert (folder / f"sheet-{old}.html").read_bytes() == page
    assert json.loads((folder / f"key-{old}.json").read_text()) == first
    assert (folder / f"scores-{old}.json").exists() and (folder / "scores.json").exists()
    capsys.readouterr()
    (folder / "key-zzz.json").write_text("{")  # a damaged key of another sheet is passed over
    score("old.json")
    assert f"scores-{old}.json" in capsys.readouterr().out
    score("old.json", "--key", str(folder / "key.json"))  # the right one is beside it
    (folder / "key.json").write_text('{"sheet": "../../x", "items": []}')
    assert review("--seed", "8") == 2
    assert "key.json" in capsys.readouterr().err
    (folder / "key.json").write_text('{"mine": 1}')
    assert review("--seed", "8") == 2
    assert (folder / "key.json").read_text() == '{"mine": 1}'


def test_a_system_is_named_after_what_was_evaluated(tmp_path):
    """NAME of NAME/DATA-SPLIT, since DATA-SPLIT is that of every system."""
    paths = []
    for name, split in (("a", "d-val"), ("b", "d-val"), ("b", "d-val-12345678")):
        folder = tmp_path / name / split
        folder.mkdir(parents=True)
        write_predictions(folder / "predictions.json", {"1": name})
        (folder / "metrics.json").write_text('{"data": "d", "split": "val"}')
        paths.append(folder / "predictions.json")
    assert list(read_systems(paths[:2])) == ["a", "b"]
    assert list(read_systems(paths)) == ["a", "b/d-val", "b/d-val-12345678"]
    folder = tmp_path / "c" / evaluated_name("my photos", "val")
    folder.mkdir(parents=True)
    write_predictions(folder / "predictions.json", {"1": "c"})
    (folder / "metrics.json").write_text('{"data": "my photos", "split": "val"}')
    assert list(read_systems([folder / "predictions.json"])) == ["c"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "files"),
        (["nowhere.json"], "nowhere.json"),
        (["r.json"], "build/review: no key of sheet x"),
        (["r.json", "--key", "key.json"], "key.json: no key of sheet x"),
        (["r.json", "r.json"], "same rater"),
        (["r.json", "other.json"], "2 different sheets"),
    ],
)
def test_faults_are_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    for name, sheet in (("r.json", "x"), ("other.json", "y")):
        content = {"sheet": sheet, "rater": "a", "ratings": {"0-0": 3}}
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "key.json").write_text('{"sheet": "z"}')  # another sheet's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["review_score", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
