"""Small models with large weights, shared by the tests: 3 layers, 64 codes, 32x32 pictures."""

import os
import random
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras.decoding import check_compile

try:
    check_compile(torch.device("cpu"))
    missing = ""
except ValueError as error:
    missing = str(error)
needs_compiler = pytest.mark.skipif(bool(missing), reason=missing)
VQ = dict(embed_dim=16, num_embeddings=64, latent_channels=24, resolution=32, base_channels=32,
          channel_multiplier=[1, 1, 2], num_res_blocks=2)
K, S, V = 64, 64, 160  # codes, image tokens of a 32x32 picture, vocabulary
SIZES = dict(vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
             bos_token_id=0, pad_token_id=1, eos_token_id=2)


def closed(page: str) -> bool:
    """Is every tag of an HTML page closed, in order?"""
    opened, right = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img", "br", "td", "tr"):
                opened.append(tag)

        def handle_endtag(self, tag):
            right.append(opened.pop() == tag)

    Reader().feed(page)
    return all(right) and not opened


def image_name(code: int) -> str:
    """IMGIMG, one letter for each digit, Z: code 53 is IMGIMGFDZ."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z"


def scrambled_vocabulary(seed: int = 0) -> dict[str, int]:
    """Image codes at ids in random order, so that nobody can assume id = code + 4."""
    ids = list(range(4, 4 + K))
    random.Random(seed).shuffle(ids)
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 70, "<racm3:break>": 71,
               "<reserved08706>": 72, "<image>": 73}
    return special | {image_name(code): id for code, id in enumerate(ids)}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Non-degenerate weights: no matrix small, no norm weight at one, no bias at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 or "q_norm" in name or "k_norm" in name:
                p.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            elif p.ndim == 4:  # convolutions keep their inputs' scale
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(noise * 1.5 * p.shape[-1] ** -0.5)


def small_model(**changes) -> ChameleonForConditionalGeneration:
    """A randomized model of SIZES and VQ, or of other values."""
    values = SIZES | dict(vocabulary_map=scrambled_vocabulary(), vq_config=VQ) | changes
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values)).eval()
    randomize(model)
    return model


def left_padded(rows: list[list[int]]) -> dict:
    """Rows of ids as one batch, with its mask."""
    T = max(map(len, rows))
    return dict(
        input_ids=torch.tensor([[1] * (T - len(r)) + r for r in rows]),
        attention_mask=torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows]),
    )


def batch_with_pictures(seed: int = 0):
    """Two rows, the second left-padded: one picture in each, text around them."""
    g = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(74, V, (n,), generator=g).tolist()  # noqa: E731
    image = [71] + [73] * S + [70]
    rows = [[0] + text(5) + image + text(9) + [72], [0] + text(3) + image + text(2) + [72]]
    return left_padded(rows) | dict(pixel_values=torch.rand(2, 3, 32, 32, generator=g) * 2 - 1)


def start_two(script: str, *arguments: object) -> list[subprocess.Popen]:
    """A script as both ranks of one run, with the variables that torchrun would set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True,
                             cwd=Path(__file__).resolve().parent.parent,
                             env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]


def ended(running: list[subprocess.Popen]) -> tuple[str, str]:
    """Waits for both ranks -> what the first has written to stdout and to stderr."""
    written = []
    try:
        for process in running:  # if the first has failed, the second may wait for it
            written.append(process.communicate(timeout=240))
            assert process.returncode == 0, written[-1][1][-3000:]
    finally:
        for process in running:
            process.kill()
    return written[0]
