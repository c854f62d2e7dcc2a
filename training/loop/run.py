"""Where a run stands: its parts, its folder, what it logs and what `--resume` needs.

All that is random in training (order, augmentation, dropout, samples) is derived from the seed and
the place in the run, so that no random state is kept: a resumed run draws what it would have drawn.
"""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import torch

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner
from handler.errors import UserError
from handler.files import FORMAT, atomic_path
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import encoder_config, load_model, save_checkpoint, update_training
from training.config import TrainConfig
from training.data.manifest import Manifest
from training.folders import LOG_FILE, STATE_FILE, WEIGHTS_FILE
from training.loop.distributed import Processes, join
from training.loop.folder import RunFolder
from training.loop.log import Log, NullLog
from training.loop.student import Student
from training.model import CaptioningModel, DecoderConfig

# What `Run` counts, and keeps in its state.
PROGRESS = (
    *("stage", "step", "seconds", "seconds_before"),
    *("best", "best_before", "since_best", "stages"),
)


def pick_device(config: TrainConfig) -> tuple[torch.device, bool]:
    """The device, and whether to run in bfloat16 there. Raises UserError for one that is not
    there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"device {name}: this machine has {there} GPUs; set device: auto or cpu")
    if config.precision != "auto":
        return device, config.precision == "bf16"
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return device, bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Run:
    """Where a run stands: everything that a resumed run needs, and its folder."""

    def __init__(self, config: TrainConfig, manifest: Manifest, folder: RunFolder) -> None:
        self.config, self.manifest, self.folder = config, manifest, folder
        self.train_rows, self.val_rows = manifest.split("train"), manifest.split("val")
        if config.validation.photos:
            self.val_rows = self.val_rows[: config.validation.photos]
        self.device, self.bf16 = pick_device(config)
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 1 if self.device.type == "cpu" else min(8, max(1, cores))
        self.workers = workers if config.workers is None else config.workers
        self.processes: Processes = join(self.device)
        self.log = (Log if self.processes.first else NullLog)(lambda: folder.path)
        self.stage = self.epoch = self.step = 0
        self.seconds = self.seconds_before = 0.0  # of all steps, and of the stages before this one
        self.best: dict[str, Any] | None = None  # validation figures of the checkpoint
        self.best_before: dict[str, Any] | None = None  # the same when the stage began
        self.since_best = 0  # validations without a better figure
        # What each finished stage gained.
        self.stages: list[dict[str, Any]] = []
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

    def student(self) -> Student:
        """The model as its teachers see it."""
        return Student(
            self.model,
            self.tokenizer,
            self.preprocessing,
            self.config.decoder.max_tokens,
            self.device,
            (self.folder.final, self.folder.previous),
        )

    def write(self, entry: dict[str, Any]) -> None:
        """Adds a line to the log."""
        stage = self.config.stages[self.stage].name
        self.log.write({"stage": stage, "epoch": self.epoch, **entry})

    def log_step(self, entry: dict[str, Any], shown: dict[str, float], photos: int) -> None:
        """Logs a step over so many photos; `shown` stands beside the bar."""
        self.write(entry)
        self.log.step(shown, photos)

    def save_state(self, optimizer: torch.optim.Optimizer, epoch: int, step_in_epoch: int) -> None:
        """Everything for `--resume`, replaced at once. A resumed run starts `step_in_epoch` batches
        into `epoch`."""
        state = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "encoder": dataclasses.asdict(self.model.encoder_config),
            "decoder": dataclasses.asdict(self.model.decoder_config),
            "preprocessing": self.preprocessing.to_dict(),
            "tokenizer": list(self.tokenizer.settings.values()),
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            **{name: getattr(self, name) for name in PROGRESS},
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log_bytes": (self.folder.path / LOG_FILE).stat().st_size,
        }
        path = self.folder.path / STATE_FILE
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # all that torch says of a disk that is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        self.folder.publish()

    def restore(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Goes back to where `save_state` was called; what was logged since is cut off."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        if self.processes.first:
            with (self.folder.final / LOG_FILE).open("r+b") as file:
                file.truncate(state["log_bytes"])

    def begin_stage(self) -> None:
        """Each stage goes on from the best weights so far."""
        self.step = self.since_best = 0
        self.seconds_before, self.best_before = self.seconds, self.best
        if self.stage and (self.folder.final / WEIGHTS_FILE).exists():
            best, _, _ = load_model(self.folder.final)
            self.model.load_state_dict(best.state_dict())
            self.average.load_state_dict(best.state_dict())

    def finish_stage(self) -> None:
        """Says what the stage gained, in print and in the checkpoint's `config.json`."""
        assert self.best is not None, "the last epoch of a stage is validated"
        name = self.config.stages[self.stage].name
        minutes = (self.seconds - self.seconds_before) / 60
        before = None if self.best_before is None else self.best_before["CIDEr"]
        gain = {"name": name, "CIDEr_before": before, "CIDEr_after": self.best["CIDEr"]}
        self.stages.append({**gain, "minutes": round(minutes, 1)})
        self.log.say(
            f"{name}: validation CIDEr {'none' if before is None else f'{before:.3f}'} -> "
            f"{self.best['CIDEr']:.3f} in {minutes:.1f} minutes"
        )
        update_training(self.folder.final, {"stages": self.stages})

    def consider(self, result: dict[str, Any]) -> None:
        """Makes the averaged weights the checkpoint where no earlier ones were better, by the
        figure that `result["chosen_by"]` names. Equal figures are no reason to stay with weights
        that have seen less, and none to train on for long."""
        self.since_best += 1
        if self.best is not None and goodness(result) < goodness(self.best):
            return
        if self.best is None or goodness(result) > goodness(self.best):
            self.since_best = 0
        self.best = result
        save_checkpoint(
            self.folder.path,
            self.average,
            self.tokenizer,
            self.preprocessing.to_dict(),
            self.decoding(),
            {
                "config": dataclasses.asdict(self.config),
                "validation": result,
                "stages": self.stages,
                "step": self.step,
                "minutes": round(self.seconds / 60, 1),
            },
        )
        self.folder.publish()


