"""The VQ-VAE: shapes for any size, nearest codes, where each gradient flows. Oracle equality is in
test_oracle.py."""

import dataclasses
import math
import threading
import types
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig, VectorQuantizer, setting

SMALL = dict(embed_dim=8, num_embeddings=32, latent_channels=16, resolution=32, base_channels=32,
             channel_multiplier=(1, 2), num_res_blocks=1)


def small_vqvae(**changes) -> ChameleonVQVAE:
    torch.manual_seed(0)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**(SMALL | changes))).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def quantizer(K: int = 32, D: int = 8, **changes) -> VectorQuantizer:
    config = ChameleonVQVAEConfig(**(SMALL | dict(embed_dim=D, num_embeddings=K) | changes))
    q = VectorQuantizer(config)
    torch.nn.init.normal_(q.embedding.weight)
    return q


def test_the_released_sizes_have_the_published_parameter_counts():
    with torch.device("meta"):
        model = ChameleonVQVAE(ChameleonVQVAEConfig())
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    reading = sum(count.values()) - count["decoder"]
    assert round(reading / 1e6, 1) == 29.4 and round(count["decoder"] / 1e6, 1) == 39.3
    assert model.config.codes_per_image == 1024  # 512 / 2^4 = 32, squared
    model.decoder.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == reading
    assert model.num_parameters(exclude_embeddings=True) == sum(count.values()) - 8192 * 256


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(2, 6), double=st.booleans())
def test_any_picture_becomes_a_grid_of_codes_and_comes_back(B, h, w, double):
    model = small_vqvae(double_latent=double)
    pixels = torch.rand(B, 3, 2 * h, 2 * w) * 2 - 1
    codes = model.encode(pixels)
    assert codes.shape == (B, h * w) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < SMALL["num_embeddings"]
    assert model.decode(codes, grid=(h, w)).shape == pixels.shape
    reconstruction, losses = model(pixels)
    assert reconstruction.shape == pixels.shape
    assert all(loss.shape == () for loss in losses)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), N=st.integers(1, 40), K=st.integers(1, 50), D=st.integers(1, 9))
def test_the_nearest_code_is_the_one_brute_force_finds(seed, N, K, D):
    torch.manual_seed(seed)
    q, z = quantizer(K, D), torch.randn(N, D)
    distances = (z[:, None] - q.embedding.weight[None]).square().sum(-1)  # (N, K)
    chosen = distances.gather(1, q.nearest(z)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-4, rtol=1e-4)


def test_equal_codes_give_the_first():
    q = quantizer(K=4, D=2)
    with torch.no_grad():
        q.embedding.weight.copy_(torch.tensor([[5.0, 5], [1, 1], [1, 1], [0, 9]]))
    assert q.nearest(torch.ones(3, 2)).tolist() == [1, 1, 1]


def test_codes_run_in_raster_order():
    """A picture lit in one place changes codes in that place only, counted row by row."""
    q = quantizer(K=2, D=2)
    with torch.no_grad():
        q.embedding.weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))
    z = torch.zeros(1, 2, 3, 4)
    z[:, :, 1, 2] = 1  # row 1, column 2 of a grid four wide
    _, codes, _ = q(z)
    assert codes[0].nonzero().flatten().tolist() == [1 * 4 + 2]


def test_encode_and_forward_and_decode_use_the_same_codes():
    model = small_vqvae()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        reconstruction, _ = model(pixels)
    torch.testing.assert_close(
        model.decode(model.encode(pixels)), reconstruction, atol=1e-4, rtol=1e-4
    )


def test_the_nearest_code_is_the_same_under_autocast():
    torch.manual_seed(0)
    quantize = VectorQuantizer(ChameleonVQVAEConfig(num_embeddings=512, embed_dim=64))
    torch.nn.init.normal_(quantize.embedding.weight)
    z = torch.randn(2000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantize.nearest(z)
    assert torch.equal(codes, quantize.nearest(z))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(1, 4), w=st.integers(1, 4))
def test_the_straight_through_gradient_is_the_identity(seed, h, w):
    torch.manual_seed(seed)
    q = quantizer()
    z = torch.randn(2, 8, h, w, requires_grad=True)
    upstream = torch.randn(2, 8, h, w)
    zq, codes, _ = q(z)
    zq.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert q.embedding.weight.grad is None  # the argmin passes nothing to the codebook
    e = q.embedding(codes).mT.view_as(z)
    torch.testing.assert_close(zq, e, atol=1e-6, rtol=1e-5)  # forward, it is the code vector


