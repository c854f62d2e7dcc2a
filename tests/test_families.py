"""Golden parity of every family that is imported: numbers, sequences, scores and texts of
`generate`, eager and exported."""

import copy
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from huggingface_models import FAMILIES, SIDE, save_family, transformers
from test_image_preprocess import natural

from export.export import export_checkpoint
from handler.captioner import Captioner
from handler.errors import UserError
from training.checkpoint import load_captioner, load_model
from training.config import TokenizerChoice
from training.import_huggingface import import_huggingface
from training.loop.start import make_tokenizer, vocab_size_of

PHOTOS = [natural(*size) for size in ((40, 30), (30, 40), (64, 20))]
# Every decoder, and every way of a prefix before the patches.
SEARCHED = ("blip", "git", "clip+bert", "dinov2_with_registers+roberta")
# No prompt, and prompts of two lengths.
PROMPTS = (None, "a brown", "two dogs play with a")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """name -> (checkpoint, model, tokenizer, image processor), each made once."""
    made = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            parts = save_family(folder / "theirs", name)
            import_huggingface(str(folder / "theirs"), folder / "ours")
            made[name] = (folder / "ours", *parts)
        return made[name]

    return make


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_theirs(name, families):
    checkpoint, theirs, tokenizer, _ = families(name)
    ours, _, _ = load_model(checkpoint)
    pixels, tokens = torch.randn(2, 3, SIDE, SIDE), torch.randint(5, len(tokenizer), (2, 9))
    if "+" in name:
        expected = theirs(pixel_values=pixels, decoder_input_ids=tokens).logits
    else:
        expected = theirs(pixel_values=pixels, input_ids=tokens).logits[:, -9:]
    assert expected.std() > 0.3
    positions, mask = torch.arange(9).expand(2, -1), torch.ones(2, 9, 9, dtype=torch.bool).tril()
    found = ours(pixels, tokens, positions, mask)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def prompted(model, tokenizer, prompt: str | None) -> tuple[dict, int]:
    """What `generate` takes for a prompt of every photo, as each class wants it, and how many
    tokens it has."""
    if prompt is None:
        return {}, 0
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    name, kind = "input_ids", type(model).__name__
    text = [tokenizer.cls_token_id, *ids]
    if kind.startswith("Blip"):
        text.append(tokenizer.sep_token_id)  # it replaces the first and drops the last
    if kind.startswith("Vision"):
        name = "decoder_input_ids"
        text[0] = model.generation_config.decoder_start_token_id
    return {name: torch.tensor([text] * len(PHOTOS))}, len(ids)


def generate(model, processor, tokenizer=None, prompt=None, **options):
    """(sequences, ids behind the begin token and the prompt and without the end, scores) of the
    photos."""
    pixels = processor(images=PHOTOS, return_tensors="pt")["pixel_values"].to(model.dtype)
    inputs, before = prompted(model, tokenizer, prompt)
    found = model.generate(
        pixel_values=pixels, output_scores=True, return_dict_in_generate=True, **inputs, **options
    )
    text = model.config.text_config if hasattr(model.config, "text_config") else None
    end = model.generation_config.eos_token_id if text is None else text.sep_token_id
    rows = [row[1 + before :] for row in found.sequences.tolist()]
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    scores = getattr(found, "sequences_scores", None)
    return found.sequences, rows, None if scores is None else scores.tolist()


def same(captions, theirs, tokenizer) -> None:
    """`captions`, a list a photo, against what `generate` above returned."""
    sequences, rows, scores = theirs
    flat = [caption for photo in captions for caption in photo]
    assert [caption.ids for caption in flat] == rows
    if scores is not None:
        assert [caption.score for caption in flat] == pytest.approx(scores, rel=1e-5, abs=2e-4)
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert [caption.text for caption in flat] == [text.strip() for text in texts]
    for caption in flat:
        assert caption.text.endswith("".join(caption.tokens).strip())
        if not caption.prompt_ids:
            assert "".join(caption.tokens).strip() == caption.text


def same_as_generate(captions, model, processor, tokenizer, prompt=None, **options) -> None:
    """Like `same`. In a random model two beams may be so near each other that rounding decides, and
    on another processor otherwise; then what `generate` says in float64 counts."""
    theirs = generate(model, processor, tokenizer, prompt, **options)
    if [caption.ids for photo in captions for caption in photo] != theirs[1]:
        precise = copy.deepcopy(model).double()
        theirs = generate(precise, processor, tokenizer, prompt, **options)
    same(captions, theirs, tokenizer)


