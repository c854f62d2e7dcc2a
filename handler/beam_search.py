"""Greedy search, sampling and beam search, batched, over a decoder's step function.

The semantics are those of Hugging Face's `generate` (transformers, generation/utils.py:
`_beam_search` and `_sample`; logits_process.py), so that the same model gives the same sequences
and scores:

- beam search ranks by the sum of processed log-probabilities over n ** length_penalty, where n
  counts the generated tokens, end token included; a beam that reaches `max_new_tokens` counts as
  finished; of the best 2K continuations only ends among the first K are kept;
- processors act on log-softmax in beam search and on raw logits in greedy search and sampling; the
  begin token counts as context for repetition penalty and n-grams;
- `early_stopping` false and true stop by Hugging Face's rules.

Where it deviates: under `never` a photo stops as soon as no open beam can still enter the best
`num_return_sequences` (Hugging Face waits for the worst of all K; the captions are the same).
Greedy search and sampling have a score too: the processed log-probabilities, normalised, over
n ** length_penalty. `suppress` lists ids that are never written (padding, begin, <unk>); the
model's own log-probabilities are not touched by it. Of equal candidates torch.topk decides.

Nothing is copied per beam: cross-attention keys belong to the photo, and the self-attention cache
stays in place while an ancestry mask says which slots a beam descends from. The token of beam k at
time t lies in slot t * K + k.

Dimension key: B photos, K beams (the most that any photo of the batch asks for; the others' surplus
beams are dead), V vocabulary, S slots, T time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from handler.errors import UserError

MAX_BEAMS = 16
# What Hugging Face uses for "impossible": finite, so that dead beams stay ordered among themselves.
IMPOSSIBLE = -1.0e9


class InvalidParameter(UserError):
    """A decoding option out of its range; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(name, f"{name} must be an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, open_low: bool) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or value > high or value < low or (open_low and value == low):
        raise InvalidParameter(
            name, f"{name} must be a number {'above' if open_low else 'from'} {low:g} to {high:g}"
        )


def _truth(name: str, value: Any) -> None:
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
        most = MAX_BEAMS if self.do_sample else self.beams
        _integer("num_return_sequences", self.num_return_sequences, 1, most)
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens or 2**31)
        _number("length_penalty", self.length_penalty, -5, 5, False)
        if self.early_stopping != "never" and not isinstance(self.early_stopping, bool):
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
            _integer("max_new_tokens", self.max_new_tokens, 1, longest)
        _integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens or longest)
        _integer("top_k", self.top_k, 0, vocab_size)
        return self.max_new_tokens or longest, self.top_k


@dataclass(frozen=True)
class Hypothesis:
    """One decoded caption: `ids` without begin and end token; `token_log_probs` of the model
    itself, one an id and one more when the end token was reached (`finished`)."""

    ids: list[int]
    token_log_probs: list[float]
    score: float
    finished: bool


class _Rows:
    """The options of the photos in a batch as columns (B, 1) or (B, 1, 1)."""

    def __init__(
        self, options: Sequence[DecodeOptions], decoder: Any, device: torch.device
    ) -> None:
        limits = [o.limits(decoder.vocab_size, decoder.max_positions) for o in options]

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        self.rows = column([o.rows for o in options], torch.long)
        self.returned = column([o.num_return_sequences for o in options], torch.long)
        self.longest = column([limit[0] for limit in limits], torch.long)
        self.shortest = column([o.min_new_tokens for o in options], torch.long)
        self.penalty = column([o.length_penalty for o in options], torch.float32)
        self.never = column([o.early_stopping == "never" for o in options], torch.bool)
        self.early = column([o.early_stopping is True for o in options], torch.bool)
        self.ngram = column([o.no_repeat_ngram_size for o in options], torch.long)
        self.repetition = column([o.repetition_penalty for o in options], torch.float32)
        # One beam decides at once, whether it samples or takes the best.
        self.single = column([o.do_sample or o.beams == 1 for o in options], torch.bool)
        self.sample = column([o.do_sample for o in options], torch.bool)
        self.temperature = column(
            [o.temperature if o.do_sample else 1.0 for o in options], torch.float32
        )
        self.top_k = column(
            [limit[1] if o.do_sample else 0 for o, limit in zip(options, limits, strict=True)],
            torch.long,
        )
        self.top_p = column([o.top_p if o.do_sample else 1.0 for o in options], torch.float32)
        # Work that no photo asked for is not done.
        self.any_minimum = any(o.min_new_tokens for o in options)
        self.ngrams = sorted({o.no_repeat_ngram_size for o in options} - {0})
        self.any_repetition = any(o.repetition_penalty != 1 for o in options)
        self.any_sample = any(o.do_sample for o in options)
        self.any_single = bool(self.single.any())
        self.any_beam = not bool(self.single.all())
        self.any_top = any(o.do_sample and (o.top_k or o.top_p < 1) for o in options)

    def keep(self, live: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[live])


