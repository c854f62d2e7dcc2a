"""Compiles `native_blocks.c`, and has its structures.

It is compiled with the system's C compiler (`CC`, by default `cc`) when it is first needed, which
takes three seconds, and kept in `__pycache__` beside this file, as Python keeps its own compiled
files. It is for x86 processors with AVX-512 and its VNNI instructions.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native_blocks.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")

SECONDS = 60  # that a compiler may take

NUMBER, ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Linear(ctypes.Structure):
    """y = activation(x W' * scale + bias)."""

    _fields_ = (
        *((name, ADDRESS) for name in ("weight", "scale", "offset", "bias")),
        *((name, NUMBER) for name in ("kind", "inputs", "outputs", "activation")),
    )


class Norm(ctypes.Structure):
    """A layer norm; nothing if its addresses are 0."""

    _fields_ = (("weight", ADDRESS), ("bias", ADDRESS), ("eps", ctypes.c_double))


class Block(ctypes.Structure):
    """Self-attention, cross-attention, MLP, each with a norm before and one after."""

    _fields_ = (
        *((name, Norm * 3) for name in ("before", "after")),
        *((name, Linear) for name in ("qkv", "out", "cross_q", "cross_out", "up", "down")),
    )


class Run(ctypes.Structure):
    """The arguments of `run_blocks`."""

    _fields_ = (
        ("blocks", ADDRESS),
        *(
            (name, NUMBER)
            for name in (
                *("layers", "photos", "queries", "width", "heads", "hidden", "threads"),
                *("tokens", "places", "bfloat16", "prefix", "image", "used", "slots"),
            )
        ),
        ("mask", ADDRESS),
        *((name, NUMBER) for name in ("mask_photo", "mask_query")),
        *(
            (name, ADDRESS)
            for name in (
                *("photo_keys", "photo_values", "cache_keys", "cache_values"),
                *("weights", "x", "scratch"),
            )
        ),
    )


# Outputs that stand together in a packed weight; a photo has room for a multiple of so many keys.
PANEL, PLACES = 32, 32
# The arguments and the result of each function.
FUNCTIONS = {
    "layout": ([NUMBER], NUMBER),
    "use_large_pages": ([ADDRESS, NUMBER], None),
    "packed_bytes": ([NUMBER, NUMBER, NUMBER], NUMBER),
    "pack": ([NUMBER, NUMBER, NUMBER, ADDRESS, ADDRESS], None),
    "scratch_bytes": ([ADDRESS], NUMBER),
    "linear_scratch_bytes": ([ADDRESS, NUMBER], NUMBER),
    "run_blocks": ([ADDRESS], None),
    "run_linear": ([ADDRESS, ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER], None),
    "rescore": (
        [ADDRESS, NUMBER, NUMBER, NUMBER, ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER],
        None,
    ),
}


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The compiled functions; None on other processors and without a compiler."""
    capabilities = torch.cpu.get_capabilities()
    if not all(capabilities.get(name) for name in NEEDED):
        return None
    try:
        command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS]
        features = sorted(name for name, has in capabilities.items() if has is True)
        key = "\n".join([SOURCE.read_text(), *command, *features])
        name = f"{SOURCE.stem}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        kept = SOURCE.parent / "__pycache__" / name
        with suppress(OSError):  # missing, or damaged: made again
            return _declared(kept)
        return _compiled(command, kept)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or b""
        reason = stderr.decode(errors="replace").strip() or str(error)
        log.warning(
            "captions take up to twice as long without compiled blocks: %s; install a C compiler "
            "(gcc), or name one with CC, and let it write programs to a temporary folder",
            reason.splitlines()[0],
        )
        return None


def _compiled(command: list[str], kept: Path) -> ctypes.CDLL:
    """Compiles to `kept`, for the next process as well, or where that is not possible for this one
    alone."""
    with suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            # Renamed, so that it is never seen incomplete.
            return _declared(_built(command, folder).replace(kept))
    with tempfile.TemporaryDirectory() as folder:
        return _declared(_built(command, folder))


def _built(command: list[str], folder: str) -> Path:
    out = Path(folder) / "native_blocks.so"
    subprocess.run(
        [*command, str(SOURCE), "-o", str(out)],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
    )
    return out


def _declared(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    layout = [library.layout(which) for which in range(4)]
    assert layout == [ctypes.sizeof(Block), ctypes.sizeof(Run), PLACES, PANEL], layout
    return library
