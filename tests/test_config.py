"""A config is complete when it is constructed: what is wrong in it ends in one line, before any
file is read."""

import copy
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TINY, run_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.errors import UserError, run_command
from training import train as command
from training.config import CONFIGS, _Loader, load_config
from training.data.manifest import read_manifest
from training.loop.train import train

PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}


def loaded(tmp_path: Path, content: object):
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / "c.yaml").write_text(text)
    return load_config(str(tmp_path / "c.yaml"))


def stage(**fields: object) -> dict[str, object]:
    return {"stages": [{"name": "a", "epochs": 1, **fields}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoding": {"beams": 3}}, "decoding.beams: unknown option.*num_beams"),
        ({"decoding": {"num_beams": 99}}, "num_beams"),
        ({"decoding": {"max_new_tokens": 99}}, "decoding.max_new_tokens is 99.*allows 9"),
        ({"decoding": {"min_new_tokens": 10}}, "min_new_tokens"),
        ({"decoding": {"num_beams": 3, "do_sample": True}}, "do_sample|num_beams"),
        ({"decoding": 3}, "decoding: must be a mapping"),
        ({"validation": {"every": 0}}, "validation.every must be 1 or more, not 0"),
        ({"validation": {"num_beams": 99}}, "validation.num_beams must be 1 to 16, not 99"),
        ({"validation": {"photos": -1}}, "validation.photos must be 0"),
        ({"validation": {"patience": -1}}, "validation.patience must be 0"),
        ({"decoder": {"dropout": 1.0}}, "decoder.dropout must be 0 to below 1, not 1.0"),
        ({"decoder": {"width": 10, "heads": 3}}, "decoder.width 10 is no multiple"),
        ({"decoder": {"max_tokens": 1}}, "decoder.max_tokens must be 2"),
        ({"decoder": {"layers": 0}}, "decoder.layers"),
        ({"encoder": {"width": 10, "heads": 3}}, "encoder.width 10 is no multiple"),
        ({"encoder": {"image_size": 33, "patch_size": 8}}, "encoder.image_size 33 is no multiple"),
        ({"encoder": {"patch_size": 28, "stem": "convolutional"}}, "multiple of 8"),
        ({"encoder": {"stem": "conv"}}, "encoder.stem"),
        ({"encoder": {"image_size": 0}}, "encoder.image_size must be 1 to 4096, not 0"),
        ({"encoder": {"dropout": float("nan")}}, "encoder.dropout must be"),
        ({"encoder": {"pretrained": "timm/x", "layers": 3}}, "encoder.layers is that of"),
        ({"tokenizer": {"kind": "words"}}, "tokenizer.kind must be word or bpe, not 'words'"),
        ({"tokenizer": {"vocab_size": 0}}, "tokenizer.vocab_size must be"),
        ({"tokenizer": {"min_count": 0}}, "tokenizer.min_count must be"),
        (stage(epochs=0), "stage 'a': epochs must be 1 or more, not 0"),
        (stage(epochs=1.5), "stages.0.epochs: must be int, not 1.5"),
        (stage(epochs=True), "stages.0.epochs: must be int"),
        (stage(decoder_lr=-1.0), "decoder_lr must be above 0"),
        (stage(decoder_lr=float("inf")), "decoder_lr must be above 0"),
        (stage(encoder_lr=0), "encoder_lr must be above 0"),
        (stage(weight_decay=-1), "weight_decay must be 0"),
        (stage(clip=0), "clip must be above 0"),
        (stage(ema=1.0), "ema must be 0 to below 1"),
        (stage(warmup=2), "warmup must be 0 to 1"),
        (stage(encoder="half"), "stage 'a': encoder must be frozen or trained, not 'half'"),
        (stage(label_smoothing=float("nan")), "label_smoothing"),
        (stage(logit_adjustment=2), "logit_adjustment must be 0 to 1"),
        (stage(name=" "), "name is empty"),
        ({"stages": 2 * stage()["stages"]}, "two of them have the same name"),
        ({"stages": []}, "at least one stage"),
        ({"stages": ["a"]}, "stages.0.: must be a mapping"),
        ({"resize": "fit"}, "resize must be squash or crop, not 'fit'"),
        ({"precision": "fp8"}, "precision must be auto or fp32 or bf16"),
        ({"device": "nonsense"}, "device must be auto, cpu, cuda"),
        ({"seed": -1}, "seed must be 0"),
        ({"workers": -1}, "workers must be 0"),
        ({"name": "a/b"}, "name must be the name of a folder"),
        ({"data": ""}, "data is empty"),
        ({"epochs": 3}, "epochs: unknown field"),
        ({"seed": 10**400}, "seed must be 0"),
        (stage(decoder_lr=10**400), "too large"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_config_is_one_line(fields, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        loaded(tmp_path, {**TINY, **fields})
    assert str(refused.value).startswith(str(tmp_path / "c.yaml"))
    assert "\n" not in str(refused.value)


def test_yaml_may_merge_what_it_repeats():
    text = "base: &base {epochs: 1}\nstages:\n  - {<<: *base, name: a}\n  - {<<: *base, name: b}\n"
    stages = yaml.load(text, _Loader)["stages"]
    assert stages == [{"epochs": 1, "name": "a"}, {"epochs": 1, "name": "b"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping of fields"),
        ("- a", "a mapping of fields"),
        ("a: [", "not readable as YAML"),
        ("data: x\ndata: y\n", "line 1: field 'data' is given twice"),
        ("a: &a [*a]", "unknown field"),
        ("? [1]\n: 2", "not readable as YAML|unknown field"),
        ("\x00", "not readable as YAML"),
        ("data: !!python/object:os.system {}", "not readable as YAML"),
    ],
)
def test_yaml_that_is_no_config_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "device must be auto"),
        (["--device", "cuda:99"], "this machine has"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--seed", "-1"], "seed must be 0"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--precision", "fp8"], "precision"),
        (["--run", "../other"], "--run is '../other'; give the name of a folder"),
        (["--run", ".."], "give the name of a folder"),
        (["--run", ""], "give the name of a folder"),
        (["--run", "/tmp/run"], "give the name of a folder"),
    ],
)
def test_a_command_line_is_refused_before_anything_is_read(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", "--data", "nowhere", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_command(command.main)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "nowhere" not in error


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name):
    load_config(name)


