"""Where the time of an encoder and of a decoding step goes, beside the floor of a step, which is
the reading of its weights:

    python -m tests.benchmarks.account build/bench/yardstick-int8 [--rounds 5]

Searches of exactly 20 tokens with 5 beams, of one photo and of eight, on a processor for which
`handler/native_blocks.c` is compiled, here with a clock of its own. Parts of the blocks are what
the first thread sees, waiting for the others included; the rest is timed around the calls. "not
accounted for" is what no part holds.
"""

import argparse
import ctypes
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handler import native_library
from handler.captioner import Captioner
from handler.native_blocks import NativeDecoder, NativeEncoder
from tests.benchmarks.contenders import images_of
from tests.benchmarks.timing import machine, report, table

PARTS = ("norms and rounding", "matrix products", "attention")
MISSING = "not accounted for"


class Clock:
    """Seconds by part. `native` is the one inside `run_blocks`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.native = (ctypes.c_double * len(PARTS)).in_dll(library, "account")
        self.seconds: Counter[str] = Counter()

    def around(self, owner: Any, method: str) -> None:
        """Counts the calls of a method as a part of its name."""
        run: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any, **more: Any) -> Any:
            started = time.perf_counter()
            found = run(*given, **more)
            self.seconds[method] += time.perf_counter() - started
            return found

        setattr(owner, method, timed)

    def start(self) -> float:
        self.seconds.clear()
        for part in range(len(PARTS)):
            self.native[part] = 0
        return time.perf_counter()


def of_encoder(captioner: Captioner, images: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a batch by part."""
    clock = Clock(captioner.encoder._stack.weights.library)
    clock.around(captioner.encoder._stack, "run")
    captioner.encode(images)
    started = clock.start()
    for _ in range(rounds):
        captioner.encode(images)
    whole = time.perf_counter() - started
    parts = dict(zip(PARTS, clock.native, strict=True))
    parts["patches, last norm"] = whole - clock.seconds["run"]
    parts[MISSING] = clock.seconds["run"] - sum(clock.native)
    return {part: seconds / rounds for part, seconds in parts.items()}


def of_step(captioner: Captioner, images: Tensor, rounds: int, tokens: int) -> dict[str, float]:
    """Seconds of a step by part: what all steps of a search take, divided by their number."""
    decoder, memory = captioner.decoder, captioner.encode(images)
    options = [captioner.options(num_beams=5, min_new_tokens=tokens, max_new_tokens=tokens)]
    options *= len(images)
    clock = Clock(decoder._weights.library)
    for method in ("step", "prefill", "_logits"):
        clock.around(decoder, method)
    clock.around(decoder._stack, "run")
    run, decoder.begin = decoder.begin, lambda *_: begun
    spent, search = Counter[str](), 0.0
    for number in range(rounds + 1):
        begun = run(memory)
        started = clock.start()
        captioner.caption_memory(memory, options)
        whole = time.perf_counter() - started
        if number:  # the first warms up
            spent.update(dict(zip(PARTS, clock.native, strict=True)))
            spent[MISSING] += clock.seconds["run"] - sum(clock.native)
            spent["output head"] += clock.seconds["_logits"]
            inside = clock.seconds["run"] + clock.seconds["_logits"]
            stepping = clock.seconds["step"] + clock.seconds["prefill"]
            spent["embedding, calls"] += stepping - inside
            search += whole - stepping
    spent["search"] = search
    return {part: seconds / (rounds * tokens) for part, seconds in spent.items()}


def floor(decoder: NativeDecoder) -> float:
    """Seconds in which the weights of a step are read from memory."""
    parts = ("qkv", "out", "cross_q", "cross_out", "up", "down")
    layers = [getattr(block, part) for block in decoder._stack._blocks for part in parts]
    size = decoder._weights.library.packed_bytes
    read = sum(size(layer.kind, layer.inputs, layer.outputs) for layer in [*layers, decoder._head])
    memory, best = torch.ones(2**27), 0.0
    for _ in range(5):
        started = time.perf_counter()
        memory.sum()
        best = max(best, 4 * memory.numel() / (time.perf_counter() - started))
    return read / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="folder of an export")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    arguments = parser.parse_args()
    native_library.FLAGS = (*native_library.FLAGS, "-DACCOUNT")
    rows = []
    for photos in (1, 8):
        captioner = Captioner.load(arguments.export)
        images = images_of(photos, captioner.preprocessing.image_size)
        accounts = {}
        if isinstance(captioner.decoder, NativeDecoder):
            accounts["a step"] = of_step(captioner, images, arguments.rounds, arguments.tokens)
            accounts["floor of a step"] = {"reading the weights": floor(captioner.decoder)}
        if isinstance(captioner.encoder, NativeEncoder):
            accounts["encoder"] = of_encoder(captioner, images, arguments.rounds)
        for what, parts in accounts.items():
            whole = sum(parts.values())
            parts = {**parts, "together": whole} if len(parts) > 1 else parts
            for part, seconds in parts.items():
                rows.append([photos, what, part, f"{1000 * seconds:.2f}", f"{seconds / whole:.0%}"])
    title = f"{arguments.export}, 5 beams, {arguments.tokens} tokens. {machine()}"
    header = ("photos", "", "part", "ms", "share")
    report(f"account-{arguments.export.name}", f"{title}\n\n{table(header, rows)}\n", rows)


if __name__ == "__main__":
    main()
