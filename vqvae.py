"""The image tokenizer of Chameleon: a VQ-VAE turns a picture into a grid of integers, and back.

    pixels (B,3,H,W) --encoder--> --quant_conv--> z (B,E,h,w) --nearest code--> codes (B,S)
                                                                                    |
    pixels (B,3,H,W) <--decoder-- <--post_quant_conv-- zq (B,E,h,w) <--codebook-----+

Letter  meaning                                         default  config field
B       pictures in the batch
H, W    height and width of a picture, in pixels         512      resolution
h, w    the same after the encoder: H / 2^(levels-1)     32       len(channel_multiplier) - 1
S       codes per picture, h * w in raster order         1024
K       codes in the codebook                            8192     num_embeddings
E       width of one code vector e_k ("D" in the paper)  256      embed_dim
C       channels of a feature map                        128..    base_channels

Why a picture is exactly 1024 tokens: 512 pixels halved four times is 32, and 32 * 32 = 1024.
A different size of picture gives a different S; nothing in this file is tied to 512.

What differs from a plain VQ-VAE (van den Oord et al., 2017, https://arxiv.org/abs/1711.00937):
the encoder and decoder are those of VQGAN (Esser et al., 2021, https://arxiv.org/abs/2012.09841),
with residual blocks, GroupNorm, swish and one attention block in the middle. Chameleon (section
2.1) trains its own after Make-A-Scene's (https://arxiv.org/abs/2203.13131), at 512x512.

Three spaces, three words: `pixels` live in [-1, 1], `codes` in 0..K-1 (this file), and `ids` in
0..V-1 (the decoder's vocabulary, chameleon.py). Nothing here knows about ids.

This file stands alone: copy it, and only torch comes with it.
"""

import dataclasses
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# VQGAN fixes both. With 32 channels each group is one channel, that is instance norm, which
# forgets plain colours: use base_channels >= 64.
GROUPS, GROUP_NORM_EPS = 32, 1e-6


# ---------------------------------------------------------------------------------------------
# Config


