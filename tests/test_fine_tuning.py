"""Runs that start from a checkpoint: what they take from it, what they refuse beside it, and that
nothing worse than the start replaces it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, run_program
from huggingface_models import save_family, save_florence
from safetensors.torch import load_file
from tiny_training import train_killed
from torch.nn.functional import cross_entropy

import training.loop.validation
from export.export import export_checkpoint
from handler.captioner import Captioner
from handler.errors import UserError, run_command
from training.checkpoint import load_captioner, load_model, save_checkpoint
from training.config import Distillation, SelfCritical, TrainConfig
from training.data.captions import GIVEN, IGNORED, Captions
from training.data.manifest import Row, read_manifest, write_manifest
from training.folders import WEIGHTS_FILE
from training.loop.fine_tuning import fine_tuning_config, load_start
from training.loop.run import Run
from training.loop.train import train
from training.objectives.cross_entropy import CrossEntropyLoss
from training.objectives.distillation import DistillationLoss
from training.objectives.ensemble import Ensemble
from training.objectives.self_critical import SelfCriticalLoss
from training.train import main
from training.weights.huggingface import import_huggingface

STAGE = {"name": "finetune", "epochs": 3, "batch_photos": 8, "decoder_lr": 1e-3, "encoder_lr": 1e-3,
         "encoder_layer_decay": 0.8, "flip": True, "ema": 0.5, "label_smoothing": 0.0}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_words(monkeypatch):
    """Java would take longer than the training."""
    monkeypatch.setattr("training.scores.metrics.find_java", lambda: None)


@pytest.fixture
def start(tiny_run) -> Path:
    return tiny_run / "build/checkpoints/tiny"


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """name -> the checkpoint of a tiny random import."""

    def imported(name: str) -> Path:
        folder = tmp_path_factory.mktemp("family")
        if name == "florence":
            save_florence(folder / "theirs")
        else:
            save_family(folder / "theirs", name)
        import_huggingface(str(folder / "theirs"), folder / "ours")
        return folder / "ours"

    return imported


def config_from(start: Path, folder: Path, fields: dict[str, Any] | None = None) -> TrainConfig:
    """A config of a file in `folder` that starts from a checkpoint."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"stages": [STAGE], "workers": 0, **(fields or {})}))
    return fine_tuning_config(str(path), start, data="tiny")


# --- what a run takes from its start


@pytest.mark.parametrize(
    ("usual", "given", "expected"),
    [
        ({"min_new_tokens": 5, "max_new_tokens": 9}, {"max_new_tokens": 4},
         {"min_new_tokens": 4, "max_new_tokens": 4}),
        ({"num_return_sequences": 3, "num_beams": 3}, {"num_beams": 1},
         {"num_return_sequences": 1, "num_beams": 1}),
        ({"do_sample": True}, {"num_beams": 3}, {"num_beams": 3}),
        ({"num_beams": 4}, {"do_sample": True}, {"do_sample": True}),
    ],
)  # fmt: skip
def test_the_configs_options_win_where_they_contradict(start, tmp_path, usual, given, expected):
    """As those of a request do."""
    shutil.copytree(start, tmp_path / "start")
    written = json.loads((start / "config.json").read_text())
    written["decoding"] = usual
    (tmp_path / "start/config.json").write_text(json.dumps(written))
    config = config_from(tmp_path / "start", tmp_path, {"decoding": given})
    assert {n: v for n, v in config.decoding.items() if n in {**usual, **given}} == expected


