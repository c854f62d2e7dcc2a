"""Self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563) on CIDEr-D.

For each photo, captions are sampled from the model (REINFORCE, Williams 1992). Samples with more
CIDEr-D than a baseline become more likely, the others less likely:

    loss = - sum over samples (reward - baseline) * log p(sample) / tokens

- The reward is CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) with the document frequencies of the
  training split. The end token counts as a word of samples and references. Without it, CIDEr-D
  rewards captions that break off before their last word ("a dog runs through the"), because a wrong
  word after "the" costs more than a right one gains; scores are then a few points higher, and the
  captions are truncated.
- The baseline is the reward of the greedy caption, as in the paper, or for each sample the mean of
  the other samples of its photo (Luo 2020, arXiv:2003.09971), which needs no additional search.
- The policy is the model's distribution sharpened by a temperature below 1, because beam search
  uses the most likely tokens only. A model trained with label smoothing gives one tenth of the
  probability to unlikely tokens, so most captions sampled at temperature 1 contain a wrong word,
  and the model learns to guard against these. On flickr8k, one epoch then *lowers* the CIDEr of
  beam search from .60 to .47, while a temperature of 0.5 raises it to .69.
- Samples are drawn by the shared search, without dropout and without the tokens that are never
  generated. The gradient is computed by one teacher-forced pass over all samples of a photo in one
  row, from the same distribution but with dropout, without which a small dataset is memorized.

Dimension key: B photos, Q packed tokens of a photo, P memory tokens, D width, V vocabulary.
"""

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from handler.beam_search import DecodeOptions, Hypothesis, search
from handler.caption_tokenizer import CaptionTokenizer
from training.config import SelfCritical
from training.data.captions import GIVEN, IGNORED, Batch, mirrored, pack_captions
from training.data.manifest import Row
from training.data.seeds import seed_of
from training.model import Decoder
from training.scores.cider_d import CiderD
from training.scores.metrics import plain_words

# No word of `plain_words` has angle brackets.
END_WORD = "<end>"


