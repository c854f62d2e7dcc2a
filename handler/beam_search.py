"""Greedy search, sampling and beam search, batched, over a decoder's step function.

Semantics are those of Hugging Face's `generate` (transformers 5.23: `_beam_search` and `_sample` in
generation/utils.py, logits_process.py), so that the same model gives the same sequences and scores:

- Beam search ranks by the sum of processed log-probabilities over n ** length_penalty, n counting
  the generated tokens, end token included. Of the best 2K continuations of a photo's K beams, the
  first K that do not end stay open; one that ends is kept only if it is among the first K. At
  `max_new_tokens` every continuation counts as ended, and its score is divided by its length.
- Processors act on log-softmax in beam search and on raw logits in greedy search and sampling, in
  the order repetition penalty, n-grams, minimum length, then temperature, top-k, top-p. The first
  two include the begin token and the prompt.
- A prompt precedes the generated tokens, as in `generate(input_ids=prompt)`. Lengths, scores and
  limits only count generated tokens.
- `early_stopping` true stops a photo at K ended hypotheses; false also waits until the score of the
  best open beam, with its current length, is not above that of the worst of them.

Deviations:

- With `never`, a photo stops as soon as no open beam can still enter the best
  `num_return_sequences`; Hugging Face compares with the worst of all K. The bound is exact (sums of
  log-probabilities only decrease, and the most favourable length is known), so that the result is
  the same after fewer steps.
- One beam and samples have a score too: the sum of the log-softmax of the processed logits
  (temperature, top-k and top-p included) over n ** length_penalty. Samples are sorted by it.
- Forbidden candidates have the score -inf, not -1e9. Hugging Face returns empty or duplicate
  sequences if there are fewer continuations than beams (a vocabulary below 2K), or if a score is
  below -1e9 (a strongly negative length penalty with a long caption). Here the list is shorter.
- If processors forbid every token, a caption ends as if it had reached its maximum length.
- `SpecialIds.suppressed` are never generated (padding, begin, <unk>).
- A forced first token (`forced_bos_token_id`) is not a step of the search: it is appended to the
  begin token, and counts as generated.
- Sampling inverts the cumulative distribution with uniform numbers. Each request draws all of them
  at the start from its own generator, so that the captions of a seed do not depend on the batch.

Ties: greedy search takes the lowest id. Among candidates of equal score, `torch.topk` decides:
equal inputs give equal results, but the order is not specified.

Nothing is copied per beam. Cross-attention keys belong to the photo. The self-attention cache stays
in place; a mask selects the slots of a beam's ancestors. Each step records its tokens and their
parent beams, and captions are read backwards from these records at the end.

Dimension key: B photos that are still open, K beams or samples (the maximum of all photos; a photo
with fewer has dead ones), Q queries (1 in the first step, since all beams begin alike, then K), V
vocabulary, S slots, T time. B1 and BT are columns and tables of per-photo settings.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.errors import UserError

MAX_BEAMS = 16
UNLIMITED = 2**31  # an upper limit that only a model sets
NUMBER = TypeVar("NUMBER", int, float)
Kind = Literal["integer", "number", "boolean", "string"]
NOT_A_NUMBER = "the model's output is not a number: its weights or the photo's memory are damaged"


class InvalidParameter(UserError):
    """A decoding option is out of its range; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Option:
    """The declaration of a decoding option. Checks, the parsing of requests, the arguments of
    commands, the model card and the table in docs/serving.md are derived from it.

    A number must be from `low` to `high`; with `above` it must be greater than `low`, and with
    `off` the value `low` turns the option off. `limit` names another upper limit: an option, or the
    model's `positions` (less one) or `vocabulary`. A boolean may have a third value. A string has
    at most `high` characters, and at most half as many tokens as the model has positions. `unset`
    describes the default None.
    """

    help: str
    kind: Kind
    low: int = 0
    high: int = 0
    above: bool = False
    off: bool = False
    limit: str = ""
    values: tuple[str, ...] = ("true", "false")
    unset: str = ""

    def check(self, name: str, value: object, limit: int | None = None, why: str = "") -> None:
        """Raises InvalidParameter if a value has another type or is out of range. `limit` replaces
        `high`, and `why` gives its reason for the message."""
        if self.kind == "boolean":
            word = isinstance(value, str) and value in self.values[2:]
            if not isinstance(value, bool) and not word:
                raise InvalidParameter(name, f"{name} must be {self.choices}")
            return
        if self.kind == "string":
            # JSON can contain a lone surrogate, which is not a character.
            text = value if isinstance(value, str) else ""
            if not text.strip() or len(text) > self.high or re.search("[\ud800-\udfff]", text):
                raise InvalidParameter(
                    name, f"{name} must be a string of at most {self.high} characters, not empty"
                )
            return
        kinds = int if self.kind == "integer" else int | float
        high = self.high if limit is None else limit
        # NaN fails both comparisons; integers of any size can be compared.
        valid = isinstance(value, kinds) and not isinstance(value, bool)
        if not valid or not self.low <= value <= high or (self.above and value == self.low):
            raise InvalidParameter(name, f"{name} must be {self.described(high, why)}")

    def described(self, high: float | None = None, why: str = "") -> str:
        """A number in words: "an integer from 1 to 16". `high` and `why` as in `check`."""
        high = self.high if high is None else high
        kind = f"{'an' if self.kind == 'integer' else 'a'} {self.kind}"
        if high == UNLIMITED:
            return f"{kind}, {self.low} or more"
        bounds = f"{'above' if self.above else 'from'} {self.low} to {high}"
        return f"{kind} {bounds}{f', {why}' if why else ''}"

    @property
    def choices(self) -> str:
        """The values of a boolean, as "a, b or c"."""
        return f"{', '.join(self.values[:-1])} or {self.values[-1]}"

    def range(self, sizes: Mapping[str, object]) -> str:
        """The range in words. `sizes` contains the model's `positions`, `vocabulary` and `half` of
        the positions, as numbers or in words."""
        if self.kind == "boolean":
            return ", ".join(self.values)
        if self.kind == "string":
            return f"a string of at most {sizes['half']} tokens"
        low = f"{'above ' * self.above}{self.low}{' (off)' * self.off}{',' * self.above}"
        high = sizes.get(self.limit, self.limit or self.high)
        sampling = f"; {self.low} to {self.high} when sampling" if self.limit == "num_beams" else ""
        return f"{low} to {high}{sampling}"


