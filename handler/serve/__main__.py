"""`python -m handler.serve start|stop`, behind `make serve` and `make stop`."""

from pathlib import Path

from handler.errors import ArgumentParser, run_command
from handler.serve.server import start, stop


def main() -> None:
    parser = ArgumentParser(prog="handler.serve", description=__doc__)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--ts-config", type=Path, default=Path("config.properties"))
    parser.add_argument(
        "--tls",
        action="store_true",
        help="serve HTTPS, and gRPC over TLS, with a self-signed certificate",
    )
    arguments = parser.parse_args()
    if arguments.action == "stop":
        print("stopped" if stop() else "no server is running here")
        return
    server = start(arguments.ts_config, arguments.tls)
    print(f"ready: {server.inference} and gRPC on {server.grpc}; its logs are in logs/")


if __name__ == "__main__":
    run_command(main)
