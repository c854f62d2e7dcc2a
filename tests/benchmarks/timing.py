"""Timing side by side: every contender runs once a round, so that what else the machine does falls
on all of them alike; medians, and ratios to the first one."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

OUT = Path("build/bench")


def medians(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over `rounds` interleaved rounds, after one that does not
    count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(module: str, *arguments: str) -> float:
    """Peak memory of a fresh Python that runs `module`, which prints it at its end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """This process's peak resident memory in megabytes, from Linux's own count: `getrusage` would
    include what the parent had before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def print_peak() -> None:
    print(own_peak())


def machine(device: str = "cpu") -> str:
    """The GPU, or the processor and its cores, torch and its threads."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    model = platform.processor()
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return (
        f"{model}, {os.cpu_count()} cores; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def report(name: str, text: str, figures: object) -> None:
    """Prints a section, and keeps it under build/bench as Markdown and JSON."""
    print(text, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (OUT / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
