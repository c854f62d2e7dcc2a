"""The frozen encoder's output for every photo, computed once and cached in a file.

Dimension key: P memory tokens, D width.
"""

import fcntl
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.data.captions import Batch, Captions
from training.data.manifest import Manifest, Row
from training.data.photos import Augment, PhotoDataset, loaded, stamp
from training.data.seeds import seed_of


class FrozenEncoder(NamedTuple):
    """An encoder of photos (n, 3, H, W): a hash that identifies it, the function, and the shape
    (P, D) of the memory of one photo."""

    fingerprint: str
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, int]


class FeatureCache:
    """The frozen encoder's memory of `views` versions of every photo, (photos, views, P, D) in
    bfloat16, in one memory-mapped file. View 0 is the photo itself; the others are augmented. The
    file is reused if encoder, photos and preprocessing are the same."""

    def __init__(
        self,
        folder: Path,
        encoder: FrozenEncoder,
        manifest: Manifest,
        rows: Sequence[Row],
        views: int,
        augment: Augment,
        seed: int,
        workers: int,
    ) -> None:
        plain = Augment(augment.preprocessing, augment=False, flip=False)
        key = hashlib.sha256(encoder.fingerprint.encode())
        for row in rows:
            key.update(f"{stamp(manifest, row)}\n".encode())
        self.path = folder / f"{key.hexdigest()[:24]}.bf16"
        self.mirror = torch.zeros(len(rows), views, dtype=torch.bool)
        for index in range(len(rows)):
            for view in range(1, views):
                self.mirror[index, view] = augment.mirrors(seed_of(seed, view, index))
        size = (len(rows), views, *encoder.shape)
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            with partial.open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(
                        f"{self.path}: waiting for another run that computes these features",
                        flush=True,
                    )
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists():
                    partial.unlink(missing_ok=True)
                else:
                    photos = [
                        PhotoDataset(manifest, rows, augment if view else plain, seed, view)
                        for view in range(views)
                    ]
                    try:
                        _reserve(partial, size)
                        self._make(_mapped(partial, size), photos, encoder.encode, workers)
                    except BaseException:
                        partial.unlink(missing_ok=True)
                        raise
                    partial.replace(self.path)
        self.memory = _mapped(self.path, size)

    def _make(
        self,
        memory: Tensor,
        views: Sequence[PhotoDataset],
        encode: Callable[[Tensor], Tensor],
        workers: int,
    ) -> None:
        for view, photos in enumerate(views):
            title = f"features, view {view + 1}/{len(views)}"
            bar = tqdm(total=len(photos), desc=title, unit="photo")
            loader = DataLoader(photos, batch_size=32, num_workers=workers)
            for indices, images, mirror in loaded(loader):
                memory[indices, view] = encode(images).to("cpu", torch.bfloat16)
                assert torch.equal(self.mirror[indices, view], mirror)
                bar.update(len(indices))
            bar.close()

    def batches(
        self, captions: Captions, batches: list[list[int]], seed: int, epoch: int
    ) -> Iterator[Batch]:
        """Batches of features; seed and epoch determine which view of each photo is used."""
        photos, views = self.memory.shape[:2]
        generator = torch.Generator().manual_seed(seed_of(seed, "views", epoch))
        view_of = torch.randint(views, (photos,), generator=generator)
        for indices in batches:
            view = view_of[indices]
            features = self.memory[indices, view].float()
            yield captions.batch(features, indices, self.mirror[indices, view].tolist())


def _reserve(path: Path, size: tuple[int, ...]) -> None:
    """Allocates all blocks of a file. Without them, writing to mapped memory on a full disk kills
    the process (SIGBUS). Raises OSError if the disk has too little space."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, math.prod(size) * torch.bfloat16.itemsize)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _mapped(path: Path, size: tuple[int, ...]) -> Tensor:
    count = math.prod(size)
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16).view(size)
