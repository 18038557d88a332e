"""Fast steps: what makes writing one token after the other quick, all of it outside the model.

    prompt (B,T) --model, as it is--> KVCache, filled to column t
    ids (B,1) --embed--> x (B,1,D) --all layers, one compiled code--> --norm--> hidden (B,D)
                              every layer writes column t in place and reads columns 0 to t

Who needs it: whoever wants long answers, pictures or large models sooner. `generate` takes its
uncompiled steps without being asked, its compiled ones by `compile=True` (`--compile`). The ids are
those of a plain step, which is `generate(model, ..., decoder=False)`. In bf16 another kernel may
round differently, so an id may change where two logits are almost equal.

A step at batch 1 reads each weight once and does two operations with it. So it takes at least
(bytes of weights and cache) / (bandwidth of the memory). What keeps a plain step from that:

Python and launches   Each small operation costs microseconds to start, and a step has hundreds.
                      torch.compile joins them into few loops. On CUDA, the remaining launches are
                      recorded once as a CUDA graph and replayed.
changing shapes       A cache that grows has another shape in each step, and would be compiled anew.
                      So the buffers keep their full size L, the column to write is a number on
                      the device, and a mask hides columns that are not written yet. A step reads
                      a view of those written, rounded up to 64 or 256. The compiled code is the
                      same for all sizes; on CUDA each has a graph of its own.
attention             Fused kernels are made for many queries. For one query on a CPU, the two
                      products of softmax(q k^T) v are faster one by one.
a prompt in 16 bits   A CPU without instructions for them multiplies in fp32 (`InFp32`).
matrix times vector   Libraries for matrix products are made for many rows. For a few rows (one, or
                      those of a guided picture), a plain loop over the weights is twice as fast.
                      torch.compile writes it, for float and int8 weights, on CUDA for 4-bit
                      ones, too. Some CPUs have instructions that only the libraries use. So on
                      a CPU a measurement picks loop or library (`CANDIDATES`). On CUDA, cuBLAS
                      is faster from two rows of float weights on; quantized weights keep the
                      loop, because cuBLAS would need a bf16 copy of them.
waiting               Reading an id is a GPU synchronization. So ids are read one step later, while
                      the next step already runs. Inside a picture, nothing else is read.

One layer is compiled, and its code serves all layers, since they differ in their tensors only. That
takes a sixth of the time of compiling the whole step, at the same speed. Layers that have hooks or
code of your own are compiled one by one. q, k, v and gate, up are not joined into one matrix each:
on CUDA the compiler puts their loops into one launch (`combo_kernels`), and on a CPU joining would
save 2 %.

Letter  meaning
B       rows of the batch, guidance streams included
L       columns of the cache: the prompt and all that may follow it, rounded up
H, Hkv  query heads, key/value heads; Dh their width; D the width of the residual stream
"""

import copy
import os
import shutil
import sys
import sysconfig
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import chameleon
from chameleon import (
    ChameleonAttention,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    KVCache,
    eager_attention,
    sdpa_attention,
)
from chameleon_extras.files import fast_bf16
from chameleon_extras.quantize import Int4Linear, Int8Linear, is_linear, kind_of
from vqvae import ONE_THREAD, ChameleonVQVAE, PreTrainedModel, setting

FEW = 4  # up to so many rows of x, a product is a loop; at 6 the library is faster in bf16
RECORDED = ("cuda",)  # devices on which a step is replayed as a CUDA graph
VIEW = {"cuda": 256, "cpu": 64}  # a compiled step reads a multiple of so many columns
UNREAD = 8  # columns at the end of a cache that no view reads
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
LONGEST = 4096  # terms of one sum in a compiled loop on a CPU
PART = 64  # bytes of a row of v; a compiled loop has one sum for each part


def in_memory(x: Tensor) -> Tensor:
    """x, written to memory, as a view with strides needs it. Without this, torch.compile would
    compute x again at each use: a vector once for each row of a matrix.
    """
    return x.as_strided(x.shape, x.stride())


# ---------------------------------------------------------------------------------------------
# Who multiplies: on a CPU the fastest form depends on the processor, so it is measured

