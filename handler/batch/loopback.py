"""`python -m handler.batch.loopback ARGUMENTS`: runs `python -m handler.batch ARGUMENTS` in a new
network namespace. Only `handler.batch.namespace.restart` starts it."""

import os
import sys

from handler.batch.namespace import enter

if __name__ == "__main__":
    enter()
    os.execv(sys.executable, [sys.executable, "-m", "handler.batch", *sys.argv[1:]])
