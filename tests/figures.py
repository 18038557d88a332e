"""Draws figures of README.md and tiny/README.md from a checkpoint and from logged curves.

    python tests/figures.py tiny                              the figures of a checkpoint
    python tests/figures.py tiny --curves tiny.train/curves.csv
    python tests/figures.py tiny --curves with=a/curves.csv "no z-loss=b/curves.csv"

    checkpoint --generate--> stream.svg      one row of ids: text, a picture, text
                         --> codes.png       pictures, their codes, and the pictures decoded again
                         --> growing.png     one drawing, code by code
                         --> drawings.png    twelve drawings with their requests
    curves.csv ------------> curves.svg      losses, log Z and |q| of one or several runs

The files go to the folder figures/ here, which git ignores; those of the READMEs are kept in
examples/figures/. All of them can be read on a white and on a black page. Only the curves need
matplotlib: pip install -e ".[figures]".
"""

import argparse
import csv
import html
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script

from chameleon_extras.explain import kind_and_name  # noqa: E402
from chameleon_extras.files import OneLineParser, exit_code, write_atomically  # noqa: E402
from chameleon_extras.sheets import (  # noqa: E402
    code_colour,
    contact_sheet,
    data_uri,
    enlarge,
    save_picture,
    there_and_back,
)
from generate import decode_pictures, generate, pieces, stream  # noqa: E402
from processor import ChameleonImageProcessor, load_image  # noqa: E402
from tiny_world import language, world  # noqa: E402
from tiny_world.evaluate import SEED, load  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

OUT = Path("figures")  # not examples/figures: a first try must not replace the READMEs' figures
REQUEST = "Draw a large yellow star above a small blue square."  # for growing.png
WIDTH, ROW = 920, 44  # of stream.svg, in pixels: its width, and the height of a line of tokens
STYLE = """
text{font:12px monospace;fill:#1f2328}.id{font-size:9px;fill:#59636e}.note{fill:#59636e}
.text{fill:#ddf4ff}.control{fill:#ffe2e0}.line{stroke:#8b949e;fill:none}.code{font-size:8px}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.id,.note{fill:#9198a1}.text{fill:#12314f}
.control{fill:#5b1e1c}.code{fill:#1f2328}}
"""


# ---------------------------------------------------------------------------------------------
# One row of ids


def token_stream(model, processor, prompt: str, picture: Image.Image) -> str:
    """A prompt with one picture -> SVG of its ids and of the model's greedy answer."""
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    ids = generate(model, **inputs, max_new_tokens=30)[0].tolist()
    first, S = ids.index(processor.tokenizer.image_token_id), processor.image_seq_length
    codes = model.model.vqmodel.encode(inputs["pixel_values"])[0]  # (S,)
    tokenizer, y, parts = processor.tokenizer, 0, []
    for drawn, height in (
        text_block("the prompt, up to the picture", ids[:first], tokenizer),
        picture_block(inputs["pixel_values"], codes, model.model.vocabulary.code_to_id[codes]),
        text_block("behind the picture; the answer begins after the end of turn",
                   ids[first + S :], tokenizer),
    ):
        parts.append(f'<g transform="translate(0,{y})">{drawn}</g>')
        y += height
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}">'
            f"<style>{STYLE}</style>{''.join(parts)}</svg>\n")


def text_block(note: str, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, int]:
    """Ids as labelled boxes below a note, broken into lines -> SVG, its height."""
    parts, x, y = [f'<text class="note" y="18">{note}</text>'], 0, 26
    for i in ids:
        kind, name = kind_and_name(tokenizer, i)
        wide = max(34, 7.4 * len(name) + 12)
        if x + wide > WIDTH:
            x, y = 0, y + ROW
        parts.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{wide:.0f}" height="34" '
            f'rx="4"/><text x="{x + wide / 2:.0f}" y="{y + 15}" text-anchor="middle">'
            f'{html.escape(name)}</text><text class="id" x="{x + wide / 2:.0f}" y="{y + 28}" '
            f'text-anchor="middle">{i}</text>')
        x += wide + 3
    return "".join(parts), y + ROW


