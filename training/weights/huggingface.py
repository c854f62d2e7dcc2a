"""Converts a Hugging Face captioner to a checkpoint: config, weights, tokenizer, image processor
and generation config. `training.weights.families` lists the supported classes."""

from pathlib import Path
from typing import Any

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError, naming
from handler.files import as_utf8, check_replaceable, replace_folder
from training.checkpoint import save_checkpoint
from training.folders import IMPORTED, LOG_FILE, STATE_FILE, WEIGHTS_FILE
from training.model import CaptioningModel
from training.weights.families import family_of, import_model, model_configs
from training.weights.files import (
    ADDED,
    CONFIG,
    GENERATION,
    SPECIAL,
    TOKENIZER,
    fetch,
    read_json,
    read_processor,
    read_state,
)
from training.weights.generation import (
    import_decoding,
    import_forced,
    import_ids,
    total_lengths,
)
from training.weights.image_processor import import_preprocessing
from training.weights.tokenizer import import_tasks, import_tokenizer


def import_huggingface(name_or_folder: str, out: Path) -> CaptioningModel:
    """Writes the model to the checkpoint `out`. It replaces an earlier import, but not a trained
    run. Raises UserError naming the file and the field or parameter that is not supported; nothing
    is written then."""
    check_untrained(out)  # before anything is downloaded
    folder = fetch(name_or_folder)
    check_replaceable(out, IMPORTED, [folder])
    config = read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        family = family_of(config)
        encoder, _ = model_configs(config)
    path, processor = read_processor(folder)
    with naming(path):
        size = None if family.free_size(config) else encoder.image_size
        preprocessing = import_preprocessing(processor, size)
    with naming(folder / CONFIG):
        _, decoder = model_configs(config, preprocessing.image_size)
    source, stored = folder / CONFIG, None
    if (folder / GENERATION).exists():
        source, stored = folder / GENERATION, read_json(folder / GENERATION)
    with naming(source):
        generation = family.generation(config, stored)
        decoding = import_decoding(
            generation, decoder.max_positions, decoder.vocab_size, family.forced
        )
        ids = import_ids(generation, decoder.vocab_size)
        ids |= import_forced(generation, decoder.vocab_size) if family.forced else {}
        counted = total_lengths(generation)
    settings: dict[str, Any] = {}
    for name in (ADDED, SPECIAL, TOKENIZER):
        if (folder / name).exists():
            content = read_json(folder / name)
            settings |= {"added_tokens": content} if name == ADDED else content
    try:
        tokenizer = import_tokenizer(folder, settings, decoder.vocab_size)
        tasks = import_tasks(folder, tokenizer, settings, family.tasks) if family.tasks else {}
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / TOKENIZER}: malformed ({error!r}); download it again"
        ) from error

    weights, state = read_state(folder)
    default = next((task["ids"] for task in tasks.values()), [])
    model = import_model(config, state, str(weights), preprocessing.image_size, default)
    with replace_folder(out, IMPORTED, [folder]) as new:
        save_checkpoint(
            new,
            model,
            CaptionTokenizer(tokenizer, **ids, tasks=tasks),
            preprocessing.to_dict(),
            decoding,
            {"imported_from": as_utf8(name_or_folder)},
            total_lengths=counted,
        )
    return model


def check_untrained(out: Path) -> None:
    """Raises UserError if `out` is a trained run, with or without its log."""
    trained = (out / LOG_FILE).exists() or (out / STATE_FILE).exists()
    if not trained and (out / CONFIG).exists() and (out / WEIGHTS_FILE).exists():
        training = read_json(out / CONFIG).get("training")
        trained = isinstance(training, dict) and "imported_from" not in training
    if trained:
        raise UserError(
            f"{out}: this is a trained run; choose another folder with --out (make: RUN=NAME)"
        )
