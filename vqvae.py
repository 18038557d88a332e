"""The image tokenizer of Chameleon: a VQ-VAE turns a picture into a grid of integers, and back.

    pixels (B,3,H,W) --encoder--> --quant_conv--> z (B,E,h,w) --nearest code--> codes (B,S)
                                                                                    |
    pixels (B,3,H,W) <--decoder-- <--post_quant_conv-- zq (B,E,h,w) <--codebook-----+

Letter  meaning                                         default  config field
B       pictures in the batch
H, W    height and width of a picture, in pixels         512      resolution
h, w    the same after the encoder: H / 2^(levels-1)     32       levels: len(channel_multiplier)
S       codes per picture, h * w in raster order         1024
K       codes in the codebook                            8192     num_embeddings
E       width of one code vector e_k ("D" in the paper)  256      embed_dim
C       channels of a feature map                        128..512 base_channels
N       vectors in a batch, B * S

Why a picture is exactly 1024 tokens: 512 pixels, halved four times, are 32, and 32 * 32 = 1024.
A picture of another size gives another S. Nothing in this file is tied to 512.

What differs from a plain VQ-VAE (van den Oord et al., 2017, https://arxiv.org/abs/1711.00937):
- Encoder and decoder are those of VQGAN (Esser et al., 2021, https://arxiv.org/abs/2012.09841):
  residual blocks, GroupNorm, swish, and one attention block at the lowest resolution.
- The sizes are those of Chameleon (https://arxiv.org/abs/2405.09818, section 2.1), which trains
  its image tokenizer as Make-A-Scene does (https://arxiv.org/abs/2203.13131).

Three words for three spaces: `pixels` are floats in [-1, 1]; `codes` are integers in 0..K-1;
`ids` are integers in 0..V-1, the vocabulary of the decoder in chameleon.py, not used here.

To reuse this file, copy it: it needs torch alone, except for from_pretrained and save_pretrained.
"""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from math import isqrt
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Annotated, Any, NamedTuple, Self, TypeVar, get_args, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Both values are VQGAN's (2012.09841). GroupNorm normalizes groups of C / 32 channels. With
# base_channels=32 a group is one channel. Normalizing it removes its mean, so flat colours are
# lost: use 64 or more.
GROUPS, GROUP_NORM_EPS = 32, 1e-6
ONE_THREAD = RLock()  # held while a global setting of torch is changed, or compiled code runs


# ---------------------------------------------------------------------------------------------
# Config. The type of a field holds a check of its values, and words for the error.


def whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda n: type(n) is int and low <= n <= high  # isinstance would take True for 1


def real(low: float, high: float) -> Callable[[object], bool]:
    return lambda x: type(x) is not bool and isinstance(x, (int, float)) and low <= x <= high


# name = Annotated[type, words for the error, check]
Size = Annotated[int, "a whole number from 1 to 1000000", whole(1, 10**6)]
Count = Annotated[int, "a whole number from 1 to 256", whole(1, 256)]
Counts = Annotated[tuple[int, ...], "a list of 1 to 20 whole numbers from 1 to 256",
                   lambda v: type(v) in (list, tuple) and 0 < len(v) <= 20
                   and all(map(whole(1, 256), v))]
Sizes = Annotated[tuple[int, ...], "a list of whole numbers",
                  lambda v: type(v) in (list, tuple) and all(map(whole(1, 10**6), v))]
Scale = Annotated[float, "a number from 0 to 1e9", real(0, 1e9)]
Share = Annotated[float, "a number of at least 0 and below 1", lambda x: real(0, 1)(x) and x < 1]
Flag = Annotated[bool, "true or false, without quotes", lambda x: type(x) is bool]
Text = Annotated[str, "text", lambda x: type(x) is str]


