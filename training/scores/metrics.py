"""BLEU, METEOR, ROUGE-L, CIDEr and, if its models are installed, SPICE. The implementations and the
PTB tokenizer are those of pycocoevalcap, so that scores are comparable with published ones.

The tokenizer, METEOR and SPICE run in Java. Without Java, the other metrics are computed on simply
split words, and the result contains "tokenizer": "python"; such scores are comparable only with
each other. Code that compares scores over time chooses the tokenizer once (`choose_tokenizer`).

The PTB tokenizer treats a sentence without spaces as one word. If references are written without
spaces (Japanese, Chinese, Thai), each character of such a script counts as a word, as in
sacreBLEU's `zh`, and the result has "tokenizer": "characters". METEOR and SPICE are left out: their
synonyms and their parser are English.
"""

import functools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from handler.caption_tokenizer import SPACELESS, SPACELESS_SHARE, is_written_without_spaces
from handler.errors import UserError

DEFAULT_METRICS = ("bleu", "meteor", "rouge", "cider")
METRICS = (*DEFAULT_METRICS, "spice")
ENGLISH = ("meteor", "spice")
# Tokens that pycocoevalcap's PTBTokenizer drops.
PUNCTUATION = {
    *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
    *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}
# UTF-8 and a decimal point, independent of the machine's locale.
JAVA_SETTINGS = (
    *("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"),
    *("-Duser.language=en", "-Duser.country=US"),
)

Tokenizer = Literal["ptb", "python", "characters"]

log = logging.getLogger(__name__)


def find_java() -> str | None:
    """The `java` on PATH, or else the one that `make setup` has linked beside this Python, for
    programs that run without an activated environment. Raises UserError if the only ones found
    cannot be run: a broken link, a file that is not executable."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), str(Path(sys.executable).parent)]
    if found := shutil.which("java", path=os.pathsep.join(folders)):
        return found
    for path in (Path(folder) / "java" for folder in folders if folder):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: a link to {path.readlink()}, which is missing; make setup installs one"
            )
        if path.is_file():
            raise UserError(f"{path}: not executable; chmod +x it, or remove it and run make setup")
    return None


def choose_tokenizer(references: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer for this machine: "characters" if the references are written without spaces,
    otherwise "ptb" if there is Java, otherwise "python". Raises UserError for a Java that does not
    work."""
    java = find_java()
    if java is not None:
        check_java(java)
    if are_without_spaces(references):
        return "characters"
    return "python" if java is None else "ptb"


def are_without_spaces(references: Sequence[str]) -> bool:
    count = sum(map(is_written_without_spaces, references))
    return count > SPACELESS_SHARE * len(references)


@functools.cache
def check_java(java: str) -> None:
    """Raises UserError if this Java cannot run the tokenizer."""
    _ptb(java, ["a dog"])


def has_spice() -> bool:
    """Whether Java and the models of SPICE are installed; the models are never downloaded here."""
    import pycocoevalcap.spice.spice as spice

    library = Path(spice.__file__).parent / "lib"
    return find_java() is not None and any(library.glob("stanford-corenlp-*-models.jar"))


def score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Corpus scores of one caption per photo: {"BLEU-1".."BLEU-4", "METEOR", "ROUGE-L", "CIDEr",
    "SPICE", "tokenizer": "ptb", "python" or "characters"}; see `score_each` for the scores of each
    photo."""
    return score_each(predictions, references, metrics, tokenizer)[0]


def score_each(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """As `score`, and the scores of each photo by its id.

    CIDEr weights a word by the number of photos in `references` that have it, so compare only
    scores on the same photos. `tokenizer` None is that of `choose_tokenizer`; without Java, and on
    characters, METEOR is left out. Raises UserError if a prediction has no references, if no
    reference contains a word, if SPICE is requested but not installed, if no metric is left, and if
    Java is missing for "ptb" or does not work.
    """
    check_metrics(metrics)
    return score_tokens(tokenize(predictions, references, tokenizer), metrics)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises UserError for a metric that is unknown or cannot run here."""
    if unknown := set(metrics) - set(METRICS):
        raise UserError(f"metrics: {min(unknown)!r} is unknown; choose from {', '.join(METRICS)}")
    if "spice" in metrics and not has_spice():
        raise UserError("metrics: spice needs Java and pycocoevalcap's SPICE models; leave it out")
    if set(metrics) == {"meteor"} and find_java() is None:
        raise UserError("metrics: meteor needs Java 11 or later; make setup installs one")


