"""What a person sees when input is bad: one line and exit status 2, never a traceback."""

import argparse
import errno
import os
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


def run_command(main: Callable[[], None]) -> None:
    """Runs a program's `main`; a `UserError` becomes one line and exit status 2."""
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
