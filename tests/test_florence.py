"""Florence-2 against transformers: its numbers, and what `generate` writes for each task, eager and
exported, alone and beside other tasks."""

import base64
import io
import itertools
import json
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_models import FLORENCE_SIDE, original_layout, save_florence
from live import client_of, configure, post
from safetensors.torch import load_file, save_file
from test_image_preprocess import natural
from worker import Worker, by_grpc, rest

from export.archive import build_archive
from export.export import export_checkpoint
from export.layers import Int8Linear
from export.precision import in_precision
from handler.beam_search import InvalidParameter
from handler.captioner import Captioner
from handler.errors import UserError
from handler.serve import server as serve
from training import davit
from training.checkpoint import load_captioner, load_model, save_checkpoint
from training.data.captions import pack_captions
from training.data.manifest import read_manifest
from training.davit import DaViTConfig
from training.loop.fine_tuning import fine_tuning_config
from training.loop.train import train
from training.model import CaptioningModel, DecoderConfig
from training.weights.huggingface import import_huggingface

PHOTOS = [natural(*size) for size in ((40, 30), (30, 40), (64, 20))]
TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
WORDS = "Describe in detail what is shown in the image."


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model, processor) as people save them."""
    folder = tmp_path_factory.mktemp("theirs")
    return folder, *save_florence(folder)


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "florence"
    import_huggingface(str(theirs[0]), out)
    return out


@pytest.fixture(scope="module")
def eager(checkpoint) -> Captioner:
    return load_captioner(checkpoint)


@pytest.fixture(scope="module")
def exported_folder(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "florence"
    export_checkpoint(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def exported(exported_folder) -> Captioner:
    return Captioner.load(exported_folder)


@torch.inference_mode()
def generate(theirs, task: str, photos=PHOTOS, **options):
    """(ids behind the two first tokens and without the end, scores, texts) of every photo."""
    _, model, processor = theirs
    inputs = processor(images=photos, text=[task] * len(photos), return_tensors="pt")
    found = model.generate(**inputs, output_scores=True, return_dict_in_generate=True, **options)
    rows = [row[2:] for row in found.sequences.tolist()]
    rows = [row[: row.index(2)] if 2 in row else row for row in rows]
    scores = getattr(found, "sequences_scores", None)
    texts = processor.tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    return rows, None if scores is None else scores.tolist(), [text.strip() for text in texts]


def same(captions, expected) -> None:
    """A list (photos) of lists of captions against what `generate` above returned."""
    rows, scores, texts = expected
    flat = [caption for photo in captions for caption in photo]
    assert [caption.ids for caption in flat] == rows
    assert [caption.text for caption in flat] == texts
    if scores is not None:
        assert [caption.score for caption in flat] == pytest.approx(scores, rel=1e-5, abs=2e-4)
    for caption in flat:
        assert "".join(caption.tokens).strip() == caption.text
        assert len(caption.token_log_probs) == len(caption.ids) + 1  # the end is always reached


def combinations() -> list[dict]:
    choose = random.Random(4)
    return [
        {
            "num_beams": beams,
            "num_return_sequences": choose.randint(1, beams),
            "max_new_tokens": choose.choice((3, 9, 20)),
            "min_new_tokens": 0,
            "length_penalty": choose.choice((1.0, 0.0, 0.6, 2.0, -1.0)),
            "early_stopping": early,
            "no_repeat_ngram_size": choose.choice((0, 2, 3)),
            "repetition_penalty": choose.choice((1.0, 1.4, 0.8)),
        }
        for early, beams in itertools.product((False, True, "never"), range(1, 5))
    ] + [
        {"num_beams": 3, "min_new_tokens": 6, "max_new_tokens": 9},
        {"num_beams": 2, "max_new_tokens": 1},  # the end alone
        {"num_beams": 1, "max_new_tokens": 2},
    ]


# --- the model


@torch.inference_mode()
def test_numbers_are_theirs(theirs, checkpoint):
    _, model, processor = theirs
    ours, _, _ = load_model(checkpoint)
    pixels = torch.randn(2, 3, FLORENCE_SIDE, FLORENCE_SIDE)
    features = model.get_image_features(pixels).pooler_output
    memory = ours.encoder(pixels)
    assert features.std() > 0.3
    torch.testing.assert_close(memory, features, atol=2e-5, rtol=1e-4)
    # Two prompts of one length.
    prompt = torch.randint(5, 300, (2, 7))
    image = torch.full((2, memory.size(1)), model.config.image_token_id)
    tokens = torch.randint(5, 300, (2, 9))
    expected = model(
        pixel_values=pixels,
        input_ids=torch.cat([image, prompt], dim=1),
        decoder_input_ids=tokens,
    ).logits
    assert expected.std() > 0.3
    positions, mask = torch.arange(9).expand(2, -1), torch.ones(2, 9, 9, dtype=torch.bool).tril()
    decoder = ours.decoder
    slots = decoder.new_cache(2, 9)
    found = decoder.step(tokens, positions, mask, slots, 0, decoder.begin(memory, prompt))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    # Without a prompt the default task's.
    default = torch.tensor([ours.decoder_config.prompt_ids]).expand(2, -1)
    text = processor.tokenizer("<s>What does the image describe?</s>", add_special_tokens=False)
    assert default[0].tolist() == text["input_ids"]
    expected = decoder.step(tokens, positions, mask, slots, 0, decoder.begin(memory, default))
    torch.testing.assert_close(ours(pixels, tokens, positions, mask), expected)


@torch.inference_mode()
@pytest.mark.parametrize("strip", [1, 200])
def test_strips_change_nothing(checkpoint, monkeypatch, strip):
    model, _, _ = load_model(checkpoint)
    pixels = torch.randn(2, 3, FLORENCE_SIDE, FLORENCE_SIDE)
    whole = model.encoder(pixels)
    monkeypatch.setattr(davit, "STRIP", strip)
    torch.testing.assert_close(model.encoder(pixels), whole, atol=2e-5, rtol=1e-4)


def test_a_davit_serves_any_decoder(checkpoint, eager, tmp_path):
    """GPT-2's kind, whose checkpoint is read again; and its gradients reach every parameter."""
    shape = replace(load_model(checkpoint)[0].encoder_config, memory_width=12)
    decoder = DecoderConfig(
        vocab_size=307, max_positions=12, width=16, layers=1, heads=2, mlp_width=32, memory_width=12
    )
    model = CaptioningModel(shape, decoder)
    tokenizer = type(eager.tokenizer)(eager.tokenizer._tokenizer, 0, 2, 1)
    save_checkpoint(tmp_path / "a", model, tokenizer, eager.config["preprocessing"], {}, {})
    again, _, _ = load_model(tmp_path / "a")
    assert again.encoder_config == shape
    pixels = torch.randn(2, 3, FLORENCE_SIDE, FLORENCE_SIDE)
    torch.testing.assert_close(again.encoder(pixels), model.eval().encoder(pixels))
    tokens, mask = torch.randint(300, (2, 5)), torch.ones(2, 5, 5, dtype=torch.bool).tril()
    model.train()(pixels, tokens, torch.arange(5).expand(2, -1), mask).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depths": (1,)}, "depths"),
        ({"heads": (3, 4)}, "widths"),
        ({"strides": (4, 4)}, "patch_size"),
        ({"image_size": 27}, "image_size"),
        ({"window": 0}, "window"),
        ({"activation": "relu"}, "activation"),
        ({"pre_norms": (1, 1)}, "pre_norms"),
        ({"paddings": (-1, 1)}, "paddings"),
    ],
)
def test_impossible_shapes_are_refused_by_field(change, named):
    fields = {
        "widths": (8, 16), "depths": (1, 1), "heads": (2, 2), "groups": (2, 2), "kernels": (7, 3),
        "strides": (4, 2), "paddings": (3, 1), "pre_norms": (False, True), "patch_size": 8,
        "image_size": 24,
    }  # fmt: skip
    with pytest.raises(UserError, match=f"encoder.*{named}"):
        DaViTConfig(**{**fields, **change})


