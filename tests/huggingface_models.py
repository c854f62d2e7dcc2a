"""Tiny random captioners of Hugging Face, with opinions, and what lies beside their weights."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, POSITIONS, SIDE = 16, 2, 2, 26, 16
SHARPNESS = 0.35
FLORENCE_SIDE, FLORENCE_SEED, FLORENCE_LIKING, FLORENCE_LOOKING = 24, 4, 16.0, 1.5
# From transformers' names to the original ones.
ORIGINAL_NAMES = (
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.multi_modal_projector\.image_projection\.weight", "image_projection"),
    (r"^model\.multi_modal_projector\.image_position_embed", "image_pos_embed"),
    (r"^model\.multi_modal_projector\.visual_temporal_embed", "visual_temporal_embed"),
    (r"^model\.multi_modal_projector", ""),
    (r"^\.image_proj_norm", "image_proj_norm"),
    (r"^model\.language_model", "language_model.model"),
    (r"^model\.", ""),
    (r"(convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.(conv[12])\.(weight|bias)$", r".\1.fn.dw.\2"),
    (r"spatial_block\.norm1", "spatial_block.window_attn.norm"),
    (r"channel_block\.norm1", "channel_block.channel_attn.norm"),
    (r"_block\.norm2", "_block.ffn.norm"),
    (r"_attn\.(qkv|proj)\.", r"_attn.fn.\1."),
    (r"ffn\.(fc[12])", r"ffn.fn.net.\1"),
)
LIKING, SEED, POSITIONS_GAIN = 3.0, 2, 4.0
# Sentences that a tokenizer is fitted on; with them come 256 bytes.
SENTENCES = ["a brown dog runs across the grass .", "two dogs play with a ball .", "a café"]


def tiny_model(
    vocab_size: int, end: int, encoder: str = "vit", liking: float = 1.0, **text: object
) -> "transformers.VisionEncoderDecoderModel":
    """A ViT or DeiT and a GPT-2 with opinions: their logits differ much, and they have as much
    `liking` for the end token as makes captions end at all lengths."""
    torch.manual_seed(3)
    photo = tiny_encoder(encoder, hidden_size=WIDTH, num_attention_heads=HEADS)
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


def tiny_tokenizer(
    sentences: Sequence[str] = SENTENCES, vocab_size: int = 300
) -> "transformers.GPT2Tokenizer":
    """A byte-level BPE whose last token is <|endoftext|>, as GPT-2's is."""
    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fitted.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fitted.train_from_iterator(sentences, trainer)
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


ENCODERS = ("vit", "deit", "vit_mae", "clip", "dinov2", "dinov2_with_registers")
DECODERS = ("gpt2", "bert", "roberta")
# What the contract promises, and ViT-MAE where it masks nothing.
FAMILIES = (
    "blip",
    "git",
    *(f"{encoder}+{decoder}" for encoder in ENCODERS for decoder in DECODERS),
)
VISION = {
    "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 32, "max_position_embeddings": POSITIONS, "initializer_range": 0.6,
}  # fmt: skip


def tiny_bert_tokenizer() -> "transformers.BertTokenizer":
    """WordPiece with the special tokens of BERT, words and pieces of words."""
    words = sorted({word for text in SENTENCES for word in text.split() if word != "café"})
    letters = sorted({letter for text in SENTENCES for letter in text if letter.isalpha()} - {"é"})
    pieces = ["##s", "##ning", "##g", "'", ",", *(f"##{letter}" for letter in letters)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = dict.fromkeys([*special, *words, *letters, *pieces])
    return transformers.BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)})


def tiny_roberta_tokenizer(*fitted: Any) -> "transformers.RobertaTokenizer":
    """As `tiny_tokenizer`, with RoBERTa's special tokens, which are BART's, too."""
    model = tiny_tokenizer(*fitted)
    vocabulary = {token: i for token, i in model.get_vocab().items() if token != "<|endoftext|>"}
    special = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    vocabulary = {**special, **{token: i + len(special) for token, i in vocabulary.items()}}
    merges = json.loads(model.backend_tokenizer.to_str())["model"]["merges"]
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges])


def tiny_encoder(kind: str, **fields: int) -> "transformers.PreTrainedConfig":
    shape = {**VISION, **fields}
    if kind.startswith("dinov2"):
        # Its table of positions is of larger photos, as in what is published.
        shape["image_size"] = 2 * SIDE
        del shape["intermediate_size"]
        registers = kind != "dinov2"
        made = transformers.Dinov2WithRegistersConfig if registers else transformers.Dinov2Config
        return made(**shape)
    kinds = {
        "vit": transformers.ViTConfig,
        "deit": transformers.DeiTConfig,
        "vit_mae": lambda **shape: transformers.ViTMAEConfig(mask_ratio=0.0, **shape),
        "clip": transformers.CLIPVisionConfig,
    }
    return kinds[kind](**shape)


