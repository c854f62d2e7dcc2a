"""`python -m training.train`: a manifest in, a checkpoint out.

One or more stages (see `training.config.Stage`) of teacher-forced cross-entropy, of distillation or
of self-critical training, validated by generated captions; the best by CIDEr is kept, and each
stage goes on from it. A run that was killed goes on with `--resume` and ends with the very same
weights as one that was not. Several processes that torchrun started train as one (see
`training.loop.distributed`).
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import read_config
from handler.errors import ArgumentParser, UserError, run_command
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import load_tokenizer
from training.config import Stage, TokenizerChoice, TrainConfig, load_config
from training.data.manifest import Manifest, Row, read_manifest
from training.data.photos import (
    IGNORED,
    Augment,
    Batch,
    Captions,
    FeatureCache,
    PhotoDataset,
    epoch_order,
    photo_batches,
    seed_of,
    shard_numbers,
)
from training.loop.allocator import keep_freed_memory
from training.loop.distributed import leave, without_exchange
from training.loop.run import LOG_FILE, Run, read_state, restore_parts, set_aside
from training.model import CaptioningModel, Decoder, DecoderConfig, Encoder, EncoderConfig
from training.objectives.cross_entropy import summed_cross_entropy
from training.objectives.distillation import DistillationLoss, check_teachers, load_teachers
from training.objectives.self_critical import SelfCriticalLoss
from training.pretrained import load_encoder

BUILD = Path("build")
# A killed run loses at most this much (an epoch's end always saves).
SAVE_EVERY_SECONDS = 120.0

# (decoder, memory (B, P, D), batch, epoch) -> the loss summed over tokens, how many tokens, figures
# for the log.
Loss = Callable[[Decoder, Tensor, Batch, int], tuple[Tensor, Tensor, dict[str, float]]]


def make_tokenizer(choice: TokenizerChoice, rows: Sequence[Row]) -> CaptionTokenizer:
    """The tokenizer of a new run, whose training photos are `rows`."""
    if choice.checkpoint is not None:
        folder = Path(choice.checkpoint)
        return load_tokenizer(folder, read_config(folder))
    captions = [caption for row in rows for caption in row.captions]
    return CaptionTokenizer.train(captions, choice.kind, choice.vocab_size, choice.min_count)


def make_model(
    config: TrainConfig, tokenizer: CaptionTokenizer, weights: Path | None
) -> tuple[CaptioningModel, PreprocessConfig]:
    """A new model with the preprocessing that its encoder wants."""
    source, shape = config.encoder, config.decoder
    mean = std = (0.5, 0.5, 0.5)
    interpolation = "bicubic"
    encoder: Encoder | None = None
    if source.pretrained is not None:
        pretrained = load_encoder(source.pretrained, weights, source.image_size)
        encoder = pretrained.encoder
        encoder_config = encoder.config
        mean, std, interpolation = pretrained.mean, pretrained.std, pretrained.interpolation
    elif weights is not None:
        raise UserError(
            f"{weights}: config {config.name!r} trains its encoder from scratch; "
            "set encoder.pretrained to the name of these weights"
        )
    else:
        encoder_config = EncoderConfig(
            width=source.width,
            layers=source.layers,
            heads=source.heads,
            mlp_width=4 * source.width,
            image_size=224 if source.image_size is None else source.image_size,
            patch_size=source.patch_size,
            dropout=source.dropout,
        )
    decoder_config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        max_positions=shape.max_tokens,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        mlp_width=4 * shape.width,
        memory_width=encoder_config.width,
        dropout=shape.dropout,
    )
    model = CaptioningModel(encoder_config, decoder_config)
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    preprocessing = PreprocessConfig(
        image_size=encoder_config.image_size,
        mean=mean,
        std=std,
        resize=config.resize,  # type: ignore[arg-type]  # refused there when it is none of the two
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    return model, preprocessing


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then half a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def learning_rate(name: str, stage: Stage, encoder_layers: int) -> float:
    """A parameter's highest rate. In the encoder it falls by `encoder_layer_decay` from layer to
    layer, down from its last norm (Clark et al. 2020, as in BEiT's fine-tuning)."""
    part, *rest = name.split(".")
    if part == "decoder":
        return stage.decoder_lr
    if rest[0] == "blocks":
        below = encoder_layers - int(rest[1])
    else:
        below = 0 if rest[0] == "norm" else encoder_layers + 1
    return stage.encoder_lr * stage.encoder_layer_decay**below


def parameter_groups(model: CaptioningModel, stage: Stage) -> list[dict[str, Any]]:
    """AdamW's groups, by their rates; vectors (biases, norms) and embeddings of positions are
    without weight decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.") and stage.encoder == "frozen":
            continue
        rate = learning_rate(name, stage, len(model.encoder.blocks))
        decay = parameter.ndim > 1 and "position" not in name
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": rate,
            "weight_decay": stage.weight_decay if decay else 0.0,
        }
        for (rate, decay), parameters in groups.items()
    ]


def set_checkpointing(model: CaptioningModel, on: bool) -> None:
    """Gradient checkpointing (Chen et al. 2016): each block's inside is computed again in the
    backward pass instead of being kept."""
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        vars(block).pop("forward", None)
        if on:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)


def cross_entropy(
    decoder: Decoder, memory_BPD: Tensor, batch: Batch, smoothing: float
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Cross-entropy summed over the caption tokens of a batch, and their number; padding is left
    out."""
    real_BQ = batch.targets != IGNORED
    hidden_ND = decoder.hidden(batch.tokens, batch.positions, batch.mask, memory_BPD, real_BQ)
    total = summed_cross_entropy(decoder.head(hidden_ND), batch.targets[real_BQ], smoothing)
    return total, real_BQ.sum(), {}


class Objective(nn.Module):
    """A stage's loss in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, model: CaptioningModel, loss: Loss, frozen: bool) -> None:
        super().__init__()
        self.model, self.loss, self.frozen = model, loss, frozen

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        memory_BPD = batch.photos if self.frozen else self.model.encoder(batch.photos)
        return self.loss(self.model.decoder, memory_BPD, batch, epoch)


def make_loss(run: Run, stage: Stage, seed: int) -> Loss:
    if stage.distillation is not None:
        frozen = stage.encoder == "frozen"
        teachers = load_teachers(run, stage, run.model.encoder if frozen else None)
        return DistillationLoss(stage.distillation, teachers, stage.smoothing, frozen)
    if stage.self_critical is None:
        return lambda decoder, memory_BPD, batch, epoch: cross_entropy(
            decoder, memory_BPD, batch, stage.smoothing
        )
    longest = run.config.decoder.max_tokens - 1
    return SelfCriticalLoss(stage.self_critical, run.train_rows, run.tokenizer, longest, seed)


@torch.no_grad()
def update_average(
    average: CaptioningModel, model: CaptioningModel, decay: float, step: int
) -> None:
    """Exponential moving average of the weights; short-sighted at first, so that the random
    beginning is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    ours = [p.data for p in average.parameters()]
    theirs = [p.data for p in model.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)


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
        check_teachers(run)
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
    board = None
    if processes.first:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        board = SummaryWriter(str(folder / "tensorboard"))
    for run.stage in range(first, len(config.stages)):
        run_stage(run, captions_of, board, state)
        state = None
    if board is not None:
        board.close()
        print(f"{folder}: best validation CIDEr {run.best:.3f}, {run.seconds / 60:.1f} minutes")
    leave()
    return folder


def run_stage(run: Run, captions: Captions, board: Any, state: dict[str, Any] | None) -> None:
    """One stage: steps, logs, validates, saves. `state` is where a resumed run goes on; `board` is
    None in all processes but the first."""
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
    objective = processes.parallel(Objective(run.model, make_loss(run, stage, seed), frozen))
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
        # Self-critical training draws its samples without dropout.
        run.model.train(stage.self_critical is None)
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
                **{name: round(value, 5) for name, value in figures.items()},
                "lr": stage.decoder_lr * factor,
                "gradient_norm": round(norm.item(), 4),
                "photos_per_second": round(seen / max(now - started, 1e-9), 2),
            }
            started = now
            if board is None:
                continue
            run.log(entry)
            for name in ("loss", *figures, "lr"):
                board.add_scalar(f"{stage.name}/{name}", entry[name], run.step)
            bar.set_postfix({name: f"{entry[name]:.3f}" for name in ("loss", *figures)}, False)
            if now - saved > SAVE_EVERY_SECONDS:
                run.save_state(optimizer, run.epoch, number + 1)
                saved = now
        optimizer.zero_grad()
        skip = 0
        last = run.epoch + 1 == stage.epochs
        if board is not None:
            if last or (run.epoch + 1) % config.validation.every == 0:
                for name, value in run.validate().items():
                    board.add_scalar(f"{stage.name}/val/{name}", value, run.step)
            run.save_state(optimizer, run.epoch + 1, 0)
        run.best, run.since_best = processes.tell((run.best, run.since_best))
    bar.close()
    if board is not None:
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
        BUILD / "features",
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


def data_folder(name_or_folder: str) -> Path:
    """A dataset by name (under build/data) or by folder."""
    named = BUILD / "data" / name_or_folder
    return named if named.exists() else Path(name_or_folder)


def main() -> None:
    parser = ArgumentParser(prog="training.train", description=__doc__)
    parser.add_argument("--config", default="scenes", help="a preset's name or a YAML file")
    parser.add_argument("--data", help="a dataset under build/data, or its folder")
    parser.add_argument("--run", help="name of the checkpoint (default: the config's name)")
    parser.add_argument("--encoder-weights", type=Path, help="pretrained weights on disk")
    parser.add_argument("--epochs", type=int, help="epochs of every stage")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", help="auto, cpu, cuda")
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    arguments = parser.parse_args()
    config = load_config(
        arguments.config,
        data=arguments.data,
        epochs=arguments.epochs,
        seed=arguments.seed,
        precision=arguments.precision,
        device=arguments.device,
    )
    keep_freed_memory()
    manifest = read_manifest(data_folder(config.data))
    folder = BUILD / "checkpoints" / (arguments.run or config.name)
    train(config, manifest, folder, arguments.encoder_weights, arguments.resume)


if __name__ == "__main__":
    run_command(main)