FORMS = ("oneDNN", "torch", "fp32")  # of a cache's products; what they are, see `multiplied`
CANDIDATES = {  # of a layer's: (dtype of x, of the weights, compiled) -> the forms to measure
    (torch.bfloat16, torch.bfloat16, False): ("oneDNN", "torch"),
    (torch.bfloat16, torch.bfloat16, True): ("loop", "oneDNN", "torch"),
    (torch.bfloat16, torch.int8, True): ("loop", "int8pack"),
    (torch.float32, torch.float32, True): ("loop", "torch"),
}
MEASURED = 512  # a measurement pays if a cache has at least so many columns
LARGE = 2**19  # numbers in a matrix; smaller ones stay in the CPU's caches, no use to measure
HALF = (torch.bfloat16, torch.float16)  # the dtypes of 16 bits
WIDTH, OUTPUTS = 2**10, 2**15  # of the matrix that is measured
MANY = 16  # rows of x from which on fp32 may be faster although each matrix has to be converted
MANY_CODES = 256  # of a picture from which on bf16 pays; smaller ones are fp32 on every machine
MEASUREMENTS: list[str] = []  # all of this process, for tests/benchmark.py to print
READ = 2**26  # bytes that one measurement reads, more than most caches hold
# The time of this thread alone. On Windows it is counted in units of 16 ms, which is too coarse.
CLOCK = time.perf_counter if sys.platform == "win32" else time.thread_time


def onednn(enabled: bool) -> AbstractContextManager:
    return setting(torch.backends.mkldnn, "enabled", enabled)


def multiplied(a: Tensor, b: Tensor, form: str) -> Tensor:
    """a @ b with a's dtype (from a loop: fp32) in one of these forms:

    oneDNN     the library that comes with torch
    torch      torch's own kernels
    fp32       both converted to fp32
    loop       what torch.compile makes of `row_sums`
    int8pack   torch's kernel for int8 weights and bf16 rows
    """
    if form == "fp32":
        return (a.float() @ b.float()).to(a.dtype)
    if form == "loop":
        return compiled_row_sums(len(a), b.dtype)(b.mT, a)
    if form == "int8pack":
        return torch._weight_int8pack_mm(a, b.mT, a.new_ones(b.shape[1]))
    with onednn(form == "oneDNN"):
        return a @ b


