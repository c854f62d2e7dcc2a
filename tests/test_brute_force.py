"""The search against an enumeration of all captions, on random tables of probabilities."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from handler.beam_search import DecodeOptions, InvalidParameter, KeysValues, SpecialIds, search

BEGIN, END = 0, 1
SPECIAL = SpecialIds(BEGIN, END, [BEGIN])


class Table:
    """A decoder whose next token depends on the whole text so far, by a table: log-probabilities of
    each token after each text, drawn from a seed. Two photos have two tables."""

    def __init__(self, vocabulary: int, length: int, seed: int, photos: int = 1) -> None:
        self.vocab_size, self.max_positions = vocabulary, length + 1
        generator = torch.Generator().manual_seed(seed)
        self.logs: list[dict[tuple[int, ...], Tensor]] = [
            {
                text: torch.randn(vocabulary, generator=generator).mul(2).log_softmax(0)
                for size in range(length + 1)
                for text in itertools.product(range(vocabulary), repeat=size)
            }
            for _ in range(photos)
        ]

    def begin(self, memory_BPD: Tensor) -> KeysValues:
        """The number of each photo's table is its memory."""
        return KeysValues([memory_BPD], [memory_BPD])

    def new_cache(self, photos: int, slots: int) -> KeysValues:
        """A slot holds its token, in the shape of keys (photos, 1, slots, 1)."""
        slots_B1S1 = torch.zeros(photos, 1, slots, 1)
        return KeysValues([slots_B1S1], [slots_B1S1])

    def prefill(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQQ: Tensor,
        real_BQ: Tensor,
        cache: KeysValues,
        cross: KeysValues,
    ) -> Tensor:
        assert real_BQ[:, -1].all()
        assert (mask_BQQ & real_BQ.unsqueeze(1))[real_BQ].sum() == (positions_BQ + 1)[real_BQ].sum()
        cache.keys[0][:, 0, : tokens_BQ.size(1) - 1, 0] = tokens_BQ[:, :-1]
        last = (tokens_BQ[:, -1:], positions_BQ[:, -1:], mask_BQQ[:, -1:])
        return self.step(*last, cache, tokens_BQ.size(1) - 1, cross)

    def step(
        self,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor,
        cache: KeysValues,
        used: int,
        cross: KeysValues,
    ) -> Tensor:
        photos, queries = tokens_BQ.shape
        cache.keys[0][:, 0, used : used + queries, 0] = tokens_BQ
        logits = torch.empty(photos, queries, self.vocab_size)
        for b, q in itertools.product(range(photos), range(queries)):
            seen = cache.keys[0][b, 0, : used + queries, 0][mask_BQS[b, q]].long().tolist()
            assert len(seen) == int(positions_BQ[b, q]) + 1, "a query sees its own history"
            logits[b, q] = self.logs[int(cross.keys[0][b, 0, 0])][tuple(seen[1:])]
        return logits


def memory(*tables: int) -> Tensor:
    return torch.tensor(tables, dtype=torch.float).view(-1, 1, 1)


def repeats(prompt: tuple[int, ...], text: tuple[int, ...], size: int) -> bool:
    """Whether the text ends an n-gram that was there before; begin token and prompt count."""
    whole = (BEGIN, *prompt, *text)
    grams = [whole[i : i + size] for i in range(len(whole) - size + 1)]
    new = range(max(0, len(grams) - len(text)), len(grams))
    return any(grams[i] in grams[:i] for i in new)


def penalised(logs: Tensor, text: tuple[int, ...], penalty: float) -> Tensor:
    """Scores after the repetition penalty (Keskar et al. 2019): log-probabilities are below 0."""
    scores = logs.clone()
    for token in {BEGIN, *text}:
        scores[token] *= penalty
    return scores