def _option(default: Any, kind: Kind, help: str, **range: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, kind, **range)})


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode one photo, named after Hugging Face's `generate`. Raises InvalidParameter,
    which names the field and its range."""

    prompt: str | None = _option(
        None, "string", "the words that the caption begins with", high=2**14, unset="none"
    )
    num_beams: int | None = _option(
        None,
        "integer",
        "number of beams; 1 is greedy search",
        low=1,
        high=MAX_BEAMS,
        unset="5, or 1 when sampling",
    )
    num_return_sequences: int = _option(
        1, "integer", "number of captions to return", low=1, high=MAX_BEAMS, limit="num_beams"
    )
    max_new_tokens: int | None = _option(
        None,
        "integer",
        "maximum number of generated tokens, including the end token",
        low=1,
        high=UNLIMITED,
        limit="positions",
        unset="the model's positions less one",
    )
    min_new_tokens: int = _option(
        0,
        "integer",
        "minimum number of tokens before the end token",
        high=UNLIMITED,
        limit="max_new_tokens",
    )
    length_penalty: float = _option(
        1.0,
        "number",
        "a score is divided by the length to this power; above 0 favours long captions",
        low=-5,
        high=5,
    )
    early_stopping: bool | Literal["never"] = _option(
        "never",
        "boolean",
        "beam search stops at num_beams finished captions (true), or once a better one is unlikely "
        "(false) or impossible (never)",
        values=("false", "true", "never"),
    )
    no_repeat_ngram_size: int = _option(
        0, "integer", "no sequence of this many tokens occurs twice; 0 turns this off", high=10
    )
    repetition_penalty: float = _option(
        1.0,
        "number",
        "above 1 makes tokens that already occurred less likely",
        high=10,
        above=True,
    )
    do_sample: bool = _option(False, "boolean", "sample instead of searching")
    temperature: float = _option(
        1.0, "number", "divides the logits before sampling", high=10, above=True
    )
    top_k: int = _option(
        0,
        "integer",
        "sample only from this many most likely tokens",
        high=UNLIMITED,
        off=True,
        limit="vocabulary",
    )
    top_p: float = _option(
        1.0,
        "number",
        "sample only from the most likely tokens whose probabilities sum to this",
        high=1,
        above=True,
    )
    seed: int | None = _option(
        None,
        "integer",
        "seed of sampling; the same seed gives the same captions",
        high=2**63 - 1,
        unset="a different one each time",
    )

    def __post_init__(self) -> None:
        # The limits of others depend on do_sample.
        for name in ("do_sample", *OPTIONS):
            option, value = OPTIONS[name], getattr(self, name)
            if value is None and option.unset:
                continue
            option.check(name, value, *self._limit(option.limit))
            if name == "num_beams" and self.do_sample and value > 1:
                raise InvalidParameter(
                    "num_beams", "num_beams must be 1 with do_sample; leave one of them out"
                )

    def _limit(self, name: str) -> tuple[int | None, str]:
        """The value of the option `name`, which limits another one, and its name; (None, "") if it
        has no value or is not an option."""
        if name == "num_beams" and not self.do_sample:
            return self.beams, name
        if name == "max_new_tokens":
            return self.max_new_tokens, name
        return None, ""

    @property
    def beams(self) -> int:
        """Beams of the search, or 1 for greedy search and sampling."""
        return self.num_beams or (1 if self.do_sample else 5)

    @property
    def rows(self) -> int:
        """Number of sequences that are decoded in parallel: beams, or independent samples."""
        return self.num_return_sequences if self.do_sample else self.beams

    def limits(
        self, vocab_size: int, max_positions: int, prompt_tokens: int = 0
    ) -> tuple[int, int]:
        """(max_new_tokens, top_k) for a model and a prompt of `prompt_tokens` tokens. Raises
        InvalidParameter if the model is too small for the options."""
        most = most_prompt_tokens(max_positions)
        if prompt_tokens > most:
            raise InvalidParameter(
                "prompt",
                f"prompt has {prompt_tokens} tokens; the maximum is {most}, half of the model's "
                "positions",
            )
        longest = max_positions - 1 - prompt_tokens
        why = "the model's limit"
        if prompt_tokens:
            why += f" after a prompt of {prompt_tokens} tokens"
        # The shorter first: a default of the longer one gives way to it, and is not to blame.
        for name in ("min_new_tokens", "max_new_tokens"):
            if getattr(self, name) is not None:
                OPTIONS[name].check(name, getattr(self, name), longest, why)
        OPTIONS["top_k"].check("top_k", self.top_k, vocab_size, "the vocabulary")
        return self.max_new_tokens or longest, self.top_k


OPTIONS: dict[str, Option] = {
    option.name: option.metadata["option"] for option in fields(DecodeOptions)
}


def most_prompt_tokens(max_positions: int) -> int:
    """The maximum length of a prompt: half of a model's positions, and short enough that one more
    token fits."""
    return min(max_positions // 2, max_positions - 2)


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a special role in the search. A text begins with `begin` and ends with `end`;
    `suppressed` are never generated. Unless there is a prompt, `first` is always the first token
    that counts as generated; with `forces_end`, the last one at the maximum length is `end`. (These
    are Hugging Face's `forced_bos_token_id` and `forced_eos_token_id`, which BART uses.)"""

    begin: int
    end: int
    suppressed: Sequence[int] = ()
    first: int | None = None
    forces_end: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """One decoded caption.

    `ids` excludes the begin token, a forced first token, the prompt and the end token.
    `token_log_probs` are the model's log-probabilities before any processor: one per id, and one
    more if the end token was generated (`finished`). `score` is what the search ranks by.
    """

    ids: list[int]
    token_log_probs: list[float]
    score: float
    finished: bool


