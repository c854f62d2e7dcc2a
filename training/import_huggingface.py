"""`python -m training.import_huggingface NAME_OR_DIR`: a captioner of Hugging Face -> a checkpoint
of ours. The classes are those of `training.weights.families`.

NAME_OR_DIR is a folder that `save_pretrained` wrote (model, tokenizer, image processor), or a name
on the Hub, which is downloaded into its cache. The checkpoint captions as `generate` does with the
model's own generation config. Files are read as data: no code that comes with a model is run.
"""

from pathlib import Path
from typing import Any

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import check_replaceable, replace_folder
from training.checkpoint import CHECKPOINTS, IMPORTED, save_checkpoint
from training.model import CaptioningModel
from training.weights.families import family_of, import_model, model_configs
from training.weights.files import (
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
from training.weights.generation import import_decoding, import_ids
from training.weights.image_processor import import_preprocessing
from training.weights.tokenizer import import_tokenizer


def import_huggingface(name_or_folder: str, out: Path) -> CaptioningModel:
    """Writes the model as the checkpoint `out`, where an earlier import may be, but no run that was
    trained. Raises UserError naming the file and the field or parameter that does not fit, and then
    writes nothing."""
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
        decoding = import_decoding(generation, decoder.max_positions, decoder.vocab_size)
        ids = import_ids(generation, decoder.vocab_size)
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
    model = import_model(config, state, str(weights), preprocessing.image_size)
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


def main() -> None:
    parser = ArgumentParser(prog="training.import_huggingface", description=__doc__)
    parser.add_argument("model", metavar="NAME_OR_DIR", help="a name on the Hub, or a folder")
    parser.add_argument("--out", type=Path, help="default build/checkpoints/NAME")
    arguments = parser.parse_args()
    name = Path(arguments.model).resolve().name
    out = arguments.out or CHECKPOINTS / name
    model = import_huggingface(arguments.model, out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{out}: {millions:.1f} M parameters from {arguments.model}")


if __name__ == "__main__":
    run_command(main)