def combinations() -> list[dict]:
    """Every number of beams under every way of stopping, other options at random."""
    choose = random.Random(2)
    return [
        {
            "num_beams": beams,
            "num_return_sequences": choose.randint(1, beams),
            "max_new_tokens": choose.choice((4, 9, 15)),
            "min_new_tokens": choose.choice((0, 3)),
            "length_penalty": choose.choice((1.0, 0.0, 0.6, 2.0, -1.0)),
            "early_stopping": early,
            "no_repeat_ngram_size": choose.choice((0, 2, 3)),
            "repetition_penalty": choose.choice((1.0, 1.4, 0.8)),
        }
        for early, beams in itertools.product((False, True, "never"), range(1, 9))
    ]


@torch.inference_mode()
@pytest.mark.parametrize("name", SEARCHED)
def test_captions_are_those_of_generate(name, families):
    """From photos to texts, three photos in a batch, for each of the searches."""
    checkpoint, model, tokenizer, processor = families(name)
    ours = load_captioner(checkpoint)
    lengths = set()
    for options in combinations():
        found = ours.caption(PHOTOS, **options)
        same_as_generate(found, model, processor, tokenizer, **options)
        lengths |= {len(caption.ids) for photo in found for caption in photo}
    assert len(lengths) > 4  # captions end where they end


def caption_prompted(captioner: Captioner, **options):
    """Every photo behind every prompt, all in one batch: a list (prompts) of lists (photos)."""
    chosen = [captioner.options(prompt=p, **options) for p in PROMPTS for _ in PHOTOS]
    found = captioner.caption_each(PHOTOS * len(PROMPTS), chosen)
    return [found[start : start + len(PHOTOS)] for start in range(0, len(found), len(PHOTOS))]


@torch.inference_mode()
@pytest.mark.parametrize("name", (*SEARCHED, "vit+gpt2"))
@pytest.mark.parametrize("every", (3, pytest.param(1, marks=pytest.mark.slow)))
def test_prompted_captions_are_those_of_generate(name, every, families):
    """A batch of prompts of all lengths, of which each is what `generate` gives it alone."""
    checkpoint, model, tokenizer, processor = families(name)
    ours = load_captioner(checkpoint)
    for options in combinations()[::every]:
        for prompt, found in zip(PROMPTS, caption_prompted(ours, **options), strict=True):
            same_as_generate(found, model, processor, tokenizer, prompt, **options)
            assert all(c.text.startswith(prompt or "") for photo in found for c in photo)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_without_options_it_captions_as_generate_does(name, families):
    """The model's own generation config; where that is silent, or (BLIP's) not read, generate's
    defaults."""
    checkpoint, model, tokenizer, processor = families(name)
    ours = load_captioner(checkpoint)
    for prompt in PROMPTS[:2]:
        found = ours.caption(PHOTOS, prompt=prompt)
        same(found, generate(model, processor, tokenizer, prompt), tokenizer)


@torch.inference_mode()
@pytest.mark.parametrize(
    "lengths", [{"max_length": 9}, {"max_length": 15, "min_length": 8}], ids=str
)
def test_lengths_of_a_generation_config_count_the_prompt(lengths, families, tmp_path):
    """`generate` counts the prompt in a `max_length` and a `min_length` of the model's own."""
    name = "dinov2_with_registers+roberta"
    _, _, tokenizer, processor = families(name)
    model, *_ = save_family(tmp_path / "theirs", name)
    path = tmp_path / "theirs/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lengths | {"num_beams": 3}))
    model = type(model).from_pretrained(tmp_path / "theirs").eval()
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = load_captioner(tmp_path / "ours")
    for prompt in PROMPTS:
        found = ours.caption(PHOTOS, prompt=prompt)
        same_as_generate(found, model, processor, tokenizer, prompt)
    # Of a request they are what they are called: of the new tokens.
    found = ours.caption(PHOTOS, prompt=PROMPTS[1], max_new_tokens=5)
    same_as_generate(found, model, processor, tokenizer, PROMPTS[1], max_new_tokens=5)


@torch.inference_mode()
@pytest.mark.parametrize("name", SEARCHED)
def test_an_export_says_the_same(name, families, tmp_path: Path):
    checkpoint, model, tokenizer, processor = families(name)
    export_checkpoint(checkpoint, tmp_path / "export")
    ours, eager = Captioner.load(tmp_path / "export"), load_captioner(checkpoint)
    for options in combinations()[::3]:
        found = ours.caption(PHOTOS, **options)
        same_as_generate(found, model, processor, tokenizer, **options)
        both = zip(
            caption_prompted(ours, **options), caption_prompted(eager, **options), strict=True
        )
        for exported, expected in both:
            assert [[c.ids for c in p] for p in exported] == [[c.ids for c in p] for p in expected]
    pixels = eager.preprocess(PHOTOS[0])
    maps = [captioner.attention(pixels, [3, 5, 7], [9, 8]) for captioner in (ours, eager)]
    # The text in one piece: a prompt's own tokens have no maps, and the others see it.
    torch.testing.assert_close(maps[0], ours.attention(pixels, [9, 8, 3, 5, 7])[2:])
    torch.testing.assert_close(*maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps[0].sum((1, 2)), torch.ones(3))


