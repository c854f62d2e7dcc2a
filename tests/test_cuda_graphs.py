"""Steps replayed as CUDA graphs give what the steps themselves give, on a machine with a GPU."""

import pytest
import torch

from export.precision import WAYS, in_precision
from export.script_decoder import script_decoder
from export.trace_encoder import trace_encoder
from handler import cuda_graphs
from handler.beam_search import DecodeOptions, search
from handler.captioner import prepare_script, read_script
from handler.cuda_graphs import GraphedDecoder, GraphedEncoder
from training.model import CaptioningModel, Decoder, DecoderConfig, EncoderConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

END = 1
# Photos that finish at different times, so that the batch shrinks; three kinds of search.
MIXED = [
    DecodeOptions(num_beams=5),
    DecodeOptions(num_beams=3, max_new_tokens=4),
    DecodeOptions(num_beams=1, no_repeat_ngram_size=2),
    DecodeOptions(num_beams=5, max_new_tokens=9, num_return_sequences=4),
    DecodeOptions(do_sample=True, num_return_sequences=3, seed=5),
]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    shape = DecoderConfig(
        vocab_size=50, max_positions=16, width=32, layers=2, heads=2, mlp_width=64, memory_width=24
    )
    made = Decoder(shape).cuda().eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(4)  # so that captions differ
    return made


def found(decoder, memory, options):
    return [
        [(h.ids, h.finished) for h in hypotheses]
        for hypotheses in search(decoder, memory, options, begin_id=0, end_id=END, suppress=(0,))
    ]


@pytest.mark.parametrize("kind", ["eager", "scripted"])
def test_captions_are_the_same_whatever_was_searched_before(decoder, kind):
    plain = prepare_script(script_decoder(decoder), "cuda") if kind == "scripted" else decoder
    graphed = GraphedDecoder(plain)
    for seed in range(4):
        torch.manual_seed(seed)
        memory = torch.randn(len(MIXED), 7, 24, device="cuda")
        chosen = MIXED[seed:] + MIXED[:seed]
        for photos in (len(chosen), 1, 3):
            expected = found(decoder, memory[:photos], chosen[:photos])
            assert found(graphed, memory[:photos], chosen[:photos]) == expected


@pytest.mark.parametrize("way", sorted({way for ways in WAYS.values() for way in ways}))
def test_every_export_runs_on_a_gpu(way, tmp_path):
    torch.manual_seed(0)
    model = CaptioningModel(
        EncoderConfig(width=24, layers=1, heads=2, mlp_width=48, image_size=32, patch_size=8),
        DecoderConfig(50, 16, width=32, layers=1, heads=2, mlp_width=64, memory_width=24),
    )
    model = in_precision(model, *way)
    trace_encoder(model.encoder, 32).save(tmp_path / "encoder.pt")
    script_decoder(model.decoder).save(tmp_path / "decoder.pt")
    place = "cpu" if "fp16" in way else "cuda"
    encoder, decoder = (
        prepare_script(read_script(tmp_path / f"{part}.pt", place).to("cuda"), "cuda")
        for part in ("encoder", "decoder")
    )
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        memory = GraphedEncoder(encoder)(images.cuda())
        torch.testing.assert_close(memory.cpu(), model.encoder(images), atol=0.05, rtol=0)
    options = [DecodeOptions(num_beams=3)] * 3
    assert found(GraphedDecoder(decoder), memory, options) == found(decoder, memory, options)


def test_old_graphs_make_room_for_new_ones(decoder, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 3)
    graphed = GraphedDecoder(decoder)
    memory = torch.randn(2, 7, 24, device="cuda")
    for beams in (2, 3, 2):
        options = [DecodeOptions(num_beams=beams)] * 2
        assert found(graphed, memory, options) == found(decoder, memory, options)
    assert len(graphed._steps) == 3