class KeysValues(NamedTuple):
    """The keys and values of each layer's attention: the memory of the photos (B, H, P, d), or the
    cache of the texts (B, H, S, d). TorchScript supports named tuples."""

    keys: list[Tensor]
    values: list[Tensor]


def first_photos(of: KeysValues, count: int) -> KeysValues:
    """Views of the first `count` photos."""
    return KeysValues([t[:count] for t in of.keys], [t[:count] for t in of.values])


class Decoder(Protocol):
    """The interface of a decoder for the search. A decoder may be eager, scripted, replayed as CUDA
    graphs, or an ensemble.

    Each photo has a memory, which `begin` computes once for all its beams, and a cache, into whose
    next slots `prefill` and each `step` write the keys and values of their tokens. The search may
    write into both.
    """

    vocab_size: int
    max_positions: int

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """Keys and values of the photos (B, H, P, d), from the encoder's memory. `prompt_BT` are
        the ids for a decoder with a prompt encoder."""

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """An empty cache for `slots` tokens per photo, (B, H, slots, d)."""

    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        memory: KeysValues,
    ) -> Tensor:
        """Runs the first Q tokens of each photo's text in one parallel pass, and writes their keys
        and values into the first Q slots of `cache`.

        tokens and positions (B, Q) int64; mask (B, Q, Q) bool, true where a query sees a token;
        real (B, Q) bool, false for padding; the last column is never padding. Returns the logits of
        the tokens that follow the last column, (B, 1, V) float32.
        """

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """Runs Q new tokens per photo and writes their keys and values into the slots
        used .. used + Q - 1 of `cache`, in place.

        tokens and positions (B, Q) int64; mask (B, Q, S) bool with S = used + Q, true where the
        query sees the slot. Returns the logits of the next tokens, (B, Q, V) float32.
        """


class DecoderWithMaps(Decoder, Protocol):
    """A decoder that can also return its attention weights."""

    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """The cross-attention weights of each token, in one parallel pass over finished captions:
        (layers, B, H, Q, P), summing to 1 over P."""


@torch.inference_mode()
def search(
    decoder: Decoder,
    memory_BPD: Tensor,
    options: Sequence[DecodeOptions],
    special: SpecialIds,
    on_token: Callable[[int, int], None] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    readings: Sequence[Sequence[int]] | None = None,
) -> list[list[Hypothesis]]:
    """Decodes each photo with its own options. Returns a list (photos) of lists (best first).

    `memory` (B, P, D) is the output of the encoder. `prompts` contains the token ids that each
    photo's text begins with, `readings` those for a prompt encoder. `DecodeOptions.prompt`, a
    string, is not used here.
    `on_token(photo, token id)` is called with the ids of a photo's best hypothesis in order: after
    each step for a single sequence (greedy search, one sample); at the end for several samples,
    because the best one is not known earlier; never for beam search.

    Each list contains `num_return_sequences` hypotheses, or fewer if the vocabulary and the options
    allow no more. Raises InvalidParameter if the model is too small for the options, RuntimeError
    if its output is NaN.
    """
    if len(options) != memory_BPD.size(0):
        raise ValueError(f"{len(options)} options for {memory_BPD.size(0)} photos")
    prompts = [()] * len(options) if prompts is None else prompts
    limits = [
        o.limits(decoder.vocab_size, decoder.max_positions, len(prompt))
        for o, prompt in zip(options, prompts, strict=True)
    ]
    results: list[list[Hypothesis]] = [[] for _ in options]
    # Separate batches for beam search and the others, which have no code in common, for each length
    # of `readings`, which cannot be padded, and for sizes that are too different.
    sizes = _sizes([(o.rows, longest) for o, (longest, _) in zip(options, limits, strict=True)])
    kinds = [
        (o.beams > 1, len(readings[i]) if readings else 0, sizes[i]) for i, o in enumerate(options)
    ]
    for kind in dict.fromkeys(kinds):
        photos = [i for i, own in enumerate(kinds) if own == kind]
        memory = memory_BPD if len(photos) == len(options) else memory_BPD[photos]
        if readings is None:
            keys_values = decoder.begin(memory)
        else:
            reading = [list(readings[i]) for i in photos]
            keys_values = decoder.begin(memory, torch.tensor(reading, device=memory.device))
        chosen = [options[i] for i in photos]
        texts = [_text(prompts[i], limits[i][0], special) for i in photos]
        batch = _Batch(decoder, keys_values, max(o.rows for o in chosen), texts, memory.device)
        processors = _Processors(chosen, special, batch)
        if kind[0]:
            found = _beam_search(batch, chosen, processors, special.end)
        else:
            callback = None if on_token is None else _renumber(on_token, photos)
            found = _one_at_a_time(batch, chosen, processors, special.end, callback)
        for photo, hypotheses in zip(photos, found, strict=True):
            results[photo] = hypotheses
    return results