def test_the_begin_token_of_blip_is_beyond_its_tokenizer(families):
    checkpoint, _, tokenizer, _ = families("blip")
    ours = load_captioner(checkpoint)
    assert ours.tokenizer.begin_id == len(tokenizer)
    # A new decoder that uses the tokenizer, as a student does: it had no row for that id.
    choice = TokenizerChoice(checkpoint=str(checkpoint))
    assert vocab_size_of(choice, make_tokenizer(choice, [])) == ours.decoder.vocab_size


def pair(encoder: object, decoder: object) -> object:
    made = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    made.architectures = ["VisionEncoderDecoderModel"]
    return made


def text(made: type, **fields: object) -> object:
    return made(is_decoder=True, add_cross_attention=True, **fields)


GPT2, BERT = transformers.GPT2Config, transformers.BertConfig
REFUSED = {
    "Swin": (lambda: pair(transformers.SwinConfig(), text(GPT2)), "encoder.model_type' is 'swin'"),
    "Swin v2": (lambda: pair(transformers.Swinv2Config(), text(GPT2)), "is 'swinv2'"),
    "BEiT": (lambda: pair(transformers.BeitConfig(), text(BERT)), "encoder.model_type' is 'beit'"),
    "Donut's Swin": (lambda: pair(transformers.DonutSwinConfig(), text(BERT)), "'donut-swin'"),
    "ViT-MAE that masks": (lambda: pair(transformers.ViTMAEConfig(), text(GPT2)), "mask_ratio"),
    "SwiGLU": (
        lambda: pair(transformers.Dinov2Config(use_swiglu_ffn=True), text(GPT2)),
        "encoder.use_swiglu_ffn' is True",
    ),
    "SwiGLU with registers": (
        lambda: pair(transformers.Dinov2WithRegistersConfig(use_swiglu_ffn=True), text(BERT)),
        "encoder.use_swiglu_ffn' is True",
    ),
    "BART": (
        lambda: pair(transformers.ViTConfig(), transformers.BartConfig()),
        "decoder.model_type' is 'bart'",
    ),
    "a BERT of relative positions": (
        lambda: pair(transformers.ViTConfig(), text(BERT, position_embedding_type="relative_key")),
        "decoder.position_embedding_type' is 'relative_key'",
    ),
    "video GIT": (
        lambda: transformers.GitConfig(
            num_image_with_embedding=6, architectures=["GitForCausalLM"]
        ),
        "num_image_with_embedding' is 6: a GIT for videos",
    ),
    "GIT's bare model": (
        lambda: transformers.GitConfig(architectures=["GitModel"]),
        "architectures' is 'GitModel'",
    ),
    "BLIP for retrieval": (
        lambda: transformers.BlipConfig(architectures=["BlipForImageTextRetrieval"]),
        "architectures' is 'BlipForImageTextRetrieval'",
    ),
    "BLIP for questions": (
        lambda: transformers.BlipConfig(architectures=["BlipForQuestionAnswering"]),
        "architectures' is 'BlipForQuestionAnswering'",
    ),
    "BLIP-2": (lambda: transformers.Blip2Config(), "model_type' is 'blip-2'"),
    "GPT-2 alone": (lambda: GPT2(), "model_type' is 'gpt2'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name, tmp_path: Path):
    """Before weights are read: there are none, nor any other file but the config."""
    make, named = REFUSED[name]
    make().save_pretrained(tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]
    with pytest.raises(UserError) as refused:
        import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "theirs/config.json")) and "\n" not in message
    assert named in message
    assert not (tmp_path / "ours").exists()


def test_a_git_without_a_generation_config(families, tmp_path: Path):
    """Its ids are then those of config.json, or of its class."""
    _, model, tokenizer, processor = families("git")
    save_family(tmp_path / "theirs", "git")
    (tmp_path / "theirs/generation_config.json").unlink()
    theirs = transformers.GitForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    same(load_captioner(tmp_path / "ours").caption(PHOTOS), generate(theirs, processor), tokenizer)
