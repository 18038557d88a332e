"""Fast steps give the ids of the plain ones, compile once, and wait for nothing they need not."""

import copy
import functools
import pickle
import sys
import threading
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import S as BIG_S
from small import batch_with_pictures, left_padded, needs_compiler, small_model
from test_generate import SMALL_S, with_any_logits
from torch.overrides import TorchFunctionMode

import chameleon
import generate as module
from chameleon import (
    ChameleonAttention,
    ChameleonForConditionalGeneration,
    ChameleonModel,
    KVCache,
    eager_attention,
    rotary_table,
    sdpa_attention,
)
from chameleon_extras import decoding
from chameleon_extras.decoding import (
    ATTENTIONS,
    FEW,
    Decoder,
    InFp32,
    RowProduct,
    auto_attention,
    check_attention,
    check_compile,
    four_bit_sums,
    one_query_attention,
    row_sums,
    set_attention,
    split_of,
    with_row_products,
)
from chameleon_extras.quantize import INT4_ROWS, KINDS, quantize_model
from chameleon_extras.stats import Stats, bandwidth, step_bytes
from generate import generate, stream
from processor import ChameleonProcessor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def traced(monkeypatch):
    """torch.compile up to the code it would write: all its checks, in a tenth of the time.

    -> the graphs it has made, each a list of names of operations.
    """
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def only_traced(function, options=None, **rest):
        kept = {name: f for name, f in (options or {}).items() if name == "guard_filter_fn"}
        return compile_(function, backend=backend, options=kept, **rest)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", only_traced)
    monkeypatch.setattr(decoding, "check_compile", lambda device: None)  # no code is compiled
    yield graphs
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("H, Hkv", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_attends_as_the_readable_form_does(H, Hkv, masked):
    g = torch.Generator().manual_seed(0)
    L, Dh = 19, 24  # 24 fp32 numbers are one PART and a half
    q, k, v = (torch.randn(3, heads, n, Dh, generator=g) for heads, n in
               ((H, 1), (Hkv, L), (Hkv, L)))
    mask = torch.rand(3, 1, 1, L, generator=g) < 0.6 if masked else None
    if masked:
        mask[..., -1] = True
    expected = eager_attention(q, k, v, mask, 0.0)[0]
    ways = (one_query_attention, functools.partial(one_query_attention, loops=True), auto_attention,
            sdpa_attention, ATTENTIONS["math"])
    for attend in ways:
        torch.testing.assert_close(attend(q, k, v, mask, 0.0)[0], expected, atol=1e-6, rtol=1e-5)
    for attend in ways[:2]:
        assert not attend(q, k, v, mask, 1.0)[0].any()  # dropout of all weights


def test_the_loops_for_one_query_compute_in_fp32_and_round_once():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, n, 32, generator=g).bfloat16() * size
               for n, size in ((1, 4), (19, 1), (19, 1)))
    expected = eager_attention(q.float(), k.float(), v.float(), None, 0.0)[0]
    y = one_query_attention(q, k, v, None, 0.0, loops=True)[0]
    torch.testing.assert_close(y, expected.bfloat16(), atol=1e-4, rtol=2**-7)


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa", "flash", "math"])
def test_every_attention_of_the_cpu_writes_the_same_ids(name):
    model = small_model(num_key_value_heads=2)
    inputs = batch_with_pictures()
    expected = generate(model, **inputs, max_new_tokens=8, decoder=False)
    decoder = Decoder(model, attention=name)
    assert torch.equal(generate(model, **inputs, max_new_tokens=8, decoder=decoder), expected)


@pytest.mark.parametrize("name, device, dtype, compiled, message", [
    ("fast", "cpu", torch.float32, False, "'fast' is none of auto, eager, sdpa, flash, efficient"),
    ("cudnn", "cpu", torch.float32, False, "'cudnn' is for CUDA: on cpu use 'auto'"),
    ("efficient", "mps", torch.float32, False, "'efficient' is for CUDA: on mps use 'auto'"),
    ("flash", "mps", torch.float32, False, "not there on mps"),
    ("flash", "cuda", torch.float32, False, "needs bfloat16 or float16, not torch.float32"),
    ("cudnn", "cuda", torch.float32, False, "needs bfloat16 or float16, not torch.float32"),
    ("flash", "cuda", torch.bfloat16, True, "takes no mask, and a compiled step has one"),
])
def test_an_attention_that_is_not_there_is_one_clear_line(name, device, dtype, compiled, message):
    with pytest.raises(ValueError, match=message) as e:
        check_attention(name, torch.device(device), dtype, compiled)
    assert "\n" not in str(e.value)


def test_a_kernel_that_refuses_a_case_says_so_and_what_to_use():
    q = torch.randn(1, 4, 3, 8)
    for mask, what in ((None, "heads of 8"), (torch.ones(3, 3, dtype=torch.bool), "a mask")):
        with pytest.raises(ValueError, match=f"cannot run {what} .* on cpu: use 'auto'"):
            ATTENTIONS["efficient"](q, q, q, mask, 0.0)


def test_an_error_that_has_nothing_to_do_with_kernels_is_passed_on(monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(decoding, "sdpa_attention", full)
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(RuntimeError, match="^CUDA out of memory$"):
        ATTENTIONS["math"](q, q, q, None, 0.0)


def test_a_decoder_asks_whether_a_compiled_step_can_have_the_attention():
    model = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="takes no mask, and a compiled step has one"):
        Decoder(model, compiled=True, attention="flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_its_user_compiles_may_have_a_cache_of_any_length(dtype, monkeypatch):
    monkeypatch.setattr(decoding, "MEASURED", 1)  # no measurement while torch traces
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 16, generator=g).to(dtype)
               for heads, n in ((4, 1), (2, 13), (2, 13)))
    compiled = torch.compile(auto_attention, backend="eager", fullgraph=True)
    expected = eager_attention(q, k, v, None, 0.0)[0]
    torch.testing.assert_close(compiled(q, k, v, None, 0.0)[0], expected, atol=2e-2, rtol=1e-2)


# ---------------------------------------------------------------------------------- equal answers

