"""Tiny random captioners of Hugging Face, with opinions, and what lies beside their weights."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, POSITIONS, SIDE = 16, 2, 2, 26, 16
SHARPNESS = 0.35
# Sentences that a tokenizer is fitted on; with them come 256 bytes.
SENTENCES = ["a brown dog runs across the grass .", "two dogs play with a ball .", "a café"]


def tiny_model(
    vocab_size: int, end: int, encoder: str = "vit", liking: float = 1.0, **text: object
) -> "transformers.VisionEncoderDecoderModel":
    """A ViT or DeiT and a GPT-2 with opinions: their logits differ much, and they have as much
    `liking` for the end token as makes captions end at all lengths."""
    torch.manual_seed(3)
    kind = {"vit": transformers.ViTConfig, "deit": transformers.DeiTConfig}[encoder]
    photo = kind(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
    )
    ids = {"bos_token_id": end, "eos_token_id": end}
    shape = {"n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    decoder = transformers.GPT2Config(
        vocab_size=vocab_size,
        add_cross_attention=True,
        initializer_range=0.6,
        **{**shape, **ids, **text},
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(photo, decoder)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        last = model.decoder.transformer.ln_f
        last.weight.mul_(SHARPNESS)
        last.bias.mul_(SHARPNESS)
        likes = model.decoder.transformer.wte.weight[end]
        likes.add_(liking * last.bias / last.bias.norm() ** 2)
    model.generation_config.decoder_start_token_id = end
    model.generation_config.pad_token_id = end
    return model


def tiny_tokenizer() -> "transformers.GPT2Tokenizer":
    """A byte-level BPE whose last token is <|endoftext|>, as GPT-2's is."""
    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fitted.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fitted.train_from_iterator(SENTENCES, trainer)
    model = json.loads(fitted.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_captioner(folder: Path, encoder: str = "vit", **text: object):
    """A whole captioner as people save it: (model, tokenizer, image processor)."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), tokenizer.eos_token_id, encoder, liking=2.0, **text)
    # The backend over Pillow: to the pixel what ours does.
    processor = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return model, tokenizer, processor
