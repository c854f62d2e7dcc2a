"""The loss in slices against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from training.objectives import cross_entropy
from training.objectives.cross_entropy import summed_cross_entropy


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