# Values that a field may be given, whatever it means.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(-1, 2), st.just(float("nan")),
    st.sampled_from(["", "x", "word", "bpe", "frozen", "trained", "squash", "cpu", "auto", "bf16"]),
    st.just([]), st.just({}), st.integers(10**6, 10**20),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, object]:
    """The tiny preset of the tests with one to three fields changed, dropped or added."""
    config = copy.deepcopy({**TINY, "stages": TINY["stages"][:1]})
    config["stages"][0]["epochs"] = 1
    for _ in range(draw(st.integers(1, 3))):
        section = draw(
            st.sampled_from(["", "encoder", "decoder", "tokenizer", "validation", "stages"])
        )
        fields = {"": config, "stages": config["stages"][0]}.get(section, config.get(section))
        if not isinstance(fields, dict):
            continue
        every = [
            *fields,
            "dropout",
            "accumulate",
            "views",
            "precision",
            "resize",
            "decoding",
            "ema",
        ]
        name = draw(st.sampled_from(every))
        if name == "stages":
            continue
        if draw(st.booleans()):
            fields[name] = draw(ODD)
        else:
            fields.pop(name, None)
    return config


def trains_or_is_refused(config: dict[str, object], folder: Path, data: Path) -> None:
    try:
        built = loaded(folder, config)
    except UserError as error:
        assert "\n" not in str(error)
        return
    sizes = (built.encoder.width, built.decoder.width, built.decoder.layers, built.encoder.layers)
    if max(*sizes, built.decoder.max_tokens, built.encoder.image_size or 0) > 300:
        return  # sound, but too large for this test
    try:
        train(built, read_manifest(data), folder / "run", overwrite=True)
    except UserError as error:  # what only the data can tell, as a vocabulary that holds no caption
        assert "\n" not in str(error)
        assert not (folder / "run/train_state.pt").exists()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=mutated())
def test_a_mutated_preset_is_refused_or_trains(config, tmp_path_factory, tiny_data):
    trains_or_is_refused(config, tmp_path_factory.mktemp("mutated"), tiny_data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=mutated())
def test_hundreds_of_mutated_presets(config, tmp_path_factory, tiny_data):
    trains_or_is_refused(config, tmp_path_factory.mktemp("mutated"), tiny_data)


def test_the_page_of_config_fields_is_up_to_date():
    done = run_program("training.describe_config", cwd=REPOSITORY)
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert done.stdout == written, "run python -m training.describe_config > docs/config.md"
