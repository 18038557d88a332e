"""The training set of the decoder: scenes, and the codes of their pictures, computed once.

    seed --sample--> singles, pairs, edits, twins --encode--> codes (S,) of each, cached in a file

Who needs it: train.py, before the stages of the decoder.

Letters: N pictures, B pictures at once, S codes of a picture, K codes of the codebook, E width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from chameleon_extras.files import write_atomically
from tiny_world import world
from tiny_world.world import Scene
from vqvae import ChameleonVQVAE

ALIKE = 4  # nearest neighbours kept for each code


@dataclass
class Pictures:
    """Scenes, and the codes of their pictures."""

    singles: list[Scene]
    pairs: list[tuple[Scene, Scene]]
    edits: list[tuple[Scene, Scene]]  # before, after
    twins: dict[Scene, Scene]  # of scenes to be drawn, see world.sample_twin
    codes: dict[Scene, np.ndarray] = field(default_factory=dict)
    alike: np.ndarray | None = None  # (K, ALIKE): nearest neighbours of each code

    @classmethod
    def sample(cls, seed: int, count: int) -> "Pictures":
        """About `count` pictures: half of them alone, a quarter in pairs, a quarter in edits."""
        rng = np.random.default_rng(seed)
        singles = [world.sample_scene(rng) for _ in range(count // 2)]
        pairs = [world.sample_pair(rng) for _ in range(count // 8)]
        edits = [world.sample_edit(rng) for _ in range(count // 8)]
        drawn = singles[: count // 4] + [after for _, after in edits]
        return cls(singles, pairs, edits, {s: world.sample_twin(rng, s) for s in drawn})

    def scenes(self) -> list[Scene]:
        return [*self.singles, *chain(*self.pairs, *self.edits), *self.twins.values()]

    def encode(self, vq: ChameleonVQVAE, cache: Path,
               progress: Callable = lambda steps, name: steps) -> "Pictures":
        """Fills `codes` and `alike`. The file `cache` keeps the codes once they are computed.

        `progress(range, name)` shows a progress bar while one iterates over what it returns.
        """
        scenes = self.scenes()
        try:
            codes = np.fromfile(cache, np.int16).reshape(len(scenes), -1)  # (N, S)
        except (OSError, ValueError):  # missing, damaged, or of other pictures
            codes = np.empty((0, 0))
        # Codes of other pictures or of another VQ-VAE must not be used. The first and the last
        # pictures show it: the last are twins, which differ where the first do not.
        ends = encode_scenes(vq, scenes[:10] + scenes[-10:])  # (20, S)
        if not np.array_equal([*codes[:10], *codes[-10:]], ends):
            # One array from the start: many small results between large temporary tensors would
            # fragment the heap, to 17 GB for 110,000 pictures.
            codes = np.empty((len(scenes), ends.shape[1]), np.int16)  # (N, S)
            for n in progress(range(0, len(scenes), 50), "codes"):
                codes[n : n + 50] = encode_scenes(vq, scenes[n : n + 50])
            write_atomically(cache, codes.tofile)
        self.codes = dict(zip(scenes, codes))
        vectors = vq.quantize.embedding.weight.detach().cpu()  # (K, E)
        self.alike = torch.cdist(vectors, vectors).argsort(1)[:, 1 : 1 + ALIKE].numpy()
        return self


def encode_scenes(vq: ChameleonVQVAE, scenes: list[Scene]) -> np.ndarray:
    """B scenes -> the codes of their pictures (B, S)"""
    pixels = torch.from_numpy(world.render_pixels(scenes)).to(vq.device)  # (B, 3, H, W)
    return vq.encode(pixels).cpu().numpy()