MODELS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "34b": dict(num_key_value_heads=2, swin_norm=True),
    "biases, tied": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "linear": dict(rope_scaling={"type": "linear", "factor": 2.0}),
    "dynamic": dict(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_text_equals_plain_text(name, traced):
    model = small_model(**MODELS[name])
    for inputs in (left_padded([[0, 80, 81]]), left_padded([[0, 80, 81], [0, 90]])):
        options = dict(max_new_tokens=40, eos_token_id=[], repetition_penalty=1.2)
        set_attention(model, "sdpa")
        expected = generate(model, **inputs, **options, decoder=False)
        for compiled in (False, True):
            decoder = Decoder(model, compiled)
            assert torch.equal(generate(model, **inputs, **options, decoder=decoder), expected)
    assert len(traced) == 4  # a block and a head, for 1 row and for 2


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 1.0), (2.0, 1.5)])
def test_compiled_pictures_and_documents_equal_plain_ones(guidance, sampled, traced):
    model = with_any_logits(0, 0.3, 8.0)
    decoder, drawn = Decoder(model, compiled=True), 0
    for mode in ("image", "interleaved"):
        for inputs in (left_padded([[0, 80]]), left_padded([[0, 80, 81], [0, 90]])):
            options = dict(mode=mode, max_new_tokens=30, eos_token_id=[85, 95], do_sample=sampled,
                           image_temperature=float(sampled), guidance_text=guidance[0],
                           guidance_image=guidance[1])
            expected = generate(model, **inputs, **options, decoder=False)
            ids = generate(model, **inputs, **options, decoder=decoder)
            assert torch.equal(ids, expected)
            drawn += (ids == 71).sum()
    assert drawn > 8


def test_generate_takes_fast_steps_unasked_and_compiled_ones_by_one_argument(traced):
    model = small_model(attention_dropout=0.9).train()  # dropout acts in training alone
    prompt, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=12, eos_token_id=[])
    for kind in (None, "int8"):  # other layers: what is compiled for the first is out of date
        if kind:
            quantize_model(model, kind)
        set_attention(model, "sdpa")
        expected = generate(model, prompt, **options, decoder=False)
        assert model.model.layers[0].self_attn.attend is sdpa_attention
        assert torch.equal(generate(model, prompt, **options), expected)
        assert model.model.layers[0].self_attn.attend is auto_attention
        before = len(traced)
        for _ in range(2):
            assert torch.equal(model.generate(prompt, **options, compile=True), expected)
        assert len(traced) == before + 2  # the block and the head, once
    assert torch.equal(copy.deepcopy(model).generate(prompt, **options, compile=True), expected)
    set_attention(model, "eager")  # who chose it keeps it
    for compile_ in (False, True):
        assert torch.equal(generate(model, prompt, **options, compile=compile_), expected)
    assert model.model.layers[0].self_attn.attend is eager_attention
    model.model.layers[1].self_attn.attend = sdpa_attention  # also for some layers alone
    generate(model, prompt, **options)
    attends = [layer.self_attn.attend for layer in model.model.layers]
    assert attends == [eager_attention, sdpa_attention, eager_attention]


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_what_an_earlier_answer_left_in_the_cache_is_not_read(traced, name):
    prompt, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=6, eos_token_id=[])
    model = small_model()
    decoder = Decoder(model, compiled=True, attention=name)
    expected = generate(model, prompt, **options, decoder=decoder)
    with torch.inference_mode():
        for x in (*decoder.spare.k, *decoder.spare.v):
            x.fill_(float("nan"))
    assert torch.equal(generate(model, prompt, **options, decoder=decoder), expected)


def test_other_weights_or_another_dtype_make_a_new_compiled_decoder(traced):
    model = small_model()
    prompt, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=6, eos_token_id=[])
    model.generate(prompt, **options, compile=True)
    first = model.compiled_decoder
    model.load_state_dict({n: -p for n, p in model.state_dict().items()}, assign=True)
    expected = generate(model, prompt, **options, decoder=False)
    assert torch.equal(model.generate(prompt, **options, compile=True), expected)
    assert model.compiled_decoder is not first
    second = model.bfloat16().compiled_decoder
    model.generate(prompt, **options, compile=True)
    assert model.compiled_decoder is not second
    third = model.compiled_decoder
    for change in (lambda layer: setattr(layer.mlp, "act", torch.relu),
                   lambda layer: setattr(layer.input_layernorm, "eps", 1.0)):
        model.generate(prompt, **options, compile=True)
        assert model.compiled_decoder is third  # kept while nothing changes
        for layer in model.model.layers:
            change(layer)
        assert torch.equal(model.generate(prompt, **options, compile=True),
                           generate(model, prompt, **options, decoder=False))
        third = model.compiled_decoder


def test_what_was_compiled_stays_though_the_model_is_trained_in_between(traced):
    model, prompt = small_model(), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=3, eos_token_id=[], compile=True)
    expected, first = model.generate(prompt, **options), model.compiled_decoder
    assert torch.equal(model.train().generate(prompt, **options), expected)
    assert model.compiled_decoder is first and model.model.layers[0].training


def test_a_copied_or_pickled_model_begins_without_a_decoder():
    decoder = Decoder(small_model())
    assert copy.deepcopy(decoder) is None and pickle.loads(pickle.dumps(decoder)) is None


def test_another_part_without_weights_makes_a_compiled_decoder_out_of_date():
    model = small_model()
    before = []
    for act in (torch.nn.Tanh(), torch.nn.Sigmoid()):
        model.model.layers[1].mlp.act = act
        assert before != (now := decoding.made_of(model))
        before = now
    assert before == decoding.made_of(model)


def test_attributes_are_compared_by_value_if_they_are_numbers_texts_or_tuples():
    x, norm, descriptions = torch.ones(2), torch.nn.LayerNorm(4), []
    for value in (1.5, float("1.5"), 1.25, (2, "c"), tuple([2, "c"]), (3, "c"), (2,), x, x,
                  x.clone(), None):
        norm.mine = value
        descriptions.append(decoding.described(norm))
    equal = [a == b for a, b in zip(descriptions, descriptions[1:])]
    assert equal == [True, False, False, True, False, False, False, True, False, False]


class Around(torch.nn.Sequential):
    """A residual connection around some layers."""

    def forward(self, x):
        return x + super().forward(x)


def test_layers_that_only_look_alike_are_compiled_apart():
    linear = lambda: torch.nn.Linear(4, 4)  # noqa: E731
    acts = [type("Act", (base,), {})() for base in (torch.nn.Tanh, torch.nn.Sigmoid)]
    of = decoding.described
    assert of(Around(Around(linear()), linear())) == of(Around(Around(linear()), linear()))
    for one, other in ((Around(Around(linear()), linear()), Around(Around(linear(), linear()))),
                       acts, (linear(), linear().bfloat16())):
        assert of(one) != of(other)


