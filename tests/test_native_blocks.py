"""The blocks in C: equal to the script's and the eager model's up to rounding, whatever the family,
the shape and the precision; and their place taken by TorchScript where they cannot be had."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from export.layers import Int8Linear, PackedLinear
from export.precision import in_precision
from export.torchscript import script_decoder, trace_encoder
from handler import native_library as library_module
from handler.captioner import Captioner, prepare_script
from handler.native_blocks import (
    NativeDecoder,
    NativeEncoder,
    _Weights,
    native_decoder,
    native_encoder,
)
from handler.native_library import native_library
from training.model import CaptioningModel, DecoderConfig, EncoderConfig

needs_native = pytest.mark.skipif(
    native_library() is None, reason="no AVX-512 with VNNI here, or no C compiler"
)
PRECISIONS = ("fp32", "bf16", "int8")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES = {
    "gpt2": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "bert": {"norm": "post", "embedding_norm": True, "head_bias": True, "head_transform": True},
    "git": {
        "norm": "post",
        "memory": "prefix",
        "embedding_norm": True,
        "tied_head": False,
        "head_bias": True,
    },
    "bart": {
        "norm": "post",
        "embedding_norm": True,
        "prompt_ids": (3, 4),
        "prompt_layers": 2,
        "prompt_heads": 4,
        "prompt_mlp_width": 40,
    },
}
# (width, heads, mlp_width): no multiples of registers among them.
SHAPES = ((32, 4, 36), (72, 4, 100), (140, 2, 30))
WORDS, PHOTOS, BEAMS = 101, 3, 5


def build(encoder: EncoderConfig, decoder: DecoderConfig) -> CaptioningModel:
    torch.manual_seed(1)
    model = CaptioningModel(encoder, decoder).eval()
    for parameter in model.parameters():  # biases and gains that are not 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def build_decoder(family: str, shape: tuple[int, int, int], **more) -> CaptioningModel:
    width, heads, mlp = shape
    encoder = EncoderConfig(width, 1, heads, mlp, image_size=80)
    sizes = {"width": width, "layers": 2, "heads": heads, "mlp_width": mlp, "memory_width": width}
    return build(encoder, DecoderConfig(WORDS, 40, **sizes, **FAMILIES[family], **more))


def loaded(script: torch.jit.ScriptModule, folder: Path) -> torch.jit.ScriptModule:
    path = str(folder / "script.pt")
    script.save(path)
    return torch.jit.load(path).eval()


@torch.inference_mode()
def run_all(decoder, memory: torch.Tensor) -> list[torch.Tensor]:
    """The logits of a prefill with prompts of three lengths and of three steps of beams with
    random ancestors, and attention maps."""
    chance = torch.Generator().manual_seed(5)
    length = 6
    time = torch.arange(length)
    real = time >= torch.tensor([[0], [2], [5]])
    mask = real[:, None] & (time[:, None] >= time) | torch.eye(length, dtype=torch.bool)
    tokens = torch.randint(WORDS, (PHOTOS, length), generator=chance)
    positions = time.expand(PHOTOS, -1)
    photo, cache = decoder.begin(memory), decoder.new_cache(PHOTOS, length + 3 * BEAMS)
    found = [decoder.prefill(tokens, positions, mask, real, cache, photo).clone()]
    for step in range(3):
        used, own = length + step * BEAMS, torch.arange(BEAMS)
        tokens = torch.randint(WORDS, (PHOTOS, BEAMS), generator=chance)
        mask = torch.randint(5, (PHOTOS, BEAMS, used + BEAMS), generator=chance) < 2
        mask[:, :, :length] = real[:, None]
        mask[:, own, used + own] = True
        places = torch.full((PHOTOS, BEAMS), length + step)
        found.append(decoder.step(tokens, places, mask, cache, used, photo).clone())
    tokens, mask = tokens[:, :4], torch.ones(PHOTOS, 4, 4, dtype=torch.bool).tril()
    return [*found, decoder.attention(tokens, torch.arange(4).expand(PHOTOS, -1), mask, memory)]


def check_close(native, scripted, eager, precision: str) -> None:
    """In float32 to float error; otherwise as near to the eager model as the script is."""
    for ours, theirs, exact in zip(native, scripted, eager, strict=True):
        scale = exact.abs().max()
        if precision == "fp32":
            assert (ours - exact).abs().max() < 3e-6 * scale
        else:
            allowed = 1.5 * (theirs - exact).abs().max() + 2e-3 * scale
            assert (ours - exact).abs().max() < allowed


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_in_c_gives_the_same_numbers(family, shape, precision, tmp_path):
    model = build_decoder(family, shape)
    quantised = script_decoder(in_precision(model, precision, precision).decoder)
    native = native_decoder(loaded(quantised, tmp_path), asdict(model.decoder_config))
    assert isinstance(native, NativeDecoder)
    script = prepare_script(loaded(quantised, tmp_path), "cpu")
    memory = torch.randn(PHOTOS, 26, shape[0])
    decoders = (native, script, model.decoder)
    check_close(*(run_all(decoder, memory) for decoder in decoders), precision)


ENCODERS = {
    "vit": {},
    "without prefix": {"prefix_tokens": 0, "final_norm": False},
    "clip": {
        "pre_norm": True,
        "activation": "quick_gelu",
        "qkv_bias": False,
        "projection_width": 24,
    },
    "dinov2": {"layer_scale": True, "prefix_tokens": 3, "prefix_positions": False},
    "convolutional": {
        "stem": "convolutional",
        "activation": "gelu_tanh",
        "memory_positions": True,
    },
}


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_in_c_gives_the_same_numbers(kind, shape, precision, tmp_path):
    width, heads, mlp = shape
    config = EncoderConfig(width, 2, heads, mlp, image_size=80, **ENCODERS[kind])
    decoder = DecoderConfig(WORDS, 9, width, 1, heads, mlp, memory_width=config.memory_width)
    model = build(config, decoder)
    for block in model.encoder.blocks:
        if config.layer_scale:
            block.scale1.data.uniform_(-1, 1), block.scale2.data.uniform_(-1, 1)
    traced = trace_encoder(in_precision(model, precision, precision).encoder, 80)
    native = native_encoder(loaded(traced, tmp_path), asdict(config))
    assert isinstance(native, NativeEncoder)
    script = prepare_script(loaded(traced, tmp_path), "cpu")
    photos = torch.randn(PHOTOS, 3, 80, 80)
    check_close([native(photos)], [script(photos)], [model.encoder(photos)], precision)


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_photo_depends_neither_on_its_batch_nor_on_the_threads(precision, tmp_path):
    model = build_decoder("gpt2", SHAPES[1])
    quantised = in_precision(model, precision, precision)
    decoder = loaded(script_decoder(quantised.decoder), tmp_path)
    encoder = loaded(trace_encoder(quantised.encoder, 80), tmp_path)
    decoder = native_decoder(decoder, asdict(model.decoder_config))
    encoder = native_encoder(encoder, asdict(model.encoder_config))
    photos = torch.randn(PHOTOS, 3, 80, 80)

    @torch.inference_mode()
    def logits(chosen: list[int]) -> torch.Tensor:
        count = len(chosen)
        photo, cache = decoder.begin(encoder(photos[chosen])), decoder.new_cache(count, BEAMS)
        tokens = torch.arange(BEAMS).expand(count, -1)
        mask = torch.ones(count, BEAMS, BEAMS, dtype=torch.bool).tril()
        return decoder.step(tokens, tokens, mask, cache, 0, photo)

    threads = torch.get_num_threads()
    expected = logits([0, 1, 2])
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(logits([0, 1, 2]), expected)
            assert torch.equal(logits([2]), expected[2:])
    finally:
        torch.set_num_threads(threads)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40) | st.integers(180, 220),  # of a step, and of a photo
    inputs=st.integers(1, 90) | st.integers(700, 850),
    outputs=st.integers(1, 90),
    kind=st.sampled_from(PRECISIONS),
    activation=st.sampled_from(("gelu", "gelu_tanh", "quick_gelu")),
    biased=st.booleans(),
)
def test_a_product_of_any_shape_is_torchs(rows, inputs, outputs, kind, activation, biased):
    torch.manual_seed(rows * 8100 + inputs * 90 + outputs)
    linear, x = nn.Linear(inputs, outputs, biased), 3 * torch.randn(rows, inputs)
    if kind == "int8":
        layer = torch.jit.script(Int8Linear(linear))
    else:
        layer = torch.jit.script(PackedLinear(linear, TYPES[kind]))
    plain = layer(x)  # before its weight is taken
    weights = _Weights([layer], {"layer_norm_eps": 1e-5, "activation": activation})
    made = weights.product(weights.activated(layer), x)
    expected = {
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    }[activation]
    if kind == "int8":  # the plain layer does not round its input
        step = x.abs().amax(1, keepdim=True) / 127
        x = torch.round(x / step) * step
        weight = torch.round(linear.weight / layer.scale[:, None]) * layer.scale[:, None]
        plain = F.linear(x.double(), weight.double()).float()
        plain = plain + linear.bias if biased else plain
    tolerance = 2e-2 if kind == "bf16" else 1e-5
    torch.testing.assert_close(made, expected(plain), atol=tolerance, rtol=tolerance)


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_is_not_hidden(precision, tmp_path):
    model = build_decoder("gpt2", SHAPES[0])
    quantised = script_decoder(in_precision(model, precision, precision).decoder)
    native = native_decoder(loaded(quantised, tmp_path), asdict(model.decoder_config))
    memory = torch.randn(PHOTOS, 26, 32)
    memory[1, 3, 7] = torch.nan
    for logits in run_all(native, memory)[:-1]:
        assert logits[1].isnan().all() and not logits[[0, 2]].isnan().any()


@pytest.fixture
def pair(tmp_path):
    return build_pair(tmp_path, "fp32", "int8")


def build_pair(tmp_path, *precisions):
    """An encoder and a decoder in C."""
    model = build_decoder("gpt2", SHAPES[0])
    decoder = loaded(script_decoder(in_precision(model, *precisions).decoder), tmp_path)
    encoder = loaded(trace_encoder(in_precision(model, *precisions).encoder, 80), tmp_path)
    return (
        native_encoder(encoder, asdict(model.encoder_config)),
        native_decoder(decoder, asdict(model.decoder_config)),
    )


@needs_native
@torch.inference_mode()
def test_what_does_not_fit_is_an_error(pair):
    """C would read and write what is not its own."""
    encoder, decoder = pair
    memory, tokens = torch.randn(2, 26, 32), torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    photo, cache = decoder.begin(memory), decoder.new_cache(2, 4)
    assert decoder.step(tokens, tokens, mask, cache, 0, photo).shape == (2, 3, WORDS)
    wrong = {
        "memory of another width": lambda: decoder.begin(torch.randn(2, 26, 48)),
        "a full cache": lambda: decoder.step(
            tokens, tokens, torch.ones(2, 3, 6, dtype=torch.bool), cache, 3, photo
        ),
        "a mask of another shape": lambda: decoder.step(
            tokens, tokens, mask[:, :2], cache, 0, photo
        ),
        "a mask that is none": lambda: decoder.step(tokens, tokens, mask.int(), cache, 0, photo),
        "a cache of fewer photos": lambda: decoder.step(
            tokens, tokens, mask, decoder.new_cache(1, 4), 0, photo
        ),
        "an image of another size": lambda: encoder(torch.randn(1, 3, 64, 64)),
    }
    for what, call in wrong.items():
        with pytest.raises(RuntimeError):
            call()
            pytest.fail(what)


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_photos_give_no_numbers(precision, tmp_path):
    encoder, decoder = build_pair(tmp_path, precision, precision)
    memory = encoder(torch.zeros(0, 3, 80, 80))
    assert memory.shape == (0, 26, 32)
    assert decoder.begin(memory).values[0].size(0) == 0


@needs_native
@torch.inference_mode()
def test_torchs_default_type_changes_nothing(pair):
    _, decoder = pair
    memory = torch.randn(PHOTOS, 26, 32)
    expected = run_all(decoder, memory)
    try:
        torch.set_default_dtype(torch.float64)
        found = run_all(decoder, memory)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
def test_threads_share_a_decoder(pair):
    _, decoder = pair
    memories = [torch.randn(PHOTOS, 26, 32) for _ in range(8)]
    expected = [run_all(decoder, memory) for memory in memories]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda memory: run_all(decoder, memory), memories * 4))
    for number, numbers in enumerate(found):
        alone = expected[number % len(memories)]
        assert all(torch.equal(a, b) for a, b in zip(numbers, alone, strict=True))


@needs_native
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_without_bfloat16_and_a_matrix_unit_the_numbers_are_the_same(
    anew, monkeypatch, tmp_path, precision
):
    model = build_decoder("gpt2", SHAPES[1])
    quantised = script_decoder(in_precision(model, precision, precision).decoder)
    memory = torch.randn(PHOTOS, 26, 72)
    decoders = []
    for processor in ("native", "cascadelake"):
        flags = [f.replace("native", processor) for f in library_module.FLAGS]
        monkeypatch.setattr(library_module, "FLAGS", tuple(flags))
        native_library.cache_clear()
        decoders.append(native_decoder(loaded(quantised, tmp_path), asdict(model.decoder_config)))
    for ours, other in zip(*(run_all(decoder, memory) for decoder in decoders), strict=True):
        assert (ours - other).abs().max() < 1e-2 * ours.abs().max()


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A folder of its own for what is compiled, and nothing compiled yet."""
    source = tmp_path / "native_blocks.c"
    source.write_bytes(library_module.SOURCE.read_bytes())
    monkeypatch.setattr(library_module, "SOURCE", source)
    native_library.cache_clear()
    yield tmp_path / "__pycache__"
    native_library.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'", " "])
