"""What a training run is: small frozen dataclasses, read from a YAML preset. Unknown fields and
contradictions are refused on construction, by name."""

import contextlib
import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from handler.beam_search import MAX_BEAMS, OPTIONS, DecodeOptions
from handler.errors import UserError

CONFIGS = Path(__file__).parent / "configs"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_fields(section: Any, where: str, **ranges: tuple[float, float, str]) -> None:
    """Refuses a value that is none of its field's `Literal`, and a number outside its range
    (lowest, highest, how it is said); None stays for the default."""
    for name, kind in typing.get_type_hints(type(section)).items():
        kinds = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
        choices = [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]
        value = getattr(section, name)
        _require(
            not choices or value in choices or (value is None and type(None) in kinds),
            f"{where}{name} must be {' or '.join(choices)}, not {value!r}",
        )
    for name, (low, high, said) in ranges.items():
        value = getattr(section, name)
        # Not the opposite comparison: nan is in no range.
        _require(
            value is None or low <= value <= high, f"{where}{name} must be {said}, not {value!r}"
        )


# Just above 0 and just below 1, for ranges that leave these out.
SOME, NEARLY_ONE = 1e-12, 1 - 1e-6
MOST = 10**9
COUNT = (1, MOST, "1 or more")
RATE = (SOME, 10.0, "above 0, to 10")
DROPOUT = (0.0, NEARLY_ONE, "0 to below 1")


@dataclass(frozen=True)
class EncoderSource:
    """Where the encoder comes from: `pretrained` (see `training.weights.encoders`), or the shape of
    one that is trained from scratch. `image_size` applies to both; left out, it is the pretrained
    one's own, or 224."""

    pretrained: str | None = None
    image_size: int | None = None
    patch_size: int = 16
    width: int = 192
    layers: int = 12
    heads: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(
            self,
            "encoder.",
            image_size=(1, 4096, "1 to 4096"),
            patch_size=(1, 4096, "1 to 4096"),
            width=(1, 65536, "1 to 65536"),
            layers=(1, 1000, "1 to 1000"),
            heads=(1, 1000, "1 to 1000"),
            dropout=DROPOUT,
        )
        size = 224 if self.image_size is None else self.image_size
        if self.pretrained is None:
            _require(
                size % self.patch_size == 0,
                f"encoder.image_size {size} is no multiple of encoder.patch_size {self.patch_size}",
            )
            _require(
                self.width % self.heads == 0,
                f"encoder.width {self.width} is no multiple of encoder.heads {self.heads}",
            )
            return
        _require(bool(self.pretrained.strip()), "encoder.pretrained is empty; leave it out")
        for other in dataclasses.fields(self)[2:]:
            _require(
                getattr(self, other.name) == other.default,
                f"encoder.{other.name} is that of encoder.pretrained; leave one of them out",
            )


@dataclass(frozen=True)
class DecoderShape:
    """`max_tokens` is the longest caption learnt or written, in tokens, end token included."""

    width: int = 384
    layers: int = 4
    heads: int = 6
    dropout: float = 0.1
    max_tokens: int = 32

    def __post_init__(self) -> None:
        _check_fields(
            self,
            "decoder.",
            width=(1, 65536, "1 to 65536"),
            layers=(1, 1000, "1 to 1000"),
            heads=(1, 1000, "1 to 1000"),
            dropout=DROPOUT,
            max_tokens=(2, 65536, "2 to 65536"),
        )
        _require(
            self.width % self.heads == 0,
            f"decoder.width {self.width} is no multiple of decoder.heads {self.heads}",
        )


