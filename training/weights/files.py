"""Reads the files of a Hugging Face captioner as data; code in a model's folder is never run."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from handler.errors import UserError
from training.weights.encoders import read_weights
from training.weights.tokenizer import TOKENIZER_FILES

CONFIG, GENERATION = "config.json", "generation_config.json"
PROCESSOR, COMBINED_PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER = "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
# In order of preference. An index maps each parameter to one of several files.
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def fetch(name_or_folder: str) -> Path:
    """The folder of a model; a name on the Hub is downloaded, or found in the cache. Raises
    UserError if there is neither."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: this is a file; give its folder")
    from huggingface_hub import snapshot_download

    processors = [PROCESSOR, COMBINED_PROCESSOR]
    small = [CONFIG, GENERATION, *processors, TOKENIZER, SPECIAL, ADDED, *TOKENIZER_FILES]
    try:
        folder = Path(
            snapshot_download(name_or_folder, allow_patterns=[*small, *SAFE, "model-*.safetensors"])
        )
        if not any((folder / name).exists() for name in SAFE):
            patterns = [*PICKLED, "pytorch_model-*.bin"]
            folder = Path(snapshot_download(name_or_folder, allow_patterns=patterns))
    except Exception as error:  # a wrong name, the network and the Hub raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name_or_folder}: no such folder, and no model of this name can be downloaded from "
            f"the Hub ({reason}); give the folder of a model"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object without its null values, which mean the same as absent fields. Raises
    UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_nulls)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing; call save_pretrained of the model, of its tokenizer and of its "
            "image processor with the same folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Reads the fields of the image processor; returns their file and them. As in transformers 5, a
    section of `processor_config.json` overrides `preprocessor_config.json`."""
    path = folder / COMBINED_PROCESSOR
    if path.exists():
        section = read_json(path).get("image_processor")
        if isinstance(section, dict):
            return path, section
        if section is not None:
            raise UserError(
                f"{path}: field 'image_processor' is not a JSON object; download it again"
            )
    return folder / PROCESSOR, read_json(folder / PROCESSOR)


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def read_state(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Reads all weights; returns their file (or the index of several files) and the state dict."""
    path = next((folder / name for name in (*SAFE, *PICKLED) if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: contains no weights, neither {SAFE[0]} nor {PICKLED[0]}")
    if path.suffix != ".json":
        return path, read_file(path)
    file_names = read_json(path).get("weight_map")
    if not isinstance(file_names, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in file_names.values()
    ):
        raise UserError(
            f"{path}: field 'weight_map' must name files in the same folder; download it again"
        )
    state: dict[str, Tensor] = {}
    for name in sorted(set(file_names.values())):
        state |= read_file(folder / name)
    return path, state


def read_file(path: Path) -> dict[str, Tensor]:
    """Reads one file of weights. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: missing; download it again")
    try:
        state = read_weights(path)
    except Exception as error:  # truncated, damaged, or more than tensors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not readable as weights ({reason}); download it again") from error
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: contains more than tensors; save only the state dict")
    return state
