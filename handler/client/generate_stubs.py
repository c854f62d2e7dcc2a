"""`python -m handler.client.generate_stubs`, a step of `make setup`: writes build/grpc/."""

from handler.client.stubs import generate
from handler.errors import run_command

if __name__ == "__main__":
    run_command(generate)
