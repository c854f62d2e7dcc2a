"""One stage of training: steps, logs, validates, saves."""

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from handler.errors import UserError
from training.config import Stage
from training.data.captions import Batch, Captions
from training.data.features import FeatureCache
from training.data.photos import (
    Augment,
    PhotoDataset,
    epoch_order,
    photo_batches,
    seed_of,
    shard_numbers,
)
from training.loop.distributed import without_exchange
from training.loop.optimizer import (
    learning_rate_factor,
    parameter_groups,
    set_checkpointing,
    update_average,
)
from training.loop.run import Run
from training.objectives.objective import Objective, make_loss

FEATURES = Path("build/features")
# A killed run loses at most this much (an epoch's end always saves).
SAVE_EVERY_SECONDS = 120.0


def run_stage(run: Run, captions: Captions, state: dict[str, Any] | None) -> None:
    """One stage: steps, logs, validates, saves. `state` is where a resumed run goes on."""
    stage, config, processes = run.config.stages[run.stage], run.config, run.processes
    frozen = stage.encoder == "frozen"
    if state is None:
        run.begin_stage()
    run.model.encoder.requires_grad_(not frozen)
    set_checkpointing(run.model, stage.gradient_checkpointing)
    optimizer = torch.optim.AdamW(parameter_groups(run.model, stage), betas=(0.9, 0.98), lr=0.0)
    epoch0 = skip = 0
    if state is not None:
        run.restore(state, optimizer)
        epoch0, skip = state["epoch"], state["step_in_epoch"]
    seed = seed_of(config.seed, "stage", run.stage)
    augment = Augment(run.preprocessing, stage.augment, stage.flip)
    features = None
    if frozen and epoch0 < stage.epochs:  # not where a finished run only gets a further stage
        features = processes.one_first(lambda: make_features(run, stage, augment))
    loss_of = make_loss(stage, run.student(), run.train_rows, seed)
    whole = Objective(run.model, loss_of, frozen)
    objective = processes.parallel(whole)
    photos, shard_of_N = len(run.train_rows), shard_numbers(run.train_rows)
    steps_per_epoch = len(epoch_order(shard_of_N, stage.batch_photos, seed, 0)) // stage.accumulate
    steps = max(1, stage.epochs * steps_per_epoch)
    bar = tqdm(
        total=stage.epochs * photos,
        initial=epoch0 * photos + skip * stage.batch_photos,
        desc=stage.name,
        unit="photo",
        smoothing=0.05,
        disable=not processes.first,
    )
    for run.epoch in range(epoch0, stage.epochs):
        patience = config.validation.patience
        if patience and run.since_best >= patience:
            bar.write(f"{stage.name}: no better CIDEr in {patience} validations, stopped early")
            break
        order = processes.share(epoch_order(shard_of_N, stage.batch_photos, seed, run.epoch))[skip:]
        batches: Iterator[Batch]
        if features is not None:
            batches = features.batches(captions, order, seed, run.epoch)
        else:
            dataset = PhotoDataset(run.manifest, run.train_rows, augment, seed, run.epoch)
            batches = photo_batches(dataset, captions, order, run.workers)
        whole.set_mode()
        started, saved = time.perf_counter(), time.perf_counter()
        for number, batch in enumerate(batches, start=skip):
            batch = batch.to(run.device)
            factor = learning_rate_factor(run.step, steps, stage.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            # Dropout's own seed for each batch, so that a resumed run drops what it would have.
            torch.manual_seed(seed_of(seed, "dropout", run.epoch, number, processes.rank))
            pending = (number + 1) % stage.accumulate != 0
            with without_exchange(objective, pending):
                with run.autocast():
                    total, tokens, figures = objective(batch, run.epoch)
                loss = processes.mean(total, tokens)
                (loss / stage.accumulate).backward()
            loss_value = processes.sum(loss).item() / processes.world
            if not math.isfinite(loss_value):
                raise UserError(
                    f"{run.folder}: the loss is {loss_value} at step {run.step} of stage "
                    f"{stage.name!r}; lower its learning rates or set precision: fp32"
                )
            seen = len(batch.indices) * processes.world
            bar.update(seen)
            if pending:
                continue
            norm = nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], stage.clip
            )
            optimizer.step()
            optimizer.zero_grad()
            run.step += 1
            update_average(run.average, run.model, stage.ema, run.step)
            now = time.perf_counter()
            run.seconds += now - started
            entry = {
                "step": run.step,
                "loss": round(loss_value, 5),
                **{name: round(float(value), 5) for name, value in figures.items()},
                "lr": stage.decoder_lr * factor,
                "gradient_norm": round(norm.item(), 4),
                "photos_per_second": round(seen / max(now - started, 1e-9), 2),
            }
            started = now
            if not processes.first:
                continue
            run.log(entry)
            bar.set_postfix({name: f"{entry[name]:.3f}" for name in ("loss", *figures)}, False)
            if now - saved > SAVE_EVERY_SECONDS:
                run.save_state(optimizer, run.epoch, number + 1)
                saved = now
        optimizer.zero_grad()
        skip = 0
        last = run.epoch + 1 == stage.epochs
        if processes.first:
            if last or (run.epoch + 1) % config.validation.every == 0:
                run.validate()
            run.save_state(optimizer, run.epoch + 1, 0)
        run.best, run.since_best = processes.tell((run.best, run.since_best))
    bar.close()
    if processes.first:
        run.finish_stage()
    processes.wait()


def make_features(run: Run, stage: Stage, augment: Augment) -> FeatureCache:
    encoder = run.model.encoder
    fingerprint = hashlib.sha256(
        repr((stage.views, stage.augment, stage.flip, run.config.seed)).encode()
    )
    fingerprint.update(repr((run.preprocessing, encoder.config)).encode())
    for tensor in encoder.state_dict().values():
        fingerprint.update(tensor.cpu().numpy().tobytes())

    @torch.inference_mode()
    def encode(images_B3SS: Tensor) -> Tensor:
        with run.autocast():
            return encoder.eval()(images_B3SS.to(run.device))

    shape = (encoder.config.memory_tokens, encoder.config.width)
    return FeatureCache(
        FEATURES,
        fingerprint.hexdigest(),
        run.manifest,
        run.train_rows,
        encode,
        shape,
        stage.views,
        augment,
        run.config.seed,
        run.workers,
    )
