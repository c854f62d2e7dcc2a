"""Captions in Japanese and in German, from a folder of photos to a served caption."""

import csv
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_training import config_of
from worker import Worker, rest

from export.archive import build_archive
from export.export import export_checkpoint
from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError, run_command
from training.data.manifest import read_manifest
from training.loop.train import train
from training.objectives.self_critical import reward_words
from training.prepare import main as prepare_main
from training.scores.metrics import plain_words, score, score_each

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200), "white": (250,) * 3}
LANGUAGES = {
    # A sentence is one word to a tokenizer that splits at spaces.
    "ja": {
        "red": ("赤い四角があります", "四角は赤い"), "green": ("緑の四角があります", "四角は緑"),
        "blue": ("青い四角があります", "四角は青い"), "white": ("白い四角があります", "四角は白い"),
    },
    # Nouns have capital letters.
    "de": {
        "red": ("Ein Quadrat ist groß und rot", "ein rotes Quadrat über der Straße"),
        "green": ("Ein Quadrat ist groß und grün", "ein grünes Quadrat über der Straße"),
        "blue": ("Ein Quadrat ist groß und blau", "ein blaues Quadrat über der Straße"),
        "white": ("Ein Quadrat ist groß und weiß", "ein weißes Quadrat über der Straße"),
    },
}  # fmt: skip
STAGES = [{"name": "scratch", "epochs": 60, "batch_photos": 16, "decoder_lr": 1e-2,
           "encoder_lr": 1e-2, "ema": 0.9, "label_smoothing": 0.0}]  # fmt: skip


def prepared(folder: Path, captions: dict[str, tuple[str, ...]], monkeypatch) -> Path:
    """A folder of 20 squares and a CSV of captions, as `make data DATA=folder` prepares it."""
    (folder / "photos").mkdir()
    with (folder / "photos/captions.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text", "split"])
        for number in range(20):
            colour = list(COLOURS)[number % 4]
            Image.new("RGB", (32 + number, 32), COLOURS[colour]).save(
                folder / f"photos/{number}.png"
            )
            split = "train" if number < 16 else "val"
            rows.writerows([f"{number}.png", text, split] for text in captions[colour])
    monkeypatch.setattr(
        "sys.argv",
        ["prepare", "--data", "folder", "--source", "photos", "--name", "squares"],
    )
    run_command(prepare_main)
    return folder / "build/data/squares"


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("ja", {"min_count": 1, "vocab_size": 300}), ("de", {"min_count": 1, "lowercase": False})],
)
def test_from_photos_to_a_served_caption(language, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = LANGUAGES[language]
    data = prepared(tmp_path, captions, monkeypatch)
    config = config_of(
        Path("c.yaml"), data=str(data), stages=STAGES, tokenizer=tokenizer,
        decoder={"width": 32, "layers": 1, "heads": 2, "dropout": 0.0, "max_tokens": 40},
        validation={"every": 60, "num_beams": 1},
    )  # fmt: skip
    train(config, read_manifest(data), Path("run"))
    export_checkpoint(Path("run"), Path("export"))
    build_archive(Path("export"), Path("captioner.mar"), "1.0")
    with zipfile.ZipFile("captioner.mar") as archive:
        archive.extractall("unpacked")
    worker = Worker(Path("unpacked").resolve())
    for number, colour in enumerate(COLOURS, start=16):
        photo = Path(f"photos/{number}.png").read_bytes()
        [answer] = worker.predict(rest({"image": photo, "num_beams": b"3"}))
        assert answer.json["caption"] in captions[colour]
        pieces = answer.json["captions"][0]["tokens"]
        assert answer.json["caption"] in ("".join(pieces).strip(), " ".join(pieces))


@pytest.mark.parametrize(
    ("kind", "lowercase", "written"),
    [
        ("word", None, "ein größeres haus"),
        ("word", True, "ein größeres haus"),
        ("word", False, "Ein größeres Haus"),
        ("bpe", None, "Ein größeres Haus."),
        ("bpe", False, "Ein größeres Haus."),
        ("bpe", True, "ein größeres haus."),
    ],
)
def test_letter_case_is_kept_or_lowered(kind, lowercase, written):
    tokenizer = CaptionTokenizer.train(["Ein größeres Haus."], kind, 400, 1, lowercase)
    assert tokenizer.decode(tokenizer.encode("Ein größeres Haus.")) == written


def test_words_of_scripts_with_marks_and_joiners():
    """Vowel signs and joiners are parts of words: Hindi lost its vowels, Persian its words."""
    captions = ["काला कुत्ता", "می\u200cروم به خانه", "क्\u200dष", "a man \U0001f468\u200d\U0001f469"]
    assert [len(plain_words(text)) for text in captions[:3]] == [2, 3, 1]
    assert plain_words("cafe\u0301") == ["café"]
    tokenizer = CaptionTokenizer.train(captions, "word", 400, 1)
    for text in captions[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(captions[3])) == "a man"


# --- scores


REFERENCES = {
    "1": ["赤い車が道を走っている。", "道路を走る赤い車"],
    "2": ["犬が草の上で寝ている", "芝生で寝る犬。"],
    "3": ["女の人がTシャツを着ている", "Tシャツの女性"],
}


def test_characters_are_scored_where_captions_have_no_spaces(caplog):
    """PTB's tokenizer takes such a sentence for one word: every score but that of an equal sentence
    was 0."""
    near = {"1": "赤い車が走っている", "2": "犬が寝ている", "3": "女性がTシャツを着る"}
    scores, each = score_each(near, REFERENCES)
    assert scores["tokenizer"] == "characters"
    assert scores["BLEU-4"] > 0.3 and scores["CIDEr"] > 1 and "METEOR" not in scores
    assert all(photo["BLEU-2"] > 0 for photo in each.values())
    assert "the references are written without spaces" in caplog.text
    # As captions in which every character is a word already; punctuation is dropped.
    spaced = {key: " ".join(text) for key, text in near.items()}
    truths = {k: [" ".join(t.replace("。", "")) for t in texts] for k, texts in REFERENCES.items()}
    assert score(spaced, truths, ("bleu", "cider")) == {
        name: value for name, value in scores.items() if name != "ROUGE-L"
    }
    perfect = score({key: texts[0] for key, texts in REFERENCES.items()}, REFERENCES, ("bleu",))
    assert perfect["BLEU-4"] == pytest.approx(1)


def test_without_java_characters_are_the_same(monkeypatch):
    near = {key: texts[1] for key, texts in REFERENCES.items()}
    with_java = score(near, REFERENCES)
    monkeypatch.setattr("training.scores.metrics.find_java", lambda: None)
    assert score(near, REFERENCES) == with_java


def test_english_metrics_alone_are_refused_for_them():
    with pytest.raises(UserError, match="meteor and spice are English"):
        score({"1": "犬"}, REFERENCES, ("meteor",))


def test_a_few_such_captions_among_others_change_nothing():
    english = {str(n): [f"a dog runs over field {n}"] for n in range(40)}
    mixed = {**english, "x": ["犬が走る"]}
    scores = score({key: texts[0] for key, texts in mixed.items()}, mixed, ("bleu",))
    assert scores["tokenizer"] == "ptb"


def test_the_reward_of_self_critical_training_sees_characters():
    assert reward_words("犬が走る") == [*"犬が走る", "<end>"]
    assert reward_words("Tシャツの犬 a dog")[:3] == ["t", "シ", "ャ"]
