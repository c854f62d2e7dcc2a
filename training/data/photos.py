"""Manifest -> batches: photos (or their cached features) with all their captions packed.

The captions of a photo stand one after the other in one row of tokens, so that they share one
encoder pass and waste no padding on each other; a mask keeps each causal and apart from its
neighbours. Photos go through the same preprocessing as in serving; augmentation comes before its
deterministic tail. What is random depends on (seed, epoch, photo) alone, so that a resumed run sees
what an uninterrupted one would have seen.

Dimension key: B photos, Q packed tokens of a photo, P memory tokens, D width.
"""

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from handler.image_preprocess import (
    InvalidImage,
    PreprocessConfig,
    decode,
    resize,
    to_tensor,
)
from training.data.manifest import Manifest, Row
from training.data.shards import read_member

IGNORED = -100  # torch's cross-entropy leaves these targets out
# An epoch goes through the shards of a dataset in windows of so many.
SHARDS_AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """`photos` is (B, 3, S, S) images or (B, P, D) features; tokens, positions and targets are
    (B, Q), the mask (B, Q, Q). `indices` are the photos' places in the split, `mirror` says which
    of them are seen (and described) mirrored."""

    photos: Tensor
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    indices: Sequence[int]
    mirror: Sequence[bool]

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.photos, self.tokens, self.positions, self.targets, self.mask)
        photos, tokens, positions, targets, mask = (t.to(device) for t in tensors)
        return Batch(photos, tokens, positions, targets, mask, self.indices, self.mirror)


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]], tokenizer: CaptionTokenizer, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packs token ids [photo][caption][token] into tokens, positions, targets (B, Q) and mask
    (B, Q, Q). A caption longer than `max_tokens`, end token included, is cut, and then learns no
    end."""
    rows = []
    for photo in captions:
        tokens: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for number, ids in enumerate(photo):
            target = [*ids, tokenizer.end_id][:max_tokens]
            tokens += [tokenizer.begin_id, *target[:-1]]
            targets += target
            positions += range(len(target))
            segments += [number] * len(target)
        rows.append((tokens, positions, targets, segments))
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_id, 0, IGNORED, -1)
    tokens_BQ, positions_BQ, targets_BQ, segments_BQ = (
        torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
        for i, fill in enumerate(fills)
    )
    # A padding query sees the other padding: a row without any visible slot would be NaN.
    same_BQQ = segments_BQ.unsqueeze(2) == segments_BQ.unsqueeze(1)
    return tokens_BQ, positions_BQ, targets_BQ, same_BQQ.tril()


SIDES = {"left": "right", "right": "left"}


def mirrored(caption: str) -> str:
    """The caption of the mirrored photo: left and right change places."""
    return re.sub(
        r"\b(left|right)\b", lambda match: SIDES[match[0].lower()], caption, flags=re.IGNORECASE
    )


class Augment:
    """A photo as it might have been taken: mild crop, mirror, light and colour."""

    def __init__(self, preprocessing: PreprocessConfig, augment: bool, flip: bool) -> None:
        self.preprocessing, self.augment, self.flip = preprocessing, augment, flip
        size = [preprocessing.image_size] * 2
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


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any mixture of numbers and names."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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


class Captions:
    """Token ids of every caption of a split, as they are and mirrored."""

    def __init__(self, rows: Sequence[Row], tokenizer: CaptionTokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.plain = [[tokenizer.encode(c) for c in row.captions] for row in rows]
        self.mirrored = [[tokenizer.encode(mirrored(c)) for c in row.captions] for row in rows]

    def batch(self, photos: Tensor, indices: Sequence[int], mirror: Sequence[bool]) -> Batch:
        chosen = [
            (self.mirrored if flipped else self.plain)[index]
            for index, flipped in zip(indices, mirror, strict=True)
        ]
        tokens, positions, targets, mask = pack_captions(chosen, self.tokenizer, self.max_tokens)
        return Batch(photos, tokens, positions, targets, mask, indices, mirror)


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


class FeatureCache:
    """The frozen encoder's memory of every photo in `views` versions, bfloat16, in one file that is
    mapped into memory: (photos, views, P, D). View 0 is the photo itself, the others are augmented.
    The file is reused when encoder, photos and preprocessing are the same."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        manifest: Manifest,
        rows: Sequence[Row],
        encode: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        views: int,
        augment: Augment,
        seed: int,
        workers: int,
    ) -> None:
        plain = Augment(augment.preprocessing, augment=False, flip=False)
        key = hashlib.sha256(fingerprint.encode())
        for row in rows:
            key.update(f"{stamp(manifest, row)}\n".encode())
        self.path = folder / f"{key.hexdigest()[:24]}.bf16"
        self.mirror = torch.zeros(len(rows), views, dtype=torch.bool)
        for index in range(len(rows)):
            for view in range(1, views):
                self.mirror[index, view] = augment.mirrors(seed_of(seed, view, index))
        size = (len(rows), views, *shape)
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            with partial.open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"{self.path}: waiting for another run that makes them", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self.path.exists():
                    partial.unlink(missing_ok=True)
                else:
                    photos = [
                        PhotoDataset(manifest, rows, augment if view else plain, seed, view)
                        for view in range(views)
                    ]
                    self._make(_mapped(partial, size), photos, encode, workers)
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
        """Batches of features; which view of a photo is seen depends on seed and epoch."""
        photos, views = self.memory.shape[:2]
        generator = torch.Generator().manual_seed(seed_of(seed, "views", epoch))
        view_of = torch.randint(views, (photos,), generator=generator)
        for indices in batches:
            view = view_of[indices]
            features = self.memory[indices, view].float()
            yield captions.batch(features, indices, self.mirror[indices, view].tolist())


def _mapped(path: Path, size: tuple[int, ...]) -> Tensor:
    count = 1
    for side in size:
        count *= side
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16).view(size)
