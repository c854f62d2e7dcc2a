"""Prints the peak memory, in MB, of one photo's caption with 5 beams, in a process that imports no
more than its user would: resident, or what torch took of the GPU's.

    python -m tests.benchmarks.peak generate FOLDER SIDE TOKENS DEVICE
    python -m tests.benchmarks.peak PRECISION EXPORT SIDE TOKENS DEVICE

FOLDER is what `save_pretrained` wrote, SIDE that of a photo in pixels.
"""

import sys
from pathlib import Path

import torch

from handler.captioner import Captioner
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import print_peak


def main() -> None:
    contender, folder, side, tokens, device = sys.argv[1:]
    images = images_of(1, int(side))
    if contender == "generate":
        generate(load_theirs(Path(folder), device), images, 5, int(tokens))
    else:
        ours(Captioner.load(folder, device), images, 5, int(tokens))
    if device == "cpu":
        print_peak()
    else:
        print(torch.cuda.max_memory_reserved() / 2**20)


if __name__ == "__main__":
    main()
