"""The pictures that the decoder learns from: their scenes, and their codes, computed once.

    seed --sample--> singles, pairs, edits, twins --encode--> codes (S,) of each, kept in a file

Letters: N pictures, B of them at once, S codes of a picture, K codes of the codebook.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chameleon_extras.files import write_atomically
from tiny_world import world
from tiny_world.world import Scene
from vqvae import ChameleonVQVAE

ALIKE = 4  # how many codes count as looking like a code


@dataclass
class Pictures:
    """The scenes of the training set and the codes of their pictures."""

    singles: list[Scene]
    pairs: list[tuple[Scene, Scene, str]]  # and what they share
    edits: list[tuple[Scene, Scene, str]]  # before, after, and what changed
    codes: dict[Scene, np.ndarray]
    twins: dict[Scene, Scene]  # of what is drawn: other colours or shapes at the same places
    alike: np.ndarray | None = None  # (K, ALIKE), the codes nearest to each code

    @classmethod
    def sample(cls, seed: int, count: int) -> "Pictures":
        """`count` pictures: a half alone, a quarter in pairs, a quarter in edits."""
        rng = np.random.default_rng(seed)
        singles = [world.sample_scene(rng) for _ in range(count // 2)]
        pairs = [world.sample_pair(rng) for _ in range(count // 8)]
        edits = [world.sample_edit(rng) for _ in range(count // 8)]
        drawn = singles[: count // 4] + [after for _, after, _ in edits]
        return cls(singles, pairs, edits, {}, {s: world.sample_twin(rng, s) for s in drawn})

    def scenes(self) -> list[Scene]:
        two = [scene for a, b, _ in self.pairs + self.edits for scene in (a, b)]
        return self.singles + two + list(self.twins.values())

    def encode(self, vq: ChameleonVQVAE, device: torch.device, cache: Path,
               progress: Callable = lambda steps, name: steps) -> "Pictures":
        """Fills `codes` and `alike`, once for all: the VQ-VAE is finished. `cache` keeps codes."""
        scenes = self.scenes()
        try:
            codes = np.load(cache)  # (N, S)
        except (OSError, ValueError, EOFError):  # none there, or damaged
            codes = np.empty((0, 0))
        # A cache of other pictures or of another VQ-VAE would teach the decoder nonsense. Twins,
        # which come last, may differ where the first pictures do not.
        ends = encode_scenes(vq, scenes[:10] + scenes[-10:], device)  # (20, S)
        if len(codes) != len(scenes) or not np.array_equal([*codes[:10], *codes[-10:]], ends):
            # Copied, not kept as they come: small results between the features of large batches
            # would hold the heap apart, and 110,000 pictures took 17 GB.
            codes = np.empty((len(scenes), ends.shape[1]), np.int16)  # (N, S)
            for n in progress(range(0, len(scenes), 50), "codes"):
                codes[n : n + 50] = encode_scenes(vq, scenes[n : n + 50], device)

            def write(part: Path) -> None:
                with open(part, "wb") as file:  # to a name np.save would add .npy
                    np.save(file, codes)

            write_atomically(cache, write)
        self.codes = dict(zip(scenes, codes))
        vectors = vq.quantize.embedding.weight.detach().cpu()  # (K, E)
        self.alike = torch.cdist(vectors, vectors).argsort(1)[:, 1 : 1 + ALIKE].numpy()
        return self


def encode_scenes(vq: ChameleonVQVAE, scenes: list[Scene], device: torch.device) -> np.ndarray:
    """B scenes -> codes (B, S)"""
    pixels = torch.from_numpy(world.render_pixels(scenes)).to(device)  # (B, 3, H, W)
    return vq.to(device).encode(pixels).cpu().numpy()
