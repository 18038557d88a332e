"""Tensor parallelism: one model on several devices, which compute each layer together.

    torchrun --nproc-per-node 4 generate.py --model chameleon-30b --prompt "..."

Who needs it: whoever has a model that is too large, or too slow, for one device.

Rank r of N holds

    H/N query heads and Hkv/N key/value heads: their rows of q, k, v_proj and of QK-norm,
                                             their columns of o_proj, their part of the KV cache
    F/N units of the feed-forward:           its rows of gate and up_proj, its columns of down_proj
    V/N of the vocabulary:                   its rows of embed_tokens and (not in nf4) lm_head
    and all of the rest:                     norms over D, the VQ-VAE

    x (B,T,D) --> own heads --> o_proj: a partial sum ----------all-reduce--> y (B,T,D)
              --> own part of F --> down_proj: a partial sum ---all-reduce--> y (B,T,D)

Every rank has the whole residual stream x, and all logits, which are gathered after lm_head. Every
rank samples with the same seed, so all choose the same token.

The model itself does not change: torch's tensor parallelism (DTensor) wraps its layers, as in
Megatron-LM (arXiv 1909.08053, section 3). DTensor has no 8- or 4-bit layers. This file cuts those
in the same places, and an all-reduce joins their outputs.

A Hugging Face folder in the dtype of the computation is memory-mapped, and all ranks share its
pages. Each rank reads for itself what has to be joined (Meta's files) or quantized. To do that only
once, use convert.py.
"""

import dataclasses
import os
import sys

import torch
import torch.nn as nn

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import own_rank, ranks
from chameleon_extras.quantize import KINDS, group_size, kind_of

COLUMNS = ("o_proj", "down_proj")  # layers of which a rank has columns; of all others it has rows


def check_ranks(config, N: int, quantize: str | None = None) -> None:
    """ValueError if a model, with weights quantized as `quantize` says, has no N equal parts."""
    for what, count in (("key/value heads", config.num_key_value_heads),
                        ("units of feed-forward", config.intermediate_size)):
        if count % N:  # the number of heads is a multiple of that of key/value heads
            raise ValueError(f"{N} processes cannot share {count} {what}: "
                             "start a number that divides it")
    for width in (config.hidden_size, config.intermediate_size):  # of o_proj and down_proj
        group = group_size(width, KINDS[quantize].GROUPS) if quantize in ("int4", "nf4") else 1
        if width // group % N:
            raise ValueError(f"{N} processes cannot share {width} inputs in 4-bit groups of "
                             f"{group}: take --quantize int8")


def join(device: torch.device) -> torch.device:
    """Joins torchrun's process group -> this rank's device. Only rank 0 still prints."""
    rank = int(os.environ.get("LOCAL_RANK", own_rank()))
    if device.type == "cuda":
        if rank >= torch.cuda.device_count():
            raise ValueError(f"{ranks()} processes for {torch.cuda.device_count()} CUDA devices: "
                             "start one for each")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if torch.distributed.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the end
    return device


def own_part(norm: nn.Module, rank: int, N: int) -> None:
    """Keeps of a QK-norm (H, Dh) the rows of this rank's heads (H/N, Dh). In place."""
    for name in ("weight", "bias"):
        mine = getattr(norm, name).detach().chunk(N)[rank].clone()  # (H/N, Dh)
        setattr(norm, name, nn.Parameter(mine, requires_grad=False))


def own_columns(layer: nn.Module, rank: int, N: int) -> nn.Module:
    """A quantized layer -> one of this rank's inputs: x (..., I/N) -> sum over ranks (..., O)"""
    weight = layer.weight.chunk(N, dim=1)[rank].clone()  # O rows of I/N numbers; 4 bits: I/N/2
    part = type(layer)(weight.shape[1] * layer.IN_A_NUMBER, len(weight))
    part.weight = weight
    by_group = layer.scale.ndim == 2
    part.scale = layer.scale.chunk(N, dim=1)[rank].clone() if by_group else layer.scale
    part.bias = layer.bias if rank == 0 else None  # the sum must contain it once
    # In place: each rank's partial sums (..., O) become the sums over all ranks.
    part.register_forward_hook(lambda layer, inputs, y: torch.distributed.all_reduce(y))
    return part


def shard_quantized(model: ChameleonForConditionalGeneration, rank: int, N: int) -> None:
    """Replaces each 8- or 4-bit layer by this rank's part of it. In place."""
    layers = [name for name, module in model.named_modules() if type(module) in KINDS.values()]
    for name in layers:
        layer = model.get_submodule(name)
        if name.endswith(COLUMNS):
            part = own_columns(layer, rank, N)
        else:
            part = layer.rows(torch.arange(len(layer.weight)).chunk(N)[rank])
        model.set_submodule(name, part)

    if isinstance(model.lm_head, nn.Linear):
        return  # nf4 leaves the head as it is, whole on every rank

    def gather(head: nn.Module, inputs: tuple, y: torch.Tensor) -> torch.Tensor:
        """Each rank's logits (..., its part of V) -> all of them (..., V)"""
        V = model.config.vocab_size
        start = rank * -(-V // N)  # the last part may be smaller
        whole = y.new_zeros(*y.shape[:-1], V)  # 0 in the places of the other ranks
        whole[..., start : start + y.shape[-1]] = y
        torch.distributed.all_reduce(whole)
        return whole

    model.lm_head.register_forward_hook(gather)


def shard(model: ChameleonForConditionalGeneration,
          device: torch.device) -> ChameleonForConditionalGeneration:
    """A whole model, the same on every rank -> this rank's part of it, on its device. In place.

    The config gets Hkv/N key/value heads, the size of this rank's KV cache.
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
        shard_quantized(model, rank, N)
        layers = {}
    # src_data_rank=None: every rank has read the same files, so none sends its weights to others.
    tp.parallelize_module(model, mesh, embedding | layers, src_data_rank=None)
    for layer in model.model.layers:
        own_part(layer.self_attn.q_norm, rank, N)
        own_part(layer.self_attn.k_norm, rank, N)
    # `rows` gives only some logits. Their rows of the head are on several ranks: compute them all.
    model.lm_head.rows = lambda ids: lambda hidden: model.lm_head(hidden)[..., ids]
    Hkv = model.config.num_key_value_heads // N
    model.config = model.model.config = dataclasses.replace(model.config, num_key_value_heads=Hkv)
    return model.to(device)