def test_training_sees_the_prompt_and_the_forced_token(checkpoint, eager):
    """Teacher forcing, from begin token and forced first one, with a gradient in every part."""
    model, _, tokenizer = load_model(checkpoint)
    tokens, positions, targets, mask = pack_captions([[[7, 8], [9]]], tokenizer, 20)
    assert tokens.tolist() == [[2, 0, 7, 8, 2, 0, 9]]
    assert targets.tolist() == [[0, 7, 8, 2, 0, 9, 2]]
    pixels = torch.randn(1, 3, FLORENCE_SIDE, FLORENCE_SIDE)
    real = torch.ones_like(tokens, dtype=torch.bool)
    hidden = model.decoder.hidden(tokens, positions, mask, model.encoder(pixels), real)
    model.decoder.head(hidden).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_fine_tuning_learns_its_task(checkpoint, tiny_data, tmp_path, monkeypatch):
    """From the imported model, with the prompt that the config asks for; the others stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.scores.metrics.find_java", lambda: None)
    stage = {"name": "finetune", "epochs": 2, "batch_photos": 8, "decoder_lr": 0.01, "ema": 0.5}
    fields = {"stages": [stage], "decoding": {"prompt": TASKS[1]}, "workers": 0}
    Path("own.yaml").write_text(yaml.safe_dump(fields))
    config = fine_tuning_config("own.yaml", checkpoint, data="tiny")
    train(config, read_manifest(tiny_data), Path("run"))
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, Path("run")))
    assert before.keys() == after.keys()
    parts = ("encoder.blocks.0.spatial.conv1.conv", "decoder.prompt_encoder.blocks.0.mlp.up")
    for part in parts:
        assert not torch.equal(before[f"{part}.weight"], after[f"{part}.weight"])
    tuned = load_captioner("run")
    tasks = tuned.tokenizer.tasks
    assert tasks.keys() == set(TASKS)
    assert list(tuned.decoder.prompt_encoder.default_1T[0]) == tasks[TASKS[1]]["ids"]
    assert tuned.caption(PHOTOS) == tuned.caption(PHOTOS, prompt=TASKS[1])
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


# --- the captions


@pytest.mark.parametrize("options", combinations(), ids=str)
def test_each_task_is_generates(theirs, eager, options):
    for task in TASKS:
        same(eager.caption(PHOTOS, prompt=task, **options), generate(theirs, task, **options))


def test_tasks_of_a_batch_change_nothing(theirs, eager):
    """Each photo behind each task, all at once, is what generate gives it alone."""
    lengths = set()
    for options in ({"num_beams": 4, "early_stopping": False}, {"num_beams": 1}):
        options |= {"max_new_tokens": 30, "num_return_sequences": options["num_beams"]}
        tasks = [task for task in TASKS for _ in PHOTOS]
        found = eager.caption_each(
            PHOTOS * len(TASKS), [eager.options(prompt=task, **options) for task in tasks]
        )
        for number, task in enumerate(TASKS):
            part = found[number * len(PHOTOS) : (number + 1) * len(PHOTOS)]
            same(part, generate(theirs, task, **options))
        lengths |= {len(caption.ids) for photo in found for caption in photo}
    assert len(lengths) > 3  # captions end where they end


def test_without_options_it_captions_as_generate_does(theirs, eager):
    """Three beams, no three words twice, a forced end: the model's own generation config."""
    found = eager.caption(PHOTOS)
    same(found, generate(theirs, "<CAPTION>"))
    assert len({photo[0].text for photo in found}) > 1
    for task in TASKS:
        same(eager.caption(PHOTOS, prompt=task), generate(theirs, task))


