"""The report as HTML, with sections for scores, training, mistakes, words, and photos."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from handler.image_preprocess import Box, seen_region
from handler.web.page import HEAT, Photo, page
from handler.web.word_maps import prompt_of
from handler.words import FUNCTION_WORDS, Word
from training.data.manifest import Manifest, Row
from training.data.scenes import check
from training.pages.plots import bar_chart, line_chart
from training.pages.system import System
from training.scores.captions import training_captions
from training.scores.habits import copied, distinct
from training.scores.intervals import CONFIDENCE, interval, interval_of_score
from training.scores.metrics import plain_words
from training.scores.mistakes import Mistakes

HERE = Path(__file__).parent
# Points of a loss curve; each is the mean of several steps.
CURVE_POINTS = 200
LONGEST, FREQUENT, CONFUSIONS = 24, 20, 6
# Validation figures whose scale differs from that of the scores.
NOT_SCORES = ("loss", "distinct_captions")


@dataclass(frozen=True)
class Shown:
    """A photo of the report, its size (width, height) and, for each system, the words of each
    caption."""

    photo: Photo
    size: tuple[int, int]
    words: list[list[list[Word]]]


class Cell(NamedTuple):
    """A cell of a table; one that stands out is set in bold."""

    text: str
    stands_out: bool = False


@dataclass(frozen=True)
class Table:
    """`numbers` are the right-aligned columns; a row is its name and its cells."""

    head: Sequence[str]
    numbers: Sequence[int]
    rows: Sequence[tuple[str, Sequence[Cell]]]


class ShownCaption(NamedTuple):
    """A caption: the prompt that it begins with, the words behind it, and its score."""

    prompt: str
    words: list[Word]
    score: float


class Entry(NamedTuple):
    """The captions of one system for a photo, best first."""

    name: str
    seen: Box
    captions: list[ShownCaption]
    cider: float
    wrong: list[str]


class Card(NamedTuple):
    row: Row
    photo: Photo
    entries: list[Entry]


@dataclass(frozen=True)
class Section:
    notes: str = ""
    table: Table | None = None
    charts: Sequence[str] = ()
    cards: Sequence[Card] = field(default_factory=tuple)


def render(
    systems: Sequence[System],
    manifest: Manifest,
    split: str,
    rows: Sequence[Row],
    groups: Mapping[str, Sequence[Row]],
    photos: Mapping[str, Shown],
) -> str:
    """The whole document."""
    names = " and ".join(system.name for system in systems)
    sections = {
        "Scores": scores_section(systems),
        "Training": training_section(systems),
        "Mistakes": mistakes_section(systems, rows),
        "Words": words_section(systems, manifest, rows),
    }
    for heading, group in groups.items():
        if group:
            sections[heading] = Section(cards=[card(systems, r, photos[r.id]) for r in group])
    return page(
        HERE / "templates" / "report.html",
        [HERE / "report.css"],
        [HEAT],
        title=f"Captions of {names} on {manifest.name}, {split}",
        systems=systems,
        facts=[facts(system, len(rows)) for system in systems],
        sections=sections,
    )


def facts(system: System, photos: int) -> list[str]:
    """How a system was trained and decoded."""
    options, config = system.decoding, system.captioner.config
    known = [
        f"{photos:,} photos",
        "sampled" if options.do_sample else f"{options.beams} beams",
    ]
    if "minutes" in config.get("training", {}):
        known.append(f"trained for {config['training']['minutes']:g} minutes")
    if "precision" in config:
        known.append(f"export in {config['precision']}")
    return known


# ------------------------------------------------------------------------------------- scores


def scores_section(systems: Sequence[System]) -> Section:
    """Every score with its interval; for two systems, also the paired difference."""
    first = systems[0]
    head = ["score"]
    for system in systems:
        head += [system.name, f"{CONFIDENCE:.0%} interval"]
    if len(systems) == 2:
        head += ["difference", "its interval"]
    lines = []
    for name, score in first.scores.items():
        if not isinstance(score, float):
            continue
        cells = [cell for system in systems for cell in _score_cells(system, name)]
        if len(systems) == 2:
            cells += _difference_cells(systems, name)
        lines.append((score_name(name), cells))
    tokens = {
        "ptb": " after its PTB tokenizer",
        "characters": " on characters, because the captions are written without spaces",
        "python": " on simply split words, because no Java was found; compare them only with each "
        "other",
    }[first.scores["tokenizer"]]
    note = f"Corpus scores of pycocoevalcap{tokens}; intervals by bootstrap over the photos."
    if len(systems) == 2:
        note += " A difference is in bold if its interval does not contain zero."
    return Section(note, Table(head, range(1, len(head)), lines))


def score_name(name: str) -> str:
    """The name of a score as it is shown: `claims_true_colour` becomes "true claims: colour"."""
    if name.startswith("claims_true_"):
        return f"true claims: {name.removeprefix('claims_true_')}"
    if name.startswith("claims_per_reference"):
        kind = name.removeprefix("claims_per_reference").replace("_", ": ")
        return f"claims for one of a reference{kind}"
    return {"claims_true": "true claims", "captions_true": "entirely true captions"}.get(name, name)


def _score_cells(system: System, name: str) -> tuple[Cell, Cell]:
    score = system.scores.get(name)
    if score is None:
        return Cell("–"), Cell("")
    between = ""
    if name in system.resamples:
        between = "{:.3f} to {:.3f}".format(*interval_of_score(name, system.resamples[name]))
    return Cell(f"{score:.3f}"), Cell(between)


def _difference_cells(systems: Sequence[System], name: str) -> tuple[Cell, Cell]:
    first, second = systems
    if name not in second.scores:
        return Cell(""), Cell("")
    difference = second.scores[name] - first.scores[name]
    between, apart = "", False
    if name in first.resamples and name in second.resamples:
        low, high = interval(second.resamples[name] - first.resamples[name])
        between, apart = f"{low:+.3f} to {high:+.3f}", low > 0 or high < 0
    return Cell(f"{difference:+.3f}", apart), Cell(between, apart)


# ----------------------------------------------------------------------------------- training


def training_section(systems: Sequence[System]) -> Section:
    """Loss, learning rate and validation scores over the steps of all stages."""
    logs = {system.name: _in_one_row(system.log) for system in systems if system.log}
    if not logs:
        return Section("An export has no training log; see the report on its checkpoint.")
    starts = {}
    if len(logs) == 1:
        [entries] = logs.values()
        for entry in reversed(entries):
            starts[entry["stage"]] = entry["x"]
    loss = {name: _curve(entries, "loss") for name, entries in logs.items()}
    for name, entries in logs.items():
        validated = [(e["x"], e["val"]["loss"]) for e in entries if "loss" in e.get("val", {})]
        if validated:
            loss[f"{name}, validation"] = validated
    charts = [line_chart("Loss", loss, "step", starts)]
    several = len(logs) > 1
    values: dict[str, list[tuple[float, float]]] = {}
    for name, entries in logs.items():
        for entry in entries:
            for metric, value in entry.get("val", {}).items():
                if metric in NOT_SCORES or (several and metric != "CIDEr"):
                    continue
                label = f"CIDEr, {name}" if several else score_name(metric)
                values.setdefault(label, []).append((entry["x"], value))
    charts.append(line_chart("Validation", values, "step", starts))
    rates = {name: _curve(entries, "lr") for name, entries in logs.items()}
    charts.append(line_chart("Learning rate of the decoder", rates, "step", starts))
    return Section(charts=charts)


def _in_one_row(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with `x`, the step counted over all stages."""
    entries, before, stage, last = [], 0, None, 0
    for entry in log:
        if stage is not None and entry["stage"] != stage:
            before += last
        stage, last = entry["stage"], entry["step"]
        entries.append({**entry, "x": before + entry["step"]})
    return entries


