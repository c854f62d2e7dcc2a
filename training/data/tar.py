"""Lists the members of a tar from front to back in bounded time and memory.

`tarfile.open` is not used because it loops forever at a negative size, reads headers of any size
into memory, and does not detect a tar that was cut off between two members. The formats are POSIX
ustar and pax, and GNU's long names; see `man 5 tar` of libarchive.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from handler.errors import UserError

BLOCK = tarfile.BLOCKSIZE
# No name or attribute of a photo is longer; larger headers would only fill the memory.
LONGEST_HEADER = 2**20
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# Types whose header is followed by no content, whatever its size field says.
BARE = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class DamagedTar(UserError):
    """How and at which byte a tar is damaged; the caller adds the name of the tar."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason}; at byte {offset}")


@dataclass(frozen=True)
class Entry:
    """A file within a tar: `offset` and `size` of its content in bytes, and its header block."""

    name: str
    offset: int
    size: int
    header: bytes


def read_entries(file: BinaryIO, size: int) -> Iterator[Entry]:
    """Yields the regular files of a tar of `size` bytes in order; folders, links and devices are
    skipped.

    Raises DamagedTar for anything but a complete, uncompressed tar. The caller may seek in `file`
    between two entries.
    """
    offset = 0
    long_name: str | None = None
    attributes: dict[str, str] = {}
    while True:
        header = _read(file, offset, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(offset, "cut off: the end of the archive is missing")
        if not header.strip(b"\0"):
            _check_end(file, offset)
            return
        info = _parse(header, offset)
        content = offset + BLOCK
        length = 0 if info.type in BARE else info.size
        if info.isfile() and "size" in attributes:
            length = _size(attributes["size"], offset)
        name = attributes.get("path") or long_name or info.name
        _check_length(offset, name, length, size - content)
        if info.type in (*PAX, *LONG):
            if length > LONGEST_HEADER:
                raise DamagedTar(offset, f"a header of {length} bytes")
            data = _read(file, content, length)
            if info.type in PAX:
                attributes |= _pax(data, offset)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        else:
            if info.type == tarfile.GNUTYPE_SPARSE or any("sparse" in key for key in attributes):
                raise DamagedTar(
                    offset, f"{name[:80]!r} is a sparse file; pack it as a regular file"
                )
            if info.isfile():
                yield Entry(name, content, length, header)
            long_name, attributes = None, {}
        offset = content + -(-length // BLOCK) * BLOCK


def _check_length(offset: int, name: str, length: int, left: int) -> None:
    if length < 0:
        raise DamagedTar(offset, f"the size of {name[:80]!r} is {length}")
    if length > left:
        raise DamagedTar(offset, f"cut off within {name[:80]}: {left} of its {length} bytes")


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _parse(header: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        kind = next((k for magic, k in COMPRESSED.items() if header.startswith(magic)), None)
        if kind and not offset:
            raise DamagedTar(0, f"compressed with {kind}; unpack it to a plain .tar") from None
        raise DamagedTar(offset, f"not a tar header ({error})") from None


def _check_end(file: BinaryIO, offset: int) -> None:
    """After the end there may only be zeros, up to a record of 20 blocks."""
    if _read(file, offset, tarfile.RECORDSIZE).strip(b"\0"):
        raise DamagedTar(offset, "data after the end of the archive; do not concatenate tars")


def _size(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise DamagedTar(offset, f"the pax size {text[:80]!r} is not a number")
    return int(text)


def _pax(data: bytes, offset: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE<newline>`."""
    attributes = {}
    position = 0
    while position < len(data) and data[position]:
        digits, blank, _ = data[position : position + 20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = data[position + len(digits) + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or position + length > len(data):
            raise DamagedTar(offset, "a damaged pax header")
        text = value[:-1].decode("utf-8", "surrogateescape")
        attributes[key.decode("utf-8", "surrogateescape")] = text
        position += length
    return attributes
