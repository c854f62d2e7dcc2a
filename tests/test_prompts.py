"""Captions that begin with a prompt: what is counted, what is refused, and the ways by which a
prompt comes in. `generate`'s prompted captions are in test_families.py, the search alone in
test_brute_force.py, the server's requests in test_handler.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_models import save_florence, tiny_bert_tokenizer, tiny_tokenizer
from test_evaluate import run
from tiny_training import config_of

import handler.answer
import handler.batch.__main__
from handler.answer import Job, TokenStream
from handler.beam_search import DecodeOptions, InvalidParameter
from handler.caption_tokenizer import CaptionTokenizer, PieceStream
from handler.captioner import Captioner
from handler.errors import UserError, run_command
from handler.request import Request
from handler.web.word_maps import prompt_of
from training.checkpoint import load_captioner
from training.config import TokenizerChoice
from training.data.captions import Captions
from training.data.manifest import Row, read_manifest
from training.loop.start import make_tokenizer
from training.loop.train import train
from training.pages.system import caption_split, load_system
from training.scores.captions import caption_rows, read_predictions
from training.scores.grounding import all_maps
from training.weights.huggingface import import_huggingface

PROMPTS = (None, "the square", "a", "The square, on the LEFT")
SEARCHES = (
    {"num_beams": 1},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
    {"do_sample": True, "seed": 3, "num_return_sequences": 4},
)


@pytest.fixture(scope="module")
def eager(tiny_run) -> Captioner:
    return load_captioner(tiny_run / "build/checkpoints/tiny")


@pytest.fixture(scope="module", params=["eager", "export"])
def captioner(request, eager, tiny_export) -> Captioner:
    return eager if request.param == "eager" else Captioner.load(tiny_export)


@pytest.fixture(scope="module")
def photos(tiny_data) -> list[bytes]:
    return [(tiny_data / f"images/{n}.png").read_bytes() for n in (3, 16, 17, 18)]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_prompts_of_all_lengths_share_a_batch(captioner, photos, search):
    options = [captioner.options(prompt=prompt, **search) for prompt in PROMPTS]
    together = captioner.caption_each(photos, options)
    for photo, prompt, found in zip(photos, PROMPTS, together, strict=True):
        [alone] = captioner.caption([photo], prompt=prompt, **search)
        assert [caption.text for caption in found] == [caption.text for caption in alone]
        for caption, other in zip(found, alone, strict=True):
            assert caption.score == pytest.approx(other.score, abs=1e-4)
            assert caption.token_log_probs == pytest.approx(other.token_log_probs, abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_counted_comes_behind_the_prompt(eager, photos, prompt):
    """Probabilities are those of the generated part in teacher forcing of the whole text."""
    words = (prompt or "").lower().replace(",", "").split()
    memory = eager.encode(eager.preprocess(photos[0]).unsqueeze(0))
    for caption in eager.caption(photos[:1], prompt=prompt, num_beams=3, length_penalty=0.7)[0]:
        assert caption.text.split() == words + caption.tokens
        count = len(caption.token_log_probs)
        assert count in (len(caption.tokens), len(caption.tokens) + 1)
        assert caption.log_prob == pytest.approx(sum(caption.token_log_probs))
        assert caption.score == pytest.approx(caption.log_prob / count**0.7)
        ids = [*caption.prompt_ids, *caption.ids, eager.tokenizer.end_id][: len(words) + count]
        tokens = torch.tensor([[eager.tokenizer.begin_id, *ids[:-1]]])
        mask = torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril()
        logits = eager.decoder(tokens, torch.arange(len(ids)).unsqueeze(0), mask, memory)
        said = logits.log_softmax(-1)[0, torch.arange(len(ids)), ids]
        assert caption.token_log_probs == pytest.approx(said[len(words) :].tolist(), abs=1e-4)


def test_a_prompt_runs_in_one_pass(eager, photos, monkeypatch):
    calls, prefill, step = [], eager.decoder.prefill, eager.decoder.step
    monkeypatch.setattr(eager.decoder, "prefill", lambda *a: calls.append("prefill") or prefill(*a))
    monkeypatch.setattr(eager.decoder, "step", lambda *a: calls.append("step") or step(*a))
    options = [eager.options(prompt=p, max_new_tokens=3, min_new_tokens=3) for p in PROMPTS]
    eager.caption_each(photos, options)
    assert calls == ["prefill", "step", "step"]


def test_every_generated_token_has_a_map(captioner, photos):
    pixels = captioner.preprocess(photos[0])
    ids = captioner.caption(photos[:1], num_beams=1, min_new_tokens=4)[0][0].ids
    whole = captioner.attention(pixels, ids)
    for given in range(len(ids) + 1):
        maps = captioner.attention(pixels, ids[given:], ids[:given])
        torch.testing.assert_close(maps, whole[given:])
    memory = captioner.encode(pixels.unsqueeze(0)).expand(3, -1, -1)
    maps = captioner.attention_memory(memory, [ids[2:], ids, []], [ids[:2], [], ids])
    torch.testing.assert_close(maps, [whole[2:], whole, whole[:0]])


# --- limits: the model has 10 positions, so that a prompt has 5 tokens at most


def test_default_lengths_are_shortened(eager, monkeypatch):
    assert eager.options(prompt="a red square").max_new_tokens == 10 - 1 - 3
    monkeypatch.setattr(eager, "decoding", {"max_new_tokens": 9, "min_new_tokens": 8})
    for prompt, longest, shortest in (("a", 8, 8), ("a red square", 6, 6), (None, 9, 8)):
        options = eager.options(prompt=prompt)
        assert (options.max_new_tokens, options.min_new_tokens) == (longest, shortest)
    monkeypatch.setattr(eager, "decoding", {"max_new_tokens": 4})
    assert eager.options(prompt="a red square").max_new_tokens == 4


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"prompt": "the square on the left is"}, "prompt", "has 6 tokens; the maximum is 5"),
        ({"prompt": "a red", "max_new_tokens": 8}, "max_new_tokens", "from 1 to 7"),
        ({"prompt": "a red", "min_new_tokens": 8}, "min_new_tokens", "from 0 to 7"),
        ({"prompt": "a Purple, square"}, "prompt", "'Purple'"),
        ({"prompt": "a b\u202ec"}, "prompt", "'b'"),
        ({"prompt": "<pad> <end>"}, "prompt", "has no word"),
        ({"prompt": "?!"}, "prompt", "has no word"),
        ({"prompt": "a <unk>"}, "prompt", "'<unk>'"),
        ({"prompt": " "}, "prompt", "not empty"),
    ],
)
def test_what_a_model_cannot_take_is_named(captioner, photos, options, field, message):
    with pytest.raises(InvalidParameter, match=message) as refused:
        captioner.caption(photos[:1], **options)
    assert refused.value.field == field and str(refused.value).isprintable()


# --- tokenizers


def test_word_pieces_go_on_where_the_prompt_ends():
    tokenizer = CaptionTokenizer(tiny_bert_tokenizer().backend_tokenizer, 2, 3, 0)
    assert tokenizer.unknown_words("a café, Two 日 dogs") == ["日"]
    ids = tokenizer.encode("dogs play")
    for text in ("two dog", "a"):
        prompt = tokenizer.encode(text)
        pieces = tokenizer.pieces(ids, prompt)
        assert text + "".join(pieces) == tokenizer.decode([*prompt, *ids])
        stream = PieceStream(tokenizer, prompt)
        assert [stream.add(token) for token in ids] == pieces
        assert prompt_of(text + "".join(pieces), pieces) == text


def test_a_stream_of_word_pieces_goes_on_too(monkeypatch):
    """The first token of a stream is a piece of the prompt's last word, or brings its space."""
    tokenizer, sent = CaptionTokenizer(tiny_bert_tokenizer().backend_tokenizer, 2, 3, 0), []
    monkeypatch.setattr(
        handler.answer, "send_intermediate_predict_response", lambda body, *_: sent.append(body)
    )
    context = SimpleNamespace(request_ids="ab", set_response_content_type=lambda *_: None)
    request = Request(b"", stream=True)
    jobs = [
        Job(place, request, None, [DecodeOptions(prompt=prompt)], False)
        for place, prompt in enumerate(("two dog", "a"))
    ]
    stream = TokenStream(SimpleNamespace(tokenizer=tokenizer), jobs, context)
    stream.on_token(0, tokenizer.vocabulary["##s"])
    stream.on_token(1, tokenizer.vocabulary["dog"])
    assert sent == [{0: '{"token": "s"}\n'}, {1: '{"token": " dog"}\n'}]


