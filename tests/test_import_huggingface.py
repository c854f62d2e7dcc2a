"""Hugging Face's captioners, imported: the same numbers, photos, sequences, scores and texts."""

import itertools
import json
import random
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_program
from huggingface_models import POSITIONS, SIDE, save_captioner, tiny_tokenizer, transformers
from safetensors.torch import load_file, save_file
from test_image_preprocess import natural

from export.archive import build_archive
from export.export import export_checkpoint
from handler.caption_tokenizer import CaptionTokenizer
from handler.captioner import Captioner
from handler.errors import UserError, run_command
from handler.image_preprocess import preprocess
from training.checkpoint import load_captioner, load_model
from training.import_huggingface import main
from training.weights.families import import_model
from training.weights.files import read_json
from training.weights.generation import import_decoding, import_ids, stored_or_legacy
from training.weights.huggingface import import_huggingface
from training.weights.image_processor import import_preprocessing
from training.weights.tokenizer import import_tokenizer

PHOTOS = [natural(*size) for size in ((40, 30), (30, 40), (64, 20))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, tokenizer, image processor) of a ViT + GPT-2 that people saved."""
    folder = tmp_path_factory.mktemp("theirs")
    return folder, *save_captioner(folder)


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "imported"
    import_huggingface(str(saved[0]), out)
    return out


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(saved[0], tmp_path / "theirs"))


def edit(path: Path, **changes: object) -> None:
    """Changes a JSON file; `decoder__n_head` is the field of a section, ... leaves it out."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[field] = value
        if value is ...:
            del place[field]
    path.write_text(json.dumps(content))


# --- the model


@torch.inference_mode()
@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        ("vit", {}),
        ("deit", {}),
        ("vit", {"n_embd": 24, "n_inner": 40}),
        ("deit", {"n_embd": 8, "layer_norm_epsilon": 1e-3}),
        ("vit", {"activation_function": "gelu"}),
        ("vit", {"activation_function": "gelu_fast"}),
        ("vit", {"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True}),
        ("vit", {"activation_function": "quick_gelu"}),
    ],
)
def test_logits_are_theirs(encoder, text, tmp_path):
    """Other widths have a projection between encoder and decoder, which is folded away."""
    theirs, tokenizer, _ = save_captioner(tmp_path / "theirs", encoder, **text)
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    ours, _, _ = load_model(tmp_path / "ours")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    tokens = torch.randint(len(tokenizer), (2, 9))
    positions = torch.arange(9).expand(2, -1)
    mask = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    expected = theirs(pixel_values=pixels, decoder_input_ids=tokens).logits
    assert expected.std() > 0.3
    found = ours(pixels, tokens, positions, mask)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def shards(folder: Path, model) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def pickled(folder: Path, model) -> None:
    """Under the names that transformers 5 has in memory, with the tied head."""
    (folder / "model.safetensors").unlink()
    assert "encoder.layers.0.attention.q_proj.weight" in model.state_dict()
    assert "decoder.lm_head.weight" in model.state_dict()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def old_shards(folder: Path, _) -> None:
    """As transformers 4 wrote them: in several files, with the causal masks."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("attn", "crossattention"):
        state[f"decoder.transformer.h.0.{name}.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        state[f"decoder.transformer.h.0.{name}.masked_bias"] = torch.tensor(-1e4)
    places = {name: f"pytorch_model-0000{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def head_alone(folder: Path, _) -> None:
    """As safetensors' `save_model` writes tied weights: under the first of their names."""
    state = load_file(folder / "model.safetensors")
    assert "decoder.lm_head.weight" not in state
    state["decoder.lm_head.weight"] = state.pop("decoder.transformer.wte.weight")
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("store", [shards, pickled, old_shards, head_alone])
def test_the_weights_may_lie_in_any_of_the_usual_files(store, saved, copy, imported, tmp_path):
    store(copy, saved[1])
    import_huggingface(str(copy), tmp_path / "ours")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (imported / name).read_bytes()