def test_long_answers_are_generates(theirs, eager):
    options = {"num_beams": 3, "max_new_tokens": 256, "min_new_tokens": 250, "length_penalty": 0.7}
    expected = generate(theirs, TASKS[2], photos=PHOTOS[:1], **options)
    assert len(expected[0][0]) >= 249
    same(eager.caption(PHOTOS[:1], prompt=TASKS[2], **options), expected)


def test_an_export_says_the_same(theirs, exported, eager):
    for task, options in itertools.product(TASKS, ({}, *combinations()[2::4])):
        found = exported.caption(PHOTOS, prompt=task, **options)
        same(found, generate(theirs, task, **options))
    same(exported.caption(PHOTOS), generate(theirs, TASKS[0]))


def test_maps_are_over_the_photo_alone(exported, eager):
    """Of every token a map over the tokens of the photo, whichever words were read beside it."""
    side = FLORENCE_SIDE // 8
    memory = eager.encode(torch.stack([eager.preprocess(photo) for photo in PHOTOS]))
    found = [eager.caption(PHOTOS[i : i + 1], prompt=TASKS[i])[0][0] for i in range(3)]
    ids, prompts = [c.ids for c in found], [c.prompt_ids for c in found]
    assert len({len(prompt) for prompt in prompts}) == 3
    together = [c.attention_memory(memory, ids, prompts) for c in (eager, exported)]
    for photo, caption in enumerate(found):
        alone = eager.attention(eager.preprocess(PHOTOS[photo]), caption.ids, caption.prompt_ids)
        assert alone.shape == (len(caption.ids), side, side)
        torch.testing.assert_close(alone.sum((1, 2)), torch.ones(len(alone)))
        for maps in together:
            torch.testing.assert_close(maps[photo], alone, atol=1e-5, rtol=1e-4)
    # Without a prompt it is that of the default task.
    plain = eager.attention(eager.preprocess(PHOTOS[0]), found[0].ids)
    torch.testing.assert_close(plain, together[0][0], atol=1e-5, rtol=1e-4)
    other = eager.attention(eager.preprocess(PHOTOS[0]), found[0].ids, found[1].prompt_ids)
    assert not torch.allclose(other, together[0][0])