def tiny_family(name: str):
    """(model, tokenizer, image processor) of any family, with opinions; its ids are set."""
    torch.manual_seed(SEED)
    square, edge = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    encoder, _, decoder = name.partition("+")
    if decoder == "gpt2":
        tokenizer = tiny_tokenizer()
    else:
        tokenizer = tiny_roberta_tokenizer() if decoder == "roberta" else tiny_bert_tokenizer()
    size, begin, end, pad = (
        len(tokenizer), tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    cut = transformers.CLIPImageProcessorPil(size=edge, crop_size=square)
    if name == "blip":
        # Its begin token is beyond the tokenizer's entries.
        ids = {"bos_token_id": size, "sep_token_id": end, "pad_token_id": pad, "eos_token_id": 2}
        text = {**TEXT, **ids, "vocab_size": size + 2}
        config = transformers.BlipConfig(text_config=text, vision_config=VISION)
        model = transformers.BlipForConditionalGeneration(config)
        processor = transformers.BlipImageProcessorPil(size=square)
        head = model.text_decoder.cls.predictions.decoder
    elif name == "git":
        ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
        config = transformers.GitConfig(
            vocab_size=size, vision_config=VISION, tie_word_embeddings=False, **TEXT, **ids
        )
        model, processor = transformers.GitForCausalLM(config), cut
        head = model.output
    elif decoder == "gpt2":
        model = tiny_model(size, tokenizer.eos_token_id, liking=2.0, encoder=encoder)
        head, processor = None, transformers.ViTImageProcessorPil(size=square)
    else:
        made = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[decoder]
        ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
        text = made(vocab_size=size, is_decoder=True, add_cross_attention=True, **{**TEXT, **ids})
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            tiny_encoder(encoder), text
        )
        model = transformers.VisionEncoderDecoderModel(config)
        model.generation_config.decoder_start_token_id = begin
        model.generation_config.eos_token_id = end
        model.generation_config.pad_token_id = pad
        predictions = model.decoder.cls.predictions if decoder == "bert" else model.decoder.lm_head
        head = predictions.decoder
        processor = transformers.ViTImageProcessorPil(size=square)
    if encoder == "clip":
        processor = cut
    if encoder.startswith("dinov2"):
        processor = transformers.BitImageProcessorPil(size=edge, crop_size=square)
    if head is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for part, parameter in model.named_parameters():
                if part.endswith("embeddings.position_embeddings.weight"):
                    parameter.mul_(POSITIONS_GAIN)  # else captions repeat one word
            head.bias[end] += LIKING
            head.bias[pad] -= 50  # no caption has padding in it: RoBERTa gives it no position
    return model.eval(), tokenizer, processor


def florence_processor(side: int, tokens: int, *fitted: Any) -> "transformers.Florence2Processor":
    """Photos of `side` pixels as so many tokens; the tokenizer is `fitted` as `tiny_tokenizer`."""
    tokenizer = tiny_roberta_tokenizer(*fitted)
    tokenizer.add_tokens(["<loc_0>", "<loc_1>"], special_tokens=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    square = {"height": side, "width": side}
    mean_std = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    photos = transformers.CLIPImageProcessorPil(size=square, do_center_crop=False, **mean_std)
    photos.image_seq_length = tokens
    return transformers.Florence2Processor(photos, tokenizer)


def tiny_florence():
    """(model, processor) of a Florence-2 with opinions: two stages, windows of 4 x 4 of which the
    last are not full."""
    torch.manual_seed(FLORENCE_SEED)
    processor = florence_processor(FLORENCE_SIDE, 1 + (FLORENCE_SIDE // 8) ** 2)
    tokenizer = processor.tokenizer
    vision = {
        "depths": (1, 2), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
        "patch_prenorm": (False, True), "embed_dim": (8, 16), "num_heads": (2, 4),
        "num_groups": (2, 4), "window_size": 4, "projection_dim": WIDTH,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "d_model": WIDTH, "max_position_embeddings": 300,
        "encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 4,
        "decoder_layers": LAYERS, "decoder_ffn_dim": 24, "decoder_attention_heads": HEADS,
    }  # fmt: skip
    config = transformers.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id
    )
    model = transformers.Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.tie_weights()
        bart = model.model.language_model
        for part in (bart.encoder, bart.decoder):
            part.embed_positions.weight.mul_(POSITIONS_GAIN)
        for layer in bart.decoder.layers:  # so that captions differ from photo to photo
            layer.encoder_attn.out_proj.weight.mul_(FLORENCE_LOOKING)
        # The head has no bias: the last norm's is what every word is liked by.
        last = bart.decoder.layers[-1].final_layer_norm
        likes = FLORENCE_LIKING * last.bias / last.bias.norm() ** 2
        bart.shared.weight[tokenizer.eos_token_id] += likes
    set_florence_generation(model)
    return model, processor


def set_florence_generation(model) -> None:
    """As it is published."""
    settings = {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}
    settings |= {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


def save_florence(folder: Path):
    """A Florence-2 as people save it: (model, processor)."""
    model, processor = tiny_florence()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def original_layout(folder: Path, model) -> None:
    """Turns what `save_pretrained` wrote into the layout that Florence-2 came out in."""
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    vision |= {"model_type": "davit", "dim_embed": vision.pop("embed_dim")}
    vision["image_pos_embed"] = {"type": "learned_abs_2d", "max_pos_embeddings": 50}
    vision["visual_temporal_embedding"] = {"type": "COSINE", "max_temporal_embeddings": 100}
    vision["image_feature_source"] = ["spatial_avg_pool", "temporal_avg_pool"]
    text |= {"model_type": "florence2_language", "normalize_before": False}
    del config["image_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, theirs in ORIGINAL_NAMES:
            name = re.sub(pattern, theirs, name)
        state[name] = tensor.T.contiguous() if name == "image_projection" else tensor.clone()
    state["language_model.final_logits_bias"] = torch.zeros(1, text["vocab_size"])
    save_file(state, folder / "model.safetensors")


def save_family(folder: Path, name: str):
    """A family as people save it: (model, tokenizer, image processor)."""
    parts = model, tokenizer, processor = tiny_family(name)
    model.save_pretrained(folder)
    if name in ("blip", "git"):
        kind = transformers.BlipProcessor if name == "blip" else transformers.GitProcessor
        kind(processor, tokenizer).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
    return parts
