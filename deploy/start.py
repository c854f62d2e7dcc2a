"""The container's first process: TorchServe's own launcher, which waits for Java, and ends with it
on SIGTERM. The system delivers no signal to a first process that does not handle it, so
`docker stop` and the end of a pod would wait for their whole grace period and then kill Java.
"""

import signal
import sys
from typing import Any

import psutil
from ts.model_server import start


def end(*_: Any) -> None:
    children = psutil.Process().children()
    for java in children:
        java.terminate()
    if not children:  # Java is not started yet
        sys.exit(128 + signal.SIGTERM)


signal.signal(signal.SIGTERM, end)
start()
