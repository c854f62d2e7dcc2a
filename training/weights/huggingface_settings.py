"""What lies beside the weights of a Hugging Face captioner: its tokenizer, its image processor and
its generation config, as ours.

What cannot be represented is refused by the name of its field; a field that is absent has the value
that transformers 5 gives it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from handler.beam_search import DecodeOptions
from handler.errors import UserError
from handler.image_preprocess import PreprocessConfig

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
GPT2_SPECIAL = "<|endoftext|>"
SPECIAL_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token")
CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"

# The only filters that ours has, by Pillow's numbers.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
# What transformers assumes where the file is silent.
VIT = {"size": 224, "resample": 2, "do_center_crop": False, "crop_size": None}
DEIT = {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224}
PROCESSORS = {
    f"{name}{kind}": defaults
    for name, defaults in (("ViT", VIT), ("DeiT", DEIT))
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}

# Options that have the same name and meaning there and here.
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
# What would change the captions and has no place here, with the value that changes nothing.
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
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
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
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
GENERATION = {
    *(*SAME, *SAMPLING, *UNSUPPORTED, *UNSUPPORTED_SAMPLING, *IDS, *LENGTHS, "suppress_tokens")
}


def import_tokenizer(folder: Path, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    `settings` holds what `tokenizer_config.json` and `special_tokens_map.json` say, and as
    `added_tokens` what `added_tokens.json` does. Raises UserError naming the file that is missing
    or is another kind of tokenizer.
    """
    if settings.get(CLEAN_UP):
        raise UserError(f"{folder}: the tokenizer's field {CLEAN_UP!r} is true; not supported")
    fast = (folder / TOKENIZER_FILES[0]).exists()
    tokenizer = _read_fast(folder) if fast else _read_slow(folder, settings)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = [GPT2_SPECIAL, *(settings.get(field) for field in SPECIAL_FIELDS)]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(field, [])
        named += more.values() if isinstance(more, dict) else more
    texts = {token.get("content") if isinstance(token, dict) else token for token in named}
    known = [t for t in texts if isinstance(t, str) and tokenizer.token_to_id(t) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in sorted(known)])
    if tokenizer.get_vocab_size() > vocab_size:
        tokenizer = _without_unseen(tokenizer, vocab_size)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} entries, but config.json's "
            f"field 'decoder.vocab_size' is {vocab_size}; give the tokenizer of this model"
        )
    return tokenizer


def _read_fast(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_FILES[0]
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: no readable tokenizer ({error})") from error
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    if not isinstance(tokenizer.model, models.BPE) or not byte_level:
        kind, decoder = type(tokenizer.model).__name__, type(tokenizer.decoder).__name__
        raise UserError(
            f"{path}: model {kind} with decoder {decoder}; only GPT-2's byte-level BPE is imported"
        )
    return tokenizer


def _read_slow(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    fast, *slow = (folder / name for name in TOKENIZER_FILES)
    for path in slow:
        if not path.exists():
            raise UserError(f"{path}: missing, and so is {fast.name}; save the tokenizer there")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, slow)))
    except Exception as error:
        raise UserError(f"{slow[0]} and {slow[1].name}: not readable ({error})") from error
    prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    added = {token: {"id": i} for token, i in settings.get("added_tokens", {}).items()}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = {**token, "id": int(i)}
    for text, token in sorted(added.items(), key=lambda item: item[1]["id"]):
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(text, normalized=False)])
        if tokenizer.token_to_id(text) != token["id"]:
            raise UserError(
                f"{slow[0]}: the added token {text!r} should be {token['id']} and would be "
                f"{tokenizer.token_to_id(text)}; give a tokenizer.json instead"
            )
    return tokenizer