@settings(max_examples=20, deadline=None)
@given(beta=st.floats(0.0, 4.0), quirk=st.booleans())
def test_beta_scales_the_encoders_gradient_only_and_the_quirk_the_codebooks(beta, quirk):
    def gradients(beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        q = quantizer(beta=beta, beta_on_codebook=quirk)
        z = torch.randn(2, 8, 3, 3, requires_grad=True)
        q(z)[2].total.backward()
        return z.grad, q.embedding.weight.grad

    (z_one, e_one), (z_beta, e_beta) = gradients(1.0), gradients(beta)
    torch.testing.assert_close(z_beta, z_one * (1.0 if quirk else beta))
    torch.testing.assert_close(e_beta, e_one * (beta if quirk else 1.0))


def test_each_loss_moves_one_side_only():
    q = quantizer()
    z = torch.randn(1, 8, 2, 2, requires_grad=True)
    _, _, losses = q(z)
    assert torch.autograd.grad(losses.codebook, z, allow_unused=True, retain_graph=True) == (None,)
    weight = q.embedding.weight
    assert torch.autograd.grad(losses.commitment, weight, allow_unused=True) == (None,)


def test_perplexity_counts_codes_as_if_equally_used():
    q = quantizer(K=8, D=1)
    with torch.no_grad():
        q.embedding.weight.copy_(torch.arange(8.0)[:, None])
    for used in (1, 2, 4, 8):
        z = torch.arange(8.0).remainder(used).view(1, 1, 2, 4)
        assert math.isclose(q(z)[2].perplexity.item(), used, rel_tol=1e-5)


def test_training_reaches_every_parameter_and_lowers_the_loss():
    torch.manual_seed(0)
    model = small_vqvae().train()
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    for _ in range(12):
        reconstruction, losses = model(pixels)
        loss = (reconstruction - pixels).square().mean() + losses.total
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_encoding_is_fp32_whatever_the_surroundings():
    model = small_vqvae(num_embeddings=2048)
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():  # a codebook as dense as the encoder's outputs: rounding changes codes
        model.quantize.embedding.weight.mul_(model.quant_conv(model.encoder(pixels)).std())
    codes = model.encode(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(pixels), codes)
        with torch.no_grad():
            rounded = model.quant_conv(model.encoder(pixels)).float()
    flat = rounded.permute(0, 2, 3, 1).flatten(0, 2)
    assert not torch.equal(model.quantize.nearest(flat).view_as(codes), codes)
    assert torch.equal(model.to(torch.bfloat16).encode(pixels), codes)  # the weights stay fp32
    model.quant_conv.to(torch.bfloat16)  # a part of it, on its own
    with pytest.raises(ValueError, match="bfloat16, which changes codes"):
        model.encode(pixels)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.add(storage)
        return out

    def add(self, storage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def test_encoding_holds_fewer_bytes_than_transformers():
    values = dict(resolution=64, base_channels=32, num_embeddings=16, embed_dim=16,
                  latent_channels=16)
    ours = ChameleonVQVAE(ChameleonVQVAEConfig(**values), with_decoder=False).eval()
    theirs = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**values)).eval()
    pixels = torch.rand(1, 3, 64, 64)
    peaks = []
    for model in (ours, theirs):
        with torch.no_grad(), PeakBytes() as memory:
            model.encode(pixels)
        peaks.append(memory.peak)
    one_map = 32 * 64 * 64 * 4  # bytes of a feature map at full resolution
    assert peaks[0] < 0.75 * peaks[1]
    assert peaks[0] < 3.6 * one_map  # the block's input, and one convolution's input and output


def test_a_model_without_decoder_says_so():
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**SMALL), with_decoder=False)
    codes = model.encode(torch.zeros(1, 3, 8, 8))
    for draws in (lambda: model.decode(codes), lambda: model(torch.zeros(1, 3, 8, 8))):
        with pytest.raises(ValueError, match="no VQ-VAE decoder"):
            draws()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_codes_are_whole_numbers_of_any_width(dtype):
    model, codes = small_vqvae(), torch.tensor([[0, 5, 31, 7]])
    assert torch.equal(model.decode(codes.to(dtype)), model.decode(codes))


@pytest.mark.parametrize("codes, grid, message", [
    (torch.zeros(1, 5, dtype=torch.long), None, "5 codes are not a 2 x 2 grid"),
    (torch.zeros(1, 0, dtype=torch.long), None, "0 codes are not a 0 x 0 grid"),
    (torch.zeros(1, 0, dtype=torch.long), (1, 0), "0 codes are not a 1 x 0 grid"),
    (torch.full((1, 4), 32), None, r"codes must lie in 0\.\.31"),
    (torch.full((1, 4), -1), None, r"codes must lie in 0\.\.31"),
    (torch.zeros(4, dtype=torch.long), None, r"codes must be \(B, S\)"),
    (torch.zeros(1, 4), None, "whole numbers, got torch.float32"),
])
def test_impossible_codes_are_refused(codes, grid, message):
    with pytest.raises(ValueError, match=message):
        small_vqvae().decode(codes, grid)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8), (1, 3, 8, 1)])