@torch.inference_mode()
@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("int8", 0.2)])
def test_rough_precisions_reach_both_encoders(checkpoint, precision, error):
    model, _, _ = load_model(checkpoint)
    rough = in_precision(model, precision, "fp32")
    pixels = torch.randn(2, 3, FLORENCE_SIDE, FLORENCE_SIDE)
    for part in ("encoder", "decoder.prompt_encoder"):
        layers = [m for m in rough.get_submodule(part).modules() if hasattr(m, "original_name")]
        kind = Int8Linear.__name__ if precision == "int8" else "PackedLinear"
        plain = model.get_submodule(part)
        count = sum(isinstance(m, torch.nn.Linear) for m in plain.modules())
        assert sum(m.original_name == kind for m in layers) == count > 4
    exact, near = (m.decoder.begin(m.encoder(pixels)).keys[-1] for m in (model, rough))
    assert 0 < (near - exact).abs().max() / exact.abs().max() < error


# --- prompts


@pytest.mark.parametrize("prompt", [WORDS, f" {WORDS} ", TASKS[1]])
def test_a_task_may_be_given_in_words(eager, prompt):
    assert eager.caption(PHOTOS, prompt=prompt) == eager.caption(PHOTOS, prompt=TASKS[1])
    assert all(WORDS not in photo[0].text for photo in eager.caption(PHOTOS, prompt=prompt))


@pytest.mark.parametrize(
    "prompt",
    ["<OD>", "<OCR>", "<REGION_TO_SEGMENTATION><loc_1>", "Locate the objects", "<caption>"],
)
def test_other_tasks_are_refused_by_name(eager, prompt):
    with pytest.raises(InvalidParameter, match="<CAPTION> or <DETAILED_CAPTION> or") as refused:
        eager.caption(PHOTOS, prompt=prompt)
    assert prompt[:40] in str(refused.value) and refused.value.field == "prompt"


def test_several_prompts_of_a_photo_encode_it_once(eager, monkeypatch):
    expected = [eager.caption(PHOTOS, prompt=task, num_beams=2) for task in TASKS]
    counts = []
    encoder = eager.encoder
    monkeypatch.setattr(eager, "encoder", lambda x: (counts.append(len(x)), encoder(x))[1])
    found = eager.caption(PHOTOS, prompts=list(TASKS), num_beams=2)
    assert sum(counts) == len(PHOTOS)
    for photo, answers in enumerate(found):
        assert [best[0].ids for best in answers] == [task[photo][0].ids for task in expected]