@dataclass(frozen=True)
class TokenizerChoice:
    """A vocabulary fitted on the training captions, or the one of `checkpoint` (a folder), as a
    student needs it whose captions are not those that its teacher was fitted on. Without a `kind`
    the vocabulary is of words, or of byte pairs for captions in scripts without spaces."""

    kind: Literal["word", "bpe"] | None = None
    vocab_size: int = 10_000
    min_count: int = 2
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self, "tokenizer.", vocab_size=(5, 10**7, "5 to 10000000"), min_count=COUNT)
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
    baseline: Literal["greedy", "mean"] = "mean"

    def __post_init__(self) -> None:
        _check_fields(self, "self_critical: ", temperature=(SOME, 10, "above 0, to 10"))
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
        _require(
            all(isinstance(folder, str) and folder.strip() for folder in self.teachers),
            "distillation: teachers must be names of folders",
        )
        _check_fields(self, "distillation: ", temperature=(SOME, 1000, "above 0, to 1000"))


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
    encoder: Literal["frozen", "trained"] = "trained"
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
        _require(bool(self.name.strip()), "stages: a stage's name is empty")
        _check_fields(
            self,
            f"{where} ",
            epochs=COUNT,
            batch_photos=COUNT,
            accumulate=COUNT,
            views=(1, 1000, "1 to 1000"),
            decoder_lr=RATE,
            encoder_lr=RATE,
            warmup=(0, 1, "a share, 0 to 1"),
            weight_decay=(0, 100, "0 to 100"),
            clip=(SOME, MOST, "above 0"),
            ema=DROPOUT,
        )
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

    def __post_init__(self) -> None:
        _check_fields(
            self,
            "validation.",
            photos=(0, MOST, "0 (all) or more"),
            num_beams=(1, MAX_BEAMS, f"1 to {MAX_BEAMS}"),
            every=COUNT,
            patience=(0, MOST, "0 (never) or more"),
        )


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
    resize: Literal["squash", "crop"] = "squash"
    decoding: dict[str, Any] = field(default_factory=dict)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages: at least one stage is needed")
        _require(
            self.stages[0].self_critical is None,
            f"stage {self.stages[0].name!r}: self_critical needs a stage of cross-entropy before "
            "it: an untrained model's samples earn nothing",
        )
        for name in ("name", "data"):
            value = getattr(self, name)
            _require(bool(value.strip()) and "\0" not in value, f"{name} is empty; give a name")
        _require(
            not set(self.name) & {"/", "\\"} and self.name not in (".", ".."),
            f"name must be the name of a folder, not {self.name!r}",
        )
        _check_fields(
            self, "", seed=(0, 2**63 - 1, "0 to 2^63 - 1"), workers=(0, 1000, "0 to 1000")
        )
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device) is not None,
            f"device must be auto, cpu, cuda or cuda:NUMBER, not {self.device!r}",
        )
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stages: two of them have the same name")
        self._check_decoding()

    def _check_decoding(self) -> None:
        for name in self.decoding:
            _require(
                name in OPTIONS,
                f"decoding.{name}: unknown option; known are {', '.join(sorted(OPTIONS))}",
            )
        options = DecodeOptions(**self.decoding)
        longest = self.decoder.max_tokens - 1
        for name in ("max_new_tokens", "min_new_tokens"):
            value = getattr(options, name) or 0
            _require(
                value <= longest,
                f"decoding.{name} is {value}, but decoder.max_tokens allows {longest}; raise it",
            )


class _Loader(yaml.SafeLoader):
    """YAML in which a field given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"line {node.start_mark.line + 1}: field {name!r} is given twice")
        return super().construct_mapping(node, deep)


def load_config(name_or_path: str, **overrides: Any) -> TrainConfig:
    """Reads a preset by name (`training/configs/NAME.yaml`) or path. `overrides` replace top-level
    fields; `epochs` replaces the epochs of every stage. Raises UserError naming file and field."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name_or_path}.yaml"
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"{path}: no such config; presets are {known}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not readable as YAML ({reason})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of fields")
    epochs = overrides.pop("epochs", None)
    raw = {"name": path.stem, **raw, **{k: v for k, v in overrides.items() if v is not None}}
    try:
        if epochs is not None and isinstance(raw.get("stages"), list):
            raw["stages"] = [
                {**stage, "epochs": epochs} if isinstance(stage, dict) else stage
                for stage in raw["stages"]
            ]
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
        return kind(**{n: _build(hints[n], v, f"{where}{n}.") for n, v in raw.items()})
    if origin is Literal:
        return raw  # checked on construction
    if origin is tuple:
        _require(isinstance(raw, list), f"{where[:-1]}: must be a list")
        return tuple(_build(typing.get_args(kind)[0], v, f"{where}{i}.") for i, v in enumerate(raw))
    if origin in (types.UnionType, typing.Union):
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
    try:
        return kind(raw)
    except OverflowError:
        raise UserError(f"{where[:-1]}: the number is too large") from None