@cache
def fastest(a: tuple[int, ...], b: tuple[int, ...], transposed: bool, dtype: torch.dtype,
            stored: torch.dtype, forms: tuple[str, ...]) -> str:
    """The form in which tensors of these shapes are multiplied soonest here, measured once.

    `dtype` is a's, `stored` is b's. `transposed`: b lies in memory with its last two dimensions
    exchanged. As in a model, there are so many b that they come from memory, and each is a view of
    a longer buffer.
    """
    if not torch.backends.mkldnn.is_available():
        forms = tuple(form for form in forms if form != "oneDNN")
    *batch, rows, columns = (*b[:-2], b[-1], b[-2]) if transposed else b
    count = max(1, READ // (torch.Size(b).numel() * stored.itemsize))
    x = torch.ones(a, dtype=dtype)
    many = [torch.ones(*batch, rows + 64, columns, dtype=stored)[..., :rows, :]
            for _ in range(count)]
    many = [y.mT for y in many] if transposed else many
    seconds = {}
    for form in forms * 4:  # the first time is a loop's compilation
        start = CLOCK()
        for y in many:
            multiplied(x, y, form)
        took = max(CLOCK() - start, 1e-9)
        seconds[form] = min(took, seconds.get(form, took))
    size = sum(y.nbytes for y in many) / 1e9
    MEASUREMENTS.append(f"{a} @ {b} of {str(stored).removeprefix('torch.')}, GB/s: "
                        + ", ".join(f"{form} {size / s:.1f}" for form, s in seconds.items()))
    return min(seconds, key=seconds.get)


def form_of(layer: nn.Module, rows: int, dtype: torch.dtype, compiled: bool) -> str:
    """In which form a linear layer is computed for so many rows of this dtype.

    One answer for all matrices of a kind, remembered for the process. Not measured: a compiled step
    has the loop, many rows in slow 16 bits have fp32, and for the rest torch asks oneDNN first.
    """
    weight = getattr(layer, "weight", None)  # a head of your own may have none, or a method
    if isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.numel() >= LARGE:
        forms = CANDIDATES.get((dtype, weight.dtype, compiled))
        if forms and rows <= FEW:
            return fastest((rows, WIDTH), (WIDTH, OUTPUTS), True, dtype, weight.dtype, forms)
        fast = fast_bf16(weight.device) if dtype == torch.bfloat16 else fast_fp16()
        if dtype in HALF and rows >= MANY and not compiled and not fast:
            return "fp32"
    return "loop" if compiled else "oneDNN"


def fast_fp16() -> bool:
    """Does this CPU multiply fp16 in hardware?"""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


class InFp32(TorchFunctionMode):
    """Inside, linear layers multiply bf16 and fp16 numbers in fp32, which converts one matrix at a
    time. A CPU without instructions for them reads a prompt three to six times as fast like this.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        weight = args[1] if function is F.linear and len(args) > 1 and not kwargs else None
        plain = type(weight) in (Tensor, nn.Parameter)  # torchao's multiply in their own way
        if plain and weight.dtype in HALF and weight.numel() >= LARGE:
            return F.linear(*(x if x is None else x.float() for x in args)).to(weight.dtype)
        return function(*args, **(kwargs or {}))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., n, m) @ b (..., m, o), where n is small and m or o is the length of a cache."""
    L = max(b.shape[-2:])
    measured = a.device.type == "cpu" and a.dtype == torch.bfloat16 and L >= MEASURED
    if not measured or torch.compiler.is_compiling():
        return a @ b
    rounded = 1 << (L - 1).bit_length()  # a cache grows: so few lengths are measured
    sizes = [tuple(rounded if n == L else n for n in x.shape) for x in (a, b)]
    return multiplied(a, b, fastest(*sizes, b.stride(-1) != 1, a.dtype, b.dtype, FORMS))


# ---------------------------------------------------------------------------------------------
# Attention: which kernel computes it


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float,
                        loops: bool = False) -> tuple[Tensor, None]:
    """softmax(q k^T / sqrt(Dh)) v for a single query, keys and values shared by their group.

    q (B, H, 1, Dh), k and v (B, Hkv, L, Dh), mask (B or 1, 1, 1, L) or None -> (B, H, 1, Dh)

    `loops`: in the form of which torch.compile makes better loops on a CPU. The query is made fp32
    once, not once for each key. Each exponential is computed once, and their sum divides the result
    instead of each weight. And each row of v is cut into parts, whose sums torch.compile joins into
    one loop: it reads every row once, from end to end. A single sum would become a loop over one
    part of all rows, then over the next, at two thirds of the speed.
    """
    dtype = q.dtype
    if loops:
        q, k = q.float(), k.float()
    q = in_memory(q.squeeze(2).unflatten(1, (k.shape[1], -1)))  # (B, Hkv, H/Hkv, Dh)
    scores = product(q, k.mT) * q.shape[-1] ** -0.5  # (B, Hkv, H/Hkv, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if loops:  # q and the scores are fp32
        exps = in_memory((scores - scores.amax(-1, keepdim=True)).exp())  # (B, Hkv, H/Hkv, L)
        weights = F.dropout(exps, dropout)[..., None]  # (B, Hkv, H/Hkv, L, 1)
        parts = v.unsqueeze(2).split(PART // v.itemsize, dim=-1)  # 16 bits: (B, Hkv, 1, L, 32) each
        y = torch.cat([(weights * part.float()).sum(-2) for part in parts], dim=-1)
        y = y / exps.sum(-1, keepdim=True)
    else:
        weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
        y = product(F.dropout(weights, dropout), v)
    return y.to(dtype).flatten(1, 2).unsqueeze(2), None  # (B, H, 1, Dh)


def auto_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                   dropout: float) -> tuple[Tensor, None]:
    """The form for one query; for many the fused kernel that torch picks.

    On CUDA in 16 bits, that is flash for a prompt without a mask. Padding and guidance need a mask,
    which flash does not take: torch then picks cuDNN's or the memory-efficient kernel.
    """
    if q.shape[2] > 1:
        return sdpa_attention(q, k, v, mask, dropout)
    loops = torch.compiler.is_compiling() and k.device.type == "cpu"
    return one_query_attention(q, k, v, mask, dropout, loops)


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}


def only(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
         dropout: float) -> tuple[Tensor, None]:
    """SDPA by one of BACKENDS and no other. ValueError where it cannot run the case."""
    if torch.compiler.is_compiling():  # `check_attention` has refused what cannot run
        with sdpa_kernel(BACKENDS[name]):
            return sdpa_attention(q, k, v, mask, dropout)
    try:
        with sdpa_kernel(BACKENDS[name]), warnings.catch_warnings(action="ignore"):
            return sdpa_attention(q, k, v, mask, dropout)  # warnings: a dozen lines of reasons
    except RuntimeError as e:
        if "kernel" not in str(e).lower() and "backend" not in str(e).lower():
            raise
        kind = "a mask (padding, guidance)" if mask is not None else f"heads of {q.shape[-1]}"
        raise ValueError(f"attention {name!r} cannot run {kind} with {k.shape[1]} key/value "
                         f"heads in {q.dtype} on {q.device.type}: use 'auto'") from e


ATTENTIONS = {"auto": auto_attention, "eager": eager_attention, "sdpa": sdpa_attention,
              **{name: partial(only, name) for name in BACKENDS}}