def goodness(result: dict[str, Any]) -> float:
    """The figure that chooses a checkpoint, higher for a better one."""
    return float(result["CIDEr"] if result["chosen_by"] == "CIDEr" else -result["loss"])


def read_state(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The saved state of a killed run. Its config must be the one given, but for its name and its
    `workers`, which change no weight; further stages may have been added to the end of a run."""
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: nothing to resume; train without --resume") from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise UserError(f"{path}: damaged; train again with --overwrite") from error
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"{path}: not a state of training; train again with --overwrite")
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: written by another version; train again with --overwrite")
    if missing := set(PROGRESS) - state.keys():
        raise UserError(f"{path}: field {min(missing)!r} is missing; train again with --overwrite")
    given, saved = dataclasses.asdict(config), dict(state["config"])
    for fields in (given, saved):
        fields["stages"] = fields["stages"][: state["stage"] + 1]
    if (name := changed_field(given, saved)) is not None:
        raise UserError(f"{path}: field {name!r} of the config has changed; resume as it was")
    return dict(state)


def changed_field(given: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """The first field of a config as a dict that differs from the saved one's, of those that change
    a weight: `name` and `workers` do not."""
    # A tuple is a list in JSON.
    given, saved = json.loads(json.dumps([given, saved]))
    fields = (name for name in given if name not in ("name", "workers"))
    return next((name for name in fields if saved.get(name) != given[name]), None)


def restore_parts(
    folder: Path, state: dict[str, Any]
) -> tuple[CaptioningModel, PreprocessConfig, CaptionTokenizer]:
    """Model (without its weights yet), preprocessing and tokenizer of a run that is resumed."""
    model = CaptioningModel(encoder_config(state["encoder"]), DecoderConfig(**state["decoder"]))
    tokenizer = CaptionTokenizer.load(folder / "tokenizer.json", *state["tokenizer"])
    return model, PreprocessConfig.from_dict(state["preprocessing"]), tokenizer
