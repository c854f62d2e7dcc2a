"""Packed layers against torch's own, and exports in every precision."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_program
from torch import nn

from export.export import export_checkpoint
from export.layers import HalfLinear, Int8Linear, PackedLinear, RescoredHead
from export.precision import WAYS, in_precision, ways
from export.torchscript import script_decoder, trace_encoder
from export.verify import FLOORS, ValidationPhotos, captions_of, verify
from handler.captioner import Captioner
from handler.errors import UserError
from training.checkpoint import load_captioner, load_model
from training.data.manifest import read_manifest
from training.data.photos import read_photo

# Relative error of a layer: rounding to 8 bits of mantissa; weights to 11 of them; both to 8 bits.
LAYERS = {
    "fp32": (lambda linear: PackedLinear(linear), 1e-6),
    "bf16": (lambda linear: PackedLinear(linear, torch.bfloat16), 5e-3),
    "fp16": (lambda linear: HalfLinear(linear), 4e-4),
    "int8": (lambda linear: Int8Linear(linear), 2e-2),
}


@pytest.fixture(params=LAYERS)
def layer_and_error(request):
    return LAYERS[request.param]


def relative(found, expected) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_torchs_own_before_and_after_packing(layer_and_error, bias):
    make, error = layer_and_error
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    x = torch.randn(2, 5, 96) * torch.rand(5, 1) * 3
    layer = torch.jit.script(make(linear).eval())
    assert relative(layer(x), linear(x)) < error
    layer.prepack()
    layer.prepack()  # a second call changes nothing
    assert relative(torch.jit.freeze(layer)(x), linear(x)) < error


def test_a_row_never_depends_on_its_neighbours(layer_and_error):
    """A scale for a whole batch would let a loud photo drown its neighbours."""
    make, _ = layer_and_error
    torch.manual_seed(0)
    layer = make(nn.Linear(64, 48).requires_grad_(False))
    layer.prepack()
    quiet = torch.randn(3, 64)
    alone = layer(quiet)
    beside = layer(torch.cat([quiet, 1000 * torch.randn(4, 64)]))[:3]
    assert torch.equal(alone, beside)


def test_zeros_and_large_numbers_survive_int8():
    layer = Int8Linear(nn.Linear(8, 8).requires_grad_(False))
    layer.prepack()
    x = torch.cat([torch.zeros(1, 8), 1e30 * torch.ones(1, 8)])
    y = layer(x)
    assert torch.isfinite(y).all() and torch.equal(y[0], layer.bias)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("make", [PackedLinear, HalfLinear, Int8Linear])
def test_the_activation_is_part_of_the_layer(approximate, make):
    torch.manual_seed(0)
    linear = nn.Linear(32, 32).requires_grad_(False)
    layer = make(linear, gelu=nn.GELU(approximate))
    x = torch.randn(4, 32)
    expected = F.gelu(linear(x), approximate=approximate)
    assert relative(layer(x), expected) < 2e-2
    layer.prepack()
    assert relative(layer(x), expected) < 2e-2


def test_every_linear_layer_is_replaced(tiny_run):
    model, _, _ = load_model(tiny_run / "build/checkpoints/tiny")
    for precision in ("fp32", "bf16", "fp16", "int8"):
        changed = in_precision(model, precision, precision)
        assert not [m for m in changed.modules() if isinstance(m, nn.Linear)]
    assert [m for m in model.modules() if isinstance(m, nn.Linear)]  # the original stays


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("words", [10, 300, 40_000])
@pytest.mark.parametrize("rough", [Int8Linear, partial(PackedLinear, dtype=torch.bfloat16)])
def test_a_head_looks_twice_at_the_best_words(words, rough, bias):
    """Its bias was forgotten in the words that it looks at twice."""
    torch.manual_seed(0)
    linear = nn.Linear(64, words, bias=bias).requires_grad_(False)
    head = torch.jit.script(RescoredHead(linear, torch.jit.script(rough(linear).eval())).eval())
    x = torch.randn(2, 3, 64)
    expected = linear(x)
    for _ in range(2):
        found = head(x)
        count = min(5, words)
        assert torch.equal(found.topk(count).indices, expected.topk(count).indices)
        torch.testing.assert_close(found.topk(count).values, expected.topk(count).values)
        if words > 1000:
            assert not torch.allclose(found, expected)  # the others are as rough as they were
        head.rough.prepack()


@pytest.mark.parametrize("way", sorted({way for ways in WAYS.values() for way in ways}))
def test_an_export_can_be_moved_whole(tiny_run, tmp_path, way):
    # TorchScript moves what it knows as buffers; a bias left behind fails on a GPU alone.
    plain, config, _ = load_model(tiny_run / "build/checkpoints/tiny")
    model = in_precision(plain, *way)
    size = config["preprocessing"]["image_size"]
    trace_encoder(model.encoder, size).save(str(tmp_path / "encoder.pt"))
    script_decoder(model.decoder).save(str(tmp_path / "decoder.pt"))
    for name, part in (("encoder", plain.encoder), ("decoder", plain.decoder)):
        loaded = torch.jit.load(str(tmp_path / f"{name}.pt"))
        moved = {n for n, _ in [*loaded.named_parameters(), *loaded.named_buffers()]}
        assert {n for n, _ in part.named_parameters() if n.endswith("bias")} <= moved


def test_many_photos_are_encoded_as_few_are(tiny_run, monkeypatch):
    captioner = load_captioner(tiny_run / "build/checkpoints/tiny")
    images = torch.randn(7, 3, 32, 32)
    whole = captioner.encode(images)
    sizes = []
    monkeypatch.setattr("handler.captioner.ENCODED_BYTES", 3 * 4 * 16 * 128)
    captioner.encoder.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    torch.testing.assert_close(captioner.encode(images), whole)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("precision", ["bf16", "int8", "auto"])
def test_an_export_records_what_it_lost(tiny_run, tiny_data, precision):
    done = run_program(
        "export.export", "--checkpoint", "build/checkpoints/tiny", "--data", str(tiny_data),
        "--precision", precision, cwd=tiny_run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tiny_run / f"build/export/tiny-{precision}"
    config = json.loads((folder / "config.json").read_text())
    assert config["precision"] in FLOORS and (precision in (config["precision"], "auto"))
    verified = config["verified"]
    assert verified["photos"] == 4 and 0 <= verified["identical_captions"] <= 1
    if config["precision"] != "fp32":
        assert {"cider", "cider_eager"} <= set(verified)
    captioner = Captioner.load(folder)
    photos = [(tiny_data / f"images/{n}.png").read_bytes() for n in range(16, 20)]
    together = captioner.caption(photos, num_beams=3)
    alone = [captioner.caption([photo], num_beams=3)[0] for photo in photos]
    assert [c[0].text for c in together] == [c[0].text for c in alone]


def test_auto_ends_with_fp32_and_starts_with_what_the_processor_can(monkeypatch):
    assert {name for name, _, _ in ways("int8")} == {"int8"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert [name for name, _, _ in ways("auto")] == ["bf16", "bf16", "bf16", "fp32"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert ways("auto") == [("fp32", "fp32", "fp32")]


@pytest.mark.parametrize("precision, decoder", [("bf16", "fp16"), ("int8", "int8")])
def test_a_precision_that_loses_captions_goes_back_to_finer_parts(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys, precision, decoder
):
    """The floor is out of reach at first: the last way is taken, and told as what it is."""
    monkeypatch.setitem(FLOORS, precision, (1.1, 0.0))
    checkpoint = tiny_run / "build/checkpoints/tiny"
    config = export_checkpoint(checkpoint, tmp_path / "export", precision, str(tiny_data))
    assert config["parts"] == {"encoder": "fp32", "decoder": decoder}
    assert config["verified"]["kept"] is False
    assert capsys.readouterr().out.count("trying the next way") == 2


def test_numbers_that_are_far_off_lead_to_the_next_way(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """As those of a trained encoder in int8 may be: finer ways are tried all the same."""
    tried = []

    def verify_first_wrong(*arguments):
        tried.append(arguments)
        if len(tried) < 3:
            raise UserError("export: encoder memory differs")
        return verify(*arguments)

    monkeypatch.setattr("export.export.verify", verify_first_wrong)
    checkpoint = tiny_run / "build/checkpoints/tiny"
    config = export_checkpoint(checkpoint, tmp_path / "export", "int8", str(tiny_data))
    assert config["parts"] == {"encoder": "fp32", "decoder": "int8"}
    assert capsys.readouterr().out.count("memory differs; trying the next way") == 2


def test_a_tied_head_is_kept_once_until_it_is_packed(tiny_export):
    decoder = torch.jit.load(str(tiny_export / "decoder.pt"))
    table = decoder.token_embedding.weight
    assert decoder.head.weight.data_ptr() == table.data_ptr()
    before = table.clone()
    decoder.head.prepack()
    assert torch.equal(decoder.token_embedding.weight, before)


def test_a_damaged_export_is_not_believed(tiny_run, tiny_export):
    """Another bias in one layer: the numbers tell."""
    eager = load_captioner(tiny_run / "build/checkpoints/tiny")
    exported = Captioner.load(tiny_export)
    images = list(torch.randn(2, 3, 32, 32))
    photos = ValidationPhotos("random", images, None)
    assert verify(eager, exported, photos, captions_of(eager, images), "fp32")["kept"]
    with torch.no_grad():
        eager.decoder.blocks[0].mlp.down.bias[0].add_(1.0)
    with pytest.raises(UserError, match=r"export: decoder logits differs"):
        verify(eager, exported, photos, captions_of(eager, images), "fp32")


def test_a_checkpoint_that_samples_by_default_is_exported(tiny_run, tmp_path):
    """Its samples were compared, which differ each time."""
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    config["decoding"] |= {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    assert export_checkpoint(tmp_path / "tiny", tmp_path / "export")["verified"]["kept"]


def test_the_checkpoints_own_prompt_is_not_scored(tiny_run, tiny_data, tmp_path, monkeypatch):
    """The references do not have it, and `evaluate` does not score it."""
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    config["decoding"]["prompt"] = "a"
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    captioner = load_captioner(tmp_path / "tiny")
    rows = read_manifest(tiny_data).split("val")
    images = [captioner.preprocess(read_photo(read_manifest(tiny_data), row)) for row in rows]
    captions = captions_of(captioner, images)
    scored: list[str] = []

    def scores(texts, references, metrics):
        scored.extend(texts.values())
        return {"CIDEr": 1.0}

    monkeypatch.setattr("export.verify.verify_numbers", lambda *_: 0.0)
    monkeypatch.setattr("export.verify.score", scores)
    photos = ValidationPhotos("val", images, [row.captions for row in rows])
    assert verify(captioner, captioner, photos, captions, "bf16")["kept"]
    assert scored == 2 * [captioner.tokenizer.decode(caption.ids) for caption in captions]
    assert all(caption.text.startswith("a") for caption in captions)
    assert scored != 2 * [caption.text for caption in captions]


@pytest.mark.parametrize("gone", ["disk", "photos"])
def test_an_export_does_not_need_the_photos_of_the_training(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys, gone
):
    """It was refused while the dataset was there and its disk of photos was not, or while the disk
    was there and the photos were not."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, "data")
    (tmp_path / "empty").mkdir()
    root = {"disk": "/no/such/disk", "photos": str(tmp_path / "empty")}[gone]
    dataset = json.loads(Path("data/dataset.json").read_text())
    Path("data/dataset.json").write_text(json.dumps({**dataset, "image_root": root}))
    shutil.copytree(tiny_run / "build/checkpoints/tiny", "tiny")
    config = json.loads(Path("tiny/config.json").read_text())
    config["training"]["config"]["data"] = "data"
    Path("tiny/config.json").write_text(json.dumps(config))
    written = export_checkpoint(Path("tiny"), tmp_path / "export")
    assert written["verified"]["source"] == "random images"
    assert "random images are compared instead" in capsys.readouterr().err
    with pytest.raises(UserError, match="image_root|prepare the data again"):
        export_checkpoint(Path("tiny"), tmp_path / "other", data="data")


def test_another_caption_in_fp32_is_an_error(tiny_run, tiny_export):
    eager = load_captioner(tiny_run / "build/checkpoints/tiny")
    images = list(torch.randn(2, 3, 32, 32))
    expected = captions_of(eager, images)
    expected[1] = captions_of(eager, [5 * torch.ones(3, 32, 32)])[0]
    expected[1].ids.append(0)
    with pytest.raises(UserError, match="photo 1 is"):
        verify(
            eager, Captioner.load(tiny_export), ValidationPhotos("x", images, None), expected,
            "fp32",
        )  # fmt: skip
