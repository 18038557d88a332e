"""Weights in 8 or 4 bits, by swapping nn.Linear from outside: the model knows nothing of it.

    nn.Linear                     quantize_model(model, "int8")      Int8Linear
    weight (O, I) bf16            ----------------------------->     weight (O, I) int8
                                                                     scale  (O,)   fp32

O, I: outputs and inputs of a layer; g: inputs in a group.

Who needs it: whoever has too little memory for bf16 weights, or wants compiled steps to read fewer
bytes: `--quantize`, or `quantization_config` of `from_pretrained`.

Why: writing one token at batch 1 reads every weight once and does two operations with it, so a
step takes (bytes of the weights) / (bandwidth of the memory). Half the bytes, half the time. The
weights only have to be SMALL in memory; the arithmetic can stay in floating point.

Why 8 bits are exact enough: a row of 4096 weights is about normally distributed, its largest value
at 3.5 to 4 standard deviations. With 127 steps up to there, one step is s = 4 sigma / 127, and
rounding to the nearest adds an error of s / sqrt(12) = 0.009 sigma: about 1 % of the weight,
independent from weight to weight, so the output of the layer is off by about 1 %, too. Rounding to
bf16 is off by 0.2 % already. One scale for each output row, since rows differ in size; it
multiplies the finished sum, so it costs nothing:

    y_o = sum_i w_oi x_i  ~  s_o * (sum_i q_oi x_i),     q = round(w / s),  s_o = max |w_o| / 127

With 4 bits there are 16 values ("nf4": at unequal distances, see NF4Linear), and one scale for each
GROUP of weights in a row:

    y_o = sum_g s_og * (sum_{i in g} q_oi x_i)

Left as they are: embeddings (one row is read, not all), norms, and the VQ-VAE, whose codes would
change.

Weights have the same bits whether they are packed while they are read (checkpoint.py), by
convert.py, or in memory (`quantize_model`), if memory holds them in the dtype of the file.
"""

import sys
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NF4 = (  # quantiles of the normal distribution, as printed in arXiv 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)
ROWS_AT_ONCE = 64  # of a weight, while it is packed: it passes through fp32
INT8_ROWS = 16  # up to so many rows of x, PyTorch's CPU kernel for int8 weights is the faster way
INT4_ROWS = 64  # the same of its kernel for int4 weights, whose unpacking takes longer
KERNEL_ROWS = 64  # of an int4 weight: its kernel orders them by blocks of so many
VECTORS = sys.platform != "win32"  # MSVC builds those kernels as plain loops: slower than unpacking
IN_CACHE = 256  # rows of a 4-bit weight unpacked at once: few enough for the cache


class PackedLinear(nn.Module):
    """y = x W^T + b.   x (..., I) -> (..., O).   `product` is x W^T: (rows, I) -> (rows, O)

    A new layer has the shapes of what `pack` makes, but no contents: it is on the meta device. The
    scale, like the packed weights, keeps its dtype in .to(), .half(), .float(). ValueError for a
    state dict of plain weights, and for a width that `pack` cannot divide into groups.
    """

    IN_A_NUMBER = 1  # so many weights are stored in each number of `weight`
    scale: Tensor
    bias: nn.Parameter | None
    pack: Callable[[Tensor], dict[str, Tensor]]  # weight (O, I) -> {"weight": ..., "scale": ...}
    _kernel: tuple[Tensor, Tensor] | None  # Int4Linear's second copy of the weights

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # One row shows the shapes. Arithmetic on meta tensors imports half of torch's compiler.
        for name, row in self.pack(torch.zeros(1, inputs, device="cpu")).items():
            self.register_buffer(name, row.new_empty(outputs, *row.shape[1:], device="meta"))
        self.register_parameter("bias", None)
        # Of the layer, not the class: torch.export puts back only what a layer had before.
        self._kernel, self._table = None, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, x.shape[-1]).contiguous())  # (rows, O)
        y = y.view(*x.shape[:-1], y.shape[-1])  # (..., O)
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> "PackedLinear":
        """A layer with only these outputs."""
        inputs = self.weight.shape[1] * self.IN_A_NUMBER
        part = type(self)(inputs, len(index))
        part.weight, part.scale = self.weight[index], self.scale[index]
        part.bias = nn.Parameter(self.bias[index]) if self.bias is not None else None
        return part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:
            self.scale = before.to(self.scale.device)
        if hasattr(self, "ones"):  # after `to_empty` they would hold no numbers
            self.ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
        return self

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        given = state.get(f"{prefix}weight", self.weight)
        if given.dtype != self.weight.dtype:  # a cast would make most of them 0
            raise ValueError(f"{prefix}weight is {given.dtype}, but this layer is quantized: load "
                             "plain weights before you quantize")
        super()._load_from_state_dict(state, prefix, *rest)
        if self._kernel:  # made of the weights before
            self._kernel = None
            self.prepare(1, torch.bfloat16)  # now: code that is compiled already would not


