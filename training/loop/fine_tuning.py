"""A run that starts from a checkpoint, imported or trained here: its config and its parts.

Encoder, decoder, tokenizer and preprocessing are the checkpoint's. A config beside it may set what
training alone is about, and the decoding defaults; a field that contradicts is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import check_config, encode_prompt, read_config, yielding
from handler.errors import UserError, naming
from handler.files import read_object
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import load_model, refuse_export
from training.config import TrainConfig, build_config, decode_options, read_fields
from training.data.manifest import Row
from training.model import CaptioningModel

# The fields of a config that a start settles, by section.
SETTLED = {
    "": ("resize",),
    "encoder": ("image_size", "patch_size", "stem", "width", "layers", "heads", "pretrained"),
    "decoder": ("width", "layers", "heads"),
    "tokenizer": ("kind", "vocab_size", "min_count", "lowercase", "checkpoint"),
}
KINDS = {"WordLevel": "word", "BPE": "bpe"}  # of vocabularies, by their names in tokenizer.json
# Parameters that have a row for each word.
OF_WORDS = {"decoder.token_embedding.weight", "decoder.head.weight", "decoder.head.bias"}
# The longest caption that is learnt, unless the checkpoint itself writes longer ones.
USUAL_MAX_TOKENS = 64


def fine_tuning_config(
    name_or_path: str, start: Path, add_words: int | None = None, **overrides: Any
) -> TrainConfig:
    """As `load_config`, completed by the checkpoint `start`; `add_words` replaces the tokenizer's
    field. Raises UserError naming the checkpoint's file, or the config's and the field that
    contradicts it."""
    path, fields = read_fields(name_or_path, **overrides)
    if add_words is not None and isinstance(fields.get("tokenizer", {}), dict):
        fields["tokenizer"] = {**fields.get("tokenizer", {}), "add_words": add_words}
    checkpoint = read_config(start)
    check_config(start, checkpoint)
    refuse_export(start, checkpoint)
    vocabulary = _section(read_object(start / "tokenizer.json"), "model")
    kind = KINDS.get(str(vocabulary.get("type")))
    with naming(path):
        encoder, decoder = (checkpoint["model"][part] for part in ("encoder", "decoder"))
        own = {
            # Of a DaViT, sizes that are lists have no field in a config.
            "encoder": {
                n: v for n, v in encoder.items() if isinstance(v, int | float) or n == "stem"
            },
            "decoder": decoder,
            "tokenizer": {"kind": kind, "checkpoint": str(start)},
            "resize": checkpoint["preprocessing"].get("resize", "squash"),
        }
        refuse_contradiction(fields, own, _section(_section(checkpoint, "training"), "config"))
        return build_config(complete(fields, own, checkpoint.get("decoding", {})))


def refuse_contradiction(
    fields: Mapping[str, Any], own: Mapping[str, Any], trained: Mapping[str, Any]
) -> None:
    """Raises UserError for a field of a config whose value is neither the checkpoint's `own` nor
    the one that this was `trained` with."""
    start = own["tokenizer"]["checkpoint"]
    theirs, former = _settled(own), _settled(trained)
    for part, given in _settled(fields).items():
        for name, value in given.items():
            known = theirs[part].get(name)
            if value is None or value in (known, former[part].get(name)):
                continue
            field = f"{part}.{name}".lstrip(".")
            has = "brings its own" if known is None else f"has {known!r}"
            raise UserError(
                f"{field} is {value!r}, but {start}, from which the run starts, {has}; leave "
                f"{field} out"
            )


def complete(
    fields: Mapping[str, Any], own: Mapping[str, Any], decoding: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a config with the checkpoint's `own`, and with what this suggests where the
    config is silent: dropout, the longest caption, its `decoding`, and its beams to validate by."""
    start, positions = own["tokenizer"]["checkpoint"], own["decoder"]["max_positions"]
    given = {part: fields.get(part, {}) for part in (*SETTLED, "validation", "decoding") if part}
    for part, section in given.items():
        if not isinstance(section, dict):
            raise UserError(f"{part}: must be a mapping")
    encoder, decoder = (
        {"dropout": own[part].get("dropout", 0.0), **given[part], **_settled(own)[part]}
        for part in ("encoder", "decoder")
    )
    written = 1 + (decoding.get("max_new_tokens") or positions - 1)
    longest = decoder.setdefault("max_tokens", min(positions, max(written, USUAL_MAX_TOKENS)))
    suggested = dict(decoding)
    if isinstance(longest, int):
        if longest > positions:
            raise UserError(
                f"decoder.max_tokens is {longest}, but {start} has {positions} positions; lower it"
            )
        for name in ("max_new_tokens", "min_new_tokens"):
            if suggested.get(name):
                suggested[name] = min(suggested[name], longest - 1)
    suggested = {**yielding(suggested, given["decoding"]), **given["decoding"]}
    unknown = {n: v for n, v in given["tokenizer"].items() if n not in SETTLED["tokenizer"]}
    return {
        **fields,
        "start": start,
        "resize": own["resize"],
        "encoder": {**encoder, "pretrained": None},
        "decoder": decoder,
        "tokenizer": {**unknown, "checkpoint": start},
        "decoding": suggested,
        "validation": {"num_beams": decode_options(suggested).beams, **given["validation"]},
    }


