"""`python ready.py`: exit status 0 when all workers of the model are READY, 1 otherwise.

For probes. TorchServe's own `/ping` is no use: it says Healthy seconds before the first worker is
up, and while a worker fails over and over. Only the standard library, so that a probe costs little.
"""

import json
import sys
import urllib.request

MANAGEMENT = "http://127.0.0.1:8081"


def main(management: str = MANAGEMENT, model: str = "captioner") -> str | None:
    """None when ready, else the reason."""
    try:
        # The environment's proxy is not meant for this machine's own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{management}/models/{model}", timeout=3) as answer:
            [state] = json.load(answer)
        workers = [worker["status"] for worker in state["workers"]]
        wanted = max(1, state["minWorkers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no answer of the management API: {type(error).__name__}"
    if len(workers) < wanted or set(workers) != {"READY"}:
        return f"workers: {', '.join(workers) or 'none'}, {wanted} wanted"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