class Steered(torch.nn.Module):
    """A part of a layer, and what multiplies its output, if anything."""

    def __init__(self, part):
        super().__init__()
        self.part, self.by = part, None

    def forward(self, x):
        return self.part(x) if self.by is None else self.part(x) * self.by[0]


@pytest.mark.parametrize("by", [(-2.0,), torch.tensor([-2.0])])
def test_an_attribute_of_one_layer_acts_in_it_alone_and_from_the_next_call_on(traced, by):
    model, prompt = small_model(), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=6, eos_token_id=[])
    for layer in model.model.layers:
        layer.mlp = Steered(layer.mlp)
    answers = []
    for changed, value in ((model.model.layers[1:2], by), (model.model.layers, by),
                           (model.model.layers, type(by)([3.0]) if isinstance(by, tuple) else -by)):
        for layer in changed:
            layer.mlp.by = value
        answers.append(model.generate(prompt, **options, compile=True).tolist())
        assert answers[-1] == generate(model, prompt, **options, decoder=False).tolist()
        kept = model.compiled_decoder
        model.generate(prompt, **options, compile=True)
        assert model.compiled_decoder is kept
    assert answers[0] != answers[1] != answers[2]


def test_threads_may_share_a_compiled_model(traced):
    model, prompt = small_model(), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=3, eos_token_id=[], compile=True)
    expected, wrong = model.generate(prompt, **options), []

    def work():
        for _ in range(25):
            try:
                wrong.extend([1] * (not torch.equal(model.generate(prompt, **options), expected)))
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_layers_that_share_a_place_in_the_cache_are_refused():
    model = small_model()
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(ValueError, match=r"places in the cache, .* are \[0, 1, 2, 1\]: give each"):
        generate(model, torch.tensor([[0, 80]]), max_new_tokens=2)
    del model.model.layers[1:3]
    model.config.num_hidden_layers = 2
    model.model.layers[1].self_attn.layer = 2
    with pytest.raises(ValueError, match=r"are \[0, 2\]: give each its own, below num_hidden"):
        generate(model, torch.tensor([[0, 80]]), max_new_tokens=2)


def test_layers_may_be_taken_out_or_exchanged(traced):
    prompt, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=6, eos_token_id=[])
    for places in ([0, 2], [2, 1, 0]):
        model = small_model()
        model.model.layers = torch.nn.ModuleList([model.model.layers[n] for n in places])
        assert torch.equal(model.generate(prompt, **options, compile=True),
                           generate(model, prompt, **options, decoder=False))


def test_any_number_of_shapes_is_compiled_and_a_default_device_is_no_obstacle(traced):
    model, prompt = small_model(), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=4, eos_token_id=[])
    with torch.device("cpu"):
        assert torch.equal(model.generate(prompt, **options, compile=True),
                           generate(model, prompt, **options, decoder=False))
    with model.compiled_decoder.kernels(1, compiled=True):  # torch gives up at 8 and at 256
        assert torch._dynamo.config.recompile_limit > 10**6
        assert torch._dynamo.config.accumulated_recompile_limit > 10**6


def test_a_text_may_grow_past_any_guard_and_nothing_is_compiled_again(traced):
    """One block serves all three layers, whatever the step, the text, the picture, the answer."""
    model = with_any_logits(0, 0.3, 8.0)
    decoder = Decoder(model, compiled=True)
    options = dict(mode="interleaved", eos_token_id=[], guidance_text=2.0, image_temperature=0.0)
    generate(model, torch.tensor([[0, 80]]), max_new_tokens=12, **options, decoder=decoder)
    graphs = len(traced)
    assert graphs == 3  # the block, the head, its rows for codes
    with torch._dynamo.config.patch(error_on_recompile=True):
        ids = generate(model, torch.tensor([[0, 80, 90]]), max_new_tokens=150, **options,
                       decoder=decoder)
        generate(model, torch.tensor([[0] * 30]), max_new_tokens=40, **options, decoder=decoder)
    assert ids.shape == (1, 153) and (ids == 71).sum() > 5 and len(traced) == graphs


class Replayed:
    """What stands for a CUDA graph: walks anew, and writes over what it gave before."""

    def __init__(self, walk):
        self.walk, self.hidden = walk, walk().clone()

    def replay(self):
        self.hidden.copy_(self.walk())


@needs_compiler
@pytest.mark.parametrize("devices", [("cpu",), ()])  # recorded as on CUDA, or walked as on a CPU
def test_views_of_the_cache_are_compiled_once_and_recorded_once(monkeypatch, devices):
    """With the compiler's real code: a view that ends with the cache comes first."""
    def record(self, cache, columns):
        recorded.append(columns)
        views = cache.first(columns)
        graph = Replayed(lambda: self.walk(cache, *views))
        return graph, graph.hidden

    def walk(self, cache, k, *others):
        read.add(k[0].shape[2])
        return plain_walk(self, cache, k, *others)

    recorded, read, plain_walk = [], set(), Decoder.walk
    monkeypatch.setattr(Decoder, "walk", walk)
    monkeypatch.setitem(decoding.VIEW, "cpu", 32)
    monkeypatch.setattr(module, "CACHE_STEP", 32)
    monkeypatch.setattr(Decoder, "record", record)
    monkeypatch.setattr(decoding, "RECORDED", devices)
    model = small_model(num_hidden_layers=1)
    decoder, graphs = Decoder(model, compiled=True), []
    for T, new in ((3, 6), (3, 80), (5, 80), (30, 20)):
        prompt, options = torch.full((1, T), 80), dict(max_new_tokens=new, eos_token_id=[])
        expected = generate(model, prompt, **options, decoder=False)
        with torch._dynamo.config.patch(error_on_recompile=bool(graphs)):
            assert torch.equal(generate(model, prompt, **options, decoder=decoder), expected)
        graphs.append(len(recorded))
    assert read == {32, 64, 96}
    if devices:
        assert recorded == [32, 32, 64, 96, 32, 64] and graphs == [1, 4, 4, 6]  # the third: none


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), outputs=st.integers(1, 40), split=st.integers(1, 6),
       terms=st.sampled_from([16, 33, 64, 66, 800, 1376]), seed=st.integers(0, 99))
