"""Converts Hugging Face's generation configs to our decoding defaults and special ids.

An option that is not supported is an error that names the field. An absent field has the default of
transformers 5.
"""

from collections.abc import Mapping
from typing import Any

from handler.beam_search import DecodeOptions
from handler.errors import UserError

# Options with the same name and meaning in Hugging Face and here.
SAME = (
    "num_beams",
    "num_return_sequences",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "do_sample",
)
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Options that change captions and are not supported, with the value that changes nothing.
UNSUPPORTED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "custom_generate": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": False,
    "watermarking_config": None,
}
UNSUPPORTED_SAMPLING = {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
}
IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
GENERATION = {
    *(*SAME, *SAMPLING, *UNSUPPORTED, *UNSUPPORTED_SAMPLING),
    *(*IDS, *FORCED, *LENGTHS, "suppress_tokens"),
}


def import_ids(generation: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`begin_id`, `end_id`, `pad_id` and `suppressed_ids` of a CaptionTokenizer, chosen as
    `generate` does. Raises UserError naming the field."""
    begin = generation.get("decoder_start_token_id", generation.get("bos_token_id"))
    end = generation.get("eos_token_id")
    if isinstance(end, list) and len(end) == 1:
        end = end[0]
    for name, value in (("decoder_start_token_id", begin), ("eos_token_id", end)):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise UserError(
                f"field {name!r} is {value!r}; it must be an id below decoder.vocab_size "
                f"({vocab_size})"
            )
    pad = generation.get("pad_token_id", end)
    suppressed = generation.get("suppress_tokens", [])
    if not isinstance(suppressed, list) or any(type(i) is not int for i in suppressed):
        raise UserError(f"field 'suppress_tokens' is {suppressed!r}; give a list of ids")
    return {
        "begin_id": begin,
        "end_id": end,
        # The tokenizer may have a padding token that the model does not have.
        "pad_id": pad if type(pad) is int and 0 <= pad < vocab_size else end,
        # `generate` suppresses only these, not padding or the begin token.
        "suppressed_ids": [i for i in suppressed if 0 <= i < vocab_size],
    }


def import_forced(generation: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`first_id` and `forces_end` of a CaptionTokenizer. Raises UserError naming the field."""
    first, forced = (generation.get(name) for name in FORCED)
    if first is not None and (type(first) is not int or not 0 <= first < vocab_size):
        raise UserError(
            f"field 'forced_bos_token_id' is {first!r}; it must be an id below "
            f"decoder.vocab_size ({vocab_size})"
        )
    end = import_ids(generation, vocab_size)["end_id"]
    if forced not in (None, end, [end]):
        raise UserError(
            f"field 'forced_eos_token_id' is {forced!r}; it must be 'eos_token_id' ({end}) or null"
        )
    return {"first_id": first, "forces_end": forced is not None}


def stored_or_legacy(
    generation: Mapping[str, Any] | None, *sections: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The content of `generation_config.json`. If there is none, the generation config that
    transformers derives from the fields of an old `config.json`; later `sections` override earlier
    ones."""
    if generation is not None:
        return generation
    merged: dict[str, Any] = {}
    for section in sections:
        merged |= {n: v for n, v in section.items() if n in GENERATION and v is not None}
    return merged


def import_decoding(
    generation: Mapping[str, Any], positions: int, vocab_size: int, forced: bool = False
) -> dict[str, Any]:
    """Our decoding defaults from a generation config without null values. Raises UserError naming a
    field that is not supported or out of range.

    They are those of `generate` without arguments: one beam, `early_stopping` false and 20 tokens,
    unless the config overrides them. With `forced`, forced tokens are left to `import_forced`.
    """
    sampling = generation.get("do_sample", False)
    unsupported: dict[str, Any] = dict(UNSUPPORTED)
    unsupported |= UNSUPPORTED_SAMPLING if sampling else {}
    unsupported |= {} if forced else dict.fromkeys(FORCED)
    for name, neutral in unsupported.items():
        value = generation.get(name)
        if value is not None and value != [] and value != neutral:
            raise UserError(f"field {name!r} is {value!r}; it is not supported")
    decoding: dict[str, Any] = {"num_beams": 1, "early_stopping": False}
    decoding |= {name: generation[name] for name in SAME if name in generation}
    if sampling:
        decoding |= {name: generation.get(name, default) for name, default in SAMPLING.items()}
        if type(decoding["top_k"]) is int:
            decoding["top_k"] = min(decoding["top_k"], vocab_size)
    longest = _length(generation, "max", 20)
    # The config of a GPT-2 may allow more tokens than it has positions.
    decoding["max_new_tokens"] = min(longest, positions - 1)
    decoding["min_new_tokens"] = _length(generation, "min", 0)
    DecodeOptions(**decoding)
    return decoding


def total_lengths(generation: Mapping[str, Any]) -> list[str]:
    """The lengths of `import_decoding` that count the prompt's tokens in `generate`."""
    return [
        f"{which}_new_tokens"
        for which in ("max", "min")
        if f"{which}_length" in generation and f"{which}_new_tokens" not in generation
    ]


def _length(generation: Mapping[str, Any], which: str, default: int) -> int:
    """The max or min number of generated tokens; `max_length` and `min_length` include the begin
    token."""
    for name, begin in ((f"{which}_new_tokens", 0), (f"{which}_length", 1)):
        if name in generation:
            if type(generation[name]) is not int:
                raise UserError(f"field {name!r} is {generation[name]!r}; give an integer")
            return max(0, generation[name] - begin)
    return default
