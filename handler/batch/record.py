"""The definition of a job, stored in its output folder: `run.json` (checkpoint, precision, options,
source) and `shards.json` (how the source was cut). Every start of the job uses the same photos and
the same model."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handler.batch.output import Output
from handler.batch.source import WHOLE, Shard, absolute, cut, find
from handler.captioner import check_config, choose_options, load_tokenizer, read_config
from handler.errors import UserError
from handler.files import FORMAT, locked

RUN, SHARDS = "run.json", "shards.json"
FIELDS = ("checkpoint", "precision", "options", "source")
PATIENCE_S = 600.0  # how long a job of an array waits for another one to cut the source


def describe(export: Path, options: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of run.json. Raises UserError for an export or options that cannot be used."""
    config = read_config(export)
    check_config(export, config)
    for name in ("encoder.pt", "decoder.pt", "tokenizer.json"):
        if not (export / name).is_file():
            raise UserError(f"{export / name}: missing; export the checkpoint again")
    for field in ("checkpoint", "precision"):
        if field not in config:
            raise UserError(
                f"{export / 'config.json'}: no field {field!r}; give an export's folder"
            )
    tokenizer, shape = load_tokenizer(export, config), config["model"]["decoder"]
    sizes = shape["vocab_size"], shape["max_positions"]
    counted = config.get("total_lengths", [])
    chosen = choose_options(options, config.get("decoding", {}), tokenizer, *sizes, counted)
    return {
        "format": FORMAT,
        "checkpoint": config["checkpoint"],
        "precision": config["precision"],
        "options": asdict(chosen),
        "source": "::".join(absolute(part) for part in source.split("::"))
        if "://" not in source
        else source,
    }


def open_run(output: Output, run: dict[str, Any], extend: bool) -> tuple[list[Shard], list[str]]:
    """Returns the shards of the job in `output`, which its first start cuts, and messages about new
    photos. Raises UserError if the folder holds another job."""
    with _exclusive(output):
        before = output.read(RUN)
        if before is None:
            _check_empty(output)
        else:
            _check_same(output, run, before)
        is_cut = before is not None and output.read(SHARDS) is not None
        shards = [] if is_cut else _cut(run["source"], output.url)
        # The first job of an array writes run.json and shards.json; the others use them.
        if before is None and not output.create(RUN, json.dumps(run, indent=2).encode()):
            _check_same(output, run, output.read(RUN) or b"")
        if not is_cut and output.create(SHARDS, _packed(shards)):
            return shards, []
        return _compare(output, run["source"], _read_shards(output), extend)


def _cut(source: str, out: str) -> list[Shard]:
    shards, root, photos = find(source, out)
    return shards or cut(root, photos)


def _check_empty(output: Output) -> None:
    others = sorted(name for name in output.names() if not name.startswith("."))
    if others:
        raise UserError(
            f"{output.url}: the folder is not empty and holds no {RUN} ({others[0]}); choose "
            "another --out"
        )


@contextmanager
def _exclusive(output: Output) -> Iterator[None]:
    """Lets one job at a time cut the source while the others wait. An object store has no locks;
    there the first job that creates a file wins."""
    deadline = time.monotonic() + PATIENCE_S
    if output.folder is None:
        with nullcontext():
            yield
        return
    while True:
        lock = locked(output.folder / RUN)
        try:
            lock.__enter__()
            break
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _parse(output: Output, name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{output.url}/{name}: not readable as JSON; choose another --out"
        ) from error


def _check_same(output: Output, run: dict[str, Any], content: bytes) -> None:
    before = _parse(output, RUN, content)
    run = json.loads(json.dumps(run))
    for field in FIELDS:
        old = before.get(field) if isinstance(before, dict) else None
        if old == run[field]:
            continue
        new = run[field]
        if isinstance(old, dict):
            differing = sorted(k for k in new if old.get(k) != new[k])
            field = f"{field} ({', '.join(differing)})"
            old, new = ({k: d.get(k) for k in differing} for d in (old, new))
        raise UserError(
            f"{output.url}/{RUN}: {field} was {old} at the first start and is {new} now; use the "
            "same value, or choose another --out"
        )


def _packed(shards: list[Shard]) -> bytes:
    return json.dumps({"format": FORMAT, "shards": [asdict(shard) for shard in shards]}).encode()


def _read_shards(output: Output) -> list[Shard]:
    content = _parse(output, SHARDS, output.read(SHARDS) or b"")
    try:
        return [Shard(**{**row, "photos": tuple(row["photos"])}) for row in content["shards"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{output.url}/{SHARDS}: not a list of shards; choose another --out"
        ) from error


def _compare(
    output: Output, source: str, shards: list[Shard], extend: bool
) -> tuple[list[Shard], list[str]]:
    """Looks for photos that were added since the source was cut: their number is reported, and with
    `extend` they are cut into further shards. Photos that were removed need no check here: they
    become rows with an error when their shards are captioned."""
    found, root, photos = find(source, output.url, first=False)
    known = {photo for shard in shards for photo in shard.photos}
    addresses = {shard.address for shard in shards}
    fresh = [photo for photo in photos if photo not in known]
    # A file that is recorded as a whole is known group by group, and the other way round.
    whole = {shard.url for shard in (*shards, *found) if shard.row_group == WHOLE}
    whole &= {shard.url for shard in shards}
    added = [s for s in found if s.address not in addresses and s.url not in whole]
    added += cut(root, fresh, first=len(shards))
    if not added:
        return shards, []
    what = f"{len(fresh)} photos" if fresh else f"{len(added)} shards"
    if not extend:
        return shards, [f"{what} are new since the first start; add --extend to caption them"]
    output.write(SHARDS, _packed(shards + added))
    return shards + added, [f"{what} are new since the first start and are captioned now"]