def check_fields(config: object) -> None:
    """ValueError, naming the field, if a dataclass holds a value that the field's type forbids."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, optional = getattr(config, name), type(None) in get_args(hint)
        kind = get_args(hint)[0] if optional else hint
        if not hasattr(kind, "__metadata__"):
            continue  # a plain type, such as `int | None`: not checked
        _, words, holds = get_args(kind)
        if not (holds(value) or (optional and value is None)):
            wanted = words + " or left out" * optional
            raise ValueError(f"{name} must be {wanted}, got {' '.join(repr(value).split()):.80}")


Config = TypeVar("Config", bound="PreTrainedConfig")


def keeping_others(cls: type[Config]) -> type[Config]:
    """Class decorator: a keyword that is no field, such as one of a newer config.json, becomes an
    attribute, and `to_dict` returns it. Dropped are keywords in OF_WEIGHTS, those that begin with
    "_", and those that name another attribute of the class.
    """
    init = cls.__init__

    @wraps(init)
    def __init__(self, *values, **named) -> None:
        fields = get_type_hints(cls)
        init(self, *values, **{name: named[name] for name in named if name in fields})
        for name in [n for n in named if n not in fields and n not in cls.OF_WEIGHTS]:
            if name[:1] not in ("", "_") and not hasattr(cls, name):
                setattr(self, name, named[name])

    cls.__init__ = __init__
    return cls


class PreTrainedConfig:
    """What both configs share under the names of transformers' class."""

    # Keys of a config.json that describe the weights beside it; they are not written back.
    OF_WEIGHTS = {"architectures", "transformers_version", "dtype", "torch_dtype",
                  "quantization_config", "quantized_weights"}
    model_type = ""  # transformers' name for what the config describes

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The object in a config.json, or what `to_dict` gives -> a config."""
        return cls(**values)

    def to_dict(self) -> dict:
        return copy.deepcopy(vars(self)) | {"model_type": self.model_type}

    def get_text_config(self, *ignored: object, **also_ignored: object) -> Self:
        """transformers' Trainer asks for it; text and pictures have one config here."""
        return self

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | PathLike) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | PathLike, **changes) -> Self:
        """Reads the config.json of a folder or a hub id; `changes` replace its values."""
        from chameleon_extras.pretrained import load_config  # so that this file stands alone

        return load_config(cls, folder, **changes)


@keeping_others
@dataclass
class ChameleonVQVAEConfig(PreTrainedConfig):
    """Fields and defaults of transformers' ChameleonVQVAEConfig; ValueError names a bad field."""

    embed_dim: Size = 256
    num_embeddings: Size = 8192
    double_latent: Flag = False  # True: the encoder returns 2 * latent_channels
    latent_channels: Size = 256
    resolution: Size = 512
    in_channels: Count = 3
    base_channels: Size = 128
    channel_multiplier: Counts = (1, 1, 2, 2, 4)  # width of each level / base_channels
    num_res_blocks: Count = 2
    attn_resolutions: Sizes | None = None  # H of feature maps with attention
    dropout: Share = 0.0
    attn_type: Text | None = "vanilla"  # anything else: no attention, not even in `middle`
    initializer_range: Scale = 0.02  # in config.json only: nothing reads it
    beta: Scale = 0.25  # weight of the commitment loss, the value in section 3.2 of VQ-VAE
    # DIFFERS: in equation 3 of VQ-VAE, and here, beta multiplies the commitment loss. In VQGAN's
    # code and in transformers it multiplies the CODEBOOK loss; True gives their loss.
    beta_on_codebook: Flag = False
    model_type = "chameleon_vqgan"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.channel_multiplier = tuple(self.channel_multiplier)
        if self.attn_resolutions is not None:
            self.attn_resolutions = tuple(self.attn_resolutions)
        if any(self.base_channels * m % GROUPS for m in self.channel_multiplier):
            raise ValueError(f"base_channels {self.base_channels} times each channel_multiplier "
                             f"{self.channel_multiplier} must be a multiple of {GROUPS} "
                             "(GroupNorm)")
        if self.resolution % self.downsampling:
            raise ValueError(f"resolution {self.resolution} must be a multiple of "
                             f"{self.downsampling}, 2^(levels - 1) of channel_multiplier "
                             f"{self.channel_multiplier}")

    @property
    def downsampling(self) -> int:
        """Side of the patch that one code stands for, in pixels: 16 in the released model."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def codes_per_image(self) -> int:
        """S of a square picture: (512 / 16)^2 = 1024 in the release (2405.09818, section 2.1)."""
        return (self.resolution // self.downsampling) ** 2


# ---------------------------------------------------------------------------------------------
# Building blocks of encoder and decoder. Their attribute names are those of the checkpoint.

swish = F.silu  # x * sigmoid(x), any shape -> same


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)


class ResBlock(nn.Module):
    """The residual block of VQGAN (2012.09841).   (B, C_in, H, W) -> (B, C_out, H, W)

        out = x + conv2(swish(norm2(conv1(swish(norm1(x))))))
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:  # then a 1x1 convolution brings x to C_out channels
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # One name for every intermediate map, so that each assignment frees the map before it.
        y = self.norm1(x)
        y = swish(y)
        y = self.conv1(y)  # (B, C_out, H, W)
        y = self.norm2(y)
        y = swish(y)
        y = self.conv2(self.dropout(y))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)  # (B, C_out, H, W)
        return x + y