def every_caption(
    table: dict[tuple[int, ...], Tensor],
    options: DecodeOptions,
    vocabulary: int,
    longest: int,
    prompt: tuple[int, ...] = (),
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(score, ids with the end where there is one) of every caption that the options allow."""
    size = options.no_repeat_ngram_size
    for length in range(longest + 1):
        for text in itertools.product(
            (t for t in range(vocabulary) if t not in (BEGIN, END)), repeat=length
        ):
            whole = text if length == longest else (*text, END)
            if length < options.min_new_tokens and whole[-1:] == (END,):
                continue
            if size and repeats(prompt, whole, size):
                continue
            total = 0.0
            for position, token in enumerate(whole):
                before = (*prompt, *whole[:position])
                scores = penalised(table[before], before, options.repetition_penalty)
                total += float(scores[token])
            yield total / len(whole) ** options.length_penalty, whole


CASES = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": -1.5},
    {"length_penalty": 2.0},
    {"early_stopping": False},
    {"min_new_tokens": 2},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 1},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_wide_beam_finds_the_best_captions(fields, seed):
    """Vocabularies of 4 with captions of 3 tokens have fewer texts than 16 beams hold."""
    vocabulary, longest = 4, 3
    table = Table(vocabulary, longest, seed)
    options = DecodeOptions(num_beams=16, num_return_sequences=3, max_new_tokens=longest, **fields)
    found = search(table, memory(0), [options], SPECIAL)[0]
    exact = sorted(every_caption(table.logs[0], options, vocabulary, longest), reverse=True)
    for hypothesis, (score, ids) in zip(found, exact, strict=False):
        ended = (*hypothesis.ids, END) if hypothesis.finished else tuple(hypothesis.ids)
        assert ended == ids
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
        own = [float(table.logs[0][ids[:i]][token]) for i, token in enumerate(ids)]
        assert hypothesis.token_log_probs == pytest.approx(own, abs=1e-5)
    assert len(found) == min(3, len(exact))


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy(seed):
    table = Table(5, 4, seed)
    [found] = search(table, memory(0), [DecodeOptions(num_beams=1, max_new_tokens=4)], SPECIAL)[0]
    text: tuple[int, ...] = ()
    while len(text) < 4 and END not in text:
        logs = table.logs[0][text].clone()
        logs[BEGIN] = -math.inf
        text = (*text, int(logs.argmax()))
    assert tuple(found.ids) == tuple(token for token in text if token != END)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_prompts_of_all_lengths_in_one_batch(fields):
    """The best captions behind each prompt: its tokens count for n-grams and penalties, and for no
    length and no score."""
    vocabulary, longest = 4, 3
    prompts = [(), (2,), (3, 3), (2, 3, 2)]
    table = Table(vocabulary, longest + 3, 7)
    options = DecodeOptions(num_beams=16, num_return_sequences=3, max_new_tokens=longest, **fields)
    batch = [options] * len(prompts)
    found = search(table, memory(0, 0, 0, 0), batch, SPECIAL, prompts=prompts)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        every = every_caption(table.logs[0], options, vocabulary, longest, prompt)
        exact = sorted(every, reverse=True)
        for hypothesis, (score, ids) in zip(hypotheses, exact, strict=False):
            assert (*hypothesis.ids, *[END] * hypothesis.finished) == ids
            assert hypothesis.score == pytest.approx(score, abs=1e-5)
            own = [float(table.logs[0][(*prompt, *ids[:i])][token]) for i, token in enumerate(ids)]
            assert hypothesis.token_log_probs == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize(
    ("positions", "prompt", "longest", "message"),
    [
        (9, 4, 4, None),
        (9, 5, 1, "prompt has 5 tokens; the maximum is 4"),
        (9, 4, 5, "max_new_tokens must be an integer from 1 to 4, the model's limit after a"),
        (9, 0, 8, None),
        (2, 1, 1, "prompt has 1 tokens; the maximum is 0"),
        (3, 1, 1, None),
    ],
)
def test_positions_bound_prompts_and_what_follows(positions, prompt, longest, message):
    table = Table(3, positions - 1, 0)
    arguments = (table, memory(0), [DecodeOptions(max_new_tokens=longest)], SPECIAL)
    if message is None:
        [[found]] = search(*arguments, prompts=[[2] * prompt])
        assert len(found.token_log_probs) <= longest
        return
    with pytest.raises(InvalidParameter, match=message) as refused:
        search(*arguments, prompts=[[2] * prompt])
    assert refused.value.field == message.split()[0]


def test_a_batch_is_as_one_at_a_time():
    """Rows of one batch with options and prompts of their own: every kind beside every other."""
    photos = 12
    table = Table(4, 6, 99, photos)
    chance = random.Random(0)
    options, prompts = [], []
    for _ in range(photos):
        fields = dict(chance.choice(CASES))
        beams = chance.choice([1, 2, 3, 5])
        sampling = chance.random() < 0.3
        if sampling:
            fields |= {"do_sample": True, "seed": chance.randrange(100), "temperature": 0.8}
        else:
            fields |= {"num_beams": beams}
        options.append(DecodeOptions(max_new_tokens=chance.choice([1, 3, 4]), **fields))
        if options[-1].min_new_tokens > (options[-1].max_new_tokens or 0):
            options[-1] = DecodeOptions(num_beams=2, max_new_tokens=4)
        prompts.append(chance.choices([2, 3], k=chance.choice([0, 1, 2])))
    batch = memory(*range(photos))
    together = search(table, batch, options, SPECIAL, prompts=prompts)
    for number, (own, found) in enumerate(zip(options, together, strict=True)):
        prompt = [prompts[number]]
        [alone] = search(table, memory(number), [own], SPECIAL, prompts=prompt)
        assert [h.ids for h in alone] == [h.ids for h in found]
        assert [h.score for h in alone] == pytest.approx([h.score for h in found], abs=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_is_no_text(beams):
    """Begin tokens stand for padding. Where the begin token ends captions, too (GPT-2), those of a
    longer neighbour's padding made an n-gram with it, which banned the end at first."""
    table = Table(4, 6, 3)
    table.logs[0][()][END] = 5.0
    options = [DecodeOptions(num_beams=beams, max_new_tokens=3, no_repeat_ngram_size=2)] * 2
    special = SpecialIds(END, END)
    [[best, *_], _] = search(table, memory(0, 0), options, special, prompts=[[], [2, 3, 2]])
    assert (best.ids, best.finished) == ([], True)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_dead_end_has_the_score_of_what_was_said(beams, length_penalty):
    """Where everything is banned the text so far is the caption, with its own score, divided by its
    own length as that of every other caption."""
    table = Table(4, 5, 5)
    fields = {"no_repeat_ngram_size": 1, "min_new_tokens": 5, "max_new_tokens": 5}
    options = DecodeOptions(num_beams=beams, length_penalty=length_penalty, **fields)
    [[found]] = search(table, memory(0), [options], SPECIAL)
    first, logs = table.logs[0][()], {}
    for ids in ((2, 3), (3, 2)):
        logs[ids] = [float(first[ids[0]]), float(table.logs[0][ids[:1]][ids[1]])]
    if beams > 1:
        ids = max(logs, key=lambda text: sum(logs[text]))
        total = sum(logs[ids])
    else:
        # Of one sequence alone the score is that of the distribution it was drawn from: two tokens
        # are left at first, then one.
        ids = max(logs, key=lambda text: logs[text][0])
        total = float(first[2:].log_softmax(0).max())
    assert found.ids == list(ids) and not found.finished
    assert found.score == pytest.approx(total / 2**length_penalty, abs=1e-6)
    assert found.token_log_probs == pytest.approx(logs[ids], abs=1e-6)


def test_a_first_token_counts_in_the_length_of_a_dead_end():
    """BART's first token is given and counts as generated (see `_text`)."""
    table = Table(4, 5, 5)
    fields = {"no_repeat_ngram_size": 1, "min_new_tokens": 5, "max_new_tokens": 5}
    options = DecodeOptions(num_beams=2, length_penalty=1.5, **fields)
    [[found]] = search(table, memory(0), [options], SpecialIds(BEGIN, END, [BEGIN], 2))
    assert found.ids == [3] and not found.finished
    assert found.score == pytest.approx(float(table.logs[0][(2,)][3]) / 2**1.5, abs=1e-6)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 1}, {"do_sample": True}])
@pytest.mark.parametrize("position", [0, 2])
def test_a_model_whose_output_is_no_number_is_an_error(options, position):
    """Both guards: in the beam search's pool, and where a sequence is read."""
    table = Table(4, 3, 1)
    for text in table.logs[0]:
        if len(text) == position:
            table.logs[0][text] = torch.full((4,), math.nan)
    with pytest.raises(RuntimeError, match="not a number|no number|NaN"):
        search(
            table, memory(0), [DecodeOptions(max_new_tokens=3, min_new_tokens=3, **options)],
            SPECIAL,
        )  # fmt: skip
