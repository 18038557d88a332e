"""Weights in 8 and 4 bits: errors within their bounds, and everything else untouched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import batch_with_pictures
from test_checkpoint import small_model

from engine.quantize import KINDS, Int4Linear, Int8Linear, quantize_model

kinds = st.sampled_from(list(KINDS))


def layer_and_twin(kind: str, inputs: int, outputs: int, seed: int, bias: bool, dtype):
    g = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=g) * 0.1)
    twin = quantize_model(torch.nn.Sequential(layer.to(dtype)), kind)[0]
    return layer, twin, torch.randn(3, 5, inputs, generator=g).to(dtype)


@settings(max_examples=40, deadline=None)
@given(kind=kinds, groups=st.integers(1, 5), outputs=st.integers(1, 40), seed=st.integers(0, 999))
def test_no_weight_moves_farther_than_half_a_step(kind, groups, outputs, seed):
    weight = torch.randn(outputs, 32 * groups, generator=torch.Generator().manual_seed(seed))
    twin = quantize_model(torch.nn.Sequential(torch.nn.Linear(32 * groups, outputs)), kind)[0]
    for name, tensor in KINDS[kind].pack(weight).items():
        setattr(twin, name, tensor)
    error = (twin.unpacked() - weight).abs()
    if kind == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    else:  # one step, since a value may lie opposite the largest, where 7 is the end
        step = twin.scale.float().abs().repeat_interleave(twin.group, dim=1)
        assert (error <= step * 1.02).all()  # the scale itself is rounded to bf16
        assert (error <= step * 0.51).float().mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(kind=kinds, rows=st.sampled_from([1, 3, 40]), bias=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 999))
def test_the_layer_computes_with_exactly_its_own_weights(kind, rows, bias, dtype, seed):
    """Whatever kernel is taken, the result is that of a float layer with the unpacked weights."""
    layer, twin, _ = layer_and_twin(kind, 64, 48, seed, bias, dtype)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        y = twin(x).float()
        expected = torch.nn.functional.linear(x.float(), twin.unpacked(),
                                              layer.bias.float() if bias else None)
    assert y.dtype == torch.float32 and twin(x).dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (y - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind, bound", [("int8", 0.012), ("int4", 0.16)])
def test_a_layers_error_is_as_the_essay_says(kind, bound):
    layer, twin, x = layer_and_twin(kind, 1024, 512, 0, False, torch.float32)
    with torch.no_grad():
        error = (twin(x) - layer(x)).norm() / layer(x).norm()
    assert bound / 3 < error < bound


@pytest.mark.parametrize("kind", KINDS)
def test_vqvae_norms_and_embeddings_stay_and_all_linear_layers_go(kind):
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize_model(model, kind)
    assert not [m for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and "vqmodel" not in n]
    assert sum(isinstance(m, KINDS[kind]) for m in model.modules()) == 3 * 7 + 1
    left = dict(model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in left.items())
    gone = {name for name in before if name not in left}
    assert all(".self_attn." in n or ".mlp." in n or n == "lm_head.weight" for n in gone)


@pytest.mark.parametrize("kind, tolerance", [("int8", 0.04), ("int4", 0.5)])
def test_logits_stay_close(kind, tolerance):
    model = small_model()
    inputs = batch_with_pictures()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs, mask_image_logits=False).logits[real]
        after = quantize_model(model, kind)(**inputs, mask_image_logits=False).logits[real]
    assert 0 < (after - before).norm() / before.norm() < tolerance


@pytest.mark.parametrize("kind, share", [("int8", 0.52), ("int4", 0.30)])
def test_the_bytes_shrink_as_promised(kind, share):
    layer, twin, _ = layer_and_twin(kind, 1024, 256, 0, False, torch.bfloat16)
    stored = sum(t.nbytes for t in twin.state_dict().values())
    assert stored < share * layer.weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_some_rows_gives_those_rows(kind):
    _, twin, x = layer_and_twin(kind, 64, 48, 0, True, torch.float32)
    index = torch.tensor([5, 0, 47])
    with torch.no_grad():
        torch.testing.assert_close(twin.rows(index)(x), twin(x)[..., index], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_quantized_is_refused_before_any_change():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(48, 64))
    with pytest.raises(ValueError, match="multiples of 32, not 48"):
        quantize_model(model, "int4")
    with pytest.raises(ValueError, match="'int3' is none of int8, int4"):
        quantize_model(model, "int3")
    assert isinstance(model[0], torch.nn.Linear)


def test_rows_of_zeros_survive():
    for layer in (Int8Linear, Int4Linear):
        twin = layer(32, 4, False)
        for name, tensor in layer.pack(torch.zeros(4, 32)).items():
            setattr(twin, name, tensor)
        assert torch.equal(twin(torch.randn(2, 32)), torch.zeros(2, 4))