def test_sixteen_bits_become_thirty_two(saved, copy, tmp_path):
    state = {name: t.bfloat16() for name, t in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors")
    model = import_huggingface(str(copy), tmp_path / "ours")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"decoder__model_type": "bart"}, "decoder.model_type"),
        ({"encoder__model_type": "swin"}, "encoder.model_type"),
        ({"decoder": ...}, "decoder"),
        ({"decoder__activation_function": "relu"}, "decoder.activation_function"),
        ({"encoder__hidden_act": "silu"}, "encoder.hidden_act"),
        ({"decoder__scale_attn_weights": False}, "decoder.scale_attn_weights"),
        ({"decoder__scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"decoder__add_cross_attention": False}, "decoder.add_cross_attention"),
        ({"decoder__tie_word_embeddings": False}, "decoder.tie_word_embeddings"),
        ({"decoder__n_layer": "two"}, "decoder.n_layer"),
        ({"encoder__image_size": [16, 24]}, "encoder.image_size"),
        ({"encoder__num_channels": 1}, "encoder.num_channels"),
        ({"encoder__image_size": 20}, "encoder.image_size"),
        # What the weights contradict is named as in the weights' file.
        ({"decoder__vocab_size": 900}, "token_embedding.weight"),
        ({"decoder__n_layer": 3}, r"decoder\.transformer\.h\.2\.crossattention\.c_attn\.bias"),
        ({"decoder__n_layer": 1}, r"decoder\.transformer\.h\.1\.crossattention\.c_attn\.bias"),
        ({"decoder__n_embd": 24}, r"enc_to_dec_proj\.weight"),
        ({"encoder__model_type": "deit"}, r"encoder\.embeddings\.distillation_token"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(change, named, copy, tmp_path):
    edit(copy / "config.json", **change)
    with pytest.raises(UserError, match=named):
        import_huggingface(str(copy), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("decoder.surplus.weight", torch.zeros(1)),
        ("enc_to_dec_proj.weight", torch.zeros(16, 16)),
        ("decoder.lm_head.weight", torch.zeros(16, 16)),
        ("decoder.transformer.h.1.ln_2.bias", None),
        ("encoder.encoder.layer.1.attention.attention.key.weight", None),
        ("encoder.embeddings.cls_token", None),
        ("decoder.transformer.wte.weight", None),
    ],
)
def test_a_parameter_too_many_or_too_few_is_named(name, tensor, saved):
    state = load_file(saved[0] / "model.safetensors")
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    with pytest.raises(UserError, match=f"^theirs: .*{name.replace('.', '[.]')}"):
        import_model(saved[1].config.to_dict(), state, "theirs")


# --- captions


def combinations() -> list[dict]:
    """Every number of beams under every way of stopping, other options at random."""
    choose = random.Random(1)
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


def generate(model, processor, **options):
    """(ids, scores) of the photos: begin, end and padding are left out."""
    pixels = processor(images=PHOTOS, return_tensors="pt")["pixel_values"]
    found = model.generate(pixels, output_scores=True, return_dict_in_generate=True, **options)
    end = model.generation_config.eos_token_id
    rows = [row[1:] for row in found.sequences.tolist()]
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    scores = getattr(found, "sequences_scores", None)
    return found.sequences, rows, None if scores is None else scores.tolist()


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", combinations(), ids=lambda o: f"{o['early_stopping']}-{o['num_beams']}"
)
def test_captions_are_those_of_generate(options, saved, imported):
    """From photos to texts, three photos in a batch."""
    _, model, tokenizer, processor = saved
    sequences, rows, scores = generate(model, processor, **options)
    found = load_captioner(imported).caption(PHOTOS, **options)
    flat = [caption for photo in found for caption in photo]
    assert [caption.ids for caption in flat] == rows
    if scores is not None:
        assert [caption.score for caption in flat] == pytest.approx(scores, abs=1e-4)
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert [caption.text for caption in flat] == [text.strip() for text in texts]
    for caption in flat:
        assert "".join(caption.tokens).strip() == caption.text


@torch.inference_mode()
@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"max_length": 12, "num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
        {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"min_length": 6, "max_length": 9, "repetition_penalty": 1.3},
    ],
    ids=lambda g: "-".join(g) or "silent",
)
def test_without_options_it_captions_as_generate_does(generation, saved, copy, tmp_path):
    """The model's own generation config; where that is silent, generate's defaults."""
    _, _, tokenizer, processor = saved
    edit(copy / "generation_config.json", **generation)
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(copy).eval()
    import_huggingface(str(copy), tmp_path / "ours")
    found = load_captioner(tmp_path / "ours").caption(PHOTOS)
    _, rows, _ = generate(theirs, processor)
    assert [caption.ids for photo in found for caption in photo] == rows


