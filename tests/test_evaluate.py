"""`make evaluate`: what it writes, that scores can be taken again, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_program
from safetensors.torch import load_file

import training.evaluate
from handler.captioner import Captioner
from handler.errors import UserError, run_command
from training.checkpoint import load_captioner
from training.data.manifest import Row, read_manifest
from training.data.scenes import check
from training.evaluate import main, model_size
from training.scores.captions import read_predictions, score_rows, write_predictions
from training.scores.claims import score_claims


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tiny_data: Path) -> Path:
    """The tiny checkpoint's scores on its validation photos, two beams."""
    done = run_program(
        "training.evaluate", "--checkpoint", "build/checkpoints/tiny", "--data", str(tiny_data),
        "--num-beams", "2", "--metrics", "bleu", "rouge", "cider", cwd=tiny_run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "BLEU-4" in done.stdout and "4/4" in done.stderr
    [folder] = (tiny_run / "build/evaluate/tiny").iterdir()
    assert re.fullmatch(r"tiny-val-[0-9a-f]{8}", folder.name)  # the options are not the defaults
    return folder


def test_captions_are_the_checkpoints_and_scores_are_kept(evaluated, tiny_run, tiny_data):
    manifest = read_manifest(tiny_data)
    rows = manifest.split("val")
    predictions = json.loads((evaluated / "predictions.json").read_text())
    # Ids that are numbers are numbers in COCO's format.
    assert [entry["image_id"] for entry in predictions] == [int(row.id) for row in rows]
    captioner = load_captioner(tiny_run / "build/checkpoints/tiny")
    photos = [manifest.path(row).read_bytes() for row in rows]
    captions = [best[0].text for best in captioner.caption(photos, num_beams=2)]
    assert [entry["caption"] for entry in predictions] == captions
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"} <= set(metrics)
    assert (metrics["tokenizer"], metrics["photos"], metrics["split"]) == ("ptb", 4, "val")
    assert (metrics["data"], metrics["decoding"]["num_beams"]) == ("tiny", 2)
    weights = load_file(tiny_run / "build/checkpoints/tiny/model.safetensors").values()
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights)
    # Four bytes each, and the file's header.
    assert 0 < metrics["megabytes"] - 4e-6 * metrics["parameters"] < 0.01
    assert metrics["distinct_captions"] == len(set(captions))
    assert metrics["decoding"]["num_return_sequences"] == 1
    assert set(metrics["recall_by_training_count"]) <= {"0", "1-9", "10-99"}
    low, high = metrics["intervals"]["CIDEr"]
    assert low <= metrics["CIDEr"] <= high


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["training.evaluate", *map(str, arguments)])
    try:
        run_command(main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_each_dataset_split_and_options_has_a_folder(
    evaluated, tiny_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """Another dataset, split or option overwrote the predictions of the last."""
    monkeypatch.chdir(tmp_path)
    model = ["--checkpoint", tiny_run / "build/checkpoints/tiny", "--metrics", "bleu"]
    data = ["--data", tiny_data]
    default = load_captioner(tiny_run / "build/checkpoints/tiny").options()
    for arguments in (
        [*data],
        [*data, "--num-beams", default.num_beams or 5],  # spelled out, the same folder
        [*data, "--num-beams", "2"],
        [*data, "--split", "train"],
    ):
        assert run(monkeypatch, *model, *arguments) == 0, capsys.readouterr().err
    folders = sorted(path.name for path in Path("build/evaluate/tiny").iterdir())
    assert folders == ["tiny-train", "tiny-val", evaluated.name]
    own = Path("build/evaluate/tiny/tiny-val")
    (own / "thesis.txt").write_text("x")
    capsys.readouterr()
    assert run(monkeypatch, *model, *data) == 2
    assert "'thesis.txt' is not part of an evaluation" in capsys.readouterr().err
    scored = ["--predictions", own / "predictions.json", "--metrics", "bleu", *data]
    for out, said in (
        (own, "the output is above the input"),
        (tiny_data, "the output is"),
    ):
        assert run(monkeypatch, *scored, "--out", out) == 2
        assert said in capsys.readouterr().err
    assert run(monkeypatch, *model, *data, "--out", tiny_run / "build/checkpoints") == 2
    assert "the output is above the input" in capsys.readouterr().err


def test_captions_outlive_scores_that_fail(tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Captions take hours; without Java they were lost, and an earlier evaluation stays."""

    def fail(*_: object) -> None:
        raise UserError("no Java")

    monkeypatch.setattr(training.evaluate, "score_rows", fail)
    out = tmp_path / "out"
    arguments = ["--checkpoint", tiny_run / "build/checkpoints/tiny", "--data", tiny_data]
    assert run(monkeypatch, *arguments, "--out", out) == 2
    assert not out.exists()
    assert len(read_predictions(tmp_path / "out.unscored.json")) == 4
    assert "out.unscored.json" in capsys.readouterr().out


def test_a_model_that_has_learnt_little_is_said(tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Scores of captions of one word each were printed like any others."""
    arguments = ["--checkpoint", tiny_run / "build/checkpoints/tiny", "--data", tiny_data]
    arguments += ["--metrics", "bleu", "cider", "--out", tmp_path / "out"]
    assert run(monkeypatch, *arguments, "--max-new-tokens", 1) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("warning: ") and last.endswith("train it longer")


@pytest.mark.parametrize(
    ("captions", "warning"),
    [
        (["A dog.", "a dog", "a dog", "a dog ."], "the same caption for all 4 photos"),
        (["so", "it", "goes", "on"], "CIDEr is 0 on 4 photos"),
        (["a red square", "a green square", "a blue square", "a yellow square"], None),
    ],
)
def test_predictions_of_little_worth_are_said(
    tiny_data, tmp_path, monkeypatch, capsys, captions, warning
):
    rows = read_manifest(tiny_data).split("val")
    path = tmp_path / "predictions.json"
    write_predictions(path, {row.id: c for row, c in zip(rows, captions, strict=True)})
    arguments = ["--predictions", path, "--data", tiny_data, "--metrics", "bleu", "cider"]
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "CIDEr" in printed
    assert (f"warning: {warning}" in printed) if warning else ("warning" not in printed)


def test_figures_without_java_are_said(tiny_data, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("training.scores.metrics.find_java", lambda: None)
    rows = read_manifest(tiny_data).split("val")
    path = tmp_path / "predictions.json"
    write_predictions(path, {row.id: row.captions[0] for row in rows})
    assert run(monkeypatch, "--predictions", path, "--data", tiny_data) == 0
    assert "no Java found (make setup installs one): METEOR and SPICE are left out" in caplog.text
    assert re.search(r"tokenizer +python", capsys.readouterr().out)


def test_an_export_has_a_size_too(tiny_export):
    parts = [tiny_export / name for name in ("encoder.pt", "decoder.pt")]
    size = model_size(Captioner.load(tiny_export), tiny_export)
    assert size == {"megabytes": sum(part.stat().st_size for part in parts) / 1e6}


def test_scores_can_be_taken_again_from_predictions(evaluated, tiny_data, tmp_path):
    """Against the split, and against COCO annotations of the same captions, the same scores."""
    rows = read_manifest(tiny_data).split("val")
    annotations = [
        {"image_id": int(row.id), "caption": caption} for row in rows for caption in row.captions
    ]
    truth = tmp_path / "captions.json"
    # A reference without a prediction does not count, as in pycocoevalcap's example.
    annotations.append({"image_id": 99, "caption": "another photo"})
    truth.write_text(json.dumps({"annotations": annotations}))
    first = json.loads((evaluated / "metrics.json").read_text())
    for source in (["--data", str(tiny_data)], ["--references", str(truth)]):
        again = tmp_path / source[0]
        done = run_program(
            "training.evaluate", "--predictions", str(evaluated / "predictions.json"), *source,
            "--metrics", "bleu", "rouge", "cider", "--out", str(again), cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        metrics = json.loads((again / "metrics.json").read_text())
        assert {name: first[name] for name in metrics} == metrics


def test_a_broken_photo_is_named(tiny_run, tiny_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data, broken)
    row = read_manifest(broken).split("val")[1]
    (broken / row.image).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    done = run_program(
        "training.evaluate", "--checkpoint", "build/checkpoints/tiny", "--data", str(broken),
        "--out", str(tmp_path / "out"), cwd=tiny_run,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and Path(row.image).name in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--export", "nowhere"], "nowhere"),
        (["--checkpoint", "build/checkpoints/tiny", "--num-beams", "99"], "num_beams"),
        (["--checkpoint", "build/checkpoints/tiny", "--split", "test"], "no split 'test'"),
        (["--checkpoint", "build/checkpoints/tiny", "--data", "nowhere"], "nowhere"),
        (["--predictions", "nowhere.json", "--data", "x"], "nowhere.json"),
        (["--predictions", "tiny.yaml", "--data", "x"], "not in COCO's format"),
        (["--predictions", "tiny.yaml"], "needs --data or --references"),
        (["--predictions", "p.json", "--data", "x", "--references", "r.json"], "one of them"),
        ([], "--checkpoint"),
    ],
)
def test_faults_are_one_line_and_status_2(
    tiny_run, tiny_data, arguments, message, monkeypatch, capsys
):
    if "--data" not in arguments and "--checkpoint" in arguments:
        arguments = [*arguments, "--data", str(tiny_data)]
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr("sys.argv", ["training.evaluate", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


ROWS = [Row(key, f"{key}.png", ("a dog",), "val") for key in ("a", "7", "007")]


def test_ids_come_back_as_they_were(tmp_path):
    predictions = {"a": "Ein Hund läuft", "7": "x", "007": "", "٧": "y"}
    write_predictions(tmp_path / "p.json", predictions)
    assert read_predictions(tmp_path / "p.json") == predictions
    ids = [entry["image_id"] for entry in json.loads((tmp_path / "p.json").read_text())]
    assert ids == ["a", 7, "007", "٧"]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"a": "x"}, r"no caption for photo '7' \(2 of 3\)"),
        ({"a": "x", "7": "x", "007": "x", "z": "x"}, "photo 'z' is not in the split"),
    ],
)
def test_scores_of_other_photos_are_refused(predictions, message):
    with pytest.raises(UserError, match=message):
        score_rows(predictions, ROWS, ("bleu",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}], "has 2 captions"),
        ([{"image_id": 1.5, "caption": "a"}], "not in COCO's format"),
        ([{"image_id": 1}], "not in COCO's format"),
        ({"image_id": 1}, "not in COCO's format"),
    ],
)
def test_damaged_predictions_are_named(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_predictions(path)


def test_claims_are_counted_by_kind_and_captions_as_a_whole():
    one = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain"}
    scene = {
        "size": [96, 96],
        "background": {"pattern": "plain", "tone": "light"},
        "objects": [{**one, "box": [10, 10, 48, 48]}],
    }
    rows = [Row(str(n), "x.png", ("a red circle",), "val", scene) for n in range(4)]
    captions = ("a red circle", "a blue circle", "a red circle", "nothing that can be checked")
    shares = score_claims(dict(zip("0123", captions, strict=True)), rows)
    assert shares["captions_true"] == 0.5
    assert 0.5 < shares["claims_true"] < 1
    assert shares["claims_true_colour"] == pytest.approx(2 / 3)
    assert shares["claims_per_reference_colour"] == pytest.approx(3 / 4)
    said = sum(len(check(caption, scene)) for caption in captions)
    assert shares["claims_per_reference"] == pytest.approx(said / (4 * 2))
