"""The first stage of training: the VQ-VAE, on pictures alone.

    pixels --encoder--> z --nearest code--> zq --decoder--> reconstruction
                        |                                        |
                        +-- commitment loss            weighted L1 + L2 to the pixels
                        +-- moving averages -> code vectors

Who needs it: whoever trains a small VQ-VAE. Three things are not in the VQ-VAE paper (arXiv
1711.00937), and make small models work: `initialize` starts a network whose GroupNorm is nearly
affine; the network learns as a plain auto-encoder before the codebook starts; and `Codebook` spends
its codes on things instead of background.

Letters: B pictures, S = h * w patches of a picture, K codes, E their width, N patches of a batch.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tiny_world import evaluate, world
from tiny_world.run import Run, autocast, rate
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig

# In comments: the released model's numbers.
VQ = ChameleonVQVAEConfig(
    resolution=world.SIDE,  # 512; 9 x 9 = 81 codes instead of 1024
    num_embeddings=512,  # 8192
    embed_dim=32,  # 256
    latent_channels=64,  # 256
    base_channels=64,  # 128; 32 would make GroupNorm's 32 groups an instance norm: wrong colours
    channel_multiplier=(1, 1, 1),  # (1, 1, 2, 2, 4); patches of 4 pixels instead of 16
    num_res_blocks=1,  # 2
    attn_type="none",  # "vanilla"; without attention a code depends on its surroundings only
)
BATCH = 6  # pictures a step
STEPS = 4000
LEARNING_RATE, BETAS, CLIP = 1e-3, (0.9, 0.99), 1.0
AUTO_ENCODER = 0.08  # share of the steps before the codebook starts
FROZEN = 0.9  # share of the steps after which the codebook no longer changes


def initialize(vq: ChameleonVQVAE) -> None:
    """Initializes the network so that it starts out nearly linear.

    With 2 channels a group, GroupNorm divides by the contrast of the picture, and hues are lost. A
    constant in every second channel makes its statistics almost the same for all pictures, so the
    norm starts as an affine map. Residual branches start at zero.
    """
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
            if name.endswith(("sample.conv", "conv_in", "conv1")):
                nn.init.ones_(module.bias.data[1::2])


def foreground(pixels: Tensor) -> Tensor:
    """pixels (B, 3, H, W) -> (B, 1, H, W), 1 on things. The corner pixel is taken as background."""
    difference = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True)  # (B, 1, H, W)
    return (difference > 0.05).float()


def flatten_patches(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).flatten(0, 2)  # (B, E, h, w) -> (B*S, E)


class Codebook(nn.Module):
    """Moves the code vectors: k-means++ start, moving averages, dead and duplicate codes.

    Plain background fills most patches. Without weights it would take a code for every rounding
    error of a gray level, and the decoder model could not predict which one comes next. So
    background weighs little in the averages, and only one code for each gray level may stay.
    """

    DECAY = 0.996  # of the moving averages
    PLAIN = 0.05  # weight of a background patch, relative to one that shows a thing
    EVERY = 250  # steps between two calls of `revive`

    def __init__(self, vq: ChameleonVQVAE) -> None:
        super().__init__()
        self.e = vq.quantize.embedding.weight.requires_grad_(False)  # (K, E)
        self.quantizer, self.K = vq.quantize, len(self.e)
        self.register_buffer("count", torch.ones(self.K))  # N_k of `update`
        self.register_buffer("sum", self.e.clone())  # m_k of `update`
        self.register_buffer("uses", torch.zeros(self.K))  # since the last `revive`
        self.register_buffer("plain", torch.zeros(256, self.K))  # ... by background of each level
        self.pool = self.e[:0]  # recent vectors of things, new homes for dead codes

    @torch.no_grad()
    def start(self, z: Tensor, weight: Tensor) -> None:
        """k-means++ and ten rounds of k-means, on a sample of z (N, E) drawn with `weight` (N,)."""
        z = z[torch.multinomial(weight, min(len(z), 12_000))]  # (n, E)
        distance = torch.full((len(z),), torch.inf, device=z.device)
        for k in range(self.K):  # a vector far from all centres is likely to be the next one
            p = torch.ones_like(distance) if k == 0 else distance.clamp(min=1e-12)
            self.e[k] = z[torch.multinomial(p, 1)[0]]
            distance = torch.minimum(distance, (z - self.e[k]).square().sum(1))
        for _ in range(10):
            codes = self.quantizer.nearest(z)  # (n,)
            uses = torch.bincount(codes, minlength=self.K)[:, None]  # (K, 1)
            means = torch.zeros_like(self.e).index_add_(0, codes, z) / uses.clamp(min=1)
            self.e.copy_(torch.where(uses > 0, means, self.e))
        self.count.fill_(1.0)
        self.sum.copy_(self.e)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, thing: Tensor, level: Tensor) -> None:
        """One step of the moving averages, weighted by w_i.

            N_k <- d N_k + (1 - d) sum w_i        over the vectors i that chose code k
            m_k <- d m_k + (1 - d) sum w_i z_i    e_k = m_k / N_k

        z (N, E), codes (N,), thing (N,) bool, level (N,): the background's gray level, 0..255.
        """
        w = torch.where(thing, 1.0, self.PLAIN) * (1 - self.DECAY)  # (N,)
        self.count.mul_(self.DECAY).index_add_(0, codes, w)
        self.sum.mul_(self.DECAY).index_add_(0, codes, z * w[:, None])
        self.e.copy_(self.sum / self.count[:, None].clamp(min=1e-8))
        self.uses += torch.bincount(codes, minlength=self.K)
        self.plain.index_put_((level[~thing], codes[~thing]), w.new_ones(()), accumulate=True)
        self.pool = torch.cat((self.pool, z[thing]))[-2000:]

    @torch.no_grad()
    def revive(self, retire: bool) -> None:
        """Moves dead and duplicate codes to vectors of things. With `retire`, moves duplicates
        only, so far away that no vector chooses them.
        """
        duplicate = self.plain.sum(0) > 0.9 * self.uses
        duplicate[self.plain[self.plain.sum(1) > 0].argmax(1)] = False  # one for each background
        dead = duplicate | (self.uses == 0)
        n = int(dead.sum())
        if retire:
            self.e[duplicate] = self.sum[duplicate] = 100.0
            self.count[duplicate] = 1.0
        elif n and len(self.pool):
            new = self.pool[torch.randint(len(self.pool), (n,), device=self.pool.device)]  # (n, E)
            self.count[dead] = self.count[~dead].median()
            self.e[dead], self.sum[dead] = new, new * self.count[dead, None]
        self.uses.zero_()
        self.plain.zero_()


def vqvae_loss(vq: ChameleonVQVAE, pixels: Tensor, quantized: bool) -> tuple[Tensor, dict, tuple]:
    """pixels (B, 3, H, W) -> loss, curves, and (z, codes, thing, level) for Codebook.update.

        loss = mean of w (|x' - x| + (x' - x)^2) + beta |z - sg[e]|^2

    w is 6 on things and two pixels around them, else 1, divided by its mean. There is no codebook
    loss, because Codebook.update moves the code vectors. Without `quantized` the codes are left
    out: a plain auto-encoder.
    """
    thing = foreground(pixels)  # (B, 1, H, W)
    w = 1 + 5 * F.max_pool2d(thing, 5, stride=1, padding=2)
    w = w / w.mean()
    with autocast(pixels.device):
        z = vq.quant_conv(vq.encoder(pixels))  # (B, E, h, w)
    z = z.float()
    loss, curves, patches = 0.0, {}, ()
    if quantized:
        z_e, (z, codes, losses) = z, vq.quantize(z)  # z: straight-through
        loss = VQ.beta * losses.commitment
        curves["code_perplexity"] = losses.perplexity.item()
        things = F.max_pool2d(thing, VQ.downsampling).flatten() > 0  # (B*S,)
        level = ((pixels[:, 0, 0, 0] + 1) / 0.0078).round().long()  # (B,) 0..255
        level = level.repeat_interleave(codes.shape[1])  # (B*S,)
        patches = flatten_patches(z_e.detach()), codes.flatten(), things, level
    with autocast(pixels.device):
        reconstruction = vq.decoder(vq.post_quant_conv(z))  # (B, 3, H, W)
    error = reconstruction.float() - pixels
    loss = loss + (w * (error.abs() + error.square())).mean()
    curves["image_loss"] = loss.item()
    curves["psnr"] = 10 * math.log10(4 / error.detach().square().mean().item())  # peak: 2
    return loss, curves, patches


def codebook_sample(vq: ChameleonVQVAE, rng: np.random.Generator,
                    pictures: int) -> tuple[Tensor, Tensor]:
    """Encoder outputs z (N, E) of new pictures, and weights (N,) that favour things."""
    z, weight = [], []
    with torch.no_grad():
        for _ in range(0, pictures, 16):
            scenes = [world.sample_scene(rng, 3, None) for _ in range(16)]
            pixels = torch.from_numpy(world.render_pixels(scenes)).to(vq.device)
            z.append(flatten_patches(vq.quant_conv(vq.encoder(pixels))))
            weight.append(F.max_pool2d(foreground(pixels), VQ.downsampling).flatten() + 0.02)
    return torch.cat(z), torch.cat(weight)


def train_vqvae(run: Run) -> None:
    """Trains a plain auto-encoder, then with the codebook. Duplicates retire near the end."""
    steps, rng = run.options.steps or STEPS, np.random.default_rng(run.options.seed)
    vq = ChameleonVQVAE(VQ)
    initialize(vq)
    vq.to(run.device)
    codebook = Codebook(vq).to(run.device)
    weights = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=BETAS, weight_decay=0.0)
    begin = math.ceil(AUTO_ENCODER * steps)  # the step at which the codebook starts
    peak, run.extra = run.options.learning_rate or LEARNING_RATE, codebook
    run.made_by["--learning-rate"] = peak
    start = run.resume("vqvae", vq, optimizer, rng)
    for step in run.progress(range(start, steps), "vqvae"):
        if step == begin:
            codebook.start(*codebook_sample(vq, rng, 16 * min(75, steps)))
        # Crowded pictures teach fast. Sparse ones have the low contrast that GroupNorm has to meet.
        counts = rng.choice((1, 2, 3, 5, 8), BATCH, p=(0.15, 0.2, 0.25, 0.2, 0.2))
        scenes = [world.sample_scene(rng, int(n), None) for n in counts]
        pixels = torch.from_numpy(world.render_pixels(scenes)).to(run.device)
        loss, curves, patches = vqvae_loss(vq, pixels, quantized=step >= begin)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate("vqvae", step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        curves["grad_norm"] = nn.utils.clip_grad_norm_(weights, CLIP).item()
        run.check_gradient("vqvae", step, curves["grad_norm"])
        optimizer.step()
        if patches and step < FROZEN * steps:
            codebook.update(*patches)
            if (step + 1) % codebook.EVERY == 0:
                codebook.revive(retire=step >= (FROZEN - 0.1) * steps)
        if step % run.EVERY == 0 or step + 1 == steps:
            run.log("vqvae", step, curves)
        if run.due(step, steps):
            run.save("vqvae", step + 1, vq, optimizer, rng)
    run.say(f"vqvae: {evaluate.survival(vq.eval(), 400):.1%} of things keep colour and shape")
