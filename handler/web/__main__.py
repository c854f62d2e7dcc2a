"""`python -m handler.web`, behind `make web`: a demo page for the running TorchServe."""

from handler.client.connection import add_server_options, client_of
from handler.errors import ArgumentParser, run_command
from handler.web.server import PORT, serve_page


def main() -> None:
    parser = ArgumentParser(prog="handler.web", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}")
    add_server_options(parser)
    arguments = parser.parse_args()
    serve_page(client_of(arguments), arguments.port)


if __name__ == "__main__":
    run_command(main)
