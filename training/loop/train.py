"""A config and a manifest in, a checkpoint out: the stages of a run in order.

One or more stages (see `training.config.Stage`) of teacher-forced cross-entropy, of distillation or
of self-critical training, validated by generated captions; the best by CIDEr is kept, and each
stage goes on from it. A run that was killed goes on with `--resume` and ends with the very same
weights as one that was not. Several processes that torchrun started train as one (see
`training.loop.distributed`).
"""

import copy
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import LOG_FILE
from training.config import TrainConfig
from training.data.captions import Captions
from training.data.manifest import Manifest
from training.loop.distributed import leave
from training.loop.run import Run, read_state, restore_parts, set_aside
from training.loop.stage import run_stage
from training.loop.start import make_model, make_tokenizer
from training.objectives.distillation import check_teachers


def train(
    config: TrainConfig, manifest: Manifest, folder: Path, weights: Path | None, resume: bool
) -> Path:
    """Trains and returns the checkpoint's folder. Raises UserError for what the user gave wrong,
    and for a loss that is no number."""
    torch.manual_seed(config.seed)
    run = Run(config, manifest, folder)
    processes = run.processes
    state: dict[str, Any] | None = None
    if resume:
        state = read_state(folder, config)
        run.model, run.preprocessing, run.tokenizer = restore_parts(folder, state)
    else:
        run.tokenizer = make_tokenizer(config.tokenizer, run.train_rows)
        run.model, run.preprocessing = make_model(config, run.tokenizer, weights)
        check_teachers(config, run.student())
        if processes.first:
            set_aside(folder)
            folder.mkdir(parents=True)
            (folder / LOG_FILE).touch()
            # What --resume needs before the first validation has written a checkpoint.
            run.tokenizer.save(folder / "tokenizer.json")
    processes.wait()
    run.model.to(run.device)
    run.average = copy.deepcopy(run.model).requires_grad_(False).eval()
    captions_of = Captions(run.train_rows, run.tokenizer, config.decoder.max_tokens)
    first = 0 if state is None else state["stage"]
    for run.stage in range(first, len(config.stages)):
        run_stage(run, captions_of, state)
        state = None
    if processes.first:
        print(f"{folder}: best validation CIDEr {run.best:.3f}, {run.seconds / 60:.1f} minutes")
    leave()
    return folder
