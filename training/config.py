"""What a training run is: small frozen dataclasses, read from a YAML preset. Unknown fields and
contradictions are refused on construction, by name."""

import contextlib
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from handler.beam_search import MAX_BEAMS, DecodeOptions
from handler.caption_tokenizer import KINDS
from handler.errors import UserError

CONFIGS = Path(__file__).parent / "configs"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class EncoderSource:
    """Where the encoder comes from: `pretrained` (see `training.pretrained`), or the shape of one
    that is trained from scratch. `image_size` applies to both; left out, it is the pretrained one's
    own, or 224."""

    pretrained: str | None = None
    image_size: int | None = None
    patch_size: int = 16
    width: int = 192
    layers: int = 12
    heads: int = 3
    dropout: float = 0.0


@dataclass(frozen=True)
class DecoderShape:
    """`max_tokens` is the longest caption learnt or written, in tokens, end token included."""

    width: int = 384
    layers: int = 4
    heads: int = 6
    dropout: float = 0.1
    max_tokens: int = 32


@dataclass(frozen=True)
class TokenizerChoice:
    """A vocabulary fitted on the training captions, or the one of `checkpoint` (a folder), as a
    student needs it whose captions are not those that its teacher was fitted on. Without a `kind`
    the vocabulary is of words, or of byte pairs for captions in scripts without spaces."""

    kind: str | None = None
    vocab_size: int = 10_000
    min_count: int = 2
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        _require(self.kind in (None, *KINDS), f"tokenizer.kind must be one of {', '.join(KINDS)}")
        for other in dataclasses.fields(self)[:3]:
            _require(
                self.checkpoint is None or getattr(self, other.name) == other.default,
                f"tokenizer.{other.name} is the one of tokenizer.checkpoint; leave one of them out",
            )


@dataclass(frozen=True)
class SelfCritical:
    """Self-critical training on CIDEr-D (see `training.objectives.self_critical`): `samples`
    captions a photo at a `temperature`, against a `baseline`, the `greedy` caption's reward or the
    `mean` of the other samples'."""

    samples: int = 5
    temperature: float = 0.5
    baseline: str = "mean"

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "self_critical: temperature must be above 0")
        _require(
            self.baseline in ("greedy", "mean"), "self_critical: baseline must be greedy or mean"
        )
        least = 2 if self.baseline == "mean" else 1
        _require(
            least <= self.samples <= MAX_BEAMS,
            f"self_critical: samples must be {least} to {MAX_BEAMS} with baseline {self.baseline}",
        )


