"""`make report`: what it contains, that it is one file, and that its maps show in a browser."""

import json
import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from browser import Browser, needs_chromium
from conftest import run_program

from handler.image_preprocess import PreprocessConfig
from training.checkpoint import load_captioner
from training.data.manifest import Row, read_manifest
from training.pages.report import Shown, card
from training.pages.system import (
    N_BEST,
    System,
    caption_split,
    load_system,
    maps_of,
    read_log,
)
from training.report import choose, name_apart


@pytest.fixture(scope="module")
def report(tiny_run: Path, tiny_export: Path, tiny_data: Path, tmp_path_factory) -> Path:
    """The tiny checkpoint beside its own export."""
    out = tmp_path_factory.mktemp("report")
    done = run_program(
        "training.report", "--checkpoint", "build/checkpoints/tiny", "--compare", str(tiny_export),
        "--data", str(tiny_data), "--num-beams", "3", "--prompt", "the square", "--out", str(out),
        cwd=tiny_run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report.html: 4 photos" in done.stdout
    return out / "report.html"


def test_scores_captions_and_references_stand_in_it(report, tiny_run, tiny_data):
    html = report.read_text(encoding="utf-8")
    for name in ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "checkpoints/tiny", "export/tiny"):
        assert name in html
    for row in read_manifest(tiny_data).split("val"):
        assert all(caption in html for caption in row.captions)
    # The checkpoint's two losses, BLEU-4, CIDEr and rate; the export has no log.
    assert html.count("<polyline") == 5


def test_photos_stand_where_they_are_better():
    """With few photos, those better with one system stood below the other as well."""
    rows = [Row(key, f"{key}.png", ("a",), "val") for key in "abc"]
    one, other = (System(name, Path(name), MagicMock()) for name in ("one", "other"))
    one.each = {key: {"CIDEr": 1.0} for key in "abc"}
    other.each = {"a": {"CIDEr": 2.0}, "b": {"CIDEr": 1.0}, "c": {"CIDEr": 0.5}}
    groups = choose([one, other], rows)
    assert [row.id for row in groups["Better with one"]] == ["c"]
    assert [row.id for row in groups["Better with other"]] == ["a"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("x/b/one", "x/b/two"), ["one", "two"]),
        (("x/a/demo", "x/b/demo"), ["a/demo", "b/demo"]),
        (("x/a/b/demo", "x/c/b/demo"), ["a/b/demo", "c/b/demo"]),
        (("x/demo", "x/demo"), ["x/demo (1)", "x/demo (2)"]),
    ],
)
def test_systems_have_names_apart(folders, names):
    systems = [System(Path(f).name, Path("/", f), MagicMock()) for f in folders]
    name_apart(systems)
    assert [system.name for system in systems] == names


def test_nothing_is_loaded_from_elsewhere(report):
    html = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "default-src 'none'" in html


def test_the_same_model_twice_differs_nowhere(report):
    differences = re.findall(r'<td class="number">([+-][0-9.]+)</td>', report.read_text())
    assert differences and set(differences) <= {"+0.000", "-0.000"}


def test_captions_are_those_of_the_evaluation(report, tiny_run, tiny_data):
    predictions = json.loads((report.parent / "predictions.json").read_text())
    manifest = read_manifest(tiny_data)
    captioner = load_captioner(tiny_run / "build/checkpoints/tiny")
    photos = [manifest.path(row).read_bytes() for row in manifest.split("val")]
    options = {"num_beams": 3, "prompt": "the square"}
    captions = [found[0].text for found in captioner.caption(photos, **options)]
    assert [entry["caption"] for entry in predictions] == captions


