"""`python -m handler.batch.reaper SESSION`, which `handler.batch.pool` starts: waits until the
driver ends for any reason, then kills the remaining processes of its Ray, which are those with open
files (logs) in the folder SESSION. Ray's own agents would otherwise run for another minute."""

import sys
from contextlib import suppress

import psutil

if __name__ == "__main__":
    sys.stdin.read()  # returns when the driver ends: only the driver holds the pipe open
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path.startswith(f"{sys.argv[1]}/") for file in process.open_files()):
                process.kill()
