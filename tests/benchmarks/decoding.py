"""`make bench`: milliseconds a photo, ours against Hugging Face's `generate`, on the same weights,
in the same run.

    python -m tests.benchmarks.decoding                all yardsticks, one after the other
    python -m tests.benchmarks.decoding yardstick      ViT-B/16 + GPT-2, random weights
    python -m tests.benchmarks.decoding blip git       BLIP base at 384 pixels, GIT base at 224
    python -m tests.benchmarks.decoding florence       Florence-2 base at 768
    python -m tests.benchmarks.decoding CHECKPOINT     one of ours, eager against its exports

A yardstick is built with transformers, imported by `training.import_huggingface` and exported by
`export.export`, so that what is timed is what a user runs. Its fp32 sequences are compared with
those of `generate` before anything is timed. Every caption has exactly --tokens tokens. Where an
export left a part in a finer precision to keep the captions, one that did not is timed as well. The
share of the encoder is told for one photo and for eight.
With --device cuda everything runs on a GPU; int8, which is for processors, is left out there.
"""

import argparse
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from export.export import described, export_checkpoint
from export.precision import in_precision
from export.torchscript import script_decoder, trace_encoder
from handler.captioner import Captioner, prepare_decoder, prepare_encoder
from tests.benchmarks.contenders import generate, images_of, load_theirs, ours
from tests.benchmarks.timing import machine, medians, peak_megabytes, report, table
from training.checkpoint import load_captioner, load_model
from training.weights.florence import TASKS

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


