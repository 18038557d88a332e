"""What is compiled is what was meant: any padding, column and few rows, by the real compiler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import V, left_padded, needs_compiler, small_model

from chameleon import KVCache
from chameleon_extras import decoding
from chameleon_extras.decoding import (
    Decoder,
    compile_step,
    copy_of,
    four_bit_sums,
    row_sums,
    set_attention,
)
from chameleon_extras.quantize import quantize_model
from generate import CACHE_STEP, stream

ROWS = (1, 2, 3)
SIZES = dict(num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=CACHE_STEP)
pytestmark = needs_compiler
SLOW_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.slow)  # test_decoding.py has one row


@pytest.fixture(scope="module", params=[torch.float32, SLOW_BF16], ids=str)
def decoder(request):
    """One compiled block for the whole file: a shape for each number of rows."""
    torch._dynamo.reset()
    yield Decoder(small_model(**SIZES).to(request.param), compiled=True)
    torch._dynamo.reset()


@st.composite
def moments(draw):
    """A cache filled to any column, any of its columns masked, and one more id for each row."""
    B, column = draw(st.sampled_from(ROWS)), draw(st.integers(1, CACHE_STEP - 1))
    seed, hidden = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, CACHE_STEP, dtype=torch.long)
    mask[:, :column] = torch.rand(B, column, generator=g) >= hidden  # even a row of padding alone
    mask[:, column] = torch.rand(B, generator=g) < 0.8  # a guidance stream may skip the new one
    padded = draw(st.booleans()) or hidden > 0
    return B, column, mask if padded else None, g


@settings(max_examples=60, deadline=None)
@given(moment=moments())
@torch.inference_mode()
def test_a_compiled_step_is_the_eager_models_for_any_mask_and_column(decoder, moment):
    B, column, mask, g = moment
    model, dtype = decoder.model, decoder.model.dtype
    caches = decoder.new_cache(B, CACHE_STEP), KVCache(model.config, B, CACHE_STEP, dtype)
    mine, theirs = ([x[:, :, :CACHE_STEP] for x in (*cache.k, *cache.v)] for cache in caches)
    for a, b in zip(mine, theirs):
        b.copy_(a.copy_(torch.randn(a.shape, generator=g)))  # behind the column: old numbers
    for cache in caches:
        cache.length = column
    new, positions, seen = torch.randint(74, V, (B, 1), generator=g), None, None
    if mask is not None:
        seen = mask[:, : column + 1]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -1:]  # (B, 1)
    compiled = decoder(new, seen, positions, caches[0]).float()  # (B, D)
    set_attention(model, "eager")
    plain = model.model(new, attention_mask=seen, position_ids=positions,
                        past_key_values=caches[1]).last_hidden_state[:, -1].float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    assert (compiled - plain).norm() <= tolerance * plain.norm()
    assert caches[0].length == caches[1].length == column + 1
    for a, b in zip(mine, theirs):
        x, y = (c[:, :, column].float() for c in (a, b))
        assert (x - y).norm() <= tolerance * y.norm()
        a[:, :, column] = b[:, :, column]
        assert torch.equal(a, b)  # no other column is touched


@pytest.mark.parametrize("decoder", [torch.float32], indirect=True, ids=str)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=len(ROWS)),
       seed=st.integers(0, 10**6), sampled=st.booleans())
def test_ids_of_any_batch_are_those_without_a_decoder(decoder, lengths, seed, sampled):
    """In fp32: in bf16 two ids may be equally good."""
    g = torch.Generator().manual_seed(seed)
    inputs = left_padded([torch.randint(74, V, (n,), generator=g).tolist() for n in lengths])
    options = dict(max_new_tokens=12, eos_token_id=[80, 90], do_sample=sampled, seed=seed)
    fast = torch.stack(list(stream(decoder.model, **inputs, **options, decoder=decoder)), 1)
    set_attention(decoder.model, "sdpa")
    plain = torch.stack(list(stream(decoder.model, **inputs, **options, decoder=False)), 1)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("decoder", [torch.float32], indirect=True, ids=str)
def test_two_conversations_share_a_decoder_and_each_goes_on_from_its_own_cache(decoder):
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(74, V, (1, 9), generator=g) for _ in range(2)]
    caches = [KVCache(decoder.model.config) for _ in rows]
    for _ in range(3):
        for n, (ids, cache) in enumerate(zip(rows, caches)):
            options = dict(max_new_tokens=6, eos_token_id=[])
            made = list(stream(decoder.model, ids, past_key_values=cache, decoder=decoder,
                               **options))
            set_attention(decoder.model, "sdpa")
            assert torch.equal(torch.stack(made), torch.stack(list(
                stream(decoder.model, ids, **options, decoder=False))))
            assert cache.length == ids.shape[1] + 5  # all but the last id
            new = torch.randint(74, V, (1, 5), generator=g)
            rows[n] = torch.cat((ids, torch.stack(made, dim=1), new), dim=1)


@pytest.mark.parametrize("avx512", [True, False])
def test_the_compiled_loop_has_neither_exact_sums_nor_loads_by_way_of_memory(avx512, monkeypatch):
    """The first would make int8 steps of the 7B 1.4 times as slow, the second ten times."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(decoding, "AVX512", avx512)
    weight = torch.randint(-128, 128, (8, 11008), dtype=torch.int8)
    loop = compile_step(copy_of(row_sums), torch.device("cpu"))
    sums, (code,) = run_and_get_code(loop, weight, torch.ones(1, 11008))
    assert torch.equal(sums, weight.sum(1).float()[None])
    assert "cascade" not in code and (avx512 or "Vectorized<int8_t>" not in code)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_the_compiled_loop_over_4_bit_weights_gives_the_layers_product(kind):
    """Only CUDA uses this loop; here torch writes it for the CPU."""
    torch.manual_seed(0)
    layer = quantize_model(torch.nn.Sequential(torch.nn.Linear(320, 48, bias=False)), kind)[0]
    layer.prepare(1, torch.float32)
    loop = compile_step(lambda layer, rows: four_bit_sums(layer, rows), torch.device("cpu"))
    rows = torch.randn(2, 320)
    torch.testing.assert_close(loop(layer, rows), rows @ layer.unpacked().mT, atol=1e-5, rtol=1e-5)
