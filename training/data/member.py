"""One photo out of a shard, by its place in the tar."""

import tarfile
from pathlib import Path, PurePosixPath

from handler.errors import UserError
from handler.image_preprocess import MAX_BYTES
from training.data.ranged import read_range

BLOCK = tarfile.BLOCKSIZE


def read_member(place: Path | str, member: str, span: tuple[int, int]) -> bytes:
    """A photo's bytes out of its shard. The tar's header before them is read too and must name the
    photo, for a shard may have been replaced since it was read. Raises UserError naming both."""
    offset, length = span
    if length > MAX_BYTES:
        raise UserError(
            f"{place}: field 'span' of {member} is {length} bytes; no photo is so large"
        )
    try:
        data = read_range(place, max(0, offset - BLOCK), BLOCK + length)
    except UserError as error:
        raise UserError(f"{error} (for {member})") from None
    if not is_header(data[:BLOCK], member, length):
        raise UserError(f"{place}: {member} is not where it was; prepare the data again")
    if len(data) < BLOCK + length:
        raise UserError(f"{place}: cut off within {member}; copy the shard again")
    return data[BLOCK:]


def is_header(block: bytes, member: str, length: int) -> bool:
    """Whether these bytes, taken alone, are the tar's header of that file."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return False
    same = PurePosixPath(header.name) == PurePosixPath(member)
    return same and header.size == length