class SelfCriticalLoss:
    """The objective of a stage with `self_critical`. The encoder runs without dropout, and so does
    sampling."""

    dropout = False

    def __init__(
        self,
        choice: SelfCritical,
        rows: Sequence[Row],
        tokenizer: CaptionTokenizer,
        max_new_tokens: int,
        seed: int,
        prompt: Sequence[int] = (),
    ) -> None:
        """`rows` are those of the training split. The samples of a photo depend on (seed, epoch,
        photo) only, and not on the other photos in the batch. They follow the ids of `prompt`."""
        self.choice, self.rows, self.tokenizer = choice, rows, tokenizer
        self.max_new_tokens, self.seed, self.prompt = max_new_tokens, seed, list(prompt)
        # What stands before a sample and is not sampled.
        self.given = self.prompt or tokenizer.opening[1:]
        self.cider = CiderD([[reward_words(c) for c in row.captions] for row in rows])

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss summed over all tokens of all samples, the number of these tokens, and the mean
        reward (the CIDEr-D of a sample, including the end token)."""
        decoder.eval()
        # Autocast caches copies of weights: a copy made in inference would have no gradient later.
        with torch.autocast(memory_BPD.device.type, enabled=False):
            samples, rewards, advantages = self.roll_out(
                decoder, memory_BPD.detach().float(), batch, epoch
            )
        # Not reset after the pass: gradient checkpointing recomputes it in the backward pass.
        decoder.train()
        nll_BQ, lengths = self.neg_log_probs(decoder, memory_BPD, samples)
        weights_BQ = torch.zeros(nll_BQ.shape)
        for weights_Q, own, sizes in zip(weights_BQ, advantages, lengths, strict=True):
            each = torch.tensor(own).repeat_interleave(torch.tensor(sizes))
            weights_Q[: len(each)] = each
        sampled = sum(size - len(self.given) for sizes in lengths for size in sizes)
        tokens = torch.tensor(sampled, device=nll_BQ.device)
        mean = sum(map(sum, rewards)) / sum(map(len, rewards))
        return (weights_BQ.to(nll_BQ.device) * nll_BQ).sum(), tokens, {"reward": torch.tensor(mean)}

    def roll_out(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[list[list[Hypothesis]], list[list[float]], list[list[float]]]:
        """Samples of each photo, their rewards and their advantages over the baseline."""
        options = [
            DecodeOptions(
                do_sample=True,
                num_return_sequences=self.choice.samples,
                temperature=self.choice.temperature,
                max_new_tokens=self.max_new_tokens,
                seed=seed_of(self.seed, "samples", epoch, index),
            )
            for index in batch.indices
        ]
        samples = self._search(decoder, memory_BPD, options)
        rewards = self._reward(samples, batch)
        if self.choice.baseline == "mean":
            others = self.choice.samples - 1
            baselines = [[(sum(r) - own) / others for own in r] for r in rewards]
        else:
            greedy = DecodeOptions(num_beams=1, max_new_tokens=self.max_new_tokens)
            captions = self._search(decoder, memory_BPD, [greedy] * len(options))
            baselines = [r * self.choice.samples for r in self._reward(captions, batch)]
        advantages = [
            [own - base for own, base in zip(*pair, strict=True)]
            for pair in zip(rewards, baselines, strict=True)
        ]
        return samples, rewards, advantages

    def neg_log_probs(
        self, decoder: Decoder, memory_BPD: Tensor, samples: Sequence[Sequence[Hypothesis]]
    ) -> tuple[Tensor, list[list[int]]]:
        """The negative log-probability of every token of the samples, packed (B, Q) and 0 on
        padding and on what is given, and the number of tokens of each sample with what is given."""
        ids = [[sample.ids for sample in photo] for photo in samples]
        # A sample without end token has `max_new_tokens`, so packing cuts the end token off.
        longest = len(self.prompt) + self.max_new_tokens
        tokens_BQ, positions_BQ, targets_BQ, mask_BQQ = (
            t.to(memory_BPD.device) for t in pack_captions(ids, self.tokenizer, longest, self.given)
        )
        targets_BQ = targets_BQ.masked_fill(targets_BQ == GIVEN, IGNORED)
        logits_BQV = decoder(tokens_BQ, positions_BQ, mask_BQQ, memory_BPD)
        logits_BQV = logits_BQV / self.choice.temperature
        suppressed = torch.tensor(
            self.tokenizer.suppressed_ids, dtype=torch.long, device=logits_BQV.device
        )
        logits_BQV = logits_BQV.index_fill(2, suppressed, -math.inf)
        nll_BQ = F.cross_entropy(
            logits_BQV.transpose(1, 2), targets_BQ, ignore_index=IGNORED, reduction="none"
        )
        before = len(self.given)
        return nll_BQ, [[before + len(s.ids) + s.finished for s in photo] for photo in samples]

    def _search(
        self, decoder: Decoder, memory_BPD: Tensor, options: Sequence[DecodeOptions]
    ) -> list[list[Hypothesis]]:
        prompts = [self.prompt] * len(options)
        return search(decoder, memory_BPD, options, self.tokenizer.special, prompts=prompts)

    def _reward(self, photos: Sequence[Sequence[Hypothesis]], batch: Batch) -> list[list[float]]:
        rewards = []
        for hypotheses, index, mirror in zip(photos, batch.indices, batch.mirror, strict=True):
            captions = [
                reward_words(self.tokenizer.decode(h.ids), ended=h.finished) for h in hypotheses
            ]
            truths = self.rows[index].captions
            references = [reward_words(mirrored(c) if mirror else c) for c in truths]
            rewards.append(self.cider.scores(captions, references))
        return rewards


def reward_words(caption: str, ended: bool = True) -> list[str]:
    """The words of a caption for the reward, followed by END_WORD if it has ended."""
    # Interned because the document frequencies store many n-grams of few words.
    words = [sys.intern(word) for word in plain_words(caption)]
    return [*words, END_WORD] if ended else words
