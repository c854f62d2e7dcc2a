"""What a training run is: small frozen dataclasses, read from a YAML preset. Unknown fields and
contradictions are refused on construction, by name."""

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from handler.beam_search import MAX_BEAMS, OPTIONS, DecodeOptions
from handler.errors import UserError, naming

CONFIGS = Path(__file__).parent / "configs"
UNIONS = (types.UnionType, typing.Union)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


class Range(NamedTuple):
    """Values that a number may take, and how that is said."""

    low: float
    high: float
    text: str


# Just above 0 and just below 1, for ranges that leave these out.
SOME, NEARLY_ONE = 1e-12, 1 - 1e-6
MOST = 10**9
COUNT = Range(1, MOST, "1 or more")
SIDE = Range(1, 4096, "1 to 4096")
WIDTH = Range(1, 65536, "1 to 65536")
LAYERS = Range(1, 1000, "1 to 1000")
RATE = Range(SOME, 10, "above 0, to 10")
DROPOUT = Range(0, NEARLY_ONE, "0 to below 1")


def about(text: str, allowed: Range | None = None, default: str = "") -> dict[str, Any]:
    """The metadata of a field: its meaning, the values that it may take, and its default in words
    where the dataclass has none or None; `docs/config.md` shows them."""
    return {"about": text, "range": allowed, "default": default}


def _check_fields(section: Any, where: str) -> None:
    """Refuses a value that is none of its field's `Literal`, and a number outside its range; None
    stays for the default."""
    kinds_of = typing.get_type_hints(type(section))
    for name, item in ((item.name, item) for item in dataclasses.fields(section)):
        value = getattr(section, name)
        choices = choices_of(kinds_of[name])
        _require(
            not choices or value in choices or (value is None and item.default is None),
            f"{where}{name} must be {' or '.join(choices)}, not {value!r}",
        )
        allowed = item.metadata.get("range")
        # Not the opposite comparison: nan is in no range.
        _require(
            allowed is None or value is None or allowed.low <= value <= allowed.high,
            f"{where}{name} must be {allowed and allowed.text}, not {value!r}",
        )


