"""Where the time of one photo goes, from its bytes to its caption:

    python -m tests.benchmarks.account build/export/flickr8k-bf16 [--photos 20]

The photos are the first of the dataset's validation split, one at a time, by default options. Parts
are timed as they run; matrix products and attention are what torch's profiler counts inside their
kernels, in a run of its own, since it slows all between them. What is left of the encoder, the
decoder and the search are norms, sums, copies and calls.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from handler.captioner import Captioner
from tests.benchmarks.timing import machine, report, table
from training.data.manifest import data_folder, read_manifest
from training.data.photos import read_bytes

# Parts of the names of kernels that multiply matrices.
PRODUCTS = ("linear_pointwise", "linear_dynamic_fp16", "convolution", "addmm", "::mm", "::bmm")
ATTENTION = ("scaled_dot_product",)


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def __call__(self, part: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = run()
        self.seconds[part] += time.perf_counter() - started
        return found


class TimedDecoder:
    """A decoder whose methods count as the part "decoder"."""

    def __init__(self, decoder: Any, clock: Clock) -> None:
        self.decoder, self.clock = decoder, clock
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions

    def begin(self, *arguments: Any) -> Any:
        return self.clock("decoder", lambda: self.decoder.begin(*arguments))

    def new_cache(self, *arguments: Any) -> Any:
        return self.clock("decoder", lambda: self.decoder.new_cache(*arguments))

    def step(self, *arguments: Any) -> Any:
        self.clock.seconds["steps"] += 1
        return self.clock("decoder", lambda: self.decoder.step(*arguments))


def timed_parts(captioner: Captioner, photos: list[bytes]) -> tuple[Clock, float]:
    """Seconds by part over all photos, "search" without the decoder, and the median photo's."""
    clock, totals, decoder = Clock(), [], captioner.decoder
    captioner.decoder = TimedDecoder(decoder, clock)
    for photo in photos:
        started = time.perf_counter()
        image_3SS = clock("image", lambda p=photo: captioner.preprocess(p))
        memory_1PD = clock("encoder", lambda i=image_3SS: captioner.encode(i.unsqueeze(0)))
        options = [captioner.options()]
        clock("search", lambda m=memory_1PD, o=options: captioner.caption_memory(m, o))
        totals.append(time.perf_counter() - started)
    captioner.decoder = decoder
    clock.seconds["search"] -= clock.seconds["decoder"]
    return clock, statistics.median(totals)


def kernels(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds inside matrix products and inside attention."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    products = attention = 0.0
    for kernel in profiled.key_averages():
        products += kernel.self_cpu_time_total if any(n in kernel.key for n in PRODUCTS) else 0
        attention += kernel.self_cpu_time_total if any(n in kernel.key for n in ATTENTION) else 0
    return products / 1e6, attention / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of an export")
    parser.add_argument("--photos", type=int, default=20)
    arguments = parser.parse_args()
    captioner = Captioner.load(arguments.export)
    manifest = read_manifest(data_folder(captioner.config["training"]["config"]["data"]))
    rows = manifest.split("val")[: arguments.photos]
    photos = [read_bytes(manifest, row) for row in rows]
    count = len(photos)
    images = [captioner.preprocess(photo).unsqueeze(0) for photo in photos]
    memories = [captioner.encode(image) for image in images]  # and warms up
    captioner.caption_memory(memories[0], [captioner.options()])

    clock, median = timed_parts(captioner, photos)
    inside = {
        "encoder": kernels(lambda: [captioner.encode(image) for image in images]),
        "decoder": kernels(
            lambda: [captioner.caption_memory(m, [captioner.options()]) for m in memories]
        ),
    }
    parts = {"image decoding": clock.seconds["image"]}
    for part, (products, attention) in inside.items():
        parts[f"{part}: matrix products"] = products
        parts[f"{part}: attention"] = attention
        parts[f"{part}: the rest"] = clock.seconds[part] - products - attention
    parts["search"] = clock.seconds["search"]
    whole = sum(parts.values())
    lines = [[k, f"{1000 * v / count:.1f}", f"{v / whole:.1%}"] for k, v in parts.items()]
    title = (
        f"{arguments.export.name}, {count} photos one by one, p50 {1000 * median:.1f} ms, "
        f"{clock.seconds['steps'] / count:.1f} steps a photo. {machine()}"
    )
    text = f"{title}\n\n{table(('part', 'ms a photo', 'share'), lines)}\n"
    report(f"account-{arguments.export.name}", text, {"p50": median, "photos": count, **parts})


if __name__ == "__main__":
    main()