@dataclass
class ChameleonVQVAEConfig:
    """Sizes of the VQ-VAE; fields and defaults are those of transformers' ChameleonVQVAEConfig."""

    embed_dim: int = 256
    num_embeddings: int = 8192
    double_latent: bool = False  # the encoder ends in twice latent_channels
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)  # one entry a level
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] | None = None  # feature map sizes that get attention
    dropout: float = 0.0
    attn_type: str | None = "vanilla"  # anything else: no attention at all, the middle included
    initializer_range: float = 0.02  # documented by transformers, used by nothing
    beta: float = 0.25  # weight of the commitment loss
    # DIFFERS: transformers and taming multiply the CODEBOOK loss by beta; the VQ-VAE paper
    # (equation 3) multiplies the commitment loss, and so do we. True gives their loss.
    beta_on_codebook: bool = False

    def __post_init__(self) -> None:
        self.channel_multiplier = tuple(self.channel_multiplier)
        if self.attn_resolutions is not None:
            self.attn_resolutions = tuple(self.attn_resolutions)
        for name in ("embed_dim", "num_embeddings", "latent_channels", "resolution",
                     "in_channels", "base_channels", "num_res_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not self.channel_multiplier or min(self.channel_multiplier) < 1:
            raise ValueError(f"channel_multiplier {self.channel_multiplier} needs entries >= 1")
        if any(self.base_channels * m % GROUPS for m in self.channel_multiplier):
            raise ValueError(
                f"base_channels {self.base_channels} times each channel_multiplier "
                f"{self.channel_multiplier} must be a multiple of {GROUPS} (GroupNorm)"
            )
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of {self.downsampling}, "
                f"2^(levels - 1) of channel_multiplier {self.channel_multiplier}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side: 16 in the released model."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def codes_per_image(self) -> int:
        """S, the codes of one square picture of `resolution` pixels: 1024 in the released model."""
        return (self.resolution // self.downsampling) ** 2

    @classmethod
    def from_dict(cls, values: dict) -> "ChameleonVQVAEConfig":
        """Reads the `vq_config` of a config.json; keys we do not know are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict:
        return {"model_type": "chameleon_vqgan"} | dataclasses.asdict(self)


# ---------------------------------------------------------------------------------------------
# Building blocks of encoder and decoder. Attribute names are the checkpoint's.


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x). In place without autograd: at 512x512 one feature map is 134 MB.

    With autograd it must not be: the backward pass of swish needs the x that went in.
    """
    return F.silu(x, inplace=not torch.is_grad_enabled())


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=GROUP_NORM_EPS)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))))   (B, C_in, H, W) -> (B, C_out, H, W)"""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:  # "network in network": a 1x1 convolution
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # Always the same name, so that each step frees the map before it.
        h = swish(self.norm1(x))
        h = self.conv1(h)  # (B, C_out, H, W)
        h = swish(self.norm2(h))
        h = self.conv2(self.dropout(h))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)  # (B, C_out, H, W)
        return h.add_(x)  # in place: no backward pass needs the output of conv2


class AttnBlock(nn.Module):
    """Every place looks at every other; one head over all C channels.   (B, C, H, W) unchanged"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # each (B, C, HW)
        weights = torch.softmax(q.mT @ k * q.shape[1] ** -0.5, dim=-1)  # (B, HW, HW), over keys
        h = (v @ weights.mT).view_as(x)  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Padding only right and below, as in VQGAN: padding=1 all around would shift every
        # feature by one pixel, and pictures would get other codes.
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): each value four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """The blocks at one resolution; the encoder adds `downsample`, the decoder `upsample`."""

    def __init__(self, c: ChameleonVQVAEConfig, channels: list[int], resolution: int) -> None:
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:]))
        self.block = nn.ModuleList(ResBlock(i, o, c.dropout) for i, o in pairs)
        attends = c.attn_type == "vanilla" and resolution in (c.attn_resolutions or ())
        self.attn = nn.ModuleList(AttnBlock(o) for _, o in pairs if attends)

    def steps(self) -> list[nn.Module]:
        """The modules of this level in the order they run."""
        if self.attn:
            return [module for both in zip(self.block, self.attn) for module in both]
        return list(self.block)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution, where attention is cheap."""

    def __init__(self, c: ChameleonVQVAEConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, c.dropout)
        self.attn_1 = AttnBlock(channels) if c.attn_type == "vanilla" else nn.Identity()
        self.block_2 = ResBlock(channels, channels, c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> features (B, latent_channels, h, w), twice as many if double_latent"""

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [c.base_channels * m for m in c.channel_multiplier]
        self.conv_in = nn.Conv2d(c.in_channels, c.base_channels, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        previous = c.base_channels
        for i, width in enumerate(widths):
            level = Level(c, [previous] + [width] * c.num_res_blocks, c.resolution >> i)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            previous = width
        self.mid = Middle(c, previous)
        self.norm_out = group_norm(previous)
        out_channels = c.latent_channels * (2 if c.double_latent else 1)
        self.conv_out = nn.Conv2d(previous, out_channels, kernel_size=3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)  # (B, C, H, W)
        # Step by step here, not in a forward of Level: a call holds its input until it returns,
        # and at 512x512 every map held is 134 MB. (A list of hidden states would hold them all.)
        for level in self.down:
            for step in level.steps():
                x = step(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # (B, C, H/2, W/2)
        return self.conv_out(swish(self.norm_out(self.mid(x))))  # (B, latent_channels, h, w)


class Decoder(nn.Module):
    """features (B, latent_channels, h, w) -> pixels (B, 3, H, W), not clamped to [-1, 1]

    The mirror of the encoder with one more ResBlock a level. transformers has no decoder; names
    are those of Meta's and Anole's checkpoints.
    """

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        widths = [c.base_channels * m for m in c.channel_multiplier]
        previous = widths[-1]
        self.conv_in = nn.Conv2d(c.latent_channels, previous, kernel_size=3, padding=1)
        self.mid = Middle(c, previous)
        levels = []
        for i in reversed(range(len(widths))):
            blocks = [previous] + [widths[i]] * (c.num_res_blocks + 1)
            level = Level(c, blocks, c.resolution >> i)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.append(level)
            previous = widths[i]
        self.up = nn.ModuleList(reversed(levels))  # stored so that up.0 is the full resolution
        self.norm_out = group_norm(previous)
        self.conv_out = nn.Conv2d(previous, c.in_channels, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features))  # (B, C, h, w)
        for level in reversed(self.up):
            for step in level.steps():
                x = step(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # (B, C, 2h, 2w)
        return self.conv_out(swish(self.norm_out(x)))  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# Quantization


class VQLosses(NamedTuple):
    """What training the codebook needs. VQ-VAE paper, equation 3; | |^2 here: mean of squares."""

    codebook: Tensor  # | sg[z] - e |^2 : moves the code vectors to the encoder's outputs
    commitment: Tensor  # | z - sg[e] |^2 : keeps the encoder's outputs near their codes
    total: Tensor  # codebook + beta * commitment; with beta_on_codebook, beta on the other
    perplexity: Tensor  # exp(entropy of code use): K if all are used equally, 1 if only one is


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K code vectors."""

    def __init__(self, c: ChameleonVQVAEConfig) -> None:
        super().__init__()
        self.beta, self.beta_on_codebook = c.beta, c.beta_on_codebook
        self.embedding = nn.Embedding(c.num_embeddings, c.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / c.num_embeddings, 1 / c.num_embeddings)

    def nearest(self, z: Tensor) -> Tensor:
        """z (N, E) -> codes (N,), the first of equals.

        argmin_k |z - e_k|^2 = argmin_k |z|^2 + |e_k|^2 - 2 z.e_k; |z|^2 is the same for every
        k, and halving changes no argmin, so one matrix product with a bias does all the work.
        """
        e = self.embedding.weight  # (K, E)
        distance = torch.addmm(e.square().sum(1) / 2, z, e.T, alpha=-1)  # (N, K)
        return distance.argmin(dim=1)  # (N,)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """z (B, E, h, w) -> zq (B, E, h, w), codes (B, S), losses"""
        B, E, h, w = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, E)  # (B*S, E), raster order
        codes = self.nearest(flat.detach())  # (B*S,)
        e = self.embedding(codes)  # (B*S, E)
        losses = self.losses(flat, e, codes)
        # Straight-through estimator: forward, zq is the code vector; backward, d zq / d z = 1, as
        # if the argmin were not there. sg[...] is .detach(). The code vectors get no gradient
        # from here: only `losses.codebook` moves them.
        zq = flat + (e - flat).detach()
        zq = zq.view(B, h, w, E).permute(0, 3, 1, 2)  # (B, E, h, w)
        return zq, codes.view(B, h * w), losses  # (B, E, h, w), (B, S)

    def losses(self, z: Tensor, e: Tensor, codes: Tensor) -> VQLosses:
        """z, e (N, E), codes (N,) -> the losses of these N vectors"""
        codebook = F.mse_loss(e, z.detach())  # z stands still: gradient for e only
        commitment = F.mse_loss(z, e.detach())  # e stands still: gradient for z only
        if self.beta_on_codebook:
            total = commitment + self.beta * codebook
        else:
            total = codebook + self.beta * commitment
        p = torch.bincount(codes, minlength=len(self.embedding.weight)) / len(codes)  # (K,)
        perplexity = torch.exp(-torch.xlogy(p, p).sum())
        return VQLosses(codebook, commitment, total, perplexity)


# ---------------------------------------------------------------------------------------------
# The model


class ChameleonVQVAE(nn.Module):
    """Pictures to codes and back. Equal to transformers' ChameleonVQVAE, plus the decoder.

    `with_decoder=False` builds it as facebook/chameleon-7b was published: reading pictures only.
    """

    def __init__(self, config: ChameleonVQVAEConfig, with_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # DIFFERS: transformers' double_latent=True builds and then fails in forward, because its
        # quant_conv expects latent_channels; here quant_conv takes what the encoder gives.
        self.quant_conv = nn.Conv2d(self.encoder.conv_out.out_channels, config.embed_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config) if with_decoder else None

    def check_decoder(self) -> None:
        """ValueError if these weights came without a decoder."""
        if self.decoder is None:
            raise ValueError(
                "these weights have no VQ-VAE decoder (model.vqmodel.decoder.*), so they cannot "
                "draw: facebook/chameleon-7b came without one, leloy/Anole-7b-v0.1-hf has it"
            )

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> codes (B, S) in raster order. Always fp32 inside.

        DIFFERS: transformers encodes in the model's dtype. In bf16 1.6 % of the codes change, so
        `from_pretrained(dtype=torch.bfloat16)` keeps this module in fp32.
        Raises ValueError if the shape is not a batch of pictures, or the weights are not fp32.
        """
        channels = self.config.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must be (B, {channels}, H, W), got "
                             f"{tuple(pixel_values.shape)}")
        if self.quant_conv.weight.dtype != torch.float32:
            raise ValueError(
                f"the VQ-VAE's weights are {self.quant_conv.weight.dtype}, which changes codes: "
                "load with from_pretrained(dtype=...), which leaves them in float32"
            )
        # Nor bf16 by autocast, nor TF32 convolutions on CUDA. (TF32 products: the caller's choice.)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(pixel_values.device.type, enabled=False), exact:
            # Same numbers, other order in memory: convolutions then need no reordered copies.
            pixels = pixel_values.float().contiguous(memory_format=torch.channels_last)
            z = self.quant_conv(self.encoder(pixels))  # (B, E, h, w)
            flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B*S, E)
            return self.quantize.nearest(flat).view(len(z), -1)  # (B, S)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, S) in raster order -> pixels (B, 3, H, W), about [-1, 1], not clamped.

        `grid` is (h, w); without it the picture is square. Raises ValueError if there is no
        decoder, if codes are not (B, S) with S = h * w, or if a code is outside 0..K-1.
        """
        self.check_decoder()
        if codes.ndim != 2:
            raise ValueError(f"codes must be (B, S), got {tuple(codes.shape)}")
        K, S = self.config.num_embeddings, codes.shape[1]
        h, w = grid or (isqrt(S), isqrt(S))
        if h * w != S:
            raise ValueError(f"{S} codes are not a {h} x {w} grid: pass grid=(h, w)")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= K):
            raise ValueError(f"codes must lie in 0..{K - 1}, got {codes.min()}..{codes.max()}")
        zq = self.quantize.embedding(codes).mT.unflatten(2, (h, w))  # (B, E, h, w)
        features = self.post_quant_conv(zq)  # (B, latent_channels, h, w)
        # As in encode. (A 1x1 convolution may give back the other order, whatever it got.)
        features = features.contiguous(memory_format=torch.channels_last)
        return self.decoder(features)  # (B, 3, H, W)

    def forward(self, pixels: Tensor) -> tuple[Tensor, VQLosses]:
        """Training: pixels (B, 3, H, W) -> reconstruction (B, 3, H, W), losses

        The reconstruction carries gradient to decoder AND encoder (straight through the codes);
        add a reconstruction loss of your choice to `losses.total`.
        """
        self.check_decoder()
        zq, _, losses = self.quantize(self.quant_conv(self.encoder(pixels)))  # (B, E, h, w)
        return self.decoder(self.post_quant_conv(zq)), losses  # (B, 3, H, W)
