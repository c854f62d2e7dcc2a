"""ONNX Runtime through Optimum, in a process of its own, for `decoding.py`.

    .venv-bench/bin/python tests/benchmarks/onnx_runtime.py FOLDER fp32|int8 [--export]

FOLDER is what `save_pretrained` wrote. With --export its ONNX files are made beside it, and nothing
else is done. Otherwise it reads lines "photos beams tokens" from standard input, captions as many
random images, and answers each line with "done".
"""

import sys
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForVision2Seq

FILES = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def export(folder: Path) -> None:
    plain, small = (folder.with_name(f"{folder.name}-onnx-{p}") for p in ("fp32", "int8"))
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


def main() -> None:
    folder, precision = Path(sys.argv[1]), sys.argv[2]
    if "--export" in sys.argv:
        export(folder)
        return
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    model = ORTModelForVision2Seq.from_pretrained(
        folder.with_name(f"{folder.name}-onnx-{precision}"),
        use_cache=True, use_merged=False, session_options=settings,
    )  # fmt: skip
    print("ready", flush=True)
    for line in sys.stdin:
        photos, beams, tokens = map(int, line.split())
        images = torch.randn(photos, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        model.generate(
            pixel_values=images, num_beams=beams, do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
        print("done", flush=True)


if __name__ == "__main__":
    main()