def test_everything_comes_from_the_checkpoint(start, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config_from(start, tmp_path), read_manifest(tiny_data), Path("run"))
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (start, Path("run")))
    for section in ("model", "preprocessing", "tokenizer", "decoding"):
        assert ours[section] == theirs[section]
    assert (start / "tokenizer.json").read_bytes() == Path("run/tokenizer.json").read_bytes()
    assert ours["training"]["config"]["start"] == str(start)
    before, after = (load_file(f / WEIGHTS_FILE) for f in (start, Path("run")))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_the_config_leaves_out_is_the_checkpoint_s(start, tmp_path):
    model, checkpoint, tokenizer = load_model(start)
    decoding = {"num_beams": 4, "length_penalty": 2.0, "max_new_tokens": 7}
    preprocessing = checkpoint["preprocessing"]
    save_checkpoint(tmp_path / "start", model, tokenizer, preprocessing, decoding, {})
    config = config_from(tmp_path / "start", tmp_path)
    assert (config.encoder.width, config.encoder.image_size) == (32, 32)
    assert (config.decoder.layers, config.decoder.dropout) == (1, 0.1)
    assert config.decoder.max_tokens == 10  # its positions, which are fewer than 64
    assert config.decoding == decoding and config.validation.num_beams == 4
    config = config_from(
        tmp_path / "start",
        tmp_path,
        {"decoder": {"max_tokens": 6, "dropout": 0.3}, "decoding": {"num_beams": 2}},
    )
    # A default that the shorter captions leave no room for is shortened.
    assert config.decoding == {"num_beams": 2, "length_penalty": 2.0, "max_new_tokens": 5}
    assert (config.decoder.max_tokens, config.decoder.dropout) == (6, 0.3)


