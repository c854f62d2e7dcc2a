"""Grounding: maps of known objects are judged as they should be, the ways differ as they should."""

import dataclasses
import json
from unittest.mock import MagicMock

import pytest
import torch
from conftest import TINY, run_program
from tiny_training import config_of

from export.torchscript import script_decoder
from handler.captioner import Caption, Captioner
from handler.image_preprocess import PreprocessConfig
from handler.web.word_maps import peak
from training.checkpoint import load_model
from training.data.manifest import Row, read_manifest, write_manifest
from training.data.scene_language import referents
from training.loop.train import train
from training.model import Encoder, EncoderConfig
from training.scores import captions, grounding, pointing
from training.scores.grounding import measure, rollout, ways
from training.scores.pointing import LayerChoice, judge, overlap

CIRCLE = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain",
          "box": [0, 0, 48, 48]}  # fmt: skip
STAR = {**CIRCLE, "shape": "star", "box": [48, 48, 96, 96]}
SCENE = {"size": [96, 96], "background": {"pattern": "plain", "tone": "light"},
         "objects": [CIRCLE, STAR]}  # fmt: skip


def test_words_are_led_to_what_they_name():
    found = referents("a red star under the red circle", SCENE)
    assert found == [(2, [STAR]), (6, [CIRCLE])]
    assert referents("a blue circle and two hearts", SCENE) == [(2, []), (5, [])]
    assert referents("the background is light and there is no heart", SCENE) == []


@pytest.mark.parametrize(
    ("other", "share"),
    [([0, 0, 2, 2], 1.0), ([1, 0, 3, 2], 1 / 3), ([2, 2, 3, 3], 0.0), ([5, 5, 6, 6], 0.0)],
)
def test_overlap(other, share):
    assert overlap([0, 0, 2, 2], other) == pytest.approx(share)


def test_a_map_is_judged_by_the_objects_it_may_mean():
    map_gg = torch.zeros(4, 4)
    map_gg[:2, :2] = 0.25  # the circle's quarter
    assert judge(map_gg, [CIRCLE], [96, 96])[0]
    assert not judge(map_gg, [STAR], [96, 96])[0]
    inside, share = judge(map_gg, [STAR, CIRCLE], [96, 96])
    assert inside and share > 0.6
    assert peak(map_gg) == pytest.approx((0.25, 0.25))


def test_a_map_of_the_middle_is_judged_in_the_picture():
    """The map of a model that sees the middle alone was taken for one of the whole picture."""
    middle = (0.25, 0.25, 0.75, 0.75)
    map_gg = torch.zeros(4, 4)
    map_gg[3, 3] = 1.0  # at (0.69, 0.69) of the picture
    near = {**CIRCLE, "box": [60, 60, 72, 72]}
    far = {**STAR, "box": [73, 73, 96, 96]}
    assert judge(map_gg, [near], [96, 96], middle)[0] and not judge(map_gg, [near], [96, 96])[0]
    assert not judge(map_gg, [far], [96, 96], middle)[0] and judge(map_gg, [far], [96, 96])[0]
    assert judge(map_gg, [near], [96, 96], middle)[1] > 0.5


def test_measure_knows_what_the_model_saw(monkeypatch):
    """A model that sees the middle of a picture, in which the object is at the edge."""
    judged = []
    monkeypatch.setattr(pointing, "judge", lambda *given: judged.append(given) or (True, 1.0))
    monkeypatch.setattr(captions, "read_photo", lambda *_: None)
    monkeypatch.setattr(
        grounding, "all_maps", lambda *_: iter([("way", torch.full((2, 2, 2), 0.25))])
    )
    caption = Caption("red circle", ["red", "circle"], [0.0, 0.0], 0.0, 0.0, [1, 2])
    captioner = MagicMock(preprocessing=PreprocessConfig(image_size=24, resize_to=32))
    captioner.preprocess.return_value = torch.zeros(3, 24, 24)
    captioner.caption_tensors.return_value = [[caption]]
    captioner.tokenizer.decode.return_value = ""
    measure(captioner, MagicMock(), [Row("1", "1.png", ("x",), "val", scene=SCENE)])
    assert [given[3] for given in judged] == [(0.125, 0.125, 0.875, 0.875)]


def test_the_layer_that_points_best_is_chosen():
    """Of three layers the second looks at the circle; the mean of all looks elsewhere."""
    captioner = MagicMock(preprocessing=PreprocessConfig(96), map_layers=[2])
    captioner.config = {"model": {"decoder": {"layers": 3}}}
    captioner.decoding, captioner.tokenizer.tasks = {}, {}
    captioner.decoder.max_positions = 16
    captioner.tokenizer.encode.side_effect = str.split
    captioner.tokenizer.pieces.side_effect = lambda ids: ids

    def maps(memory, ids, prompts):
        assert prompts == [[]]
        cell = 0 if captioner.map_layers == [1] else 3
        map_gg = torch.zeros(4, 4)
        map_gg[cell, cell] = 1.0
        return [map_gg.expand(len(caption), 4, 4) for caption in ids]

    captioner.attention_memory.side_effect = maps

    def chosen(rows):
        choice = LayerChoice(captioner)
        choice.add(rows, torch.zeros(1, 17, 8))
        return choice.best()

    rows = [Row("1", "1.png", ("a red circle",), "val", scene=SCENE)]
    assert chosen(rows) == ([1], 1.0)
    assert captioner.map_layers == [2]
    rows = [Row("1", "1.png", ("a red star",), "val", scene=SCENE)]
    assert chosen(rows) == ([0, 1, 2], 1.0)  # all, if none is better


