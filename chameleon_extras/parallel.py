"""One model over several devices: every layer is cut in N parts that compute at the same time.

    torchrun --nproc-per-node 4 generate.py --model chameleon-30b --prompt "..."

Rank r of N holds, of each layer,

    H/N query heads and Hkv/N key/value heads: their rows of q, k, v_proj and of QK-norm,
                                             their columns of o_proj, their part of the KV cache
    F/N of the feed-forward:                 its rows of gate and up_proj, its columns of down_proj
    V/N of the vocabulary:                   its rows of embed_tokens and lm_head
    and all of the rest:                     norms over D, the VQ-VAE

    x (B,T,D) --> own heads --> o_proj: a partial sum ----------all-reduce--> y (B,T,D)
              --> own part of F --> down_proj: a partial sum ---all-reduce--> y (B,T,D)

The residual stream x is whole and the same on every rank, and so are the logits, which are
gathered behind lm_head. Every rank draws with the same seed, so all write the same token.

The model knows nothing of this: torch's own tensor parallelism (DTensor) wraps its layers from
outside. Megatron-LM, https://arxiv.org/abs/1909.08053, section 3. DTensor has no layers of 8 or 4
bits: those are cut here, in the same places, and torch adds up or gathers what they give.

A Hugging Face folder in the dtype one computes in is mapped, and the ranks share its pages. Meta's
files, which have to be joined, and weights to be quantized each rank reads for itself: better
write them once by convert.py.
"""

import dataclasses
import os
import sys

import torch
import torch.nn as nn

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import ranks
from chameleon_extras.quantize import KINDS, TORCHAO, group_size, kind_of

COLUMNS = ("o_proj", "down_proj")  # layers of which a rank has columns; of all others it has rows


def check_ranks(config, N: int, quantize: str | None = None) -> None:
    """ValueError if the model, its weights quantized so or not, cannot be cut into N parts."""
    if quantize == TORCHAO:
        raise ValueError(f"{TORCHAO} is for one device: take --quantize int8 under torchrun")
    for what, count in (("key/value heads", config.num_key_value_heads),
                        ("units of feed-forward", config.intermediate_size)):
        if count % N:  # the number of heads is a multiple of that of key/value heads
            raise ValueError(f"{N} processes cannot share {count} {what}: "
                             "start a number that divides it")
    for width in (config.hidden_size, config.intermediate_size):  # of o_proj and down_proj
        if quantize == "int4" and width // group_size(width) % N:
            raise ValueError(f"{N} processes cannot share {width} inputs in 4-bit groups of "
                             f"{group_size(width)}: take --quantize int8")


def join(device: torch.device) -> torch.device:
    """Joins the processes of torchrun -> this one's device. From here only the first one talks."""
    rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if rank >= torch.cuda.device_count():
            raise ValueError(f"{ranks()} processes for {torch.cuda.device_count()} CUDA devices: "
                             "start one for each")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if torch.distributed.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it lives as long as we do
    return device


def own_part(norm: nn.Module, rank: int, N: int) -> None:
    """QK-norm has a row for each head (H, Dh): each rank keeps those of its heads (H/N, Dh)."""
    for name in ("weight", "bias"):
        mine = getattr(norm, name).detach().chunk(N)[rank].clone()  # (H/N, Dh)
        setattr(norm, name, nn.Parameter(mine, requires_grad=False))


def own_rows(layer: nn.Module, rank: int, N: int, mesh) -> nn.Module:
    """A quantized layer -> this rank's outputs of it. x (..., I) -> (..., own part of O)

    As `own_columns` is called, though it needs no mesh.
    """
    mine = torch.arange(len(layer.weight)).chunk(N)[rank]
    return layer.rows(mine)


def own_columns(layer: nn.Module, rank: int, N: int, mesh) -> nn.Module:
    """A quantized layer -> this rank's inputs of it. x (..., own part of I) -> (..., O), the sum
    over all ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    weight = layer.weight.chunk(N, dim=1)[rank].clone()  # O rows of I/N numbers; 4 bits: I/N/2
    inputs = weight.shape[1] * (2 if type(layer) is KINDS["int4"] else 1)
    part = type(layer)(inputs, len(weight), bias=False)
    part.weight = weight
    by_group = layer.scale.ndim == 2
    part.scale = layer.scale.chunk(N, dim=1)[rank].clone() if by_group else layer.scale
    part.bias = layer.bias if rank == 0 else None  # it must come into the sum once

    def add_up(layer: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
        """Each rank's partial sums (..., O) -> the sums (..., O)"""
        whole = DTensor.from_local(y, mesh, [Partial()], run_check=False)
        return whole.redistribute(placements=[Replicate()]).to_local()

    part.register_forward_hook(add_up)
    return part


def shard_quantized(model: ChameleonForConditionalGeneration, rank: int, N: int, mesh) -> None:
    """Each 8- or 4-bit layer becomes this rank's part of it."""
    from torch.distributed.tensor import DTensor, Shard

    V = model.config.vocab_size
    layers = [name for name, module in model.named_modules() if type(module) in KINDS.values()]
    for name in layers:
        cut = own_columns if name.endswith(COLUMNS) else own_rows
        model.set_submodule(name, cut(model.get_submodule(name), rank, N, mesh))

    def gather(head: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
        """Each rank's logits (..., its part of V) -> all of them (..., V)"""
        whole = torch.empty(*y.shape[:-1], V, device="meta")  # V may not divide by N
        return DTensor.from_local(y, mesh, [Shard(y.ndim - 1)], run_check=False, shape=whole.shape,
                                  stride=whole.stride()).full_tensor()

    model.lm_head.register_forward_hook(gather)


def shard(
    model: ChameleonForConditionalGeneration, device: torch.device
) -> ChameleonForConditionalGeneration:
    """A whole model, the same on every rank -> this rank's part of it, on its device. In place.

    Its config has Hkv/N key/value heads from then on, which is how large a KV cache must be here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import parallel as tp

    N, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    check_ranks(model.config, N, kind_of(model))
    embedding = {"model.embed_tokens": tp.RowwiseParallel(input_layouts=Replicate())}
    layers = {  # column-wise: rows of the weight, which are columns of its transpose
        "model.layers.*.self_attn.[qkv]_proj": tp.ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": tp.RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": tp.ColwiseParallel(),
        "model.layers.*.mlp.up_proj": tp.ColwiseParallel(),
        "model.layers.*.mlp.down_proj": tp.RowwiseParallel(),
        "lm_head": tp.ColwiseParallel(output_layouts=Replicate()),  # all logits on every rank
    }
    mesh = init_device_mesh(device.type, (N,))
    if kind_of(model):
        shard_quantized(model, rank, N, mesh)
        layers = {}
    # Every rank has read the same files: none needs to send its weights to the others.
    tp.parallelize_module(model, mesh, embedding | layers, src_data_rank=None)
    for layer in model.model.layers:
        own_part(layer.self_attn.q_norm, rank, N)
        own_part(layer.self_attn.k_norm, rank, N)
    # Inside a picture only the codes' logits count; their rows of the head lie on several ranks.
    model.lm_head.rows = lambda ids: lambda hidden: model.lm_head(hidden)[..., ids]
    Hkv = model.config.num_key_value_heads // N
    model.config = model.model.config = dataclasses.replace(
        model.config, num_key_value_heads=Hkv)
    return model.to(device)
