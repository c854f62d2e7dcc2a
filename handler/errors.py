"""What a person sees when input is bad: one line and exit status 2, never a traceback."""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# Errors of the machine that the user can mend: no space, quota, read-only, permission, ...
NOT_OURS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ELOOP),
)

INTERRUPT = signal.default_int_handler


class UserError(ValueError):
    """A mistake in what the user gave: the message is one line that names the file, the field
    and the way out."""


class InvalidImage(UserError):
    """It starts like a photo of a known format but cannot be decoded."""


class UnsupportedMediaType(InvalidImage):
    """It is not of a known format at all."""


class ImageTooLarge(InvalidImage):
    """More bytes or more pixels than are taken."""


class ImageTooComplex(InvalidImage):
    """Decoding it would take more time or memory than a photo of its size may take."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about fields begin with the file that the fields are from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but an error is one line on standard error and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.prog}: {message} (--help lists the options)\n")


def end_on_interrupt() -> None:
    """Where Python runs one of this project's commands (`python -m`): until its `main` begins,
    Ctrl-C ends it with one line and status 130. Its imports take seconds, and an exception raised
    within them is a traceback, or is taken by a library for something that is not installed."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    ours = module.split(".")[0] in ("handler", "training", "export")
    if ours and signal.getsignal(signal.SIGINT) is INTERRUPT:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(130)


def run_command(main: Callable[[], None]) -> None:
    """Runs a program's `main`; a `UserError` becomes one line and exit status 2."""
    imported = signal.getsignal(signal.SIGINT) is _end
    if imported:
        signal.signal(signal.SIGINT, INTERRUPT)
    try:
        run_main(main)
    finally:
        if imported:  # what is still to be ended is worth no traceback
            signal.signal(signal.SIGINT, _end)


def run_main(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"error: {error}" if str(error) else "error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # A full disk, a folder without permission: nothing that a traceback would explain.
        if error.errno not in NOT_OURS:
            raise
        path = error.filename2 or error.filename  # of two, the one that was to be written
        name = f"{path}: " if path else ""
        print(f"error: {name}{error.strerror}; what existed before is unchanged", file=sys.stderr)
        sys.exit(2)