def _sizes(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A size class for each photo, by its rows and its maximum number of tokens. In a batch every
    photo takes the memory of the most rows times the most tokens. All are in one class unless that
    is more than twice what they take alone."""
    most = max(rows for rows, _ in shapes) * max(longest for _, longest in shapes)
    if most * len(shapes) <= 2 * sum(rows * longest for rows, longest in shapes):
        return [(0, 0)] * len(shapes)
    return [((rows - 1).bit_length(), (longest - 1).bit_length()) for rows, longest in shapes]


class _Text(NamedTuple):
    """The ids that a photo's text begins with, how many of them count as generated, and the maximum
    number of generated tokens."""

    ids: list[int]
    counted: int
    longest: int


def _text(prompt: Sequence[int], longest: int, special: SpecialIds) -> _Text:
    if special.first is None or prompt:
        return _Text([special.begin, *prompt], 0, longest)
    return _Text([special.begin, special.first], 1, max(longest, 2))


def _renumber(
    on_token: Callable[[int, int], None], photos: list[int]
) -> Callable[[int, int], None]:
    return lambda row, token: on_token(photos[row], token)


class _Batch:
    """The decoder's state for the open photos: memory, cache, and which beams descend from which.

    The first tokens of a photo's text, the begin token b and its prompt, occupy the slots up to
    T - 1; a shorter prompt is padded (x) on the left. They are ancestors of all beams. The token of
    beam k at time t > 0 is in slot T + (t - 1) * K + k. Two photos of K = 2 beams at t = 2, T = 3:

        slots   0 1 2   3 4   5 6        mask of beam 1   0 0 1   1 0   0 1
                x x b   a c   d e        (d and e both    1 1 1   1 0   0 1
                b p q   f g   h i        follow a, or f)
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: KeysValues,
        beams: int,
        texts: Sequence[_Text],
        device: torch.device,
    ) -> None:
        photos = len(texts)
        self.decoder, self.beams, self.device = decoder, beams, device
        self.rows = list(range(photos))  # the photo of each row
        self.time = self.used = 0
        self.memory, self.texts = memory, texts
        # How many tokens each photo may generate in the search.
        self.steps = [text.longest - text.counted for text in texts]
        longest = max(self.steps)
        lengths = [len(text.ids) for text in texts]
        width = max(lengths)
        self.is_padded = min(lengths) < width
        # Padding with begin tokens does not change the repetition penalty, which ignores counts.
        rows = [[ids[0]] * (width - len(ids)) + ids for ids, _, _ in texts]
        self.text_BT = torch.tensor(rows, device=device)
        self.padding_B1 = width - _column(lengths, device)
        # The last token is never fed back, so it needs no slot.
        self.cache = decoder.new_cache(photos, width + (longest - 1) * beams)
        # The mask includes each beam's own slots of all later times from the start; `follow` adds
        # the slots of its ancestors.
        own_KS = torch.eye(beams, dtype=torch.bool, device=device).repeat(1, longest - 1)
        self.real_BT = torch.arange(width, device=device) >= self.padding_B1
        self.mask_BKS = torch.cat(
            [self.real_BT.unsqueeze(1).expand(-1, beams, -1), own_KS.expand(photos, -1, -1)], dim=2
        )

    def step(self, tokens_BQ: Tensor) -> Tensor:
        """The logits (B, Q, V) after the newest tokens; in the first step (B, 1, V), after the T
        tokens that the texts begin with."""
        queries = tokens_BQ.size(1)
        used, self.used = self.used, self.used + queries
        self.time += 1
        if not used and queries > 1:
            return self._prefill(tokens_BQ)
        # Slot T - 1 belongs to time 0.
        positions_BQ = (self.text_BT.size(1) + self.time - 2 - self.padding_B1).expand(-1, queries)
        mask_BQS = self.mask_BKS[:, :queries, : self.used]
        return self.decoder.step(tokens_BQ, positions_BQ, mask_BQS, self.cache, used, self.memory)

    def _prefill(self, tokens_BT: Tensor) -> Tensor:
        time_T = torch.arange(tokens_BT.size(1), device=self.device)
        positions_BT = (time_T - self.padding_B1).clamp(min=0)
        earlier_TT = time_T.unsqueeze(1) >= time_T
        # Padding attends to itself: a query without any key would give NaN.
        mask_BTT = self.real_BT.unsqueeze(1) & earlier_TT | (time_T.unsqueeze(1) == time_T)
        return self.decoder.prefill(
            tokens_BT, positions_BT, mask_BTT, self.real_BT, self.cache, self.memory
        )

    def follow(self, parents_BK: Tensor) -> None:
        """Gives each beam the ancestors of its parent, and the parent itself."""
        if self.time > 1:
            seen_BKS = self.mask_BKS[:, :, : self.used]
            seen_BKS.copy_(seen_BKS.gather(1, parents_BK.unsqueeze(2).expand_as(seen_BKS)))

    def leave(self, is_open: Sequence[bool]) -> Tensor:
        """Drops the rows that are not open. Returns the old indices of the remaining rows.

        The last open rows move into the gaps, so that the keys and values of few photos are copied.
        """
        photos = sum(is_open)
        order = list(range(photos))
        late = [row for row in range(photos, len(is_open)) if is_open[row]]
        for gap in (row for row in range(photos) if not is_open[row]):
            order[gap] = late.pop()
            for slots in (*self.cache.keys, *self.cache.values):
                slots[gap, :, : self.used] = slots[order[gap], :, : self.used]
            for tokens in (*self.memory.keys, *self.memory.values):
                tokens[gap] = tokens[order[gap]]
        self.cache = first_photos(self.cache, photos)
        self.memory = first_photos(self.memory, photos)
        self.rows = [self.rows[row] for row in order]
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        self.mask_BKS, self.padding_B1 = self.mask_BKS[kept], self.padding_B1[kept]
        return kept


