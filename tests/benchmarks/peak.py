"""Prints the peak memory, in MB, of one photo's caption, in a process that imports no more than its
user would: resident, or what torch took of the GPU's.

    python -m tests.benchmarks.peak generate FOLDER SIDE TOKENS BEAMS DEVICE TASK_IDS
    python -m tests.benchmarks.peak PRECISION EXPORT SIDE TOKENS BEAMS DEVICE TASK

FOLDER is what `save_pretrained` wrote, SIDE that of a photo in pixels; the task is empty for models
that have none.
"""

import sys
from pathlib import Path

import torch

from handler.captioner import Captioner
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import print_peak


def main() -> None:
    contender, folder, side, tokens, beams, device, task = sys.argv[1:]
    images, sizes = images_of(1, int(side)), (int(beams), int(tokens))
    if contender == "generate":
        task_ids = [int(number) for number in task.split(",") if number]
        generate(load_theirs(Path(folder), device), images, *sizes, task_ids)
    else:
        ours(Captioner.load(folder, device), images, *sizes, task or None)
    if device == "cpu":
        print_peak()
    else:
        print(torch.cuda.max_memory_reserved() / 2**20)


if __name__ == "__main__":
    main()