@torch.inference_mode()
def test_what_generate_suppresses_is_suppressed(saved, copy, tmp_path):
    _, model, _, processor = saved
    options = {"num_beams": 3, "max_new_tokens": 9}
    _, before, _ = generate(model, processor, **options)
    suppressed = [*{token for row in before for token in row[:2]}, 9999]
    edit(copy / "generation_config.json", suppress_tokens=suppressed)
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(copy).eval()
    import_huggingface(str(copy), tmp_path / "ours")
    found = load_captioner(tmp_path / "ours").caption(PHOTOS, **options)
    _, rows, _ = generate(theirs, processor, **options)
    assert [photo[0].ids for photo in found] == rows
    assert not {token for row in rows for token in row} & set(suppressed)


@torch.inference_mode()
def test_an_export_of_it_says_the_same(saved, imported, tmp_path):
    """All the way: exported and archived as every other checkpoint."""
    _, model, tokenizer, processor = saved
    export = tmp_path / "export"
    export_checkpoint(imported, export)
    options = {"num_beams": 3, "max_new_tokens": 9, "early_stopping": False}
    sequences, _, _ = generate(model, processor, **options)
    found = Captioner.load(export).caption(PHOTOS, **options)
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert [photo[0].text for photo in found] == [text.strip() for text in texts]
    archive = build_archive(export, tmp_path / "captioner.mar", "1.0")
    assert "encoder.pt" in zipfile.ZipFile(archive).namelist()


# --- generation config


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"num_beams": 1, "early_stopping": False, "max_new_tokens": 20}),
        ({"max_length": 16, "num_beams": 4}, {"max_new_tokens": 15, "num_beams": 4}),
        ({"max_length": 16, "max_new_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_length": 1024}, {"max_new_tokens": POSITIONS - 1}),
        ({"min_length": 5, "max_length": 9}, {"min_new_tokens": 4, "max_new_tokens": 8}),
        ({"min_length": 5, "min_new_tokens": 2}, {"min_new_tokens": 2}),
        ({"early_stopping": "never"}, {"early_stopping": "never"}),
        ({"temperature": 0.7, "top_k": 3, "top_p": 0.5}, {"num_beams": 1}),
        ({"do_sample": True}, {"top_k": 50, "top_p": 1.0, "temperature": 1.0}),
        ({"do_sample": True, "top_k": 900, "top_p": 0.5}, {"top_k": 300, "top_p": 0.5}),
        ({"num_beam_groups": 1, "diversity_penalty": 0.0, "bad_words_ids": []}, {"num_beams": 1}),
    ],
)
def test_generation_defaults(generation, expected):
    found = import_decoding(generation, POSITIONS, 300)
    assert found.items() >= expected.items()
    assert ("top_k" in found) == generation.get("do_sample", False)


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id"),
        ({"num_beam_groups": 2}, "num_beam_groups"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
        ({"do_sample": True, "num_beams": 4}, "num_beams"),
        ({"num_beams": 40}, "num_beams"),
        ({"num_beams": "4"}, "num_beams"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"max_length": "16"}, "max_length"),
        ({"max_length": 1}, "max_new_tokens"),
        ({"min_length": 9, "max_length": 5}, "min_new_tokens"),
    ],
)
def test_generation_that_cannot_be_had_is_refused_by_field(generation, field):
    with pytest.raises(UserError, match=field):
        import_decoding(generation, POSITIONS, 300)


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        ({"decoder_start_token_id": 3}, "eos_token_id"),
        ({"eos_token_id": 3}, "decoder_start_token_id"),
        ({"bos_token_id": 3, "eos_token_id": [3, 4]}, "eos_token_id"),
        ({"bos_token_id": 3, "eos_token_id": 300}, "eos_token_id"),
        ({"bos_token_id": 3, "eos_token_id": 3, "suppress_tokens": "5"}, "suppress_tokens"),
    ],
)
def test_ids_that_are_missing_or_outside_are_refused_by_field(generation, field):
    with pytest.raises(UserError, match=field):
        import_ids(generation, 300)


