"""`make bench`: milliseconds a photo, ours against Hugging Face's `generate`, on the same weights,
in the same run.

    python -m tests.benchmarks.decoding                all yardsticks, one after the other
    python -m tests.benchmarks.decoding yardstick      ViT-B/16 + GPT-2, random weights
    python -m tests.benchmarks.decoding blip git       BLIP base at 384 pixels, GIT base at 224
    python -m tests.benchmarks.decoding CHECKPOINT     one of ours, eager against its exports

A yardstick is built with transformers, imported by `training.import_huggingface` and exported by
`export.export`, so that what is timed is what a user runs. Its fp32 sequences are compared with
those of `generate` before anything is timed. Every caption has exactly --tokens tokens. Where an
export left its encoder in a finer precision to keep the captions, its decoder behind an encoder in
its own precision is timed as well. The share of the encoder is told for one photo and for eight.
With --device cuda everything runs on a GPU; int8, which is for processors, is left out there.
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


def vit_gpt2(folder: Path) -> None:
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


def blip(folder: Path) -> None:
    """A random BLIP base at 384 pixels, 224 million parameters: the published fields where they
    are not the class's defaults."""
    import transformers

    from tests.huggingface_models import tiny_bert_tokenizer

    torch.manual_seed(0)
    config = transformers.BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": 384}
    )
    transformers.BlipForConditionalGeneration(config).eval().save_pretrained(folder)
    processor = transformers.BlipImageProcessorPil(size={"height": 384, "width": 384})
    transformers.BlipProcessor(processor, tiny_bert_tokenizer()).save_pretrained(folder)


def git(folder: Path) -> None:
    """A random GIT base at 224 pixels, 177 million parameters: the class's defaults."""
    import transformers

    from tests.huggingface_models import tiny_bert_tokenizer

    torch.manual_seed(0)
    transformers.GitForCausalLM(transformers.GitConfig()).eval().save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil()
    transformers.GitProcessor(processor, tiny_bert_tokenizer()).save_pretrained(folder)


YARDSTICKS = {"yardstick": vit_gpt2, "blip": blip, "git": git}


def prepare(name: str, precisions: Sequence[str]) -> tuple[Path | None, Path, dict[str, Path]]:
    """(Hugging Face's folder and the checkpoint, made where missing; its exports by precision, made
    anew, since they hold code as well)."""
    theirs = None
    checkpoint = Path(name)
    if name in YARDSTICKS:
        from training.weights.huggingface import import_huggingface

        theirs, checkpoint = ROOT / f"{name}-huggingface", ROOT / name
        if not theirs.exists():
            YARDSTICKS[name](theirs)
        if not checkpoint.exists():
            import_huggingface(str(theirs), checkpoint)
    exports = {p: ROOT / f"{checkpoint.name}-{p}" for p in precisions}
    for precision, folder in exports.items():
        export_checkpoint(checkpoint, folder, precision)
    return theirs, checkpoint, exports


