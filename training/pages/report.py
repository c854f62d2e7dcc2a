"""The report as HTML: a section each for scores, training, mistakes, words, and photos."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from handler.web.page import HEAT, HEAT_LEGEND, page, words_html
from handler.web.word_maps import FUNCTION_WORDS, Word, prompt_of
from training.data.manifest import Manifest, Row
from training.data.scenes import check
from training.pages.plots import bar_chart, line_chart
from training.pages.system import System
from training.scores.captions import training_captions
from training.scores.habits import copied
from training.scores.intervals import CONFIDENCE, interval
from training.scores.metrics import plain_words
from training.scores.mistakes import Mistakes

STYLE = Path(__file__).with_name("report.css")
# Points of a loss curve: each is the mean of as many steps as it takes.
CURVE_POINTS = 200
LONGEST, FREQUENT, CONFUSIONS = 24, 20, 6
# Validation figures that are on another scale than the scores.
NOT_SCORES = ("loss", "distinct_captions")


@dataclass(frozen=True)
class Shown:
    """A photo of the report: its HTML, and for each system the words of each of its captions."""

    photo: str
    words: list[list[list[Word]]]


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
    title = f"Captions of {names} on {manifest.name}, {split}"
    sections = {
        "Scores": scores_section(systems),
        "Training": training_section(systems),
        "Mistakes": mistakes_section(systems, rows),
        "Words": words_section(systems, manifest, rows),
    }
    for heading, group in groups.items():
        cards = "".join(card(systems, row, photos[row.id]) for row in group)
        sections[heading] = f'<div class="cards">{cards}</div>' if group else ""
    sections = {heading: html for heading, html in sections.items() if html}
    anchors = {heading: f"section-{number}" for number, heading in enumerate(sections)}
    links = "".join(f'<li><a href="#{anchors[h]}">{escape(h)}</a></li>' for h in sections)
    body = "".join(
        f'<section aria-labelledby="{anchors[heading]}"><h2 id="{anchors[heading]}">'
        f"{escape(heading)}</h2>{html}</section>"
        for heading, html in sections.items()
    )
    body = (
        f"<header><h1>{escape(title)}</h1>{facts(systems, rows)}{HEAT_LEGEND}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
    )
    return page(title, body, [STYLE], [HEAT])


def facts(systems: Sequence[System], rows: Sequence[Row]) -> str:
    lines = []
    for system in systems:
        options = system.decoding
        training = system.captioner.config.get("training", {})
        said = [
            f"{len(rows):,} photos",
            "sampled" if options.do_sample else f"{options.beams} beams",
        ]
        if "minutes" in training:
            said.append(f"trained for {training['minutes']:g} minutes")
        if "precision" in system.captioner.config:
            said.append(f"export in {system.captioner.config['precision']}")
        folder = escape(system.folder.as_posix())
        lines.append(f"<b>{escape(system.name)}</b> ({folder}): {escape(', '.join(said))}")
    return f'<p class="quiet">{"<br>".join(lines)}</p>'


# ------------------------------------------------------------------------------------- scores


def scores_section(systems: Sequence[System]) -> str:
    """Every score with its interval; beside another system, the paired difference too."""
    first = systems[0]
    head = "".join(
        f'<th class="number">{escape(s.name)}</th><th class="number">{CONFIDENCE:.0%} interval</th>'
        for s in systems
    )
    if len(systems) == 2:
        head += '<th class="number">difference</th><th class="number">its interval</th>'
    lines = []
    for name, score in first.scores.items():
        if not isinstance(score, float):
            continue
        cells = "".join(_score_cells(system, name) for system in systems)
        if len(systems) == 2:
            cells += _difference_cells(systems, name)
        lines.append(f"<tr><th scope=row>{escape(score_name(name))}</th>{cells}</tr>")
    note = (
        "Corpus scores of pycocoevalcap"
        + (" after its PTB tokenizer" if first.scores["tokenizer"] == "ptb" else
           " on plainly split words, since no Java was found: they compare only with each other")
        + "; intervals by bootstrap over the photos."
    )  # fmt: skip
    if len(systems) == 2:
        note += " A difference in bold is one whose interval leaves out zero."
    return (
        f'<div class="wide"><table><thead><tr><th>score</th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="quiet">{note}</p>'
    )


def score_name(name: str) -> str:
    """`claims_true_colour` for people."""
    if name.startswith("claims_true_"):
        return f"true claims: {name.removeprefix('claims_true_')}"
    return {"claims_true": "true claims", "captions_true": "entirely true captions"}.get(name, name)


def _score_cells(system: System, name: str) -> str:
    score = system.scores.get(name)
    if score is None:
        return '<td class="number">–</td><td></td>'
    between = ""
    if name in system.resamples:
        between = "{:.3f} to {:.3f}".format(*interval(system.resamples[name]))
    return f'<td class="number">{score:.3f}</td><td class="number">{between}</td>'


def _difference_cells(systems: Sequence[System], name: str) -> str:
    first, second = systems
    if name not in second.scores:
        return "<td></td><td></td>"
    difference = second.scores[name] - first.scores[name]
    between, apart = "", ""
    if name in first.resamples and name in second.resamples:
        low, high = interval(second.resamples[name] - first.resamples[name])
        between = f"{low:+.3f} to {high:+.3f}"
        apart = " apart" if low > 0 or high < 0 else ""
    return (
        f'<td class="number{apart}">{difference:+.3f}</td><td class="number{apart}">{between}</td>'
    )


# ----------------------------------------------------------------------------------- training


def training_section(systems: Sequence[System]) -> str:
    """Loss, learning rate and validation scores over the steps of all stages."""
    logs = {system.name: _in_one_row(system.log) for system in systems if system.log}
    if not logs:
        return '<p class="quiet">No training log lies beside an export; its checkpoint has it.</p>'
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
    return f'<div class="charts">{"".join(charts)}</div>'


def _in_one_row(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with `x`, a step that goes on counting where a stage begins anew."""
    found, before, stage, last = [], 0, None, 0
    for entry in log:
        if stage is not None and entry["stage"] != stage:
            before += last
        stage, last = entry["stage"], entry["step"]
        found.append({**entry, "x": before + entry["step"]})
    return found


