"""Errors for users: one line and exit status 2 instead of a traceback."""

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

# Errors of the system that the user can fix: no space, quota, read-only, permission, ...
NOT_OURS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE),
    errno.ELOOP,
)

INTERRUPT = signal.default_int_handler


class UserError(ValueError):
    """An error in the user's input. The message is one line that names the file and the field, and
    says what to do."""


class InvalidImage(UserError):
    """The content starts like a photo of a supported format but cannot be decoded."""


class UnsupportedMediaType(InvalidImage):
    """The content does not start like a photo of any supported format."""


class ImageTooLarge(InvalidImage):
    """The photo has more bytes or more pixels than the limit."""


class ImageTooComplex(InvalidImage):
    """Decoding the photo would take more time or memory than the limit for its size."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to errors about its fields."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line on standard error, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.prog}: {message} (--help lists the options)\n")


def end_on_interrupt() -> None:
    """Makes Ctrl-C end a command of this project (`python -m`) with one line and status 130 while
    its modules are imported, which takes seconds. A KeyboardInterrupt in an import would print a
    traceback, or a library would treat it as a missing dependency."""
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
    """Runs the `main` of a command; a `UserError` becomes one line and exit status 2."""
    imported = signal.getsignal(signal.SIGINT) is _end
    if imported:
        signal.signal(signal.SIGINT, INTERRUPT)
    try:
        run_main(main)
    finally:
        if imported:  # no traceback for Ctrl-C while the interpreter shuts down
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
        # The reader of our output (`| head`) has ended, which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # A traceback would not help with a full disk or a missing permission.
        if error.errno not in NOT_OURS:
            raise
        path = error.filename2 or error.filename  # the second one is the destination
        name = f"{path}: " if path else ""
        print(f"error: {name}{error.strerror}; what existed before is unchanged", file=sys.stderr)
        sys.exit(2)