def choices_of(kind: Any) -> list[str]:
    """The strings of a field's `Literal`, alone or beside None; none for any other kind."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in UNIONS else (kind,)
    return [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]


@dataclass(frozen=True)
class EncoderSource:
    """Where the encoder comes from: `pretrained`, or the shape of one that is trained from
    scratch."""

    pretrained: str | None = field(
        default=None,
        metadata=about(
            "Pretrained encoder: timm/NAME, torchvision/NAME or checkpoint/DIR. The other fields, "
            "except image_size, must then be left out"
        ),
    )
    image_size: int | None = field(
        default=None,
        metadata=about(
            "Side of the square input in pixels",
            SIDE,
            "that of the pretrained encoder, or 224",
        ),
    )
    patch_size: int = field(
        default=16, metadata=about("Side of a patch in pixels; must divide image_size", SIDE)
    )
    stem: Literal["linear", "convolutional"] = field(
        default="linear",
        metadata=about(
            "What makes a token of a patch: one linear layer, or four convolutions, which learn "
            "faster from scratch (patch_size must be a multiple of 8, width of 4)"
        ),
    )
    width: int = field(default=192, metadata=about("Width of a token; a multiple of heads", WIDTH))
    layers: int = field(default=12, metadata=about("Transformer blocks", LAYERS))
    heads: int = field(default=3, metadata=about("Attention heads per block", LAYERS))
    dropout: float = field(default=0.0, metadata=about("Dropout rate", DROPOUT))

    def __post_init__(self) -> None:
        _check_fields(self, "encoder.")
        size = 224 if self.image_size is None else self.image_size
        if self.pretrained is None:
            _require(
                size % self.patch_size == 0,
                f"encoder.image_size {size} is no multiple of encoder.patch_size {self.patch_size}",
            )
            _require(
                self.stem == "linear" or (self.patch_size % 8 == 0 and self.width % 4 == 0),
                "encoder.stem convolutional needs an encoder.patch_size that is a multiple of 8, "
                "and an encoder.width that is a multiple of 4",
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
    """The decoder, which is trained from scratch."""

    width: int = field(default=384, metadata=about("Width of a token; a multiple of heads", WIDTH))
    layers: int = field(default=4, metadata=about("Transformer blocks", LAYERS))
    heads: int = field(default=6, metadata=about("Attention heads per block", LAYERS))
    dropout: float = field(default=0.1, metadata=about("Dropout rate", DROPOUT))
    max_tokens: int = field(
        default=32,
        metadata=about(
            "Length of the longest caption in training and generation, in tokens, including the "
            "end token",
            Range(2, 65536, "2 to 65536"),
        ),
    )

    def __post_init__(self) -> None:
        _check_fields(self, "decoder.")
        _require(
            self.width % self.heads == 0,
            f"decoder.width {self.width} is no multiple of decoder.heads {self.heads}",
        )


@dataclass(frozen=True)
class TokenizerChoice:
    """A vocabulary fitted on the training captions, or the one of a checkpoint, as a student needs
    it whose captions are not those that its teacher was fitted on."""

    kind: Literal["word", "bpe"] | None = field(
        default=None,
        metadata=about(
            "Whether the vocabulary consists of words or of byte pairs",
            default="`word`, or `bpe` if the captions are written without spaces",
        ),
    )
    vocab_size: int = field(
        default=10_000, metadata=about("Largest number of tokens", Range(5, 10**7, "5 to 10000000"))
    )
    min_count: int = field(
        default=2, metadata=about("How often a word must occur to be in the vocabulary", COUNT)
    )
    lowercase: bool | None = field(
        default=None,
        metadata=about(
            "Whether captions are learnt and written in small letters; left out: words are, byte "
            "pairs keep the case"
        ),
    )
    add_words: int = field(
        default=0,
        metadata=about(
            "With `FROM=` and a vocabulary of words: those that it lacks are added where training "
            "captions have them at least so often; 0: none",
            Range(0, MOST, "0 (none) or more"),
        ),
    )
    checkpoint: str | None = field(
        default=None,
        metadata=about("Folder of a checkpoint whose tokenizer is used instead of a new one"),
    )

    def __post_init__(self) -> None:
        _check_fields(self, "tokenizer.")
        for other in dataclasses.fields(self):
            _require(
                self.checkpoint is None
                or other.name in ("checkpoint", "add_words")
                or getattr(self, other.name) == other.default,
                f"tokenizer.{other.name} is the one of tokenizer.checkpoint; leave one of them out",
            )


@dataclass(frozen=True)
class SelfCritical:
    """Self-critical training on CIDEr-D (see `training.objectives.self_critical`)."""

    samples: int = field(
        default=5,
        metadata=about(
            "Number of captions that are sampled per photo, 2 to 16; with baseline greedy also 1"
        ),
    )
    temperature: float = field(
        default=0.5,
        metadata=about("Sampling temperature", RATE),
    )
    baseline: Literal["greedy", "mean"] = field(
        default="mean",
        metadata=about(
            "Reward that is subtracted from a sample's: that of the greedy caption, or the mean of "
            "the other samples of the photo"
        ),
    )
    cross_entropy: float = field(
        default=0.0,
        metadata=about(
            "Weight of the cross-entropy of people's captions, added to the loss; it is there to "
            "keep rare words",
            Range(0, 1000, "0 to 1000"),
        ),
    )

    def __post_init__(self) -> None:
        _check_fields(self, "self_critical: ")
        least = 2 if self.baseline == "mean" else 1
        _require(
            least <= self.samples <= MAX_BEAMS,
            f"self_critical: samples must be {least} to {MAX_BEAMS} with baseline {self.baseline}",
        )


@dataclass(frozen=True)
class Distillation:
    """Word-level distillation (see `training.objectives.distillation`)."""

    teachers: tuple[str, ...] = field(
        metadata=about(
            "Folders of the teachers' checkpoints; the target is the mean of their distributions"
        )
    )
    weight: float = field(
        default=0.5,
        metadata=about(
            "Weight of the teachers' term in the loss, above 0, to 1; cross-entropy has 1 - weight"
        ),
    )
    temperature: float = field(
        default=1.0,
        metadata=about(
            "Temperature that softens the distributions of the teachers and of the student",
            Range(SOME, 1000, "above 0, to 1000"),
        ),
    )

    def __post_init__(self) -> None:
        _require(len(self.teachers) > 0, "distillation: teachers must name at least one checkpoint")
        _require(0 < self.weight <= 1, "distillation: weight is a share above 0, to 1")
        _require(
            all(isinstance(folder, str) and folder.strip() for folder in self.teachers),
            "distillation: teachers must be names of folders",
        )
        _check_fields(self, "distillation: ")


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a schedule of its own (warm-up, then cosine to zero). Its
    objective is cross-entropy, mixed with what teachers say where the stage has `distillation`, or,
    where it has `self_critical`, the expected CIDEr-D."""

    name: str = field(metadata=about("Name of the stage in logs and messages"))
    epochs: int = field(metadata=about("Passes over the training photos", COUNT))
    encoder: Literal["frozen", "trained"] = field(
        default="trained",
        metadata=about(
            "`frozen`: compute the features of every photo once and train only the decoder; "
            "`trained`: train the encoder as well"
        ),
    )
    views: int = field(
        default=1,
        metadata=about(
            "Number of versions of each photo whose features are cached with a frozen encoder (1 "
            "with a trained one); the first is the photo itself, the others are augmented",
            LAYERS,
        ),
    )
    batch_photos: int = field(default=32, metadata=about("Photos per batch", COUNT))
    accumulate: int = field(default=1, metadata=about("Batches per optimizer step", COUNT))
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata=about(
            "`muon`: Muon for the matrices of the blocks and AdamW for all other weights, with the "
            "same rates; for models that start from random weights"
        ),
    )
    decoder_lr: float = field(
        default=3e-4, metadata=about("Peak learning rate of the decoder", RATE)
    )
    encoder_lr: float = field(
        default=3e-5, metadata=about("Peak learning rate of the encoder's last block", RATE)
    )
    encoder_layer_decay: float = field(
        default=1.0,
        metadata=about(
            "Factor on encoder_lr for each block further from the output; above 0, to 1"
        ),
    )
    warmup: float = field(
        default=0.05,
        metadata=about(
            "Share of the steps in which the learning rate rises", Range(0, 1, "0 to 1")
        ),
    )
    weight_decay: float = field(
        default=0.01, metadata=about("Weight decay of the optimizer", Range(0, 100, "0 to 100"))
    )
    label_smoothing: float | None = field(
        default=None,
        metadata=about("Label smoothing of cross-entropy, 0 to below 1", default="`0.1`"),
    )
    logit_adjustment: float = field(
        default=0.0,
        metadata=about(
            "Rare words are said more often: the loss is that of logits to which this times the "
            "log of each token's share of the captions is added (Menon et al. 2021); not beside "
            "distillation or without cross-entropy",
            Range(0, 1, "0 to 1"),
        ),
    )
    distillation: Distillation | None = field(
        default=None, metadata=about("Distillation from teachers (table below)")
    )
    self_critical: SelfCritical | None = field(
        default=None,
        metadata=about(
            "Self-critical training instead of cross-entropy (table below); `{}` for its defaults"
        ),
    )
    clip: float = field(
        default=1.0,
        metadata=about("Gradients are clipped to this norm", Range(SOME, MOST, "above 0")),
    )
    ema: float = field(
        default=0.999,
        metadata=about(
            "Decay of the exponential moving average of the weights; the average is what is saved. "
            "0 turns it off",
            DROPOUT,
        ),
    )
    augment: bool = field(
        default=False,
        metadata=about(
            "Random crops and colour changes of the training photos; with a frozen encoder, views "
            "must be 2 or more"
        ),
    )
    flip: bool = field(
        default=False,
        metadata=about(
            "Mirror photos at random and swap left and right in their captions; needs "
            "views as augment does"
        ),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=about("Recompute each block in the backward pass to save memory")
    )

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}:"
        _require(bool(self.name.strip()), "stages: a stage's name is empty")
        _check_fields(self, f"{where} ")
        _require(
            self.label_smoothing is None or 0 <= self.label_smoothing < 1,
            f"{where} label_smoothing is 0 to below 1",
        )
        rewarded = self.self_critical is not None and not self.self_critical.cross_entropy
        _require(
            self.label_smoothing is None or not rewarded,
            f"{where} label_smoothing is of cross-entropy, which self_critical leaves out without "
            "its cross_entropy; give it one, or leave label_smoothing out",
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
        _require(
            not self.logit_adjustment or not (self.distillation or rewarded),
            f"{where} logit_adjustment is of cross-entropy, neither of distillation nor of "
            "self_critical without its cross_entropy; leave it out",
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
    """Captions of validation photos are scored while a run trains."""

    photos: int = field(
        default=0,
        metadata=about("Number of validation photos; 0 for all", Range(0, MOST, "0 (all) or more")),
    )
    num_beams: int = field(
        default=3, metadata=about("Number of beams", Range(1, MAX_BEAMS, f"1 to {MAX_BEAMS}"))
    )
    every: int = field(default=1, metadata=about("Epochs between two validations", COUNT))
    patience: int = field(
        default=0,
        metadata=about(
            "A stage stops after this many validations without a better CIDEr; 0: never",
            Range(0, MOST, "0 (never) or more"),
        ),
    )

    def __post_init__(self) -> None:
        _check_fields(self, "validation.")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    name: str = field(metadata=about("Name of the run", default="the name of the file"))
    data: str | None = field(
        metadata=about(
            "Name of a dataset under build/data, or its folder; without it, `DATA=` is needed",
            default="that of `DATA=`",
        )
    )
    stages: tuple[Stage, ...] = field(metadata=about("The stages, in order"))
    start: str | None = field(
        default=None,
        metadata=about(
            "Checkpoint that is fine-tuned; given on the command line, `FROM=`, never in a config"
        ),
    )
    seed: int = field(
        default=0,
        metadata=about("Seed of all random numbers", Range(0, 2**63 - 1, "0 to 2^63 - 1")),
    )
    encoder: EncoderSource = field(
        default_factory=EncoderSource, metadata=about("The encoder (table below)")
    )
    decoder: DecoderShape = field(
        default_factory=DecoderShape, metadata=about("The decoder (table below)")
    )
    tokenizer: TokenizerChoice = field(
        default_factory=TokenizerChoice, metadata=about("The tokenizer (table below)")
    )
    validation: Validation = field(
        default_factory=Validation, metadata=about("Validation during training (table below)")
    )
    resize: Literal["squash", "crop"] = field(
        default="squash",
        metadata=about(
            "How a photo becomes a square: `squash` resizes the whole photo, `crop` cuts out its "
            "middle"
        ),
    )
    decoding: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("Default decoding options of the checkpoint (see [serving.md](serving.md))"),
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata=about("Data type of matrix products; `auto`: bf16 if the processor supports it"),
    )
    device: str = field(default="auto", metadata=about("`auto`, `cpu`, `cuda` or `cuda:NUMBER`"))
    workers: int | None = field(
        default=None,
        metadata=about(
            "Number of processes that load photos",
            Range(0, 1000, "0 to 1000"),
            "1 on a CPU, up to 8 on a GPU",
        ),
    )

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages: at least one stage is needed")
        _require(
            self.stages[0].self_critical is None or self.start is not None,
            f"stage {self.stages[0].name!r}: self_critical needs a stage of cross-entropy before "
            "it, or a captioner to start from (--from): an untrained model's samples earn nothing",
        )
        _require(
            not self.tokenizer.add_words or self.start is not None,
            "tokenizer.add_words needs a captioner to start from (--from)",
        )
        for name in ("name", "data", "start"):
            value = getattr(self, name)
            _require(
                value is None or (bool(value.strip()) and "\0" not in value),
                f"{name} is empty; give a name",
            )
        _require(
            is_folder_name(self.name),
            f"name must be the name of a folder, not {self.name!r}",
        )
        _check_fields(self, "")
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device) is not None,
            f"device must be auto, cpu, cuda or cuda:NUMBER, not {self.device!r}",
        )
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stages: two of them have the same name")
        self._check_decoding()

    def _check_decoding(self) -> None:
        options = decode_options(self.decoding)
        longest = self.decoder.max_tokens - 1
        for name in ("max_new_tokens", "min_new_tokens"):
            value = getattr(options, name) or 0
            _require(
                value <= longest,
                f"decoding.{name} is {value}, but decoder.max_tokens allows {longest}; raise it",
            )