def test_the_config_that_trained_it_contradicts_nothing(start, tmp_path):
    config = config_from(start, tmp_path, TINY)
    assert config.tokenizer.checkpoint == str(start) and config.tokenizer.kind is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": {"width": 64}}, "encoder.width is 64, but .*tiny, .*has 32; leave encoder"),
        ({"encoder": {"image_size": 64}}, "encoder.image_size is 64, but .* has 32"),
        ({"encoder": {"layers": 12}}, "encoder.layers is 12, but .* has 1"),  # the usual number
        ({"encoder": {"pretrained": "timm/x"}}, "encoder.pretrained is .* brings its own"),
        ({"encoder": {"stem": "convolutional"}}, "stem is 'convolutional', but .* has 'linear'"),
        ({"decoder": {"heads": 4}}, "decoder.heads is 4, but .* has 2"),
        ({"decoder": {"max_tokens": 11}}, "decoder.max_tokens is 11, but .* has 10 positions"),
        ({"tokenizer": {"kind": "bpe"}}, "tokenizer.kind is 'bpe', but .* has 'word'"),
        ({"tokenizer": {"vocab_size": 99}}, "tokenizer.vocab_size is 99, but .* brings its own"),
        ({"tokenizer": {"checkpoint": "x"}}, "tokenizer.checkpoint is 'x', but"),
        ({"resize": "crop"}, "resize is 'crop', but .* has 'squash'"),
        ({"start": "x"}, "start: give the checkpoint with --from"),
        ({"encoder": {"widht": 3}}, "encoder.widht: unknown field"),
        ({"tokenizer": {"knd": 3}}, "tokenizer.knd: unknown field"),
        ({"decoder": 3}, "decoder: must be a mapping"),
        ({"decoder": {"max_tokens": "x"}}, "decoder.max_tokens: must be int"),
        ({"decoding": {"num_beans": 3}}, "decoding.num_beans: unknown option"),
        ({"decoding": {"max_new_tokens": 10}}, "decoding.max_new_tokens is 10, .*allows 9"),
    ],
)  # fmt: skip
def test_a_field_that_contradicts_the_start_is_refused_by_name(fields, message, start, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        config_from(start, tmp_path, fields)
    assert str(refused.value).startswith(str(tmp_path / "own.yaml"))
    assert "\n" not in str(refused.value)


def test_what_cannot_be_fine_tuned_ends_in_one_line(
    start, tiny_run, tiny_export, tiny_data, monkeypatch, capsys
):
    """A start that is none, a run that would overwrite it, variables that are missing."""
    monkeypatch.chdir(tiny_run)
    data, own = ["--data", str(tiny_data)], ["--from", "build/checkpoints/tiny"]
    before = (start / WEIGHTS_FILE).read_bytes()
    for arguments, words in (
        ([*own], "config 'finetune' names no dataset; give --data NAME (make: DATA=NAME)"),
        (["--config", "finetune", *data], "needs --from DIR (make: FROM=DIR)"),
        (["--from", "nowhere", *data], "nowhere: no config.json there"),
        (["--from", str(tiny_export), *data], "this is an export; give the checkpoint"),
        ([*own, *data], "would overwrite it; give the run another name"),
        ([*own, *data, "--overwrite"], "would overwrite it; give the run another name"),
        ([*own, *data, "--run", "x", "--encoder-weights", "w"], "w: the encoder is that of build"),
    ):
        monkeypatch.setattr("sys.argv", ["training.train", *arguments])
        with pytest.raises(SystemExit, match="2"):
            run_command(main)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert (start / WEIGHTS_FILE).read_bytes() == before
    assert [path.name for path in start.parent.iterdir()] == ["tiny"]


def test_what_is_lost_of_the_captions_is_told_before_training(start):
    """Words that the vocabulary lacks by number and share, with the way out; captions that are
    longer than any that is written."""
    _, _, tokenizer = load_model(start)
    captions = ("a red square", "a red Unicorn", "the unicorn on the left is a red lion")
    said = Captions([Row("a", "a.png", captions, "train")], tokenizer, 10)
    [words] = said.notes(9, "runs/tiny")
    assert "vocabulary of runs/tiny lacks: 2, 20.0% of all words (unicorn, lion)" in words
    assert 'add them with --add-words 2 (make: ARGS="--add-words 2")' in words
    long, _ = said.notes(5, "runs/tiny")
    assert long.startswith("1 of 3 captions are longer than any that is written: raise decoding.")
    assert "lower tokenizer.min_count" in said.notes(9)[0]  # of a vocabulary that was fitted
    behind = Captions([Row("a", "a.png", captions[2:], "train")], tokenizer, 9, [5, 6])
    said = behind.notes(6, "x")
    assert "are cut" in said[0] and "raise decoding" not in str(said)
    known = Captions([Row("a", "a.png", captions[:1], "train")], tokenizer, 10)
    assert known.notes(9, "x") == []


def test_a_word_of_pieces_is_unknown_only_where_a_character_is(families):
    _, _, tokenizer = load_model(families("git"))
    assert tokenizer.unknown_words("a dogdog 犬 runs") == ["犬"]


def test_words_are_added_to_the_vocabulary_when_asked(start, tmp_path, tiny_data, monkeypatch):
    """Behind all others, each as often as asked; the old ones stay as they are, and a new one
    begins as the mean of all."""
    manifest = read_manifest(tiny_data)
    train_rows = [
        Row(row.id, row.image, (*row.captions, "A Unicorn’s red lion", "a lion"), row.split)
        for row in manifest.split("train")
    ]
    old, _, before = load_model(start)
    config = config_from(start, tmp_path, {"tokenizer": {"add_words": 16}})
    model, _, after = load_start(config, None, train_rows)
    added = {word: i for word, i in after.vocabulary.items() if word not in before.vocabulary}
    size = before.vocab_size
    assert added == {"lion": size, "unicorn's": size + 1}  # the most frequent first
    assert {word: after.vocabulary[word] for word in before.vocabulary} == before.vocabulary
    assert after.suppressed_ids == before.suppressed_ids and after.end_id == before.end_id
    rows, new = old.decoder.token_embedding.weight, model.decoder.token_embedding.weight
    assert torch.equal(new[:size], rows) and torch.equal(new[size], rows.mean(0))
    assert model.decoder.head.weight is new and model.decoder.vocab_size == size + 2
    few = config_from(start, tmp_path, {"tokenizer": {"add_words": 17}})
    assert load_start(few, None, train_rows)[2].vocab_size == size + 1
    write_manifest(tmp_path / "data", "lions", [*train_rows, *manifest.split("val")],
                   manifest.image_root, [])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    train(config, read_manifest(tmp_path / "data"), Path("run"))
    assert load_model(Path("run"))[2].decode([size, size + 1]) == "lion unicorn's"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--add-words", "2"], "--add-words needs --from DIR"),
        (["--add-words", "-1", "--from", "START"], "tokenizer.add_words must be 0 (none) or more"),
        (["--add-words", "2", "--from", "PIECES"], "tokenizer.json: only a vocabulary of words"),
    ],
)
def test_words_that_cannot_be_added(
    arguments, words, start, families, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    places = {"START": lambda: str(start), "PIECES": lambda: str(families("git"))}
    arguments = [places[a]() if a in places else a for a in arguments]
    monkeypatch.setattr("sys.argv", ["training.train", *arguments, "--data", str(tiny_data)])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert words in capsys.readouterr().err.splitlines()[-1]


# --- prompts


def test_a_prompt_is_given_and_not_learnt(start):
    """Its tokens are seen, and no loss is on them; the caption alone was the whole text before."""
    model, _, tokenizer = load_model(start)
    prompt = tokenizer.encode("the square")
    rows = [Row("a", "a.png", ("a red square", "red"), "train"), Row("b", "b.png", ("a",), "train")]
    captions = Captions(rows, tokenizer, 10, prompt)
    assert captions.longest == 6
    batch = captions.batch(torch.randn(2, 17, 32), [0, 1], [False, False])
    begin, end = tokenizer.begin_id, tokenizer.end_id
    a, red, square = tokenizer.encode("a red square")
    assert batch.tokens[0].tolist() == [begin, *prompt, a, red, square, begin, *prompt, red]
    said = [GIVEN, GIVEN, a, red, square, end, GIVEN, GIVEN, red, end]
    assert batch.targets.tolist() == [said, [GIVEN, GIVEN, a, end, *[IGNORED] * 6]]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    logits = model.decoder(batch.tokens, batch.positions, batch.mask, batch.photos)
    targets = batch.targets.masked_fill(batch.targets == GIVEN, IGNORED)
    expected = cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    total, tokens, _ = CrossEntropyLoss(0.0)(model.decoder, batch.photos, batch, 0)
    torch.testing.assert_close(total, expected)
    assert tokens == 8
    ensemble = Ensemble([model])
    distilled = DistillationLoss(Distillation(("x",)), ensemble, 0.0, frozen=True)
    total, tokens, figures = distilled(model.decoder, batch.photos, batch, 0)
    assert tokens == 8 and figures["divergence"].abs() < 1e-5
    torch.testing.assert_close(total, expected / 2, atol=1e-4, rtol=1e-4)


def test_a_prompt_that_leaves_no_room_is_refused(start):
    _, _, tokenizer = load_model(start)
    rows = [Row("a", "a.png", ("a",), "train")]
    with pytest.raises(UserError, match="leaves no room .*2 tokens of decoding.prompt"):
        Captions(rows, tokenizer, 3, tokenizer.encode("the square"))


def test_a_sample_s_log_probability_is_of_what_follows_the_prompt(start):
    """That of the search, which reports each token's own; what is given has none."""
    model, _, tokenizer = load_model(start)
    prompt = tokenizer.encode("the square")
    rows = [Row("a", "a.png", ("a red square",), "train")] * 2
    tokenizer.suppressed_ids = []  # a search reports what the model says before it forbids tokens
    choice = SelfCritical(samples=3, temperature=1.0)
    loss = SelfCriticalLoss(choice, rows, tokenizer, 6, seed=3, prompt=prompt)
    memory = torch.randn(2, 17, 32)
    batch = Captions(rows, tokenizer, 9, prompt).batch(memory, [0, 1], [False, False])
    samples, _, _ = loss.roll_out(model.decoder, memory, batch, 0)
    nll, lengths = loss.neg_log_probs(model.decoder, memory, samples)
    for row, photo, sizes in zip(nll, samples, lengths, strict=True):
        parts = row[: sum(sizes)].split(sizes)
        for part, sample in zip(parts, photo, strict=True):
            assert part[:2].tolist() == [0, 0]
            assert (-part[2:]).tolist() == pytest.approx(sample.token_log_probs, abs=1e-4)


# --- nothing worse replaces the start


def scores_of(*values: float):
    """In place of the scores of validations: those of CIDEr, one after the other."""
    figures = iter(values)
    return lambda *_, **__: {"BLEU-4": 0.0, "CIDEr": next(figures)}


@pytest.mark.parametrize(
    ("ciders", "kept", "line"),
    [
        ((0.5, 0.4, 0.1, 0.3), "start", "gained nothing: no validation CIDEr was better than its"),
        ((0.5, 0.6, 0.1, 0.3), "other", "gained on validation photos: CIDEr 0.500 -> 0.600, loss "),
        ((0.5, 0.4, 0.5, 0.3), "other", "gained on validation photos: CIDEr 0.500 -> 0.500, loss "),
    ],
)
def test_the_start_is_scored_first_and_replaced_only_by_something_better(
    ciders, kept, line, start, tiny_data, tmp_path, monkeypatch, capsys
):
    """Of an equal CIDEr, better is a lower loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.loop.validation.LEAST_PHOTOS_FOR_CIDER", 1)
    monkeypatch.setattr("training.loop.validation.score", scores_of(*ciders))
    train(config_from(start, tmp_path), read_manifest(tiny_data), Path("run"))
    before, after = (load_file(f / WEIGHTS_FILE) for f in (start, Path("run")))
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same == (kept == "start")
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"run: fine-tuning {start} {line}")
    log = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    assert log[0]["val"]["CIDEr"] == 0.5 and log[0]["step"] == 0
    training = json.loads(Path("run/config.json").read_text())["training"]
    assert training["stages"][0]["CIDEr_before"] == 0.5
    assert training["stages"][0]["CIDEr_after"] == max(ciders)


def test_a_loss_that_rises_keeps_the_start_at_an_equal_score(
    start, tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.loop.validation.LEAST_PHOTOS_FOR_CIDER", 1)
    monkeypatch.setattr("training.loop.validation.score", scores_of(*[0.5] * 4))
    harmful = {**STAGE, "decoder_lr": 1.0, "encoder_lr": 1.0}
    train(
        config_from(start, tmp_path, {"stages": [harmful]}), read_manifest(tiny_data), Path("run")
    )
    assert load_file(start / WEIGHTS_FILE).keys() == load_file(f"run/{WEIGHTS_FILE}").keys()
    assert "gained nothing" in capsys.readouterr().out.splitlines()[-1]


def test_few_distinct_captions_are_a_warning(start, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = training.loop.validation.caption_and_loss

    def always_the_same(*arguments):
        predictions, loss = real(*arguments)
        return dict.fromkeys(predictions, "a dog"), loss

    monkeypatch.setattr("training.loop.validation.caption_and_loss", always_the_same)
    train(config_from(start, tmp_path), read_manifest(tiny_data), Path("run"))
    assert "warning: the same caption for all 4 photos" in capsys.readouterr().out


# --- every kind of stage and every family, from there


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what time alone tells."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {n: v for n, v in x.items() if n not in ("seconds", "photos_per_second")} for x in lines
    ]


def test_every_kind_of_stage_resumes_exactly_from_a_start(start, tiny_data, tmp_path, monkeypatch):
    """Self-critical training first, which only a captioner can; all behind a prompt; killed also
    while the start is scored."""
    monkeypatch.chdir(tmp_path)
    short = {"epochs": 1, "batch_photos": 8}
    stages = [
        {**short, "name": "rewarded", "self_critical": {"samples": 3}, "decoder_lr": 1e-4},
        {**short, "name": "frozen", "encoder": "frozen", "views": 2, "flip": True},
        {**short, "name": "distilled", "distillation": {"teachers": [str(start)]},
         "gradient_checkpointing": True},
    ]  # fmt: skip
    fields = {"stages": stages, "decoding": {"prompt": "the square"}}
    config, manifest = config_from(start, tmp_path, fields), read_manifest(tiny_data)
    train(config, manifest, Path("alone"))
    assert train_killed(config, manifest, Path("killed"), 2, monkeypatch) == 7
    for name in (WEIGHTS_FILE, "tokenizer.json"):
        assert Path("alone", name).read_bytes() == Path("killed", name).read_bytes()
    assert log_of(Path("alone")) == log_of(Path("killed"))
    assert [line["step"] for line in log_of(Path("alone")) if "val" in line] == [0, 2, 2, 2]
    caption = load_captioner("alone").caption([manifest.path(manifest.rows[0]).read_bytes()])
    assert caption[0][0].text.startswith("the square")
    other = config_from(Path(shutil.copytree(start, "other")), tmp_path, fields)
    with pytest.raises(UserError, match="field 'start' of the config has changed"):
        train(other, manifest, Path("alone"), resume=True)


@pytest.mark.parametrize(
    ("name", "encoder"),
    [("blip", "trained"), ("git", "frozen"), ("vit+gpt2", "trained"), ("florence", "trained")],
)
def test_an_imported_captioner_is_fine_tuned_and_exported(
    name, encoder, families, tiny_data, tmp_path, monkeypatch
):
    """Of random weights: the loss falls, killed or not the bytes are the same, and the export
    captions as the checkpoint does. GIT's features are of another width than its encoder."""
    monkeypatch.chdir(tmp_path)
    start, manifest = families(name), read_manifest(tiny_data)
    stage = {**STAGE, "epochs": 6 if name == "florence" else 2, "encoder": encoder}
    if encoder == "frozen":
        stage |= {"encoder_layer_decay": 1.0, "views": 2}
    rewarded = {"name": "rewarded", "epochs": 1, "batch_photos": 8, "decoder_lr": 1e-4,
                "self_critical": {"samples": 2}}  # fmt: skip
    fields = {"stages": [stage, rewarded]}
    if name == "florence":
        fields["decoding"] = {"prompt": "<DETAILED_CAPTION>"}
    config = config_from(start, tmp_path, fields)
    train(config, manifest, Path("alone"))
    val = [line["val"]["loss"] for line in log_of(Path("alone")) if "val" in line]
    assert val[-2] < val[0] - 0.1  # the last one is after the reward, which does not see the loss
    assert train_killed(config, manifest, Path("killed"), 4, monkeypatch) > 1
    assert Path("alone", WEIGHTS_FILE).read_bytes() == Path("killed", WEIGHTS_FILE).read_bytes()
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (start, Path("alone")))
    assert ours["model"]["encoder"] == theirs["model"]["encoder"]
    assert ours["tokenizer"] == theirs["tokenizer"]
    tasks = ours["tokenizer"]["tasks"]
    learnt = tasks["<DETAILED_CAPTION>"]["ids"] if tasks else []
    assert ours["model"]["decoder"] == {**theirs["model"]["decoder"], "prompt_ids": learnt}
    export_checkpoint(Path("alone"), Path("export"))
    photos = [manifest.path(row).read_bytes() for row in manifest.split("val")]
    eager, exported = load_captioner("alone"), Captioner.load("export")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    for mine, same in zip(*(c.caption(photos, **options) for c in (eager, exported)), strict=True):
        # Behind the best, two beams of random weights can be equal but for rounding.
        assert mine[0].ids == same[0].ids
        scores = [[caption.score for caption in best] for best in (mine, same)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.slow
def test_several_processes_fine_tune_as_one(start, tiny_data, tmp_path):
    """Only the first scores the start; all of them know its figures."""
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump({"stages": [{**STAGE, "epochs": 1}], "workers": 0, "precision": "fp32",
                        "decoder": {"dropout": 0.0}})
    )  # fmt: skip
    command = ["--config", "own.yaml", "--data", str(tiny_data), "--from", str(start), "--run"]
    one = run_program("training.train", *command, "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    launcher = ["--standalone", "--nproc-per-node", "2", "-m", "--", "training.train"]
    two = run_program("torch.distributed.run", *launcher, *command, "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("before any step") == two.stdout.count(" gained ") == 1
    logs = [log_of(tmp_path / "build/checkpoints" / name) for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert logs[0][0]["val"] == logs[1][0]["val"]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.get("loss") == pytest.approx(theirs.get("loss"), abs=2e-4)


@pytest.mark.parametrize("asked", [9, 5, None])
def test_no_caption_is_longer_than_those_that_are_learnt(asked, start, tiny_data, tmp_path):
    """The prompt counts in training, so it does where captions are written and sampled."""
    decoding = {"prompt": "the square", "max_new_tokens": asked}
    config = config_from(start, tmp_path, {"decoder": {"max_tokens": 10}, "decoding": decoding})
    run = Run(config, read_manifest(tiny_data), SimpleNamespace(path=tmp_path))
    _, _, run.tokenizer = load_model(start)
    longest = min(asked or 7, 7)  # of 10 tokens, a begin token and two of the prompt are not new
    assert run.decoding()["max_new_tokens"] == longest
    assert len(run.prompt()) == 2