class _Processors:
    """Hugging Face's logits processors that any photo of the batch needs, and the texts so far,
    including prompts, which they depend on."""

    def __init__(
        self,
        options: Sequence[DecodeOptions],
        special: SpecialIds,
        batch: _Batch,
    ) -> None:
        device = batch.device
        self.end_id = special.end
        suppressed = special.suppressed
        self.suppress = torch.tensor(suppressed, device=device) if suppressed else None
        self.forced = min(batch.steps) if special.forces_end else math.inf
        self.steps_B1 = _column(batch.steps, device)
        sizes = {o.no_repeat_ngram_size for o in options}
        self.sizes, self.sizes_differ = sorted(sizes - {0}), len(sizes) > 1
        self.size_B1 = _column([o.no_repeat_ngram_size for o in options], device)
        shortest = [
            o.min_new_tokens - text.counted for o, text in zip(options, batch.texts, strict=True)
        ]
        self.shortest, self.shortest_B1 = max(shortest), _column(shortest, device)
        self.penalises = any(o.repetition_penalty != 1 for o in options)
        # Not so small that a logit divided by it overflows.
        penalties = [max(o.repetition_penalty, 1e-30) for o in options]
        self.penalty_B11 = _column(penalties, device).unsqueeze(2)
        self.reads = self.penalises or bool(self.sizes)
        self.text_BKT = batch.text_BT.unsqueeze(1)
        self.is_padded, self.padding_B1 = batch.is_padded, batch.padding_B1

    def write(self, tokens_BQ: Tensor, parents_BK: Tensor | None = None) -> None:
        """Appends the newest tokens; in beam search, to the texts of their parents."""
        if not self.reads:
            return
        text_BKT = self.text_BKT
        if parents_BK is None:
            text_BKT = text_BKT.expand(-1, tokens_BQ.size(1), -1)
        else:
            text_BKT = text_BKT.gather(1, parents_BK.unsqueeze(2).expand(-1, -1, text_BKT.size(2)))
        self.text_BKT = torch.cat([text_BKT, tokens_BQ.unsqueeze(2)], dim=2)

    def penalise(self, scores_BQV: Tensor) -> Tensor:
        """Applies the repetition penalty (Keskar et al. 2019) to a copy, if any photo has one."""
        if not self.penalises:
            return scores_BQV
        text_BQT = self.text_BKT.expand(-1, scores_BQV.size(1), -1)
        seen = scores_BQV.gather(2, text_BQT)
        seen = torch.where(seen < 0, seen * self.penalty_B11, seen / self.penalty_B11)
        return scores_BQV.scatter(2, text_BQT, seen)

    def bans(self, time: int) -> bool:
        """Whether `ban` has anything to do."""
        forces = time + 1 >= self.forced
        return self.suppress is not None or bool(self.sizes) or time < self.shortest or forces

    def ban(self, scores_BQV: Tensor, time: int, before_BQ1: Tensor | float = 0.0) -> None:
        """Sets forbidden tokens to -inf, in place. A forced end keeps the score `before`."""
        if self.suppress is not None:
            scores_BQV.index_fill_(2, self.suppress, -math.inf)
        if time < self.shortest:
            ends_BQ = scores_BQV[:, :, self.end_id]
            ends_BQ.masked_fill_(self.shortest_B1 > time, -math.inf)
        length = self.text_BKT.size(2)
        for size in self.sizes:
            if size <= length:
                text_BQT = self.text_BKT.expand(-1, scores_BQV.size(1), -1)
                windows = text_BQT.unfold(2, size, 1)  # (B, Q, T - size + 1, size)
                tail = text_BQT[:, :, length + 1 - size :].unsqueeze(2)
                repeats = (windows[..., :-1] == tail).all(-1)
                if self.sizes_differ:
                    repeats &= (self.size_B1 == size).unsqueeze(2)
                if self.is_padded:
                    first = torch.arange(windows.size(2), device=windows.device)
                    repeats &= (first >= self.padding_B1).unsqueeze(1)
                scores_BQV.scatter_add_(2, windows[..., -1], torch.where(repeats, -math.inf, 0.0))
        if time + 1 >= self.forced:
            last_B11 = (self.steps_B1 == time + 1).unsqueeze(2)
            end_BQ1 = scores_BQV[:, :, self.end_id, None]
            end_BQ1 = torch.where(last_B11, before_BQ1, end_BQ1)
            scores_BQV.masked_fill_(last_B11, -math.inf)
            scores_BQV[:, :, self.end_id, None] = end_BQ1

    def keep(self, rows: Tensor) -> None:
        self.steps_B1 = self.steps_B1[rows]
        self.size_B1, self.shortest_B1 = self.size_B1[rows], self.shortest_B1[rows]
        self.penalty_B11, self.padding_B1 = self.penalty_B11[rows], self.padding_B1[rows]
        if self.reads:
            self.text_BKT = self.text_BKT[rows]


class _Rules:
    """The divisors of scores in beam search, and when a photo is finished, as tables over time."""

    def __init__(self, options: Sequence[DecodeOptions], batch: _Batch) -> None:
        beams, device = batch.beams, batch.device
        longest_B1 = _column([text.longest for text in batch.texts])
        counted_B1 = _column([text.counted for text in batch.texts])
        length_BT = torch.arange(1, max(batch.steps) + 1) + counted_B1
        penalty_B1 = _column([o.length_penalty for o in options]).double()
        never_B1 = _column([o.early_stopping == "never" for o in options])
        # The most favourable length that an open beam may still reach. With `never` it is exact:
        # the maximum if length is rewarded, otherwise the smallest at which the beam may end, at
        # least one token later. Otherwise it is the current length, as in Hugging Face.
        soonest_BT = (length_BT + 1).maximum(_column([o.min_new_tokens + 1 for o in options]))
        kindest_BT = torch.where(penalty_B1 > 0, longest_B1, soonest_BT.minimum(longest_B1))
        kindest_BT = torch.where(never_B1, kindest_BT, length_BT)
        self.divisor_BT = (length_BT**penalty_B1).float().to(device)
        self.reach_BT = (kindest_BT**penalty_B1).float().to(device)
        self.last_BT = (length_BT == longest_B1).to(device)
        # The rank in the pool of the hypothesis that an open beam has to beat.
        ranks = [
            o.num_return_sequences if o.early_stopping == "never" else o.beams for o in options
        ]
        self.rank_B1 = _column(ranks, device) - 1
        self.early_B1 = _column([o.early_stopping is True for o in options], device)
        self.any_early = any(o.early_stopping is True for o in options)
        surplus_BK = torch.arange(beams) >= _column([o.beams for o in options])
        self.surplus_BK = surplus_BK.to(device) if surplus_BK.any() else None

    def is_open(self, running_BK: Tensor, pool_BK: Tensor, time: int) -> Tensor:
        """(B, 1): whether the best open beam may still change the result; false for NaN."""
        rival_B1 = pool_BK.gather(1, self.rank_B1)
        if self.any_early:
            rival_B1 = rival_B1.masked_fill(self.early_B1 & (rival_B1 > -math.inf), math.inf)
        return running_BK[:, :1] / self.reach_BT[:, time : time + 1] > rival_B1

    def keep(self, rows: Tensor) -> None:
        self.divisor_BT, self.reach_BT = self.divisor_BT[rows], self.reach_BT[rows]
        self.last_BT, self.rank_B1 = self.last_BT[rows], self.rank_B1[rows]
        self.early_B1 = self.early_B1[rows]
        if self.surplus_BK is not None:
            self.surplus_BK = self.surplus_BK[rows]


