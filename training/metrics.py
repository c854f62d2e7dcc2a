"""BLEU, METEOR, ROUGE-L, CIDEr and, where its models are installed, SPICE: pycocoevalcap's, after
its PTB tokenizer, so that the figures compare with published ones.

The tokenizer and METEOR run in Java. Without Java the other metrics are computed on plainly split
words, and the result says so ("tokenizer": "python"): such figures compare only with each other.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.errors import UserError

METRICS = ("bleu", "meteor", "rouge", "cider", "spice")
# Those that pycocoevalcap's PTBTokenizer drops.
PUNCTUATION = {
    *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
    *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = ("bleu", "meteor", "rouge", "cider"),
) -> dict[str, Any]:
    """Corpus scores of one caption a photo: {"BLEU-1".."BLEU-4", "METEOR", "ROUGE-L", "CIDEr",
    "SPICE", "tokenizer": "ptb" or "python"}; see `score_each` for a photo's own."""
    return score_each(predictions, references, metrics)[0]


def score_each(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = ("bleu", "meteor", "rouge", "cider"),
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """As `score`, and the scores of each photo by its id.

    Raises UserError when a prediction has no references, or a metric was asked for by name that
    cannot run here.
    """
    if not predictions:
        raise UserError("predictions: there are none to score")
    if missing := [key for key in predictions if not references.get(key)]:
        raise UserError(f"references: none for photo {missing[0]!r} ({len(missing)} in all)")
    ids = list(predictions)
    java = shutil.which("java") is not None
    texts = [[predictions[i], *references[i]] for i in ids]
    flat = [text for group in texts for text in group]
    tokenized = iter(_ptb(flat) if java else [_split(text) for text in flat])
    hypotheses, truths = {}, {}
    for i, group in zip(ids, texts, strict=True):
        lines = [next(tokenized) for _ in group]
        hypotheses[i], truths[i] = lines[:1], lines[1:]
    result: dict[str, Any] = {"tokenizer": "ptb" if java else "python"}
    each: dict[str, dict[str, float]] = {i: {} for i in ids}

    def add(name: str, total: float, values: Sequence[float]) -> None:
        result[name] = float(total)
        for i, value in zip(truths, values, strict=True):
            each[i][name] = float(value)

    if "bleu" in metrics:
        from pycocoevalcap.bleu.bleu import Bleu

        totals, values = Bleu(4).compute_score(truths, hypotheses, verbose=0)
        for n in range(4):
            add(f"BLEU-{n + 1}", totals[n], values[n])
    if "meteor" in metrics and java:
        add("METEOR", *_meteor(truths, hypotheses))
    if "rouge" in metrics:
        from pycocoevalcap.rouge.rouge import Rouge

        add("ROUGE-L", *Rouge().compute_score(truths, hypotheses))
    if "cider" in metrics:
        from pycocoevalcap.cider.cider import Cider

        add("CIDEr", *Cider().compute_score(truths, hypotheses))
    if "spice" in metrics:
        add("SPICE", *_spice(truths, hypotheses, java))
    return result, each


def _split(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def _ptb(texts: Sequence[str]) -> list[str]:
    """Tokenises with Stanford's PTB tokenizer as pycocoevalcap calls it, one line a text.

    pycocoevalcap's own wrapper writes its temporary file beside its jar and lets a line feed inside
    a caption shift all captions after it; hence this call of the same jar.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    # Everything that Java might take for the end of a line.
    lines = [" ".join(re.split(r"[\s\x00-\x1f\x85\u2028\u2029]+", text)) for text in texts]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        done = subprocess.run([*command, file.name], capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"java: the PTB tokenizer failed ({' '.join(reason)}); Java 11+ is needed")
    tokenized = done.stdout.decode("utf-8").split("\n")
    tokenized += [""] * (len(lines) - len(tokenized))  # empty captions at the very end
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in tokenized[: len(lines)]
    ]


def _meteor(
    truths: dict[str, list[str]], hypotheses: dict[str, list[str]]
) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        total, values = meteor.compute_score(truths, hypotheses)
    finally:
        process = meteor.meteor_p
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    return total, values


def _spice(
    truths: dict[str, list[str]], hypotheses: dict[str, list[str]], java: bool
) -> tuple[float, list[float]]:
    import pycocoevalcap.spice.spice as spice_module

    models = Path(spice_module.__file__).parent / "lib"
    if not java or not list(models.glob("stanford-corenlp-*-models.jar")):
        raise UserError(f"spice: its Java models are not in {models}; leave the metric out")
    total, values = spice_module.Spice().compute_score(truths, hypotheses)
    return total, [value["All"]["f"] for value in values]