def test_the_loop_gives_the_product_however_it_splits_outputs_and_sums(avx512, dtype, n, outputs,
                                                                       split, terms, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, split * terms), generator=g).to(dtype)
    rows = torch.randint(-8, 8, (n, split * terms), generator=g).float()  # sums of these are exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "AVX512", avx512)
        assert torch.equal(row_sums(weight, rows), rows @ weight.float().mT)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_loop_of_a_gpu_over_4_bit_weights_gives_the_layers_product(kind, n):
    torch.manual_seed(n)
    model = torch.nn.Sequential(torch.nn.Linear(320, 48, bias=False))  # 2, 3 or 5 groups
    layer = quantize_model(model, kind)[0]
    rows = torch.randn(n, 320)
    torch.testing.assert_close(four_bit_sums(layer, rows), rows @ layer.unpacked().mT,
                               atol=1e-5, rtol=1e-5)


def test_a_long_sum_is_split_into_equal_parts_of_whole_registers():
    lengths = (64, 4096, 8192, 11008, 22016, 5504, 4098, 5000)  # 4098 = 2 * 3 * 683
    assert [split_of(n) for n in lengths] == [1, 1, 2, 4, 8, 2, 1, 1]


def test_a_step_is_one_whole_graph_and_every_product_a_loop(traced):
    model = small_model()
    generate(model, torch.tensor([[0, 80]]), max_new_tokens=3, decoder=Decoder(model, True))
    block, head = traced
    assert not [name for name in block + head if "linear" in name]
    assert sum("index_copy_" in name for name in block) == 2  # k and v, in place
    assert sum("matmul" in name for name in block) == 1  # q k^T; the sums over v are loops


def test_an_int4_step_finds_its_weights_in_the_kernels_order(traced):
    """Of a long prompt the weights are unpacked, so no one has ordered them before."""
    model = quantize_model(small_model(max_position_embeddings=256).bfloat16(), "int4")
    assert model.model.layers[0].mlp.up_proj.has_kernel(1, torch.bfloat16)
    prompt = torch.full((1, INT4_ROWS + 1), 80)
    generate(model, prompt, max_new_tokens=3, decoder=Decoder(model, True))
    names = [name for graph in traced for name in graph]
    assert any("weight_int4pack_mm" in name for name in names)
    assert not [name for name in names if "convert_weight_to" in name]


@pytest.mark.parametrize("kind, dtype, compiled, slow", [
    (None, torch.float32, False, False), ("int8", torch.float32, False, True),
    ("int8", torch.float32, True, False), ("int8", torch.bfloat16, False, False),
    ("int4", torch.float32, True, True), ("int4", torch.bfloat16, True, False),
    ("nf4", torch.float32, False, False)])  # nf4 is never fast
def test_a_slow_combination_of_weights_and_dtype_says_so(kind, dtype, compiled, slow, traced):
    model = small_model().to(dtype)
    model = quantize_model(model, kind) if kind else model
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Decoder(model, compiled)
    assert bool(said) == slow and all("say dtype=torch.bfloat16" in str(w.message) for w in said)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_on_cuda_packed_weights_ask_for_compiled_steps_and_no_other_dtype(kind, traced,
                                                                          monkeypatch):
    model = quantize_model(small_model(), kind)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    with pytest.warns(UserWarning, match=f"{kind} weights .* say compile=True"):
        Decoder(model)
    with warnings.catch_warnings(action="error"):
        Decoder(model, compiled=True)


def test_two_models_of_equal_shapes_do_not_share_code(traced):
    """Only shapes are checked before a compiled block runs: the rest must be its own model's."""
    prompt, options = torch.tensor([[0, 80]]), dict(max_new_tokens=12, eos_token_id=[])
    for changes in ({}, dict(swin_norm=True), dict(hidden_act="gelu"), dict(rms_norm_eps=0.1)):
        model = small_model(**changes)
        expected = generate(model, prompt, **options, decoder=False)
        ids = generate(model, prompt, **options, decoder=Decoder(model, compiled=True))
        assert torch.equal(ids, expected)


@needs_compiler
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_what_the_compiler_really_writes_gives_the_same_ids(kind):
    model = small_model(num_hidden_layers=1, num_key_value_heads=2).bfloat16()
    if kind:
        quantize_model(model, kind)
    prompt, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=10, eos_token_id=[])
    set_attention(model, "eager")
    expected = generate(model, prompt, **options, decoder=False)
    ids = generate(model, prompt, **options, decoder=Decoder(model, compiled=True))
    cache = KVCache(model.config, 1, 32, torch.bfloat16)
    with torch.inference_mode():  # in bf16 two ids may be equally good: then either will do
        hidden = model.model(expected[:, :-1], past_key_values=cache).last_hidden_state
        logits = model.lm_head(hidden)[0].float()  # (12, V)
    for t in range(3, 13):
        if ids[0, t] != expected[0, t]:
            gap = logits[t - 1, expected[0, t]] - logits[t - 1, ids[0, t]]
            assert gap < 0.02 * logits[t - 1].abs().max()
            break


