"""Creates the parts of a new run: tokenizer, model, and the preprocessing of its encoder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from handler.caption_tokenizer import (
    SPACELESS_SHARE,
    CaptionTokenizer,
    is_written_without_spaces,
)
from handler.captioner import check_config, load_tokenizer, read_config
from handler.errors import UserError
from handler.image_preprocess import Interpolation, PreprocessConfig
from training.config import TokenizerChoice, TrainConfig
from training.data.manifest import Row
from training.model import CaptioningModel, DecoderConfig, EncoderConfig, EncoderShape, ImageEncoder
from training.weights.encoders import load_encoder


def make_tokenizer(
    choice: TokenizerChoice, rows: Sequence[Row], say: Callable[[str], None] = print
) -> CaptionTokenizer:
    """The tokenizer of a new run with the training photos `rows`. `say` is called with a message if
    byte pairs are chosen automatically. Raises UserError if a vocabulary of words does not fit the
    captions."""
    if choice.checkpoint is not None:
        folder = Path(choice.checkpoint)
        config = read_config(folder)
        check_config(folder, config)
        tokenizer = load_tokenizer(folder, config)
        tokenizer.tasks = {}  # a new decoder has no prompt encoder that could read them
        return tokenizer
    captions = [caption for row in rows for caption in row.captions]
    without_spaces = sum(map(is_written_without_spaces, captions))
    kind = choice.kind or "word"
    if without_spaces > SPACELESS_SHARE * len(captions) and kind == "word":
        what = f"{without_spaces} of {len(captions)} captions are written without spaces"
        if choice.kind == "word":
            raise UserError(
                f"{what}, so each sentence would be one word; set tokenizer: {{kind: bpe}}, or "
                "leave tokenizer.kind out"
            )
        say(f"{what}: the vocabulary consists of byte pairs (tokenizer: {{kind: bpe}})")
        kind = "bpe"
    tokenizer = CaptionTokenizer.train(
        captions, kind, choice.vocab_size, choice.min_count, choice.lowercase
    )
    empty = sum(set(tokenizer.encode(text)) <= {tokenizer.unknown_id} for text in captions)
    if empty > len(captions) / 2:
        raise UserError(
            f"{empty} of {len(captions)} captions have no word in the vocabulary of "
            f"{tokenizer.vocab_size} entries; lower tokenizer.min_count ({choice.min_count}), "
            f"raise tokenizer.vocab_size ({choice.vocab_size}), or set tokenizer: {{kind: bpe}}"
        )
    return tokenizer


def vocab_size_of(choice: TokenizerChoice, tokenizer: CaptionTokenizer) -> int:
    """The decoder's: a checkpoint's may have ids beside its tokenizer's (BLIP's begin token)."""
    if choice.checkpoint is None:
        return tokenizer.vocab_size
    return int(read_config(Path(choice.checkpoint))["model"]["decoder"]["vocab_size"])


def make_model(
    config: TrainConfig, tokenizer: CaptionTokenizer, weights: Path | None
) -> tuple[CaptioningModel, PreprocessConfig]:
    """A new model and the preprocessing for its encoder."""
    source, shape = config.encoder, config.decoder
    mean = std = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    encoder: ImageEncoder | None = None
    encoder_config: EncoderShape
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
            stem=source.stem,
            dropout=source.dropout,
            memory_positions=True,
        )
    decoder_config = DecoderConfig(
        vocab_size=vocab_size_of(config.tokenizer, tokenizer),
        max_positions=shape.max_tokens,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        mlp_width=4 * shape.width,
        memory_width=encoder_config.memory_width,
        dropout=shape.dropout,
    )
    model = CaptioningModel(encoder_config, decoder_config)
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    preprocessing = PreprocessConfig(
        image_size=encoder_config.image_size,
        mean=mean,
        std=std,
        resize=config.resize,
        interpolation=interpolation,
    )
    return model, preprocessing