def test_byte_pairs_spell_every_prompt():
    tokenizer = CaptionTokenizer.train(["a dog runs", "two dogs play"], "bpe", 300, 1)
    for text in ("Ein Café", "犬が", "a\u202eb"):
        assert tokenizer.unknown_words(text) == []
        prompt, ids = tokenizer.encode(text), tokenizer.encode("läuft")
        pieces = tokenizer.pieces(ids, prompt)
        assert tokenizer.decode([*prompt, *ids]) == f"{text} läuft"
        assert prompt_of(f"{text} läuft", pieces) == text


@pytest.mark.parametrize(
    ("caption", "tokens", "prompt"),
    [
        ("a red square", ["red", "square"], "a"),
        ("a red square", ["a", "red", "square"], ""),
        ("two dogs.", ["s", "."], "two dog"),
        ("a dog runs", [" runs"], "a dog"),
        ("a photo", [], "a photo"),
    ],
)
def test_the_prompt_of_a_caption_is_what_its_tokens_do_not_spell(caption, tokens, prompt):
    assert prompt_of(caption, tokens) == prompt


# --- defaults, evaluation, batches, training


def with_default(folder: Path, out: Path, prompt: str) -> Path:
    """A checkpoint or an export with a prompt among its decoding defaults."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["decoding"]["prompt"] = prompt
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_checkpoints_own_prompt(tiny_run, tiny_export, tmp_path, photos):
    for number, (load, folder) in enumerate(
        ((load_captioner, tiny_run / "build/checkpoints/tiny"), (Captioner.load, tiny_export))
    ):
        captioner = load(with_default(folder, tmp_path / f"{number}", "the square"))
        plain, other = ({"prompt": None}, {"prompt": "a"})
        texts = [
            captioner.caption(photos[:1], **options)[0][0].text for options in ({}, plain, other)
        ]
        assert texts[0].startswith("the square") and texts[2].startswith("a ")
        assert texts[1] == load(folder).caption(photos[:1])[0][0].text
        bad = with_default(folder, tmp_path / f"{number}-bad", "the purple square")
        with pytest.raises(UserError, match="config.json: field 'decoding': prompt.*'purple'"):
            load(bad)


def test_an_evaluation_with_a_prompt(tiny_run, tiny_data, eager, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_run / "build/checkpoints/tiny"
    arguments = ("--checkpoint", checkpoint, "--data", tiny_data, "--metrics", "rouge")
    assert run(monkeypatch, *arguments, "--prompt", "the purple", "--out", "out") == 2
    assert "'purple'" in capsys.readouterr().err and not Path("out").exists()
    assert run(monkeypatch, *arguments, "--prompt", "The square") == 0
    [folder] = Path("build/evaluate/tiny").iterdir()
    assert folder.name.startswith("tiny-val-")  # a prompt is an option like any other
    manifest = read_manifest(tiny_data)
    files = [manifest.path(row).read_bytes() for row in manifest.split("val")]
    expected = [found[0].text for found in eager.caption(files, prompt="the square")]
    assert list(read_predictions(folder / "predictions.json").values()) == expected
    assert json.loads((folder / "metrics.json").read_text())["decoding"]["prompt"] == "The square"


def test_a_batch_with_a_prompt(tiny_export, tiny_data, tmp_path, monkeypatch, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    arguments = ["--source", str(tiny_data / "images"), "--out", str(tmp_path / "out")]
    arguments += ["--export", str(tiny_export), "--shards", "0/1", "--prompt"]
    for prompt, status in (("the purple square", 2), ("the square on", 0)):
        monkeypatch.setattr("sys.argv", ["handler.batch", *arguments, prompt])
        with pytest.raises(SystemExit) as end:
            run_command(handler.batch.__main__.main)
        assert end.value.code == status
        assert (tmp_path / "out").exists() == (status == 0), "nothing is begun"
    assert "'purple'" in capsys.readouterr().err
    [part] = (tmp_path / "out").glob("part-*.parquet")
    captions = [row["caption"] for row in pq.read_table(part).to_pylist()]
    assert len(captions) == 20
    assert all(caption.startswith("the square on") for caption in captions)


def test_a_run_validates_with_its_own_prompt(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    stages = [{"name": "scratch", "epochs": 1, "batch_photos": 8}]
    for prompt in ("the purple", "the square"):
        config = config_of(tmp_path / "c.yaml", decoding={"prompt": prompt}, stages=stages)
        if prompt == "the purple":
            with pytest.raises(InvalidParameter, match="'purple'"):
                train(config, manifest, Path("run"), None, resume=False)
            continue
        train(config, manifest, Path("run2"), None, resume=False)
    captioner = load_captioner("run2")
    photo = (tiny_data / "images/16.png").read_bytes()
    assert captioner.caption([photo])[0][0].text.startswith("the square")


@torch.inference_mode()
def test_the_ways_of_grounding_give_maps_to_generated_tokens(eager, photos):
    pixels = eager.preprocess(photos[0])
    [[caption]] = eager.caption(photos[:1], prompt="the square on", max_new_tokens=4)
    assert len(caption.ids) > 1
    maps = dict(all_maps(eager, pixels, caption))
    expected = eager.attention(pixels, caption.ids, caption.prompt_ids)
    torch.testing.assert_close(maps["mean of all, written"], expected)
    torch.testing.assert_close(maps["mean of all, read"][:-1], expected[1:])


@pytest.mark.parametrize("kind", ["gpt2", "bert", "word", "bpe"])
def test_a_caption_that_is_learnt_stands_apart_from_its_prompt(kind):
    """Byte pairs of other libraries begin a word with its space: "a brown" + "dog" was learnt as
    "a browndog"."""
    texts = ["a brown dog runs", "two dogs play"]
    tokenizer = {
        "gpt2": lambda: CaptionTokenizer(tiny_tokenizer().backend_tokenizer, 0, 0, 0),
        "bert": lambda: CaptionTokenizer(tiny_bert_tokenizer().backend_tokenizer, 2, 3, 0),
    }.get(kind, lambda: CaptionTokenizer.train(texts, kind, 300, 1))()
    prompt = tokenizer.encode("a brown")
    captions = Captions([Row("1", "1.png", ("dog runs",), "train")], tokenizer, 30, prompt)
    for [ids] in (captions.plain[0], captions.mirrored[0]):
        assert tokenizer.decode([*prompt, *ids]) == "a brown dog runs"


def test_a_checkpoints_own_prompt_is_not_scored(tiny_run, tiny_data, tmp_path):
    """References do not have it, nor does the reward; a requested one belongs to the caption."""
    manifest = read_manifest(tiny_data)
    rows = manifest.split("val")[:3]
    folder = with_default(tiny_run / "build/checkpoints/tiny", tmp_path / "own", "the square")
    captioner = load_captioner(folder)
    photos = [manifest.path(row).read_bytes() for row in rows]
    whole = [best[0].text for best in captioner.caption(photos)]
    assert all(text.startswith("the square ") for text in whole)
    behind = [text.removeprefix("the square ") for text in whole]
    assert [best[0] for best in caption_rows(captioner, manifest, rows).values()] == behind
    asked = caption_rows(captioner, manifest, rows, prompt="a")
    assert all(best[0].startswith("a ") for best in asked.values())
    system = load_system(folder)
    caption_split(system, manifest, rows, {})
    assert list(system.best.values()) == behind


def test_a_new_decoder_has_no_tasks(tmp_path):
    """With the tokenizer of a Florence-2 its prompt is text."""
    save_florence(tmp_path / "theirs")
    import_huggingface(str(tmp_path / "theirs"), tmp_path / "ours")
    assert load_captioner(tmp_path / "ours").tokenizer.tasks
    tokenizer = make_tokenizer(TokenizerChoice(checkpoint=str(tmp_path / "ours")), [])
    assert not tokenizer.tasks
