"""`python -m training.train`: a manifest in, a checkpoint out.

Teacher-forced cross-entropy in one or more stages (see `training.config.Stage`), validated by
generated captions; the best by CIDEr is kept. A run that was killed goes on with `--resume` and
ends with the very same weights as one that was not: order, augmentation and dropout come from
saved or derived random states.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner
from handler.errors import ArgumentParser, UserError, run_command
from handler.image_preprocess import PreprocessConfig
from training.allocator import keep_freed_memory
from training.checkpoint import WEIGHTS_FILE, load_model, save_checkpoint
from training.config import Stage, TrainConfig, load_config
from training.data.manifest import Manifest, read_manifest
from training.dataset import (
    IGNORED,
    Augment,
    Batch,
    Captions,
    FeatureCache,
    PhotoDataset,
    epoch_order,
    photo_batches,
    read_photo,
)
from training.metrics import score
from training.model import CaptioningModel, DecoderConfig, Encoder, EncoderConfig
from training.pretrained import load_encoder

BUILD = Path("build")
STATE_FILE, LOG_FILE = "train_state.pt", "metrics.jsonl"


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
            image_size=source.image_size,
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


def parameter_groups(model: CaptioningModel, stage: Stage) -> list[dict[str, Any]]:
    """AdamW's groups: encoder and decoder at their own rates; vectors (biases, norms) and
    embeddings of positions without weight decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part == "encoder" and stage.encoder == "frozen":
            continue
        decay = parameter.ndim > 1 and "position" not in name
        groups.setdefault((part, decay), []).append(parameter)
    rates = {"encoder": stage.encoder_lr, "decoder": stage.decoder_lr}
    return [
        {
            "params": parameters,
            "base_lr": rates[part],
            "weight_decay": stage.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in groups.items()
    ]


def caption_loss(model: CaptioningModel, batch: Batch, frozen: bool, smoothing: float) -> Tensor:
    """Mean cross-entropy over the caption tokens of a batch, padding left out."""
    memory = batch.photos if frozen else model.encoder(batch.photos)
    logits_BQV = model.decoder(batch.tokens, batch.positions, batch.mask, memory)
    return F.cross_entropy(
        logits_BQV.flatten(0, 1),
        batch.targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )


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


def pick_device(config: TrainConfig) -> tuple[torch.device, bool]:
    """The device, and whether to run in bfloat16 there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if config.precision != "auto":
        return device, config.precision == "bf16"
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return device, bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Run:
    """Where a run stands: everything that a resumed run needs, and its folder."""

    def __init__(self, config: TrainConfig, manifest: Manifest, folder: Path) -> None:
        self.config, self.manifest, self.folder = config, manifest, folder
        self.train_rows, self.val_rows = manifest.split("train"), manifest.split("val")
        if config.validation.photos:
            self.val_rows = self.val_rows[: config.validation.photos]
        self.device, self.bf16 = pick_device(config)
        self.stage = self.epoch = self.step = 0
        self.seconds = 0.0
        self.best = -1.0
        self.since_best = 0
        self.model: CaptioningModel
        self.average: CaptioningModel
        self.tokenizer: CaptionTokenizer
        self.preprocessing: PreprocessConfig

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": self.config.decoder.max_tokens - 1, **self.config.decoding}

    def captioner(self) -> Captioner:
        """The averaged model, ready to caption."""
        model = self.average.eval()
        config = {
            "model": {"encoder": dataclasses.asdict(model.encoder_config)},
            "preprocessing": self.preprocessing.to_dict(),
            "decoding": self.decoding(),
        }
        return Captioner(model.encoder, model.decoder, self.tokenizer, config, self.device)

    def log(self, entry: dict[str, Any]) -> None:
        entry = {"stage": self.config.stages[self.stage].name, "epoch": self.epoch, **entry}
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save_state(self, optimizer: torch.optim.Optimizer, epoch: int, step_in_epoch: int) -> None:
        """Everything for `--resume`, replaced at once. A resumed run starts `step_in_epoch` batches
        into `epoch`."""
        state = {
            "config": dataclasses.asdict(self.config),
            "encoder": dataclasses.asdict(self.model.encoder_config),
            "decoder": dataclasses.asdict(self.model.decoder_config),
            "preprocessing": self.preprocessing.to_dict(),
            "tokenizer": [getattr(self.tokenizer, f"{i}_id") for i in ("begin", "end", "pad")],
            "stage": self.stage,
            "epoch": epoch,
            "step": self.step,
            "step_in_epoch": step_in_epoch,
            "seconds": self.seconds,
            "best": self.best,
            "since_best": self.since_best,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "log_bytes": (self.folder / LOG_FILE).stat().st_size,
        }
        partial = self.folder / f".{STATE_FILE}"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE_FILE)

    def validate(self) -> dict[str, float]:
        """Captions the validation photos with the averaged weights and scores them; the best by
        CIDEr becomes the checkpoint."""
        captioner = self.captioner()
        options = captioner.options(num_beams=self.config.validation.num_beams)
        predictions: dict[str, str] = {}
        batch = 50
        rows = self.val_rows
        for start in tqdm(range(0, len(rows), batch), desc="validate", leave=False, delay=5):
            part = rows[start : start + batch]
            images = torch.stack(
                [captioner.preprocess(read_photo(self.manifest, row)) for row in part]
            )
            found = captioner.caption_tensors(images, [options] * len(part))
            predictions |= {row.id: best[0].text for row, best in zip(part, found, strict=True)}
        references = {row.id: row.captions for row in rows}
        scores = score(predictions, references, metrics=("bleu", "cider"))
        result = {name: float(scores[name]) for name in ("BLEU-4", "CIDEr")}
        if rows[0].scene is not None:
            from training.data.scenes import check

            claims = [check(predictions[row.id], row.scene) for row in rows if row.scene]
            flat = [claim.true for photo in claims for claim in photo]
            result["claims_true"] = sum(flat) / max(1, len(flat))
            result["captions_true"] = sum(
                bool(photo) and all(claim.true for claim in photo) for photo in claims
            ) / len(claims)
        self.log({"step": self.step, "seconds": self.seconds, "val": result})
        figures = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
        samples = "; ".join(predictions[row.id] for row in rows[:3])
        tqdm.write(f"epoch {self.epoch} of {self.config.stages[self.stage].name}: {figures}")
        tqdm.write(f"  e.g. {samples}")
        self.since_best += 1
        if result["CIDEr"] > self.best:
            self.best, self.since_best = result["CIDEr"], 0
            save_checkpoint(
                self.folder,
                self.average,
                self.tokenizer,
                self.preprocessing.to_dict(),
                self.decoding(),
                {
                    "config": dataclasses.asdict(self.config),
                    "validation": {**result, "photos": len(rows), "split": "val"},
                    "step": self.step,
                    "minutes": round(self.seconds / 60, 1),
                },
            )
        return result


def train(
    config: TrainConfig, manifest: Manifest, folder: Path, weights: Path | None, resume: bool
) -> Path:
    """Trains and returns the checkpoint's folder. Raises UserError for what the user gave wrong,
    and for a loss that is no number."""
    torch.manual_seed(config.seed)
    run = Run(config, manifest, folder)
    state: dict[str, Any] | None = None
    if resume:
        state = read_state(folder, config)
        run.model, run.preprocessing, run.tokenizer = restore_parts(folder, state)
    else:
        captions = [caption for row in run.train_rows for caption in row.captions]
        choice = config.tokenizer
        run.tokenizer = CaptionTokenizer.train(
            captions, choice.kind, choice.vocab_size, choice.min_count
        )
        run.model, run.preprocessing = make_model(config, run.tokenizer, weights)
        set_aside(folder)
        folder.mkdir(parents=True)
        (folder / LOG_FILE).touch()
        # What --resume needs before the first validation has written a checkpoint.
        run.tokenizer.save(folder / "tokenizer.json")
    run.model.to(run.device)
    run.average = copy.deepcopy(run.model).requires_grad_(False).eval()
    captions_of = Captions(run.train_rows, run.tokenizer, config.decoder.max_tokens)
    first = 0 if state is None else state["stage"]
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    board = SummaryWriter(str(folder / "tensorboard"))
    for run.stage in range(first, len(config.stages)):
        run_stage(run, captions_of, board, state)
        state = None
    board.close()
    print(f"{folder}: best validation CIDEr {run.best:.3f}, {run.seconds / 60:.1f} minutes")
    return folder


def run_stage(run: Run, captions: Captions, board: Any, state: dict[str, Any] | None) -> None:
    """One stage: steps, logs, validates, saves. `state` is where a resumed run goes on."""
    stage, config = run.config.stages[run.stage], run.config
    frozen = stage.encoder == "frozen"
    if run.stage and state is None and (run.folder / WEIGHTS_FILE).exists():
        # Each stage goes on from the best weights so far.
        best, _, _ = load_model(run.folder)
        run.model.load_state_dict(best.state_dict())
        run.average.load_state_dict(best.state_dict())
    run.model.encoder.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(parameter_groups(run.model, stage), betas=(0.9, 0.98), lr=0.0)
    epoch0 = skip = 0
    if state is None:
        run.step = run.since_best = 0
    else:
        run.model.load_state_dict(state["model"])
        run.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        epoch0, skip = state["epoch"], state["step_in_epoch"]
        run.step, run.seconds = state["step"], state["seconds"]
        run.best, run.since_best = state["best"], state["since_best"]
        with (run.folder / LOG_FILE).open("r+b") as file:
            file.truncate(state["log_bytes"])
    augment = Augment(run.preprocessing, stage.augment, stage.flip)
    seed = hash_of(config.seed, run.stage)
    features = make_features(run, stage, augment) if frozen else None
    photos = len(run.train_rows)
    steps_per_epoch = len(epoch_order(photos, stage.batch_photos, seed, 0)) // stage.accumulate
    steps = max(1, stage.epochs * steps_per_epoch)
    if state is not None:
        torch.set_rng_state(state["random"])
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all(state["cuda_random"])
    bar = tqdm(total=stage.epochs * photos, desc=stage.name, unit="photo", smoothing=0.05)
    bar.update(epoch0 * photos + skip * stage.batch_photos)
    for run.epoch in range(epoch0, stage.epochs):
        order = epoch_order(photos, stage.batch_photos, seed, run.epoch)[skip:]
        batches: Iterator[Batch]
        if features is not None:
            batches = features.batches(captions, order, seed, run.epoch)
        else:
            dataset = PhotoDataset(run.manifest, run.train_rows, augment, seed, run.epoch)
            batches = photo_batches(dataset, captions, order, config.workers)
        run.model.train()
        started, saved = time.perf_counter(), time.perf_counter()
        for number, batch in enumerate(batches, start=skip):
            batch = Batch(*(t.to(run.device) for t in dataclasses.astuple(batch)))
            factor = learning_rate_factor(run.step, steps, stage.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            with run.autocast():
                loss = caption_loss(run.model, batch, frozen, stage.label_smoothing)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"{run.folder}: the loss is {loss.item()} at step {run.step} of stage "
                    f"{stage.name!r}; lower its learning rates or set precision: fp32"
                )
            (loss / stage.accumulate).backward()
            bar.update(len(batch.tokens))
            if (number + 1) % stage.accumulate:
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
                "loss": round(loss.item(), 5),
                "lr": stage.decoder_lr * factor,
                "gradient_norm": round(norm.item(), 4),
                "photos_per_second": round(len(batch.tokens) / max(now - started, 1e-9), 2),
            }
            started = now
            run.log(entry)
            board.add_scalar(f"{stage.name}/loss", entry["loss"], run.step)
            board.add_scalar(f"{stage.name}/lr", entry["lr"], run.step)
            bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            if now - saved > SAVE_EVERY_SECONDS:
                run.save_state(optimizer, run.epoch, number + 1)
                saved = now
        optimizer.zero_grad()
        skip = 0
        last = run.epoch + 1 == stage.epochs
        if last or (run.epoch + 1) % config.validation.every == 0:
            result = run.validate()
            for name, value in result.items():
                board.add_scalar(f"{stage.name}/val/{name}", value, run.step)
        run.save_state(optimizer, run.epoch + 1, 0)
        patience = config.validation.patience
        if patience and run.since_best >= patience:
            tqdm.write(f"{stage.name}: no better CIDEr in {patience} validations, stopped early")
            break
    bar.close()


# A killed run loses at most this much (an epoch's end always saves).
SAVE_EVERY_SECONDS = 120.0


def hash_of(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


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

    shape = (encoder.config.grid**2 + encoder.config.prefix_tokens, encoder.config.width)
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
    )


def read_state(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The saved state of a killed run; its config must be the one given."""
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: nothing to resume; train without --resume") from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise UserError(f"{path}: damaged; train without --resume") from error
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    saved = json.loads(json.dumps(state["config"]))
    for name, value in given.items():
        if saved.get(name) != value:
            raise UserError(f"{path}: field {name!r} of the config has changed; resume as it was")
    return dict(state)


def restore_parts(
    folder: Path, state: dict[str, Any]
) -> tuple[CaptioningModel, PreprocessConfig, CaptionTokenizer]:
    """Model (without its weights yet), preprocessing and tokenizer of a run that is resumed."""
    model = CaptioningModel(EncoderConfig(**state["encoder"]), DecoderConfig(**state["decoder"]))
    tokenizer = CaptionTokenizer.load(folder / "tokenizer.json", *state["tokenizer"])
    return model, PreprocessConfig.from_dict(state["preprocessing"]), tokenizer


def set_aside(folder: Path) -> None:
    """An earlier run of the same name is kept as NAME.previous."""
    if not folder.exists():
        return
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)


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