def _beam_search(
    batch: _Batch,
    options: Sequence[DecodeOptions],
    processors: _Processors,
    end_id: int,
) -> list[list[Hypothesis]]:
    beams, device = batch.beams, batch.device
    rules = _Rules(options, batch)
    tokens_BQ, running_BQ = batch.text_BT, torch.zeros(len(options), 1, device=device)
    pool = _Pool(len(options), beams, max(batch.steps), device)
    ends: dict[int, list[_End]] = {}
    history: list[_Moment] = []

    while True:
        time, rows = batch.time, batch.rows
        own_BQV = torch.log_softmax(batch.step(tokens_BQ), dim=-1)
        total_BQV = processors.penalise(own_BQV) + running_BQ.unsqueeze(2)
        processors.ban(total_BQV, time, running_BQ.unsqueeze(2))

        # The 2K best candidates, best first. At most one per beam is an end token: K can go on.
        value_BC, where_BC = greatest(total_BQV.flatten(1), 2 * beams)
        parent_BC = where_BC.div(own_BQV.size(2), rounding_mode="floor")
        token_BC = where_BC - parent_BC * own_BQV.size(2)
        gain_BC = own_BQV.flatten(1).gather(1, where_BC)
        ended_BC = (token_BC == end_id) | rules.last_BT[:, time : time + 1]

        before_BQ = running_BQ
        running_BQ, chosen_BK = value_BC.masked_fill(ended_BC, -math.inf).topk(beams)
        ended_BK = ended_BC[:, :beams]
        if rules.surplus_BK is not None:
            running_BQ = running_BQ.masked_fill(rules.surplus_BK, -math.inf)
            ended_BK = ended_BK & ~rules.surplus_BK
        tokens_BQ = token_BC.gather(1, chosen_BK)
        parents_BK = parent_BC.gather(1, chosen_BK)
        history.append(_Moment(rows, (parent_BC, token_BC, chosen_BK), (gain_BC,)))

        score_BK = value_BC[:, :beams] / rules.divisor_BT[:, time : time + 1]
        score_BK = torch.where(ended_BK, score_BK, -math.inf)
        pool.add(score_BK, time)

        # The only synchronization with the device in a step.
        is_open = rules.is_open(running_BQ, pool.score_BK, time).flatten().tolist()
        if not all(is_open):
            running, before = running_BQ[:, 0].tolist(), before_BQ[:, 0].tolist()
            for row, best in pool.of_closed(is_open):
                if math.isnan(best[0].score + running[row]):
                    raise RuntimeError(NOT_A_NUMBER)
                option, counted = options[rows[row]], batch.texts[rows[row]].counted
                ended = [end for end in best if end.score > -math.inf]
                # No token is allowed and no hypothesis has ended: the first beam ends here.
                norm = max(time + counted, 1) ** option.length_penalty
                ended = ended or [_End(before[row] / norm, time - 1, None)]
                ends[rows[row]] = ended[: option.num_return_sequences]
            stay = batch.leave(is_open)
            if not batch.rows:
                break
            tokens_BQ, parents_BK, running_BQ = tokens_BQ[stay], parents_BK[stay], running_BQ[stay]
            for tables in (pool, processors, rules):
                tables.keep(stay)
        batch.follow(parents_BK)
        processors.write(tokens_BQ, parents_BK)

    moments = _read(history)
    return [[_trace(moments, photo, end, end_id) for end in ends[photo]] for photo in sorted(ends)]


class _Pool:
    """The best ended hypotheses of each open photo, best first."""

    def __init__(self, photos: int, beams: int, steps: int, device: torch.device) -> None:
        self.score_BK = torch.full((photos, beams), -math.inf, device=device)
        # The candidates that ended them, as time * K + rank.
        self.candidate_BK = torch.zeros(photos, beams, dtype=torch.long, device=device)
        self.candidates_TK = torch.arange(steps * beams, device=device).view(-1, beams)

    def add(self, score_BK: Tensor, time: int) -> None:
        """Adds the first K candidates of a step with their final scores (-inf if not ended)."""
        candidate_BK = self.candidates_TK[time].expand(len(score_BK), -1)
        beams = score_BK.size(1)
        self.score_BK, best_BK = torch.cat([self.score_BK, score_BK], dim=1).topk(beams)
        self.candidate_BK = torch.cat([self.candidate_BK, candidate_BK], 1).gather(1, best_BK)

    def of_closed(self, is_open: Sequence[bool]) -> Iterator[tuple[int, list["_End"]]]:
        """Yields each closed row with its K entries, of which those with score -inf are empty."""
        scores, candidates = self.score_BK.tolist(), self.candidate_BK.tolist()
        beams = self.score_BK.size(1)
        for row, stays in enumerate(is_open):
            if not stays:
                ended = zip(scores[row], candidates[row], strict=True)
                yield row, [_End(score, *divmod(index, beams)) for score, index in ended]

    def keep(self, rows: Tensor) -> None:
        self.score_BK, self.candidate_BK = self.score_BK[rows], self.candidate_BK[rows]


class _Moment(NamedTuple):
    """The decisions of one step, as tensors (rows, ...)."""

    rows: list[int]  # the photo in each row
    whole: tuple[Tensor, ...]  # int64
    real: tuple[Tensor, ...]  # float32


class _Read(NamedTuple):
    """A `_Moment` in host memory."""

    rows: list[int]
    whole: list[list[list[int]]]
    real: list[list[list[float]]]


class _End(NamedTuple):
    """Where a hypothesis ends: at the candidate with this rank, or, if None, at the first beam."""

    score: float
    time: int
    rank: int | None


