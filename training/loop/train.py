"""Trains a checkpoint from a config and a manifest: the stages of a run in order.

A stage (see `training.config.Stage`) trains with teacher-forced cross-entropy, distillation or
self-critical training. It is validated by generated captions; the weights with the best CIDEr are
kept (with the best loss if there are too few validation photos for CIDEr), and the next stage
starts from them. A run that fine-tunes a checkpoint is also validated before its first step, and
reports at its end what it gained. A killed run can be continued with `--resume` and ends with the
same weights as an uninterrupted one. Several processes of torchrun train one model (see
`training.loop.distributed`).
"""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch

from handler.errors import UserError
from training.config import TrainConfig
from training.data.captions import Captions
from training.data.manifest import Manifest
from training.data.photos import epoch_order, shard_numbers
from training.folders import STATE_FILE
from training.loop.distributed import STORE, leave
from training.loop.fine_tuning import check_start, load_start
from training.loop.folder import RunFolder
from training.loop.run import Run, read_state, restore_parts
from training.loop.stage import run_stage
from training.loop.start import make_model, make_tokenizer
from training.loop.teachers import check_teachers
from training.loop.validation import (
    announce,
    choose_metric_tokenizer,
    tell_gain,
    validate,
    warn_of_little_learnt,
)


def train(
    config: TrainConfig,
    manifest: Manifest,
    folder: Path,
    weights: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Trains and returns the checkpoint's folder. An existing run is continued with `resume` and
    replaced with `overwrite`.

    Raises UserError for bad input, for an existing run without `resume` or `overwrite`, and for a
    loss that is not finite; existing files are then unchanged.
    """
    torch.manual_seed(config.seed)
    run_folder = RunFolder(folder)
    check_start(config, (run_folder.final, run_folder.previous))
    run = Run(config, manifest, run_folder)
    with contextlib.ExitStack() as stack:
        if run.processes.first:
            stack.enter_context(run_folder.opened(resume, overwrite))
        run.processes.wait()
        try:
            train_stages(run, prepare(run, weights, resume))
        except KeyboardInterrupt:
            final = run_folder.final  # which is not `folder` where that is a link
            saved = (final / STATE_FILE).exists() and run_folder.path == final
            again = typed = "--resume"
            if os.environ.get(STORE):
                again += f" --processes {run.processes.world}"
                typed = f'"{again}"'
            raise KeyboardInterrupt(
                f"interrupted; continue with {again} (make: ARGS={typed})"
                if saved
                else "interrupted before anything was saved; no files were changed"
            ) from None
        finally:
            run.log.end()  # the next message starts on a new line
    leave()
    return folder


def prepare(run: Run, weights: Path | None, resume: bool) -> dict[str, Any] | None:
    """Creates or reads the parts of a run; returns the state of a resumed one."""
    state: dict[str, Any] | None = None
    if resume:
        state = read_state(run.folder.final, run.config)
        # Version 1.0 saved none.
        if state.get("data_hash", run.data_hash) != run.data_hash:
            raise UserError(
                f"{run.folder.final}: the photos or captions of the dataset "
                f"{run.manifest.name!r} have changed; prepare it as it was, or train again with "
                "--overwrite"
            )
        run.model, run.preprocessing, run.tokenizer = restore_parts(run.folder.final, state)
    else:
        if run.config.start is not None:
            run.model, run.preprocessing, run.tokenizer = load_start(
                run.config, weights, run.train_rows
            )
        else:
            run.tokenizer = make_tokenizer(run.config.tokenizer, run.train_rows, run.log.say)
            run.model, run.preprocessing = make_model(run.config, run.tokenizer, weights)
        check_teachers(run.config, run.student())
        if run.processes.first:
            # For --resume before the first validation, which writes the checkpoint.
            run.tokenizer.save(run.folder.path / "tokenizer.json")
    if run.processes.first:
        choose_metric_tokenizer(run, state)
    run.processes.wait()
    run.model.to(run.device)
    run.average = copy.deepcopy(run.model).requires_grad_(False).eval()
    # Defaults that this model cannot decode by are an error now, not at the first validation.
    run.captioner().options(num_beams=run.config.validation.num_beams)
    # And so are batches with fewer photos than processes, before a run is replaced.
    shards = shard_numbers(run.train_rows)
    for stage in run.config.stages:
        run.processes.share(epoch_order(shards, stage.batch_photos, run.config.seed, 0))
    return state


def train_stages(run: Run, state: dict[str, Any] | None) -> None:
    captions = Captions(run.train_rows, run.tokenizer, run.config.decoder.max_tokens, run.prompt())
    borrowed = run.config.tokenizer.checkpoint
    for note in captions.notes(run.decoding()["max_new_tokens"], borrowed):
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
    tell_gain(run)