def test_what_is_no_batch_of_pictures_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        small_vqvae().encode(torch.zeros(shape))


@pytest.mark.parametrize("change, name", [
    (dict(base_channels=48), "base_channels"),
    (dict(num_embeddings=0), "num_embeddings"),
    (dict(embed_dim=2.5), "embed_dim"),
    (dict(channel_multiplier=()), "channel_multiplier"),
    (dict(resolution=31), "resolution"),
    (dict(dropout=1.0), "dropout"),
    (dict(dropout=float("nan")), "dropout"),
    (dict(num_res_blocks=10**6), "num_res_blocks"),
    (dict(base_channels=10**9), "base_channels"),
    (dict(channel_multiplier=5), "channel_multiplier"),
    (dict(channel_multiplier=[1, "2"]), "channel_multiplier"),
    (dict(attn_resolutions=["16"]), "attn_resolutions"),
    (dict(attn_type=1), "attn_type must be text or left out"),
    (dict(double_latent="no"), "double_latent must be true or false, without quotes, got 'no'"),
    (dict(beta=float("inf")), "beta"),
])
def test_an_impossible_config_names_its_field(change, name):
    with pytest.raises(ValueError, match=name):
        ChameleonVQVAEConfig(**(SMALL | change))


def test_the_config_survives_a_dict_and_ignores_unknown_keys():
    config = ChameleonVQVAEConfig(**SMALL, attn_resolutions=[16])
    assert ChameleonVQVAEConfig.from_dict(config.to_dict() | {"ch_mult": [1]}) == config


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_exact_convolutions_leave_the_callers_precision_as_it_was(precision):
    """Also after the caller has used torch's newer settings, which forbid asking by the older."""
    conv, seen = torch.backends.cudnn.conv, []
    before, torch.backends.fp32_precision = torch.backends.fp32_precision, precision

    def inside():
        with setting(conv, "fp32_precision", "ieee"):
            seen.append(conv.fp32_precision)

    try:
        outside, other = conv.fp32_precision, threading.Thread(target=inside)
        with setting(conv, "fp32_precision", "ieee"):
            other.start()
            other.join(0.2)  # it waits, or it would find and leave what this one has set
            assert not seen and conv.fp32_precision == "ieee"
        other.join()
        with pytest.raises(KeyError), setting(conv, "fp32_precision", "ieee"):
            raise KeyError
        assert seen == ["ieee"] and conv.fp32_precision == outside
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_see_what_each_layer_has_computed(gradients):
    vq, pixels, seen = ChameleonVQVAE(ChameleonVQVAEConfig(**SMALL)), torch.rand(1, 3, 32, 32), []
    for module in vq.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm)):
            module.register_forward_hook(lambda m, x, y: seen.append((m, x[0], y)))
            module.register_full_backward_hook(lambda *_: None)
    with torch.set_grad_enabled(gradients):
        reconstruction, losses = vq(pixels)
    for module, x, y in seen:
        torch.testing.assert_close(module.forward(x.detach()), y, atol=1e-4, rtol=0)
    if gradients:
        (reconstruction.sum() + losses.total).backward()


def test_dropout_waits_for_training():
    vq = ChameleonVQVAE(ChameleonVQVAEConfig(**SMALL, dropout=0.5))
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert not vq.training and torch.equal(vq.encode(pixels), vq.encode(pixels))


def test_the_weights_are_fp32_whatever_torchs_default_is():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = small_vqvae()
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 64)
    model.quantize.embedding.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="computes inf or nan"):
        model.encode(torch.zeros(1, 3, 16, 16))


def test_a_config_may_have_fields_of_ones_own_and_one_of_another_class_is_named():
    @dataclasses.dataclass
    class Mine(ChameleonVQVAEConfig):
        decay: float = 0.99
        name: str | None = None

    assert ChameleonVQVAE(Mine(**SMALL, decay=0.9)).config.decay == 0.9
    with pytest.raises(ValueError, match="resolution must be"):
        Mine(resolution=-1)
    with pytest.raises(ValueError, match="wanted, not a SimpleNamespace of types$"):
        ChameleonVQVAE(types.SimpleNamespace(**SMALL))


def test_the_decoder_can_be_exported():
    model = small_vqvae()
    codes = model.encode(torch.rand(2, 3, 16, 16))

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vq = model

        def forward(self, codes):
            return self.vq.decode(codes)

    exported = torch.export.export(Decode(), (codes,)).module()
    torch.testing.assert_close(exported(codes), model.decode(codes))