def test_begin_end_and_padding_may_be_one():
    ids = import_ids({"bos_token_id": 7, "eos_token_id": [7], "pad_token_id": 300}, 300)
    assert ids == {"begin_id": 7, "end_id": 7, "pad_id": 7, "suppressed_ids": []}
    ids = import_ids({"decoder_start_token_id": 5, "bos_token_id": 7, "eos_token_id": 7}, 300)
    assert ids["begin_id"] == 5
    # Models trained here suppress begin and padding; generate does not.
    assert ids["suppressed_ids"] == []


def test_an_old_config_holds_the_generation_config(copy, imported, tmp_path):
    """Without a generation_config.json: the config's own fields, then those of its decoder."""
    end = read_json(copy / "generation_config.json")["eos_token_id"]
    (copy / "generation_config.json").unlink()
    changes = {"decoder__max_length": 20, "decoder__num_beams": 2, "decoder__top_k": 50}
    edit(copy / "config.json", decoder_start_token_id=end, num_beams=4, max_length=None, **changes)
    config = read_json(copy / "config.json")
    merged = stored_or_legacy(None, config["decoder"], config)
    assert (merged["num_beams"], merged["max_length"], merged["eos_token_id"]) == (4, 20, end)
    import_huggingface(str(copy), tmp_path / "ours")
    decoding = load_captioner(tmp_path / "ours").decoding
    assert decoding["num_beams"] == 4
    assert decoding["max_new_tokens"] == 19


# --- tokenizer


