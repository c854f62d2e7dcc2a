"""`python -m training.train`, behind `make train`: a manifest in, a checkpoint out (see
`training.loop.train`)."""

from pathlib import Path

from handler.errors import ArgumentParser, run_command
from training.config import load_config
from training.data.manifest import data_folder, read_manifest
from training.folders import CHECKPOINTS
from training.loop.allocator import keep_freed_memory
from training.loop.run import pick_device
from training.loop.train import train


def main() -> None:
    parser = ArgumentParser(prog="training.train", description=__doc__)
    parser.add_argument("--config", default="scenes", help="a preset's name or a YAML file")
    parser.add_argument("--data", help="a dataset under build/data, or its folder")
    parser.add_argument(
        "--run", help="name of the run (default: the config's, or that of a dataset not its own)"
    )
    parser.add_argument("--encoder-weights", type=Path, help="pretrained weights on disk")
    parser.add_argument("--epochs", type=int, help="epochs of every stage")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", help="auto, cpu, cuda")
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of this name")
    arguments = parser.parse_args()
    if arguments.resume and arguments.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it; give one of them")
    own = load_config(arguments.config)
    config = load_config(
        arguments.config,
        data=arguments.data,
        epochs=arguments.epochs,
        seed=arguments.seed,
        precision=arguments.precision,
        device=arguments.device,
    )
    pick_device(config)  # refused before anything is read
    keep_freed_memory()
    manifest = read_manifest(data_folder(config.data))
    is_own = arguments.data is None or own.data in (arguments.data, manifest.name)
    name = arguments.run or (config.name if is_own else manifest.name)  # as in the Makefile
    train(
        config,
        manifest,
        CHECKPOINTS / name,
        arguments.encoder_weights,
        arguments.resume,
        arguments.overwrite,
    )


if __name__ == "__main__":
    run_command(main)