def test_without_a_compiler_captions_are_the_scripts(
    compiler, anew, monkeypatch, caplog, tiny_export
):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: dict.fromkeys(library_module.NEEDED, True)
    )
    with caplog.at_level(logging.WARNING):
        captioners = [Captioner.load(tiny_export) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "install a C compiler (gcc), or name one with CC" in caplog.text
    for captioner in captioners:
        assert not isinstance(captioner.decoder, NativeDecoder)
        assert captioner.caption([Image.new("RGB", (32, 32))])


def test_another_processor_has_no_library_and_no_warning(anew, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert native_library() is None
    assert not caplog.records


@needs_native
def test_what_was_compiled_is_kept_and_made_again_where_it_is_damaged(anew, monkeypatch):
    assert native_library() is not None
    (kept,) = anew.iterdir()
    first = kept.stat()
    native_library.cache_clear()
    assert native_library() is not None
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    # Elsewhere, since this process has it loaded by its name.
    other = anew.with_name("other") / "__pycache__" / kept.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"damaged")
    source = library_module.SOURCE.rename(other.parent.parent / library_module.SOURCE.name)
    monkeypatch.setattr(library_module, "SOURCE", source)
    native_library.cache_clear()
    assert native_library() is not None
    assert other.stat().st_size == first.st_size


@needs_native
def test_where_nothing_can_be_kept_it_is_compiled_each_time(anew):
    anew.write_text("")  # no folder can be made here
    assert native_library() is not None
    assert anew.read_text() == ""


@needs_native
def test_a_source_that_changed_is_compiled_again(anew):
    native_library()
    source = library_module.SOURCE
    source.write_text(source.read_text() + "\n")
    native_library.cache_clear()
    native_library()
    assert len(list(anew.iterdir())) == 2


def test_an_export_in_float16_stays_torchscript(tmp_path):
    model = build_decoder("gpt2", SHAPES[0])
    script = loaded(script_decoder(in_precision(model, "fp32", "fp16").decoder), tmp_path)
    assert native_decoder(script, asdict(model.decoder_config)) is None
    assert len(run_all(prepare_script(script, "cpu"), torch.randn(PHOTOS, 26, 32))) == 5