def check_attention(name: str, device: torch.device, dtype: torch.dtype,
                    compiled: bool = False) -> None:
    """ValueError for an attention that this device and dtype do not have."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention {name!r} is none of {', '.join(ATTENTIONS)}")
    if name in ("efficient", "cudnn") and device.type != "cuda":
        raise ValueError(f"attention {name!r} is for CUDA: on {device.type} use 'auto'")
    if device.type == "mps" and name == "flash":
        raise ValueError("attention 'flash' is not there on mps: use 'auto'")
    if name in ("flash", "cudnn") and device.type == "cuda" and dtype not in HALF:
        raise ValueError(f"attention {name!r} on CUDA needs bfloat16 or float16, not {dtype}: "
                         "use 'auto'")
    if name == "flash" and device.type == "cuda" and compiled:
        raise ValueError("attention 'flash' takes no mask, and a compiled step has one: use 'auto'")


def set_attention(model: PreTrainedModel, name: str, compiled: bool = False) -> PreTrainedModel:
    """Sets one of ATTENTIONS in all layers; returns the model."""
    check_attention(name, model.device, model.dtype, compiled)
    for attention in attentions(model):
        attention.attend = ATTENTIONS[name]
    return model


def attentions(module: nn.Module) -> list[ChameleonAttention]:
    """Also those inside a layer of your own, such as one that wraps another."""
    return [m for m in module.modules() if isinstance(m, ChameleonAttention)]


# ---------------------------------------------------------------------------------------------
# Matrix times vector


def row_sums(weight: Tensor, rows: Tensor) -> Tensor:
    """sum_i w_oi x_ni in fp32.   weight (O, I), rows (n, I) -> (n, O)

    torch.compile joins the sums of all rows into one loop, which reads each weight once, as it is
    stored. On a CPU the loop computes four outputs at once, one of each quarter: it loads x once
    for all four, and no sum waits for another. A sum of more than LONGEST terms is split: for it,
    torch.compile would choose a more exact way of adding, at a third of the speed.

    On a GPU, and on a CPU without AVX-512, four int8 weights are read as one int32. It is as wide
    as one number of x in fp32, so 16 bytes hold as many numbers of either. Single weights would be
    exchanged through a GPU's shared memory. In such a CPU they would fill only a part of a
    register, by way of memory, at a tenth of the speed.
    """
    cpu = weight.device.type == "cpu"
    fours = weight.dtype == torch.int8 and weight.shape[1] % 4 == 0 and not (cpu and AVX512)
    x = rows.float()[:, None]  # (n, 1, I)
    if fours:
        weight = weight.view(torch.int32)  # (O, I/4), byte b of number j is weight 4j + b
        x = x[:, 0].unflatten(-1, (-1, 4)).mT.contiguous()  # (n, 4, I/4)
    x = in_memory(x)
    splits = split_of(weight.shape[1]) if cpu else 1
    if splits > 1:
        x, weight = x.unflatten(-1, (splits, -1)), weight.unflatten(1, (splits, -1))
    sums = []
    for part in weight.chunk(4 if cpu else 1):  # (O/4, terms), or (O/4, splits, terms)
        # The left shift makes byte b the highest one, and the right shift keeps its sign.
        w = [(part << (24 - 8 * b)) >> 24 for b in range(4)] if fours else [part]
        sums.append([])
        for row in x:
            first, *others = [w_b.float() * x_b for w_b, x_b in zip(w, row)]
            total = sum(others, first).sum(-1)  # of each split, if there are several
            sums[-1].append(total.sum(-1) if splits > 1 else total)  # (O/4,)
    return torch.stack([torch.cat(row) for row in zip(*sums)])  # (n, O)


def split_of(length: int) -> int:
    """Into how many equal parts a sum of so many terms is split. A part fills whole registers."""
    return next((n for n in range(-(-length // LONGEST), 65) if length % (16 * n) == 0), 1)


def four_bit_sums(layer: Int4Linear, rows: Tensor) -> Tensor:
    """`row_sums` for 4-bit weights on a GPU, read eight at a time.   rows (n, I) -> (n, O)

        y_no = sum_i VALUES[q_oi] s_og x_ni        g: the group of i
    """
    eights = layer.weight.view(torch.int32)  # (O, I/8)
    x = rows.float().unflatten(-1, (-1, 8)).mT.contiguous()  # (n, 8, I/8)
    x = in_memory(x).unflatten(-1, (layer.scale.shape[1], -1))  # (n, 8, groups, g/8)
    # The upper half of byte b of number j is weight 8j + 2b, the lower half is the next one.
    shifts = [8 * b + half for b in range(4) for half in (4, 0)]
    w = [layer.values(eights >> shift & 15).unflatten(1, x.shape[2:]) for shift in shifts]
    sums = []
    for row in x:
        first, *others = [w_m * x_m for w_m, x_m in zip(w, row)]  # 8 times (O, groups, g/8)
        sums.append((sum(others, first) * layer.scale.float()[..., None]).sum((1, 2)))
    return torch.stack(sums)  # (n, O)


@cache
def compiled_row_sums(rows: int, dtype: torch.dtype) -> Callable:
    """`row_sums` alone, to be measured; a copy for each kind, as torch compiles one a few times."""
    return compile_step(copy_of(row_sums), torch.device("cpu"))


class RowProduct(nn.Module):
    """A linear layer for torch.compile: with few rows of x its product becomes a plain loop.

        y_no = s_o * sum_i w_oi x_ni + b_o        s_o: the scale of int8 weights, else 1
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows, cuda = x.flatten(0, -2), x.device.type == "cuda"  # (n, I)
        if len(rows) > (1 if cuda and isinstance(self.layer, nn.Linear) else FEW):
            return self.layer(x)
        if isinstance(self.layer, Int4Linear):
            y = four_bit_sums(self.layer, rows)  # (n, O)
        else:
            y = row_sums(self.layer.weight, rows)  # (n, O)
        if isinstance(self.layer, Int8Linear):
            y = y * self.layer.scale
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])  # (..., O)
        return y if self.layer.bias is None else y + self.layer.bias


