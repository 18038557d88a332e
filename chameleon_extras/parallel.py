"""Tensor parallelism: one model on several devices, which compute each layer together.

    torchrun --nproc-per-node 4 generate.py --model chameleon-30b --prompt "..."

Who needs it: whoever has a model that is too large, or too slow, for one device.

Rank r of N holds

    H/N query heads and Hkv/N key/value heads: their rows of q, k, v_proj and of QK-norm,
                                             their columns of o_proj, their part of the KV cache
    F/N units of the feed-forward:           its rows of gate and up_proj, its columns of down_proj
    V/N of the vocabulary:                   its rows of embed_tokens and lm_head
    and all of the rest:                     norms over D, the VQ-VAE

    ids (B,T) --> own rows of embed_tokens, else 0 -------------all-reduce--> x (B,T,D)
    x (B,T,D) --> own heads --> o_proj: a partial sum ----------all-reduce--> y (B,T,D)
              --> own part of F --> down_proj: a partial sum ---all-reduce--> y (B,T,D)

Every rank has the whole residual stream x, and all logits: an all-reduce joins those of all ranks,
too. Every rank samples with the same seed, so all choose the same token.

The code of the model does not change. As in Megatron-LM (arXiv 1909.08053, section 3), its layers
get smaller tensors, and hooks join what the ranks compute. torch's own tensor parallelism (DTensor)
does the same, but has no 8- or 4-bit layers.

A Hugging Face folder in the dtype of the computation is memory-mapped, and all ranks share its
pages. Each rank reads for itself what has to be joined (Meta's files) or quantized. To do that only
once, use convert.py.
"""

import atexit
import dataclasses
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import own_rank, ranks
from chameleon_extras.quantize import KINDS, Int4Linear, group_size, kind_of

# Layers of which a rank has rows, and layers of which it has columns.
ROWS = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "gate_proj", "up_proj", "embed_tokens",
        "lm_head")
COLUMNS = ("o_proj", "down_proj")


def check_ranks(config, N: int, kind: str | None = None) -> None:
    """ValueError if a model, with weights of this kind of KINDS or None, has no N equal parts."""
    for what, count in (("key/value heads", config.num_key_value_heads),
                        ("units of feed-forward", config.intermediate_size)):
        if count % N:  # the number of heads is a multiple of that of key/value heads
            raise ValueError(f"{N} processes cannot share {count} {what}: "
                             "start a number that divides it")
    for width in (config.hidden_size, config.intermediate_size):  # of o_proj and down_proj
        group = group_size(width, KINDS[kind].GROUPS) if kind in ("int4", "nf4") else 1
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
        atexit.register(lambda: torch.distributed.is_initialized()
                        and torch.distributed.destroy_process_group())
    if torch.distributed.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the end
    return device


def own_part(layer: nn.Module, rank: int, N: int, device: torch.device | str, dim: int = 0) -> None:
    """Cuts each tensor of a layer along `dim`, if it has that, to the part of this rank. In place.

    dim 0 cuts all. dim 1 cuts the matrices; a bias, and a scale for each row, have no dim 1.
    """
    layer._apply(lambda whole: whole if dim >= whole.ndim
                 else whole.chunk(N, dim)[rank].to(device, copy=True))
    if isinstance(layer, Int4Linear):
        layer._kernel = None  # made of the whole weight


def shard(model: ChameleonForConditionalGeneration,
          device: torch.device) -> ChameleonForConditionalGeneration:
    """A whole model, the same on every rank -> this rank's part of it, on its device. In place.

    The config gets Hkv/N key/value heads, the size of this rank's KV cache.
    """
    N, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    check_ranks(model.config, N, kind_of(model))
    V, table, head = model.config.vocab_size, model.model.embed_tokens, model.lm_head
    tied = head.weight is table.weight  # then the head is cut with the table
    for name, layer in model.named_modules():
        if name.endswith(ROWS) and not (tied and layer is head):
            own_part(layer, rank, N, device)
        elif name.endswith(COLUMNS):  # x (..., I/N) -> y (..., O), the sum of all ranks' products
            own_part(layer, rank, N, device, dim=1)
            if rank > 0:
                layer.bias = None  # the sum must contain it once
            layer.register_forward_hook(lambda layer, inputs, y: torch.distributed.all_reduce(y))
    start = rank * -(-V // N)  # the first id of this rank

    def look_up(ids: Tensor) -> Tensor:
        """ids of all ranks (...) -> their rows (..., D), each from the rank that has it"""
        here = (ids >= start) & (ids < start + len(table.weight))
        x = F.embedding((ids - start).where(here, 0), table.weight)
        x = x.masked_fill(~here[..., None], 0)
        torch.distributed.all_reduce(x)
        return x

    def gather(head: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        """This rank's logits (..., its part of V) -> all of them (..., V)"""
        whole = y.new_zeros(*y.shape[:-1], V)  # 0 in the places of the other ranks
        whole[..., start : start + y.shape[-1]] = y
        torch.distributed.all_reduce(whole)
        return whole

    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("every rank has only a part of the weights: save the model before it is "
                         "shared out")

    table.forward = look_up
    model.save_pretrained = model.model.save_pretrained = refuse
    head.register_forward_hook(gather)
    Hkv = model.config.num_key_value_heads // N
    model.config = model.model.config = dataclasses.replace(model.config, num_key_value_heads=Hkv)
    return model.to(device).requires_grad_(False)  # all_reduce has no gradient