def _read(history: Sequence[_Moment]) -> list[_Read]:
    """Copies a history to host memory in two transfers."""
    whole: Iterator[list[list[int]]] = _lists([t for moment in history for t in moment.whole])
    real: Iterator[list[list[float]]] = _lists([t for moment in history for t in moment.real])
    return [
        _Read(m.rows, [next(whole) for _ in m.whole], [next(real) for _ in m.real]) for m in history
    ]


def _lists(tensors: list[Tensor]) -> Iterator[list[list[NUMBER]]]:
    flat = torch.cat([t.flatten() for t in tensors]).cpu().split([t.numel() for t in tensors])
    return (part.view(t.shape).tolist() for part, t in zip(flat, tensors, strict=True))


def _trace(moments: Sequence[_Read], photo: int, end: _End, end_id: int) -> Hypothesis:
    """Reads a hypothesis backwards from the history of a beam search."""
    ids: list[int] = []
    log_probs: list[float] = []
    last_rank, beam = end.rank, 0
    for moment in reversed(moments[: end.time + 1]):
        row = moment.rows.index(photo)
        (parent, token, chosen), (gain,) = moment.whole, moment.real
        rank = chosen[row][beam] if last_rank is None else last_rank
        ids.append(token[row][rank])
        log_probs.append(gain[row][rank])
        last_rank, beam = None, parent[row][rank]
    return _hypothesis(ids[::-1], log_probs[::-1], end.score, end_id)


def _hypothesis(ids: list[int], log_probs: list[float], score: float, end_id: int) -> Hypothesis:
    finished = ids[-1:] == [end_id]
    return Hypothesis(ids[:-1] if finished else ids, log_probs, score, finished)


def _one_at_a_time(
    batch: _Batch,
    options: Sequence[DecodeOptions],
    processors: _Processors,
    end_id: int,
    on_token: Callable[[int, int], None] | None,
) -> list[list[Hypothesis]]:
    """Greedy search and sampling, whose sequences do not compete with each other."""
    beams, device = batch.beams, batch.device
    sampler = None
    if any(o.do_sample for o in options):
        sampler = _Sampler(options, batch.steps, beams, device)
    last_BT = (torch.arange(1, max(batch.steps) + 1) == _column(batch.steps)).to(device)
    open_BK = torch.arange(beams, device=device) < _column([o.rows for o in options], device)
    tokens_BQ = batch.text_BT
    history: list[_Moment] = []

    while True:
        time, rows = batch.time, batch.rows
        # The first step has one query, from which all samples start.
        logits_BKV = batch.step(tokens_BQ).expand(-1, beams, -1)
        tokens_BQ, gain_BK, log_BK = _next_tokens(logits_BKV, processors, sampler, time)
        history.append(_Moment(rows, (tokens_BQ,), (gain_BK, log_BK)))
        # NaN means that no token is allowed, or that the model is broken: `_sequence` checks it.
        open_BK = open_BK & (tokens_BQ != end_id) & (log_BK == log_BK)
        open_BK = open_BK & ~last_BT[:, time : time + 1]

        # The only synchronization with the device in a step, apart from `on_token`.
        if on_token is not None:
            logs = log_BK[:, 0].tolist()
            for photo, token, log in zip(rows, tokens_BQ[:, 0].tolist(), logs, strict=True):
                if options[photo].rows == 1 and token != end_id and not math.isnan(log):
                    on_token(photo, token)
        is_open = open_BK.any(1).tolist()
        if not all(is_open):
            stay = batch.leave(is_open)
            if not batch.rows:
                break
            tokens_BQ, open_BK, last_BT = tokens_BQ[stay], open_BK[stay], last_BT[stay]
            processors.keep(stay)
            if sampler is not None:
                sampler.keep(stay)
        processors.write(tokens_BQ)

    moments = _read(history)
    answers = [
        _samples(moments, photo, o, batch.texts[photo].counted, end_id)
        for photo, o in enumerate(options)
    ]
    if on_token is not None:  # the best of several samples is only known now
        several = [photo for photo, o in enumerate(options) if o.rows > 1]
        for photo, token in ((i, token) for i in several for token in answers[i][0].ids):
            on_token(photo, token)
    return answers


