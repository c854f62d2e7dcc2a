"""Generates the Python modules of the gRPC client from inference.proto, under build/grpc/.

They are generated at set-up and not committed, because generated code needs a protobuf that is not
older than its generator.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from handler.errors import UserError

PROTO = Path(__file__).with_name("inference.proto")
STUBS = Path(__file__).parents[2] / "build" / "grpc"


def generate(out: Path = STUBS) -> None:
    """Writes `inference_pb2.py` and `inference_pb2_grpc.py`."""
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise UserError("grpcio-tools is not installed; run make setup") from error
    out.mkdir(parents=True, exist_ok=True)
    # grpc_tools contains google/protobuf/*.proto.
    included = Path(protoc.__file__).parent / "_proto"
    command = ["protoc", f"-I{PROTO.parent}", f"-I{included}", f"--python_out={out}"]
    if protoc.main([*command, f"--grpc_python_out={out}", PROTO.name]):
        raise UserError(f"{PROTO}: protoc cannot compile it")


def load() -> tuple[ModuleType, ModuleType]:
    """The modules `inference_pb2` and `inference_pb2_grpc`, generated if they are missing."""
    if not (STUBS / "inference_pb2_grpc.py").is_file():
        generate()
    if str(STUBS) not in sys.path:
        # The generated modules import each other by their bare names.
        sys.path.append(str(STUBS))
    return importlib.import_module("inference_pb2"), importlib.import_module("inference_pb2_grpc")
