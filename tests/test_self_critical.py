"""Self-critical training: its reward is pycocoevalcap's, its gradient that of its samples, its
samples a photo's own, and it earns what it is paid for."""

import dataclasses
import random
import time

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from training.config import SelfCritical, Stage, TrainConfig
from training.data.captions import Captions
from training.data.manifest import Row
from training.model import Decoder, DecoderConfig
from training.objectives.cross_entropy import CrossEntropyLoss
from training.objectives.objective import BesideCrossEntropy, make_loss
from training.objectives.self_critical import END_WORD, CiderD, SelfCriticalLoss, reward_words

WORDS = ("a", "dog", "cat", "man", "runs", "sits", "on", "in", "the", "grass", "with", "ball")


def sentences(seed: int, photos: int, captions: int) -> list[list[str]]:
    """Captions of 0 to 12 words; few words, so that grams repeat and clipping matters."""
    chooser = random.Random(seed)
    return [
        [" ".join(chooser.choices(WORDS, k=chooser.randrange(13))) for _ in range(captions)]
        for _ in range(photos)
    ]


@pytest.mark.parametrize("captions", [1, 5])
def test_the_reward_is_pycocoevalcaps(captions):
    references = sentences(1, 60, captions)
    hypotheses = sentences(2, 60, 1)
    hypotheses[0], hypotheses[1] = references[0][:1], ["zebra zebra zebra"]
    _, theirs = Cider().compute_score(dict(enumerate(references)), dict(enumerate(hypotheses)))
    split = [[text.split() for text in photo] for photo in references]
    cider = CiderD(split)
    ours = [
        score
        for photo, truths in zip(hypotheses, split, strict=True)
        for score in cider.scores([text.split() for text in photo], truths)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert max(ours) > 1 and ours[1] == 0


def test_document_frequencies_may_be_another_splits():
    """Captions of photos outside the corpus are weighed by the corpus."""
    corpus = [[["a", "dog"]], [["a", "cat"]], [["a", "cat", "sits"]], [["a", "man"]]]
    one = CiderD(corpus).scores([["a", "dog"]], [["a", "dog"]])
    # Two sizes of gram agree entirely, the other two are not there.
    assert one == [pytest.approx(10 * 2 / 4)]
    # "a" is in every photo and weighs nothing.
    assert CiderD(corpus).scores([["a"]], [["a", "dog"]]) == [0]


def test_a_caption_that_breaks_off_earns_less_only_if_its_end_counts():
    """The suffix trap: a model that sees a dog on something, but not which of six things, earns
    more for "a dog is standing on a" than for a guess, unless the end is a word of its own."""
    beginnings = ("a dog is standing on a", "a dog on a", "the dog stands on a")
    places = ("sofa", "beach", "road", "roof", "boat", "hill")
    dogs = [[f"{beginning} {place}" for beginning in beginnings] for place in places]
    others = ["two men are playing football in a park", "a woman is walking in the city"]
    documents = [*dogs, *([text] for text in others * 10)]

    def expected(end: list[str], caption: str) -> float:
        split = [[text.split() + end for text in photo] for photo in documents]
        cider = CiderD(split)
        words = caption.split() + end
        return float(np.mean([cider.scores([words], truths)[0] for truths in split[: len(dogs)]]))

    whole, broken = "a dog is standing on a sofa", "a dog is standing on a"
    assert expected([], broken) > 1.1 * expected([], whole), "the trap is there"
    assert expected([END_WORD], broken) < 0.9 * expected([END_WORD], whole), "and closed"


def test_words_of_the_reward():
    assert reward_words("A man's dog, <end> running.") == [
        *("a", "man's", "dog", "end", "running"),
        END_WORD,
    ]
    assert reward_words("A dog", ended=False) == ["a", "dog"]


# Photos of one colour each, as memories; nothing else is needed to learn which is which.
COLOURS = ("red", "green", "blue", "yellow")
ROWS = [
    Row(str(n), f"{n}.png", (f"a {colour} ball on the left", "grass on the right"), "train")
    for n, colour in enumerate(COLOURS * 3)
]
LONGEST = 8


def make(
    choice: SelfCritical, forces_first: bool = False, dropout: float = 0.3
) -> tuple[SelfCriticalLoss, Decoder, torch.Tensor, Captions]:
    torch.manual_seed(0)
    captions = [caption for row in ROWS for caption in row.captions]
    tokenizer = CaptionTokenizer.train(captions, "word", 100, 1)
    tokenizer.first_id = tokenizer.encode("a")[0] if forces_first else None
    config = DecoderConfig(tokenizer.vocab_size, LONGEST + 1, 32, 1, 2, 64, 16, dropout=dropout)
    decoder = Decoder(config).eval()
    memory = torch.eye(4, 16).repeat(3, 1).unsqueeze(1) * 4
    loss = SelfCriticalLoss(choice, ROWS, tokenizer, LONGEST, seed=7)
    return loss, decoder, memory, Captions(ROWS, tokenizer, LONGEST + 1)


@pytest.mark.parametrize("forces_first", [False, True])
def test_log_probabilities_are_those_of_the_search(forces_first):
    """The parallel pass gives each sample what the search drew it with: the tokens that are never
    generated left out, the end token in, and the cut end of an endless one not. A forced first
    token counts as generated, but nothing is learnt from it."""
    loss, decoder, memory, captions = make(SelfCritical(samples=4), forces_first)
    batch = captions.batch(memory, range(12), [False] * 12)
    samples, _, _ = loss.roll_out(decoder, memory, batch, epoch=0)
    assert {s.finished for photo in samples for s in photo} == {True, False}
    nll_BQ, lengths = loss.neg_log_probs(decoder, memory, samples)
    for nll_Q, photo, sizes in zip(nll_BQ, samples, lengths, strict=True):
        parts = nll_Q[: sum(sizes)].split(sizes)
        for part, sample, size in zip(parts, photo, sizes, strict=True):
            # With its length penalty of 1 the search's score is the mean over the tokens.
            assert -part.sum().item() == pytest.approx(sample.score * size, abs=1e-4)
            assert size == forces_first + len(sample.ids) + sample.finished
        assert not nll_Q[sum(sizes) :].any()


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_samples_are_a_photos_own_and_advantages_are_above_the_baseline(baseline):
    loss, decoder, memory, captions = make(SelfCritical(samples=3, baseline=baseline))
    batch = captions.batch(memory, range(12), [False] * 12)
    samples, rewards, advantages = loss.roll_out(decoder, memory, batch, epoch=1)
    alone = captions.batch(memory[5:6], [5], [False])
    [same], _, _ = loss.roll_out(decoder, memory[5:6], alone, epoch=1)
    assert [s.ids for s in same] == [s.ids for s in samples[5]]
    assert loss.roll_out(decoder, memory, batch, epoch=2)[0] != samples
    for own, above in zip(rewards, advantages, strict=True):
        if baseline == "mean":
            assert above[0] == pytest.approx(own[0] - (own[1] + own[2]) / 2)
            assert sum(above) == pytest.approx(0, abs=1e-9)
        else:
            assert len({round(r - a, 9) for r, a in zip(own, above, strict=True)}) == 1


def test_mirrored_photos_are_paid_for_mirrored_captions():
    loss, decoder, memory, captions = make(SelfCritical(samples=2))
    ids = captions.tokenizer.encode("a red ball on the right")
    samples, _, _ = loss.roll_out(
        decoder, memory[:1], captions.batch(memory[:1], [0], [False]), epoch=0
    )
    right = [[dataclasses.replace(samples[0][0], ids=ids, finished=True)]]
    plain, mirror = (
        loss._reward(right, captions.batch(memory[:1], [0], [flipped]))[0][0]
        for flipped in (False, True)
    )
    assert mirror > plain


def test_training_earns_more():
    loss, decoder, memory, captions = make(SelfCritical())
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    batch = captions.batch(memory, range(12), [False] * 12)
    earned = []
    for step in range(60):
        total, tokens, figures = loss(decoder, memory, batch, step)
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        earned.append(figures["reward"])
    assert np.mean(earned[-10:]) > 2 * np.mean(earned[:10])


def test_cross_entropy_is_added_as_a_mean_beside_a_mean():
    loss, decoder, memory, captions = make(SelfCritical(samples=3), dropout=0.0)
    people = CrossEntropyLoss(0.1)
    batch = captions.batch(memory, range(12), [False] * 12)
    total, tokens, figures = loss(decoder, memory, batch, 0)
    nll, count, _ = people(decoder, memory, batch, 0)
    both, counts, more = BesideCrossEntropy(loss, people, 0.25)(decoder, memory, batch, 0)
    assert tokens != count and more["reward"] == figures["reward"]
    torch.testing.assert_close((both / counts).sum(), total / tokens + 0.25 * nll / count)
    torch.testing.assert_close(more["cross_entropy"], (nll / count).detach())


def test_cross_entropy_keeps_the_words_that_earn_little():
    """Of a photo's two captions, one earns less: the reward alone unlearns it."""
    nll = {}
    for weight in (0.0, 0.3):
        stage = Stage("s", 1, self_critical=SelfCritical(cross_entropy=weight))
        _, decoder, memory, captions = make(SelfCritical())
        size = captions.tokenizer.vocab_size
        loss = make_loss(stage, None, ROWS, captions.tokenizer, LONGEST, 7, (), size)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
        batch = captions.batch(memory, range(12), [False] * 12)
        for step in range(60):
            total, tokens, _ = loss(decoder, memory, batch, step)
            (total / tokens).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        decoder.eval()
        total, count, _ = CrossEntropyLoss(0.0)(decoder, memory, batch, 0)
        nll[weight] = (total / count).item()
    assert nll[0.3] < 0.5 * nll[0.0]


def test_the_reward_costs_little():
    """So little that it needs no processes of its own."""
    references = sentences(3, 500, 5)
    cider = CiderD([[text.split() for text in photo] for photo in references])
    hypotheses = [[text.split() for text in photo] for photo in sentences(4, 500, 5)]
    started = time.perf_counter()
    for captions, photo in zip(hypotheses, references, strict=True):
        cider.scores(captions, [text.split() for text in photo])
    assert (time.perf_counter() - started) / 500 < 0.01


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: SelfCritical(baseline="best"), "baseline must be greedy or mean"),
        (lambda: SelfCritical(temperature=0.0), "temperature must be above 0"),
        (lambda: SelfCritical(samples=1), "samples must be 2 to 16 with baseline mean"),
        (lambda: SelfCritical(samples=17, baseline="greedy"), "samples must be 1 to 16"),
        (
            lambda: Stage("x", 1, self_critical=SelfCritical(), label_smoothing=0.1),
            "label_smoothing is of cross-entropy, which self_critical leaves out",
        ),
        (
            lambda: Stage("x", 1, self_critical=SelfCritical(), logit_adjustment=0.1),
            "logit_adjustment is of cross-entropy, neither of distillation nor of self_critical",
        ),
        (
            lambda: TrainConfig("x", "y", (Stage("z", 1, self_critical=SelfCritical()),)),
            "'z': self_critical needs a stage of cross-entropy before it",
        ),
    ],
)
def test_contradictions_are_refused(make_wrong, message):
    with pytest.raises(UserError, match=message):
        make_wrong()
