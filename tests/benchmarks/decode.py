"""What the limits on decoding cost on ordinary photos, in pairs: from the bytes of a photo to the
input of an encoder, and the same with Pillow alone, without limits or another process.

    python -m tests.benchmarks.decode [--rounds 31]
"""

import argparse
import io
import statistics
import time

import pi_heif
import pillow_heif
import torch
from PIL import Image

from handler.image_decode import decode_photo, open_photo, sniff
from handler.image_preprocess import PreprocessConfig, preprocess, resize, to_tensor
from tests.benchmarks.timing import machine, table
from tests.photos import natural


def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(out, quality=80)
    else:
        options = {"JPEG": {"quality": 88}, "AVIF": {"quality": 70, "speed": 9}}.get(kind, {})
        image.save(out, kind, **options)
    return out.getvalue()


def with_pillow_alone(data: bytes, kind: str, config: PreprocessConfig) -> torch.Tensor:
    """As `preprocess`, JPEG's draft mode included."""
    return to_tensor(
        resize(decode_photo(open_photo(data, kind), data, config.resizing.side), config), config
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    pi_heif.register_heif_opener()
    config = PreprocessConfig()
    rows = []
    for kind, megapixels in [
        *(("JPEG", 1), ("JPEG", 12), ("PNG", 1), ("PNG", 3), ("WEBP", 1), ("WEBP", 12)),
        *(("AVIF", 1), ("AVIF", 12), ("HEIF", 1), ("HEIF", 12)),
    ]:
        width = int((megapixels * 1e6 * 4 / 3) ** 0.5)
        data = saved(natural(width, width * 3 // 4), kind)
        if len(data) > 16 * 2**20:
            continue
        assert sniff(data) == kind
        ways = {"Pillow": lambda d=data, k=kind: with_pillow_alone(d, k, config),
                "with limits": lambda d=data: preprocess(d, config)}  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
        plain, limited = (statistics.median(seconds[name][1:]) * 1000 for name in ways)
        more = statistics.median(
            1000 * (b - a) for a, b in zip(*(seconds[name][1:] for name in ways), strict=True)
        )
        rows.append([kind, megapixels, f"{len(data) / 1e6:.1f}", f"{plain:.1f}", f"{limited:.1f}",
                     f"{more:+.2f}", f"{more / plain:+.1%}"])  # fmt: skip
    print(machine("cpu"))
    columns = ("format", "megapixels", "MB", "Pillow, ms", "with limits, ms", "more, ms", "more")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