def _without_unseen(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Without what was added to the tokenizer but not to the model, such as a token for padding: it
    can never be generated."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(content))


def import_ids(generation: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`begin_id`, `end_id`, `pad_id` and `suppressed_ids` of a CaptionTokenizer, as generate finds
    them. Raises UserError naming the field."""
    begin = generation.get("decoder_start_token_id", generation.get("bos_token_id"))
    end = generation.get("eos_token_id")
    if isinstance(end, list) and len(end) == 1:
        end = end[0]
    for name, value in (("decoder_start_token_id", begin), ("eos_token_id", end)):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise UserError(
                f"field {name!r} is {value!r}; it must be one id below decoder.vocab_size "
                f"({vocab_size})"
            )
    pad = generation.get("pad_token_id", end)
    suppressed = generation.get("suppress_tokens", [])
    if not isinstance(suppressed, list) or any(type(i) is not int for i in suppressed):
        raise UserError(f"field 'suppress_tokens' is {suppressed!r}; give a list of ids")
    return {
        "begin_id": begin,
        "end_id": end,
        # A padding token that only the tokenizer has is of no use to the model.
        "pad_id": pad if type(pad) is int and 0 <= pad < vocab_size else end,
        # What generate suppresses: neither padding nor the begin token.
        "suppressed_ids": [i for i in suppressed if 0 <= i < vocab_size],
    }


def import_preprocessing(processor: Mapping[str, Any], image_size: int) -> PreprocessConfig:
    """Our preprocessing from a `preprocessor_config.json` whose nulls are left out, for an encoder
    of `image_size` pixels. Raises UserError naming the field that cannot be represented."""
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    if str(kind) not in PROCESSORS:
        raise UserError(
            f"field 'image_processor_type' is {kind!r}; only ViT's and DeiT's are known"
        )
    given = {**PROCESSORS[str(kind)], **processor}
    if not given.get("do_resize", True):
        raise UserError("field 'do_resize' is false; photos of any size have to be resized")
    if given.get("do_pad"):
        raise UserError("field 'do_pad' is true; it is not supported")
    if type(given["resample"]) is not int or given["resample"] not in RESAMPLING:
        raise UserError(
            f"field 'resample' is {given['resample']!r}; only 2 (bilinear) and 3 (bicubic) "
            "can be represented"
        )
    resized, fit = _size(given["size"], "size")
    cut = resized
    if given["do_center_crop"]:
        cut, square = _size(given["crop_size"], "crop_size")
        if square != "squash" or cut > resized:
            raise UserError(
                f"field 'crop_size' is {given['crop_size']!r}; only a square within 'size' "
                "can be represented"
            )
    elif fit == "crop":
        raise UserError(f"field 'size' is {given['size']!r}, but 'do_center_crop' is not true")
    if cut != image_size:
        raise UserError(
            f"field '{'crop_size' if given['do_center_crop'] else 'size'}' gives photos of {cut} "
            f"pixels, but config.json's field 'encoder.image_size' is {image_size}"
        )
    mean, std = [0.0] * 3, [1.0] * 3
    if given.get("do_normalize", True):
        mean, std = (_three(given, name) for name in ("image_mean", "image_std"))
    # Ours rescales by 1 / 255; any other factor is made good by the normalisation.
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or factor <= 0:
        raise UserError(f"field 'rescale_factor' is {factor!r}; give a number above 0")
    scale = 255 * factor
    return PreprocessConfig(
        image_size=image_size,
        mean=tuple(value / scale for value in mean),  # type: ignore[arg-type]
        std=tuple(value / scale for value in std),  # type: ignore[arg-type]
        resize=fit,  # type: ignore[arg-type]
        resize_to=resized if resized != image_size else None,
        interpolation=RESAMPLING[given["resample"]],  # type: ignore[arg-type]
    )


def _size(value: Any, name: str) -> tuple[int, str]:
    """A side in pixels, and how a photo is fitted to it: `squash`, or `crop` for a short side."""
    sides, fit = value, "squash"
    if isinstance(value, dict):
        if set(value) == {"shortest_edge"}:
            sides, fit = value["shortest_edge"], "crop"
        elif set(value) == {"height", "width"}:
            sides = [value["height"], value["width"]]
    if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
        sides = sides[0]
    if type(sides) is not int or sides < 1:
        raise UserError(
            f"field {name!r} is {value!r}; only a square or a shortest_edge can be represented"
        )
    return sides, fit


def _three(processor: Mapping[str, Any], name: str) -> list[float]:
    value = processor.get(name, [0.5] * 3)
    value = value if isinstance(value, list) else [value] * 3
    if len(value) != 3 or any(type(v) not in (int, float) for v in value):
        raise UserError(f"field {name!r} is {value!r}; give three numbers")
    return value


def legacy_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation config that transformers makes of an old `config.json` without a
    `generation_config.json` beside it: its own fields, then its decoder's."""
    merged: dict[str, Any] = {}
    for section in (config["decoder"], config):
        merged |= {n: v for n, v in section.items() if n in GENERATION and v is not None}
    return merged


def import_decoding(
    generation: Mapping[str, Any], positions: int, vocab_size: int
) -> dict[str, Any]:
    """Our decoding defaults from a generation config whose nulls are left out. Raises UserError
    naming the field that is not supported or out of its range.

    They are what generate does without further arguments: one beam, `early_stopping` false and 20
    tokens where the config does not say otherwise.
    """
    sampling = generation.get("do_sample", False)
    refused = {**UNSUPPORTED, **(UNSUPPORTED_SAMPLING if sampling else {})}
    for name, neutral in refused.items():
        value = generation.get(name)
        if value is not None and value != [] and value != neutral:
            raise UserError(f"field {name!r} is {value!r}; it is not supported")
    decoding: dict[str, Any] = {"num_beams": 1, "early_stopping": False}
    decoding |= {name: generation[name] for name in SAME if name in generation}
    if sampling:
        decoding |= {name: generation.get(name, usual) for name, usual in SAMPLING.items()}
        if type(decoding["top_k"]) is int:
            decoding["top_k"] = min(decoding["top_k"], vocab_size)
    longest = _length(generation, "max", 20)
    # Beyond its positions a GPT-2 cannot go, whatever its config allows.
    decoding["max_new_tokens"] = min(longest, positions - 1)
    decoding["min_new_tokens"] = _length(generation, "min", 0)
    DecodeOptions(**decoding)
    return decoding


def _length(generation: Mapping[str, Any], which: str, usual: int) -> int:
    """Of tokens that are generated; `max_length` and `min_length` count the begin token too."""
    for name, begin in ((f"{which}_new_tokens", 0), (f"{which}_length", 1)):
        if name in generation:
            if type(generation[name]) is not int:
                raise UserError(f"field {name!r} is {generation[name]!r}; give an integer")
            return max(0, generation[name] - begin)
    return usual
