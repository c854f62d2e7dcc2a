"""The model against torch.nn and itself: cached against uncached, scripted against eager."""

import pytest
import torch
from torch import nn

from export.torchscript import script_decoder
from handler.errors import UserError
from training.model import (
    CaptioningModel,
    DecoderConfig,
    Dropout,
    Encoder,
    EncoderConfig,
    Mlp,
    interpolate_positions,
)

ENCODER = EncoderConfig(width=32, layers=2, heads=2, mlp_width=64, image_size=32, patch_size=8)
DECODER = DecoderConfig(
    vocab_size=50, max_positions=12, width=32, layers=2, heads=2, mlp_width=64, memory_width=32
)


@pytest.fixture(scope="module")
def model() -> CaptioningModel:
    torch.manual_seed(0)
    return CaptioningModel(ENCODER, DECODER).eval()


def test_encoder_blocks_are_those_of_torch_nn():
    torch.manual_seed(0)
    ours = Encoder(ENCODER).eval()
    theirs = nn.TransformerEncoderLayer(
        32, 2, 64, dropout=0.0, activation="gelu", norm_first=True, batch_first=True,
        layer_norm_eps=1e-6,
    ).eval()  # fmt: skip
    block = ours.blocks[0]
    theirs.self_attn.in_proj_weight.data = block.attention.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = block.attention.qkv.bias.data
    theirs.self_attn.out_proj.load_state_dict(block.attention.out.state_dict())
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.down.state_dict())
    theirs.norm1.load_state_dict(block.norm1.state_dict())
    theirs.norm2.load_state_dict(block.norm2.state_dict())
    x = torch.randn(3, 17, 32)
    torch.testing.assert_close(block(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_shapes_at_the_sizes_of_vit_base():
    encoder = Encoder(EncoderConfig(width=768, layers=1, heads=12, mlp_width=8, prefix_tokens=0))
    assert encoder(torch.zeros(2, 3, 224, 224)).shape == (2, 196, 768)


@pytest.mark.parametrize("scripted", [False, True])
def test_cached_steps_are_the_parallel_pass(model, scripted):
    """Two beams of a photo, token by token, against teacher forcing of both sequences at once."""
    decoder = script_decoder(model.decoder) if scripted else model.decoder
    images = torch.randn(3, 3, 32, 32)
    memory = model.encoder(images)
    length, beams = 6, 2
    tokens = torch.randint(50, (3, length, beams))
    # Packed one caption after the other.
    packed = tokens.transpose(1, 2).flatten(1)
    positions = torch.arange(length).repeat(beams).expand(3, -1)
    segment = torch.arange(beams).repeat_interleave(length)
    mask = (segment[:, None] == segment[None]).tril().expand(3, -1, -1)
    expected = model.decoder(packed, positions, mask, memory).unflatten(1, (beams, length))
    cross, cache = decoder.begin(memory), decoder.new_cache(3, length * beams)
    own = torch.eye(beams, dtype=torch.bool).expand(3, -1, -1)
    for t in range(length):
        at = torch.full((3, beams), t)
        logits = decoder.step(tokens[:, t], at, own.repeat(1, 1, t + 1), cache, t * beams, cross)
        torch.testing.assert_close(logits, expected[:, :, t], atol=1e-5, rtol=1e-4)


def test_padding_is_left_out_of_the_layers_and_changes_nothing(model):
    """Captions of two lengths: hidden states of the real tokens, and all gradients, are those of
    the pass over padding and all."""
    memory = model.encoder(torch.randn(2, 3, 32, 32)).detach()
    tokens, positions = torch.randint(50, (2, 8)), torch.arange(8).expand(2, -1)
    real = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    mask = (real[:, :, None] == real[:, None]).tril()

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        logits.logsumexp(-1).sin().sum().backward()
        return [parameter.grad.clone() for parameter in model.decoder.parameters()]

    whole = model.decoder(tokens, positions, mask, memory)[real]
    run_through, count = [], lambda _, arguments, __: run_through.append(arguments[0].shape)
    hook = model.decoder.blocks[0].mlp.register_forward_hook(count)
    part = model.decoder.head(model.decoder.hidden(tokens, positions, mask, memory, real))
    hook.remove()
    assert run_through == [(13, 32)]
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
    for one, other in zip(gradients(part), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_dropout_drops_its_share_anywhere_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout = Dropout(0.2)
    x = torch.ones(1000, 1000, requires_grad=True)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1.25], rel=1e-4)
    for axis in (0, 1):  # no place is dropped more often than another
        shares = (dropped == 0).float().mean(axis)
        assert shares.min() > 0.13 and shares.max() < 0.27
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=2e-3)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert dropout(torch.ones(3)).shape == (3,)
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_attention_sums_to_one_and_changes_nothing(model):
    tokens = torch.randint(50, (1, 5))
    positions, mask = torch.arange(5)[None], torch.ones(1, 5, 5, dtype=torch.bool).tril()
    weights = model.decoder.attention(
        tokens, positions, mask, model.encoder(torch.randn(1, 3, 32, 32))
    )
    assert weights.shape == (2, 1, 2, 5, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 2, 5))


def test_positions_are_interpolated_but_the_class_token_is_not():
    positions = torch.randn(1, 1 + 16, 8)
    grown = interpolate_positions(positions, prefix=1, grid=6)
    assert grown.shape == (1, 37, 8)
    assert torch.equal(grown[:, 0], positions[:, 0])
    assert interpolate_positions(positions, prefix=1, grid=4) is positions


def test_a_misspelt_activation_is_refused():
    """It was the identity: the config's check was all that stood before it."""
    with pytest.raises(UserError, match="decoder.activation 'gleu'"):
        DecoderConfig(50, 12, 32, 1, 2, 8, 32, activation="gleu")
    with pytest.raises(KeyError, match="gleu"):
        Mlp(8, 8, "gleu")


def test_contradictions_are_refused_by_name():
    with pytest.raises(UserError, match="encoder.image_size 30"):
        EncoderConfig(width=32, layers=1, heads=2, mlp_width=8, image_size=30, patch_size=8)
    with pytest.raises(UserError, match="decoder.width 33"):
        DecoderConfig(50, 12, 33, 1, 2, 8, 32)
    with pytest.raises(UserError, match="memory_width"):
        CaptioningModel(ENCODER, DecoderConfig(50, 12, 32, 1, 2, 8, 48))