class AttnBlock(nn.Module):
    """VQGAN's (2012.09841) self-attention over H * W positions, one head.   (B, C, H, W) -> same"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))  # each (B, C, HW)
        # weights[i, j] = softmax over j of q_i . k_j / sqrt(C)
        weights = torch.softmax(q.mT @ k * q.shape[1] ** -0.5, dim=-1)  # (B, HW, HW)
        # y_i = sum_j weights[i, j] v_j
        y = (v @ weights.mT).view_as(x)  # (B, C, H, W)
        return x + self.proj_out(y)


def middle(c: ChameleonVQVAEConfig, channels: int) -> nn.Sequential:
    """ResBlock, attention (its cost grows with (h w)^2), ResBlock.   (B, C, h, w) -> same"""
    return nn.Sequential(OrderedDict(
        block_1=ResBlock(channels, channels, c.dropout),
        attn_1=AttnBlock(channels) if c.attn_type == "vanilla" else nn.Identity(),
        block_2=ResBlock(channels, channels, c.dropout)))


def downsample(channels: int) -> nn.Sequential:
    """A 3x3 convolution of stride 2.   (B, C, H, W) -> (B, C, H/2, W/2)"""
    # Zeros at the right and at the bottom only, as in VQGAN's code. With padding=1 every window
    # would start one pixel earlier, and the released weights would give other codes.
    return nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d((0, 1, 0, 1)),
        conv=nn.Conv2d(channels, channels, kernel_size=3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    """Nearest-neighbour upsampling, then a 3x3 convolution.   (B, C, H, W) -> (B, C, 2H, 2W)"""
    return nn.Sequential(OrderedDict(
        nearest=nn.Upsample(scale_factor=2.0, mode="nearest"),
        conv=nn.Conv2d(channels, channels, kernel_size=3, padding=1)))


class Level(nn.Module):
    """The blocks of one resolution; the encoder adds `downsample`, the decoder `upsample`.

    channels: of the input, then of each block's output. resolution: the height of the maps when
    the picture is c.resolution pixels high.
    """

    def __init__(self, c: ChameleonVQVAEConfig, channels: list[int], resolution: int) -> None:
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:]))
        self.block = nn.ModuleList(ResBlock(i, o, c.dropout) for i, o in pairs)
        attends = c.attn_type == "vanilla" and resolution in (c.attn_resolutions or ())
        self.attn = nn.ModuleList(AttnBlock(o) if attends else nn.Identity() for _, o in pairs)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def steps(self) -> list[nn.Module]:
        """All modules in the order in which they run."""
        blocks = [module for both in zip(self.block, self.attn) for module in both]
        return [*blocks, self.downsample, self.upsample]


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> features (B, latent_channels, h, w); VQGAN's encoder (2012.09841).

    With double_latent it returns 2 * latent_channels.
    """

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [c.base_channels * m for m in c.channel_multiplier]
        self.conv_in = nn.Conv2d(c.in_channels, c.base_channels, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        previous = c.base_channels
        for i, width in enumerate(widths):
            level = Level(c, [previous] + [width] * c.num_res_blocks, c.resolution >> i)
            if i < len(widths) - 1:
                level.downsample = downsample(width)
            self.down.append(level)
            previous = width
        self.mid = middle(c, previous)
        self.norm_out = group_norm(previous)
        out_channels = c.latent_channels * (2 if c.double_latent else 1)
        self.conv_out = nn.Conv2d(previous, out_channels, kernel_size=3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)  # (B, C, H, W)
        # Level has no forward, because a call keeps its input alive until it returns: at 512x512
        # one input takes 134 MB.
        for level in self.down:
            assert isinstance(level, Level)
            for step in level.steps():
                x = step(x)  # `downsample`, at the end of a level, halves H and W
        return self.conv_out(swish(self.norm_out(self.mid(x))))  # (B, out_channels, h, w)


class Decoder(nn.Module):
    """features (B, latent_channels, h, w) -> pixels (B, 3, H, W), not clamped to [-1, 1]

    The decoder of VQGAN (2012.09841): the encoder in reverse, with one more ResBlock per level.
    transformers has no decoder, so the names are those of Meta's and Anole's checkpoints.
    """

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [c.base_channels * m for m in c.channel_multiplier]
        previous = widths[-1]
        self.conv_in = nn.Conv2d(c.latent_channels, previous, kernel_size=3, padding=1)
        self.mid = middle(c, previous)
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            level = Level(c, [previous] + [width] * (c.num_res_blocks + 1), c.resolution >> i)
            if i > 0:
                level.upsample = upsample(width)
            self.up.insert(0, level)  # up.0 is the full resolution, as in checkpoints
            previous = width
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, c.in_channels, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features))  # (B, C, h, w)
        for level in reversed(self.up):
            assert isinstance(level, Level)
            for step in level.steps():
                x = step(x)  # `upsample`, at the end of a level, doubles H and W
        return self.conv_out(swish(self.norm_out(x)))  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# Quantization


