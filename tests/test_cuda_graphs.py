"""Steps replayed as CUDA graphs give what the steps themselves give: with graphs on a machine that
has a GPU, and everywhere with a stand-in that runs what a graph would replay."""

import pytest
import torch

from export.export import export_checkpoint
from export.precision import WAYS
from export.torchscript import script_decoder
from handler import cuda_graphs
from handler.beam_search import DecodeOptions, SpecialIds, search
from handler.captioner import Captioner, prepare_script
from handler.cuda_graphs import GraphedDecoder, GraphedEncoder
from training.model import Decoder, DecoderConfig, Encoder, EncoderConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

END = 1
# Photos that finish at different times, so that the batch shrinks; three kinds of search, with
# prompts and without.
MIXED = [
    DecodeOptions(num_beams=5),
    DecodeOptions(num_beams=3, max_new_tokens=4),
    DecodeOptions(num_beams=1, no_repeat_ngram_size=2),
    DecodeOptions(num_beams=5, max_new_tokens=9, num_return_sequences=4),
    DecodeOptions(do_sample=True, num_return_sequences=3, seed=5),
]
PROMPTS = [[7], [8, 9, 10], [], [], [11, 12]]


class StandIn:
    """Of a graph: bound to the tensors that it was made with, as one that was captured is."""

    def __init__(self, run, inputs, outputs, pool):
        self.run, self.inputs = run, [given.clone() for given in inputs]
        self.output = outputs.setdefault(tuple(inputs[0].shape), run(*self.inputs).clone())

    def __call__(self, inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.output.copy_(self.run(*self.inputs))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graphs, "_Graph", StandIn)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return request.param


@pytest.fixture
def decoder(device):
    torch.manual_seed(0)
    shape = DecoderConfig(
        vocab_size=50, max_positions=16, width=32, layers=2, heads=2, mlp_width=64, memory_width=24
    )
    made = Decoder(shape).to(device).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(4)  # so that captions differ
    return made


def found(decoder, memory, options, prompts=None):
    return [
        [(h.ids, h.finished) for h in hypotheses]
        for hypotheses in search(
            decoder, memory, options, SpecialIds(0, END, (0,)), prompts=prompts
        )
    ]


@pytest.mark.parametrize("kind", ["eager", "scripted"])
def test_captions_are_the_same_whatever_was_searched_before(decoder, device, kind):
    plain = prepare_script(script_decoder(decoder), device) if kind == "scripted" else decoder
    graphed = GraphedDecoder(plain)
    for seed in range(4):
        torch.manual_seed(seed)
        memory = torch.randn(len(MIXED), 7, 24, device=device)
        chosen, prompts = MIXED[seed:] + MIXED[:seed], PROMPTS[seed:] + PROMPTS[:seed]
        for photos in (len(chosen), 1, 3):
            for before in (None, prompts[:photos]):
                expected = found(decoder, memory[:photos], chosen[:photos], before)
                assert found(graphed, memory[:photos], chosen[:photos], before) == expected
    assert graphed._steps


@needs_gpu
@pytest.mark.parametrize("precision", WAYS)
def test_an_export_captions_on_a_gpu_as_on_a_cpu(precision, tiny_run, tmp_path, monkeypatch):
    checkpoint = tiny_run / "build/checkpoints/tiny"
    images = torch.randn(3, 3, 32, 32)
    for way in WAYS[precision]:
        monkeypatch.setitem(WAYS, precision, (way,))
        export_checkpoint(checkpoint, tmp_path / "export", precision)
        cpu, gpu = (Captioner.load(tmp_path / "export", device) for device in ("cpu", "cuda"))
        assert isinstance(gpu.decoder, GraphedDecoder)
        within = 1e-4 if way[0] == "fp32" else 0.05
        torch.testing.assert_close(
            gpu.encode(images).cpu(), cpu.encode(images), atol=within, rtol=0
        )
        options = [gpu.options(num_beams=3)] * 3
        assert all(best.text for best, *_ in gpu.caption_tensors(images, options))


@pytest.mark.parametrize("limits", [{"STEPS": 3}, {"CACHES": 1}])
def test_old_graphs_and_caches_make_room_for_new_ones(decoder, device, monkeypatch, limits):
    for name, value in limits.items():
        monkeypatch.setattr(cuda_graphs, name, value)
    graphed = GraphedDecoder(decoder)
    memory = torch.randn(2, 7, 24, device=device)
    for beams in (2, 5, 2, 3):
        options = [DecodeOptions(num_beams=beams)] * 2
        assert found(graphed, memory, options) == found(decoder, memory, options)
        assert len(graphed._steps) <= cuda_graphs.STEPS
        assert len(graphed._caches) <= cuda_graphs.CACHES
        kept = {cache.keys[0].data_ptr() for cache in graphed._caches.values()}
        assert {key[-2] for key in graphed._steps} <= kept


@pytest.mark.parametrize("limit", ["MOST_PHOTOS", "MOST_SLOTS"])
def test_large_searches_leave_nothing_behind(decoder, device, monkeypatch, limit):
    monkeypatch.setattr(cuda_graphs, limit, 1)
    graphed = GraphedDecoder(decoder)
    memory = torch.randn(len(MIXED), 7, 24, device=device)
    assert found(graphed, memory, MIXED) == found(decoder, memory, MIXED)
    assert not graphed._steps and not graphed._caches


def test_an_encoders_memory_stays_when_the_next_photo_comes(device):
    torch.manual_seed(0)
    shape = EncoderConfig(width=24, layers=1, heads=2, mlp_width=48, image_size=32, patch_size=8)
    encoder = Encoder(shape).to(device).eval().requires_grad_(False)
    graphed = GraphedEncoder(encoder)
    with torch.inference_mode():
        for images in torch.randn(3, 2, 3, 32, 32, device=device):
            first, second = graphed(images), graphed(images.flip(0))
            torch.testing.assert_close(first, encoder(images))
            torch.testing.assert_close(second, first.flip(0))