def picture_block(pixels: Tensor, codes: Tensor, ids: Tensor) -> tuple[str, int]:
    """A picture as the model sees it, and its ids in raster order, coloured by code
    -> SVG, its height.
    """
    side, cell, columns = 120, 27, 27
    uri = data_uri(ChameleonImageProcessor.postprocess(pixels)[0])
    parts = [f'<image y="26" width="{side}" height="{side}" style="image-rendering:pixelated" '
             f'href="{uri}"/><text class="note" x="{side + 20}" y="34">its {len(ids)} ids, row by '
             "row; equal ids have equal colours</text>"]
    for n, (code, i) in enumerate(zip(codes.tolist(), ids.tolist())):
        left, top = side + 20 + n % columns * (cell + 1), 44 + n // columns * 24
        parts.append(f'<rect x="{left}" y="{top}" width="{cell}" height="22" rx="3" '
                     f'fill="{code_colour(code)}"/><text class="code" x="{left + cell / 2}" '
                     f'y="{top + 14}" text-anchor="middle">{i}</text>')
    return "".join(parts), max(side + 26, 44 + 24 * -(-len(ids) // columns))


# ---------------------------------------------------------------------------------------------
# Pictures and codes


def reconstructions(model, count: int = 4) -> Image.Image:
    """Pictures that training did not use: the picture, its codes, and the picture decoded again."""
    rng = np.random.default_rng(SEED)
    scenes = [world.sample_scene(rng, n % 3 + 1) for n in range(count)]
    pixels = torch.from_numpy(world.render_pixels(scenes))  # (N, 3, H, W)
    return there_and_back(model, pixels, 240, columns=6)[0]


def growing(model, processor, prompt: str, pictures: int = 9) -> Image.Image:
    """One drawing in several stages; codes that are not drawn yet are filled with the first."""
    S = model.config.vq_config.codes_per_image
    inputs = processor(text=prompt, return_tensors="pt")
    steps = stream(model, **inputs, mode="image", image_top_p=0.9)
    every = max(1, S // pictures)
    shown = [piece.image for piece in pieces(model, processor.tokenizer, steps, every)]
    return contact_sheet([enlarge(picture, 120) for picture in shown], columns=len(shown))


def drawings(model, processor, count: int = 12) -> Image.Image:
    """Drawings for the first requests of a fixed seed, drawn once and not selected.

    The frame is green if the rule-based reader finds everything that was asked for, else red.
    """
    rng, half = np.random.default_rng(SEED), count // 2
    wanted = [language.ask_drawing(rng, world.sample_scene(rng, n // half + 1))
              for n in range(count)]
    inputs = processor(text=[f"Draw {request.text}." for request in wanted], padding=True,
                       return_tensors="pt")
    ids = generate(model, **inputs, mode="image", image_top_p=0.9)[:, inputs["input_ids"].shape[1]:]
    panels = []
    for request, image in zip(wanted, decode_pictures(model, ids[:, 1:-1])):
        right = language.fulfils(world.read_scene(np.asarray(image)), request)
        picture = ImageOps.expand(enlarge(image, 180), 4, "seagreen" if right else "firebrick")
        panel = Image.new("RGB", (picture.width, picture.height + 44), "white")
        panel.paste(picture)
        text = "\n".join(textwrap.wrap(request.text, 34))
        ImageDraw.Draw(panel).text((2, picture.height + 2), text, fill="black", font_size=10)
        panels.append(panel)
    return contact_sheet(panels, columns=half)


# ---------------------------------------------------------------------------------------------
# Curves


def read_curves(path: Path) -> list[tuple[int, dict[str, str]]]:
    """curves.csv -> [(step, line)] without the VQ-VAE's, whose losses are others. The steps of each
    stage follow those of the stage before.

    A resumed run repeats the steps after its last save. Of two equal steps, the later line counts.
    """
    lines, begin, place = {}, {}, 0
    try:
        with open(path, newline="") as file:
            for line in csv.DictReader(file):
                stage, step = line["stage"], int(line["step"])
                if stage != "vqvae":
                    place = begin.setdefault(stage, place) + step
                    lines[stage, place] = line
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no curves.csv of train.py: {error}") from None
    if not lines:
        raise ValueError(f"{path} has no steps of pretrain or sft yet")
    return [(place, line) for (_, place), line in lines.items()]


GRAY = "#808890"  # readable on a white and on a black page
PANELS = {
    "text_loss": "loss of text, nats a token", "image_loss": "loss of pictures, nats a token",
    "q_norm": "|q| before its norm, last layer", "log_z": "log Z",
}  # fmt: skip


def draw_curves(runs: dict[str, Path], out: Path) -> None:
    """{label: curves.csv} -> one SVG with a panel for each of PANELS; each shows all runs."""
    curves = {label: read_curves(path) for label, path in runs.items()}
    try:
        import matplotlib.figure
    except ImportError:
        raise ValueError('curves need matplotlib: pip install -e ".[figures]"') from None

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(names, GRAY) | {"svg.hashsalt": "chameleon", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(9, 5))
        axes = figure.subplots(2, 2, sharex=True)
        for ax, (column, title) in zip(axes.flat, PANELS.items()):
            for label, lines in curves.items():
                points = [(place, float(line[column])) for place, line in lines if line.get(column)]
                steps, values = np.array(points).reshape(-1, 2).T
                n = max(1, len(steps) // 60)  # a mean of so many hides the noise
                mean = np.convolve(values, np.ones(n) / n, "valid") if len(values) else values
                ax.plot(steps[n - 1 :], mean, label=label, lw=1.2)
            ax.set_title(title, loc="left", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_facecolor("none")
            ax.set_yscale("log" if column.endswith("loss") else "linear")
        for ax in axes[1]:
            ax.set_xlabel("step")
        if len(curves) > 1:
            axes.flat[0].legend(frameon=False)
        figure.tight_layout()
        how = {"transparent": True, "metadata": {"Date": None}, "format": "svg"}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda part: figure.savefig(part, **how))


# ---------------------------------------------------------------------------------------------
# The command


def draw_all(options: argparse.Namespace) -> None:
    if options.curves:
        labelled = (text.rpartition("=") for text in options.curves)
        runs = {label: Path(path) for label, _, path in labelled}
        if len(runs) < len(options.curves):
            raise ValueError("two curves have the same label: write LABEL=FILE")
        return draw_curves(runs, options.out / "curves.svg")
    model, processor = load(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    question = "What do you see in this image?<image>"
    svg = token_stream(model, processor, question, load_image(ROOT / "examples" / "shapes.png"))
    write_atomically(options.out / "stream.svg", lambda part: part.write_text(svg, "utf-8"))
    for name, picture in {"codes": reconstructions(model), "drawings": drawings(model, processor),
                          "growing": growing(model, processor, REQUEST)}.items():
        save_picture(picture, options.out / f"{name}.png")


def main(arguments: list[str] | None = None) -> int:
    """-> exit code, see `exit_code` in chameleon_extras/files.py."""
    parser = OneLineParser("figures", description="Draws the figures of the READMEs.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: figures)")
    parser.add_argument("--curves", nargs="+", metavar="[LABEL=]FILE",
                        help="draw the curves of these files and nothing else")
    options = parser.parse_args(arguments)
    return exit_code("figures", lambda: draw_all(options))


if __name__ == "__main__":
    sys.exit(main())
