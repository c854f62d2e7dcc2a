"""`python -m tests.benchmarks.shards --data scenes`: photos a second out of a folder, out of shards
on the same disk, and out of shards on a web server on this machine; read alone, and read, decoded
and resized as training does. One process; medians of interleaved rounds."""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from handler.image_preprocess import PreprocessConfig
from tests.benchmarks.timing import machine, medians, report, table
from tests.shard_server import serving
from training.data.manifest import Manifest, data_folder, read_manifest
from training.data.photos import Augment, PhotoDataset, epoch_order, read_bytes, shard_numbers
from training.shards import write_shards


def serve(folder: Path, urls: "multiprocessing.Queue[str]") -> None:
    with serving(folder) as server:
        urls.put(server.url)
        multiprocessing.Event().wait()


def read(manifest: Manifest, photos: int, decoded: bool) -> None:
    """The first photos of an epoch."""
    rows = manifest.split("train")
    order = sum(epoch_order(shard_numbers(rows), 32, seed=0, epoch=0), [])[:photos]
    plain = Augment(PreprocessConfig(image_size=224), augment=False, flip=False)
    dataset = PhotoDataset(manifest, rows, plain, seed=0, epoch=0)
    for index in order:
        if decoded:
            dataset[index]
        else:
            read_bytes(manifest, rows[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default="scenes", help="a dataset under build/data, or its folder"
    )
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--shard-mb", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        plain = read_manifest(data_folder(arguments.data))
        write_shards(plain, Path(temporary, "shards"), round(arguments.shard_mb * 2**20))
        packed = read_manifest(Path(temporary, "shards"))
        urls: multiprocessing.Queue[str] = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(packed.image_root, urls), daemon=True)
        server.start()
        streamed = replace(packed, name=plain.name, image_root=urls.get())
        places = {"folder": plain, "shards": packed, "shards over HTTP": streamed}
        photos = min(arguments.photos, len(plain.split("train")))
        rows, figures = [], {}
        for what, decoded in (("read", False), ("read, decoded, resized", True)):

            def job(manifest: Manifest, decoded: bool = decoded) -> Callable[[], None]:
                return lambda: read(manifest, photos, decoded)

            seconds = medians({n: job(m) for n, m in places.items()}, arguments.rounds)
            figures[what] = {name: photos / value for name, value in seconds.items()}
            rows.append([what, *(f"{figure:.0f}" for figure in figures[what].values())])
        server.terminate()
    text = table(["photos a second", *places], rows)
    report(f"shards-{arguments.data}", f"{machine()}\n\n{text}", figures)


if __name__ == "__main__":
    main()