class Int8Linear(PackedLinear):
    """y = scale * (x W^T) + b"""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        # The CPU kernel's own scale must be bf16. Ones leave the scaling to us, in fp32.
        ones = torch.ones(outputs, dtype=torch.bfloat16, device="cpu")
        self.register_buffer("ones", ones, persistent=False)

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """A linear layer's weight (O, I) -> the tensors of its int8 twin."""
        weight = weight.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (O,)
        q = (weight / scale[:, None]).round().to(torch.int8)  # (O, I)
        return {"weight": q, "scale": scale}

    def unpacked(self) -> Tensor:
        """The weight (O, I) that these numbers stand for, fp32."""
        return self.weight.float() * self.scale[:, None]

    def product(self, x: Tensor) -> Tensor:
        few = x.shape[0] <= INT8_ROWS
        # The kernel reads 16 numbers at once, and crashes where a row begins in between. (A
        # compiler cannot trace offsets; its own tensors are aligned.)
        begin = 0 if torch.compiler.is_compiling() else x.storage_offset()
        aligned = x.shape[1] % 16 == 0 and begin % 16 == 0
        suits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not x.requires_grad
        if VECTORS and few and aligned and suits:  # the kernel has no gradient
            y = torch._weight_int8pack_mm(x, self.weight, self.ones)  # (rows, O)
        else:
            wide = x.float() if x.dtype == torch.float16 else x  # sums may exceed 65504
            y = F.linear(wide, self.weight.to(wide.dtype))  # (rows, O)
        # In fp32: with a bf16 scale, torch.compile would pick a slow kernel on CUDA.
        return (y * self.scale).to(x.dtype)