def with_row_products(module: nn.Module, rows: int, dtype: torch.dtype) -> nn.Module:
    """The same module on the same weights, its linear layers as RowProduct where a loop is the
    fastest form for so many rows of this dtype; nothing is copied. What is not `is_known` stays as
    it is, and so does the function that `rows_of` may give.
    """
    if not is_known(module):
        return module
    if isinstance(module, Int4Linear):
        module.prepare(rows, dtype)
        return RowProduct(module) if module.weight.device.type == "cuda" else module
    if is_linear(module) or isinstance(module, Int8Linear):
        loop = form_of(module, rows, dtype, compiled=True) == "loop"
        return RowProduct(module) if loop else module
    twin = copy.copy(module)
    twin.training = False  # whatever the model does between two answers: no dropout in a step
    # Not named_children(): it leaves out None, and a module that has come before.
    twin._modules = {name: with_row_products(child, rows, dtype)
                     for name, child in module._modules.items()}
    return twin


# ---------------------------------------------------------------------------------------------
# Codes to pixels


def decode_codes(vq: ChameleonVQVAE, codes: Tensor) -> Tensor:
    """`vq.decode`, in bf16 where a CPU is faster at that: codes (B, S) -> pixels (B, 3, H, W)

    With the weights of tiny/, a level (0..255) moves by 2 at most. (Its own pictures are too small
    to be decoded in bf16.) Encoding stays in fp32, because bf16 would give other codes.
    """
    bf16 = (codes.device.type == "cpu" and codes.shape[-1] >= MANY_CODES
            and fast_bf16(codes.device))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return vq.decode(codes).float()  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The step


