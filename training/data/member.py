"""Reads one photo from a shard, given its position in the tar."""

import tarfile
from pathlib import Path, PurePosixPath

from handler.errors import UserError
from handler.image_preprocess import MAX_BYTES
from training.data.ranged import read_range

BLOCK = tarfile.BLOCKSIZE


def read_member(shard: Path | str, member: str, span: tuple[int, int]) -> bytes:
    """The bytes of a photo in a shard, a file or URL. The tar header before them is also read and
    must name the photo, because the shard may have been replaced since the dataset was prepared.
    Raises UserError naming shard and photo."""
    offset, length = span
    if length > MAX_BYTES:
        raise UserError(
            f"{shard}: field 'span' of {member} is {length} bytes; no photo is that large"
        )
    try:
        data = read_range(shard, max(0, offset - BLOCK), BLOCK + length)
    except UserError as error:
        raise UserError(f"{error} (for {member})") from None
    if not is_header(data[:BLOCK], member, length):
        raise UserError(f"{shard}: {member} is no longer at its offset; prepare the data again")
    if len(data) < BLOCK + length:
        raise UserError(f"{shard}: cut off within {member}; copy the shard again")
    return data[BLOCK:]


def is_header(block: bytes, member: str, length: int) -> bool:
    """Whether these bytes are the tar header of that file."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return False
    # Some tools keep the "/" of an absolute path, which the name of a photo in a dataset has not.
    names = (PurePosixPath(name.lstrip("/")) for name in (header.name, member))
    return len(set(names)) == 1 and header.size == length
