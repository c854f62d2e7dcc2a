"""A config and a manifest in, a checkpoint out: the stages of a run in order.

One or more stages (see `training.config.Stage`) of teacher-forced cross-entropy, of distillation or
of self-critical training, validated by generated captions; the best by CIDEr is kept (by the loss
where there are too few validation photos for CIDEr), and each stage goes on from it. A run that was
killed goes on with `--resume` and ends with the very same weights as one that was not. Several
processes that torchrun started train as one (see `training.loop.distributed`).
"""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.data.captions import Captions
from training.data.manifest import Manifest
from training.folders import STATE_FILE
from training.loop.distributed import leave
from training.loop.folder import RunFolder
from training.loop.run import Run, read_state, restore_parts
from training.loop.stage import run_stage
from training.loop.start import make_model, make_tokenizer
from training.loop.teachers import check_teachers
from training.loop.validation import announce, validate, warn_of_little_learnt


def train(
    config: TrainConfig,
    manifest: Manifest,
    folder: Path,
    weights: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Trains and returns the checkpoint's folder. A run that is there already is continued with
    `resume` and replaced with `overwrite`.

    Raises UserError for what the user gave wrong, for a run of this name that neither was asked
    for, and for a loss that is no number; what was there before is then as it was.
    """
    torch.manual_seed(config.seed)
    run_folder = RunFolder(folder)
    run = Run(config, manifest, run_folder)
    with contextlib.ExitStack() as stack:
        if run.processes.first:
            stack.enter_context(run_folder.opened(resume, overwrite))
        run.processes.wait()
        try:
            train_stages(run, prepare(run, weights, resume))
        except KeyboardInterrupt:
            saved = (folder / STATE_FILE).exists() and run_folder.path == folder
            raise KeyboardInterrupt(
                "interrupted; continue with --resume (make: ARGS=--resume)"
                if saved
                else "interrupted before anything was saved; nothing is changed"
            ) from None
        finally:
            run.log.end()  # what is printed next stands on a line of its own
    leave()
    return folder


def prepare(run: Run, weights: Path | None, resume: bool) -> dict[str, Any] | None:
    """Makes or reads back the parts of a run; returns the state that a resumed one goes on from."""
    state: dict[str, Any] | None = None
    if resume:
        state = read_state(run.folder.final, run.config)
        run.model, run.preprocessing, run.tokenizer = restore_parts(run.folder.final, state)
    else:
        run.tokenizer = make_tokenizer(run.config.tokenizer, run.train_rows, run.log.say)
        run.model, run.preprocessing = make_model(run.config, run.tokenizer, weights)
        check_teachers(run.config, run.student())
        if run.processes.first:
            # What --resume needs before the first validation has written a checkpoint.
            run.tokenizer.save(run.folder.path / "tokenizer.json")
    run.processes.wait()
    run.model.to(run.device)
    run.average = copy.deepcopy(run.model).requires_grad_(False).eval()
    # Defaults that this model cannot decode by are an error now, not at the first validation.
    run.captioner().options(num_beams=run.config.validation.num_beams)
    return state


def train_stages(run: Run, state: dict[str, Any] | None) -> None:
    captions = Captions(run.train_rows, run.tokenizer, run.config.decoder.max_tokens)
    for note in captions.notes():
        run.log.say(note)
    announce(run)
    first = 0 if state is None else state["stage"]
    for stage in range(first, len(run.config.stages)):
        run.stage = stage
        run_stage(run, captions, state, validate)
        state = None
    assert run.best is not None
    figure = run.best["chosen_by"]
    run.log.say(
        f"{run.folder.final}: best validation {figure} {run.best[figure]:.3f}, "
        f"{run.seconds / 60:.1f} minutes"
    )
    warn_of_little_learnt(run)