def florence(folder: Path) -> None:
    """A random Florence-2 base, 231 million parameters: the published fields where they are not
    the class's defaults, and a tokenizer to which the words of a task are a token each."""
    import transformers

    from tests.huggingface_models import florence_processor, set_florence_generation

    torch.manual_seed(0)
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 6), ("ffn_dim", 3072), ("attention_heads", 12))
    }
    processor = florence_processor(768, 577, list(TASKS.values()), 400)
    config = transformers.Florence2Config(
        vision_config={"projection_dim": 768},
        text_config={"vocab_size": 51289, "d_model": 768, **layers},
        image_token_id=processor.tokenizer.image_token_id,
    )
    model = transformers.Florence2ForConditionalGeneration(config).eval()
    set_florence_generation(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


YARDSTICKS = {"yardstick": vit_gpt2, "blip": blip, "git": git, "florence": florence}


class Setting(NamedTuple):
    """Photos at once, beams, and exactly so many tokens each, for a task if there are any."""

    photos: int
    beams: int
    tokens: int
    task: str | None = None


def settings_of(captioner: Captioner, tokens: int) -> list[Setting]:
    """Those that are timed: of a model with tasks a sentence and a paragraph."""
    if captioner.tokenizer.tasks:
        first, *_, last = captioner.tokenizer.tasks
        return [Setting(1, 3, tokens, first), Setting(1, 3, 5 * tokens, last)]
    return [Setting(photos, beams, tokens) for photos in (1, 8) for beams in (1, 3, 5)]


def prepare(name: str, precisions: Sequence[str]) -> tuple[Path | None, Path, dict[str, Path]]:
    """(Hugging Face's folder and the checkpoint, made where missing; its exports by precision, made
    anew where the code that they hold is newer)."""
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
    code = ("training/model.py", "training/davit.py", "handler/beam_search.py", "export/layers.py")
    newest = max(Path(file).stat().st_mtime for file in code)
    for precision, folder in exports.items():
        written = folder / "config.json"
        if not written.exists() or written.stat().st_mtime < newest:
            export_checkpoint(checkpoint, folder, precision)
    return theirs, checkpoint, exports


def throughout(precision: str, checkpoint: Path, like: Captioner, device: str) -> Captioner:
    """The captioner of an export that left nothing finer than `precision`."""
    model, _, _ = load_model(checkpoint)
    model = in_precision(model, precision, precision)
    scripts = []
    for script in (
        trace_encoder(model.encoder, model.encoder_config.image_size),
        script_decoder(model.decoder),
    ):
        written = io.BytesIO()
        torch.jit.save(script, written)
        scripts.append(torch.jit.load(io.BytesIO(written.getvalue()), device).eval())
    encoder = prepare_encoder(scripts[0], asdict(model.encoder_config), device)
    decoder = prepare_decoder(scripts[1], asdict(model.decoder_config), device)
    return Captioner(encoder, decoder, like.tokenizer, like.config, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        default=list(YARDSTICKS),
        help=f"{', '.join(YARDSTICKS)} or a checkpoint",
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
    tasks = captioners["eager"].tokenizer.tasks
    settings = settings_of(captioners["eager"], tokens)
    models = {}
    if theirs:
        models["generate"] = load_theirs(theirs, device)
        check_same(models["generate"], captioners, settings[0])
        models["generate, bf16"] = load_theirs(theirs, device, torch.bfloat16)

    rows, figures = [], []
    for setting in settings:
        photos, beams, length, task = setting
        images = images_of(photos, size)
        task_ids = tasks[task]["ids"] if task else ()
        contenders = {
            name: lambda m=model, i=images, s=setting, t=task_ids: generate(m, i, *s[1:3], t)
            for name, model in models.items()
        }
        contenders |= {
            name: lambda c=captioner, i=images, s=setting: ours(c, i, *s[1:])
            for name, captioner in captioners.items()
        }
        seconds = medians(contenders, rounds)
        first = next(iter(seconds.values()))
        for contender, value in seconds.items():
            rows.append([
                photos, beams, length, contender, f"{1000 * value:.{0 if value > 0.1 else 1}f}",
                f"{photos / value:.3g}", f"{first / value:.1f}",
            ])  # fmt: skip
            figures.append({**setting._asdict(), "contender": contender, "seconds": value})
    parts = "; ".join(described(captioners[name].config) for name in precisions)
    title = f"{checkpoint.name}, exactly so many tokens, {rounds} rounds. "
    title += f"{machine(device)}. Exports: {parts}"
    header = ("photos", "beams", "tokens", "contender", "ms", "photos/s", "times the first")
    suffix = checkpoint.name if device == "cpu" else f"{checkpoint.name}-{device}"
    report(f"decoding-{suffix}", f"{title}\n\n{table(header, rows)}\n", figures)
    report_encoders(captioners, figures, rounds, suffix)
    if not tasks:  # hours for one with photos of 768 pixels
        report_growth(captioners[precisions[-1]], precisions[-1], rounds, tokens, suffix)

    last = settings[-1]
    given = tuple(map(str, (size, last.tokens, last.beams, device)))
    asked = {"generate": ",".join(map(str, tasks[last.task]["ids"]))} if last.task else {}
    peaks = {}
    for name, folder in (({"generate": theirs} if theirs else {}) | exports).items():
        task = asked.get(name, last.task) or ""
        peaks[name] = peak_megabytes("tests.benchmarks.peak", name, str(folder), *given, task)
    rows = [[name, f"{value:.0f}"] for name, value in peaks.items()]
    header = ("contender", f"peak MB, one photo, {last.beams} beams, {last.tokens} tokens")
    report(f"memory-{suffix}", table(header, rows) + "\n", peaks)


def load_contenders(
    checkpoint: Path, exports: dict[str, Path], device: str
) -> dict[str, Captioner]:
    """The eager captioner and its exports, and of those that left a part in a finer precision one
    that did not."""
    captioners = {"eager": load_captioner(checkpoint, device)}
    captioners |= {p: Captioner.load(folder, device) for p, folder in exports.items()}
    for precision in exports:
        like = captioners[precision]
        if set(like.config["parts"].values()) != {precision}:
            name = f"{precision} throughout"
            captioners[name] = throughout(precision, checkpoint, like, device)
    return captioners


def check_same(model: Any, captioners: dict[str, Captioner], setting: Setting) -> None:
    """Two photos' sequences in float32 are those of `generate`."""
    photos, tokenizer = (
        images_of(2, captioners["eager"].preprocessing.image_size),
        captioners["eager"].tokenizer,
    )
    task_ids = tokenizer.tasks[setting.task]["ids"] if setting.task else ()
    found = generate(model, photos, 5, setting.tokens, task_ids).tolist()
    # A forced end is no part of a caption.
    last = -1 if tokenizer.forces_end else None
    expected = [row[len(tokenizer.opening) : last] for row in found]
    for same in ("eager", "fp32"):
        captions = ours(captioners[same], photos, 5, setting.tokens, setting.task)
        assert [best[0].ids for best in captions] == expected, f"{same}: not generate's sequences"


def report_encoders(
    captioners: dict[str, Captioner], figures: list[dict[str, Any]], rounds: int, suffix: str
) -> None:
    """What of the time of the longest search of as many photos is the encoder's."""
    rows = []
    for photos in dict.fromkeys(f["photos"] for f in figures):
        images = images_of(photos, captioners["eager"].preprocessing.image_size)
        runs = {name: lambda c=c, i=images: c.encode(i) for name, c in captioners.items()}
        last = {f["contender"]: f for f in figures if f["photos"] == photos}
        for name, value in medians(runs, rounds).items():
            of = last[name]
            rows.append([
                photos, of["beams"], of["tokens"], name, f"{1000 * value:.0f}",
                f"{value / of['seconds']:.0%}",
            ])  # fmt: skip
    header = ("photos", "beams", "tokens", "contender", "encoder, ms", "of the caption")
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
