"""One stage of training: its steps, log, validation and saved states."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handler.errors import UserError
from training.config import Stage
from training.data.captions import Batch, Captions
from training.data.features import FeatureCache, FrozenEncoder
from training.data.photos import Augment, PhotoDataset, epoch_order, photo_batches, shard_numbers
from training.data.seeds import seed_of
from training.loop.allocator import release_freed_memory
from training.loop.distributed import without_exchange
from training.loop.optimizer import (
    Optimizer,
    learning_rate_factor,
    set_checkpointing,
    update_average,
)
from training.loop.run import Run
from training.loop.teachers import load_teachers
from training.objectives.objective import Objective, make_loss

FEATURES = Path("build/features")
# A killed run loses at most this much (the state is also saved at the end of each epoch).
SAVE_EVERY_SECONDS = 120.0


class Work:
    """The optimizer, the objective and the photos of a stage."""

    def __init__(self, run: Run, captions: Captions, features: FeatureCache | None) -> None:
        stage = run.config.stages[run.stage]
        self.run, self.stage, self.captions, self.features = run, stage, captions, features
        self.seed = stage_seed(run)
        self.optimizer = Optimizer(run.model, stage, run.processes)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        teachers = None
        if stage.distillation is not None:
            teachers = load_teachers(stage, run.student(), stage.encoder == "frozen")
        prompt = run.prompt()
        longest = run.decoding()["max_new_tokens"]
        loss = make_loss(
            *(stage, teachers, run.train_rows, run.tokenizer, longest, self.seed, prompt),
            run.model.decoder_config.vocab_size,
        )
        self.whole = Objective(run.model, loss, stage.encoder == "frozen")
        self.objective = run.processes.parallel(self.whole)
        self.shard_of_N = shard_numbers(run.train_rows)
        self.steps = stage.epochs * math.ceil(len(self._order(0)) / stage.accumulate)

    def _order(self, epoch: int) -> list[list[int]]:
        return epoch_order(self.shard_of_N, self.stage.batch_photos, self.seed, epoch)

    def epoch(self, epoch: int, skip: int) -> tuple[list[int], Iterator[Batch]]:
        """The number of batches of each remaining step of an epoch, and these batches, without the
        first `skip`. The last step may have fewer batches."""
        run, most = self.run, self.stage.accumulate
        order = run.processes.share(self._order(epoch))[skip:]
        sizes = [min(most, len(order) - start) for start in range(0, len(order), most)]
        if self.features is not None:
            return sizes, self.features.batches(self.captions, order, self.seed, epoch)
        augment = Augment(run.preprocessing, self.stage.augment, self.stage.flip)
        dataset = PhotoDataset(run.manifest, run.train_rows, augment, self.seed, epoch)
        release_freed_memory()  # before the workers of this epoch are forked
        return sizes, photo_batches(dataset, self.captions, order, run.workers)

    def set_rates(self) -> float:
        """Sets the learning rates of the next step; returns that of the decoder."""
        factor = learning_rate_factor(self.run.step, self.steps, self.stage.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.stage.decoder_lr * factor


def run_stage(
    run: Run,
    captions: Captions,
    state: dict[str, Any] | None,
    validate: Callable[[Run], None],
) -> None:
    """One stage: batch, loss, step, log, save, validate. `state` is that of a resumed run."""
    stage = run.config.stages[run.stage]
    run.model.encoder.requires_grad_(stage.encoder == "trained")
    set_checkpointing(run.model, stage.gradient_checkpointing)
    if state is None:
        run.begin_stage()
    first, skip = (0, 0) if state is None else (state["epoch"], state["step_in_epoch"])
    if state is not None:
        run.model.load_state_dict(state["model"])  # whose features are cached next
    work = Work(run, captions, features_of(run, stage, first))
    if state is not None:
        run.restore(state, work.optimizer)
        for copied in ("model", "average", "optimizer"):
            del state[copied]  # several times the model's size, until the end of the stage
    if run.config.start is not None and run.best is None:
        score_start(work, validate)
    photos = len(run.train_rows)
    run.log.begin(
        stage.name, stage.epochs * photos, first * photos + min(photos, skip * stage.batch_photos)
    )
    for epoch in range(first, stage.epochs):
        run.epoch = epoch
        patience = run.config.validation.patience
        if patience and run.since_best >= patience:
            run.log.say(f"{stage.name}: no better in {patience} validations, stopped early")
            break
        done = train_epoch(work, skip)
        skip = 0
        if run.processes.first:
            if run.epoch + 1 == stage.epochs or (run.epoch + 1) % run.config.validation.every == 0:
                run.save_state(work.optimizer, run.epoch, done)  # validation may fail
                validate(run)
            run.save_state(work.optimizer, run.epoch + 1, 0)
        run.best, run.since_best = run.processes.tell((run.best, run.since_best))
    run.log.end()
    if run.processes.first:
        run.finish_stage()
    run.processes.wait()


def score_start(work: Work, validate: Callable[[Run], None]) -> None:
    """Validates the checkpoint that a run starts from, which is then the one to beat."""
    run = work.run
    if run.processes.first:
        run.save_state(work.optimizer, 0, 0)  # validation may fail
        validate(run)
        run.best_before = run.best
        run.save_state(work.optimizer, 0, 0)
    run.best = run.best_before = run.processes.tell(run.best)
    run.since_best = 0


def train_epoch(work: Work, skip: int) -> int:
    """The steps of an epoch after its first `skip` batches; returns its number of batches."""
    run, stage, processes = work.run, work.stage, work.run.processes
    sizes, batches = work.epoch(run.epoch, skip)
    work.whole.set_mode()
    started = saved = time.perf_counter()
    number = skip
    for size in sizes:
        rate, loss, figures, photos = work.set_rates(), torch.zeros((), device=run.device), {}, 0
        for pending in range(size - 1, -1, -1):
            batch = next(batches).to(run.device)
            # A seed for each batch, so that a resumed run has the same dropout.
            torch.manual_seed(seed_of(work.seed, "dropout", run.epoch, number, processes.rank))
            with without_exchange(work.objective, pending > 0):
                with run.autocast():
                    total, tokens, figures = work.objective(batch, run.epoch)
                part = processes.mean(total, tokens).sum() / size
                part.backward()
            loss += part.detach()
            photos += len(batch.indices) * processes.world
            number += 1
        norm = nn.utils.clip_grad_norm_(work.trained, stage.clip)
        # The only synchronization with the device in a step.
        loss_value, norm_value = torch.stack([processes.sum(loss) / processes.world, norm]).tolist()
        check_finite(run, stage, "loss", loss_value)
        check_finite(run, stage, "gradient's norm", norm_value)
        work.optimizer.step()
        work.optimizer.zero_grad()
        run.step += 1
        update_average(run.average, run.model, stage.ema, run.step)
        now = time.perf_counter()
        run.seconds += now - started
        shown = {
            "loss": round(loss_value, 5),
            **{n: round(float(v), 5) for n, v in figures.items()},
        }
        entry = {"step": run.step, **shown, "lr": rate, "gradient_norm": round(norm_value, 4)}
        speed = round(photos / max(now - started, 1e-9), 2)
        run.log_step({**entry, "photos_per_second": speed}, shown, photos)
        started = now
        if processes.first and now - saved > SAVE_EVERY_SECONDS:
            run.save_state(work.optimizer, run.epoch, number)
            saved = now
    return number


def check_finite(run: Run, stage: Stage, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"{run.folder.final}: the {what} is {value} at step {run.step} of stage "
            f"{stage.name!r}; lower its learning rates or set precision: fp32"
        )


def stage_seed(run: Run) -> int:
    return seed_of(run.config.seed, "stage", run.stage)


def features_of(run: Run, stage: Stage, first_epoch: int) -> FeatureCache | None:
    """The frozen encoder's outputs; None if the encoder is trained, and if all epochs of the stage
    are done (a stage was appended to the run)."""
    if stage.encoder == "trained" or first_epoch >= stage.epochs:
        return None
    return run.processes.one_first(lambda: make_features(run, stage))


def make_features(run: Run, stage: Stage) -> FeatureCache:
    encoder = run.model.encoder
    # Everything that influences a feature, including the precision.
    choices = (stage.views, stage.augment, stage.flip, run.config.seed, run.bf16, run.device.type)
    fingerprint = hashlib.sha256(repr(choices).encode())
    fingerprint.update(repr((run.preprocessing, encoder.config)).encode())
    for tensor in encoder.state_dict().values():
        fingerprint.update(tensor.cpu().numpy().tobytes())

    @torch.inference_mode()
    def encode(images_B3SS: Tensor) -> Tensor:
        with run.autocast():
            return encoder.eval()(images_B3SS.to(run.device))

    shape = (encoder.config.memory_tokens, encoder.config.memory_width)
    return FeatureCache(
        FEATURES,
        FrozenEncoder(fingerprint.hexdigest(), encode, shape),
        run.manifest,
        run.train_rows,
        stage.views,
        Augment(run.preprocessing, stage.augment, stage.flip),
        run.config.seed,
        run.workers,
    )