@pytest.mark.parametrize("prompts", [[], "<CAPTION>", [3], ["<CAPTION>"] * 17, ["<OD>"], 3])
def test_prompts_are_a_list_of_prompts(eager, prompts):
    with pytest.raises(InvalidParameter, match="prompt"):
        eager.caption(PHOTOS, prompts=prompts)
    with pytest.raises(InvalidParameter, match="cannot both be set"):
        eager.caption(PHOTOS, prompts=["<CAPTION>"], prompt="<CAPTION>")


# --- the handler


@pytest.fixture(scope="module")
def archive(exported_folder, tmp_path_factory) -> Path:
    return build_archive(exported_folder, tmp_path_factory.mktemp("store") / "captioner.mar", "1.0")


def jpeg(photo) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_tasks_by_every_way_share_a_batch(archive, eager, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    worker, photo = Worker(tmp_path), jpeg(PHOTOS[0])
    encoded = base64.b64encode(photo).decode()
    several = {"image": encoded, "prompts": list(TASKS), "num_beams": 2, "attention": True}
    answers = worker.predict(
        rest({"image": photo, "prompt": TASKS[1].encode()}),
        rest({"body": several}, "application/json"),
        by_grpc({"image": photo, "prompt": WORDS.encode()}),
        rest({"body": photo}, "image/jpeg"),
        rest({"image": photo, "prompt": b"<OD>"}),
        rest({"body": {"image": encoded, "prompts": ["<CAPTION>"], "stream": True}}),
        rest({"image": photo, "prompts": b"<CAPTION>"}),
        rest({"body": {"image": encoded, "prompts": None}}),
        rest({"body": {"image": encoded, "prompts": [TASKS[2]] * 16, "max_new_tokens": 99}}),
    )
    detailed, plain = (eager.caption([photo], prompt=task)[0][0].text for task in (TASKS[1], None))
    assert [a.status for a in answers] == [200] * 4 + [400] * 5
    assert [answers[n].json["caption"] for n in (0, 2, 3)] == [detailed, detailed, plain]
    given = answers[1].json
    assert given.keys() == {"answers", "model"}
    assert [answer["prompt"] for answer in given["answers"]] == list(TASKS)
    [expected] = eager.caption([photo], prompts=TASKS, num_beams=2)
    for answer, captions in zip(given["answers"], expected, strict=True):
        assert answer["caption"] == captions[0].text
        [entry] = answer["captions"]
        assert entry["score"] == pytest.approx(captions[0].score, abs=1e-4)
        assert len(entry["attention"]["maps"]) == len(captions[0].ids)
    assert "<OD>" in answers[4].json["message"]
    assert all(a.json["type"] == "InvalidParameter" for a in answers[4:])


@pytest.mark.live
def test_a_live_server_answers_every_task(archive, eager, tmp_path):
    """The three tasks by REST and gRPC, and all of them at once, as the eager model answers."""
    shutil.copytree(archive.parent, tmp_path / "model_store")
    configure(tmp_path)
    photo = jpeg(PHOTOS[1])
    try:
        server = serve.start(tmp_path / "config.properties", home=tmp_path)
        client = client_of(server, tmp_path)
        for task in TASKS:
            expected = eager.caption([photo], prompt=task, max_new_tokens=40)[0][0]
            for ask in (client.caption, client.caption_grpc):
                answer = ask(photo, prompt=task, max_new_tokens=40)
                assert answer["caption"] == expected.text
                [found] = answer["captions"]
                assert found["score"] == pytest.approx(expected.score, abs=1e-4)
        body = {"image": base64.b64encode(photo).decode(), "prompts": list(TASKS)}
        answers = post(client, json=body).json()["answers"]
        expected = eager.caption([photo], prompts=TASKS)[0]
        assert [a["caption"] for a in answers] == [best[0].text for best in expected]
    finally:
        serve.stop(tmp_path)


# --- the import


@pytest.fixture
def copy(theirs, tmp_path) -> Path:
    return Path(shutil.copytree(theirs[0], tmp_path / "theirs"))


def test_the_original_layout_is_the_same_model(theirs, copy, checkpoint, eager, tmp_path):
    original_layout(copy, theirs[1])
    import_huggingface(str(copy), tmp_path / "ours")
    expected = load_file(checkpoint / "model.safetensors")
    found = load_file(tmp_path / "ours/model.safetensors")
    assert not found.pop("decoder.head.bias").any()
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    captions = load_captioner(tmp_path / "ours").caption(PHOTOS, num_return_sequences=3)
    assert captions == eager.caption(PHOTOS, num_return_sequences=3)


def test_a_bias_of_the_head_is_added(theirs, copy, eager, tmp_path):
    original_layout(copy, theirs[1])
    state = load_file(copy / "model.safetensors")
    bias = 3 * torch.randn(1, state["language_model.final_logits_bias"].size(1))
    save_file({**state, "language_model.final_logits_bias": bias}, copy / "model.safetensors")
    import_huggingface(str(copy), tmp_path / "ours")
    biased = load_captioner(tmp_path / "ours")
    memory = eager.encode(torch.stack([eager.preprocess(PHOTOS[0])]))
    token, zero = torch.tensor([[2]]), torch.tensor([[0]])
    logits = [
        c.decoder.step(
            token, zero, zero == 0, c.decoder.new_cache(1, 1), 0, c.decoder.begin(memory)
        )
        for c in (eager, biased)
    ]
    torch.testing.assert_close(logits[1] - logits[0], bias.unsqueeze(0), atol=1e-4, rtol=1e-4)


def test_without_a_generation_config_the_text_config_is_read(theirs, copy, tmp_path):
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"num_beams": 2, "forced_bos_token_id": 0, "no_repeat_ngram_size": 2}
    (copy / "config.json").write_text(json.dumps(config))
    import_huggingface(str(copy), tmp_path / "ours")
    found = json.loads((tmp_path / "ours/config.json").read_text())
    assert found["decoding"]["num_beams"] == found["decoding"]["no_repeat_ngram_size"] == 2
    assert found["tokenizer"]["first_id"] == 0 and found["tokenizer"]["forces_end"]


