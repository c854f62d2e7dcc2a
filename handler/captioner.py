"""Captions photos: preprocess, encode, search, detokenize.

Evaluation, the TorchServe handler and library users all use `Captioner`. Its encoder and decoder
are either the eager ones of a checkpoint or the TorchScript ones of an export.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from handler.beam_search import (
    OPTIONS,
    DecodeOptions,
    Hypothesis,
    InvalidParameter,
    most_prompt_tokens,
    search,
)
from handler.caption_tokenizer import CaptionTokenizer, Task
from handler.cuda_graphs import GraphedDecoder, GraphedEncoder
from handler.errors import UserError
from handler.files import FORMAT, read_object
from handler.image_preprocess import PreprocessConfig, preprocess
from handler.native_blocks import native_decoder, native_encoder, pack_layers
from handler.native_library import native_library
from handler.shared_weights import name_of_weights, packing

Photo = bytes | bytearray | memoryview | Image.Image
# Batch size for a list of photos; each prompt of a photo counts, for it has keys of its own.
BATCH = 16
# Maximum number of tokens whose attention is computed at a time: that of BLIP base has 330 KB each.
ATTENDED = 512
# Maximum number of prompts for one photo.
MAX_PROMPTS = 16
# Maximum bytes of the largest activation when a CPU encodes a batch. The allocator returns larger
# ones to the system each time, which costs an int8 ViT-B a quarter of its time.
ENCODED_BYTES = 10_000_000
# Decoding defaults that count a prompt's tokens, too, if `total_lengths` of a config names them:
# `generate`'s `max_length` and `min_length`.
TOTAL_LENGTHS = ("max_new_tokens", "min_new_tokens")
# The files of an export.
EXPORT_FILES = ("encoder.pt", "decoder.pt", "config.json", "tokenizer.json")
# Methods and attributes that a scripted decoder needs for the search.
DECODER_METHODS = (
    *("begin", "new_cache", "prefill", "step", "attention"),
    *("vocab_size", "max_positions"),
)


@dataclass(frozen=True)
class Caption:
    """One caption of one photo.

    `text` includes the prompt, as the tokenizer writes it, unless the model has a prompt encoder;
    all other fields exclude it. `tokens` are the generated pieces of text without begin and end
    token; `token_log_probs` are the model's natural log-probabilities, one per token and one more
    if the end token was generated; `log_prob` is their sum; `score` is what the search ranks by
    (with length penalty and processors); `ids` are the token ids of `tokens`, and `prompt_ids`
    those of the prompt.
    """

    text: str
    tokens: list[str]
    token_log_probs: list[float]
    log_prob: float
    score: float
    ids: list[int]
    prompt_ids: list[int] = field(default_factory=list)


class Captioner:
    """An encoder, a decoder and a tokenizer that caption photos: `caption(photos, num_beams=5)`."""

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        tokenizer: CaptionTokenizer,
        config: dict[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        """`encoder(images (B, 3, S, S)) -> memory (B, P, D)`; `decoder` has the `begin`,
        `new_cache`, `prefill`, `step` and `attention` of `training.model.Decoder`; `config` is the
        parsed `config.json` of the checkpoint or export that both come from."""
        self.encoder, self.decoder, self.tokenizer = encoder, decoder, tokenizer
        self.config = config
        self.preprocessing = PreprocessConfig.from_dict(config["preprocessing"])
        self.decoding: dict[str, Any] = dict(config.get("decoding", {}))
        # The decoder layers whose attention makes the maps; None for all.
        self.map_layers: list[int] | None = config.get("word_maps", {}).get("layers")
        # A frozen TorchScript module has no parameters that would tell its device.
        self.device = torch.device(device)

    @classmethod
    def load(
        cls, export_dir: str | Path, device: str = "cpu", threads: int | None = None
    ) -> "Captioner":
        """Loads an export (`encoder.pt`, `decoder.pt`, `config.json`, `tokenizer.json`).

        `threads` sets the number of torch threads of the whole process; None does not change it. On
        a GPU, only one thread may use the captioner at a time (see `handler.cuda_graphs`). Raises
        UserError naming the file that is missing or damaged, or the device.
        """
        check_device(device)
        directory = Path(export_dir)
        name = name_of_weights(directory)
        config = read_config(directory)
        check_config(directory, config)
        tokenizer = load_tokenizer(directory, config)
        if threads is not None:
            torch.set_num_threads(threads)
        # Both are read before either is packed: until something large is freed, glibc gives each
        # weight pages of its own, which go back to the system once its packed copy is made. Holes
        # in the heap, which no packed copy fits, would add a tenth to the peak.
        # Exports with a part in fp16 are read on the CPU and moved: FBGEMM's packed weights, read
        # straight onto a GPU, end the process. The others are read there: moved tensor by tensor,
        # an embedding would part from the head that shares it.
        packed = "fp16" in config.get("parts", {}).values()
        with ThreadPoolExecutor(1) as pool:
            if torch.device(device).type == "cpu":
                pool.submit(native_library)  # compiled, where needed, while the files are read
            scripts = [
                read_script(directory / name, "cpu" if packed else device).to(device)
                for name in ("encoder.pt", "decoder.pt")
            ]
        _check_scripts(directory, config, *scripts)
        shapes = config["model"]
        if torch.device(device).type != "cpu" or native_library() is None:
            name = None
        with packing(directory, name) as name:
            encoder = prepare_encoder(scripts[0], shapes["encoder"], device, name)
            decoder = prepare_decoder(scripts[1], shapes["decoder"], device, name)
        return cls(encoder, decoder, tokenizer, config, device)

    def options(self, **given: Any) -> DecodeOptions:
        """Decoding options: the checkpoint's defaults, overridden by `given`. Raises
        InvalidParameter for an unknown name or a value out of this model's range."""
        sizes = self.decoder.vocab_size, self.decoder.max_positions
        counted = self.config.get("total_lengths", [])
        return choose_options(given, self.decoding, self.tokenizer, *sizes, counted)

    @overload
    def caption(
        self, photos: Sequence[Photo], prompts: None = None, **options: Any
    ) -> list[list[Caption]]: ...
    @overload
    def caption(
        self, photos: Sequence[Photo], prompts: Sequence[str], **options: Any
    ) -> list[list[list[Caption]]]: ...
    def caption(
        self, photos: Sequence[Photo], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[list[Caption]] | list[list[list[Caption]]]:
        """Captions each photo: returns a list (photos) of lists (best first) of `Caption`. With
        `prompts`, returns a list (photos) of lists (prompts) of such lists; each photo is encoded
        once.

        Raises InvalidImage for a photo that cannot be decoded, InvalidParameter for an invalid
        option, and TypeError if `photos` is not a sequence of photos.
        """
        check_photos(photos)
        if prompts is None:
            return self.caption_each(photos, [self.options(**options)] * len(photos))
        each = [self.options(**given) for given in prompted(options, prompts)]
        captions = self._in_batches(photos, each * len(photos), len(each))
        starts = range(0, len(captions), len(each))
        return [captions[start : start + len(each)] for start in starts]

    def caption_each(
        self, photos: Sequence[Photo], options: Sequence[DecodeOptions]
    ) -> list[list[Caption]]:
        """Like `caption`, with separate options for each photo. Raises InvalidParameter unless
        `options` contains one DecodeOptions per photo."""
        check_photos(photos)
        check_options(options, len(photos))
        return self._in_batches(photos, options, 1)

    @torch.inference_mode()
    def _in_batches(
        self, photos: Sequence[Photo], options: Sequence[DecodeOptions], each: int
    ) -> list[list[Caption]]:
        """One list of captions for each of `options`, of which each photo has `each` in turn."""
        captions: list[list[Caption]] = []
        size = max(1, BATCH // each)
        for start in range(0, len(photos), size):
            part = photos[start : start + size]
            memory_BPD = self.encode(torch.stack([self.preprocess(photo) for photo in part]))
            if each > 1:
                memory_BPD = memory_BPD.repeat_interleave(each, dim=0)
            captions += self.caption_memory(
                memory_BPD, options[start * each : (start + len(part)) * each]
            )
        return captions

    @property
    def grid(self) -> int:
        """The side of a photo, and of its word maps, in patches."""
        shape = self.config["model"]["encoder"]
        return int(shape["image_size"] // shape["patch_size"])

    def preprocess(self, photo: Photo) -> Tensor:
        """A photo as input of the encoder: float32 (3, S, S), normalized."""
        return preprocess(photo, self.preprocessing)

    @torch.inference_mode()
    def caption_tensors(
        self,
        images_B3SS: Tensor,
        options: Sequence[DecodeOptions],
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[Caption]]:
        """Captions preprocessed photos in one batch. `on_token(photo, token id)` is called for each
        token when it is final: only in greedy search and sampling, never in beam search."""
        return self.caption_memory(self.encode(images_B3SS), options, on_token)

    @torch.inference_mode()
    def encode(self, images_B3SS: Tensor) -> Tensor:
        """Preprocessed photos -> memory (B, P, D)."""
        images_B3SS = images_B3SS.to(self.device)
        shape = self.config["model"]["encoder"]
        photos = 1  # for a DaViT, whose first stage has a token for each 4 x 4 pixels
        if "kind" not in shape:
            photos = max(1, ENCODED_BYTES // (4 * self.grid**2 * shape["mlp_width"]))
        if self.device.type != "cpu" or len(images_B3SS) <= photos:
            return self.encoder(images_B3SS)
        return torch.cat([self.encoder(part) for part in images_B3SS.split(photos)])

    @torch.inference_mode()
    def caption_memory(
        self,
        memory_BPD: Tensor,
        options: Sequence[DecodeOptions],
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[Caption]]:
        """Captions photos that are already encoded."""
        prompts = [encode_prompt(self.tokenizer, photo.prompt) for photo in options]
        written = [written_prompt(self.tokenizer, prompt) for prompt in prompts]
        hypotheses = search(
            self.decoder,
            memory_BPD,
            options,
            self.tokenizer.special,
            on_token,
            written,
            prompts if self.tokenizer.tasks else None,
        )
        return [
            [self._caption(hypothesis, *ids) for hypothesis in photo]
            for photo, *ids in zip(hypotheses, prompts, written, strict=True)
        ]

    def _caption(
        self, hypothesis: Hypothesis, prompt_ids: list[int], written: list[int]
    ) -> Caption:
        return Caption(
            text=self.tokenizer.decode([*written, *hypothesis.ids]),
            tokens=self.tokenizer.pieces(hypothesis.ids, written),
            token_log_probs=hypothesis.token_log_probs,
            log_prob=sum(hypothesis.token_log_probs),
            score=hypothesis.score,
            ids=hypothesis.ids,
            prompt_ids=prompt_ids,
        )

    @torch.inference_mode()
    def attention(
        self, image_3SS: Tensor, ids: Sequence[int], prompt_ids: Sequence[int] | None = None
    ) -> Tensor:
        """The attention maps of the T generated tokens `ids` of a caption: (T, grid, grid), each
        map summing to 1. The tokens of the prompt have no maps; without `prompt_ids` there is none,
        or the default one of a model with tasks.

        One parallel pass over the finished caption: the mean over heads of the cross-attention of
        the layers in `word_maps.layers` of `config.json`, or of all layers, over the image patches
        alone (class and other prefix tokens left out). Training chooses the layers that point best
        where the truth is known (see training.scores.grounding).
        """
        memory_1PD = self.encoder(image_3SS.unsqueeze(0).to(self.device))
        prompts = None if prompt_ids is None else [prompt_ids]
        return self.attention_memory(memory_1PD, [ids], prompts)[0]

    @torch.inference_mode()
    def attention_memory(
        self,
        memory_BPD: Tensor,
        ids: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor]:
        """Like `attention`, for one caption of each of B photos that are already encoded. `prompts`
        contains the ids of their prompts."""
        encoder, grid = self.config["model"]["encoder"], self.grid
        if not any(ids):
            return [torch.zeros(0, grid, grid) for _ in ids]
        if prompts is None:
            prompts = [encode_prompt(self.tokenizer, None)] * len(ids)
        written = [written_prompt(self.tokenizer, prompt) for prompt in prompts]
        # What each text begins with. The output at its last token is the first generated token.
        starts = [
            [self.tokenizer.begin_id, *prompt] if prompt else self.tokenizer.opening
            for prompt in written
        ]
        texts = [[*start, *caption[:-1]] for start, caption in zip(starts, ids, strict=True)]
        longest = max(map(len, texts))
        # Shorter captions are padded at the end, which their own tokens do not attend to.
        padded = [text + [self.tokenizer.end_id] * (longest - len(text)) for text in texts]
        tokens_BQ = torch.tensor(padded, device=self.device)
        positions_BQ = torch.arange(longest, device=self.device).expand(len(ids), -1)
        mask_QQ = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        mask_BQQ = mask_QQ.expand(len(ids), -1, -1)
        inputs = (tokens_BQ, positions_BQ, mask_BQQ, memory_BPD)
        size = max(1, ATTENDED // longest)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        maps_BQP = torch.cat([self._attention([x[p] for x in inputs], prompts[p]) for p in parts])
        maps_BQP = maps_BQP[:, :, encoder["prefix_tokens"] :]
        maps_BQP = maps_BQP / maps_BQP.sum(-1, keepdim=True)
        maps_BQgg = maps_BQP.unflatten(2, (grid, grid)).cpu()
        return [
            maps_Qgg[len(start) - 1 : len(start) - 1 + len(caption)]
            for maps_Qgg, start, caption in zip(maps_BQgg, starts, ids, strict=True)
        ]

    def _attention(self, inputs: Sequence[Tensor], prompts: Sequence[Sequence[int]]) -> Tensor:
        """The mean of the decoder's attention over `map_layers` and heads, (B, Q, P)."""
        if not self.tokenizer.tasks:
            return self._mean(self.decoder.attention(*inputs))
        # Prompts of one length at a time, as the search reads them.
        parts = []
        rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for _, group in itertools.groupby(rows, key=lambda row: len(prompts[row])):
            part = list(group)
            prompt_BT = torch.tensor([list(prompts[row]) for row in part], device=self.device)
            weights_LBHQP = self.decoder.attention(*(x[part] for x in inputs), prompt_BT)
            parts.append(self._mean(weights_LBHQP))
        order = torch.tensor(rows, device=self.device).argsort()
        return torch.cat(parts)[order]

    def _mean(self, weights_LBHQP: Tensor) -> Tensor:
        if self.map_layers is not None:
            weights_LBHQP = weights_LBHQP[self.map_layers]
        return weights_LBHQP.mean(dim=(0, 2))


def choose_options(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    tokenizer: CaptionTokenizer,
    vocab_size: int,
    max_positions: int,
    total_lengths: Sequence[str] = (),
) -> DecodeOptions:
    """A model's `defaults`, overridden by the options `given`. A default length is shortened if the
    model has too few positions after the prompt, and by the prompt if `total_lengths` names it.
    Raises InvalidParameter for an unknown name or a value out of the model's range."""
    for name in given:
        if name not in OPTIONS:
            raise InvalidParameter(
                name, f"{name} is unknown; the options are {', '.join(sorted(OPTIONS))}"
            )
    longest = max_positions - 1
    for name, most, why in (
        ("min_new_tokens", longest, "the model's limit"),
        ("max_new_tokens", longest, "the model's limit"),
        ("top_k", vocab_size, "the vocabulary"),
    ):
        if given.get(name) is not None:
            OPTIONS[name].check(name, given[name], most, why)
    options = DecodeOptions(**{**yielding(defaults, given), **given})
    prompt = written_prompt(tokenizer, encode_prompt(tokenizer, options.prompt))
    if prompt and total_lengths:
        behind = {
            name: max(int(name == "max_new_tokens"), defaults[name] - len(prompt))
            for name in total_lengths
            if defaults.get(name)
        }
        options = DecodeOptions(**{**yielding({**defaults, **behind}, given), **given})
    if prompt and len(prompt) <= most_prompt_tokens(max_positions):
        longest = max_positions - 1 - len(prompt)
        lengths: dict[str, Any] = {
            name: min(getattr(options, name) or longest, longest)
            for name in ("max_new_tokens", "min_new_tokens")
            if name not in given and getattr(options, name) != 0
        }
        options = replace(options, **lengths)
    options.limits(vocab_size, max_positions, len(prompt))
    return options


def yielding(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The `defaults`, changed where they contradict the options `given`, which win: that is no
    error of the caller."""
    changed = {name: value for name, value in defaults.items() if name not in given}
    beams = given.get("num_beams")
    if given.get("do_sample") is True:
        changed.pop("num_beams", None)  # sampling uses one beam
    elif isinstance(beams, int) and beams > 1:
        changed.pop("do_sample", None)
    samples = {**changed, **given}.get("do_sample") is True
    for less, more in (("min_new_tokens", "max_new_tokens"), ("num_return_sequences", "num_beams")):
        if more == "num_beams" and samples:
            continue
        for name, other, fit in ((less, more, min), (more, less, max)):
            own, limit = changed.get(name), given.get(other)
            if isinstance(own, int) and isinstance(limit, int):
                changed[name] = min(fit(own, limit), OPTIONS[name].high)
    if given.get("do_sample") is False and "num_return_sequences" in changed:
        beams = DecodeOptions(num_beams={**changed, **given}.get("num_beams")).beams
        changed["num_return_sequences"] = min(changed["num_return_sequences"], beams)
    return changed


def prompted(given: Mapping[str, Any], prompts: object) -> list[dict[str, Any]]:
    """The options `given`, once with each of the prompts. Raises InvalidParameter unless `prompts`
    is a list of one to MAX_PROMPTS strings, and if `given` contains `prompt`, too."""
    if "prompt" in given:
        raise InvalidParameter("prompts", "prompts and prompt cannot both be set; leave one out")
    listed = prompts if isinstance(prompts, list | tuple) else []
    if not 1 <= len(listed) <= MAX_PROMPTS or not all(isinstance(one, str) for one in listed):
        raise InvalidParameter(
            "prompts", f"prompts must be a list of 1 to {MAX_PROMPTS} strings, one for each answer"
        )
    return [{**given, "prompt": prompt} for prompt in listed]


def encode_prompt(tokenizer: CaptionTokenizer, prompt: str | None) -> list[int]:
    """The token ids of a prompt; for a model with tasks, those of the task, by default the first.
    Raises InvalidParameter naming a word that is not in the vocabulary, or an unknown task."""
    if tokenizer.tasks:
        return _encode_task(tokenizer.tasks, prompt)
    if prompt is None:
        return []
    if unknown := tokenizer.unknown_words(prompt):
        word = "".join(c if c.isprintable() else "?" for c in unknown[0][:50])
        raise InvalidParameter(
            "prompt", f"prompt: the word {word!r} is not in the model's vocabulary; use another one"
        )
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InvalidParameter("prompt", "prompt has no word in it; give one or leave it out")
    return ids


def _encode_task(tasks: Mapping[str, Task], prompt: str | None) -> list[int]:
    by_words = {task["words"]: task for task in tasks.values()}
    if prompt is None:
        return next(iter(tasks.values()))["ids"]
    task = tasks.get(prompt.strip()) or by_words.get(prompt.strip())
    if task is None:
        shown = "".join(c if c.isprintable() else "?" for c in prompt[:50])
        raise InvalidParameter(
            "prompt",
            f"prompt {shown!r} is not a captioning task of this model; give "
            f"{' or '.join(tasks)}, or its words",
        )
    return task["ids"]


def written_prompt(tokenizer: CaptionTokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The ids of a prompt that its caption begins with: none if the model has a prompt encoder."""
    return [] if tokenizer.tasks else list(prompt_ids)


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the `config.json` of a checkpoint or export. Raises UserError naming the file and the
    field that is missing."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"{directory}: no config.json there; give the folder of a checkpoint or an export"
        )
    config = read_object(path)
    for section in ("model", "preprocessing", "tokenizer"):
        if not isinstance(config.get(section), dict):
            raise UserError(f"{path}: field {section!r} is missing; write the folder again")
    # Checkpoints of version 1.0 have no format number and can still be read; its exports cannot.
    number = config.get("format", 0 if "precision" in config else FORMAT)
    if number != FORMAT:
        again = "export the checkpoint" if "precision" in config else "train or import"
        raise UserError(f"{path}: format {number!r}, this version reads {FORMAT}; {again} again")
    return config


def check_config(directory: Path, config: dict[str, Any]) -> None:
    """Raises UserError naming the file and the field if a `config.json` is invalid or its sections
    contradict each other."""
    path = directory / "config.json"
    try:
        encoder, decoder = (dict(config["model"][part]) for part in ("encoder", "decoder"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: field 'model' must hold 'encoder' and 'decoder'") from None
    sizes = {
        "encoder": ("image_size", "patch_size", *([] if "kind" in encoder else ["mlp_width"])),
        "decoder": ("vocab_size", "max_positions"),
    }
    for part, section in (("encoder", encoder), ("decoder", decoder)):
        for name in sizes[part]:
            if type(section.get(name)) is not int or section[name] < 1:
                value = _short(section.get(name))
                raise UserError(f"{path}: field 'model.{part}.{name}' must be above 0, not {value}")
    prefix = encoder.get("prefix_tokens")
    if type(prefix) is not int or prefix < 0:
        raise UserError(f"{path}: field 'model.encoder.prefix_tokens' must be 0 or more")
    try:
        preprocessing = PreprocessConfig.from_dict(config["preprocessing"])
        DecodeOptions(**config.get("decoding", {}))
    except (UserError, InvalidParameter) as error:
        raise UserError(f"{path}: {error}") from error
    except TypeError as error:
        raise UserError(f"{path}: field 'preprocessing' or 'decoding': {error}") from error
    _check_optional(path, config)
    layers = decoder.get("layers")
    try:
        chosen = config.get("word_maps", {}).get("layers")
        inside = chosen is None or (
            chosen and all(type(n) is int and 0 <= n < layers for n in chosen)
        )
    except (AttributeError, TypeError):
        inside = False
    if not inside:
        raise UserError(
            f"{path}: field 'word_maps.layers' must be a list of numbers from 0 to below "
            "'model.decoder.layers'"
        )
    if preprocessing.image_size != encoder["image_size"]:
        raise UserError(
            f"{path}: field 'preprocessing.image_size' is {preprocessing.image_size}, "
            f"'model.encoder.image_size' is {_short(encoder['image_size'])}; they must be equal"
        )


def _check_optional(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError for a section that may be left out and is none."""
    trained = config.get("training", {})
    inner = trained.get("config", {}) if isinstance(trained, dict) else {}
    parts = config.get("parts", {})
    for name, section in (("training", trained), ("training.config", inner), ("parts", parts)):
        if not isinstance(section, dict):
            raise UserError(f"{path}: field {name!r} must hold fields; leave it out")
    if not isinstance(inner.get("data"), str | None):
        raise UserError(f"{path}: field 'training.config.data' must be a string; leave it out")
    lengths = config.get("total_lengths", [])
    if not isinstance(lengths, list) or any(name not in TOTAL_LENGTHS for name in lengths):
        names = " or ".join(TOTAL_LENGTHS)
        raise UserError(f"{path}: field 'total_lengths' must be a list of {names}")


def load_tokenizer(directory: Path, config: dict[str, Any]) -> CaptionTokenizer:
    """Loads the tokenizer of a checkpoint or export with this config. Raises UserError naming the
    file and the field if an id is not in the model's vocabulary, since looking it up in the
    embedding would fail."""
    path = directory / "config.json"
    vocab_size = config["model"]["decoder"]["vocab_size"]
    fields_of = dict(config["tokenizer"])
    ids = {name: fields_of.get(name) for name in ("begin_id", "end_id", "pad_id")}
    suppressed = fields_of.get("suppressed_ids")
    if suppressed is not None and not isinstance(suppressed, list):
        raise UserError(f"{path}: field 'tokenizer.suppressed_ids' must be a list")
    ids |= {f"suppressed_ids[{n}]": token for n, token in enumerate(suppressed or [])}
    if fields_of.get("first_id") is not None:
        ids["first_id"] = fields_of["first_id"]
    ids |= _task_ids(path, fields_of.get("tasks") or {})
    for name, token in ids.items():
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"{path}: field 'tokenizer.{name}' must be an id below 'model.decoder.vocab_size' "
                f"({_short(vocab_size)}), not {_short(token)}"
            )
    try:
        tokenizer = CaptionTokenizer.load(directory / "tokenizer.json", **fields_of)
    except TypeError as error:
        raise UserError(f"{path}: field 'tokenizer': {error}") from error
    largest = max(tokenizer.vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.json'}: an entry has the id {largest}, but config.json's "
            f"'model.decoder.vocab_size' is {vocab_size}; give the tokenizer of this model"
        )
    try:
        encode_prompt(tokenizer, config.get("decoding", {}).get("prompt"))
    except InvalidParameter as error:
        raise UserError(f"{path}: field 'decoding': {error}") from error
    return tokenizer


def _task_ids(path: Path, tasks: Any) -> dict[str, Any]:
    """All ids of the tasks, by the names of their fields."""
    ids: dict[str, Any] = {}
    try:
        for name, task in tasks.items():
            if set(task) != {"words", "ids"} or not isinstance(task["words"], str):
                raise TypeError(name)
            ids |= {f"tasks.{name}.ids[{n}]": token for n, token in enumerate(list(task["ids"]))}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: field 'tokenizer.tasks' must hold words and ids") from error
    return ids


def _short(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"


def _check_scripts(directory: Path, config: dict[str, Any], encoder: Any, decoder: Any) -> None:
    """Raises UserError if a `config.json` does not match the scripts."""
    path = directory / "config.json"
    shape = config["model"]["encoder"]
    if missing := [name for name in DECODER_METHODS if not hasattr(decoder, name)]:
        raise UserError(
            f"{directory / 'decoder.pt'}: no decoder, {missing[0]!r} is missing; export the "
            "checkpoint again"
        )
    for name in ("vocab_size", "max_positions"):
        size, scripted = config["model"]["decoder"][name], getattr(decoder, name)
        if size != scripted:
            raise UserError(
                f"{path}: field 'model.decoder.{name}' is {_short(size)}, but decoder.pt has "
                f"{scripted}"
            )
    positions = dict(encoder.named_parameters()).get("positions")
    if positions is not None:
        grid = shape["image_size"] // shape["patch_size"]
        prefix = shape["prefix_tokens"] if shape.get("prefix_positions", True) else 0
        if positions.size(1) != prefix + grid**2:
            raise UserError(
                f"{path}: fields 'model.encoder' give {prefix} + {_short(grid)}**2 positions, "
                f"but encoder.pt has {positions.size(1)}"
            )


def check_device(device: str) -> None:
    """Raises UserError for a name that is no device, and for a GPU that this machine lacks."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r}: no such device; use cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UserError(f"device {device}: this machine has {count} GPUs; use cpu")


def read_script(path: Path, device: str) -> torch.jit.ScriptModule:
    """Loads a TorchScript file to `device`. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: missing; export the checkpoint again")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: damaged ({first_line}); export the checkpoint again") from error


def prepare_encoder(
    script: torch.jit.ScriptModule, shape: dict[str, Any], device: str, name: str | None = None
) -> Any:
    """The fastest form of an encoder that was just read; `shape` is its section of the config.
    Under `name` processes share its weights (see `handler.shared_weights`)."""
    in_c = partial(native_encoder, name=name and f"{name}-encoder")
    return _fastest(script, shape, device, in_c, GraphedEncoder)


def prepare_decoder(
    script: torch.jit.ScriptModule, shape: dict[str, Any], device: str, name: str | None = None
) -> Any:
    """Likewise a decoder."""
    in_c = partial(native_decoder, name=name and f"{name}-decoder")
    return _fastest(script, shape, device, in_c, GraphedDecoder)


def _fastest(
    script: torch.jit.ScriptModule,
    shape: dict[str, Any],
    device: str,
    in_c: Callable[[torch.jit.ScriptModule, dict[str, Any]], Any],
    graphed: Callable[[torch.jit.ScriptModule], Any],
) -> Any:
    is_cpu = torch.device(device).type == "cpu"
    if is_cpu and (native := in_c(script, shape)):
        return native
    prepared = prepare_script(script, device)
    return prepared if is_cpu else graphed(prepared)


def prepare_script(script: torch.jit.ScriptModule, device: str) -> torch.jit.ScriptModule:
    """Prepares a script for inference: packs the linear layers for this processor (see
    `export.layers`) and freezes the script."""
    if torch.device(device).type == "cpu":
        pack_layers(script)
    return torch.jit.freeze(script, [name for name in DECODER_METHODS if hasattr(script, name)])


def check_photos(photos: object) -> None:
    """Raises TypeError for a single photo, a path or an array instead of a sequence of photos."""
    # These types are sequences, too.
    single = isinstance(photos, (str, bytes, bytearray, memoryview))
    if single or not isinstance(photos, Sequence):
        raise TypeError(
            f"photos is of type {type(photos).__name__}; give a list of photos, each the bytes of a"
            " file or a PIL image, as in caption([Path('photo.jpg').read_bytes()])"
        )


def check_options(options: object, photos: int) -> None:
    """Raises InvalidParameter unless `options` is a list of one DecodeOptions per photo."""
    if not isinstance(options, Sequence):
        problem = f"of type {type(options).__name__}"
    elif wrong := [one for one in options if not isinstance(one, DecodeOptions)]:
        problem = f"a list with a {type(wrong[0]).__name__}"
    elif len(options) != photos:
        problem = f"a list of {len(options)}"
    else:
        return
    raise InvalidParameter(
        "options",
        f"options is {problem}; give a list of DecodeOptions, one for each of {photos} photos, as "
        "Captioner.options makes them",
    )


def caption_as_dict(caption: Caption) -> dict[str, Any]:
    """A caption as the API returns it (where `text` is called `caption`)."""
    # asdict() would be slower: it copies each number.
    return {
        "caption": caption.text,
        "tokens": caption.tokens,
        "token_log_probs": caption.token_log_probs,
        "log_prob": caption.log_prob,
        "score": caption.score,
    }
