"""Prints the peak memory, in MB, of one photo's caption with 5 beams, in a process that imports no
more than its user would: resident, or what torch took of the GPU's.

    python -m tests.benchmarks.peak generate FOLDER TOKENS DEVICE   as `save_pretrained` wrote it
    python -m tests.benchmarks.peak PRECISION EXPORT TOKENS DEVICE
"""

import sys
from pathlib import Path

import torch

from handler.captioner import Captioner
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import print_peak


def main() -> None:
    contender, folder, tokens, device = *sys.argv[1:2], Path(sys.argv[2]), *sys.argv[3:]
    if contender == "generate":
        generate(load_theirs(folder, device), images_of(1, 224), 5, int(tokens))
    else:
        captioner = Captioner.load(folder, device)
        ours(captioner, images_of(1, captioner.preprocessing.image_size), 5, int(tokens))
    if device == "cpu":
        print_peak()
    else:
        print(torch.cuda.max_memory_reserved() / 2**20)


if __name__ == "__main__":
    main()
