"""Golden parity: `generate` of Hugging Face on a tiny random ViT + GPT-2, its weights in ours."""

import itertools
import random
import zlib

import pytest
import torch
from huggingface_models import tiny_model

from handler.beam_search import DecodeOptions, SpecialIds, greatest, search
from training.weights.families import import_model

# The vocabulary holds twice the most beams, as every real one does.
VOCAB, END = 64, 7


@pytest.fixture(scope="module")
def models():
    """(Hugging Face's model, our decoder with the same weights)."""
    theirs = tiny_model(VOCAB, END)
    return theirs, import_model(theirs.config.to_dict(), theirs.state_dict(), "theirs").decoder


@torch.inference_mode()
def test_teacher_forced_logits_are_theirs(models):
    theirs, ours = models
    pixels = torch.randn(2, 3, 16, 16)
    memory = theirs.encoder(pixels).last_hidden_state
    tokens = torch.randint(VOCAB, (2, 9))
    expected = theirs(pixel_values=pixels, decoder_input_ids=tokens).logits
    positions = torch.arange(9).expand(2, -1)
    mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(
        ours(tokens, positions, mask, memory), expected, atol=2e-5, rtol=1e-4
    )


def theirs_generate(model, pixels, options: DecodeOptions, longest: int):
    found = model.generate(
        pixel_values=pixels,
        num_beams=options.beams,
        num_return_sequences=options.num_return_sequences,
        max_new_tokens=longest,
        min_new_tokens=options.min_new_tokens or None,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        repetition_penalty=options.repetition_penalty,
        do_sample=False,
        decoder_start_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = []
    for row in found.sequences.tolist():
        row = row[1:]
        texts.append(row[: row.index(END)] if END in row else row)
    scores = found.sequences_scores.tolist() if options.beams > 1 else None
    return texts, scores


def combinations(count: int) -> list[DecodeOptions]:
    choose = random.Random(0)
    made = []
    for early, beams in itertools.product((False, True, "never"), (1, 2, 3, 8)):
        for _ in range(count):
            longest = choose.choice((1, 4, 9, 15))
            made.append(
                DecodeOptions(
                    num_beams=beams,
                    num_return_sequences=choose.randint(1, beams),
                    max_new_tokens=longest,
                    min_new_tokens=choose.choice((0, 0, min(3, longest))),
                    length_penalty=choose.choice((1.0, 0.0, 0.6, 2.0, -1.0)),
                    early_stopping=early,
                    no_repeat_ngram_size=choose.choice((0, 0, 2, 3)),
                    repetition_penalty=choose.choice((1.0, 1.0, 1.4, 0.8)),
                )
            )
    return made


@torch.inference_mode()
@pytest.mark.parametrize("options", combinations(2), ids=lambda o: f"{o.early_stopping}-{o.beams}")
def test_sequences_and_scores_are_those_of_generate(models, options):
    """Batches of three photos; under `never` our stop is earlier, and the answer the same."""
    theirs, ours = models
    torch.manual_seed(zlib.crc32(repr(options).encode()))
    pixels = torch.randn(3, 3, 16, 16)
    memory = theirs.encoder(pixels).last_hidden_state
    found = search(ours, memory, [options] * 3, SpecialIds(END, END))
    texts, scores = theirs_generate(theirs, pixels, options, options.max_new_tokens)
    flat = [hypothesis for photo in found for hypothesis in photo]
    assert [h.ids for h in flat] == texts
    if scores is not None:
        assert [h.score for h in flat] == pytest.approx(scores, abs=1e-4)


@torch.inference_mode()
def test_a_photo_never_depends_on_its_neighbours(models):
    """Every combination at once in one batch, against each alone."""
    theirs, ours = models
    options = combinations(2)
    torch.manual_seed(0)
    memory = theirs.encoder(torch.randn(len(options), 3, 16, 16)).last_hidden_state
    together = search(ours, memory, options, SpecialIds(END, END))
    for photo, (one, found) in enumerate(zip(options, together, strict=True)):
        alone = search(ours, memory[photo : photo + 1], [one], SpecialIds(END, END))[0]
        assert [h.ids for h in alone] == [h.ids for h in found]
        assert [h.score for h in alone] == pytest.approx([h.score for h in found], abs=1e-4)


@torch.inference_mode()
def test_log_probs_are_the_models_own(models):
    """Whatever processors did, token_log_probs are what teacher forcing gives."""
    theirs, ours = models
    memory = theirs.encoder(torch.randn(1, 3, 16, 16)).last_hidden_state
    options = DecodeOptions(num_beams=3, repetition_penalty=1.5, max_new_tokens=9)
    best = search(ours, memory, [options], SpecialIds(END, END))[0][0]
    target = [*best.ids, END] if best.finished else best.ids
    tokens = torch.tensor([[END, *target[:-1]]])
    n = len(target)
    mask = torch.ones(1, n, n, dtype=torch.bool).tril()
    logits = ours(tokens, torch.arange(n).unsqueeze(0), mask, memory)
    expected = logits.log_softmax(-1)[0, torch.arange(n), torch.tensor(target)].tolist()
    assert best.token_log_probs == pytest.approx(expected, abs=1e-4)


@torch.inference_mode()
def test_a_seed_gives_the_same_captions_in_any_company(models):
    theirs, ours = models
    memory = theirs.encoder(torch.randn(4, 3, 16, 16)).last_hidden_state
    sample = DecodeOptions(do_sample=True, seed=5, num_return_sequences=3, top_k=9, top_p=0.9)
    others = [DecodeOptions(num_beams=5), DecodeOptions(do_sample=True), DecodeOptions(num_beams=1)]
    company = search(ours, memory, [*others, sample], SpecialIds(END, END))[3]
    alone = search(ours, memory[3:], [sample], SpecialIds(END, END))[0]
    assert [h.ids for h in company] == [h.ids for h in alone]
    assert len(company) == 3


def test_the_greatest_are_those_of_topk():
    torch.manual_seed(0)
    for rows, width, count in ((5, 50_257, 16), (2, 2**15, 8), (3, 10, 4)):
        scores = torch.randn(rows, width)
        value, where = greatest(scores, count)
        assert torch.equal(value, scores.topk(count).values)
        assert torch.equal(scores.gather(1, where), value)
