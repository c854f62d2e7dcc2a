"""The photos of a manifest, augmented and in batches.

Photos are preprocessed as in serving; augmentation is applied before that. Random numbers depend on
(seed, epoch, photo) only, so that a resumed run sees the same images as an uninterrupted one.
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

# An epoch visits the shards of a dataset in windows of this many.
SHARDS_AT_ONCE = 16


class Augment:
    """Mild augmentation: random crop, mirror image, brightness and colour."""

    def __init__(self, preprocessing: PreprocessConfig, augment: bool, flip: bool) -> None:
        self.preprocessing, self.augment, self.flip = preprocessing, augment, flip
        # Of which the middle is cut out, as of every photo.
        size = [preprocessing.resizing.side] * 2
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
        """Whether the photo with this seed is mirrored."""
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
    """The encoded bytes of a row's photo. Raises UserError naming the file, or the shard and the
    member, if it is missing."""
    path = manifest.path(row)
    if row.span is not None:
        return read_member(path, row.member, row.span)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the data again") from error


def read_photo(manifest: Manifest, row: Row) -> Image.Image:
    """Decodes a row's photo. Raises UserError naming the file if it is damaged."""
    try:
        return decode(read_bytes(manifest, row))
    except InvalidImage as error:
        location = f"{manifest.path(row)}: {row.member}" if row.span else manifest.path(row)
        raise UserError(f"{location}: {error}; prepare the data again") from error


def stamp(manifest: Manifest, row: Row) -> str:
    """A string that changes when the photo's file changes. A shard on a server is assumed not to
    change."""
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
    """(N,) the number of each photo's shard, from 0; all photos in no shard count as one shard."""
    number_of: dict[str, int] = {}
    return torch.tensor([number_of.setdefault(row.shard, len(number_of)) for row in rows])


def epoch_order(shard_of_N: Tensor, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The photos of each batch of an epoch. A last batch of less than half the size is merged into
    the one before it, so that every photo is used and no step has only a few photos.

    Shards (see `shard_numbers`) are visited in random order, `SHARDS_AT_ONCE` at a time, and the
    photos of these are shuffled together: the shards read at one time fit into a page cache, or
    into the cache of a proxy.
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
    """Batches of images, loaded in advance by `workers` processes."""

    def collate(samples: list[Sample]) -> tuple[list[int], Tensor, list[bool]]:
        indices, images, mirror = zip(*samples, strict=True)
        return list(indices), torch.stack(images), list(mirror)

    # A separate generator: the loader must not draw from the one whose state `--resume` restores.
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
    """The batches of a loader. The loader puts the traceback of a worker process into the message
    of its exception; this restores the one-line message of a UserError."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
