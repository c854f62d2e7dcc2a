"""`python -m handler.batch.reaper SESSION`, which `handler.batch.pool` starts: waits until the
driver has ended, for whatever reason, and kills what is left of its Ray, whose processes write
their logs into the folder SESSION. Ray's own agents would stay for a minute."""

import sys
from contextlib import suppress

import psutil

if __name__ == "__main__":
    sys.stdin.read()  # a pipe that the driver alone holds open
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path.startswith(f"{sys.argv[1]}/") for file in process.open_files()):
                process.kill()
