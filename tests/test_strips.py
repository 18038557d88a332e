"""Residual blocks in strips: the same numbers as in one piece, in less memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vqvae import PeakBytes

import engine.strips as strips
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig, ResBlock


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """Strips of 8 rows, for maps of 32 rows and more."""
    monkeypatch.setattr(strips, "STRIP", 32 * 8 * 32)


def pair(**changes) -> tuple[ChameleonVQVAE, ChameleonVQVAE]:
    """The same model plain and in strips."""
    torch.manual_seed(0)
    config = dict(embed_dim=16, num_embeddings=32, latent_channels=16, resolution=64,
                  base_channels=32, channel_multiplier=(1, 2), num_res_blocks=1)
    plain = ChameleonVQVAE(ChameleonVQVAEConfig(**(config | changes))).eval()
    for name, p in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    torch.nn.init.normal_(plain.quantize.embedding.weight)
    return plain, strips.in_strips(copy.deepcopy(plain))


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), H=st.integers(20, 40), W=st.sampled_from([24, 32, 40]),
       outputs=st.sampled_from([32, 64]))
def test_a_block_gives_the_same_whole_and_in_strips(B, H, W, outputs):
    strips.STRIP = 32 * 8 * 8
    torch.manual_seed(H)
    block = ResBlock(32, outputs, dropout=0.0).eval()
    x = torch.randn(B, 32, H, W).contiguous(memory_format=torch.channels_last) * 2 + 1
    with torch.no_grad():
        expected = block(x)
        block.__class__ = strips.ResBlockInStrips
        given = x.clone()
        torch.testing.assert_close(block(given), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(given, x) == (outputs != 32)  # so it did run in strips, over its input


def test_pictures_get_the_same_codes_and_codes_the_same_pictures():
    plain, lean = pair()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    codes = plain.encode(pixels)
    assert torch.equal(lean.encode(pixels), codes)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double().decode(codes)  # fp32's own error is above 1e-5 here
        assert (lean.decode(codes) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_the_norm_is_as_exact_as_fp32_can_be():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 64, eps=1e-6)
    x = (torch.randn(1, 64, 64, 64) + 3).contiguous(memory_format=torch.channels_last)
    scale, shift = strips.scale_and_shift(norm, x)
    with torch.no_grad():
        exact = copy.deepcopy(norm).double()(x.double())
    assert (torch.addcmul(shift, x, scale) - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_strips_hold_fewer_bytes(way):
    plain, lean = pair(channel_multiplier=(1,), resolution=128, attn_type="none")
    inputs = (torch.rand(1, 3, 128, 128) if way == "encode"
              else torch.zeros(1, 128 * 128, dtype=torch.long))
    peaks = []
    for model in (plain, lean):
        with torch.no_grad(), PeakBytes() as memory:
            getattr(model, way)(inputs)
        peaks.append(memory.peak)
    assert peaks[1] < 0.8 * peaks[0]


def test_training_and_other_dtypes_go_through_the_plain_block():
    plain, lean = pair()
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    before = pixels.clone()
    for model in (plain.train(), lean.train()):
        model(pixels)[1].total.backward()
    for (name, p), q in zip(plain.named_parameters(), lean.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert torch.equal(pixels, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = lean.eval().encode(pixels)
        assert lean.decode(codes).dtype == torch.bfloat16


def test_weights_and_names_stay():
    plain, lean = pair()
    assert list(plain.state_dict()) == list(lean.state_dict())
    assert sum(type(m) is strips.ResBlockInStrips for m in lean.modules()) == sum(
        type(m) is ResBlock for m in plain.modules()) > 0
