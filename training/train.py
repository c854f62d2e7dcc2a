"""`python -m training.train`, behind `make train`: a manifest in, a checkpoint out (see
`training.loop.train`). With --from it fine-tunes the captioner of a checkpoint."""

from pathlib import Path

from handler.errors import ArgumentParser, run_command
from training.config import is_folder_name, load_config, read_fields
from training.data.manifest import data_folder, read_manifest
from training.folders import CHECKPOINTS
from training.loop.allocator import keep_freed_memory
from training.loop.distributed import processes_for, together
from training.loop.fine_tuning import fine_tuning_config
from training.loop.run import pick_device
from training.loop.train import train

# The presets where --config is left out: of a new captioner, and of one that is there.
USUAL, FINETUNE = "scenes", "finetune"


def main() -> None:
    parser = ArgumentParser(prog="training.train", description=__doc__)
    parser.add_argument(
        "--config", help=f"a preset's name or a YAML file (default {USUAL}; with --from {FINETUNE})"
    )
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="DIR", help="fine-tune the captioner of DIR"
    )
    parser.add_argument(
        "--add-words", type=int, metavar="N", help="with --from: words that it lacks, said N times"
    )
    parser.add_argument("--data", help="a dataset under build/data, or its folder")
    parser.add_argument(
        "--run", help="name of the run (default: the config's, or that of a dataset not its own)"
    )
    parser.add_argument("--encoder-weights", type=Path, help="pretrained weights on disk")
    parser.add_argument("--epochs", type=int, help="epochs of every stage")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", help="auto, cpu, cuda")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that train together"
    )
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of this name")
    arguments = parser.parse_args()
    if arguments.resume and arguments.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it; give one of them")
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}; give 1 or more")
    preset = arguments.config or (FINETUNE if arguments.start else USUAL)
    if preset == FINETUNE and arguments.start is None:
        parser.error(f"--config {FINETUNE} needs --from DIR (make: FROM=DIR), a checkpoint")
    if arguments.add_words is not None and arguments.start is None:
        parser.error("--add-words needs --from DIR (make: FROM=DIR), a checkpoint")
    if arguments.run is not None and not is_folder_name(arguments.run):
        parser.error(f"--run is {arguments.run!r}; give the name of a folder (make: RUN=NAME)")
    names = ("data", "epochs", "seed", "precision", "device")
    overrides = {name: getattr(arguments, name) for name in names}
    if arguments.start is None:
        config = load_config(preset, **overrides)
    else:
        config = fine_tuning_config(preset, arguments.start, arguments.add_words, **overrides)
    if config.data is None:
        parser.error(f"config {config.name!r} names no dataset; give --data NAME (make: DATA=NAME)")
    device, _ = pick_device(config)  # refused before anything is read
    processes = processes_for(device, config.device, arguments.processes)
    if processes < arguments.processes:
        print(f"{processes} of {arguments.processes} processes: each needs a GPU of its own")
    keep_freed_memory()
    manifest = read_manifest(data_folder(config.data))
    _, own = read_fields(preset)
    is_own = arguments.data is None or own["data"] in (arguments.data, manifest.name)
    name = arguments.run or (config.name if is_own else manifest.name)  # as in the Makefile
    if not is_folder_name(name):
        parser.error(f"{name!r}, the dataset's name, is no name for a run; give one with --run")
    with together(processes):
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