class VQLosses(NamedTuple):
    """VQ-VAE (1711.00937), equation 3, as means over all numbers. sg[x] is x without gradient."""

    codebook: Tensor  # mean (sg[z] - e)^2: moves the code vectors towards the encoder's outputs
    commitment: Tensor  # mean (z - sg[e])^2: moves the encoder's outputs towards their code vectors
    total: Tensor  # codebook + beta * commitment (beta_on_codebook: commitment + beta * codebook)
    perplexity: Tensor  # exp(entropy of the codes): K if all are equally frequent, 1 if one is used


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K code vectors (VQ-VAE, 1711.00937, section 3.1)."""

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        self.beta, self.beta_on_codebook = c.beta, c.beta_on_codebook
        self.embedding = nn.Embedding(c.num_embeddings, c.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / c.num_embeddings, 1 / c.num_embeddings)

    def nearest(self, z: Tensor) -> Tensor:
        """z (N, E) -> codes (N,), on a tie the lowest. In training and in ChameleonVQVAE.encode.

            k = argmin_j |z - e_j|^2      (VQ-VAE, equations 1 and 2)
        """
        e = self.embedding.weight  # (K, E)
        # |z - e_j|^2 / 2 = |e_j|^2 / 2 - z . e_j + |z|^2 / 2. The last term is the same for every
        # j and is left out. The rest is one matrix product with a bias.
        with torch.autocast(z.device.type, enabled=False):  # in bf16, other codes seem the nearest
            score = torch.addmm(e.square().sum(1) / 2, z.to(e.dtype), e.T, alpha=-1)  # (N, K)
        return score.argmin(dim=1)  # (N,), the lowest is nearest

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """z (B, E, h, w) -> zq (B, E, h, w), codes (B, S) in raster order, losses"""
        B, E, h, w = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, E)  # (B*S, E), raster order
        codes = self.nearest(flat.detach())  # (B*S,)
        e = self.embedding(codes)  # (B*S, E)
        losses = self.losses(flat, e, codes)
        # Straight-through estimator (VQ-VAE, section 3.2):      zq = z + sg[e - z]
        # Forward: zq is the code vector e. Backward: d zq / d z = 1, as if there were no argmin.
        # The code vectors get no gradient through zq. Only `losses.codebook` moves them.
        zq = (flat + (e - flat).detach()).view(B, h, w, E).permute(0, 3, 1, 2)  # (B, E, h, w)
        return zq, codes.view(B, h * w), losses  # (B, E, h, w), (B, S)

    def losses(self, z: Tensor, e: Tensor, codes: Tensor) -> VQLosses:
        """z, e (N, E), codes (N,) -> the losses of these N vectors"""
        codebook = F.mse_loss(e, z.detach())  # |sg[z] - e|^2: gradient for e only
        commitment = F.mse_loss(z, e.detach())  # |z - sg[e]|^2: gradient for z only
        # total = |sg[z] - e|^2 + beta |z - sg[e]|^2      (VQ-VAE, equation 3)
        if self.beta_on_codebook:
            total = commitment + self.beta * codebook
        else:
            total = codebook + self.beta * commitment
        # perplexity = exp(-sum_k p_k log p_k), where p_k is the share of code k
        p = torch.bincount(codes, minlength=len(self.embedding.weight)) / len(codes)  # (K,)
        perplexity = torch.exp(-torch.xlogy(p, p).sum())
        return VQLosses(codebook, commitment, total, perplexity)


# ---------------------------------------------------------------------------------------------
# The model


class PreTrainedModel(nn.Module):
    """What all models share under the names of transformers' PreTrainedModel."""

    config_class: type

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        wanted, given = self.config_class.__name__, type(config)
        if not isinstance(config, self.config_class):
            message = f"a {wanted} is wanted, not a {given.__name__} of {given.__module__}"
            if given.__name__ == wanted:  # transformers' config of the same name
                message += f": give {wanted}.from_dict(config.to_dict())"
            raise ValueError(message)
        self.config_class.__post_init__(config)  # a field may have been set since
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        left_out = {id(weight) for weight in tables if exclude_embeddings}
        return sum(p.numel() for p in self.parameters()
                   if (p.requires_grad or not only_trainable) and id(p) not in left_out)

    def get_memory_footprint(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(x.nbytes for x in (*self.parameters(), *self.buffers()))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **options) -> Self:
        """Reads a folder in the layout of Hugging Face, Meta or Anole, or a hub id.

        Options are transformers': dtype (or torch_dtype; None keeps what the file holds, and the
        VQ-VAE is fp32 in any case), device_map, attn_implementation, quantization_config.
        ValueError, in one line, says what is wrong.
        """
        # Here, because that file imports this one.
        from chameleon_extras.pretrained import load_pretrained

        return load_pretrained(cls, pretrained_model_name_or_path, **options)

    def save_pretrained(self, save_directory: str | PathLike, *, is_main_process: bool = True,
                        state_dict: dict | None = None, save_function: object = None,
                        max_shard_size: int | str = "5GB", safe_serialization: bool = True) -> None:
        """Writes config.json and safetensors that transformers and `from_pretrained` read.

        state_dict: instead of the model's own. Only a process that passes is_main_process=True
        writes. save_function and safe_serialization change nothing.
        """
        from chameleon_extras.checkpoint import save_checkpoint  # as in from_pretrained

        if is_main_process:
            save_checkpoint(self, Path(save_directory), max_shard_size, state_dict)