def test_a_run_on_scenes_chooses_its_maps(tiny_data, tmp_path, monkeypatch):
    """Stored in the checkpoint, inherited by what is fine-tuned from it on photos without truth."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    rows = [dataclasses.replace(row, scene={**SCENE, "size": [40, 30]}) for row in manifest.rows]
    write_manifest(tmp_path / "squares", "squares", rows, manifest.image_root, [])
    decoder = {**TINY["decoder"], "layers": 2}
    config = config_of(tmp_path / "c.yaml", data="squares", decoder=decoder)
    train(config, read_manifest(tmp_path / "squares"), tmp_path / "run")
    chosen = json.loads((tmp_path / "run/config.json").read_text())["word_maps"]
    assert chosen["layers"] and 0 <= chosen["pointing"] <= 1

    model, settings, tokenizer = load_model(tmp_path / "run")
    image, ids = torch.randn(3, 32, 32), tokenizer.encode("a square")
    maps = {}
    for layers in ([0], [1], [0, 1]):
        settings["word_maps"] = {"layers": layers}
        for decoder in (model.decoder, script_decoder(model.decoder)):
            captioner = Captioner(model.encoder, decoder, tokenizer, settings)
            found = captioner.attention(image, ids)
            torch.testing.assert_close(maps.setdefault(str(layers), found), found)
    with torch.inference_mode():
        begin = torch.tensor([[tokenizer.begin_id, *ids[:-1]]])
        mask = torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril()
        memory = model.encoder(image[None])
        weights = model.decoder.attention(begin, torch.arange(len(ids))[None], mask, memory)
    by_layer = weights[:, 0].mean(1)[..., 1:]
    for layer in (0, 1):
        expected = by_layer[layer] / by_layer[layer].sum(-1, keepdim=True)
        torch.testing.assert_close(maps[f"[{layer}]"].flatten(1), expected)
    assert not torch.equal(maps["[0]"], maps["[0, 1]"])

    tuned = dataclasses.replace(config, start=str(tmp_path / "run"), data=str(tiny_data))
    train(tuned, manifest, tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned/config.json").read_text())["word_maps"] == chosen


def test_ways_keep_weights_that_sum_to_one():
    weights = torch.rand(2, 3, 5, 17).softmax(-1)
    mixed = torch.rand(17, 17).softmax(-1)
    found = dict(ways(weights, mixed))
    assert len(found) == 2 * (1 + 2 * (1 + 3))
    for weights_QP in found.values():
        assert weights_QP.sum(-1).allclose(torch.ones(5), atol=1e-5)
    assert found["layer 2"].allclose(weights[1].mean(0))
    assert found["layer 1 head 3, rolled out"].allclose(weights[0, 2] @ mixed)


def test_the_rollout_is_of_the_encoders_own_attention():
    """Without a residual path's half it would be the plain attention of the only layer."""
    torch.manual_seed(0)
    config = EncoderConfig(width=16, layers=1, heads=2, mlp_width=32, image_size=16, patch_size=4)
    encoder = Encoder(config).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        memory, mixed = rollout(encoder, images)
        assert memory.allclose(encoder(images))
        block = encoder.blocks[0]
        x = encoder.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([encoder.prefix.expand(2, -1, -1), x], dim=1) + encoder.positions
        reference = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        reference.in_proj_weight = block.attention.qkv.weight
        reference.in_proj_bias = block.attention.qkv.bias
        given = block.norm1(x)
        _, weights = reference.eval()(given, given, given)
    assert mixed.allclose((weights + torch.eye(17)) / 2, atol=1e-5)


def test_the_command_prints_every_way(tiny_data, tmp_path, monkeypatch):
    """On pictures that are one square of any colour, whatever is said of a square points at it."""
    monkeypatch.chdir(tmp_path)
    stage = {"name": "a", "epochs": 12, "batch_photos": 4, "encoder_lr": 3e-3, "decoder_lr": 3e-3}
    config = config_of(tmp_path / "named.yaml", stages=[{**stage, "ema": 0.5}])
    train(config, read_manifest(tiny_data), tmp_path / "named")
    manifest = read_manifest(tiny_data)
    square = {**CIRCLE, "shape": "square", "box": [0, 0, 40, 30]}
    objects = [{**square, "colour": colour} for colour in ("red", "green", "blue", "yellow")]
    scene = {**SCENE, "size": [40, 30], "objects": objects}
    rows = [dataclasses.replace(row, scene=scene) for row in manifest.split("val")]
    write_manifest(tmp_path / "squares", "squares", rows, manifest.image_root, [])
    done = run_program(
        "training.grounding", "--checkpoint", "named", "--data", str(tmp_path / "squares"),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, _, *table = done.stdout.splitlines()
    assert "words that name a shape (0 more" in first
    assert len(table) == 2 * 2 * (1 + 1 * (1 + 2))
    assert all("100.0%" in line for line in table)


def test_photos_without_truth_are_refused(tiny_run, tiny_data, tmp_path):
    checkpoint = str(tiny_run / "build/checkpoints/tiny")
    done = run_program(
        "training.grounding", "--checkpoint", checkpoint, "--data", str(tiny_data), cwd=tmp_path
    )
    assert done.returncode == 2 and "no drawn truth" in done.stderr.splitlines()[-1]
