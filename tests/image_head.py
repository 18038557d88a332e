"""Teaches a checkpoint that cannot draw to draw, by the image codes' rows of its head alone.

    python tests/image_head.py --out head      a copy of tiny/ without these rows learns; a table

The recipe is Anole's (arXiv 2407.06135). The released Chameleon was tuned not to draw. Here a copy
of tiny/ gets random rows in their place, and learns them from 400 drawings with `train.py sft`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script

import train  # noqa: E402
from tiny_world import evaluate, language, world  # noqa: E402


def write_drawings(folder: Path, count: int) -> None:
    """Requests to draw one to three things, with the drawings: data for train.py."""
    rng, lines = np.random.default_rng(7), []
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        scene = world.sample_scene(rng)
        wanted = language.ask_drawing(rng, scene).text
        Image.fromarray(world.render(scene)).save(folder / f"{n}.png")
        lines.append({"prompt": world.pick(rng, language.DRAW_PROMPTS).format(wanted),
                      "answer": "<image>", "images": [f"{n}.png"]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_copy_that_cannot_draw(folder: Path) -> None:
    """tiny/ with random rows for the image codes in its head, of the size of an untrained table."""
    model, processor = evaluate.load(ROOT / "tiny")
    codes = model.model.vocabulary.code_to_id
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight[codes] = 0.02 * torch.randn(len(codes), model.config.hidden_size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="image_head.py", description="Teaches a head to draw.")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--epochs", default="5")
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args(arguments)
    before, after, data = (options.out / name for name in ("before", "after", "data"))
    write_drawings(data, options.pictures)
    write_copy_that_cannot_draw(before)
    began = time.monotonic()
    if code := train.main(["sft", "--train", "image-head", "--data", str(data), "--model",
                           str(before), "--out", str(after), "--epochs", options.epochs,
                           "--learning-rate", "0.01"]):
        return code
    minutes = (time.monotonic() - began) / 60
    print(f"{options.pictures} drawings, {options.epochs} epochs, {minutes:.1f} minutes")
    print("| right, ordinary / held-out | before | after | tiny |\n|---|---|---|---|")
    models = [evaluate.load(folder) for folder in (before, after, ROOT / "tiny")]
    for row in evaluate.DRAWINGS:
        cells = [" / ".join(f"{evaluate.drawn_right(*model, row, options.questions, held_out):.1%}"
                            for held_out in (False, True)) for model in models]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
