"""ONNX Runtime or OpenVINO through Optimum, in a process of its own, for `decoding.py`.

    .venv-bench/bin/python tests/benchmarks/optimum_runtimes.py RUNTIME FOLDER fp32|int8 [--export]

FOLDER is what `save_pretrained` wrote. With --export the runtime's files are made beside it, and
nothing else is done. Otherwise it reads lines "photos beams tokens" from standard input, captions
as many random images, up to 8, and answers each line with "done". ONNX Runtime's int8 is of weights
and activations, OpenVINO's of weights alone, as Optimum offers it.

OpenVINO runs without a cache of keys and values: with one, optimum-intel 1.27 exports a decoder
that openvino 2026.4 stops at in the first step ("shape inference of Add failed"), stateful or not.
"""

import sys
from pathlib import Path

import torch

FILES = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def export_onnx(folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.exporters.onnx import main_export

    plain, small = (made(folder, "ONNX Runtime", precision) for precision in ("fp32", "int8"))
    if not plain.exists():
        main_export(
            str(folder), plain, task="image-to-text-with-past", no_post_process=True,
            do_validation=False,
        )  # fmt: skip
    if not small.exists():
        small.mkdir()
        for file in plain.iterdir():
            if file.suffix in (".json", ".txt"):
                (small / file.name).write_bytes(file.read_bytes())
        for name in FILES:
            # A scale for each output channel, as ours has.
            quantize_dynamic(
                plain / name, small / name, per_channel=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip


def load_onnx(folder: Path, precision: str):
    import onnxruntime
    from optimum.onnxruntime import ORTModelForVision2Seq

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return ORTModelForVision2Seq.from_pretrained(
        made(folder, "ONNX Runtime", precision),
        use_cache=True, use_merged=False, session_options=settings,
    )  # fmt: skip


def export_openvino(folder: Path) -> None:
    from optimum.intel import OVModelForVision2Seq

    for precision in ("fp32", "int8"):
        out = made(folder, "OpenVINO", precision)
        if not out.exists():
            OVModelForVision2Seq.from_pretrained(
                folder, export=True, compile=False, use_cache=False,
                load_in_8bit=precision == "int8",
            ).save_pretrained(out)  # fmt: skip


def load_openvino(folder: Path, precision: str):
    from optimum.intel import OVModelForVision2Seq

    # As it stands it would compute in bfloat16 where the processor can.
    exact = {"INFERENCE_PRECISION_HINT": "f32"} if precision == "fp32" else {}
    return OVModelForVision2Seq.from_pretrained(
        made(folder, "OpenVINO", precision),
        use_cache=False, ov_config={"INFERENCE_NUM_THREADS": torch.get_num_threads(), **exact},
    )  # fmt: skip


def made(folder: Path, runtime: str, precision: str) -> Path:
    """Where a runtime's files are."""
    return folder.with_name(f"{folder.name}-{runtime.split()[0].lower()}-{precision}")


RUNTIMES = {
    "ONNX Runtime": (export_onnx, load_onnx),
    "OpenVINO": (export_openvino, load_openvino),
}


def main() -> None:
    runtime, folder, precision = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    export, load = RUNTIMES[runtime]
    if "--export" in sys.argv:
        export(folder)
        return
    model = load(folder, precision)
    print("ready", flush=True)
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for line in sys.stdin:
        photos, beams, tokens = map(int, line.split())
        model.generate(
            pixel_values=images[:photos], num_beams=beams, do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
        print("done", flush=True)


if __name__ == "__main__":
    main()
