"""One model over several devices: every layer is cut in N parts that compute at the same time.

    torchrun --nproc-per-node 4 generate.py --model chameleon-30b --prompt "..."

Rank r of N holds, of each layer,

    H/N query heads and G/N key/value heads: their rows of q, k, v_proj and of QK-norm,
                                             their columns of o_proj, their part of the KV cache
    F/N of the feed-forward:                 its rows of gate and up_proj, its columns of down_proj
    V/N of the vocabulary:                   its rows of embed_tokens and lm_head
    and all of the rest:                     norms over D, the VQ-VAE

    x (B,T,D) --> own heads --> o_proj: a partial sum ----------all-reduce--> y (B,T,D)
              --> own part of F --> down_proj: a partial sum ---all-reduce--> y (B,T,D)

The residual stream x is whole and the same on every rank, and so are the logits, which are
gathered behind lm_head. Every rank draws with the same seed, so all write the same token.

The model knows nothing of this: torch's own tensor parallelism (DTensor) wraps its layers from
outside. Megatron-LM, https://arxiv.org/abs/1909.08053, section 3.

A Hugging Face folder in the dtype one computes in is mapped, and the ranks share the pages; Meta's
files would be joined by each rank for itself: engine/convert.py first.
"""

import dataclasses
import os
import sys

import torch
import torch.nn as nn

from chameleon import ChameleonForConditionalGeneration


def ranks() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_ranks(config, N: int) -> None:
    """ValueError if the model cannot be cut into N parts."""
    for what, count in (("key/value heads", config.num_key_value_heads),
                        ("units of feed-forward", config.intermediate_size)):
        if count % N:  # the number of heads is a multiple of that of key/value heads
            raise ValueError(f"{N} processes cannot share {count} {what}: "
                             "start a number that divides it")


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
    """QK-norm has a row for each head (H, K): each rank keeps those of its heads (H/N, K)."""
    for name in ("weight", "bias"):
        mine = getattr(norm, name).detach().chunk(N)[rank].clone()  # (H/N, K)
        setattr(norm, name, nn.Parameter(mine, requires_grad=False))


def shard(
    model: ChameleonForConditionalGeneration, device: torch.device
) -> ChameleonForConditionalGeneration:
    """A whole model, the same on every rank -> this rank's part of it, on its device. In place.

    Its config has G/N key/value heads from then on, which is how large a KV cache must be here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import parallel as tp

    N, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    check_ranks(model.config, N)
    plan = {  # column-wise: rows of the weight, which are columns of its transpose
        "model.embed_tokens": tp.RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.[qkv]_proj": tp.ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": tp.RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": tp.ColwiseParallel(),
        "model.layers.*.mlp.up_proj": tp.ColwiseParallel(),
        "model.layers.*.mlp.down_proj": tp.RowwiseParallel(),
        "lm_head": tp.ColwiseParallel(output_layouts=Replicate()),  # all logits on every rank
    }
    mesh = init_device_mesh(device.type, (N,))
    # Every rank has read the same files: none needs to send its weights to the others.
    tp.parallelize_module(model, mesh, plan, src_data_rank=None)
    for layer in model.model.layers:
        own_part(layer.self_attn.q_norm, rank, N)
        own_part(layer.self_attn.k_norm, rank, N)
    # Inside a picture only the codes' logits count; their rows of the head lie on several ranks.
    model.lm_head.rows = lambda ids: lambda hidden: model.lm_head(hidden)[..., ids]
    G = model.config.num_key_value_heads // N
    model.config = model.model.config = dataclasses.replace(
        model.config, num_key_value_heads=G)
    return model.to(device)