@dataclass(frozen=True)
class Tokens:
    """Tokenized captions, words separated by spaces: by photo, a list with one hypothesis, and its
    references."""

    tokenizer: Tokenizer
    hypotheses: dict[str, list[str]]
    truths: dict[str, list[str]]


def tokenize(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer | None = None,
) -> Tokens:
    """Splits one caption per photo and its references into words; `tokenizer` as in `score_each`.
    Raises UserError if a prediction has no references, if no reference contains a word, and if Java
    is missing or does not work."""
    if not predictions:
        raise UserError("predictions: there are none to score")
    if missing := [key for key in predictions if not references.get(key)]:
        raise UserError(f"references: none for photo {missing[0]!r} ({len(missing)} in total)")
    ids = list(predictions)
    if tokenizer is None:
        tokenizer = _announced_tokenizer([text for i in ids for text in references[i]])
    texts = [[predictions[i], *references[i]] for i in ids]
    flat = [text for group in texts for text in group]
    if tokenizer == "ptb":
        tokenized = iter(_ptb(needed_java(), flat))
    else:
        tokenized = iter([" ".join(plain_words(text)) for text in flat])
    hypotheses, truths = {}, {}
    for i, group in zip(ids, texts, strict=True):
        lines = [next(tokenized) for _ in group]
        hypotheses[i], truths[i] = lines[:1], lines[1:]
    if not any(line for lines in truths.values() for line in lines):
        raise UserError("references: none of them contains a word")
    return Tokens(tokenizer, hypotheses, truths)


def _announced_tokenizer(references: Sequence[str]) -> Tokenizer:
    """The tokenizer for these references, with a warning if it is not PTB's."""
    if are_without_spaces(references):
        log.warning(
            "the references are written without spaces, and the PTB tokenizer would treat a "
            "sentence as one word: characters are scored; METEOR and SPICE, which are English, are "
            "left out"
        )
        return "characters"
    if find_java() is None:
        log.warning(
            "no Java found (make setup installs one): METEOR and SPICE are left out, and the other "
            "metrics are computed on simply split words instead of PTB tokens"
        )
        return "python"
    return "ptb"


def needed_java() -> str:
    """The `java` to run. Raises UserError if there is none."""
    java = find_java()
    if java is None:
        raise UserError("java: not found, but the PTB tokenizer needs it; make setup installs one")
    return java