def test_a_head_of_its_own_does_not_become_the_embedding(copy, tmp_path):
    """Both were read into the one weight that a tied model has: all captions were wrong."""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    state = load_file(copy / "model.safetensors")
    table = state["model.language_model.shared.weight"]
    state["lm_head.weight"] = torch.randn_like(table)
    save_file(state, copy / "model.safetensors")
    import_huggingface(str(copy), tmp_path / "ours")
    model, _, _ = load_model(tmp_path / "ours")
    assert torch.equal(model.decoder.head.weight, state["lm_head.weight"])
    assert torch.equal(model.decoder.token_embedding.weight, table)


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("vision_config", {"in_channels": 4}, "in_channels"),
        ("vision_config", {"depths": [1, "2"]}, "depths"),
        ("vision_config", {"depths": [1, 10**9]}, "depths"),
        ("vision_config", {"embed_dim": [8, 18]}, "widths"),
        ("vision_config", {"activation_function": "relu"}, "activation_function"),
        ("vision_config", {"window_size": 2.5}, "window_size"),
        ("text_config", {"scale_embedding": True}, "scale_embedding"),
        ("text_config", {"d_model": 24}, "memory_width"),
        ("text_config", {"encoder_layers": 3}, "missing"),
        ("text_config", {"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(copy, tmp_path, section, change, named):
    config = json.loads((copy / "config.json").read_text())
    config[section] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=named):
        import_huggingface(str(copy), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"forced_bos_token_id": 10**6}, "forced_bos_token_id"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
    ],
)
def test_forced_tokens_that_cannot_be_are_refused(copy, tmp_path, change, named):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=named):
        import_huggingface(str(copy), tmp_path / "ours")


@pytest.mark.parametrize(
    "tasks",
    [{"<CAPTION>": {"words": "what?", "ids": [10**6]}}, {"<CAPTION>": {"words": 3}}, ["<CAPTION>"]],
)
def test_tasks_that_lie_are_refused_by_file(checkpoint, tmp_path, tasks):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["tokenizer"]["tasks"] = tasks
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: field 'tokenizer.tasks"):
        load_captioner(folder)