# ------------------------------------------------------------------------------- rows and kernels


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_product_is_the_layers_own(kind, bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=bias))
    if kind:
        quantize_model(model, kind)
    twin = with_row_products(model, 1, torch.float32)
    assert isinstance(twin[0], RowProduct) and not isinstance(model[0], RowProduct)
    for shape in ((1, 64), (1, 1, 64), (FEW, 1, 64), (FEW + 1, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-5)


def test_choosing_kernels_leaves_torch_as_it_was(monkeypatch):
    model = small_model()
    monkeypatch.setattr(decoding, "form_of",
                        lambda layer, rows, *_: "torch" if rows == 1 else "oneDNN")
    decoder, seen, forward = Decoder(model), [], model.model.forward

    def watched(*arguments, **named):
        seen.append(torch.backends.mkldnn.enabled)
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", watched)
    for _ in stream(model, torch.tensor([[0, 80]]), max_new_tokens=4, eos_token_id=[],
                    decoder=decoder):
        assert torch.backends.mkldnn.enabled  # a VQ-VAE that draws between the steps has it
    assert seen == [True, False, False, False]  # the prompt has many rows


def test_the_form_of_a_product_is_measured_in_bf16_and_changes_nothing(monkeypatch):
    sizes, dtypes = ((1, 2, 1, 8), (1, 2, 8, 64), True), (torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(decoding, "READ", 2**16)
    assert decoding.fastest(*sizes, *dtypes, decoding.FORMS) in decoding.FORMS
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 2, 3, 40, generator=g), torch.randn(1, 2, 40, 7, generator=g)
    for form in decoding.FORMS:
        y = decoding.multiplied(a.bfloat16(), b.bfloat16(), form)
        assert y.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled
        torch.testing.assert_close(y.float(), a.bfloat16().float() @ b.bfloat16().float(),
                                   atol=2e-2, rtol=1e-2)
    monkeypatch.setattr(decoding, "MEASURED", 1)  # else for long caches only
    model, prompt = small_model(), torch.tensor([[0, 80, 81]])
    plain = list(stream(model, prompt, max_new_tokens=5, eos_token_id=[], decoder=False))
    ids = list(stream(model, prompt, max_new_tokens=5, eos_token_id=[], decoder=Decoder(model)))
    assert torch.equal(torch.cat(ids), torch.cat(plain))


def test_a_cache_that_grows_is_measured_once_for_each_doubling_of_its_length(monkeypatch):
    asked = set()
    monkeypatch.setattr(decoding, "fastest", lambda a, b, *_: asked.add((a, b)) or "torch")
    for L in (511, 512, 513, 700, 1024):
        k, q, p = (torch.ones(size).bfloat16() for size in ((L, 8), (1, 8), (1, L)))
        assert decoding.product(q, k.mT).shape == (1, L) and decoding.product(p, k).shape == (1, 8)
    assert asked == {x for L in (512, 1024) for x in (((1, 8), (8, L)), ((1, L), (L, 8)))}


def test_the_form_whose_best_time_is_the_shortest_is_taken(monkeypatch):
    """The first time of a loop is that of its compilation."""
    clock, took = [0.0], {"torch": [5.0] * 4, "loop": [90.0, 9.0, 1.0, 9.0], "fp32": [6.0] * 4}

    def multiplied(a, b, form):
        clock[0] += took[form].pop(0)

    for name, value in dict(multiplied=multiplied, CLOCK=lambda: clock[0], READ=1,
                            MEASUREMENTS=[]).items():
        monkeypatch.setattr(decoding, name, value)
    sizes, dtypes = ((1, 8), (8, 16), True), (torch.float32, torch.float32)
    assert decoding.fastest.__wrapped__(*sizes, *dtypes, tuple(took)) == "loop"
    assert not any(took.values()) and "loop 0.0" in decoding.MEASUREMENTS[0]


def test_a_head_whose_weight_is_a_method_has_a_form_too():
    head = type("Head", (torch.nn.Module,), {"weight": lambda self: None})()
    assert decoding.form_of(head, 1, torch.float32, False) == "oneDNN"
    assert decoding.form_of(head, 1, torch.float32, True) == "loop"


@needs_compiler
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("case", decoding.CANDIDATES, ids=str)
def test_every_form_of_a_layers_product_is_the_product(n, case, monkeypatch):
    dtype, stored, compiled = case
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
    weight = torch.randint(-100, 100, (96, 64), generator=torch.Generator().manual_seed(0))
    weight = weight.to(stored)  # (O, I)
    for form in decoding.CANDIDATES[case]:
        y = decoding.multiplied(x, weight.mT, form)
        torch.testing.assert_close(y.float(), x.float() @ weight.float().mT, atol=1.0, rtol=1e-2)
    monkeypatch.setattr(decoding, "WIDTH", 64)
    monkeypatch.setattr(decoding, "OUTPUTS", 96)
    monkeypatch.setattr(decoding, "READ", 2**14)
    monkeypatch.setattr(decoding, "LARGE", 1)
    layer = torch.nn.Linear(1, 1)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert decoding.form_of(layer, n, dtype, compiled) in decoding.CANDIDATES[case]


@pytest.mark.parametrize("kind, dtype, form, name", [
    (None, torch.float32, "torch", "linear"), (None, torch.bfloat16, "oneDNN", "linear"),
    ("int8", torch.bfloat16, "int8pack", "_weight_int8pack_mm"),
])
def test_a_compiled_step_takes_the_form_that_is_fastest(kind, dtype, form, name, traced,
                                                        monkeypatch):
    """By the numbers of rows: here the library for one row, the loop for two."""
    monkeypatch.setattr(decoding, "LARGE", 1)
    monkeypatch.setattr(decoding, "fastest", lambda a, *_: form if a[0] == 1 else "loop")
    model = small_model(num_hidden_layers=1).to(dtype)
    if kind:
        quantize_model(model, kind)
    decoder, options = Decoder(model, compiled=True), dict(max_new_tokens=4, eos_token_id=[])
    for rows in (1, 2):
        prompt = torch.tensor([[0, 80, 81]] * rows)
        expected = generate(model, prompt, **options, decoder=False)
        ids = generate(model, prompt, **options, decoder=decoder)
        assert torch.equal(ids, expected) or dtype == torch.bfloat16  # two may be equally good
    counts = [sum(name in operation for operation in graph) for graph in traced]
    assert counts == [7, 1, 0, 0]  # the block, the head


# --------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("drawn", [True, False])
def test_no_level_of_a_picture_moves_by_more_than_2_in_bf16(drawn, monkeypatch):
    """With trained weights: pictures that they know, and codes drawn at random."""
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    vq = ChameleonForConditionalGeneration.from_pretrained(ROOT / "tiny").model.vqmodel
    pictures = [Image.open(path).convert("RGB") for path in (ROOT / "examples").glob("*.png")]
    codes = vq.encode(processor.image_processor(pictures, return_tensors="pt").pixel_values)
    if drawn:
        codes = torch.randint(0, vq.config.num_embeddings, codes.shape,
                              generator=torch.Generator().manual_seed(0))
    levels = lambda pixels: ((pixels.clamp(-1, 1) + 1) * 127.5).round()  # noqa: E731
    plain = vq.decode(codes)
    assert torch.equal(decoding.decode_codes(vq, codes), plain)  # few codes: fp32 is quick enough
    monkeypatch.setattr(decoding, "MANY_CODES", 1)
    monkeypatch.setattr(decoding, "fast_bf16", lambda device: False)
    assert torch.equal(decoding.decode_codes(vq, codes), plain)  # bf16 would be emulated
    monkeypatch.setattr(decoding, "fast_bf16", lambda device: True)
    pixels = decoding.decode_codes(vq, codes)
    assert pixels.dtype == torch.float32 and not torch.equal(pixels, plain)
    assert (levels(pixels) - levels(plain)).abs().max() <= 2


@pytest.mark.parametrize("quantized, dtype", [
    (False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float16)])
def test_products_in_fp32_are_rounded_once(quantized, dtype, monkeypatch):
    """What a CPU without bf16 computes with converted numbers are the sums in fp32, rounded."""
    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear:
                dtypes.append({x.dtype for x in args if x is not None})
            return function(*args, **(kwargs or {}))

    dtypes = []
    layer = torch.nn.Linear(48, 32).to(dtype).requires_grad_(False)
    layer = quantize_model(torch.nn.Sequential(layer), "int8")[0] if quantized else layer
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Watch(), InFp32():
        plain = layer(x)  # small: left as it is
        monkeypatch.setattr(decoding, "LARGE", 0)
        converted = layer(x)
        if not quantized:  # what InFp32 does not know runs as it is
            linear, bias = torch.nn.functional.linear, layer.bias + 9
            named = linear(x, layer.weight, bias=bias)
            assert torch.equal(named, linear(input=x, weight=layer.weight, bias=bias))
            torch.testing.assert_close(named - 9, plain, rtol=2**-4, atol=2**-4)
    assert dtypes[:2] == [{dtype}, {torch.float32}] and converted.dtype == dtype
    weight = layer.unpacked() if quantized else layer.weight.float()
    exact = x.float() @ weight.T + layer.bias.float()
    torch.testing.assert_close(converted.float(), exact, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(converted, plain, rtol=2**-6, atol=2**-7)


def test_weights_that_multiply_in_a_way_of_their_own_are_not_made_fp32(monkeypatch):
    """As torchao's, a subclass of Tensor."""
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs)

    monkeypatch.setattr(decoding, "LARGE", 0)
    weight, called = torch.ones(8, 8).bfloat16().as_subclass(Own), []
    with InFp32():
        torch.nn.functional.linear(torch.ones(20, 8).bfloat16(), weight)
    assert "linear" in called and "float" not in called


def test_a_prompt_is_read_in_fp32_only_where_16_bits_are_emulated(monkeypatch):
    prompt = torch.randint(74, 160, (1, 20), generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(decoding, "InFp32", lambda: calls.append(1) or nullcontext())
    for emulates, dtype, ids, large, wanted in (
            (True, torch.bfloat16, prompt, 0, 1), (False, torch.bfloat16, prompt, 0, 0),
            (True, torch.float16, prompt, 0, 1), (False, torch.float16, prompt, 0, 0),
            (True, torch.float32, prompt, 0, 0), (True, torch.bfloat16, prompt[:, :5], 0, 0),
            (True, torch.bfloat16, prompt, 2**19, 0)):
        monkeypatch.setattr(decoding, "LARGE", large)
        own, other = ("fast_bf16", "fast_fp16")[:: -1 if dtype == torch.float16 else 1]
        monkeypatch.setattr(decoding, own, lambda *device, fast=not emulates: fast)
        monkeypatch.setattr(decoding, other, lambda *device, fast=emulates: fast)
        calls.clear()
        generate(small_model().to(dtype), ids, max_new_tokens=3)
        assert len(calls) == wanted


# ---------------------------------------------------------------------------- reading one behind


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_ids_that_are_read_later_are_the_same(behind, mode):
    model = with_any_logits(3, 0.3, 8.0)
    decoder = Decoder(model)
    options = dict(mode=mode, max_new_tokens=20, eos_token_id=[80, 85, 90, 95],
                   image_temperature=0.0)
    inputs = left_padded([[0, 80, 81], [0, 90]])
    expected = generate(model, **inputs, **options, decoder=False)
    read, made = decoder.read, []

    def count(steps):
        for ids in steps:
            made.append(ids)
            yield ids

    decoder.read = lambda steps: read(count(steps), behind)
    ids = generate(model, **inputs, **options, decoder=decoder)
    assert torch.equal(ids, expected)
    new = ids.shape[1] - 3
    assert new <= len(made) <= new + behind  # no more than that is computed in vain


def test_drawing_and_text_alone_read_no_id(monkeypatch):
    """What would make the host wait for CUDA: looking into a tensor, here made an error."""
    model = with_any_logits(0, 0.3, 8.0)

    def forbidden(self, *_):
        raise AssertionError("a step looked into a tensor")

    for mode, guidance in (("image", 1.0), ("image", 3.0), ("text", 1.0)):
        steps = stream(model, torch.tensor([[0, 80]]), mode=mode, guidance_text=guidance,
                       max_new_tokens=5, eos_token_id=[], do_sample=True)
        inner = steps.gi_frame.f_locals["steps"]
        next(inner)
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "cpu"):
                patch.setattr(torch.Tensor, name, forbidden)
            ids = list(inner)
        assert len(ids) == (SMALL_S + 1 if mode == "image" else 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["text", "image"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_cuda_makes_the_host_wait_for_nothing(mode, compiled):
    model = small_model().cuda()
    decoder = Decoder(model, compiled)
    steps = stream(model, torch.tensor([[0, 80]], device="cuda"), mode=mode, max_new_tokens=20,
                   eos_token_id=[], decoder=decoder)
    for _ in range(5):
        next(steps)  # the prompt, the compiler, the recording
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rest) == (BIG_S + 2 if mode == "image" else 20) - 5


# -------------------------------------------------------------------------------------- and stats


def test_the_bytes_of_a_step_are_those_of_layers_and_head():
    model = small_model()
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    head = model.lm_head.weight.nbytes
    assert step_bytes(model) == layers + head
    assert step_bytes(model, share_of_codes=1.0) == layers + head * 64 / 160
    assert bandwidth(torch.device("cpu")) > 1e8


def test_stats_pass_ids_on_and_count_steps():
    model = small_model()
    stats = Stats(model)
    prompt = torch.tensor([[0, 80]])
    steps = stream(model, prompt, max_new_tokens=6, eos_token_id=[])
    ids = [int(i) for i in stats.watch(steps)]
    assert ids == generate(model, prompt, max_new_tokens=6, eos_token_id=[])[0, 2:].tolist()
    assert "6 steps of 1 row(s)" in stats.report() and len(stats.seconds) == 6
    assert "too few" in Stats(model).report()


@pytest.mark.parametrize("triton, capability, compilers, message", [
    (False, (9, 0), True, "on CUDA needs Triton: pip install triton, or leave it out"),
    (True, (6, 1), True, "compute capability 7.0 or newer: leave it out"),
    (True, (9, 0), False, "needs a C compiler: install gcc, or leave it out"),
    (True, (9, 0), True, None), (True, (7, 0), True, None),
])
def test_what_compiling_on_cuda_needs_is_named(triton, capability, compilers, message, monkeypatch):
    monkeypatch.setattr(decoding, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(decoding.shutil, "which", lambda name: compilers or None)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_compile(torch.device("cuda"))


def test_the_first_id_is_not_kept_back():
    """What follows it may have to compile."""
    made = []

    def steps():
        for n in range(4):
            made.append(n)
            yield torch.tensor([n])

    ids = Decoder(small_model()).read(steps(), behind=1)
    assert int(next(ids)) == 0 and made == [0]
    assert int(next(ids)) == 1 and made == [0, 1, 2]
    assert [int(i) for i in ids] == [2, 3]


def test_two_answers_at_once_do_not_share_a_cache(traced):
    model = small_model()
    prompts, options = ([[0, 80]], [[0, 90]]), dict(max_new_tokens=8, eos_token_id=[])
    expected = [generate(model, torch.tensor(p), **options, decoder=False)[0, 2:].tolist()
                for p in prompts]
    decoder = Decoder(model, compiled=True)
    for _ in range(2):  # the second time one of them gets a cache that was used before
        streams = [stream(model, torch.tensor(p), **options, decoder=decoder) for p in prompts]
        ids = [[int(i) for i in pair] for pair in zip(*streams)]
        assert [list(row) for row in zip(*ids)] == expected


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(decoding.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C.. compiler: install g"):
        Decoder(small_model(), compiled=True)
    with pytest.raises(ValueError, match="not for mps"):
        check_compile(torch.device("mps"))


@pytest.mark.parametrize("device, variable", [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_of_ones_own_is_found_by_its_variable(device, variable, monkeypatch):
    monkeypatch.setattr(decoding.shutil, "which", lambda name: name if name == "mine" else None)
    monkeypatch.setattr(decoding, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(decoding.Path, "exists", lambda self: True)  # Python's headers
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "mine" if name == variable else "other")
    check_compile(torch.device(device))
    monkeypatch.setenv(variable, "other")
    # torch then tries no other compiler.
    monkeypatch.setattr(decoding.shutil, "which", lambda name: None if name == "other" else name)
    with pytest.raises(ValueError, match="needs a C.* compiler"):
        check_compile(torch.device(device))
    monkeypatch.delenv(variable)
    check_compile(torch.device(device))


def test_on_linux_torch_compiles_with_gpp_alone(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(decoding.sys, "platform", "linux")
    monkeypatch.setattr(decoding.shutil, "which", lambda name: name if name != "g++" else None)
    with pytest.raises(ValueError, match="install g"):
        check_compile(torch.device("cpu"))


def test_a_module_that_was_compiled_stays_in_a_compiled_step():
    own = torch.compile(torch.nn.Linear(4, 4))  # it has no truth value
    twin = decoding.with_row_products(torch.nn.ModuleList([own]), 1, torch.float32)
    assert twin[0] is own


def test_a_class_of_ones_own_is_not_known_even_with_the_forward_of_torch():
    mine = type("Mine", (torch.nn.Linear,), {})
    assert decoding.is_known(torch.nn.Linear(4, 4)) and not decoding.is_known(mine(4, 4))


def test_two_caches_are_never_there_at_one_time(monkeypatch):
    decoder, made = Decoder(small_model()), []

    class Watched(KVCache):
        def __init__(self, *arguments):
            made.append(decoder.cache)
            super().__init__(*arguments)

    monkeypatch.setattr(decoding, "KVCache", Watched)
    for length in (64, 128):
        decoder.new_cache(1, length)
    assert made == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python comes with its headers")
def test_compiling_without_pythons_headers_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding.shutil, "which", lambda name: name)
    monkeypatch.setattr(decoding.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="install python3-dev"):
        check_compile(torch.device("cpu"))


class MoreThanLinear(torch.nn.Linear):
    """As LoRA by hand: a subclass that computes more than its product."""

    def forward(self, x):
        return 5 * torch.sin(super().forward(x))


def test_a_hook_acts_in_compiled_steps_too(traced):
    """One that comes later makes the compiled code out of date. A layer may differ in a part, too.
    """
    two = dict(num_hidden_layers=2)
    model, ids = small_model(**two), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=4, eos_token_id=[])
    answers = [model.generate(ids, compile=True, **options)]
    for n, layer in enumerate(model.model.layers):  # each layer has its own
        layer.mlp.down_proj.register_forward_hook(lambda module, x, y, n=n: y * (3 * n - 1))
    answers += [model.generate(ids, compile=c, **options) for c in (False, True)]
    for part in ("mlp", "act", "pre-hook", "forward", "class"):
        model = small_model(**two)
        layer = model.model.layers[1]
        if part == "mlp":
            layer.mlp = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
        elif part == "act":
            layer.mlp.act = torch.sin
        elif part == "pre-hook":
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, x: (-3 * x[0],))
        elif part == "class":
            layer.mlp.up_proj.__class__ = MoreThanLinear
        else:
            up = layer.mlp.up_proj
            up.forward = lambda x, up=up: -2 * torch.nn.functional.linear(x, up.weight)
        answers += [model.generate(ids, compile=c, **options) for c in (False, True)]
    assert all(torch.equal(*pair) for pair in zip(answers[1::2], answers[2::2]))
    assert len({str(answer) for answer in answers}) == 7
    first, second = small_model(**two).model.layers
    assert decoding.described(first, "layer") == decoding.described(second, "layer")
    weight = second.mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T  # the compiled code relies on the strides
    assert decoding.described(first, "layer") != decoding.described(second, "layer")


class OwnAttention(ChameleonAttention):
    """Another product for each layer, and one that is changed from outside."""

    def forward(self, x, *rest):
        y, weights = super().forward(x, *rest)
        return y * self.by / (self.layer + 1) ** 3, weights


@needs_compiler
def test_a_compiled_decoder_checks_the_attention_that_was_chosen_before(monkeypatch):
    model, checked = decoding.set_attention(small_model(), "flash"), []
    monkeypatch.setattr(decoding, "check_attention", lambda *given: checked.append(given))
    decoding.Decoder(model, compiled=True, attention=None)
    assert checked == [("flash", model.device, model.dtype, True)]


def test_code_of_ones_own_in_the_layers_acts_in_each_compiled_step(traced):
    """Such code may read anything, so nothing that was compiled may outlast what it read."""
    ids, options = torch.tensor([[0, 80, 81]]), dict(max_new_tokens=4, eos_token_id=[])
    answers = []

    def compare(model):
        answers.append(generate(model, ids, **options))
        assert torch.equal(model.generate(ids, compile=True, **options), answers[-1])

    model, seen, negate = small_model(), [], lambda module, x, y: (-y[0], y[1])
    for layer in model.model.layers:  # the same hook, moved from layer to layer
        hook = layer.register_forward_hook(negate)
        compare(model)
        hook.remove()
    by = [1.0]
    model.model.layers[1].mlp.register_forward_hook(lambda module, x, y: y * by[0])
    for by[0] in (-1.0, -3.0):
        compare(model)
        assert "spare" not in vars(model.compiled_decoder)  # nor a CUDA graph that recorded it
    model.model.layers[0].register_forward_hook(lambda module, x, y: seen.append(y[0]))
    for _ in range(2):
        model.generate(ids, compile=True, **options)
    assert len(seen) == 8
    model = small_model()
    for factor in (1.0, -2.0):
        for layer in model.model.layers:
            layer.self_attn.__class__, layer.self_attn.by = OwnAttention, factor
        compare(model)
    model = small_model()
    act = torch.nn.LeakyReLU(-9.0)  # twice in one module, and a part that is None
    model.model.layers[1].mlp = torch.nn.Sequential(
        torch.nn.Linear(64, 64), act, torch.nn.Linear(64, 64), act)
    model.model.layers[0].mlp.register_module("nothing", None)
    compare(model)
    model = small_model()
    for layer in model.model.layers:
        layer.mlp.act = lambda x: x.abs() * by[0]
    for by[0] in (3.0, -3.0):
        compare(model)
    assert len({str(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize("part", ["embed_tokens", "norm"])
def test_a_hook_beside_the_layers_is_not_recorded_for_the_next_answer_either(traced, part):
    model = small_model()
    getattr(model.model, part).register_forward_hook(lambda module, x, y: -y)
    model.generate(torch.tensor([[0, 80]]), compile=True, max_new_tokens=2)
    assert "spare" not in vars(model.compiled_decoder)


def test_rope_of_ones_own_acts_in_compiled_steps_too(traced, monkeypatch):
    model, ids = small_model(), torch.tensor([[0, 80, 81]])
    options = dict(max_new_tokens=4, eos_token_id=[])
    own = lambda config, positions: rotary_table(config, positions * 3)  # noqa: E731
    monkeypatch.setattr(chameleon, "rotary_table", own)
    expected = generate(model, ids, **options)
    assert torch.equal(model.generate(ids, compile=True, **options), expected)


@pytest.mark.parametrize("change", ["hook", "class", "attend", "layer", "mask"])
def test_what_compiled_steps_would_leave_out_is_refused(traced, monkeypatch, change):
    model, body = small_model(), type("Body", (ChameleonModel,), {"forward": lambda self, *_: None})
    model.generate(torch.tensor([[0, 80]]), compile=True, max_new_tokens=2)
    if change == "hook":
        model.model.register_forward_hook(lambda module, x, y: y)
    elif change == "class":
        model.model.__class__ = body
    elif change == "attend":
        model.model.layers[1].self_attn.attend = lambda *arguments: sdpa_attention(*arguments)
    elif change == "layer":  # without an attention, so without a place in the cache
        model.model.layers[1] = torch.nn.Identity()
    else:
        own = functools.wraps(chameleon.allowed_keys)(lambda *arguments: None)
        monkeypatch.setattr(chameleon, "allowed_keys", own)
    with pytest.raises(ValueError, match="would not act: leave compile out"):
        model.generate(torch.tensor([[0, 80]]), compile=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_layer_and_a_changed_head_write_and_draw(traced, compiled):
    class Steered(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *inputs):
            y, weights = self.block(*inputs)
            return y * 0.5, weights

    model, ids = small_model(), torch.tensor([[0, 80, 81]])
    model.model.layers[1] = Steered(model.model.layers[1])
    answers = []
    for quantize in (False, True):
        model.lm_head = torch.nn.Linear(64, 160, bias=False)
        model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head = quantize_model(model, "int8").lm_head if quantize else model.lm_head
        for _ in range(2):
            model.lm_head.register_forward_hook(lambda module, x, y: -y)
            for options in (dict(max_new_tokens=4), dict(mode="image", image_temperature=0.0)):
                plain = generate(model, ids, **options, decoder=False)
                answers.append(str(plain))
                assert torch.equal(generate(model, ids, **options, compile=compiled), plain)
    assert answers[0] != answers[2] and answers[1] != answers[3] and answers[5] != answers[7]


def test_weights_that_are_no_plain_tensor_are_not_compiled(traced):
    """torchao's quantized weights are a subclass of Tensor."""
    model, own = small_model(), type("Int8Tensor", (torch.Tensor,), {})
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(own))
    with pytest.raises(ValueError, match="these are Int8Tensor: leave it out"):
        model.generate(torch.tensor([[0, 80]]), compile=True)
    assert model.generate(torch.tensor([[0, 80]]), max_new_tokens=1).shape == (1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers_share_one_compiled_block(traced, kind):
    model, ids = quantize_model(small_model().bfloat16(), kind), torch.tensor([[0, 80, 81]])
    for compiled in (False, True):  # the first call prepares the layers
        answer = model.generate(ids, compile=compiled, max_new_tokens=4, eos_token_id=[])
        assert answer.shape == (1, 7)
    assert len(model.compiled_decoder.blocks) == 1


def test_threads_leave_the_settings_of_torch_as_they_were():
    """`onednn` sets one for the whole process."""
    inside, leave = threading.Event(), [threading.Event(), threading.Event()]

    def work(n):
        with decoding.onednn(False):
            inside.set()
            leave[n].wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    time.sleep(0.1)  # without a lock it is inside by now, and has seen the setting of the first
    for event, thread in zip(leave, threads):
        event.set()
        thread.join()
    assert torch.backends.mkldnn.enabled
