"""The model against torch.nn and itself: cached against uncached, scripted against eager."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from export.precision import in_precision
from export.torchscript import script_decoder, trace_encoder
from handler.captioner import prepare_script
from handler.errors import UserError
from training.loop.optimizer import set_checkpointing
from training.model import (
    CaptioningModel,
    Decoder,
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
BERT = {"norm": "post", "embedding_norm": True, "head_bias": True, "head_transform": True}
GIT = {"norm": "post", "embedding_norm": True, "head_bias": True, "tied_head": False}
BART = {"norm": "post", "embedding_norm": True, "prompt_ids": (7, 8, 9)}
BART |= {"prompt_layers": 2, "prompt_heads": 4, "prompt_mlp_width": 48, "max_positions": 40}
FAMILIES = {"gpt2": {}, "bert": BERT, "git": {**GIT, "memory": "prefix"}, "bart": BART}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> CaptioningModel:
    torch.manual_seed(0)
    made = CaptioningModel(ENCODER, replace(DECODER, **FAMILIES[request.param])).eval()
    for parameter in made.decoder.parameters():  # so that no norm, bias or layer is without effect
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


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
    photo, cache = decoder.begin(memory), decoder.new_cache(3, length * beams)
    own = torch.eye(beams, dtype=torch.bool).expand(3, -1, -1)
    for t in range(length):
        at = torch.full((3, beams), t)
        logits = decoder.step(tokens[:, t], at, own.repeat(1, 1, t + 1), cache, t * beams, photo)
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
    *prefix, text = run_through
    assert text == (13, 32) and len(prefix) == (model.decoder_config.memory == "prefix")
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
    for one, other in zip(gradients(part), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_no_gradient(model):
    tokens, positions = torch.randint(50, (2, 8)), torch.arange(8).expand(2, -1)
    mask = torch.ones(2, 8, 8, dtype=torch.bool).tril()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        set_checkpointing(model, checkpointing)
        model(images, tokens, positions, mask).logsumexp(-1).sin().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    set_checkpointing(model, False)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


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


def test_a_prefix_is_the_photo_before_the_text():
    """Against torch's own layers of BERT over image tokens and text at once: image tokens see each
    other, text sees the photo and what came before it."""
    torch.manual_seed(0)
    decoder = Decoder(replace(DECODER, **FAMILIES["git"])).eval()
    memory, tokens = torch.randn(2, 17, 32), torch.randint(50, (2, 6))
    x = decoder.token_embedding(tokens) + decoder.position_embedding(torch.arange(6))
    x = torch.cat([memory, decoder.embedding_norm(x)], dim=1)
    hidden = torch.ones(23, 23, dtype=torch.bool).triu(1)  # True: not seen
    hidden[:17, :17] = False
    for block in decoder.blocks:
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=1e-5
        ).eval()
        layer.self_attn.in_proj_weight.data = block.self_attention.qkv.weight.data
        layer.self_attn.in_proj_bias.data = block.self_attention.qkv.bias.data
        layer.self_attn.out_proj.load_state_dict(block.self_attention.out.state_dict())
        layer.linear1.load_state_dict(block.mlp.up.state_dict())
        layer.linear2.load_state_dict(block.mlp.down.state_dict())
        layer.norm1.load_state_dict(block.post_norm1.state_dict())
        layer.norm2.load_state_dict(block.post_norm3.state_dict())
        x = layer(x, src_mask=hidden)
    expected = decoder.head(x[:, 17:])
    mask = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    found = decoder(tokens, torch.arange(6).expand(2, -1), mask, memory)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_every_family_is_exported_in_every_precision(model, precision):
    """All linear layers replaced, scripted, packed and frozen: near the eager logits."""
    changed = in_precision(model, precision, precision)
    assert not [m for m in changed.modules() if isinstance(m, nn.Linear)]
    decoder = prepare_script(script_decoder(changed.decoder), "cpu")
    memory, tokens = torch.randn(2, 17, 32), torch.randint(50, (2, 1))
    positions, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, 1, dtype=torch.bool)
    pair = []
    for one in (decoder, model.decoder):
        cache = one.new_cache(2, 3)
        with torch.inference_mode():
            pair.append(one.step(tokens, positions, mask, cache, 0, one.begin(memory)))
    difference = (pair[0] - pair[1]).abs().max() / pair[1].abs().max()
    assert difference < {"fp32": 1e-5, "bf16": 0.05, "int8": 0.1}[precision]


def test_a_convolutional_stem_makes_a_token_of_each_patch():
    """Traced as an export does; a patch changes its own token, and those beside it alone."""
    config = replace(ENCODER, image_size=64, patch_size=16, stem="convolutional")
    encoder = Encoder(config).eval()
    images = torch.randn(2, 3, 64, 64)
    traced = trace_encoder(encoder, 64)
    with torch.inference_mode():
        memory = encoder(images)
        assert memory.shape == (2, 17, 32)
        torch.testing.assert_close(traced(images), memory)
        tokens = encoder.patch_embed(images)
        assert tokens.shape == (2, 32, 4, 4) and 0.3 < tokens.std() < 3
        images[:, :, :16, :16] = 0
        changed = (encoder.patch_embed(images) != tokens).any(1)[0]
    assert changed[0, 0] and not changed[2:].any() and not changed[:, 2:].any()


def test_positions_are_in_the_memory_where_wanted():
    """Without them the demo's decoder learnt no relations and no positions in all its
    steps: blocks from scratch soon drown where a patch is."""
    torch.manual_seed(3)
    encoder = Encoder(replace(ENCODER, memory_positions=True)).eval()
    plain = Encoder(ENCODER).eval()
    plain.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(images), plain(images) + plain.positions)
    with pytest.raises(UserError, match="memory_positions needs encoder.prefix_positions"):
        replace(ENCODER, memory_positions=True, prefix_positions=False)


def test_attention_sums_to_one_and_changes_nothing(model):
    tokens = torch.randint(50, (1, 5))
    positions, mask = torch.arange(5)[None], torch.ones(1, 5, 5, dtype=torch.bool).tril()
    memory = model.encoder(torch.randn(1, 3, 32, 32))
    for decoder in (model.decoder, script_decoder(model.decoder)):
        weights = decoder.attention(tokens, positions, mask, memory)
        assert weights.shape == (2, 1, 2, 5, 17)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 2, 5))
        assert weights.std() > 1e-3  # it looks somewhere


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
    with pytest.raises(UserError, match="memory_width 48 is not the encoder's, 32"):
        CaptioningModel(ENCODER, DecoderConfig(50, 12, 32, 1, 2, 8, 48))
    for field, value in {"norm": "both", "memory": "none", "memory_width": 48}.items():
        with pytest.raises(UserError, match=f"decoder.{field}"):
            replace(DECODER, **{"memory": "prefix", field: value})
