"""`make bench`: milliseconds a photo, ours against Hugging Face's `generate`, on the same weights,
in the same run.

    python -m tests.benchmarks.decoding yardstick      ViT-B/16 + GPT-2, random weights
    python -m tests.benchmarks.decoding CHECKPOINT     one of ours, eager against its exports

The yardstick is built with transformers, imported by `training.import_huggingface` and exported by
`export.export`, so that what is timed is what a user runs. Its fp32 sequences are compared with
those of `generate` before anything is timed. Every caption has exactly --tokens tokens. Where an
export left its encoder in float32 to keep the captions, its decoder behind an encoder in bfloat16
is timed as well. With --device cuda everything runs on a GPU; int8, which is for processors, is
left out there, and `generate` runs in bfloat16 as well.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from export.export import described, export_checkpoint
from export.precision import in_precision
from export.torchscript import trace_encoder
from handler.captioner import Captioner, prepare_script
from handler.cuda_graphs import GraphedEncoder
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import machine, medians, peak_megabytes, report, table
from training.checkpoint import load_captioner, load_model

ROOT = Path("build/bench")
PRECISIONS = ("fp32", "bf16", "int8")


def build_yardstick(folder: Path) -> None:
    """A random ViT-B/16 + GPT-2 of 239 million parameters, as `save_pretrained` writes it."""
    import transformers

    from tests.huggingface_models import tiny_tokenizer

    torch.manual_seed(0)
    text = transformers.GPT2Config(add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), text
    )
    model = transformers.VisionEncoderDecoderModel(config).eval()
    end = text.eos_token_id
    model.generation_config.decoder_start_token_id = end
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformers.ViTImageProcessorPil().save_pretrained(folder)


def prepare(name: str, precisions: Sequence[str]) -> tuple[Path | None, Path, dict[str, Path]]:
    """(Hugging Face's folder and the checkpoint, made where missing; its exports by precision, made
    anew, since they hold code as well)."""
    theirs = None
    checkpoint = Path(name)
    if name == "yardstick":
        from training.weights.huggingface import import_huggingface

        theirs, checkpoint = ROOT / "yardstick-huggingface", ROOT / "yardstick"
        if not theirs.exists():
            build_yardstick(theirs)
        if not checkpoint.exists():
            import_huggingface(str(theirs), checkpoint)
    exports = {p: ROOT / f"{checkpoint.name}-{p}" for p in precisions}
    for precision, folder in exports.items():
        export_checkpoint(checkpoint, folder, precision)
    return theirs, checkpoint, exports


def bf16_encoder(checkpoint: Path, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The checkpoint's encoder in bfloat16, as an export would have it."""
    model, _, _ = load_model(checkpoint)
    traced = trace_encoder(
        in_precision(model, "bf16", "fp32").encoder, model.encoder_config.image_size
    )
    script = prepare_script(traced.to(device), device)
    return script if device == "cpu" else GraphedEncoder(script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="yardstick", help="yardstick or a checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    device, tokens = arguments.device, arguments.tokens
    precisions = PRECISIONS if device == "cpu" else ("fp32", "bf16")
    theirs, checkpoint, exports = prepare(arguments.model, precisions)

    captioners = {"eager": load_captioner(checkpoint, device)}
    captioners |= {p: Captioner.load(folder, device) for p, folder in exports.items()}
    plain = [p for p in precisions[1:] if captioners[p].config["parts"]["encoder"] == "fp32"]
    if plain:
        encoder = bf16_encoder(checkpoint, device)
        for precision in plain:
            like = captioners[precision]
            captioners[f"{precision}, encoder bf16"] = Captioner(
                encoder, like.decoder, like.tokenizer, like.config, device
            )
    size = captioners["eager"].preprocessing.image_size
    models = {"generate": load_theirs(theirs, device)} if theirs else {}
    if theirs:
        images = images_of(2, size)
        expected = generate(models["generate"], images, 5, tokens)[:, 1:].tolist()
        for name in ("eager", "fp32"):
            found = [best[0].ids for best in ours(captioners[name], images, 5, tokens)]
            assert found == expected, f"{name} does not give the sequences of generate"
    if theirs and device == "cuda":
        models["generate, bf16"] = load_theirs(theirs, device, torch.bfloat16)

    rows, figures = [], []
    for photos, beams in ((1, 1), (1, 5), (8, 1), (8, 5)):
        images = images_of(photos, size)
        contenders = {
            name: lambda m=model, i=images, b=beams: generate(m, i, b, tokens)
            for name, model in models.items()
        }
        contenders |= {
            name: lambda c=captioner, i=images, b=beams: ours(c, i, b, tokens)
            for name, captioner in captioners.items()
        }
        seconds = medians(contenders, arguments.rounds)
        first = next(iter(seconds.values()))
        for name, value in seconds.items():
            rows.append([
                photos, beams, name, f"{1000 * value:.{0 if value > 0.1 else 1}f}",
                f"{photos / value:.3g}", f"{first / value:.1f}",
            ])  # fmt: skip
            figures.append({"photos": photos, "beams": beams, "contender": name, "seconds": value})
    parts = "; ".join(described(captioners[name].config) for name in precisions)
    title = f"{checkpoint.name}, exactly {tokens} tokens, {arguments.rounds} rounds. "
    title += f"{machine(device)}. Exports: {parts}"
    header = ("photos", "beams", "contender", "ms", "photos/s", "times the first")
    suffix = checkpoint.name if device == "cpu" else f"{checkpoint.name}-{device}"
    report(f"decoding-{suffix}", f"{title}\n\n{table(header, rows)}\n", figures)

    growth = {}
    fastest = captioners[precisions[-1]]
    for what, settings in {
        "beams": [(1, b, tokens) for b in (1, 2, 3, 5, 8)],
        "photos": [(p, 5, tokens) for p in (1, 2, 4, 8, 16)],
        "tokens": [(1, 5, t) for t in (5, 10, 15, 20, 25) if t < fastest.decoder.max_positions],
    }.items():
        runs = {
            str(setting): lambda s=setting: ours(fastest, images_of(s[0], size), s[1], s[2])
            for setting in settings
        }
        growth[what] = {k: 1000 * v for k, v in medians(runs, arguments.rounds).items()}
    rows = [[what, k, f"{v:.3g}"] for what, values in growth.items() for k, v in values.items()]
    header = ("grows with", "(photos, beams, tokens)", f"ms, {precisions[-1]}")
    report(f"growth-{suffix}", table(header, rows) + "\n", growth)

    peaks = {
        name: peak_megabytes("tests.benchmarks.peak", name, str(folder), str(tokens), device)
        for name, folder in (({"generate": theirs} if theirs else {}) | exports).items()
    }
    rows = [[name, f"{value:.0f}"] for name, value in peaks.items()]
    header = ("contender", "peak MB, one photo, 5 beams")
    report(f"memory-{suffix}", table(header, rows) + "\n", peaks)


if __name__ == "__main__":
    main()