@contextmanager
def setting(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside, the global `owner.name` is `value`. Other threads that call `setting` wait."""
    with ONE_THREAD:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


class ChameleonVQVAE(PreTrainedModel):
    """Pictures to codes and back: equals transformers' ChameleonVQVAE, and adds the decoder.

    `with_decoder=False` builds what facebook/chameleon-7b holds: it can read pictures, not draw.
    """

    config: ChameleonVQVAEConfig
    config_class = ChameleonVQVAEConfig

    def __init__(self, config: ChameleonVQVAEConfig, with_decoder: bool = True) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        # DIFFERS: with double_latent=True, transformers fails in forward, because its quant_conv
        # expects latent_channels. Here quant_conv expects as many channels as the encoder returns.
        self.quant_conv = nn.Conv2d(self.encoder.conv_out.out_channels, config.embed_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config) if with_decoder else None
        # fp32 whatever torch's default is, see `encode`; eval, as transformers' class is: dropout
        # would make the codes random.
        self.float().eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChameleonVQVAE":
        """Called by .to(), .half(), .cuda(): moves weights, casts to fp32 only (see `encode`)."""
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def needed_decoder(self) -> Decoder:
        """The decoder. ValueError if these weights came without one."""
        if self.decoder is None:
            raise ValueError("these weights have no VQ-VAE decoder (model.vqmodel.decoder.*), so "
                             "they cannot draw: facebook/chameleon-7b came without one, "
                             "leloy/Anole-7b-v0.1-hf has it")
        return self.decoder

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, S) in raster order (2405.09818, section 2.1).

        DIFFERS: transformers encodes in the model's dtype, and in bf16 1.6 % of the codes change.
        Here it is always fp32: `from_pretrained(dtype=torch.bfloat16)` leaves this module in fp32.
        The codes are returned alone; transformers has them in an output, as `image_tokens`.
        Raises ValueError if pixels are not floats (B, 3, H, W), if the weights are not fp32, or if
        the encoder gives inf or nan.
        """
        channels = self.config.in_channels
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}, but pixels are floats in "
                             "[-1, 1]: pass the levels of a picture through the image processor")
        shape, least = tuple(pixel_values.shape), self.config.downsampling
        if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < least:
            raise ValueError(f"pixel_values must be (B, {channels}, H, W), H and W at least "
                             f"{least}, got {shape}")
        if self.quant_conv.weight.dtype != torch.float32:
            raise ValueError(f"the VQ-VAE's weights are {self.quant_conv.weight.dtype}, which "
                             "changes codes: call vqmodel.float(), or load with from_pretrained("
                             "dtype=...); with FSDP, name them in ignored_params")
        # Autocast would bring bf16 back, and cuDNN would round convolutions to TF32: both are off,
        # the second not under torch.compile, because a traced graph cannot change the setting.
        # What the caller has set for matrix products stays.
        exact = nullcontext()
        if pixel_values.is_cuda and not torch.compiler.is_compiling():
            # cudnn.flags would fail if the caller has set torch's newer `fp32_precision`.
            exact = setting(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # type: ignore
        with torch.autocast(pixel_values.device.type, enabled=False), exact:
            # channels_last changes the order in memory only. It spares convolutions a reordering.
            pixels = pixel_values.float().contiguous(memory_format=torch.channels_last)
            z = self.quant_conv(self.encoder(pixels))  # (B, E, h, w)
            flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B*S, E)
            # argmin would take NaN for the nearest. The check makes the host wait for the GPU.
            finite = flat.isfinite().all() & self.quantize.embedding.weight.isfinite().all()
            if not torch.compiler.is_compiling() and not finite:
                raise ValueError("the VQ-VAE computes inf or nan: pixel_values hold such numbers, "
                                 "or its weights are damaged (download them again)")
            return self.quantize.nearest(flat).view(z.shape[0], z.shape[2] * z.shape[3])  # (B, S)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, S) in raster order -> pixels (B, 3, H, W), about [-1, 1], not clamped.

        `grid` is (h, w); without it the picture is square. Raises ValueError if there is no
        decoder, if codes are not (B, S) with S = h * w, or if a code is outside 0..K-1.
        """
        decoder = self.needed_decoder()
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(f"codes must be (B, S) whole numbers, got {codes.dtype} "
                             f"{tuple(codes.shape)}")
        codes = codes.long()  # nn.Embedding takes no int16, and torch has no min() of uint16
        K, S = self.config.num_embeddings, codes.shape[1]
        h, w = grid or (isqrt(S), isqrt(S))
        if h * w != S or min(h, w) < 1:
            raise ValueError(f"{S} codes are not a {h} x {w} grid: pass grid=(h, w)")
        if codes.numel() and not torch.compiler.is_compiling() and (
                int(codes.min()) < 0 or int(codes.max()) >= K):
            raise ValueError(f"codes must lie in 0..{K - 1}, got {codes.min()}..{codes.max()}")
        zq = self.quantize.embedding(codes).mT.unflatten(2, (h, w))  # (B, E, h, w)
        features = self.post_quant_conv(zq)  # (B, latent_channels, h, w)
        # channels_last as in encode, but after the 1x1 convolution, which may change the order.
        features = features.contiguous(memory_format=torch.channels_last)
        return decoder(features)  # (B, 3, H, W)

    def forward(self, pixels: Tensor) -> tuple[Tensor, VQLosses]:
        """For training: pixels (B, 3, H, W) -> reconstruction (B, 3, H, W), losses

            loss = reconstruction loss + losses.total      (VQ-VAE, equation 3)

        The reconstruction loss is the caller's: its gradient reaches the decoder and, straight
        through the codes, the encoder. VQGAN (2012.09841) adds a perceptual and an adversarial
        loss, Make-A-Scene (2203.13131) also losses on faces and objects. ValueError without a
        decoder.
        """
        decoder = self.needed_decoder()
        zq, _, losses = self.quantize(self.quant_conv(self.encoder(pixels)))  # (B, E, h, w)
        return decoder(self.post_quant_conv(zq)), losses  # (B, 3, H, W)
