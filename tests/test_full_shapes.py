"""Parity with `generate` at the sizes that people use, with random weights: BLIP base and large,
GIT base, with prompts and without; Florence-2 base with two tasks, eager and exported."""

from pathlib import Path

import pytest
import torch
from huggingface_models import SENTENCES, transformers
from test_families import PROMPTS, caption_prompted, generate, same

from export.export import export_checkpoint
from handler.captioner import Captioner
from tests.benchmarks import contenders
from tests.benchmarks.decoding import florence
from training.checkpoint import load_captioner
from training.import_huggingface import import_huggingface

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.3,
    "max_new_tokens": 9,
}
# So much more probable than random weights have it that some captions end before the limit.
LIKING = 2.2


def full_tokenizer() -> "transformers.BertTokenizer":
    """As many entries as BERT's own has, its special tokens at their ids."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    words = sorted({word for text in SENTENCES for word in text.split()})
    named = {**special, **{1000 + i: word for i, word in enumerate(words)}}
    return transformers.BertTokenizer(vocab={named.get(i, f"word{i}"): i for i in range(30522)})


def blip(layers: int, width: int, heads: int):
    """A ViT of these sizes, and the text decoder of both published models."""
    vision = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "image_size": 384,
    }  # fmt: skip
    text = {"num_attention_heads": 12, "encoder_hidden_size": width}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = transformers.BlipForConditionalGeneration(config)
    processor = transformers.BlipImageProcessorPil(size={"height": 384, "width": 384})
    head = model.text_decoder.cls.predictions.decoder
    return model, head, transformers.BlipProcessor(processor, full_tokenizer())


def git():
    model = transformers.GitForCausalLM(transformers.GitConfig())
    processor = transformers.CLIPImageProcessorPil()
    return model, model.output, transformers.GitProcessor(processor, full_tokenizer())


# With millions of parameters. The large one is known as 470 M: there the tied head counts twice.
MODELS = {
    "blip base": (224, lambda: blip(12, 768, 12)),
    "blip large": (446, lambda: blip(24, 1024, 16)),
    "git base": (177, git),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_full_shapes_caption_as_generate_does(name, tmp_path: Path):
    torch.manual_seed(0)
    millions, make = MODELS[name]
    model, head, processor = make()
    model.eval()
    end = 102
    head.bias[end] += LIKING
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    model.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    ours, tokenizer = load_captioner(tmp_path / "ours"), processor.tokenizer
    lengths = set()
    for prompt, found in zip(PROMPTS, caption_prompted(ours, **OPTIONS), strict=True):
        theirs = generate(model, processor.image_processor, tokenizer, prompt, **OPTIONS)
        same(found, theirs, tokenizer)
        lengths |= {len(caption.ids) for photo in found for caption in photo}
    assert len(lengths) > 1


def test_full_florence_answers_as_generate_does(tmp_path: Path):
    """A sentence of 20 tokens and a paragraph of 256."""
    florence(tmp_path / "theirs")
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "export")
    model = contenders.load_theirs(tmp_path / "theirs")
    eager, exported = load_captioner(tmp_path / "ours"), Captioner.load(tmp_path / "export")
    sentence, *_, paragraph = eager.tokenizer.tasks
    photos, opening = contenders.images_of(1, 768), len(eager.tokenizer.opening)
    for task, tokens in ((sentence, 20), (paragraph, 256)):
        ids = eager.tokenizer.tasks[task]["ids"]
        [expected] = contenders.generate(model, photos, 3, tokens, ids).tolist()
        for captioner in (eager, exported):
            [[best]] = contenders.ours(captioner, photos, 3, tokens, task)
            assert best.ids == expected[opening:-1]  # its end is forced
