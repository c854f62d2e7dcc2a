"""The data of one model in a report: its captions on a split, their scores (also on every bootstrap
resample), its mistakes, and its training log."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handler.beam_search import DecodeOptions
from handler.captioner import Caption, Captioner
from handler.errors import UserError
from handler.words import Word, words_of
from training.checkpoint import load_captioner
from training.data.manifest import Manifest, Row
from training.data.scenes import check
from training.folders import LOG_FILE, WEIGHTS_FILE
from training.scores.captions import preprocessed, scored_text
from training.scores.claims import score_claims
from training.scores.intervals import Floats, bootstrap_scores, resampled
from training.scores.metrics import DEFAULT_METRICS, METRICS, has_spice, score_tokens, tokenize
from training.scores.mistakes import Mistakes, find_mistakes

# Captions shown of each photo.
N_BEST = 3


@dataclass
class System:
    """One model on the split: its captions and their scores, also on every resample."""

    name: str
    folder: Path
    captioner: Captioner
    decoding: DecodeOptions = field(default_factory=DecodeOptions)
    captions: dict[str, list[Caption]] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    each: dict[str, dict[str, float]] = field(default_factory=dict)
    resamples: dict[str, Floats] = field(default_factory=dict)
    mistakes: dict[str, Mistakes] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, str]:
        """The best caption of each photo, as it is scored."""
        return {photo: self.scored(photo) for photo in self.captions}

    def scored(self, photo: str) -> str:
        return scored_text(self.captioner, self.decoding, self.captions[photo][0])


def load_system(folder: Path, device: str = "cpu") -> System:
    """Loads a checkpoint or an export, which is detected from the files in the folder."""
    if (folder / "encoder.pt").is_file() and not (folder / WEIGHTS_FILE).is_file():
        captioner = Captioner.load(folder, device)
    else:
        captioner = load_captioner(folder, device)
    return System(folder.resolve().name, folder, captioner, log=read_log(folder / LOG_FILE))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The training log of a checkpoint; empty for an export. An incomplete last line, which a
    running training may be writing, is ignored."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON lines ({error}); move it away to omit the training log"
        ) from error


def caption_split(
    system: System, manifest: Manifest, rows: Sequence[Row], options: Mapping[str, Any]
) -> None:
    """Generates the N_BEST captions of every photo; stores them and the options in `system`."""
    chosen = system.captioner.options(**options)
    if "num_return_sequences" not in options:
        # The number of returned captions does not change the best one.
        chosen = system.captioner.options(**options, num_return_sequences=min(N_BEST, chosen.beams))
    system.decoding = chosen
    title = f"captions of {system.name}"
    for part, images_B3SS in preprocessed(system.captioner, manifest, rows, desc=title):
        captions = system.captioner.caption_tensors(images_B3SS, [chosen] * len(part))
        system.captions |= {row.id: best for row, best in zip(part, captions, strict=True)}


def score_system(system: System, rows: Sequence[Row]) -> None:
    """Computes scores, their resamples, and mistakes."""
    metrics = METRICS if has_spice() else DEFAULT_METRICS
    tokens = tokenize(system.best, {row.id: row.captions for row in rows})
    system.scores, system.each = score_tokens(tokens, metrics)
    system.resamples = bootstrap_scores(tokens, system.scores, system.each)
    if all(row.scene is not None for row in rows):
        system.scores |= score_claims(system.best, rows)
        system.resamples |= resampled_claims(system.best, rows)
    system.mistakes = find_mistakes(system.best, rows)


def resampled_claims(best: Mapping[str, str], rows: Sequence[Row]) -> dict[str, Floats]:
    """The shares of true claims and of captions that are entirely true, on every resample."""
    judged = [[claim.true for claim in check(best[row.id], row.scene or {})] for row in rows]
    draws_RN = resampled(len(rows))
    counts_N2 = np.array([[sum(claims), len(claims)] for claims in judged], dtype=np.float64)
    true_R, all_R = (draws_RN @ counts_N2).T
    entirely_N = np.array([bool(claims) and all(claims) for claims in judged], dtype=np.float64)
    return {
        "claims_true": true_R / np.maximum(all_R, 1),
        "captions_true": draws_RN @ entirely_N / len(rows),
    }


@torch.inference_mode()
def maps_of(system: System, manifest: Manifest, rows: Sequence[Row]) -> dict[str, list[list[Word]]]:
    """The words with their maps of each caption of each of `rows`, computed in one pass per batch
    of photos and all their captions."""
    captioner = system.captioner
    words_by_id: dict[str, list[list[Word]]] = {}
    title = f"maps of {system.name}"
    for part, images_B3SS in preprocessed(captioner, manifest, rows, desc=title):
        memory_BPD = captioner.encode(images_B3SS)
        pairs = [(i, c) for i, row in enumerate(part) for c in system.captions[row.id]]
        photo_of = torch.tensor([i for i, _ in pairs], device=captioner.device)
        maps = captioner.attention_memory(
            memory_BPD[photo_of], [c.ids for _, c in pairs], [c.prompt_ids for _, c in pairs]
        )
        for (i, caption), maps_Tgg in zip(pairs, maps, strict=True):
            words = words_of(caption.tokens, caption.token_log_probs, maps_Tgg)
            words_by_id.setdefault(part[i].id, []).append(words)
    return words_by_id