class Column:
    """A layer's part of the cache with the interface of KVCache: writes one column in place."""

    def __init__(self, k: Tensor, v: Tensor, column: Tensor) -> None:
        self.k, self.v, self.column = k, v, column

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, Hkv, 1, Dh) -> all columns, written or not (B, Hkv, L, Dh)"""
        self.k.index_copy_(2, self.column, k)
        self.v.index_copy_(2, self.column, v)
        return self.k, self.v


def block(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor, k: Tensor,
          v: Tensor, column: Tensor) -> Tensor:
    """One layer of one step: what is compiled.   x (B, 1, D) -> (B, 1, D)"""
    return layer(x, (cos, sin), allowed, Column(k, v, column))[0]


def copy_of(function: types.FunctionType) -> types.FunctionType:
    """The same function with code of its own: torch stores what it compiles on the code."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def compile_step(function: Callable, device: torch.device,
                 guards: Callable | None = None) -> Callable:
    options: dict = {"guard_filter_fn": guards, "size_asserts": False}  # guards compare sizes
    if device.type == "cpu":  # a product and its sum in one instruction
        options |= {"cpp.enable_floating_point_contract_flag": "fast"}
    if device.type == "cuda":
        # Tries some shapes of each loop, and puts loops that do not need each other in one launch.
        # Indices are not checked: those of the table of 4-bit values are 0 to 15.
        options |= {"max_autotune_pointwise": True, "combo_kernels": True,
                    "assert_indirect_indexing": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def check_compile(device: torch.device) -> None:
    """ValueError if torch.compile lacks what it needs here."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--compile is for cpu and cuda, not for {device.type}: leave it out")
    cuda = device.type == "cuda"
    if cuda and torch.cuda.get_device_capability(device)[0] < 7:
        raise ValueError("--compile needs a GPU of compute capability 7.0 or newer: leave it out")
    if cuda and find_spec("triton") is None:
        raise ValueError("--compile on CUDA needs Triton: pip install triton, or leave it out")
    names = ["gcc", "clang"] if cuda else ["clang++" if sys.platform == "darwin" else "g++"]
    names = ["cl"] if sys.platform == "win32" else names  # the one that torch looks for there
    given = os.environ.get("CC" if cuda else "CXX")  # Triton's launchers are C
    if not any(map(shutil.which, [given] if given else names)):  # torch tries no others
        raise ValueError(f"--compile needs a {'C' if cuda else 'C++'} compiler: install {names[0]},"
                         " or leave it out")
    if sys.platform == "linux" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError("--compile needs Python's headers: install python3-dev, or leave it out")


class StepCache(KVCache):
    """A KVCache, the other inputs of a compiled step, and the CUDA graphs that read them all.

    A recorded graph reads and writes the same memory in every replay: so nothing here ever moves.
    """

    def __init__(self, config: ChameleonConfig, B: int, L: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        # In a view of all columns, strides follow from the size, and compiled code would rely on
        # that. A few columns that no view reads prevent it.
        super().__init__(config, B, L + UNREAD, dtype, device)
        self.max_length = L
        self.new = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.allowed = torch.zeros(B, 1, 1, self.k[0].shape[2], dtype=torch.bool, device=device)
        self.views = {}  # columns read -> see `first`
        self.graphs = {}  # columns read -> a CUDA graph, and the hidden states that it writes

    def fill(self, new: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """What varies from step to step, for the arguments of `Decoder.__call__`."""
        self.new.copy_(new)
        self.column.fill_(self.length)
        self.positions.copy_(self.column if positions is None else positions)
        self.allowed[..., : self.length] = True if mask is None else mask[:, None, None, :-1]
        self.allowed[..., self.length] = True  # padding looks at itself: never an empty row

    def first(self, columns: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Views of the first columns: k and v of each layer (B, Hkv, L, Dh), allowed (B, 1, 1, L).

        Marked, so that what is compiled for one L serves all.
        """
        if columns not in self.views:
            k, v = ([x[:, :, :columns] for x in xs] for xs in (self.k, self.v))
            self.views[columns] = k, v, self.allowed[..., :columns]
            for x, dim in (*((x, 2) for x in (*k, *v)), (self.views[columns][2], 3)):
                torch._dynamo.mark_dynamic(x, dim)
        return self.views[columns]


class Decoder:
    """Runs the steps of `generate.stream`: `stream(model, ..., decoder=Decoder(model))`.

    Works on the model's own weights and changes none; only its choice of attention is set, unless
    `attention` is None.
    `compiled` takes seconds once for each number of rows. If layers are replaced, make a new one.
    One decoder keeps the last answer's cache and its CUDA graphs for the next of that shape.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, compiled: bool = False,
                 attention: str | None = "auto") -> None:
        self.model, self.compiled = model, compiled
        if attention:
            set_attention(model, attention, compiled)
        self.cache = None  # of the last answer that began; `spare`: of one that has ended
        layers = model.base_model.layers
        self.places = [attention.layer for layer in layers for attention in attentions(layer)]
        if len({*self.places} & {*range(model.config.num_hidden_layers)}) < len(self.places):
            raise ValueError(f"the layers' places in the cache, self_attn.layer, are {self.places}:"
                             f" give each its own, below num_hidden_layers")
        kind = kind_of(model)
        device, advice = model.device.type, None  # what spares unpacking the weights in each step
        if kind and device == "cuda" and not compiled:
            advice = "compile=True (--compile)"
        elif device == "cpu" and model.dtype != torch.bfloat16 and (
                kind == "int4" or kind == "int8" and not compiled):
            advice = "dtype=torch.bfloat16 (--dtype bfloat16)"
        if advice:
            warnings.warn(f"{kind} weights save memory but no time here: say {advice}",
                          stacklevel=2)
        if compiled:
            check_compile(model.device)
            self.any_shapes = torch._dynamo.config.patch(
                recompile_limit=2**30, accumulated_recompile_limit=2**30)
            if any(hasattr(module, "base_layer") for module in model.modules()):  # peft's
                raise ValueError("compile=True reads plain layers: call merge_and_unload() of the "
                                 "adapter before")
            attends = {attention.attend for attention in attentions(model)}
            for name, attend in ATTENTIONS.items():
                if attend in attends:
                    check_attention(name, model.device, model.dtype, compiled)
            if (attends - {*ATTENTIONS.values()} or not is_known(model.model)
                    or len(self.places) != len(layers)
                    or place_of(chameleon.allowed_keys) != "chameleon"):
                raise ValueError("compile=True goes through the layers itself, with a mask of its "
                                 "own, and each has one ChameleonAttention. A forward or hook of "
                                 "the whole model, an `attend` or `allowed_keys` of yours would "
                                 "not act: leave compile out")
            if odd := {type(p.data).__name__ for p in model.parameters()} - {"Tensor"}:  # torchao's
                raise ValueError(f"compile=True reads plain weights, and these are {min(odd)}: "
                                 "leave it out, or quantize by a quantization_config instead")
            self.layers = {}  # rows of a step -> the layers with the forms for so many
            self.made_of = made_of(model)
            # Before each call torch checks all its assumptions (guards); for all layers that is a
            # tenth of a step. Here it checks tensors only. The rest holds, because a copy of the
            # code serves one model, and within it layers that differ only in the values of their
            # tensors and in their place, `layer`. Other code than torch's and this project's, and
            # hooks, may read anything: with them, all guards stay, and no CUDA graph is kept.
            known = all(map(is_known, layers.modules()))
            self.keeps = known and is_known(model.model.embed_tokens) and is_known(model.model.norm)
            looks = [described(layer, "layer") for layer in layers]
            copies = 1 if known and all(look == looks[0] for look in looks) else len(layers)
            guards = torch.compiler.keep_tensor_guards_unsafe if known else None
            self.blocks = [compile_step(copy_of(block), model.device, guards)
                           for _ in range(copies)]
            self.head = compile_step(lambda layer, x: layer(x), model.device)

    def new_cache(self, B: int, L: int) -> KVCache:
        """An empty cache for B rows and L columns; `keep` it when its answer has ended."""
        cache = vars(self).pop("spare", None)  # in one step: another thread may ask, too
        if cache is None or (len(cache.new), cache.max_length) != (B, L):
            cache = self.cache = None  # or the old one would still be there beside the new one
            kind = StepCache if self.compiled else KVCache
            cache = kind(self.model.config, B, L, self.model.dtype, self.model.device)
        else:
            cache.length = 0
            for x in (cache.allowed, *cache.k, *cache.v):  # inf and nan would stay
                x.zero_()
        self.cache = cache
        return cache

    def keep(self, cache: KVCache) -> None:
        if self.compiled and self.keeps:
            self.spare = cache

    @contextmanager
    def kernels(self, rows: int, compiled: bool) -> Iterator[None]:
        """The fastest kernels for so many rows. torch may compile for any number of shapes."""
        form = form_of(self.model.lm_head, rows, self.model.dtype, compiled)
        with ExitStack() as contexts:
            if form == "torch":
                contexts.enter_context(onednn(False))
            if form == "fp32":
                contexts.enter_context(InFp32())
            if compiled:
                contexts.enter_context(ONE_THREAD)  # guards are checked by one thread at a time
                contexts.enter_context(self.any_shapes)
                # torch.set_default_device overrides functions, which fullgraph=True cannot trace.
                contexts.enter_context(torch._C.DisableTorchFunction())
            yield

    def fast_head(self, layer: nn.Module) -> Callable:
        """A head, rows (n, D) -> (n, outputs), as fast as it gets from its second use on.

        The first use runs the plain layer, so that the first id of an answer waits for no compiler
        and no measurement. All uses have the same number of rows.
        """
        runs = []

        def fast(x: Tensor) -> Tensor:
            x = x.contiguous()  # the prompt's last column is a view whose strides tell its length
            if not runs:
                runs.append(layer)
                return layer(x)
            with self.kernels(len(x), self.compiled):
                if self.compiled and len(runs) == 1:
                    runs.append(partial(self.head, with_row_products(layer, len(x), x.dtype)))
                return runs[-1](x)

        return fast

    def __call__(self, new: Tensor, mask: Tensor | None, positions: Tensor | None,
                 cache: KVCache) -> Tensor:
        """One more column: ids (B, 1) -> hidden states (B, D).

        `mask` (B, length + 1), the last column is this one: True where a row may see the column,
        False on padding and where its guidance stream skips it. `positions` (B, 1). Both None:
        nothing is padded.
        """
        with self.kernels(len(new), compiled=True):
            cache.fill(new, mask, positions)
            cache.length += 1
            multiple = VIEW[new.device.type]
            columns = min(-(-cache.length // multiple) * multiple, cache.max_length)
            if new.device.type in RECORDED:
                return self.replay(cache, columns)
            return self.walk(cache, *cache.first(columns))

    def walk(self, cache: StepCache, k: list[Tensor], v: list[Tensor], allowed: Tensor) -> Tensor:
        """One column of ChameleonModel.forward, from the cache's inputs -> hidden states (B, D)."""
        model = self.model.model
        x = model.embed_tokens(cache.new)  # (B, 1, D)
        if len(x) not in self.layers:
            self.layers[len(x)] = [with_row_products(layer, len(x), x.dtype)
                                   for layer in model.layers]
        rope = [y.to(x.dtype) for y in chameleon.rotary_table(model.config, cache.positions)]
        # n: a layer's place in the cache, also if others were taken out
        for layer, n, run in zip(self.layers[len(x)], self.places, cycle(self.blocks)):
            x = run(layer, x, *rope, allowed, k[n], v[n], cache.column)  # (B, 1, D)
        return model.norm(x)[:, -1]  # (B, D)

    def replay(self, cache: StepCache, columns: int) -> Tensor:
        """`walk` over the first columns, as one CUDA graph."""
        if columns not in cache.graphs:
            cache.graphs[columns] = self.record(cache, columns)
        graph, hidden = cache.graphs[columns]
        graph.replay()
        return hidden  # the next replay overwrites it, but the ids are chosen before that

    def record(self, cache: StepCache, columns: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        views = cache.first(columns)
        with torch.cuda.device(self.model.device):  # it need not be the current one
            # What runs first compiles and picks kernels, which a recording must not contain. It
            # writes the same column as the recorded step will: nothing is lost.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "\\s*Online softmax is disabled")
                self.walk(cache, *views)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                hidden = self.walk(cache, *views)
        return graph, hidden

    def read(self, steps: Iterator[Tensor], behind: int | None = None) -> Iterator[Tensor]:
        """Ids as they are made (B,) -> the same on the CPU, on CUDA one step behind.

        While the host waits for an id, the step that follows is at work already. The last of them
        is in vain where a text ends before its limit. The first id is not kept back: the step that
        follows it may have to compile.
        """
        cuda = self.model.device.type == "cuda"
        behind = (1 if cuda else 0) if behind is None else behind
        waiting = []

        def oldest() -> Tensor:
            ids, arrived = waiting.pop(0)
            if arrived is not None:
                arrived.synchronize()  # of this copy alone: what was queued behind it goes on
            return ids

        for n, ids in enumerate(steps):
            arrived = None
            if cuda:  # pinned memory, or the copy would wait
                device, host = ids.device, torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
                ids = host.copy_(ids, non_blocking=True)
                arrived = torch.cuda.current_stream(device).record_event()
            waiting.append((ids, arrived))
            if len(waiting) > (behind if n else 0):
                yield oldest()
        while waiting:
            yield oldest()

    def __reduce__(self) -> tuple:
        """Copying or pickling gives None: a copy of a model begins without compiled code."""
        return type(None), ()


def made_of(model: ChameleonForConditionalGeneration) -> list:
    """What a compiled decoder was made of. If one of these has changed, it is out of date."""
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    modules = [(module, type(module).forward, *hooks_of(module)) for module in model.modules()]
    code = [x for x in vars(chameleon).values() if callable(x)]  # one may have been replaced
    return [model.device, *places, *modules, described(model.base_model.layers), *code]


def described(module: nn.Module, *left_out: str) -> list:
    """All that its code depends on, if it `is_known`: its parts, their attributes, and the layout
    of their tensors. Of numbers, texts and tuples the value counts, of other attributes the `id`.
    (A decoder's copies of the layers hold the old ones, so no id is used again.)
    """
    values = [(name, repr(x) if isinstance(x, (int, float, str, tuple)) else id(x))
              for part in module.modules() for name, x in vars(part).items()
              if name[0] != "_" and name not in ("training", *left_out)]
    stored = [(x.dtype, x.stride()) for x in module.state_dict().values()]
    return [repr(module), *map(type, module.modules()), *values, *stored]


def hooks_of(module: nn.Module) -> list[Callable]:
    """What acts beside the code of its class: hooks, and a `forward` set on the instance."""
    own = [module.forward] if "forward" in vars(module) else []
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *own]


def is_known(module: object) -> bool:
    """Is it a module whose code is torch's or this project's, without hooks?"""
    if not isinstance(module, nn.Module) or hooks_of(module):
        return False
    act = getattr(module, "act", F.silu)
    return getattr(act, "func", act) in (F.silu, F.relu, F.gelu) and all(  # func: of a partial
        f"{place}.".startswith(("torch.nn.", "chameleon.", "chameleon_extras."))
        for place in (place_of(module.forward), type(module).__module__))


def place_of(function: Callable) -> str:
    """The module of its code. `__module__` would be that of what functools.wraps has wrapped."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def decoder_of(model: ChameleonForConditionalGeneration, compiled: bool) -> Decoder:
    """The decoder that `generate` takes if it is given none; an attention that was chosen stays.

    The model keeps a compiled one, because it took seconds to make.
    """
    if all(attention.attend is sdpa_attention for attention in attentions(model)):
        set_attention(model, "auto")
    if not compiled:
        return Decoder(model, attention=None)
    kept = vars(model).get("compiled_decoder")
    if kept is None or kept.made_of != made_of(model):
        kept = vars(model)["compiled_decoder"] = Decoder(model, compiled=True, attention=None)
    return kept
