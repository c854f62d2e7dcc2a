"""Self-contained pages: one HTML file that includes its style, scripts and pictures, with a content
security policy that allows nothing else. The report, the review sheet and the demo page are Jinja2
templates that extend one document."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from handler.web.word_maps import word_as_dict

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
STYLE, HEAT = HERE / "page.css", HERE / "heat.js"
JPEG_QUALITY = 80


@cache
def templates(folder: Path) -> Environment:
    """The Jinja2 environment for the templates of a folder and those that all pages share. Text is
    escaped, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["word_as_dict"] = word_as_dict
    return environment


def page(template: Path, styles: Sequence[Path], scripts: Sequence[Path], **content: Any) -> str:
    """A complete HTML document from a template that extends `document.html`. `styles` are added to
    the common style sheet, and `content` must contain `title`."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in (STYLE, *styles))
    script = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    document = templates(template.parent).get_template(template.name)
    return document.render(
        content,
        policy=Markup(policy(style, script)),
        style=Markup(style),
        script=Markup(script),
    )


def policy(style: str, script: str) -> str:
    """The content security policy: only this style and script run, and requests go only to the
    server of the page."""
    return (
        "default-src 'none'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        f"form-action 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@dataclass(frozen=True)
class Photo:
    """A photo in a page: a JPEG in base64, the size in pixels at which it is shown, and its
    alternative text."""

    data: str
    width: int
    height: int
    alt: str


def photo(image: Image.Image, side: int, alt: str) -> Photo:
    """A photo (RGB) for a page, no side longer than `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3)
    # The browser enlarges a small picture, such as a drawn scene of 96 pixels.
    scale = max(1, math.floor(side / max(image.size)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Photo(data, scale * image.width, scale * image.height, alt)