def score_tokens(
    tokens: Tokens, metrics: Sequence[str] = DEFAULT_METRICS
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """As `score_each`, for captions that are already tokenized."""
    hypotheses, truths = tokens.hypotheses, tokens.truths
    if tokens.tokenizer == "characters":
        metrics = [name for name in metrics if name not in ENGLISH]
        if not metrics:
            raise UserError("metrics: meteor and spice are English, and these captions are not")
    result: dict[str, Any] = {"tokenizer": tokens.tokenizer}
    each: dict[str, dict[str, float]] = {i: {} for i in hypotheses}

    def add(name: str, total: float, values: Sequence[float]) -> None:
        result[name] = float(total)
        for i, value in zip(truths, values, strict=True):
            each[i][name] = float(value)

    if "bleu" in metrics:
        from pycocoevalcap.bleu.bleu import Bleu

        totals, values = Bleu(4).compute_score(truths, hypotheses, verbose=0)
        for n in range(4):
            add(f"BLEU-{n + 1}", totals[n], values[n])
    if "meteor" in metrics and tokens.tokenizer == "ptb":
        add("METEOR", *_meteor(needed_java(), list(truths.values()), list(hypotheses.values())))
    if "rouge" in metrics:
        from pycocoevalcap.rouge.rouge import Rouge

        add("ROUGE-L", *Rouge().compute_score(truths, hypotheses))
    if "cider" in metrics:
        from pycocoevalcap.cider.cider import Cider

        add("CIDEr", *Cider().compute_score(truths, hypotheses))
    if "spice" in metrics:
        add("SPICE", *_spice(list(truths.values()), list(hypotheses.values())))
    return result, each


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case, split by a simple regular expression; a character of a
    script without spaces is a word."""
    return word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """A character of a script without spaces, or a word. Vowel signs and other marks belong to
    words, as do the two joiners, which Python's `\\w` leaves out."""
    every = map(chr, range(sys.maxunicode + 1))
    marks = "".join(letter for letter in every if unicodedata.category(letter) in ("Mn", "Mc"))
    alone = SPACELESS.pattern
    return re.compile(rf"{alone}|(?:(?!{alone})[\w{marks}\u200c\u200d'-])+")


def _one_line(text: str) -> str:
    """`text` without characters that Java treats as the end of a line or cannot encode; letters
    with an accent are one character, since the tokenizer drops marks that stand alone."""
    composed = unicodedata.normalize("NFC", text)
    spaced = re.sub(r"[\s\x00-\x1f\x7f\x85\u2028\u2029]+", " ", composed)
    return spaced.encode("utf-8", "replace").decode("utf-8")


def _ptb(java: str, texts: Sequence[str]) -> list[str]:
    """Runs Stanford's PTB tokenizer with pycocoevalcap's options, one line per text.

    pycocoevalcap's own wrapper is not used: it writes its temporary file beside its jar, and a
    carriage return within a caption shifts all captions after it.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = [java, *JAVA_SETTINGS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase"]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.writelines(_one_line(text) + "\n" for text in texts)
        file.flush()
        try:
            done = subprocess.run([*command, file.name], capture_output=True, check=False)
        except OSError as error:  # not a program for this machine
            raise _java_failed(java, "the PTB tokenizer", str(error.strerror).encode()) from error
    tokenized = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(tokenized) != len(texts):
        raise _java_failed(java, "the PTB tokenizer", done.stderr)
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in tokenized
    ]


def _java_failed(java: str, what: str, stderr: bytes) -> UserError:
    reason = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it gave no reason"]
    return UserError(
        f"{java}: {what} failed ({reason[0]}); Java 11 or later is needed: put one first on PATH, "
        "or remove this one and run make setup"
    )


def _meteor(
    java: str, truths: Sequence[list[str]], hypotheses: Sequence[list[str]]
) -> tuple[float, list[float]]:
    """METEOR 1.5 through its pipe. A line SCORE returns the statistics of one photo; a line EVAL
    with all of them returns the score of each photo and then that of the corpus.

    pycocoevalcap's own wrapper is not used: it runs the jar in the machine's locale, in which
    numbers may have a decimal comma, and never reads its error pipe.
    """
    import pycocoevalcap.meteor.meteor as meteor

    jar = Path(meteor.__file__).parent / meteor.METEOR_JAR
    command = [java, *JAVA_SETTINGS, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio"]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [*command, "-l", "en", "-norm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            raise _java_failed(java, "METEOR", str(error.strerror).encode()) from error
        assert process.stdin is not None and process.stdout is not None
        try:
            statistics = []
            for references, [hypothesis] in zip(truths, hypotheses, strict=True):
                fields = [field.replace("|||", "") for field in (*references, hypothesis)]
                _tell(process.stdin, ["SCORE", *fields])
                statistics.append(process.stdout.readline().decode().strip())
            _tell(process.stdin, ["EVAL", *statistics])
            values = [float(process.stdout.readline()) for _ in truths]
            return float(process.stdout.readline()), values
        except (OSError, ValueError) as error:
            failure = error
        finally:
            process.kill()
            process.communicate()  # closes the pipes, whose other end may be gone
        errors.seek(0)
        raise _java_failed(java, "METEOR", errors.read()) from failure


def _tell(pipe: IO[bytes], fields: Sequence[str]) -> None:
    pipe.write((" ||| ".join(fields) + "\n").encode())
    pipe.flush()


def _spice(
    truths: Sequence[list[str]], hypotheses: Sequence[list[str]]
) -> tuple[float, list[float]]:
    from pycocoevalcap.spice.spice import Spice

    # SPICE returns scores in the order of the sorted ids; integers keep our order.
    numbered = dict(enumerate(truths)), dict(enumerate(hypotheses))
    try:
        total, values = Spice().compute_score(*numbered)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"java: SPICE failed ({error}); leave it out") from error
    return total, [value["All"]["f"] for value in values]