def slow(folder: Path) -> None:
    """Takes tokenizer.json apart into the two files of GPT-2's first tokenizer."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.parametrize("pad", [None, "[PAD]", "<unk>"])
def test_texts_are_those_of_their_tokenizer(files, pad, tmp_path):
    """Any ids at all: halves of characters, special tokens, ids that the tokenizer does not know.
    A token for padding that was added to the tokenizer is not one of the model."""
    theirs = tiny_tokenizer()
    size = len(theirs)
    if pad is not None:
        theirs.add_special_tokens({"pad_token": pad})
    theirs.save_pretrained(tmp_path)
    if files != "tokenizer.json":
        slow(tmp_path)
        if pad is not None:
            (tmp_path / "added_tokens.json").write_text(json.dumps({pad: size}))
    settings = read_json(tmp_path / "tokenizer_config.json")
    if (tmp_path / "added_tokens.json").exists():
        settings["added_tokens"] = read_json(tmp_path / "added_tokens.json")
    for vocab_size in (size, size + 1, size + 40):
        tokenizer = import_tokenizer(tmp_path, settings, vocab_size)
        assert tokenizer.get_vocab_size() <= vocab_size
        end = theirs.eos_token_id
        ours = CaptionTokenizer(tokenizer, end, end, end, [])
        chance = random.Random(0)
        for _ in range(50):
            ids = [chance.randrange(vocab_size) for _ in range(12)]
            # An id that only their tokenizer knows cannot come out of the model.
            expected = theirs.decode(ids, skip_special_tokens=True).strip()
            assert ours.decode(ids) == expected
            assert "".join(ours.pieces(ids)).strip() == expected
        text = "two café dogs <|endoftext|> 🐕"
        expected = [i for i in theirs(text)["input_ids"] if i != end]
        assert ours.encode(text) == expected


@pytest.mark.parametrize(
    ("kind", "named"), [("WordPiece", "tokenizer.json"), ("damaged", "tokenizer.json")]
)
def test_another_tokenizer_is_refused_by_file(kind, named, copy, tmp_path):
    if kind == "damaged":
        (copy / "tokenizer.json").write_text("{")
    else:
        content = {"type": kind, "unk_token": "a", "vocab": {"a": 0}}
        content |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
        edit(copy / "tokenizer.json", model=content, added_tokens=[])
    with pytest.raises(UserError, match=named):
        import_huggingface(str(copy), tmp_path / "ours")


def test_a_tokenizer_too_large_for_the_model_is_refused(saved):
    with pytest.raises(UserError, match=r"decoder\.vocab_size"):
        import_tokenizer(saved[0], {}, 200)


# --- image processor

VIT, DEIT = transformers.ViTImageProcessor, transformers.DeiTImageProcessor
VIT_PIL, DEIT_PIL = transformers.ViTImageProcessorPil, transformers.DeiTImageProcessorPil


@pytest.mark.parametrize(
    ("kind", "given", "worst"),
    [
        (VIT_PIL, {}, 0),
        (VIT_PIL, {"resample": 3, "image_mean": [0.4, 0.5, 0.6]}, 0),
        (DEIT_PIL, {}, 0),
        (DEIT_PIL, {"size": {"shortest_edge": 256}}, 4),
        (VIT, {}, 1),
        (VIT, {"do_normalize": False}, 1),
        (VIT, {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}, 1),
        (DEIT, {}, 4),
        (DEIT, {"size": {"shortest_edge": 224}, "do_rescale": False, "image_std": [90, 80, 70]}, 4),
        (DEIT, {"do_center_crop": False, "size": {"height": 224, "width": 224}}, 4),
    ],
)
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (60, 200)])
def test_pixels_are_those_of_their_processor(kind, given, worst, size, tmp_path):
    """In levels of 255. Over Pillow the same to the bit, unless a cut is involved: Pillow then
    takes columns and rows in another order and rounds between the two; so does torchvision."""
    processor = kind(**given)
    processor.save_pretrained(tmp_path)
    config = import_preprocessing(read_json(tmp_path / "preprocessor_config.json"), 224)
    photo = natural(*size)
    expected = processor(images=photo, return_tensors="pt")["pixel_values"][0]
    std = torch.tensor(config.std).view(3, 1, 1)
    levels = ((preprocess(photo, config) - expected) * std * 255).abs()
    assert levels.max() <= worst + 1e-3
    assert levels.mean() < 0.3


@pytest.mark.parametrize(
    ("old", "side", "resized"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224}, 224, None),
        ({"feature_extractor_type": "DeiTFeatureExtractor", "size": 256}, 224, 256),
        ({"image_processor_type": "ViTImageProcessorFast", "size": [96, 96]}, 96, None),
    ],
)
def test_old_processors_gave_sizes_as_numbers(old, side, resized):
    config = import_preprocessing(old, side)
    assert (config.image_size, config.resize, config.resize_to) == (side, "squash", resized)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image_processor_type": "BeitImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": ...}, "image_processor_type"),
        ({"resample": 1}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 16, "width": 24}}, "size"),
        ({"size": {"shortest_edge": 16}}, "size"),
        ({"size": {"longest_edge": 16}}, "size"),
        ({"size": 24}, r"encoder\.image_size"),
        ({"do_center_crop": True}, "crop_size"),
        ({"do_center_crop": True, "crop_size": 32}, "crop_size"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_std": 0}, "std"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_a_processor_that_cannot_be_represented_is_refused_by_field(change, field, copy, tmp_path):
    edit(copy / "preprocessor_config.json", **change)
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{field}"):
        import_huggingface(str(copy), tmp_path / "ours")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_processor_as_transformers_5_writes_it(saved, copy, legacy, tmp_path):
    """Its fields are a section of processor_config.json, which goes before a file of its own."""
    path = copy / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    if legacy:
        edit(path, resample=1)
    else:
        path.unlink()
    import_huggingface(str(copy), tmp_path / "ours")
    import_huggingface(str(saved[0]), tmp_path / "plain")
    sections = [load_captioner(tmp_path / name).preprocessing for name in ("ours", "plain")]
    assert sections[0] == sections[1]


@pytest.mark.parametrize(
    "change",
    [
        {"decoder__n_layer": 10**9},
        {"encoder__num_hidden_layers": 10**9},
        {"encoder__intermediate_size": 10**9},
        {"encoder__image_size": 8 * 10**6},
        {"decoder__n_positions": 10**9},
        {"decoder__vocab_size": 10**9},
    ],
)
@pytest.mark.timeout(60)
def test_a_config_that_its_weights_belie_is_refused_before_anything_is_allocated(
    change, copy, tmp_path
):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(copy / "config.json", **change)
    with pytest.raises(UserError):
        import_huggingface(str(copy), tmp_path / "ours")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert not (tmp_path / "ours").exists()


# --- files


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("harm", ["missing", "cut off"])
def test_a_missing_or_damaged_file_is_named(name, harm, copy, tmp_path):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if harm == "cut off":
        (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        import_huggingface(str(copy), tmp_path / "ours")
    assert list(tmp_path.iterdir()) == [copy]


def test_a_pickle_that_runs_code_is_refused(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trapped",)

    (copy / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        import_huggingface(str(copy), tmp_path / "ours")
    assert not (tmp_path / "trapped").exists()


def test_an_index_may_not_lead_elsewhere(copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map"):
        import_huggingface(str(copy), tmp_path / "ours")


def test_what_lies_at_out_is_kept(saved, copy, tmp_path):
    with pytest.raises(UserError, match="the output is the input"):
        import_huggingface(str(copy), copy)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "photo.jpg").touch()
    with pytest.raises(UserError, match="photos: the folder is not empty and is not an imported"):
        import_huggingface(str(copy), other)
    import_huggingface(str(copy), tmp_path / "ours")
    edit(copy / "generation_config.json", num_beams=7)
    import_huggingface(str(copy), tmp_path / "ours")
    assert load_captioner(tmp_path / "ours").decoding["num_beams"] == 7
    (tmp_path / "ours/metrics.jsonl").touch()  # trained since
    with pytest.raises(UserError, match="ours: this is a trained run"):
        import_huggingface(str(copy), tmp_path / "ours")
    (tmp_path / "ours/metrics.jsonl").unlink()
    config = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps({**config, "training": {"step": 9}}))
    with pytest.raises(UserError, match="ours: this is a trained run"):
        import_huggingface("not/asked-for", tmp_path / "ours")  # refused before any download


def test_the_command(copy, tmp_path):
    (tmp_path / "link").symlink_to("theirs")
    done = run_program("training.import_huggingface", "./link/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "build/checkpoints/link" in done.stdout
    assert load_captioner(tmp_path / "build/checkpoints/link").caption(PHOTOS[:1])


@pytest.mark.parametrize("name", ["theirs", "theirs/config.json", "nobody/nothing", "no such/a/b"])
def test_what_cannot_be_imported_ends_in_one_line(name, copy, tmp_path, monkeypatch, capsys):
    """Damaged weights, a file, a name that the Hub cannot be asked for, one that it cannot have."""
    (copy / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["import_huggingface", name, "--out", "out"])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and name in line
    assert not (tmp_path / "out").exists()