def search(
    decoder: Any,
    memory_BPD: Tensor,
    options: Sequence[DecodeOptions],
    begin_id: int,
    end_id: int,
    suppress: Sequence[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decodes each photo by its own options: a list (photos) of lists (best first).

    `memory` (B, P, D) is the encoder's; `decoder` has `begin`, `new_cache`, `step` (see
    `training.model.Decoder`). `on_token(photo, token id)` hears of each token of a photo's first
    sequence, end token left out, as it is decided: for greedy search and sampling only. Raises
    InvalidParameter for options that the model is too small for, RuntimeError for a model whose
    output is no number.
    """
    if not options:
        return []
    device = memory_BPD.device
    rows = _Rows(options, decoder, device)
    photos, beams = len(options), max(o.rows for o in options)
    longest = int(rows.longest.max())
    uniforms = _uniforms(options, beams, longest, device) if rows.any_sample else None

    cross = decoder.begin(memory_BPD)
    cache = decoder.new_cache(photos, longest * beams)
    photo = torch.arange(photos, device=device)  # which photo each row of the batch is
    arange_K = torch.arange(beams, device=device)
    tokens_BK = torch.full((photos, beams), begin_id, device=device)
    mask_BKS = torch.zeros(photos, beams, 0, dtype=torch.bool, device=device)
    own_1KK = torch.eye(beams, dtype=torch.bool, device=device).unsqueeze(0)
    # Open sequences, newest token last, begin token first; and their log-probabilities.
    text_BKT = tokens_BK.unsqueeze(2)
    logs_BKT = torch.zeros(photos, beams, 0, device=device)
    # Only the first beam is alive at first: all are equal. Independent samples are all alive.
    dead_BK = arange_K >= torch.where(rows.single, rows.rows, torch.ones_like(rows.rows))
    sums_BK = torch.zeros(photos, beams, device=device).masked_fill(dead_BK, IMPOSSIBLE)
    # The finished sequences of each photo, best first; slots beyond its own beams stay empty.
    done_text = torch.zeros(photos, beams, longest, dtype=torch.long, device=device)
    done_logs = torch.zeros(photos, beams, longest, device=device)
    done_length = torch.zeros(photos, beams, dtype=torch.long, device=device)
    done_score = torch.full((photos, beams), IMPOSSIBLE, device=device)
    done_ended = torch.zeros(photos, beams, dtype=torch.bool, device=device)
    done = (done_text, done_logs, done_length, done_score, done_ended)
    hopeful = torch.ones(photos, 1, dtype=torch.bool, device=device)
    open_BK = ~dead_BK  # samples (and the greedy beam) that have not ended
    results: list[list[Hypothesis]] = [[] for _ in options]

    for time in range(longest):
        length = time + 1  # tokens generated once this step is decided
        mask_BKS = torch.cat([mask_BKS, own_1KK.expand(len(photo), -1, -1)], dim=2)
        positions_BK = torch.full_like(tokens_BK, time)
        logits_BKV = decoder.step(tokens_BK, positions_BK, mask_BKS, cache, time * beams, cross)
        own_BKV = torch.log_softmax(logits_BKV, dim=-1)
        at_limit = rows.longest == length

        if rows.any_single:
            scores_BKV = _processed(logits_BKV, text_BKT, rows, length, end_id, suppress)
            scores_BKV = scores_BKV / rows.temperature.unsqueeze(2)
            picked, gain = _pick(scores_BKV, rows, uniforms, time)
            single_parent = arange_K.expand_as(picked)
            single_sums = sums_BK + gain
        if rows.any_beam:
            scores_BKV = _processed(own_BKV, text_BKT, rows, length, end_id, suppress)
            flat = (scores_BKV + sums_BK.unsqueeze(2)).flatten(1)
            vocab = scores_BKV.size(2)
            count = min(2 * beams, flat.size(1))
            top, where = flat.topk(count, dim=1)
            parent, token = where // vocab, where % vocab
            ends = (token == end_id) | at_limit
            # Open beams: the best K (of this photo) continuations that do not end.
            own_2K = torch.arange(count, device=device) < 2 * rows.rows
            open_scores = top.masked_fill(ends | ~own_2K, IMPOSSIBLE)
            open_scores = torch.where(ends & own_2K, top + IMPOSSIBLE, open_scores)
            next_sums, chosen = open_scores.topk(beams, dim=1)
            beam_parent = parent.gather(1, chosen)
            beam_token = token.gather(1, chosen)
            next_sums = next_sums.masked_fill(arange_K >= rows.rows, IMPOSSIBLE)
            # Ends: only those among the first K candidates count.
            full = _worst(done_score, rows.rows) > IMPOSSIBLE / 2
            eligible = ends & (torch.arange(count, device=device) < rows.rows)
            eligible &= ~(full & rows.early) & hopeful & ~rows.single
            ended = top / length**rows.penalty
            ended = ended.masked_fill(~eligible, IMPOSSIBLE)
            own_logs = own_BKV.flatten(1).gather(1, where)
            done = _merge(
                done, ended, parent, token, own_logs, text_BKT, logs_BKT, length, end_id, rows
            )
            done_score = done[3]

        if rows.any_single and rows.any_beam:
            parent_BK = torch.where(rows.single, single_parent, beam_parent)
            tokens_BK = torch.where(rows.single, picked, beam_token)
            sums_BK = torch.where(rows.single, single_sums, next_sums)
        elif rows.any_single:
            parent_BK, tokens_BK, sums_BK = single_parent, picked, single_sums
        else:
            parent_BK, tokens_BK, sums_BK = beam_parent, beam_token, next_sums

        gained = own_BKV[torch.arange(len(photo), device=device).unsqueeze(1), parent_BK, tokens_BK]
        text_BKT = torch.cat([_follow(text_BKT, parent_BK), tokens_BK.unsqueeze(2)], dim=2)
        logs_BKT = torch.cat([_follow(logs_BKT, parent_BK), gained.unsqueeze(2)], dim=2)
        mask_BKS = _follow(mask_BKS, parent_BK)

        finished = torch.zeros_like(hopeful)
        if rows.any_single:
            if on_token is not None:
                _tell(on_token, photo, tokens_BK, open_BK, rows, end_id)
            ends_BK = open_BK & ((tokens_BK == end_id) | at_limit) & rows.single
            done = _close(
                done, ends_BK, tokens_BK, text_BKT, logs_BKT, sums_BK, length, end_id, rows
            )
            done_score = done[3]
            open_BK = open_BK & ~ends_BK
            finished = rows.single & ~open_BK.any(1, keepdim=True)
        if rows.any_beam:
            hopeful = hopeful & _can_improve(sums_BK, done_score, rows, length)
            full = _worst(done_score, rows.rows) > IMPOSSIBLE / 2
            stop = ~hopeful | (full & rows.early) | at_limit
            finished = torch.where(rows.single, finished, stop)

        if bool(finished.any()) or length == longest:  # the only wait for the device in a step
            if not bool(torch.isfinite(done_score).all()):
                raise RuntimeError("the model's output is no number; its weights are damaged")
            _collect(results, photo[finished[:, 0]], [d[finished[:, 0]] for d in done], options)
            live = (~finished[:, 0]).nonzero()[:, 0]
            if not len(live):
                break
            photo, hopeful, open_BK = photo[live], hopeful[live], open_BK[live]
            tokens_BK, sums_BK, mask_BKS = tokens_BK[live], sums_BK[live], mask_BKS[live]
            text_BKT, logs_BKT = text_BKT[live], logs_BKT[live]
            done = tuple(d[live] for d in done)  # type: ignore[assignment]
            done_score = done[3]
            cache = [slots[live] for slots in cache]
            cross = [keys[live] for keys in cross]
            uniforms = None if uniforms is None else uniforms[live]
            rows.keep(live)
    return results


def _follow(x_BKT: Tensor, parent_BK: Tensor) -> Tensor:
    """The rows of each beam's parent."""
    return x_BKT.gather(1, parent_BK.unsqueeze(2).expand(-1, -1, x_BKT.size(2)))


def _uniforms(
    options: Sequence[DecodeOptions], beams: int, longest: int, device: torch.device
) -> Tensor:
    """Random numbers (B, K, T) in [0, 1): each photo's from a generator of its own, drawn up front,
    so that they depend on its seed and nothing else."""
    drawn = torch.zeros(len(options), beams, longest, dtype=torch.float64)
    for row, o in zip(drawn, options, strict=True):
        if o.do_sample:
            generator = torch.Generator()
            if o.seed is None:
                generator.seed()
            else:
                generator.manual_seed(o.seed)
            # Drawn time by time: a longer limit in the batch appends, and changes nothing before.
            for time in range(longest):
                row[: o.rows, time] = torch.rand(o.rows, generator=generator, dtype=torch.float64)
    return drawn.to(device)


def _processed(
    scores_BKV: Tensor,
    text_BKT: Tensor,
    rows: _Rows,
    length: int,
    end_id: int,
    suppress: Sequence[int],
) -> Tensor:
    """Hugging Face's logits processors, in its order; ids of `suppress` become impossible."""
    copied = False
    if rows.any_repetition:
        seen = scores_BKV.gather(2, text_BKT)
        penalty = rows.repetition.unsqueeze(2)
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        scores_BKV, copied = scores_BKV.scatter(2, text_BKT, seen), True
    if suppress or rows.ngrams or rows.any_minimum:
        scores_BKV = scores_BKV if copied else scores_BKV.clone()
    if suppress:
        scores_BKV[:, :, list(suppress)] = -math.inf
    for size in rows.ngrams:
        _ban_ngrams(scores_BKV, text_BKT, size, (rows.ngram == size).unsqueeze(2))
    if rows.any_minimum:
        too_short = (rows.shortest >= length).expand(-1, scores_BKV.size(1))
        ends = scores_BKV[:, :, end_id]
        scores_BKV[:, :, end_id] = ends.masked_fill(too_short, -math.inf)
    return scores_BKV


def _ban_ngrams(scores_BKV: Tensor, text_BKT: Tensor, size: int, asked_B11: Tensor) -> None:
    """Makes impossible, in place, what would complete an n-gram that stands in the text already."""
    if text_BKT.size(2) < size:
        return
    windows = text_BKT.unfold(2, size, 1)  # (B, K, T - size + 1, size)
    tail = text_BKT[:, :, text_BKT.size(2) - size + 1 :].unsqueeze(2)
    repeats = (windows[..., : size - 1] == tail).all(-1) & asked_B11
    last = windows[..., -1]
    banned = torch.zeros_like(scores_BKV).scatter_add(2, last, repeats.to(scores_BKV.dtype))
    scores_BKV.masked_fill_(banned > 0, -math.inf)


def _pick(
    scores_BKV: Tensor, rows: _Rows, uniforms: Tensor | None, time: int
) -> tuple[Tensor, Tensor]:
    """The token (B, K) that greedy search or sampling takes, and its processed log-probability."""
    if rows.any_top:
        scores_BKV = _top(scores_BKV, rows)
    logs_BKV = torch.log_softmax(scores_BKV, dim=-1)
    token = scores_BKV.argmax(-1)
    if uniforms is not None:
        # Inverse of the cumulative distribution, in double precision.
        heights = logs_BKV.double().exp().cumsum(-1)
        target = uniforms[:, :, time : time + 1] * heights[..., -1:]
        drawn = torch.searchsorted(heights, target, right=True).squeeze(2)
        token = torch.where(rows.sample, drawn.clamp(max=scores_BKV.size(2) - 1), token)
    return token, logs_BKV.gather(2, token.unsqueeze(2)).squeeze(2)


def _top(scores_BKV: Tensor, rows: _Rows) -> Tensor:
    """Keeps the top_k best, then the smallest set whose probability reaches top_p (nucleus,
    Holtzman et al. 2020)."""
    ordered, order = scores_BKV.sort(dim=-1, descending=True)
    rank = torch.arange(ordered.size(2), device=ordered.device)
    k = rows.top_k.unsqueeze(2)
    # Ties with the k-th stay, as in Hugging Face.
    kth = ordered.gather(2, (k - 1).clamp(min=0).expand(-1, ordered.size(1), 1))
    ordered = ordered.masked_fill((k > 0) & (ordered < kth), -math.inf)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    p = rows.top_p.unsqueeze(2)
    ordered = ordered.masked_fill((p < 1) & (before >= p) & (rank > 0), -math.inf)
    return torch.empty_like(scores_BKV).scatter_(2, order, ordered)


def _worst(score_BK: Tensor, count_B1: Tensor) -> Tensor:
    """The count-th best score, (B, 1); the scores are sorted, best first."""
    return score_BK.gather(1, count_B1 - 1)


def _can_improve(sums_BK: Tensor, done_score: Tensor, rows: _Rows, length: int) -> Tensor:
    """Whether an open beam may still beat a finished one, (B, 1)."""
    best = sums_BK.max(1, keepdim=True).values
    # The kindest length an open beam can still reach. Hugging Face counts the current one unless
    # `never` and a positive penalty promise more.
    reach = torch.where(
        rows.never & (rows.penalty > 0), rows.longest, torch.full_like(rows.longest, length)
    )
    # Exact under `never`: one more token is the least that an open beam still takes.
    reach = torch.where(rows.never & (rows.penalty <= 0), reach + 1, reach)
    bound = best / reach**rows.penalty
    rank = torch.where(rows.never, rows.returned, rows.rows)
    return bound > _worst(done_score, rank)


Done = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _merge(
    done: Done,
    ended: Tensor,
    parent: Tensor,
    token: Tensor,
    own_logs: Tensor,
    text_BKT: Tensor,
    logs_BKT: Tensor,
    length: int,
    end_id: int,
    rows: _Rows,
) -> Done:
    """The best K of the finished sequences and the candidates that have just ended."""
    text, logs, lengths, scores, is_end = done
    beams = scores.size(1)
    merged = torch.cat([scores, ended], dim=1)
    best, where = merged.topk(beams, dim=1)
    best = best.masked_fill(torch.arange(beams, device=best.device) >= rows.rows, IMPOSSIBLE)
    new_text = torch.cat([_follow(text_BKT, parent)[:, :, 1:], token.unsqueeze(2)], dim=2)
    new_logs = torch.cat([_follow(logs_BKT, parent), own_logs.unsqueeze(2)], dim=2)
    pad = (0, text.size(2) - length)
    text = torch.cat([text, torch.nn.functional.pad(new_text, pad)], dim=1)
    logs = torch.cat([logs, torch.nn.functional.pad(new_logs, pad)], dim=1)
    lengths = torch.cat([lengths, torch.full_like(parent, length)], dim=1)
    is_end = torch.cat([is_end, token == end_id], dim=1)
    return (
        _follow(text, where),
        _follow(logs, where),
        lengths.gather(1, where),
        best,
        is_end.gather(1, where),
    )


def _close(
    done: Done,
    ends_BK: Tensor,
    tokens_BK: Tensor,
    text_BKT: Tensor,
    logs_BKT: Tensor,
    sums_BK: Tensor,
    length: int,
    end_id: int,
    rows: _Rows,
) -> Done:
    """Files the greedy and sampled sequences that have just ended, each in its own slot."""
    text, logs, lengths, scores, is_end = done
    ends_BKT = ends_BK.unsqueeze(2)
    text, logs = text.clone(), logs.clone()
    text[:, :, :length] = torch.where(ends_BKT, text_BKT[:, :, 1:], text[:, :, :length])
    logs[:, :, :length] = torch.where(ends_BKT, logs_BKT, logs[:, :, :length])
    return (
        text,
        logs,
        lengths.masked_fill(ends_BK, length),
        torch.where(ends_BK, sums_BK / length**rows.penalty, scores),
        torch.where(ends_BK, tokens_BK == end_id, is_end),
    )


def _tell(
    on_token: Callable[[int, int], None],
    photo: Tensor,
    tokens_BK: Tensor,
    open_BK: Tensor,
    rows: _Rows,
    end_id: int,
) -> None:
    heard = open_BK[:, 0] & rows.single[:, 0] & (tokens_BK[:, 0] != end_id)
    for index, token in zip(photo[heard].tolist(), tokens_BK[heard, 0].tolist(), strict=True):
        on_token(index, token)


def _collect(
    results: list[list[Hypothesis]],
    photos: Tensor,
    done: Sequence[Tensor],
    options: Sequence[DecodeOptions],
) -> None:
    """Reads the finished photos out as hypotheses."""
    for photo, *columns in zip(photos.tolist(), *(d.tolist() for d in done), strict=True):
        o = options[photo]
        for text, logs, length, score, ended in zip(*columns, strict=True):
            if len(results[photo]) == o.num_return_sequences:
                break
            results[photo].append(
                Hypothesis(text[: length - ended], logs[:length], score, bool(ended))
            )
        if o.do_sample:
            # Samples are best first too, though none of them was searched for.
            results[photo].sort(key=lambda hypothesis: -hypothesis.score)
