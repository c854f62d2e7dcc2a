"""Checkpoints and exports whose files lie: refused by file and field, before anything
is allocated."""

import json
import resource
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler.captioner import Captioner
from handler.errors import UserError
from training.checkpoint import load_captioner, load_model
from training.loop.run import read_state


def edited(source: Path, folder: Path, path: tuple[str, ...], value: Any) -> Path:
    """A copy of `source` with another value at `path` in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    section = config
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model(part: str, name: str) -> tuple[str, ...]:
    return "model", part, name


LIES: list[tuple[tuple[str, ...], Any]] = [
    (model("encoder", "layers"), 10**9),
    (model("decoder", "layers"), 2),
    (model("decoder", "layers"), "many"),
    (model("encoder", "width"), 2**20),
    (model("encoder", "width"), 10**30),
    (model("decoder", "mlp_width"), 10**9),
    (model("decoder", "vocab_size"), 10**9),
    (model("decoder", "vocab_size"), 3),
    (model("decoder", "max_positions"), 10**9),
    (model("encoder", "image_size"), 32 * 10**6),
    (model("encoder", "patch_size"), 0),
    (model("encoder", "patch_size"), 4),
    (model("encoder", "prefix_tokens"), 10**9),
    (model("encoder", "mlp_width"), -128),
    (model("encoder", "heads"), 0),
    (("tokenizer", "begin_id"), 10**9),
    (("tokenizer", "end_id"), -1),
    (("tokenizer", "pad_id"), True),
    (("tokenizer", "suppressed_ids"), [0, 10**9]),
    (("tokenizer", "suppressed_ids"), 7),
    (("tokenizer", "other"), 7),
    (("preprocessing", "image_size"), 64),
    (("preprocessing", "mean"), "grey"),
    (("decoding", "num_beams"), 99),
    (("decoding", "beams"), 3),
    (("decoding",), [3]),
    (("training",), None),
    (("training", "config"), 3),
    (("training", "config", "data"), 3),
    (("parts",), []),
    (("total_lengths",), ["length"]),
    (("word_maps",), {"layers": [1]}),
    (("word_maps",), {"layers": [-1]}),
    (("word_maps",), {"layers": []}),
    (("word_maps",), {"layers": 0}),
    (("word_maps",), 3),
    (("model",), {"encoder": 3, "decoder": []}),
    (("model", "decoder"), None),
]
# What an export's scripts hold themselves, and its config.json only repeats.
OF_THE_SCRIPTS = {"layers", "width", "mlp_width", "heads"}


@pytest.mark.parametrize(("path", "value"), LIES)
@pytest.mark.timeout(60)
def test_a_config_that_lies_is_refused_by_field(path, value, tiny_run, tiny_export, tmp_path):
    """GiBs were allocated, or the process ended with a segmentation fault."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    folder = edited(tiny_run / "build/checkpoints/tiny", tmp_path / "a", path, value)
    with pytest.raises(UserError, match=r"config\.json"):
        load_captioner(folder)
    if path[-1] not in OF_THE_SCRIPTS:
        folder = edited(tiny_export, tmp_path / "b", path, value)
        with pytest.raises(UserError, match=r"config\.json"):
            Captioner.load(folder)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_weights_whose_header_lies_are_refused(tiny_run, tmp_path):
    source = tiny_run / "build/checkpoints/tiny"
    whole = (source / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    wrong = {**header, name: {**header[name], "data_offsets": [0, 2**40]}}
    for number, damaged in enumerate(
        (
            struct.pack("<Q", 2**62) + whole[8:],
            struct.pack("<Q", 10) + whole[8:],
            struct.pack("<Q", len(text := json.dumps(wrong).encode())) + text + whole[8 + length :],
            struct.pack("<Q", 10**5) + b"[" * 10**5,
            whole[:-4],
            b"",
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
            load_model(folder)


def test_tensors_too_many_too_few_or_of_another_kind_are_named(tiny_run, tmp_path):
    source = tiny_run / "build/checkpoints/tiny"
    state = load_file(source / "model.safetensors")
    name = "encoder.prefix"
    for number, changed in enumerate(
        (
            {k: v for k, v in state.items() if k != name},
            {**state, "spare": torch.zeros(1)},
            {**state, name: state[name].to(torch.int64)},
            {**state, name: torch.zeros(1, 2, 32)},
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"safetensors: .*({name}|spare)"):
            load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(tiny_run, tiny_export, tmp_path):
    """An id beyond the embedding, though there are few entries."""
    for number, (source, load) in enumerate(
        ((tiny_run / "build/checkpoints/tiny", load_captioner), (tiny_export, Captioner.load))
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        word = next(w for w, i in content["model"]["vocab"].items() if i > 3)
        content["model"]["vocab"][word] = 10**9
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"tokenizer\.json: an entry has the id 1000000000"):
            load(folder)


def test_weights_that_are_no_numbers_are_named(tiny_run, tmp_path):
    """Export and fine-tuning ended in a traceback."""
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "x")
    weights = load_file(tmp_path / "x/model.safetensors")
    weights["decoder.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "x/model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: decoder.norm.weight has values that"):
        load_model(tmp_path / "x")


def test_a_state_that_cannot_be_read_is_not_called_damaged(tmp_path):
    """The advice was to replace the run."""
    (tmp_path / "train_state.pt").mkdir()
    with pytest.raises(UserError, match="Is a directory") as refused:
        read_state(tmp_path, None)  # type: ignore[arg-type]
    assert "overwrite" not in str(refused.value)


@pytest.mark.parametrize("state", [[1], {"config": 3}, {"config": {}}, torch.zeros(3)])
def test_a_damaged_state_is_one_line(state, tmp_path):
    """Anything but a dict was a traceback."""
    torch.save(state, tmp_path / "train_state.pt")
    with pytest.raises(UserError, match=r"train_state\.pt"):
        read_state(tmp_path, None)  # type: ignore[arg-type]
