"""A Hugging Face captioner -> a checkpoint of ours: configuration, weights, tokenizer, image
processor and generation config."""

from pathlib import Path
from typing import Any

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from handler.files import check_replaceable, replace_folder
from training.checkpoint import save_checkpoint
from training.folders import IMPORTED, LOG_FILE, STATE_FILE, WEIGHTS_FILE
from training.model import CaptioningModel
from training.weights.huggingface_files import (
    ADDED,
    CONFIG,
    GENERATION,
    SPECIAL,
    TOKENIZER,
    fetch,
    naming,
    read_json,
    read_processor,
    read_state,
)
from training.weights.huggingface_model import import_model, model_configs
from training.weights.huggingface_settings import (
    import_decoding,
    import_ids,
    import_preprocessing,
    import_tokenizer,
    legacy_generation,
)


def import_huggingface(name_or_folder: str, out: Path) -> CaptioningModel:
    """Writes the model as the checkpoint `out`, where an earlier import may be, but no run that was
    trained. Raises UserError naming the file and the field or parameter that does not fit, and then
    writes nothing."""
    folder = fetch(name_or_folder)
    check_untrained(out)
    check_replaceable(out, IMPORTED, [folder])
    config = read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        encoder, decoder = model_configs(config)
    source, generation = folder / CONFIG, legacy_generation(config)
    if (folder / GENERATION).exists():
        source, generation = folder / GENERATION, read_json(folder / GENERATION)
    with naming(source):
        decoding = import_decoding(generation, decoder.max_positions, decoder.vocab_size)
        ids = import_ids(generation, decoder.vocab_size)
    path, processor = read_processor(folder)
    with naming(path):
        preprocessing = import_preprocessing(processor, encoder.image_size)
    settings: dict[str, Any] = {}
    for name in (ADDED, SPECIAL, TOKENIZER):
        if (folder / name).exists():
            found = read_json(folder / name)
            settings |= {"added_tokens": found} if name == ADDED else found
    try:
        tokenizer = import_tokenizer(folder, settings, decoder.vocab_size)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / TOKENIZER}: malformed ({error!r}); download it again"
        ) from error

    weights, state = read_state(folder)
    model = import_model(config, state, str(weights))
    with replace_folder(out, IMPORTED, [folder]) as new:
        save_checkpoint(
            new,
            model,
            CaptionTokenizer(tokenizer, **ids),
            preprocessing.to_dict(),
            decoding,
            {"imported_from": name_or_folder},
        )
    return model


def check_untrained(out: Path) -> None:
    """Refuses a run that was trained here, logged or not. Raises UserError."""
    trained = (out / LOG_FILE).exists() or (out / STATE_FILE).exists()
    if not trained and (out / CONFIG).exists() and (out / WEIGHTS_FILE).exists():
        training = read_json(out / CONFIG).get("training")
        trained = isinstance(training, dict) and "imported_from" not in training
    if trained:
        raise UserError(
            f"{out}: a run that was trained is there; choose another folder with --out (make: "
            "RUN=NAME)"
        )
