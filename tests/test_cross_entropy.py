"""The loss in slices against torch's own."""

from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from handler.caption_tokenizer import CaptionTokenizer
from training.data.captions import IGNORED
from training.data.manifest import Row
from training.objectives import cross_entropy
from training.objectives.cross_entropy import CrossEntropyLoss, log_shares, summed_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("slice_size", [1, 300, 2**17])
def test_it_is_the_cross_entropy_of_torch(smoothing, slice_size, monkeypatch):
    monkeypatch.setattr(cross_entropy, "SLICE", slice_size)
    torch.manual_seed(0)
    logits = (5 * torch.randn(37, 90)).requires_grad_()
    targets = torch.randint(90, (37,))
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    (3 * expected).backward()
    wanted, logits.grad = logits.grad, None
    found = summed_cross_entropy(logits, targets, smoothing)
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits.grad, wanted)


def test_bfloat16_logits_lose_no_more_than_their_own_rounding():
    torch.manual_seed(0)
    logits = torch.randn(20, 2000).bfloat16().requires_grad_()
    targets = torch.randint(2000, (20,))
    expected = F.cross_entropy(logits.float(), targets, label_smoothing=0.1, reduction="sum")
    expected.backward()
    wanted, logits.grad = logits.grad, None
    found = summed_cross_entropy(logits, targets, 0.1)
    found.backward()
    assert found.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits.grad, wanted, rtol=2**-7, atol=1e-9)


def test_adjusted_logits_say_rare_words_more_often():
    """A model that fits the adjusted loss has divided each token's probability by its share of the
    captions to that power (Menon et al. 2021, their equation 10)."""
    rows = [Row("1", "1.png", ("a dog", "a cat", "a dog runs"), "train")]
    tokenizer = CaptionTokenizer.train(rows[0].captions, "word", 50, 1)
    shares = log_shares(rows, tokenizer, tokenizer.vocab_size + 2).exp()
    by_word = {word: shares[tokenizer.encode(word)[0]].item() for word in ("a", "dog", "cat")}
    assert by_word["a"] == pytest.approx(3 * by_word["cat"]) == pytest.approx(1.5 * by_word["dog"])
    assert shares[tokenizer.end_id] == shares[tokenizer.encode("a")[0]]
    assert len(shares) == tokenizer.vocab_size + 2 and shares[-1] == shares.min() > 0

    decoder = MagicMock()
    batch = MagicMock(targets=torch.tensor([[3, 4, IGNORED, 3]]))
    batch.learnt.return_value = batch.targets[batch.targets != IGNORED], None
    logits = decoder.head.return_value = torch.randn(3, 6)
    adjustment = 0.3 * torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).log()
    total, _, _ = CrossEntropyLoss(0.1, adjustment)(decoder, torch.zeros(1), batch, 0)
    expected = F.cross_entropy(
        logits + adjustment, torch.tensor([3, 4, 3]), label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(total, expected)