def _curve(entries: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """A curve of one figure with at most CURVE_POINTS points, which are means."""
    points = [(entry["x"], entry[name]) for entry in entries if name in entry]
    size = -(-len(points) // CURVE_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


# ----------------------------------------------------------------------------------- mistakes


def mistakes_section(systems: Sequence[System], rows: Sequence[Row]) -> Section:
    """How often each kind of word is wrong, and the most common confusions."""
    kinds = dict.fromkeys(kind for system in systems for kind in system.mistakes)
    lines = []
    for kind in kinds:
        for system in systems:
            mistakes = system.mistakes.get(kind, Mistakes())
            share = f"{len(mistakes.photos) / mistakes.judged:.0%}" if mistakes.judged else "–"
            pairs = "; ".join(
                f"{wrong}{' instead of ' + true if true else ''} ({count})"
                for (wrong, true), count in mistakes.confusions.most_common(CONFUSIONS)
            )
            name = f"{kind} {system.name}" if len(systems) == 2 else kind
            count = f"{len(mistakes.photos):,} of {mistakes.judged:,}"
            lines.append((name, [Cell(count), Cell(share), Cell(pairs)]))
    truth = (
        "Each claim of a caption is checked against the drawn scene."
        if all(row.scene is not None for row in rows)
        else "By simple word classes: a word is wrong if it is in no reference and the references "
        "have another word of its class."
    )
    return Section(
        truth, Table(["kind", "wrong captions", "share", "words (times)"], (1, 2), lines)
    )


# -------------------------------------------------------------------------------------- words


def words_section(systems: Sequence[System], manifest: Manifest, rows: Sequence[Row]) -> Section:
    """Lengths and vocabulary of the captions and of the references."""
    captions_of = {system.name: list(system.best.values()) for system in systems}
    captions_of["references"] = [caption for row in rows for caption in row.captions]
    words = {name: [plain_words(text) for text in texts] for name, texts in captions_of.items()}
    lengths = [str(n) for n in range(1, LONGEST)] + [f"{LONGEST}+"]
    by_length = {
        name: _shares([min(LONGEST, max(1, len(w))) for w in texts], range(1, LONGEST + 1))
        for name, texts in words.items()
    }
    presence = {
        name: Counter(word for text in texts for word in set(text)) for name, texts in words.items()
    }
    content = [w for w, _ in presence["references"].most_common() if w not in FUNCTION_WORDS]
    frequent = content[:FREQUENT]
    by_word = {
        name: [counts[word] / max(1, len(words[name])) for word in frequent]
        for name, counts in presence.items()
    }
    training = training_captions(manifest)
    lines = []
    for name, texts in words.items():
        flat = [word for text in texts for word in text]
        captions = captions_of[name]
        shares = (distinct(captions) / len(captions), copied(captions, training))
        figures = [f"{len(set(flat)):,}", f"{len(flat) / len(texts):.1f}"]
        figures += [f"{share:.0%}" for share in shares]
        lines.append((name, [Cell(figure) for figure in figures]))
    head = ["", "different words", "words per caption", "different captions"]
    table = Table([*head, "copied from training"], (1, 2, 3, 4), lines)
    charts = [bar_chart("Length of captions", lengths, by_length, "words")]
    if frequent:
        charts.append(bar_chart("Captions with a word", frequent, by_word, ""))
    return Section(table=table, charts=charts)


def _shares(values: Sequence[int], bins: Sequence[int]) -> list[float]:
    counts = Counter(values)
    return [counts[each] / max(1, len(values)) for each in bins]


# ------------------------------------------------------------------------------------- photos


def card(systems: Sequence[System], row: Row, shown: Shown) -> Card:
    """One photo with the captions of every system and its references."""
    entries = []
    for system, words in zip(systems, shown.words, strict=True):
        captions = system.captions[row.id]
        shown_captions = [
            ShownCaption(prompt_of(caption.text, caption.tokens), of_caption, caption.score)
            for caption, of_caption in zip(captions, words, strict=True)
        ]
        seen = seen_region(shown.size, system.captioner.preprocessing)
        cider = system.each[row.id]["CIDEr"]
        wrong = list(_wrong(system, row))
        entries.append(Entry(system.name, seen, shown_captions, cider, wrong))
    return Card(row, shown.photo, entries)


def _wrong(system: System, row: Row) -> Iterator[str]:
    """The mistakes of a caption, each in a few words."""
    if row.scene is None:
        yield from (kind for kind, wrong in system.mistakes.items() if row.id in wrong.photos)
    else:
        for claim in check(system.scored(row.id), row.scene):
            if not claim.true:
                yield f"{claim.kind} “{claim.text}”"
