"""Greedy search, sampling and beam search, batched, over a decoder's step function.

Semantics are those of Hugging Face's `generate` (transformers 5.23: `_beam_search` and `_sample` in
generation/utils.py, logits_process.py), so that the same model gives the same sequences and scores:

- Beam search ranks by the sum of processed log-probabilities over n ** length_penalty, n counting
  the generated tokens, end token included. Of the best 2K continuations of a photo's K beams, the
  first K that do not end stay open; one that ends is kept only if it is among the first K. At
  `max_new_tokens` every continuation counts as ended, and its score is divided by its length.
- Processors act on log-softmax in beam search and on raw logits in greedy search and sampling, in
  the order repetition penalty, n-grams, minimum length, then temperature, top-k, top-p. The begin
  token counts as text for the first two, and as an n-gram's or penalised token like any other.
- `early_stopping` true stops a photo at K ended hypotheses; false also waits until the best open
  beam, at its present length, is no better than the worst of them.

Where it deviates:

- Under `never` a photo stops as soon as no open beam can still enter the best
  `num_return_sequences`; Hugging Face waits for the worst of all K. The bound is exact (log-
  probabilities only fall, and the kindest length still reachable is known), so what is returned is
  the same, sooner.
- One beam and samples have a score too: the sum of the log-softmax of the processed logits
  (temperature, top-k and top-p included) over n ** length_penalty. Samples are sorted by it.
- Impossible is -inf, not -1e9. Hugging Face returns sequences of nothing, or twice the same, where
  there are fewer continuations than beams (a vocabulary below 2K), or where a score falls below
  -1e9 (a strongly negative length penalty on a long caption). Here a list is shorter instead.
- Where processors forbid every token, a caption ends as if it had reached its greatest length.
- `suppress` names ids that are never generated (padding, begin, <unk>).
- Sampling inverts the cumulative distribution with uniforms that each request draws up front from
  a generator of its own, so that a seed's captions do not depend on the rest of the batch.

Ties: greedy search takes the lowest id. Among candidates of equal score `torch.topk` decides; that
is the same on every call with the same numbers, but no rule should be read into it.

Nothing is copied per beam. Cross-attention keys belong to the photo. The self-attention cache stays
in place while a mask says which slots a beam descends from. Which beam wrote which token is kept as
parents and tokens of each step, and a caption is read off them backwards once, at the end.

Dimension key: B photos that are still open, K beams or samples (the most that a photo asks for; the
surplus of the others is dead), Q queries (1 at first, since all beams begin alike, then K), V
vocabulary, S slots, T time; B1 and BT are columns and tables of a photo's own settings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.errors import UserError

MAX_BEAMS = 16
NUMBER = TypeVar("NUMBER", int, float)
NOT_A_NUMBER = "the model's output is not a number: its weights or the photo's memory are damaged"


class InvalidParameter(UserError):
    """A decoding option out of its range; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _integer(name: str, value: object, low: int, high: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(name, f"{name} must be an integer from {low} to {high}{why}")


def _number(name: str, value: object, low: float, high: float, open_low: bool) -> None:
    # NaN fails both comparisons; an integer too great for a float compares all the same.
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not valid or not low <= value <= high or (open_low and value == low):
        raise InvalidParameter(
            name, f"{name} must be a number {'above' if open_low else 'from'} {low:g} to {high:g}"
        )


def _truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidParameter(name, f"{name} must be true or false")


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode one photo, named after Hugging Face's `generate`.

    `num_beams` None means 5, or 1 when sampling; `max_new_tokens` None means as many as the model
    has positions for. Raises InvalidParameter, which names the field and its range.
    """

    num_beams: int | None = None
    num_return_sequences: int = 1
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = "never"
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _truth("do_sample", self.do_sample)
        if self.num_beams is not None:
            _integer("num_beams", self.num_beams, 1, MAX_BEAMS)
            if self.do_sample and self.num_beams > 1:
                raise InvalidParameter(
                    "num_beams", "num_beams must be 1 with do_sample; leave one of them out"
                )
        most, why = (MAX_BEAMS, "") if self.do_sample else (self.beams, ", num_beams")
        _integer("num_return_sequences", self.num_return_sequences, 1, most, why)
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, 1, 2**31)
        longest = self.max_new_tokens or 2**31
        _integer("min_new_tokens", self.min_new_tokens, 0, longest, ", max_new_tokens")
        _number("length_penalty", self.length_penalty, -5, 5, False)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidParameter("early_stopping", "early_stopping must be false, true or never")
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 10)
        _number("repetition_penalty", self.repetition_penalty, 0, 10, True)
        _number("temperature", self.temperature, 0, 10, True)
        _integer("top_k", self.top_k, 0, 2**31)
        _number("top_p", self.top_p, 0, 1, True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)

    @property
    def beams(self) -> int:
        """Beams of the search, or 1 for greedy search and sampling."""
        return self.num_beams or (1 if self.do_sample else 5)

    @property
    def rows(self) -> int:
        """Sequences that are open at once: beams, or independent samples."""
        return self.num_return_sequences if self.do_sample else self.beams

    def limits(self, vocab_size: int, max_positions: int) -> tuple[int, int]:
        """(max_new_tokens, top_k) of a model. Raises InvalidParameter where it is too small."""
        longest = max_positions - 1
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, 1, longest, ", the model's limit")
        else:
            _integer("min_new_tokens", self.min_new_tokens, 0, longest, ", the model's limit")
        _integer("top_k", self.top_k, 0, vocab_size, ", the vocabulary")
        return self.max_new_tokens or longest, self.top_k


@dataclass(frozen=True)
class Hypothesis:
    """One decoded caption.

    `ids` leaves out the begin and the end token; `token_log_probs` are of the model itself, before
    any processor: one an id and one more when the end token was reached (`finished`); `score` is
    what the search ranks by.
    """

    ids: list[int]
    token_log_probs: list[float]
    score: float
    finished: bool


class KeysValues(NamedTuple):
    """The keys and the values of every layer's attention: those of a photo (B, H, P, d), or those
    of the text, its cache (B, H, S, d). TorchScript knows it as it is."""

    keys: list[Tensor]
    values: list[Tensor]


def first_photos(of: KeysValues, count: int) -> KeysValues:
    """Views of the first `count` photos."""
    return KeysValues([t[:count] for t in of.keys], [t[:count] for t in of.values])


class Decoder(Protocol):
    """What the search asks of a decoder, eager, scripted, replayed as graphs or several in one.

    Each photo has a memory, computed once (`begin`) and shared by all its beams, and a cache, in
    which every step writes the keys and values of its tokens into the next slots. The search may
    write into both.
    """

    vocab_size: int
    max_positions: int

    def begin(self, memory_BPD: Tensor, prompt_BT: Tensor | None = None) -> KeysValues:
        """Keys and values of the photos (B, H, P, d), from the encoder's memory. The ids
        `prompt_BT` are for a decoder whose photos are read together with a prompt."""

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """Room for keys and values of that many tokens a photo, (B, H, slots, d)."""

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        memory: KeysValues,
    ) -> Tensor:
        """Runs Q new tokens a photo and writes their keys and values into the slots
        used .. used + Q - 1 of `cache`, in place.

        tokens and positions (B, Q) int64; mask (B, Q, S) bool with S = used + Q, true where the
        query sees the slot. Returns the logits of the next tokens, (B, Q, V) float32.
        """


class DecoderWithMaps(Decoder, Protocol):
    """A decoder that can tell where it looks."""

    def attention(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        memory_BPD: Tensor,
        prompt_BT: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token to the photo in one parallel pass over finished captions:
        (layers, B, H, Q, P), summing to 1 over P."""


@torch.inference_mode()
def search(
    decoder: Decoder,
    memory_BPD: Tensor,
    options: Sequence[DecodeOptions],
    begin_id: int,
    end_id: int,
    suppress: Sequence[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decodes each photo by its own options: a list (photos) of lists (best first).

    `memory` (B, P, D) is the encoder's. Ids in `suppress` are never generated.
    `on_token(photo, token id)` hears the ids of a photo's first hypothesis in their order: as they
    are decided where one sequence is open (greedy search, a single sample), at the end where the
    best of several samples is only known then; never for beam search, which may change its mind.

    Each list holds `num_return_sequences` hypotheses, fewer only where the vocabulary and the
    options leave no more. Raises InvalidParameter for options that the model is too small for,
    RuntimeError for a model whose output is not a number.
    """
    if len(options) != memory_BPD.size(0):
        raise ValueError(f"{len(options)} options for {memory_BPD.size(0)} photos")
    limits = [o.limits(decoder.vocab_size, decoder.max_positions) for o in options]
    results: list[list[Hypothesis]] = [[] for _ in options]
    # Beam search and the others share no arithmetic: at most two batches, one after the other.
    for beams in (True, False):
        photos = [i for i, o in enumerate(options) if (o.beams > 1) == beams]
        if not photos:
            continue
        memory = memory_BPD if len(photos) == len(options) else memory_BPD[photos]
        longest = [limits[i][0] for i in photos]
        chosen = [options[i] for i in photos]
        processors = _Processors(chosen, end_id, suppress, memory.device)
        batch = _Batch(decoder, memory, max(o.rows for o in chosen), max(longest), begin_id)
        processors.write(batch.begin_B1)
        if beams:
            found = _beam_search(batch, chosen, longest, processors, end_id)
        else:
            hear = None if on_token is None else _renumber(on_token, photos)
            found = _one_at_a_time(batch, chosen, longest, processors, end_id, hear)
        for photo, hypotheses in zip(photos, found, strict=True):
            results[photo] = hypotheses
    return results


def _renumber(hear: Callable[[int, int], None], photos: list[int]) -> Callable[[int, int], None]:
    return lambda row, token: hear(photos[row], token)


class _Batch:
    """The decoder's side of the open photos: keys, values, and the ancestry of beams.

    The begin token lies in slot 0, from which every beam descends; what beam k wrote at time t > 0
    lies in slot 1 + (t - 1) * K + k.
    """

    def __init__(
        self, decoder: Decoder, memory_BPD: Tensor, beams: int, longest: int, begin_id: int
    ) -> None:
        photos, device = memory_BPD.size(0), memory_BPD.device
        self.decoder, self.beams, self.device = decoder, beams, device
        self.rows = list(range(photos))  # which photo lies in each row
        self.time = self.used = 0
        self.memory = decoder.begin(memory_BPD)
        # The last token is never fed back, so it needs no slot.
        self.cache = decoder.new_cache(photos, 1 + (longest - 1) * beams)
        # Every beam's own slots of all times to come are open from the start; `follow` gives it
        # those of its ancestors.
        own_KS = torch.eye(beams, dtype=torch.bool, device=device).repeat(1, longest - 1)
        self.mask_BKS = F.pad(own_KS, (1, 0), value=True).repeat(photos, 1, 1)
        time_T11 = torch.arange(longest, device=device).view(-1, 1, 1)
        self.positions_TBK = time_T11.expand(-1, photos, beams)
        self.begin_B1 = torch.full((photos, 1), begin_id, device=device)

    def step(self, tokens_BQ: Tensor) -> Tensor:
        """Logits (B, Q, V) of what follows the newest tokens."""
        photos, queries = tokens_BQ.shape
        used, slots = self.used, self.used + queries
        positions_BQ = self.positions_TBK[self.time, :photos, :queries]
        mask_BQS = self.mask_BKS[:, :queries, :slots]
        self.time, self.used = self.time + 1, slots
        return self.decoder.step(tokens_BQ, positions_BQ, mask_BQS, self.cache, used, self.memory)

    def follow(self, parents_BK: Tensor) -> None:
        """Each beam now descends from what its parent descends from, and from the parent."""
        if self.used > 1:
            seen_BKS = self.mask_BKS[:, :, : self.used]
            seen_BKS.copy_(seen_BKS.gather(1, parents_BK.unsqueeze(2).expand_as(seen_BKS)))

    def leave(self, is_open: Sequence[bool]) -> Tensor:
        """Drops the rows that are not open; returns the old row numbers of those that stay.

        The last open rows move into the gaps, so that keys and values of few photos are copied.
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
        self.mask_BKS = self.mask_BKS[kept]
        return kept


class _Processors:
    """Hugging Face's logits processors, those that a photo of the batch asks for, and the text so
    far that they look at."""

    def __init__(
        self,
        options: Sequence[DecodeOptions],
        end_id: int,
        suppress: Sequence[int],
        device: torch.device,
    ) -> None:
        self.end_id = end_id
        self.suppress = torch.tensor(suppress, device=device) if suppress else None
        sizes = {o.no_repeat_ngram_size for o in options}
        self.sizes, self.sizes_differ = sorted(sizes - {0}), len(sizes) > 1
        self.size_B1 = _column([o.no_repeat_ngram_size for o in options], device)
        self.shortest = max(o.min_new_tokens for o in options)
        self.shortest_B1 = _column([o.min_new_tokens for o in options], device)
        self.penalises = any(o.repetition_penalty != 1 for o in options)
        # Not so small that a logit over it overflows.
        penalties = [max(o.repetition_penalty, 1e-30) for o in options]
        self.penalty_B11 = _column(penalties, device).unsqueeze(2)
        self.reads = self.penalises or bool(self.sizes)
        self.text_BKT = torch.zeros(0, dtype=torch.long)

    def write(self, tokens_BQ: Tensor, parents_BK: Tensor | None = None) -> None:
        """Appends the newest tokens, to the texts of the parents where beams were reordered."""
        if not self.reads:
            return
        text_BKT = self.text_BKT
        if not text_BKT.numel():
            self.text_BKT = tokens_BQ.unsqueeze(2)
            return
        if parents_BK is None:
            text_BKT = text_BKT.expand(-1, tokens_BQ.size(1), -1)
        else:
            text_BKT = text_BKT.gather(1, parents_BK.unsqueeze(2).expand(-1, -1, text_BKT.size(2)))
        self.text_BKT = torch.cat([text_BKT, tokens_BQ.unsqueeze(2)], dim=2)

    def penalise(self, scores_BQV: Tensor) -> Tensor:
        """Repetition penalty (Keskar et al. 2019), on a copy where anyone asked for it."""
        if not self.penalises:
            return scores_BQV
        text_BQT = self.text_BKT.expand(-1, scores_BQV.size(1), -1)
        seen = scores_BQV.gather(2, text_BQT)
        seen = torch.where(seen < 0, seen * self.penalty_B11, seen / self.penalty_B11)
        return scores_BQV.scatter(2, text_BQT, seen)

    def bans(self, time: int) -> bool:
        """Whether `ban` has anything to do."""
        return self.suppress is not None or bool(self.sizes) or time < self.shortest

    def ban(self, scores_BQV: Tensor, time: int) -> None:
        """Makes -inf, in place, what may not follow."""
        if self.suppress is not None:
            scores_BQV.index_fill_(2, self.suppress, -math.inf)
        if time < self.shortest:
            ends_BQ = scores_BQV[:, :, self.end_id]
            ends_BQ.masked_fill_(self.shortest_B1 > time, -math.inf)
        for size in self.sizes:
            if size <= time + 1:
                text_BQT = self.text_BKT.expand(-1, scores_BQV.size(1), -1)
                windows = text_BQT.unfold(2, size, 1)  # (B, Q, T - size + 1, size)
                tail = text_BQT[:, :, time + 2 - size :].unsqueeze(2)
                repeats = (windows[..., :-1] == tail).all(-1)
                if self.sizes_differ:
                    repeats &= (self.size_B1 == size).unsqueeze(2)
                scores_BQV.scatter_add_(2, windows[..., -1], torch.where(repeats, -math.inf, 0.0))

    def keep(self, rows: Tensor) -> None:
        self.size_B1, self.shortest_B1 = self.size_B1[rows], self.shortest_B1[rows]
        self.penalty_B11 = self.penalty_B11[rows]
        if self.reads:
            self.text_BKT = self.text_BKT[rows]


class _Rules:
    """What beam search divides scores by, and when a photo is done, as tables over time."""

    def __init__(
        self,
        options: Sequence[DecodeOptions],
        longest: Sequence[int],
        beams: int,
        device: torch.device,
    ) -> None:
        length_T = torch.arange(1, max(longest) + 1)
        longest_B1 = _column(longest)
        penalty_B1 = _column([o.length_penalty for o in options]).double()
        never_B1 = _column([o.early_stopping == "never" for o in options])
        # The kindest length that an open beam may still have. Exact under `never`: the greatest
        # where length is rewarded, otherwise the smallest at which it may end, one token on at
        # least. Hugging Face otherwise takes the present length.
        soonest_BT = (length_T + 1).maximum(_column([o.min_new_tokens + 1 for o in options]))
        kindest_BT = torch.where(penalty_B1 > 0, longest_B1, soonest_BT.minimum(longest_B1))
        kindest_BT = torch.where(never_B1, kindest_BT, length_T)
        self.divisor_BT = (length_T**penalty_B1).float().to(device)
        self.reach_BT = (kindest_BT**penalty_B1).float().to(device)
        self.last_BT = (length_T == longest_B1).to(device)
        # The rank in the pool that an open beam has to beat.
        ranks = [
            o.num_return_sequences if o.early_stopping == "never" else o.beams for o in options
        ]
        self.rank_B1 = _column(ranks, device) - 1
        self.early_B1 = _column([o.early_stopping is True for o in options], device)
        self.any_early = any(o.early_stopping is True for o in options)
        surplus_BK = torch.arange(beams) >= _column([o.beams for o in options])
        self.surplus_BK = surplus_BK.to(device) if surplus_BK.any() else None

    def is_open(self, running_BK: Tensor, pool_BK: Tensor, time: int) -> Tensor:
        """(B, 1): whether the best open beam may still change what is returned. Not so for NaN."""
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
    longest: Sequence[int],
    processors: _Processors,
    end_id: int,
) -> list[list[Hypothesis]]:
    beams, device = batch.beams, batch.device
    rules = _Rules(options, longest, beams, device)
    tokens_BQ, running_BQ = batch.begin_B1, torch.zeros(len(options), 1, device=device)
    # The best ended hypotheses, best first: their scores, and which candidates they are, as
    # time * K + rank.
    pool_BK = torch.full((len(options), beams), -math.inf, device=device)
    place_BK = torch.zeros(len(options), beams, dtype=torch.long, device=device)
    places_TK = torch.arange(max(longest) * beams, device=device).view(-1, beams)
    pools: list[list[_End]] = [[] for _ in options]
    history: list[_Moment] = []

    while True:
        time, rows = batch.time, batch.rows
        own_BQV = torch.log_softmax(batch.step(tokens_BQ), dim=-1)
        total_BQV = processors.penalise(own_BQV) + running_BQ.unsqueeze(2)
        processors.ban(total_BQV, time)

        # The best candidates, best first: each beam ends at most one, so that K of 2K go on.
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
        pool_BK, best_BK = torch.cat([pool_BK, score_BK], dim=1).topk(beams)
        places_BK = places_TK[time].expand(len(rows), -1)
        place_BK = torch.cat([place_BK, places_BK], dim=1).gather(1, best_BK)

        # The only wait for the device in a step.
        is_open = rules.is_open(running_BQ, pool_BK, time).flatten().tolist()
        if not all(is_open):
            scores, places = pool_BK.tolist(), place_BK.tolist()
            running, before = running_BQ[:, 0].tolist(), before_BQ[:, 0].tolist()
            for row in (row for row, stays in enumerate(is_open) if not stays):
                if math.isnan(scores[row][0] + running[row]):
                    raise RuntimeError(NOT_A_NUMBER)
                option, pool = options[rows[row]], pools[rows[row]]
                for score, place in zip(scores[row], places[row], strict=True):
                    if score > -math.inf and len(pool) < option.num_return_sequences:
                        pool.append(_End(score, *divmod(place, beams)))
                if not pool:
                    # A dead end: nothing may follow, nothing has ended. The first beam was best.
                    norm = max(time, 1) ** option.length_penalty
                    pool.append(_End(before[row] / norm, time - 1, None))
            stay = batch.leave(is_open)
            if not batch.rows:
                break
            tokens_BQ, parents_BK, running_BQ = tokens_BQ[stay], parents_BK[stay], running_BQ[stay]
            pool_BK, place_BK = pool_BK[stay], place_BK[stay]
            processors.keep(stay)
            rules.keep(stay)
        batch.follow(parents_BK)
        processors.write(tokens_BQ, parents_BK)

    moments = _read(history)
    return [
        [_trace(moments, photo, end, end_id) for end in pool] for photo, pool in enumerate(pools)
    ]


class _Moment(NamedTuple):
    """What one step decided, as tensors (rows, ...)."""

    rows: list[int]  # the photo in each row
    whole: tuple[Tensor, ...]  # int64
    real: tuple[Tensor, ...]  # float32


class _Read(NamedTuple):
    """A moment on the host."""

    rows: list[int]
    whole: list[list[list[int]]]
    real: list[list[list[float]]]


class _End(NamedTuple):
    """Where a hypothesis ends: at the candidate of this rank, or (None) with the first beam."""

    score: float
    time: int
    rank: int | None


def _read(history: Sequence[_Moment]) -> list[_Read]:
    """Brings a history to the host in two transfers."""
    whole: Iterator[list[list[int]]] = _lists([t for moment in history for t in moment.whole])
    real: Iterator[list[list[float]]] = _lists([t for moment in history for t in moment.real])
    return [
        _Read(m.rows, [next(whole) for _ in m.whole], [next(real) for _ in m.real]) for m in history
    ]


def _lists(tensors: list[Tensor]) -> Iterator[list[list[NUMBER]]]:
    flat = torch.cat([t.flatten() for t in tensors]).cpu().split([t.numel() for t in tensors])
    return (part.view(t.shape).tolist() for part, t in zip(flat, tensors, strict=True))


def _trace(moments: Sequence[_Read], photo: int, end: _End, end_id: int) -> Hypothesis:
    """Reads a hypothesis off a beam search's history, backwards."""
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
    longest: Sequence[int],
    processors: _Processors,
    end_id: int,
    hear: Callable[[int, int], None] | None,
) -> list[list[Hypothesis]]:
    """Greedy search and sampling: sequences that never compete for a place."""
    beams, device = batch.beams, batch.device
    sampler = None
    if any(o.do_sample for o in options):
        sampler = _Sampler(options, longest, beams, device)
    last_BT = (torch.arange(1, max(longest) + 1) == _column(longest)).to(device)
    open_BK = torch.arange(beams, device=device) < _column([o.rows for o in options], device)
    tokens_BQ = batch.begin_B1
    history: list[_Moment] = []

    while True:
        time, rows = batch.time, batch.rows
        # At first there is one query, and each sample goes its own way from it.
        logits_BKV = batch.step(tokens_BQ).expand(-1, beams, -1)
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
        tokens_BQ = scores_BKV.argmax(-1)
        if sampler is not None:
            tokens_BQ = sampler.draw(logs_BKV, tokens_BQ, time)
        gain_BK = own_BKV.gather(2, tokens_BQ.unsqueeze(2)).squeeze(2)
        log_BK = gain_BK
        if logs_BKV is not own_BKV:
            log_BK = logs_BKV.gather(2, tokens_BQ.unsqueeze(2)).squeeze(2)
        history.append(_Moment(rows, (tokens_BQ,), (gain_BK, log_BK)))
        # NaN is a dead end, where nothing may follow, or a broken model; it is told apart below.
        open_BK = open_BK & (tokens_BQ != end_id) & (log_BK == log_BK)
        open_BK = open_BK & ~last_BT[:, time : time + 1]

        # The only wait for the device in a step, but for those who listen.
        if hear is not None:
            heard = zip(rows, tokens_BQ[:, 0].tolist(), log_BK[:, 0].tolist(), strict=True)
            for photo, token, log in heard:
                if options[photo].rows == 1 and token != end_id and not math.isnan(log):
                    hear(photo, token)
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
    found = []
    for photo, o in enumerate(options):
        samples = [_sequence(moments, photo, k, o, end_id) for k in range(o.rows)]
        samples.sort(key=lambda sample: -sample.score)
        found.append(samples)
        if hear is not None and o.rows > 1:
            for token in samples[0].ids:
                hear(photo, token)
    return found


def _sequence(
    moments: Sequence[_Read], photo: int, k: int, options: DecodeOptions, end_id: int
) -> Hypothesis:
    """Reads the k-th sequence of a photo off a greedy search's or a sampling's history."""
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
    score = total / max(len(ids), 1) ** options.length_penalty
    return _hypothesis(ids, log_probs, score, end_id)


class _Sampler:
    """Temperature, top-k and top-p, and the drawing; rows that do not sample pass through."""

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
        """The scores of what may be drawn, the others -inf; a copy if anything changes."""
        if self.heats:
            # From the best downwards, so that a tiny temperature does not overflow.
            scores_BKV = scores_BKV - scores_BKV.amax(-1, keepdim=True)
            scores_BKV = scores_BKV / self.temperature_B11
        if self.top_k:
            best = scores_BKV.topk(self.top_k).values
            least = best.gather(2, (self.top_k_B11 - 1).clamp(min=0).expand(-1, best.size(1), -1))
            # Equals of the k-th stay, as in Hugging Face.
            out = (scores_BKV < least) & (self.top_k_B11 > 0)
            scores_BKV = scores_BKV.masked_fill(out, -math.inf)
        if self.cuts:
            # Nucleus (Holtzman et al. 2020): the tail whose probability sums to at most 1 - top_p
            # goes, the best token never.
            ordered, order = scores_BKV.sort(dim=-1)
            out = (ordered.softmax(-1).cumsum(-1) <= self.cut_B11) & (self.cut_B11 > 0)
            out[:, :, -1] = False
            scores_BKV = scores_BKV.masked_fill(out.scatter(2, order, out), -math.inf)
        return scores_BKV

    def draw(self, logs_BKV: Tensor, best_BK: Tensor, time: int) -> Tensor:
        """Tokens (B, K) by inversion of the cumulative distribution, in double precision; a token
        of probability 0 is never drawn. `best` where a photo does not sample."""
        heights_BKV = logs_BKV.double().exp().cumsum(-1)
        target_BK1 = self.uniforms_BKT[:, :, time : time + 1] * heights_BKV[:, :, -1:]
        drawn_BK = torch.searchsorted(heights_BKV, target_BK1, right=True).squeeze(2)
        # Only NaN, which is dealt with later, leads past the last token.
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
    """The `count` greatest of each row, best first, and where: `topk`, which is slow over many.

    The greatest lie in the blocks with the greatest maxima (or tie with them), and a maximum is
    found at the speed of memory. Rows that are too short are filled with -inf at 0. Exports script
    it, so it sees no globals.
    """
    photos, width = scores_BN.shape
    if not scores_BN.is_cpu or width < 2**15:  # from here on blocks are faster (measured)
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
    # What is left over at the end counts as one block more.
    near = torch.cat([near, scores_BN[:, blocks * block :]], dim=1)
    block_BC = F.pad(block_BC, [0, 1], value=float(blocks))
    value_BC, where_BC = near.topk(count)
    return value_BC, block_BC.gather(1, where_BC // block) * block + where_BC % block
