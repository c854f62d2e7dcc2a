"""Downloads Flickr8k from its public mirror, a GitHub release of two zip files.

Checked are the size that the server announces, the CRC of every file in the zips, and the MD5 sums
that the R package `torchvision` publishes for the same two files (MD5 protects against damage, not
against an attacker). The mirror itself publishes no sums. The first complete download also stores
its SHA-256 beside the file, so that a later change of the file is detected.
"""

import hashlib
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import requests
from tqdm import tqdm

from handler.errors import UserError
from handler.files import write_atomic
from training.data.manifest import check_inside
from training.data.server import Session, answer, body, length_of

MIRROR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
MD5 = {
    "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627",
    "Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",
}
ATTEMPTS = 5  # consecutive attempts without progress
LARGEST = 2**33  # bytes per file


def download_flickr8k(downloads: Path, mirror: str = MIRROR) -> Path:
    """Downloads and unpacks the two zips; returns the folder in the original layout.

    Existing files are not downloaded again, and an interrupted download is resumed. The MD5 sums
    are checked for the default mirror only, because another mirror may have repacked the files.
    Raises UserError if the mirror cannot be reached or a file has the wrong content.
    """
    folder = downloads / "flickr8k"
    if folder.is_dir():
        return folder
    archives = [downloads / name for name in MD5]
    for archive in archives:
        md5 = MD5[archive.name] if mirror == MIRROR else None
        fetch(f"{mirror.rstrip('/')}/{archive.name}", archive, md5)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".unpacking-") as beside:
        for archive in archives:
            unpack(archive, Path(beside, "flickr8k"))
        os.replace(Path(beside, "flickr8k"), folder)
    return folder


def fetch(url: str, target: Path, md5: str | None = None, pause_s: float = 1.0) -> None:
    """Downloads `url` to `target`, by way of `target.part`, and writes its sum to `target.sha256`.

    A broken connection is resumed where it broke (HTTP Range), after a pause that doubles each
    time. Raises UserError after `ATTEMPTS` attempts without progress, for a refusal such as 404,
    and for a wrong sum; a file with a wrong sum is removed.
    """
    part, record = Path(f"{target}.part"), Path(f"{target}.sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        fruitless = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _continue(url, part):
                    break
                reason = "the connection broke"
            except requests.RequestException as error:
                if isinstance(error, ValueError):  # requests' errors about the URL itself
                    raise UserError(f"{url}: {error}") from None
                reason = type(error).__name__
            except OSError as error:
                raise UserError(f"{part}: {error.strerror}") from None
            after = part.stat().st_size if part.exists() else 0
            fruitless = 0 if after > before else fruitless + 1
            if fruitless == ATTEMPTS:
                raise UserError(
                    f"{url}: {reason}, {ATTEMPTS} times; run again to resume the download, or "
                    "download it by other means and set SOURCE=DIR"
                )
            time.sleep(pause_s * 2 ** max(0, fruitless - 1))
    file = target if target.exists() else part
    sums = {"md5": _sum(file, "md5"), "sha256": _sum(file, "sha256")}
    expected = {"md5": md5, "sha256": _recorded(record)}
    for kind, wanted in expected.items():
        if wanted is not None and wanted != sums[kind]:
            if file == part:
                part.unlink()
            way_out = "the download was removed, run again" if file == part else "remove it"
            raise UserError(
                f"{target}: its {kind} is {sums[kind]}, not {wanted}; {way_out}"
                + (f" (or remove {record} if the mirror changed it)" if kind == "sha256" else "")
            )
    if file == part:
        os.replace(part, target)
    write_atomic(record, f"{sums['sha256']}  {target.name}\n")


def _continue(url: str, part: Path) -> bool:
    """Downloads what is missing of `part`; returns whether it is complete."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with Session() as session, answer(session, url, headers) as response:
        if (
            response.status_code == 416
        ):  # `part` is complete, or the file on the server is shorter now
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
            if size == str(have):
                return True
            part.unlink()
            return False
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.HTTPError(f"status {response.status_code}")
        if response.status_code not in (200, 206):
            raise UserError(
                f"{url}: the server answers {response.status_code} {response.reason}; "
                "download it by other means and set SOURCE=DIR"
            )
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            return False
        have = have if resumed else 0
        length = length_of(response)
        if length is None or have + length > LARGEST:
            raise UserError(
                f"{url}: the server sends no Content-Length up to {LARGEST} bytes; "
                "download it by other means and set SOURCE=DIR"
            )
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                desc=part.stem,
                initial=have,
                total=have + length,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            for chunk in body(response, url, length):
                file.write(chunk)
                bar.update(len(chunk))
    return part.stat().st_size == have + length


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip and checks the CRC of every file. Raises UserError for a damaged zip, and for
    names that lead out of the folder."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in tqdm(zipped.infolist(), desc=archive.name, unit="file", disable=None):
                if member.is_dir() or member.filename.startswith("__MACOSX/"):
                    continue
                check_inside(member.filename, f"{archive}: an entry")
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    # RuntimeError: an entry that is encrypted or uses an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: damaged zip ({error}); remove it and run again") from None
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked: {error.strerror or error}") from None


def _sum(path: Path, kind: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _recorded(record: Path) -> str | None:
    try:
        words = record.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        words = []
    if not words:
        raise UserError(f"{record}: not in the format of sha256sum; remove it and run again")
    return words[0]