def is_folder_name(name: str) -> bool:
    """Whether a name, as that of a run, is one folder of the folder that it is put into."""
    return bool(name.strip()) and not set(name) & {"/", "\\", "\0"} and name not in (".", "..")


def decode_options(decoding: Mapping[str, Any]) -> DecodeOptions:
    """The options of a config's section `decoding`. Raises UserError naming the option."""
    for name in decoding:
        _require(
            name in OPTIONS,
            f"decoding.{name}: unknown option; known are {', '.join(sorted(OPTIONS))}",
        )
    return DecodeOptions(**decoding)


class _Loader(yaml.SafeLoader):
    """YAML in which a field given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        names = [self.construct_object(key, deep=True) for key in keys]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"line {node.start_mark.line + 1}: field {name!r} is given twice")
        return super().construct_mapping(node, deep)


def load_config(name_or_path: str, **overrides: Any) -> TrainConfig:
    """Reads a preset by name (`training/configs/NAME.yaml`) or path. `overrides` replace top-level
    fields; `epochs` replaces the epochs of every stage. Raises UserError naming file and field."""
    path, fields = read_fields(name_or_path, **overrides)
    with naming(path):
        return build_config(fields)


def read_fields(name_or_path: str, **overrides: Any) -> tuple[Path, dict[str, Any]]:
    """The file of a preset and its fields with `overrides`, as for `load_config`, not checked
    yet."""
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
    if "start" in raw:
        raise UserError(f"{path}: start: give the checkpoint with --from (make: FROM=DIR)")
    epochs = overrides.pop("epochs", None)
    given = {k: v for k, v in overrides.items() if v is not None}
    fields = {"name": path.stem, "data": None, **raw, **given}
    if epochs is not None and isinstance(raw.get("stages"), list):
        fields["stages"] = [
            {**stage, "epochs": epochs} if isinstance(stage, dict) else stage
            for stage in raw["stages"]
        ]
    return path, fields


def build_config(fields: Mapping[str, Any]) -> TrainConfig:
    """A config from its fields as in YAML. Raises UserError naming the field."""
    config = _build(TrainConfig, fields, "")
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
    if origin in UNIONS:
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
