"""`python -m handler.batch`, behind `make batch`: captions for millions of photos, on this machine
or a Ray cluster. It can be killed at any moment and started again: every photo gives one row.

Exit status: 0 all captioned, 1 some rows have errors or shards failed, 2 nothing could be started.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from handler.batch import namespace
from handler.batch.output import Output
from handler.batch.pool import Pool, connected
from handler.batch.process import caption_shards
from handler.batch.record import describe, open_run
from handler.batch.shard import Job, part_name
from handler.batch.source import URL, Shard, absolute, names_urls, needs_network
from handler.batch.summary import Progress, line, totals
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import locked, read_object, write_atomic
from handler.request import add_decoding_options, decoding_options


def parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="handler.batch", description=__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="photos, .tar shards or Parquet files: a folder, glob, URL or list",
    )
    parser.add_argument(
        "--out", required=True, help="folder or URL to write to; an interrupted job resumes from it"
    )
    parser.add_argument("--export", type=Path, required=True, help="folder of an export")
    parser.add_argument("--workers", type=int, help="default: one per core, or one per GPU")
    parser.add_argument("--threads", type=int, default=1, help="per worker (default 1)")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs to use, one per worker (default 0)"
    )
    parser.add_argument(
        "--shards", metavar="I/N", help="only part I of N of the shards, without Ray"
    )
    parser.add_argument("--address", help="of a Ray cluster (default: start Ray on this machine)")
    parser.add_argument(
        "--extend", action="store_true", help="also caption photos added since the first start"
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE", help="write the final figures to it as JSON"
    )
    add_decoding_options(parser, "export")
    arguments = parser.parse_args()
    for name in ("workers", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; give 1 or more")
    if arguments.metrics:
        check_metrics(arguments.metrics)
    for name in ("source", "out"):
        if not getattr(arguments, name):
            parser.error(f"--{name} is empty; give a folder or a URL")
    if arguments.gpus < 0:
        parser.error(f"--gpus is {arguments.gpus}; give 0 or more")
    if arguments.workers and arguments.workers < arguments.gpus:
        parser.error(
            f"--workers {arguments.workers} cannot use --gpus {arguments.gpus}; give one worker a "
            "GPU, or more"
        )
    if arguments.shards:
        part = re.fullmatch(r"([0-9]{1,9})/([1-9][0-9]{0,8})", arguments.shards)
        if part is None or int(part[1]) > int(part[2]):
            parser.error(f"--shards is {arguments.shards!r}; give I/N, as 0/8 to 7/8")
    if arguments.shards and (arguments.address or arguments.workers):
        parser.error("--shards runs one worker without Ray; leave --address and --workers out")
    return arguments


def check_metrics(path: Path) -> None:
    """Raises UserError if a file exists at `path` that is neither empty nor the figures of an
    earlier run."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    try:
        is_earlier = path.is_file() and "shards_failed" in read_object(path)
    except UserError:
        is_earlier = False
    if not is_earlier:
        raise UserError(
            f"{path}: this file does not contain the figures of a batch; set --metrics to another "
            "path"
        )


def share(shards: list[Shard], part: str | None) -> list[Shard]:
    """The shards of job I of N. I counts from 0 or from 1: job N is the same as job 0."""
    if part is None:
        return shards
    index, count = map(int, part.split("/"))
    return shards[index % count :: count]


def caption(
    arguments: argparse.Namespace, job: Job, shards: list[Shard]
) -> Iterator[tuple[Shard, dict[str, Any]]]:
    if arguments.shards:
        yield from caption_shards(job, shards)
        return
    wanted = arguments.workers or arguments.gpus or 0
    cores = max(len(os.sched_getaffinity(0)), wanted * job.threads)
    with connected(arguments.address, cores, arguments.gpus) as ray:
        if arguments.address:
            cores = int(ray.cluster_resources().get("CPU", 0))
        workers = wanted or max(1, cores // job.threads)
        yield from Pool(ray, job, workers, arguments.gpus / workers).caption(shards)


def secure(arguments: argparse.Namespace, source: str) -> None:
    """Makes a local Ray's ports unreachable for other machines, or warns that they are open."""
    if arguments.shards or arguments.address or namespace.is_alone():
        return
    is_local = not (URL.match(arguments.out) or needs_network(source))
    if is_local and namespace.is_possible():
        namespace.restart()
    why = "this system allows no network namespace" if is_local else "the photos need the network"
    print(
        f"warning: Ray's ports are open on every interface ({why}); they require this job's "
        "token. Use a firewall, or --shards, which opens no port",
        file=sys.stderr,
    )


def is_offline(source: str, shards: list[Shard]) -> bool:
    """Whether this job has no network, for a source that seemed to need none. It is `needs_network`
    of the files that are known by now: a folder of a million photos is not listed again."""
    if not namespace.is_alone() or URL.search(source):
        return False
    files = dict.fromkeys(shard.url for shard in shards if shard.kind == "parquet")
    return not any(map(names_urls, files))


def main() -> None:
    arguments = parse()
    options = decoding_options(arguments)
    run = describe(arguments.export, options, arguments.source)
    secure(arguments, run["source"])
    output = Output(absolute(arguments.out))
    with ExitStack() as stack:
        if output.folder:
            # One driver per folder, or with --shards one per part.
            part = (
                arguments.shards and output.folder / f"shards-{arguments.shards.replace('/', '-')}"
            )
            # Inside the folder: its parent need not be writable, as that of a mounted volume.
            stack.enter_context(locked(part or output.folder / "job"))
        shards, notices = open_run(output, run, arguments.extend)
        for notice in notices:
            print(notice, file=sys.stderr)
        offline = is_offline(run["source"], shards)
        shards = share(shards, arguments.shards)
        done = output.names()
        waiting = [shard for shard in shards if part_name(shard) not in done]
        device = "cuda" if arguments.gpus and torch.version.cuda else "cpu"
        export = str(arguments.export.absolute())
        job = Job(export, options, output.url, device, arguments.threads, offline)
        progress = Progress(shards, waiting)
        if waiting:
            for shard, summary in caption(arguments, job, waiting):
                progress.add(shard, summary)
        this_start = progress.close()
        figures = totals(output, shards, progress.summaries) | this_start
    if arguments.metrics:
        write_atomic(arguments.metrics, json.dumps(figures, indent=2) + "\n")
    print(f"{output.url}: {line(figures)}")
    sys.exit(1 if figures["errors"] or figures["shards_failed"] else 0)


if __name__ == "__main__":
    run_command(main)
