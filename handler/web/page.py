"""Pages that stand alone: one HTML file with its style, its scripts and its pictures inside, and a
policy that forbids it anything else. The report, the review sheet and the demo page are made here.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from handler.web.word_maps import Word, word_as_dict

HERE = Path(__file__).parent
STYLE, HEAT = HERE / "page.css", HERE / "heat.js"
JPEG_QUALITY = 80
HEAT_LEGEND = (
    '<p class="quiet">Point at a word, focus it or tap it to see where the model looked while it '
    'wrote it, from least <span class="scale" role="img" aria-label="(dark violet) to (yellow)">'
    "</span> to most. The frame is drawn around the warmest part, the dot is its centre.</p>"
)


def page(title: str, body: str, styles: Sequence[Path] = (), scripts: Sequence[Path] = ()) -> str:
    """A whole HTML document. `body` is HTML; `styles` come after the common one."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in (STYLE, *styles))
    script = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def policy(style: str, script: str) -> str:
    """Only this very style and script run; only this very page's server is asked anything."""
    return (
        "default-src 'none'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        f"form-action 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def photo_html(image: Image.Image, side: int, alt: str) -> str:
    """A photo (RGB) as part of a page, no side longer than `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3)
    # A drawing of 96 pixels would be a stamp; the browser enlarges it.
    scale = max(1, math.floor(side / max(image.size)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = (scale * length for length in image.size)
    return (
        f'<div class="photo"><div class="frame"><img src="data:image/jpeg;base64,{data}" '
        f'width="{width}" height="{height}" alt="{escape(alt, True)}"></div></div>'
    )


def words_html(words: Sequence[Word], fit: str, prompt: str = "") -> str:
    """The words of a caption as buttons that show their maps, behind the prompt, which has none;
    `fit` is how the photo was made square (`PreprocessConfig.resize`)."""
    buttons = [f'<span class="quiet">{escape(prompt)}</span>'] if prompt else []
    for word in words:
        given = word_as_dict(word)
        text = escape(given["text"])
        where = f'data-map="{given["map"]}"'
        for name in ("box", "centre"):
            if name in given:
                where += f' data-{name}="{" ".join(map(str, given[name]))}"'
        buttons.append(
            f'<button type="button" class="word" aria-pressed="false" {where} '
            f'title="probability {math.exp(word.log_prob):.2f}" '
            f'aria-label="{text}: looked at the {given["place"]}">{text}</button>'
        )
    return f'<p class="words" data-fit="{escape(fit, True)}">{" ".join(buttons)}</p>'