def _settled(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a config that a start settles, by section; not those that have a value for each
    stage, as a DaViT's have."""
    return {
        part: {n: section[n] for n in names if n in section and not isinstance(section[n], list)}
        for part, names in SETTLED.items()
        for section in [_section(config, part) if part else config]
    }


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, Mapping) else {}


def check_start(config: TrainConfig, written: Sequence[Path]) -> None:
    """Raises UserError where a run would overwrite what it starts from, for it writes the folders
    `written`."""
    if config.start is not None and Path(config.start).resolve() in [f.resolve() for f in written]:
        raise UserError(
            f"{config.start}: this run starts from it and would overwrite it; give the run another "
            "name with --run (make: RUN=NAME)"
        )


def load_start(
    config: TrainConfig, weights: Path | None, rows: Sequence[Row]
) -> tuple[CaptioningModel, PreprocessConfig, CaptionTokenizer]:
    """The captioner that a run fine-tunes, with the run's dropout, and with the words of its
    training photos `rows` where the config adds them. Raises UserError for `weights` of another
    encoder, and for words that are added to pieces of words."""
    assert config.start is not None
    if weights is not None:
        raise UserError(f"{weights}: the encoder is that of {config.start}; leave one of them out")
    found, checkpoint, tokenizer = load_model(Path(config.start))
    state, size = found.state_dict(), found.decoder_config.vocab_size
    if config.tokenizer.add_words:
        captions = (caption for row in rows for caption in row.captions)
        with naming(Path(config.start) / "tokenizer.json"):
            tokenizer = tokenizer.with_words_of(captions, config.tokenizer.add_words)
        for name in OF_WORDS & state.keys():
            state[name] = with_rows(state[name], tokenizer.vocab_size - size)
        size = tokenizer.vocab_size
    encoder = replace(found.encoder_config, dropout=config.encoder.dropout)
    decoder = replace(found.decoder_config, dropout=config.decoder.dropout, vocab_size=size)
    if tokenizer.tasks:  # the task that is learnt is the one that is asked for by default
        task = encode_prompt(tokenizer, config.decoding.get("prompt"))
        decoder = replace(decoder, prompt_ids=tuple(task))
    model = CaptioningModel(encoder, decoder)
    model.load_state_dict(state)
    return model, PreprocessConfig.from_dict(checkpoint["preprocessing"]), tokenizer


def with_rows(rows: Tensor, more: int) -> Tensor:
    """(V, ...) -> (V + more, ...): a new word begins as the mean of all others, so that it changes
    the probability of none much (Hewitt 2021, "Initializing new word embeddings for pretrained
    language models")."""
    return torch.cat([rows, rows.mean(0, keepdim=True).expand(more, *rows.shape[1:])])