def _next_tokens(
    logits_BKV: Tensor, processors: _Processors, sampler: "_Sampler | None", time: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each sequence, its log-probability according to the model, and according to
    the processed scores that it was chosen from (NaN if they forbid every token); all (B, K)."""
    own_BKV = torch.log_softmax(logits_BKV, dim=-1)
    scores_BKV = processors.penalise(logits_BKV)
    if processors.bans(time):
        scores_BKV = scores_BKV.clone() if scores_BKV is logits_BKV else scores_BKV
        processors.ban(scores_BKV, time)
    if sampler is not None:
        scores_BKV = sampler.warp(scores_BKV)
    logs_BKV = own_BKV
    if scores_BKV is not logits_BKV:
        logs_BKV = torch.log_softmax(scores_BKV, dim=-1)
    tokens_BK = scores_BKV.argmax(-1)
    if sampler is not None:
        tokens_BK = sampler.draw(logs_BKV, tokens_BK, time)
    gain_BK = own_BKV.gather(2, tokens_BK.unsqueeze(2)).squeeze(2)
    if logs_BKV is own_BKV:
        return tokens_BK, gain_BK, gain_BK
    return tokens_BK, gain_BK, logs_BKV.gather(2, tokens_BK.unsqueeze(2)).squeeze(2)


def _samples(
    moments: Sequence[_Read], photo: int, options: DecodeOptions, counted: int, end_id: int
) -> list[Hypothesis]:
    """A photo's sequences, best first. `counted` tokens before them count as generated."""
    samples = [_sequence(moments, photo, k, options, counted, end_id) for k in range(options.rows)]
    return sorted(samples, key=lambda sample: -sample.score)


def _sequence(
    moments: Sequence[_Read], photo: int, k: int, options: DecodeOptions, counted: int, end_id: int
) -> Hypothesis:
    """Reads the k-th sequence of a photo from the history of greedy search or sampling."""
    ids: list[int] = []
    log_probs: list[float] = []
    total = 0.0
    for moment in moments:
        if photo not in moment.rows or ids[-1:] == [end_id]:
            break
        row = moment.rows.index(photo)
        token = moment.whole[0][row][k]
        gain, log = (table[row][k] for table in moment.real)
        if math.isnan(gain):
            raise RuntimeError(NOT_A_NUMBER)
        if math.isnan(log):
            break
        ids.append(token)
        log_probs.append(gain)
        total += log
    score = total / max(len(ids) + counted, 1) ** options.length_penalty
    return _hypothesis(ids, log_probs, score, end_id)


class _Sampler:
    """Temperature, top-k, top-p and drawing; rows that do not sample are unchanged."""

    def __init__(
        self,
        options: Sequence[DecodeOptions],
        longest: Sequence[int],
        samples: int,
        device: torch.device,
    ) -> None:
        warm = [o if o.do_sample else DecodeOptions() for o in options]
        temperatures = [max(o.temperature, 1e-30) for o in warm]
        self.temperature_B11 = _column(temperatures, device).unsqueeze(2)
        self.top_k_B11 = _column([o.top_k for o in warm], device).unsqueeze(2)
        self.cut_B11 = _column([1 - o.top_p for o in warm], device).unsqueeze(2)
        self.heats = any(o.temperature != 1 for o in warm)
        self.top_k = max(o.top_k for o in warm)
        self.cuts = any(o.top_p < 1 for o in warm)
        self.samples_B1 = _column([o.do_sample for o in options], device)
        self.greedy = not all(o.do_sample for o in options)
        uniforms_BKT = torch.zeros(len(options), samples, max(longest), dtype=torch.float64)
        for uniforms_KT, o, steps in zip(uniforms_BKT, options, longest, strict=True):
            if o.do_sample:
                generator = torch.Generator()
                if o.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed(o.seed)
                uniforms_KT[: o.rows, :steps].uniform_(generator=generator)
        self.uniforms_BKT = uniforms_BKT.to(device)

    def warp(self, scores_BKV: Tensor) -> Tensor:
        """Sets the scores of tokens that must not be drawn to -inf, in a copy."""
        if self.heats:
            # The best score becomes 0, so that a tiny temperature does not overflow.
            scores_BKV = scores_BKV - scores_BKV.amax(-1, keepdim=True)
            scores_BKV = scores_BKV / self.temperature_B11
        if self.top_k:
            best = scores_BKV.topk(self.top_k).values
            least = best.gather(2, (self.top_k_B11 - 1).clamp(min=0).expand(-1, best.size(1), -1))
            # Tokens with the same score as the k-th are kept, as in Hugging Face.
            out = (scores_BKV < least) & (self.top_k_B11 > 0)
            scores_BKV = scores_BKV.masked_fill(out, -math.inf)
        if self.cuts:
            # Nucleus sampling (Holtzman et al. 2020) removes the tail whose probability sums to at
            # most 1 - top_p, but never the best token.
            ordered, order = scores_BKV.sort(dim=-1)
            out = (ordered.softmax(-1).cumsum(-1) <= self.cut_B11) & (self.cut_B11 > 0)
            out[:, :, -1] = False
            scores_BKV = scores_BKV.masked_fill(out.scatter(2, order, out), -math.inf)
        return scores_BKV

    def draw(self, logs_BKV: Tensor, best_BK: Tensor, time: int) -> Tensor:
        """Draws tokens (B, K) by inversion of the cumulative distribution, in double precision; a
        token of probability 0 is never drawn. Photos that do not sample get `best`."""
        heights_BKV = logs_BKV.double().exp().cumsum(-1)
        target_BK1 = self.uniforms_BKT[:, :, time : time + 1] * heights_BKV[:, :, -1:]
        drawn_BK = torch.searchsorted(heights_BKV, target_BK1, right=True).squeeze(2)
        # Only NaN, which is handled later, gives an index after the last token.
        drawn_BK = drawn_BK.clamp(max=logs_BKV.size(2) - 1)
        return torch.where(self.samples_B1, drawn_BK, best_BK) if self.greedy else drawn_BK

    def keep(self, rows: Tensor) -> None:
        self.temperature_B11, self.top_k_B11 = self.temperature_B11[rows], self.top_k_B11[rows]
        self.cut_B11, self.samples_B1 = self.cut_B11[rows], self.samples_B1[rows]
        self.uniforms_BKT = self.uniforms_BKT[rows]


def _column(values: Sequence[float] | Sequence[bool], device: torch.device | None = None) -> Tensor:
    """(B, 1)."""
    return torch.tensor(values, device=device).unsqueeze(1)


def greatest(scores_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest values of each row, best first, and their indices. It replaces `topk`,
    which is slow for long rows.

    The greatest values are in the blocks with the greatest maxima (or equal to values there), and
    finding maxima is limited only by the speed of memory. Rows that are too short are padded with
    -inf at index 0. Exports script this function, so it must not use globals.
    """
    photos, width = scores_BN.shape
    if not scores_BN.is_cpu or width < 2**15:  # longer rows are faster in blocks (measured)
        if width >= count:
            return scores_BN.topk(count)
        value_BC, where_BC = scores_BN.topk(width)
        missing = [0, count - width]
        return F.pad(value_BC, missing, value=-math.inf), F.pad(where_BC, missing)
    block = 128
    blocks = width // block
    whole_BGN = scores_BN[:, : blocks * block].unflatten(1, [blocks, block])
    block_BC = whole_BGN.amax(2).topk(count).indices
    near = whole_BGN.gather(1, block_BC.unsqueeze(2).expand(-1, -1, block)).flatten(1)
    # The rest of the row is one more block.
    near = torch.cat([near, scores_BN[:, blocks * block :]], dim=1)
    block_BC = F.pad(block_BC, [0, 1], value=float(blocks))
    value_BC, where_BC = near.topk(count)
    return value_BC, block_BC.gather(1, where_BC // block) * block + where_BC % block
