"""The state of a run: its parts, its folder, its log, and what `--resume` needs.

All random numbers in training (order, augmentation, dropout, samples) are derived from the seed and
the position in the run, so no random state is saved: a resumed run draws the same numbers as an
uninterrupted one.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import (
    Captioner,
    check_device,
    encode_prompt,
    read_config,
    written_prompt,
)
from handler.errors import UserError
from handler.files import FORMAT, atomic_path, write_atomic
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import encoder_config, load_model, save_checkpoint, update_training
from training.config import TrainConfig, build_config
from training.data.manifest import Manifest, Row
from training.folders import LOG_FILE, STATE_FILE, WEIGHTS_FILE
from training.loop.distributed import Processes, join
from training.loop.folder import RunFolder
from training.loop.log import Log, NullLog
from training.loop.optimizer import Optimizer
from training.loop.student import Student
from training.model import CaptioningModel, DecoderConfig
from training.scores.metrics import Tokenizer as MetricTokenizer

# Attributes of `Run` that are saved in its state.
PROGRESS = (
    *("stage", "step", "seconds", "seconds_before"),
    *("at_start", "best", "best_before", "since_best", "stages"),
    "metric_tokenizer",
)


def pick_device(config: TrainConfig) -> tuple[torch.device, bool]:
    """The device, and whether to use bfloat16 on it. Raises UserError for a GPU that this machine
    does not have."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in name and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"device {name}: each process needs a GPU of its own; set device: cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    check_device(name)
    device = torch.device(name)
    if config.precision != "auto":
        return device, config.precision == "bf16"
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return device, bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Run:
    """The state of a run: everything that a resumed run needs, and its folder."""

    def __init__(self, config: TrainConfig, manifest: Manifest, folder: RunFolder) -> None:
        self.config, self.manifest, self.folder = config, manifest, folder
        self.train_rows, self.val_rows = manifest.split("train"), manifest.split("val")
        if config.validation.photos:
            self.val_rows = self.val_rows[: config.validation.photos]
        self.data_hash = digest_of([*self.train_rows, *self.val_rows])
        self.device, self.bf16 = pick_device(config)
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 1 if self.device.type == "cpu" else min(8, max(1, cores))
        self.workers = workers if config.workers is None else config.workers
        self.processes: Processes = join(self.device)
        self.log = (Log if self.processes.first else NullLog)(lambda: folder.path)
        self.stage = self.epoch = self.step = 0
        self.seconds = self.seconds_before = 0.0  # in all steps; before this stage
        # Validation figures of the checkpoint that the run starts from, and of the run's own.
        self.at_start: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.best_before: dict[str, Any] | None = None  # the same when the stage began
        self.since_best = 0  # validations without a better figure
        # The scores before and after each finished stage.
        self.stages: list[dict[str, Any]] = []
        # Which maps show where a word was looked for; a fine-tuned checkpoint has its start's.
        start = config.start
        self.word_maps: dict[str, Any] | None = (
            None if start is None else read_config(Path(start)).get("word_maps")
        )
        # Chosen once, because the scores of a run are compared with each other.
        self.metric_tokenizer: MetricTokenizer = "python"
        self.model: CaptioningModel
        self.average: CaptioningModel
        self.tokenizer: CaptionTokenizer
        self.preprocessing: PreprocessConfig

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def decoding(self) -> dict[str, Any]:
        """The decoding defaults of the checkpoint. No caption is longer, with its prompt, than
        those that are learnt."""
        longest = self.config.decoder.max_tokens - 1 - len(self.prompt())
        own = {**self.config.decoding}
        own["max_new_tokens"] = min(own.get("max_new_tokens") or longest, longest)
        if own.get("min_new_tokens"):
            own["min_new_tokens"] = min(own["min_new_tokens"], longest)
        return own

    def prompt(self) -> list[int]:
        """The ids of the default prompt that each caption follows."""
        prompt = encode_prompt(self.tokenizer, self.config.decoding.get("prompt"))
        return written_prompt(self.tokenizer, prompt)

    def captioner(self) -> Captioner:
        """A captioner with the averaged weights."""
        model = self.average.eval()
        config = {
            "model": {
                "encoder": dataclasses.asdict(model.encoder_config),
                "decoder": dataclasses.asdict(model.decoder_config),
            },
            "preprocessing": self.preprocessing.to_dict(),
            "decoding": self.decoding(),
        }
        return Captioner(model.encoder, model.decoder, self.tokenizer, config, self.device)

    def student(self) -> Student:
        """What the teachers are checked against."""
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
        """Logs a step over `photos` photos; `shown` is displayed beside the bar."""
        self.write(entry)
        self.log.step(shown, photos)

    def save_state(self, optimizer: Optimizer, epoch: int, step_in_epoch: int) -> None:
        """Saves everything for `--resume` atomically. A resumed run skips the first `step_in_epoch`
        batches of `epoch`."""
        state = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "data_hash": self.data_hash,
            "encoder": dataclasses.asdict(self.model.encoder_config),
            "decoder": dataclasses.asdict(self.model.decoder_config),
            "preprocessing": self.preprocessing.to_dict(),
            "tokenizer": list(self.tokenizer.settings.values()),
            "machine": self.machine(),
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
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        self.folder.publish()

    def restore(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Restores the state that `save_state` has saved; later lines of the log are removed."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        if self.processes.first:
            # A log that was lost, or is shorter after a power cut, goes on with what there is.
            path = self.folder.final / LOG_FILE
            lines = path.read_bytes()[: state["log_bytes"]] if path.exists() else b""
            write_atomic(path, lines[: lines.rfind(b"\n") + 1])
        for name, value in self.machine().items():
            if (old := state.get("machine", {}).get(name, value)) != value:
                self.log.say(
                    f"{self.folder.final}: resumed with {name} {value}, but begun with {old}: the "
                    "weights will differ a little from those of a run that was not interrupted"
                )

    def machine(self) -> dict[str, Any]:
        """What the weights depend on beside the config and the dataset."""
        return {
            "processes": self.processes.world,
            "device": self.device.type,
            "precision": "bf16" if self.bf16 else "fp32",
        }

    def begin_stage(self) -> None:
        """Each stage starts from the best weights so far."""
        self.step = self.since_best = 0
        self.seconds_before, self.best_before = self.seconds, self.best
        if self.stage and (self.folder.final / WEIGHTS_FILE).exists():
            best, _, _ = load_model(self.folder.final)
            self.model.load_state_dict(best.state_dict())
            self.average.load_state_dict(best.state_dict())

    def finish_stage(self) -> None:
        """Prints what the stage gained, and writes it to the checkpoint's `config.json`."""
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
        """Saves the averaged weights as the checkpoint unless earlier ones were better by the
        figure `result["chosen_by"]`. If both are equal, the later ones are saved because they have
        been trained for longer (the start's are replaced only at a lower loss), but `since_best` is
        reset only by better ones."""
        self.since_best += 1
        if self.best is not None and goodness(result) < goodness(self.best):
            return
        if self.best is None or goodness(result) > goodness(self.best):
            self.since_best = 0
        elif self.best == self.at_start and result["loss"] >= self.best["loss"]:
            return
        if self.config.start is not None and self.best is None:
            self.at_start = result
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
                **({} if self.at_start is None else {"validation_at_start": self.at_start}),
            },
            self.word_maps,
        )
        self.folder.publish()


