"""gRPC stubs of `inference.proto`, generated into `build/grpc` at set-up: generated code must not be
newer than the protobuf runtime that it runs on."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from handler.errors import UserError, run_command

PROTO = Path(__file__).with_name("inference.proto")
STUBS = Path(__file__).parent.parent / "build" / "grpc"


def generate() -> None:
    """Writes `inference_pb2.py` and `inference_pb2_grpc.py` into `build/grpc`."""
    from grpc_tools import protoc

    STUBS.mkdir(parents=True, exist_ok=True)
    where = [f"-I{PROTO.parent}", f"--python_out={STUBS}", f"--grpc_python_out={STUBS}"]
    if protoc.main(["protoc", *where, str(PROTO)]):
        raise UserError(f"{PROTO}: protoc failed; run make setup again")


def load() -> tuple[ModuleType, ModuleType]:
    """The modules (messages, stubs), generated first where they are missing."""
    if not (STUBS / "inference_pb2_grpc.py").exists():
        generate()
    if str(STUBS) not in sys.path:
        sys.path.append(str(STUBS))
    messages = importlib.import_module("inference_pb2")
    return messages, importlib.import_module("inference_pb2_grpc")


if __name__ == "__main__":
    run_command(generate)
