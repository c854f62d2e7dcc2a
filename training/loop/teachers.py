"""The teachers of a run: loads their checkpoints and checks them against the student."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner
from handler.errors import UserError
from handler.image_preprocess import PreprocessConfig
from training.checkpoint import load_model
from training.config import Stage, TrainConfig
from training.folders import WEIGHTS_FILE
from training.loop.student import Student
from training.objectives.ensemble import Ensemble, encoder_difference


@dataclass(frozen=True)
class Interface:
    """What captioners must have in common so that one can learn from the distributions of others.
    `vocab_size` is that of the decoder, which may be larger than that of the tokenizer."""

    owner: str
    tokenizer: CaptionTokenizer
    vocab_size: int
    preprocessing: PreprocessConfig


def check_teachers(config: TrainConfig, student: Student) -> None:
    """Finds errors at the start of a run that one of its stages would raise hours later."""
    trained: Stage | None = None
    for stage in config.stages:
        if stage.distillation is not None:
            if trained is not None and stage.encoder == "frozen":
                raise UserError(
                    f"stage {stage.name!r} has a frozen encoder and teachers, which must share it, "
                    f"but stage {trained.name!r} before it trains it; set encoder: trained in "
                    f"stage {stage.name!r}"
                )
            load_teachers(stage, student, stage.encoder == "frozen")
        if stage.encoder == "trained":
            trained = stage


def load_teachers(stage: Stage, student: Student, shared_encoder: bool) -> Ensemble:
    """The teachers of a stage.

    With `shared_encoder`, all teachers must have the student's frozen encoder, because they get its
    features as input. Raises UserError naming the file and field of a teacher that does not fit the
    student, and for a teacher that the run itself would overwrite.
    """
    assert stage.distillation is not None
    folders = [Path(folder) for folder in stage.distillation.teachers]
    written = [folder.resolve() for folder in student.folders]
    for folder in folders:
        if folder.resolve() in written:
            raise UserError(
                f"{folder}: teacher of stage {stage.name!r}, but this run would overwrite it; give "
                "the run another name with --run (make: RUN=NAME)"
            )
    vocab_size = student.model.decoder_config.vocab_size
    shared = Interface("the student", student.tokenizer, vocab_size, student.preprocessing)
    ensemble, _, _ = load_ensemble(folders, shared)
    longest, task = student.max_tokens, student.model.decoder_config.prompt_ids
    for folder, decoder, number in zip(
        folders, ensemble.decoders, ensemble.encoder_of, strict=True
    ):
        if decoder.max_positions < longest:
            raise UserError(
                f"{folder / 'config.json'}: field 'model.decoder.max_positions' is "
                f"{decoder.max_positions}, but the student's captions have up to {longest} tokens; "
                "lower decoder.max_tokens"
            )
        if task and decoder.prompt_encoder is not None:  # which may have another by default
            decoder.prompt_encoder.default_1T = torch.tensor([task])
        if not shared_encoder:
            continue
        difference = encoder_difference(ensemble.encoders[number], student.model.encoder)
        if difference is not None:
            what = (
                f"{folder / WEIGHTS_FILE}: the encoder's weights are"
                if difference == "weights"
                else f"{folder / 'config.json'}: field 'model.encoder.{difference}' is"
            )
            raise UserError(
                f"{what} not the student's, but with a frozen encoder they must share its "
                f"features; set encoder: trained in stage {stage.name!r}"
            )
    return ensemble.to(student.device)


def load_ensemble(
    folders: Sequence[Path], like: Interface | None = None
) -> tuple[Ensemble, Interface, dict[str, Any]]:
    """The checkpoints in `folders` as one ensemble for inference, what they have in common, and the
    config of the first.

    They must agree with `like`, or without it with the first of them. Raises UserError naming the
    file and the field that differs.
    """
    models = []
    configs = []
    for folder in folders:
        model, config, tokenizer = load_model(folder)
        preprocessing = PreprocessConfig.from_dict(config["preprocessing"])
        vocab_size = model.decoder_config.vocab_size
        own = Interface(str(folder), tokenizer, vocab_size, preprocessing)
        like = like or own
        refuse_difference(folder, own, like)
        models.append(model.requires_grad_(False))
        configs.append(config)
    assert like is not None, "an ensemble has at least one member"
    return Ensemble(models), like, configs[0]


def refuse_difference(folder: Path, own: Interface, like: Interface) -> None:
    """Raises UserError, naming file and field, for a checkpoint whose vocabulary or preprocessing
    differs from `like`."""
    tokenizer, config = folder / "tokenizer.json", folder / "config.json"
    if own.tokenizer.vocabulary != like.tokenizer.vocabulary:
        raise UserError(
            f"{tokenizer}: field 'model.vocab' is not that of {like.owner}, but they must have the "
            "same vocabulary; train one with tokenizer.checkpoint set to the other"
        )
    for name in ("begin_id", "end_id", "first_id"):
        mine, theirs = getattr(own.tokenizer, name), getattr(like.tokenizer, name)
        if mine != theirs:
            raise UserError(
                f"{config}: field 'tokenizer.{name}' is {mine}, {like.owner} has {theirs}"
            )
    if own.vocab_size != like.vocab_size:
        raise UserError(
            f"{config}: field 'model.decoder.vocab_size' is {own.vocab_size}, {like.owner} has "
            f"{like.vocab_size}; choose a checkpoint of the same vocabulary"
        )
    theirs = like.preprocessing.to_dict()
    for name, value in own.preprocessing.to_dict().items():
        if value != theirs[name]:
            raise UserError(
                f"{config}: field 'preprocessing.{name}' is {value}, {like.owner} has "
                f"{theirs[name]}; both get the same pixels, so the field must be the same"
            )


def ensemble_captioner(folders: Sequence[Path]) -> Captioner:
    """A captioner of one or several checkpoints, with the decoding defaults of the first."""
    ensemble, shared, config = load_ensemble(folders)
    return Captioner(ensemble.encode_flat, ensemble, shared.tokenizer, config)