@pytest.mark.parametrize(
    ("preprocessing", "seen"),
    [
        (PreprocessConfig(), (0, 0, 1, 1)),
        (
            PreprocessConfig(image_size=24, resize_to=32, resize="crop"),
            (5 / 16, 1 / 8, 11 / 16, 7 / 8),
        ),
    ],
)
def test_maps_lie_where_each_model_saw(preprocessing, seen):
    system = System(
        "model",
        Path("model"),
        MagicMock(preprocessing=preprocessing),
        captions={"1": [MagicMock(score=-0.5, text="a dog")]},
        each={"1": {"CIDEr": 1.0}},
    )
    row = Row("1", "1.png", ("a dog",), "val")
    size = (640, 320)
    [entry] = card([system], row, Shown(MagicMock(), size, [[[]]])).entries
    assert entry.seen == pytest.approx(seen)


def test_a_prompt_stands_before_the_words(report):
    """Once in each caption, and not as a word: it has no map."""
    html = report.read_text(encoding="utf-8")
    lines = re.findall(r'<p class="words".*?</p>', html, re.S)
    assert lines
    for line in lines:
        assert line.count('<span class="quiet">the square</span>') == 1
        assert ">the square<" not in line.replace('<span class="quiet">the square</span>', "")


@pytest.mark.parametrize("prompt", [None, "the square"])
def test_maps_made_in_a_batch_are_those_made_alone(prompt, tiny_run, tiny_data):
    system = load_system(tiny_run / "build/checkpoints/tiny")
    manifest = read_manifest(tiny_data)
    rows = manifest.split("val")
    caption_split(system, manifest, rows, {"num_beams": 4, "prompt": prompt})
    maps = maps_of(system, manifest, rows)
    for row in rows:
        assert len(system.captions[row.id]) == len(maps[row.id]) == N_BEST
        image = system.captioner.preprocess(manifest.path(row).read_bytes())
        for caption, words in zip(system.captions[row.id], maps[row.id], strict=True):
            alone = system.captioner.attention(image, caption.ids, caption.prompt_ids)
            assert len(words) == len(alone)
            for word, map_gg in zip(words, alone, strict=True):
                assert word.map_gg.allclose(map_gg, atol=1e-5)


def test_a_log_that_is_still_written_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_log(tmp_path / "none.jsonl") == []


@needs_chromium
@pytest.mark.parametrize(("width", "phone"), [(1200, False), (390, True)])
def test_a_word_shows_its_map(report, width, phone):
    """By pointer or touch, and by keyboard; without a word of complaint from the browser."""
    with Browser() as browser:
        browser.resize(width, 844, mobile=phone)
        browser.open(report.as_uri())
        word, map_ = ".card button.word", "document.querySelector('.card .map canvas')"
        assert browser.run(f"{map_} === null")
        if phone:
            browser.tap(word)
        else:
            browser.point(word)
        browser.wait(map_)
        assert browser.run(f"{map_}.getBoundingClientRect().width") == browser.run(
            "document.querySelector('.card img').getBoundingClientRect().width"
        )
        pixels = f"{map_}.getContext('2d').getImageData(0, 0, 32, 32).data"
        # The warmest cell is yellow.
        assert browser.run(f"Math.max(...[...{pixels}].filter((_, i) => i % 4 === 1))") > 200
        if phone:
            browser.tap(word)
        else:
            browser.point("h1")
            browser.wait(f"{map_} === null")
            browser.run("document.querySelector('.card button.word').focus()")
            browser.wait(map_)
            browser.press("Tab")
            assert browser.run("document.activeElement.className") == "word"
            assert browser.run("document.querySelectorAll('.card .map').length") == 1
        assert browser.overflow() == 0
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith(("data:", "file:"))] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "build/checkpoints/tiny", "--data", "nowhere"], "nowhere"),
        (["--checkpoint", "build/checkpoints/tiny", "--compare", "nowhere"], "nowhere"),
        (["--checkpoint", "build/checkpoints/tiny", "--split", "test"], "no split 'test'"),
    ],
)
def test_faults_are_one_line_and_status_2(
    tiny_run, tiny_data, arguments, says, monkeypatch, capsys
):
    from handler.errors import run_command
    from training.report import main

    monkeypatch.chdir(tiny_run)
    data = [] if "--data" in arguments else ["--data", str(tiny_data)]
    monkeypatch.setattr("sys.argv", ["training.report", *arguments, *data])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
