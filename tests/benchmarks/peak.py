"""Prints the peak resident memory, in MB, of one photo's caption with 5 beams, in a process that
imports no more than its user would:

    python -m tests.benchmarks.peak generate FOLDER TOKENS     as `save_pretrained` wrote it
    python -m tests.benchmarks.peak PRECISION EXPORT TOKENS
"""

import sys
from pathlib import Path

from handler.captioner import Captioner
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import print_peak


def main() -> None:
    contender, folder, tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if contender == "generate":
        generate(load_theirs(folder), images_of(1, 224), 5, tokens)
    else:
        captioner = Captioner.load(folder)
        ours(captioner, images_of(1, captioner.preprocessing.image_size), 5, tokens)
    print_peak()


if __name__ == "__main__":
    main()