class Int4Linear(PackedLinear):
    """As Int8Linear with 4-bit weights, two in a byte, and a scale for each group of inputs.

    For few rows of x, the CPU's kernel reads a second copy of the weights, in an order of its own
    and of the same size, in memory only. In all other cases each call unpacks the weights. After a
    change of the weights by other means than load_state_dict, set `_kernel` to None.
    """

    IN_A_NUMBER = 2
    VALUES = tuple(range(-8, 8))  # what the 16 numbers of 4 bits stand for, times the scale
    GROUPS = (128, 64, 32)  # inputs that share a scale: the largest that divides the width
    _table: Tensor | None  # what `table` returns, made when first used

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.weight.shape[1] * self.IN_A_NUMBER // self.scale.shape[1]

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """A linear layer's weight (O, I) -> the tensors of its 4-bit twin."""
        groups = weight.float().unflatten(1, (-1, group_size(weight.shape[1])))  # (O, I/g, g)
        # From -8 to 7: the value of the largest magnitude lands on -8, whatever its sign is.
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (O, I/g, 1)
        # In bf16, as the CPU's kernel wants it, and before the division: the stored scale decides.
        scale = (extreme / -8).bfloat16()
        scale = torch.where(scale == 0, 1.0, scale)
        q = (groups / scale.float()).round().clamp(-8, 7) + 8  # 0 .. 15
        q = q.flatten(1).to(torch.uint8)  # (O, I)
        return {"weight": q[:, ::2] * 16 + q[:, 1::2], "scale": scale[..., 0]}  # (O, I/2), (O, I/g)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (O, I) that these numbers stand for."""
        values = self.table()  # (16,)
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=-1)  # (256, 2)
        pairs = pairs.view(torch.int64)[:, 0]  # (256,), both values of a byte as one number

        def floats(weight: Tensor, scale: Tensor) -> Tensor:
            numbers = pairs.index_select(0, weight.flatten().int()).view(torch.float32)
            groups = numbers.view(*scale.shape, self.group)  # (O, I/g, g)
            return (groups * scale.float()[..., None]).flatten(1).to(dtype)  # (O, I)

        if self.weight.device.type != "cpu" or torch.compiler.is_compiling():
            return floats(self.weight, self.scale)
        blocks = zip(self.weight.split(IN_CACHE), self.scale.split(IN_CACHE))
        return torch.cat([floats(*block) for block in blocks])  # (O, I)

    def product(self, x: Tensor) -> Tensor:
        if self.has_kernel(len(x), x.dtype) and not x.requires_grad:  # it has no gradient
            self.prepare(len(x), x.dtype)
            weight, scale = self._kernel
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, self.group, scale)
        return F.linear(x, self.unpacked(x.dtype))

    def table(self) -> Tensor:
        """VALUES (16,) on the device of the weight"""
        if self._table is None or self._table.device != self.weight.device:
            self._table = torch.tensor(self.VALUES, dtype=torch.float32, device=self.weight.device)
        return self._table

    def values(self, q: Tensor) -> Tensor:
        """q, int32 from 0 to 15 -> what they stand for, fp32"""
        return q.float() - 8  # sooner than a look into the table

    def has_kernel(self, rows: int, dtype: torch.dtype) -> bool:
        """Is the CPU's kernel the fast way? (In fp32 it is slower than unpacking on x86.)"""
        return (VECTORS and self.weight.device.type == "cpu" and dtype == torch.bfloat16
                and len(self.weight) % 16 == 0 and rows <= INT4_ROWS)

    def prepare(self, rows: int, dtype: torch.dtype) -> None:
        """Makes what a product of so many rows of this dtype reads beside the weight, once. To be
        called before compiling: compiled code would make it in each call.
        """
        self.table()
        if self.has_kernel(rows, dtype) and self._kernel is None:
            order = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            packed = torch.cat([order(torch.stack((w // 16, w % 16), -1).flatten(1).int(), 1)
                                for w in self.weight.split(KERNEL_ROWS)])  # (O, I/2)
            scale = self.scale.T.to(dtype)  # (I/g, O)
            self._kernel = packed, torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()


class NF4Linear(Int4Linear):
    """As Int4Linear with 16 other values, NF4 of QLoRA (arXiv 2305.14314, appendix E).

        w_oi = NF4[q_oi] * scale_og        scale_og: the largest magnitude of the group's 64 weights

    Weights of a row are about normally distributed. The 16 values come from quantiles of that
    distribution, so they are dense where most weights are. Equals bitsandbytes' "nf4" bit for bit.
    The head stays as it is, as in transformers. No CPU kernel reads these weights: each call
    unpacks them. So they save memory and no time, but for a compiled step on CUDA.
    """

    VALUES, GROUPS = NF4, (64,)

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        group = group_size(weight.shape[1], NF4Linear.GROUPS)
        groups = weight.float().unflatten(1, (-1, group))  # (O, I/g, g)
        scale = groups.abs().amax(2)  # (O, I/g)
        values = torch.tensor(NF4, dtype=torch.float32, device=weight.device)  # (16,)
        middles = (values[1:] + values[:-1]) / 2  # beyond one, the value above is nearer
        safe = torch.where(scale == 0, 1.0, scale)
        shares = (groups / safe[..., None]).flatten(1)  # (O, I), from -1 to 1
        # As torch.bucketize(shares, middles), in a third of the time.
        q = sum((shares > middle).byte() for middle in middles)  # (O, I), 0 .. 15
        return {"weight": q[:, ::2] * 16 + q[:, 1::2], "scale": scale}  # (O, I/2), (O, I/g)

    def values(self, q: Tensor) -> Tensor:
        return self.table()[q]

    def has_kernel(self, rows: int, dtype: torch.dtype) -> bool:
        return False


KINDS = {"int8": Int8Linear, "int4": Int4Linear, "nf4": NF4Linear}


def group_size(inputs: int, sizes: tuple[int, ...] = Int4Linear.GROUPS) -> int:
    """The largest of the sizes that divides the width. ValueError if none does."""
    for size in sizes:
        if inputs % size == 0:
            return size
    raise ValueError(f"4-bit weights need widths that are multiples of {sizes[-1]}, not {inputs}")


def kind_of(model: nn.Module) -> str | None:
    """Which of KINDS the layers of a model are; None if they are not quantized."""
    classes = {type(module) for module in model.modules()}
    return next((kind for kind, layer in KINDS.items() if layer in classes), None)


def pack(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A weight (O, I) -> the tensors of its twin; memory on the way is that of ROWS_AT_ONCE."""
    twin = KINDS[kind](weight.shape[1], len(weight))  # tells shapes and dtypes
    # Allocated before the temporary tensors, which then leave no holes in the heap.
    packed = {name: torch.empty(t.shape, dtype=t.dtype, device=weight.device)
              for name, t in twin.state_dict().items()}
    for start in range(0, len(weight), ROWS_AT_ONCE):
        few = slice(start, start + ROWS_AT_ONCE)
        for name, tensor in KINDS[kind].pack(weight[few]).items():
            packed[name][few] = tensor
    if not packed["scale"].isfinite().all():
        raise ValueError("the weights hold inf or nan, which no integer stands for: they are "
                         "damaged, download them again")
    return packed


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Is it x W^T + b? Not with hooks, or a `forward` of its own or of a subclass (LoRA)."""
    own = getattr(module.forward, "__func__", None) is not nn.Linear.forward
    hooks = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, nn.Linear) and not own and not hooks


def swap_layers(model: nn.Module, kind: str) -> dict[str, nn.Linear]:
    """Puts twins without contents in place of the decoder's linear layers and, but for nf4, of its
    head -> {name: the layer that was there}. What is not `is_linear` stays as it is; a model with
    such a layer cannot be loaded again.

    ValueError for an unknown kind, or for widths that 4-bit groups do not fit, before any change.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization {kind!r} is none of {', '.join(KINDS)}")
    if any("lora_magnitude" in name for name, _ in model.named_parameters()):
        raise ValueError("DoRA computes with plain weights: call merge_and_unload() of it before")
    layers = {name: module for name, module in model.named_modules()
              if is_linear(module) and not (kind == "nf4" and "lm_head" in name)
              and not any(part in name for part in ("vqmodel", "lora_", "modules_to_save"))}
    twins = {name: KINDS[kind](layer.in_features, layer.out_features)
             for name, layer in layers.items()}
    for name, twin in twins.items():
        twin.bias = layers[name].bias
        model.set_submodule(name, twin)
    return layers


def quantize_model(model: nn.Module, kind: str) -> nn.Module:
    """Replaces the linear layers of a model in memory; returns the model. Errors: `swap_layers`."""
    layers = swap_layers(model, kind)
    while layers:  # each bf16 weight is gone before the next one is packed
        name, layer = layers.popitem()
        for tensor_name, tensor in pack(layer.weight.detach(), kind).items():
            setattr(model.get_submodule(name), tensor_name, tensor)
        model.get_submodule(name).to(layer.weight.device)
    return model