def _curve(entries: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """At most CURVE_POINTS means of one figure."""
    points = [(entry["x"], entry[name]) for entry in entries if name in entry]
    size = -(-len(points) // CURVE_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


# ----------------------------------------------------------------------------------- mistakes


def mistakes_section(systems: Sequence[System], rows: Sequence[Row]) -> str:
    """How often each kind of word is wrong, and what was said instead of what."""
    kinds = dict.fromkeys(kind for system in systems for kind in system.mistakes)
    lines = []
    for kind in kinds:
        for system in systems:
            found = system.mistakes.get(kind, Mistakes())
            share = f"{len(found.photos) / found.judged:.0%}" if found.judged else "–"
            pairs = "; ".join(
                f"{escape(said)}{' for ' + escape(true) if true else ''} ({count})"
                for (said, true), count in found.confusions.most_common(CONFUSIONS)
            )
            name = escape(system.name) if len(systems) == 2 else ""
            lines.append(
                f'<tr><th scope=row>{escape(kind)} {name}</th><td class="number">'
                f'{len(found.photos):,} of {found.judged:,}</td><td class="number">{share}</td>'
                f"<td>{pairs}</td></tr>"
            )
    truth = (
        "Each claim of a caption is checked against the drawn scene."
        if all(row.scene is not None for row in rows)
        else "By simple word classes: a word is wrong where no reference says it and the "
        "references say another word of its class."
    )
    return (
        f'<p class="quiet">{truth}</p><div class="wide"><table><thead><tr><th>wrong</th>'
        '<th class="number">captions</th><th class="number">share</th><th>said (times)</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


# -------------------------------------------------------------------------------------- words


def words_section(systems: Sequence[System], manifest: Manifest, rows: Sequence[Row]) -> str:
    """Lengths and vocabulary beside those of the references."""
    said = {system.name: list(system.best.values()) for system in systems}
    said["references"] = [caption for row in rows for caption in row.captions]
    words = {name: [plain_words(text) for text in texts] for name, texts in said.items()}
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
    learnt = training_captions(manifest)
    lines = []
    for name, texts in words.items():
        flat = [word for text in texts for word in text]
        captions = said[name]
        lines.append(
            f'<tr><th scope=row>{escape(name)}</th><td class="number">{len(set(flat)):,}</td>'
            f'<td class="number">{len(flat) / len(texts):.1f}</td>'
            f'<td class="number">{len(set(captions)) / len(captions):.0%}</td>'
            f'<td class="number">{copied(captions, learnt):.0%}</td></tr>'
        )
    table = (
        '<div class="wide"><table><thead><tr><th></th><th class="number">different words</th>'
        '<th class="number">words a caption</th><th class="number">different captions</th>'
        '<th class="number">stand in the training captions</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    charts = bar_chart("Length of captions", lengths, by_length, "words")
    if frequent:
        charts += bar_chart("Captions with a word", frequent, by_word, "")
    return f'{table}<div class="charts">{charts}</div>'


def _shares(values: Sequence[int], places: Sequence[int]) -> list[float]:
    counts = Counter(values)
    return [counts[place] / max(1, len(values)) for place in places]


# ------------------------------------------------------------------------------------- photos


def card(systems: Sequence[System], row: Row, shown: Shown) -> str:
    """One photo with what every system says of it, and what people said."""
    parts = []
    for system, words in zip(systems, shown.words, strict=True):
        captions = system.captions[row.id]
        fit = system.captioner.preprocessing.resize
        name = f"<b>{escape(system.name)}</b>, " if len(systems) == 2 else ""
        others = "".join(
            f"<li>{words_html(w, fit, prompt_of(caption.text, caption.tokens))}"
            f"<span class=quiet>score {caption.score:.2f}</span></li>"
            for caption, w in list(zip(captions, words, strict=True))[1:]
        )
        prompt = prompt_of(captions[0].text, captions[0].tokens)
        parts.append(
            f'<div class="system">{words_html(words[0], fit, prompt)}<p class="quiet">{name}'
            f"CIDEr {system.each[row.id]['CIDEr']:.2f}, score {captions[0].score:.2f}"
            f"{_wrong(system, row)}</p>"
            + (
                f"<details><summary>next best</summary><ul>{others}</ul></details>"
                if others
                else ""
            )
            + "</div>"
        )
    references = "".join(f"<li>{escape(caption)}</li>" for caption in row.captions)
    return (
        f'<article class="card">{shown.photo}<div class="text">{"".join(parts)}'
        f"<details><summary>references</summary><ul>{references}</ul></details>"
        f'<p class="quiet">{escape(row.id)}</p></div></article>'
    )


def _wrong(system: System, row: Row) -> str:
    """What is wrong with a caption, in a few words."""
    if row.scene is not None:
        claims = check(system.best[row.id], row.scene)
        wrong = [f"{claim.kind} “{claim.text}”" for claim in claims if not claim.true]
    else:
        wrong = [kind for kind, found in system.mistakes.items() if row.id in found.photos]
    return f'; <span class="false">wrong: {escape(", ".join(wrong))}</span>' if wrong else ""
