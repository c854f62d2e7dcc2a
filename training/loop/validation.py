"""Validation: generates captions of the validation photos with the averaged weights, scores them,
and decides which weights become the checkpoint.

Dimension key: B photos, P memory tokens, D width.
"""

from typing import Any

import torch

from handler.captioner import Captioner
from handler.errors import UserError
from training.data.captions import Captions
from training.data.manifest import Row
from training.loop.distributed import threads_of_all
from training.loop.run import Run
from training.objectives.cross_entropy import CrossEntropyLoss
from training.scores.captions import preprocessed, scored_text
from training.scores.claims import score_claims
from training.scores.habits import distinct, little_learnt
from training.scores.metrics import choose_tokenizer, score
from training.scores.pointing import LayerChoice

# CIDEr weights a word by log(photos / photos with the word). With one photo, all weights are 0;
# with a few, nearly all words have one of two or three weights.
LEAST_PHOTOS_FOR_CIDER = 10


@threads_of_all()
def validate(run: Run) -> None:
    """Scores the averaged weights. If they are not worse than the best so far, they become the
    checkpoint. The figure is CIDEr, or the loss if there are too few photos for CIDEr."""
    captioner, rows = run.captioner(), run.val_rows
    is_drawn = all(row.scene is not None for row in rows)
    choice = LayerChoice(captioner) if is_drawn else None
    predictions, loss = caption_and_loss(run, captioner, rows, choice)
    references = {row.id: row.captions for row in rows}
    scores = score(predictions, references, ("bleu", "cider"), run.metric_tokenizer)
    result: dict[str, Any] = {name: float(scores[name]) for name in ("BLEU-4", "CIDEr")}
    result |= {"loss": loss, "distinct_captions": distinct(list(predictions.values()))}
    if choice is not None:
        claims = score_claims(predictions, rows)
        result |= {name: claims[name] for name in ("claims_true", "captions_true")}
        layers, pointing = choice.best()
        run.word_maps = {"layers": layers, "pointing": round(pointing, 4)}
    run.write({"step": run.step, "seconds": run.seconds, "val": result})
    figures = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
    samples = "; ".join(predictions[row.id] for row in rows[:3])
    stage = run.config.stages[run.stage].name
    when = f"epoch {run.epoch} of {stage}" if run.step else f"{run.config.start}, before any step"
    run.log.say(f"{when}: {figures}")
    run.log.say(f"  e.g. {samples}")
    run.consider({**result, "photos": len(rows), "split": "val", "chosen_by": chosen_by(rows)})


def chosen_by(rows: list[Row]) -> str:
    """The figure by which the checkpoint is chosen: "CIDEr" or "loss"."""
    return "CIDEr" if len(rows) >= LEAST_PHOTOS_FOR_CIDER else "loss"


def choose_metric_tokenizer(run: Run, state: dict[str, Any] | None) -> None:
    """Chooses how captions are split into words in the validations of a run: by the PTB tokenizer,
    without Java by a simple rule, or into characters. A resumed run keeps the choice in its
    `state`. Raises UserError if this needs a Java that is missing now or does not work."""
    available = choose_tokenizer([caption for row in run.val_rows for caption in row.captions])
    run.metric_tokenizer = available if state is None else state["metric_tokenizer"]
    if run.metric_tokenizer == "ptb" and available == "python":
        raise UserError(
            f"{run.folder.final}: its scores are computed with the PTB tokenizer, but no Java is "
            "found; make setup installs one"
        )


def announce(run: Run) -> None:
    """Prints how captions are split into words and, if not by CIDEr, how the checkpoint is
    chosen."""
    if run.metric_tokenizer == "ptb":
        run.log.say("validation: scores with the PTB tokenizer")
    elif run.metric_tokenizer == "characters":
        run.log.say(
            "validation: scores on characters, because the captions are written without spaces and "
            "the PTB tokenizer would treat a sentence as one word"
        )
    else:
        run.log.say(
            "validation: scores on simply split words, because no Java was found when the run "
            "began; compare them only with each other (make setup installs Java)"
        )
    if chosen_by(run.val_rows) == "loss":
        run.log.say(
            f"{len(run.val_rows)} validation photos are too few for CIDEr (at least "
            f"{LEAST_PHOTOS_FOR_CIDER}): the checkpoint is chosen by the validation loss"
        )


def warn_of_little_learnt(run: Run) -> None:
    if run.best is not None and (reason := little_learnt(**run.best)):
        run.log.say(f"warning: {reason}")


def tell_gain(run: Run) -> None:
    """Says what fine-tuning gained over the checkpoint that the run started from."""
    before, after = run.at_start, run.best
    if before is None or after is None:
        return
    line = f"{run.folder.final}: fine-tuning {run.config.start} gained "
    if before == after:
        figure = before["chosen_by"]
        line += (
            f"nothing: no validation {figure} was better than its {before[figure]:.3f}, and its "
            "weights are kept; try other rates or more photos"
        )
    else:
        line += "on validation photos: " + ", ".join(
            f"{figure} {before[figure]:.3f} -> {after[figure]:.3f}" for figure in ("CIDEr", "loss")
        )
    run.log.say(line)


@torch.inference_mode()
def caption_and_loss(
    run: Run, captioner: Captioner, rows: list[Row], choice: LayerChoice | None
) -> tuple[dict[str, str], float]:
    """One caption for each row by its id, and the mean cross-entropy of the references in nats per
    token. The `choice` of layers for word maps hears of every batch."""
    # Samples would choose a checkpoint by luck.
    options = captioner.options(
        num_beams=run.config.validation.num_beams, num_return_sequences=1, do_sample=False
    )
    captions = Captions(rows, run.tokenizer, run.config.decoder.max_tokens, run.prompt())
    cross_entropy = CrossEntropyLoss(smoothing=0.0)
    predictions: dict[str, str] = {}
    totals = torch.zeros(2, dtype=torch.float64)
    bar = {"desc": "validate", "leave": False, "delay": 5}
    for part, images_B3SS in preprocessed(captioner, run.manifest, rows, **bar):
        memory_BPD = captioner.encode(images_B3SS)
        results = captioner.caption_memory(memory_BPD, [options] * len(part))
        indices = range(len(predictions), len(predictions) + len(part))
        predictions |= {
            row.id: scored_text(captioner, options, best[0])
            for row, best in zip(part, results, strict=True)
        }
        batch = captions.batch(memory_BPD, indices, [False] * len(part)).to(run.device)
        total, tokens, _ = cross_entropy(captioner.decoder, memory_BPD, batch, 0)
        if choice is not None:
            choice.add(part, memory_BPD)
        totals += torch.stack([total, tokens]).double().cpu()
    return predictions, float(totals[0] / totals[1])
