"""The photos of a manifest, augmented and in batches.

Photos go through the same preprocessing as in serving; augmentation comes before its deterministic
tail. What is random depends on (seed, epoch, photo) alone, so that a resumed run sees what an
uninterrupted one would have seen.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from handler.errors import UserError
from handler.image_preprocess import (
    InvalidImage,
    PreprocessConfig,
    decode,
    resize,
    to_tensor,
)
from training.data.captions import Batch, Captions
from training.data.manifest import Manifest, Row
from training.data.member import read_member
from training.data.seeds import seed_of

# An epoch goes through the shards of a dataset in windows of so many.
SHARDS_AT_ONCE = 16


class Augment:
    """A photo as it might have been taken: mild crop, mirror, light and colour."""

    def __init__(self, preprocessing: PreprocessConfig, augment: bool, flip: bool) -> None:
        self.preprocessing, self.augment, self.flip = preprocessing, augment, flip
        size = [preprocessing.side] * 2  # of which the middle is cut out, as of every photo
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    size,
                    scale=(0.6, 1.0),
                    ratio=(0.8, 1.25),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.ColorJitter(0.3, 0.3, 0.3, 0.03),
            ]
        )

    def mirrors(self, seed: int) -> bool:
        """Whether the photo of this seed is mirrored."""
        return self.flip and seed % 2 == 1

    def __call__(self, photo: Image.Image, seed: int) -> tuple[Tensor, bool]:
        """The tensor (3, S, S), and whether the photo was mirrored."""
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                photo = self.transform(photo)
        mirror = self.mirrors(seed)
        if mirror:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(resize(photo, self.preprocessing), self.preprocessing), mirror


def read_bytes(manifest: Manifest, row: Row) -> bytes:
    """A row's photo as it was encoded; a missing one is an error that names the file, or the shard
    and the member."""
    path = manifest.path(row)
    if row.span is not None:
        return read_member(path, row.member, row.span)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the data again") from error


def read_photo(manifest: Manifest, row: Row) -> Image.Image:
    """Decodes a row's photo; a broken one is an error that names the file."""
    try:
        return decode(read_bytes(manifest, row))
    except InvalidImage as error:
        place = f"{manifest.path(row)}: {row.member}" if row.span else manifest.path(row)
        raise UserError(f"{place}: {error}; prepare the data again") from error


def stamp(manifest: Manifest, row: Row) -> str:
    """A text that changes when the photo's file does. A shard on a server is taken to stay as it
    is."""
    path = manifest.path(row)
    where = "" if row.span is None else f" {row.member} {row.span}"
    if isinstance(path, str):
        return path + where
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the data again") from error
    return f"{path} {stat.st_size} {stat.st_mtime_ns}{where}"


class PhotoDataset(Dataset[tuple[int, Tensor, bool]]):
    """Augmented photos of one epoch: (index, image (3, S, S), mirrored)."""

    def __init__(
        self, manifest: Manifest, rows: Sequence[Row], augment: Augment, seed: int, epoch: int
    ) -> None:
        self.manifest, self.rows, self.augment = manifest, rows, augment
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor, bool]:
        photo = read_photo(self.manifest, self.rows[index])
        image, mirror = self.augment(photo, seed_of(self.seed, self.epoch, index))
        return index, image, mirror


def shard_numbers(rows: Sequence[Row]) -> Tensor:
    """(N,) which shard each photo lies in, counted from 0; photos in no shard count as one."""
    number_of: dict[str, int] = {}
    return torch.tensor([number_of.setdefault(row.shard, len(number_of)) for row in rows])


def epoch_order(shard_of_N: Tensor, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The photos of each batch of an epoch; a last batch smaller than half is joined to the one
    before it, so that no photo is left out and no step is made on a handful.

    Shards (see `shard_numbers`) are taken in a random order, `SHARDS_AT_ONCE` of them at a time,
    and the photos of these are mixed: what is read at a time fits a page cache, or a proxy's.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    shuffled = torch.randperm(len(shard_of_N), generator=generator)
    shards = int(shard_of_N.max()) + 1
    window_of = torch.randperm(shards, generator=generator) // SHARDS_AT_ONCE
    windows = window_of[shard_of_N[shuffled]]
    photos, order = len(shuffled), shuffled[torch.argsort(windows, stable=True)].tolist()
    batches = [order[i : i + batch] for i in range(0, photos, batch)]
    if len(batches) > 1 and len(batches[-1]) < batch / 2:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


Sample = tuple[int, Tensor, bool]


def photo_batches(
    dataset: PhotoDataset, captions: Captions, batches: list[list[int]], workers: int
) -> Iterator[Batch]:
    """Batches of images, loaded ahead by `workers` processes."""

    def collate(samples: list[Sample]) -> tuple[list[int], Tensor, list[bool]]:
        indices, images, mirror = zip(*samples, strict=True)
        return list(indices), torch.stack(images), list(mirror)

    # A generator of its own: the loader must not draw from the one whose state a resume restores.
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )
    for indices, images, mirror in loaded(loader):
        yield captions.batch(images, indices, mirror)


def loaded(loader: DataLoader[Sample]) -> Iterator[tuple[list[int], Tensor, Any]]:
    """A loader's batches. The loader wraps what a worker raises into that worker's traceback; a
    UserError is unwrapped again, for it must be one line."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
