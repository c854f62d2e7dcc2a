"""`python -m training.import_huggingface NAME_OR_DIR`, behind `make import`: a captioner of Hugging
Face -> a checkpoint of ours. The classes are those of `training.weights.families`.

NAME_OR_DIR is a folder that `save_pretrained` wrote (model, tokenizer, image processor), or a name
on the Hub, which is downloaded into its cache. The checkpoint captions as `generate` does with the
model's own generation config. Files are read as data: no code that comes with a model is run.
"""

import os
from pathlib import Path

from handler.errors import ArgumentParser, run_command
from handler.files import as_utf8
from training.folders import CHECKPOINTS
from training.weights.huggingface import import_huggingface


def main() -> None:
    parser = ArgumentParser(prog="training.import_huggingface", description=__doc__)
    parser.add_argument("model", metavar="NAME_OR_DIR", help="a name on the Hub, or a folder")
    parser.add_argument("--out", type=Path, help="default build/checkpoints/NAME")
    arguments = parser.parse_args()
    # The last part, as in the Makefile: of a link its own name.
    out = arguments.out or CHECKPOINTS / os.path.basename(os.path.abspath(arguments.model))
    model = import_huggingface(arguments.model, out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(as_utf8(f"{out}: {millions:.1f} M parameters from {arguments.model}"))


if __name__ == "__main__":
    run_command(main)