@dataclass(frozen=True)
class Distillation:
    """Word-level distillation (see `training.objectives.distillation`) from the checkpoints in the
    folders `teachers`: `weight` is the share of their term in the loss, the rest is cross-entropy;
    `temperature` softens their distributions and the student's."""

    teachers: tuple[str, ...]
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require(len(self.teachers) > 0, "distillation: teachers must name at least one checkpoint")
        _require(0 < self.weight <= 1, "distillation: weight is a share above 0, to 1")
        _require(self.temperature > 0, "distillation: temperature must be above 0")


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a schedule of its own (warm-up, then cosine to zero).

    `encoder: frozen` computes the features of every photo once and trains the decoder on them;
    `views` is how many differently augmented versions of each photo are cached (the first is the
    photo itself). `encoder: trained` runs and trains the encoder too, at `encoder_lr`,
    which each layer further down multiplies by `encoder_layer_decay`.

    The objective is cross-entropy with `label_smoothing` (0.1 unless given), mixed with what
    teachers say where the stage has `distillation`, or, where the stage has `self_critical` (`{}`
    for its defaults), the expected CIDEr-D.
    `gradient_checkpointing` computes each block twice to keep less of it in memory.
    """

    name: str
    epochs: int
    encoder: str = "trained"
    views: int = 1
    batch_photos: int = 32
    accumulate: int = 1
    decoder_lr: float = 3e-4
    encoder_lr: float = 3e-5
    encoder_layer_decay: float = 1.0
    warmup: float = 0.05
    weight_decay: float = 0.01
    label_smoothing: float | None = None
    distillation: Distillation | None = None
    self_critical: SelfCritical | None = None
    clip: float = 1.0
    ema: float = 0.999
    augment: bool = False
    flip: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}:"
        _require(self.encoder in ("frozen", "trained"), f"{where} encoder is frozen or trained")
        _require(self.epochs >= 1, f"{where} epochs must be 1 or more")
        _require(self.batch_photos >= 1, f"{where} batch_photos must be 1 or more")
        _require(self.accumulate >= 1, f"{where} accumulate must be 1 or more")
        _require(self.views >= 1, f"{where} views must be 1 or more")
        _require(self.decoder_lr > 0, f"{where} decoder_lr must be above 0")
        _require(0 <= self.warmup <= 1, f"{where} warmup is a share, 0 to 1")
        _require(
            self.label_smoothing is None or 0 <= self.label_smoothing < 1,
            f"{where} label_smoothing is 0 to below 1",
        )
        _require(
            self.label_smoothing is None or self.self_critical is None,
            f"{where} label_smoothing is of cross-entropy, not of self_critical; leave it out",
        )
        _require(
            self.distillation is None or self.self_critical is None,
            f"{where} distillation and self_critical are two objectives; make them two stages",
        )
        _require(
            self.label_smoothing is None
            or self.distillation is None
            or self.distillation.weight < 1,
            f"{where} label_smoothing is of cross-entropy, which distillation.weight 1 leaves out",
        )
        _require(0 <= self.ema < 1, f"{where} ema is 0 (off) to below 1")
        _require(0 < self.encoder_layer_decay <= 1, f"{where} encoder_layer_decay is above 0, to 1")
        frozen = self.encoder == "frozen"
        _require(
            not frozen or self.encoder_layer_decay == 1,
            f"{where} encoder_layer_decay needs encoder: trained",
        )
        _require(frozen or self.views == 1, f"{where} views needs a frozen encoder")
        augmented = self.augment or self.flip
        _require(
            not (frozen and augmented and self.views == 1),
            f"{where} augment and flip need views of 2 or more when the encoder is frozen",
        )

    @property
    def smoothing(self) -> float:
        return 0.1 if self.label_smoothing is None else self.label_smoothing


@dataclass(frozen=True)
class Validation:
    """After each `every` epochs, captions of `photos` validation photos (0: all) are scored;
    training stops early after `patience` validations without a better CIDEr (0: never)."""

    photos: int = 0
    num_beams: int = 3
    every: int = 1
    patience: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """`workers` is how many processes load photos; left out, 1 beside a model that trains on the
    same processor, or up to 8 for one on a GPU, which would wait for fewer."""

    name: str
    data: str
    stages: tuple[Stage, ...]
    seed: int = 0
    encoder: EncoderSource = field(default_factory=EncoderSource)
    decoder: DecoderShape = field(default_factory=DecoderShape)
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)
    validation: Validation = field(default_factory=Validation)
    resize: str = "squash"
    decoding: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages: at least one stage is needed")
        _require(
            self.stages[0].self_critical is None,
            f"stage {self.stages[0].name!r}: self_critical needs a stage of cross-entropy before "
            "it: an untrained model's samples earn nothing",
        )
        _require(self.precision in ("auto", "fp32", "bf16"), "precision: auto, fp32 or bf16")
        _require(self.workers is None or self.workers >= 0, "workers must be 0 or more")
        DecodeOptions(**self.decoding)


def load_config(name_or_path: str, **overrides: Any) -> TrainConfig:
    """Reads a preset by name (`training/configs/NAME.yaml`) or path. `overrides` replace top-level
    fields; `epochs` replaces the epochs of every stage. Raises UserError naming file and field."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name_or_path}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"{path}: no such config; presets are {known}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of fields")
    epochs = overrides.pop("epochs", None)
    raw = {"name": path.stem, **raw, **{k: v for k, v in overrides.items() if v is not None}}
    try:
        if epochs is not None and isinstance(raw.get("stages"), list):
            raw["stages"] = [{**stage, "epochs": epochs} for stage in raw["stages"]]
        config = _build(TrainConfig, raw, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    assert isinstance(config, TrainConfig)
    return config


def _build(kind: Any, raw: Any, where: str) -> Any:
    """A value of type `kind` from plain YAML, checked field by field."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(raw, dict), f"{where or 'config'}: must be a mapping")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        for name in raw:
            _require(
                name in known, f"{where}{name}: unknown field; known are {', '.join(sorted(known))}"
            )
        for name, f in known.items():
            required = f.default is dataclasses.MISSING
            required &= f.default_factory is dataclasses.MISSING
            _require(not required or name in raw, f"{where}{name}: missing")
        return kind(**{n: _build(hints[n], v, f"{where}{n}.") for n, v in raw.items()})  # type: ignore[operator]
    if origin is tuple:
        _require(isinstance(raw, list), f"{where[:-1]}: must be a list")
        return tuple(_build(typing.get_args(kind)[0], v, f"{where}{i}.") for i, v in enumerate(raw))
    if origin is types.UnionType:
        return None if raw is None else _build(typing.get_args(kind)[0], raw, where)
    if origin is dict:
        _require(isinstance(raw, dict), f"{where[:-1]}: must be a mapping")
        return raw
    if kind is float and isinstance(raw, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 3e-4 as text
            raw = float(raw)
    allowed = (int, float) if kind is float else kind
    _require(
        isinstance(raw, allowed) and (kind is bool or not isinstance(raw, bool)),
        f"{where[:-1]}: must be {kind.__name__}, not {raw!r}",
    )
    return kind(raw)