def goodness(result: dict[str, Any]) -> float:
    """The figure by which a checkpoint is chosen; higher is better."""
    return float(result["CIDEr"] if result["chosen_by"] == "CIDEr" else -result["loss"])


def digest_of(rows: Iterable[Row]) -> str:
    """A hash of the photos and captions of a dataset, wherever it is on the disk."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.id, row.split, row.captions)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def read_state(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Reads the saved state of a run. `config` must equal the saved one, except for `name` and
    `workers`, which do not influence the weights; stages may have been appended to it."""
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: nothing to resume; train without --resume") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise exceptions of many types
        raise UserError(f"{path}: damaged; train again with --overwrite") from error
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise UserError(f"{path}: not a saved training state; train again with --overwrite")
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: written by another version; train again with --overwrite")
    if missing := set(PROGRESS) - state.keys():
        raise UserError(f"{path}: field {min(missing)!r} is missing; train again with --overwrite")
    given, saved = dataclasses.asdict(config), with_defaults(state["config"])
    for fields in (given, saved):
        fields["stages"] = fields["stages"][: state["stage"] + 1]
    if "data_hash" in state:  # wherever the dataset is now
        saved["data"] = given["data"]
    if (name := changed_field(given, saved)) is not None:
        raise UserError(
            f"{path}: field {name!r} of the config has changed; resume with its old value"
        )
    return dict(state)


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the defaults of the fields that have been added since."""
    try:
        return dataclasses.asdict(build_config(json.loads(json.dumps(saved))))
    except UserError:  # allowed then, but no longer
        return dict(saved)


def changed_field(given: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """The first field in which a config (as a dict) differs from the saved one, of those that
    influence the weights: `name` and `workers` do not."""
    # JSON turns tuples into lists.
    given, saved = json.loads(json.dumps([given, saved]))
    fields = (name for name in given if name not in ("name", "workers"))
    return next((name for name in fields if saved.get(name) != given[name]), None)


def restore_parts(
    folder: Path, state: dict[str, Any]
) -> tuple[CaptioningModel, PreprocessConfig, CaptionTokenizer]:
    """Model (still without its weights), preprocessing and tokenizer of a resumed run."""
    model = CaptioningModel(encoder_config(state["encoder"]), DecoderConfig(**state["decoder"]))
    tokenizer = CaptionTokenizer.load(folder / "tokenizer.json", *state["tokenizer"])
    return model, PreprocessConfig.from_dict(state["preprocessing"]), tokenizer