def encoder_in(
    precision: str, checkpoint: Path, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The checkpoint's encoder, as an export would have it that left none of it finer."""
    model, _, _ = load_model(checkpoint)
    traced = trace_encoder(
        in_precision(model, precision, "fp32").encoder, model.encoder_config.image_size
    )
    script = prepare_script(traced.to(device), device)
    return script if device == "cpu" else GraphedEncoder(script)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=list(YARDSTICKS), help="yardstick, blip, git or a checkpoint"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    for name in arguments.models:
        measure(name, arguments.device, arguments.rounds, arguments.tokens)


def measure(name: str, device: str, rounds: int, tokens: int) -> None:
    """Prints and writes the tables of one model."""
    precisions = PRECISIONS if device == "cpu" else ("fp32", "bf16")
    theirs, checkpoint, exports = prepare(name, precisions)
    captioners = load_contenders(checkpoint, exports, device)
    size = captioners["eager"].preprocessing.image_size
    models = {}
    if theirs:
        models["generate"] = load_theirs(theirs, device)
        images = images_of(2, size)
        expected = generate(models["generate"], images, 5, tokens)[:, 1:].tolist()
        for same in ("eager", "fp32"):
            found = [best[0].ids for best in ours(captioners[same], images, 5, tokens)]
            assert found == expected, f"{same} does not give the sequences of generate"
        models["generate, bf16"] = load_theirs(theirs, device, torch.bfloat16)

    rows, figures = [], []
    for photos, beams in ((p, b) for p in (1, 8) for b in (1, 3, 5)):
        images = images_of(photos, size)
        contenders = {
            name: lambda m=model, i=images, b=beams: generate(m, i, b, tokens)
            for name, model in models.items()
        }
        contenders |= {
            name: lambda c=captioner, i=images, b=beams: ours(c, i, b, tokens)
            for name, captioner in captioners.items()
        }
        seconds = medians(contenders, rounds)
        first = next(iter(seconds.values()))
        for contender, value in seconds.items():
            rows.append([
                photos, beams, contender, f"{1000 * value:.{0 if value > 0.1 else 1}f}",
                f"{photos / value:.3g}", f"{first / value:.1f}",
            ])  # fmt: skip
            figure = {"photos": photos, "beams": beams, "contender": contender, "seconds": value}
            figures.append(figure)
    parts = "; ".join(described(captioners[name].config) for name in precisions)
    title = f"{checkpoint.name}, exactly {tokens} tokens, {rounds} rounds. "
    title += f"{machine(device)}. Exports: {parts}"
    header = ("photos", "beams", "contender", "ms", "photos/s", "times the first")
    suffix = checkpoint.name if device == "cpu" else f"{checkpoint.name}-{device}"
    report(f"decoding-{suffix}", f"{title}\n\n{table(header, rows)}\n", figures)
    report_encoders(captioners, figures, rounds, suffix)
    report_growth(captioners[precisions[-1]], precisions[-1], rounds, tokens, suffix)

    peaks = {
        name: peak_megabytes(
            "tests.benchmarks.peak", name, str(folder), str(size), str(tokens), device
        )
        for name, folder in (({"generate": theirs} if theirs else {}) | exports).items()
    }
    rows = [[name, f"{value:.0f}"] for name, value in peaks.items()]
    header = ("contender", "peak MB, one photo, 5 beams")
    report(f"memory-{suffix}", table(header, rows) + "\n", peaks)


def load_contenders(
    checkpoint: Path, exports: dict[str, Path], device: str
) -> dict[str, Captioner]:
    """The eager captioner and its exports, and of those that left the encoder in a finer precision
    one that did not."""
    captioners = {"eager": load_captioner(checkpoint, device)}
    captioners |= {p: Captioner.load(folder, device) for p, folder in exports.items()}
    for precision in exports:
        like = captioners[precision]
        if precision != "fp32" and like.config["parts"]["encoder"] != precision:
            encoder = encoder_in(precision, checkpoint, device)
            captioners[f"{precision}, encoder {precision}"] = Captioner(
                encoder, like.decoder, like.tokenizer, like.config, device
            )
    return captioners


def report_encoders(
    captioners: dict[str, Captioner], figures: list[dict[str, object]], rounds: int, suffix: str
) -> None:
    """What of the time with 5 beams is the encoder's."""
    rows = []
    for photos in (1, 8):
        images = images_of(photos, captioners["eager"].preprocessing.image_size)
        runs = {name: lambda c=c, i=images: c.encode(i) for name, c in captioners.items()}
        whole = {
            f["contender"]: f["seconds"]
            for f in figures
            if (f["photos"], f["beams"]) == (photos, 5)
        }
        for name, value in medians(runs, rounds).items():
            rows.append([photos, name, f"{1000 * value:.0f}", f"{value / whole[name]:.0%}"])
    header = ("photos", "contender", "encoder, ms", "of the caption with 5 beams")
    report(f"encoder-{suffix}", table(header, rows) + "\n", rows)


def report_growth(
    captioner: Captioner, precision: str, rounds: int, tokens: int, suffix: str
) -> None:
    """How the time grows with beams, photos and tokens."""
    size = captioner.preprocessing.image_size
    growth = {}
    for what, settings in {
        "beams": [(1, b, tokens) for b in (1, 2, 3, 5, 8)],
        "photos": [(p, 5, tokens) for p in (1, 2, 4, 8, 16)],
        "tokens": [(1, 5, t) for t in (5, 10, 15, 20, 25) if t < captioner.decoder.max_positions],
    }.items():
        runs = {
            str(setting): lambda s=setting: ours(captioner, images_of(s[0], size), s[1], s[2])
            for setting in settings
        }
        growth[what] = {k: 1000 * v for k, v in medians(runs, rounds).items()}
    rows = [[what, k, f"{v:.3g}"] for what, values in growth.items() for k, v in values.items()]
    header = ("grows with", "(photos, beams, tokens)", f"ms, {precision}")
    report(f"growth-{suffix}", table(header, rows) + "\n", growth)


if __name__ == "__main__":
    main()
