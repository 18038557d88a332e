"""Draws the figures of README.md and tiny/README.md from a checkpoint and from logged curves.

    python -m tiny_world.figures tiny                         the figures of a checkpoint
    python -m tiny_world.figures tiny --curves tiny.train/curves.csv
    python -m tiny_world.figures tiny --curves with=a/curves.csv "no z-loss=b/curves.csv"

    checkpoint --generate--> stream.svg      one row of ids: text, a picture, text
                         --> codes.png       pictures, their codes, and the pictures decoded again
                         --> growing.png     one drawing, code by code
                         --> drawings.png    twelve drawings with their requests
                         --> drawn.png, story.png   what two commands of README.md draw
    curves.csv ------------> curves.svg      losses, log Z and |q| of one or several runs

The files go to the folder figures/ here, which git ignores; those of the READMEs are kept in
examples/figures/. All of them can be read on a white and on a black page. Only the curves need
matplotlib: pip install -e ".[figures]".
"""

import argparse
import base64
import csv
import html
import io
import re
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from chameleon_extras.explain import Names
from chameleon_extras.files import OneLineParser, exit_code, write_atomically
from chameleon_extras.sheets import (
    code_colour,
    contact_sheet,
    enlarge,
    save_picture,
    there_and_back,
)
from generate import decode_pictures, generate, pieces, seeds_of, stream
from generate import main as command
from processor import ChameleonImageProcessor, load_image
from tiny_world import language, world
from tiny_world.evaluate import SEED, load

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("figures")  # not examples/figures: a first try must not replace the READMEs' figures
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
    ids = generate(model, **inputs, max_new_tokens=30)  # (1, T)
    seen = model.model.replace_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    T = seen.shape[1]
    row = torch.cat((seen[0], ids[0, T:])).tolist()
    first = (inputs["input_ids"][0] == model.model.vocabulary.image_token_id).nonzero()[0].item()
    S = model.config.vq_config.codes_per_image
    names = Names(processor.tokenizer)
    parts, y = [], 26
    for note, some in (("the prompt, up to the picture", row[:first]), (None, None),
                       ("behind the picture; the answer begins after the end of turn",
                        row[first + S :])):
        if some is None:
            drawn, height = picture_block(processor, picture, row[first : first + S], y)
        else:
            parts.append(f'<text class="note" x="0" y="{y - 8}">{note}</text>')
            drawn, height = text_line(some, names, y)
        parts.append(drawn)
        y += height
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}">'
            f"<style>{STYLE}</style>{''.join(parts)}</svg>\n")


def text_line(ids: Sequence[int], names: Names, y: int) -> tuple[str, int]:
    """Ids as labelled boxes, broken into lines -> SVG, its height."""
    parts, x, top = [], 0, y
    for i in ids:
        name = names.name(i)
        wide = max(34, 7.4 * len(name) + 12)
        if x + wide > WIDTH:
            x, y = 0, y + ROW
        parts.append(
            f'<rect class="{names.kind(i)}" x="{x:.0f}" y="{y}" width="{wide:.0f}" height="34" '
            f'rx="4"/><text x="{x + wide / 2:.0f}" y="{y + 15}" text-anchor="middle">'
            f'{html.escape(name)}</text><text class="id" x="{x + wide / 2:.0f}" y="{y + 28}" '
            f'text-anchor="middle">{i}</text>')
        x += wide + 3
    return "".join(parts), y + ROW + 26 - top


def picture_block(processor, picture: Image.Image, ids: Sequence[int], y: int) -> tuple[str, int]:
    """A picture as the model sees it, and its ids in raster order, coloured by code
    -> SVG, its height.
    """
    pixels = processor.image_processor(picture, return_tensors="pt").pixel_values
    file = io.BytesIO()
    ChameleonImageProcessor.postprocess(pixels)[0].save(file, "png")
    side, cell, columns = 120, 27, 27
    codes = processor.tokenizer.vocabulary.codes_from_ids(torch.tensor(ids)).tolist()
    parts = [f'<image y="{y}" width="{side}" height="{side}" style="image-rendering:pixelated" '
             f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>',
             f'<text class="note" x="{side + 20}" y="{y + 8}">its {len(ids)} ids, row by row; '
             "equal ids have equal colours</text>"]
    for n, (i, code) in enumerate(zip(ids, codes)):
        left, top = side + 20 + n % columns * (cell + 1), y + 18 + n // columns * 24
        parts.append(f'<rect x="{left}" y="{top}" width="{cell}" height="22" rx="3" '
                     f'fill="{code_colour(code)}"/><text class="code" x="{left + cell / 2}" '
                     f'y="{top + 14}" text-anchor="middle">{i}</text>')
    rows = -(-len(ids) // columns)
    return "".join(parts), max(side, 18 + 24 * rows) + 34


# ---------------------------------------------------------------------------------------------
# Pictures and codes


def reconstructions(model, count: int = 4) -> Image.Image:
    """Pictures that training did not use: the picture, its codes, and the picture decoded again."""
    rng = np.random.default_rng(SEED)
    scenes = [world.sample_scene(rng, n % 3 + 1) for n in range(count)]
    pixels = torch.from_numpy(world.render_pixels(scenes))  # (N, 3, H, W)
    return there_and_back(model, pixels, 240, columns=6)[0]


def growing(model, processor, prompt: str, pictures: int = 9, seed: int = 0) -> Image.Image:
    """One drawing in several stages; codes that are not drawn yet are filled with the first."""
    S = model.config.vq_config.codes_per_image
    inputs = processor(text=prompt, return_tensors="pt")
    steps = stream(model, **inputs, mode="image", image_top_p=0.9, seed=seed)
    every = max(1, S // pictures)
    shown = [piece.image for piece in pieces(model, processor.tokenizer, steps, every)]
    return contact_sheet([enlarge(picture, 120) for picture in shown], columns=len(shown))


def drawings(model, processor, count: int = 12) -> Image.Image:
    """Drawings for the first requests of the evaluation, drawn once and not selected.

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


def drawn_by(arguments: list[str], made: str) -> Image.Image:
    """Runs generate.py with --out in a temporary folder -> the picture it wrote there."""
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.index("--out") + 1
        arguments = [*arguments]
        arguments[place] = str(Path(folder) / arguments[place])
        if command([*arguments, "--device", "cpu"]):
            raise ValueError(f"generate.py {shlex.join(arguments)} failed")
        return enlarge(load_image(Path(folder) / made), 240)


def readme_commands() -> dict[str, list[str]]:
    """The commands of README.md that have an --out -> {its value: the arguments}."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {}
    for line in re.findall(r"^(?:\$ )?python generate\.py (.*)$", readme, re.MULTILINE):
        arguments = shlex.split(line, comments=True)
        if "--out" in arguments:
            found[arguments[arguments.index("--out") + 1]] = arguments
    return found


# ---------------------------------------------------------------------------------------------
# Curves


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """curves.csv -> {column: [(step, value)]}; each stage's steps follow those of the stage before.

    A resumed run repeats the steps after its last save. Of two equal steps, the later line counts.
    """
    curves, begin, last = {}, {}, {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                stage, step = row.pop("stage"), int(row.pop("step"))
                if stage == "vqvae":
                    continue
                if stage not in begin:
                    begin[stage] = max((begin[s] + last[s] for s in begin), default=0)
                last[stage] = step
                place = begin[stage] + step, list(begin).index(stage)
                for name, value in row.items():
                    if value:
                        curves.setdefault(name, {})[place] = float(value)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no curves.csv of train.py: {error}") from None
    if not curves:
        raise ValueError(f"{path} has no steps of pretrain, sft or refine yet")
    if max(last.values()) > 2**53:
        raise ValueError(f"{path} has a step of {len(str(max(last.values())))} digits")
    return {
        name: [(place, value) for (place, _), value in sorted(points.items())]
        for name, points in curves.items()
    }


def smooth(values: Sequence[float], over: int) -> Tensor:
    """Mean of each value and those before it, `over` values at most.   (n,) -> (n,)"""
    total = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)  # (n + 1,)
    end = torch.arange(1, len(values) + 1)
    start = (end - over).clamp(min=0)
    return (total[end] - total[start]) / (end - start)  # (n,)


GRAY = "#808890"  # readable on a white and on a black page
PANELS = {
    "text_loss": "loss of text, nats a token", "image_loss": "loss of pictures, nats a token",
    "q_norm": "|q| before its norm, last layer", "log_z": "log Z",
}  # fmt: skip


def draw_curves(runs: dict[str, Path], out: Path) -> None:
    """{label: curves.csv} -> one SVG with a panel for each of PANELS; each shows all runs."""
    curves = {label: read_curves(path) for label, path in runs.items()}
    try:
        import matplotlib
    except ImportError:
        raise ValueError('curves need matplotlib: pip install -e ".[figures]"') from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(names, GRAY) | {"svg.hashsalt": "chameleon", "font.size": 9}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True)
        for ax, (column, title) in zip(axes.flat, PANELS.items()):
            for label, columns in curves.items():
                steps, values = zip(*columns.get(column, [(0, float("nan"))]))
                ax.plot(steps, smooth(values, max(1, len(values) // 60)), label=label, lw=1.2)
            ax.set_title(title, loc="left", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_facecolor("none")
            if column.endswith("loss"):
                ax.set_yscale("log" if any(line.get_ydata().max() > 0 for line in ax.lines)
                              else "linear")
        for ax in axes[1]:
            ax.set_xlabel("step")
        if len(curves) > 1:
            axes.flat[0].legend(frameon=False)
        figure.tight_layout()
        how = {"transparent": True, "metadata": {"Date": None}, "format": out.suffix[1:]}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda part: figure.savefig(part, **how))
        pyplot.close(figure)


# ---------------------------------------------------------------------------------------------
# The command


def label_and_path(text: str) -> tuple[str, Path]:
    label, equals, path = text.rpartition("=")
    return (label, Path(path)) if equals else (Path(text).parent.name, Path(text))


def draw_all(options: argparse.Namespace) -> None:
    if Path(options.name).name != options.name or not options.name.endswith((".svg", ".png")):
        raise ValueError(f"--name {options.name!r}: name a file like curves.svg, without a folder")
    if options.curves:
        runs = dict(map(label_and_path, options.curves))
        if len(runs) < len(options.curves):
            raise ValueError("two curves have the same label: write LABEL=FILE")
        return draw_curves(runs, options.out / options.name)
    seeds_of(options.seed, 1)
    if not options.draw.strip() or "<image>" in options.draw:
        raise ValueError("--draw needs a text without <image>")
    model, processor = load(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    question = "What do you see in this image?<image>"
    svg = token_stream(model, processor, question, load_image(ROOT / "examples" / "shapes.png"))
    write_atomically(options.out / "stream.svg", lambda part: part.write_text(svg, "utf-8"))
    save_picture(reconstructions(model), options.out / "codes.png")
    steps = growing(model, processor, options.draw, seed=options.seed)
    save_picture(steps, options.out / "growing.png")
    save_picture(drawings(model, processor), options.out / "drawings.png")
    commands = readme_commands()
    for out, made, file in (("circle.png", "circle.png", "drawn.png"),
                            ("story", "story/1.png", "story.png")):  # fmt: skip
        arguments = [*commands[out], "--model", str(options.model)]
        save_picture(drawn_by(arguments, made), options.out / file)


def main(arguments: list[str] | None = None) -> int:
    """-> exit code, see `exit_code` in chameleon_extras/files.py."""
    parser = OneLineParser("figures", description="Draws the figures of the READMEs.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: figures)")
    parser.add_argument("--curves", nargs="+", metavar="[LABEL=]FILE",
                        help="draw the curves of these files and nothing else")
    parser.add_argument("--name", default="curves.svg", help="name of the curves' figure")
    parser.add_argument("--draw", default="Draw a large red circle above a small blue star.",
                        help="request for growing.png")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing in growing.png")
    options = parser.parse_args(arguments)
    return exit_code("figures", lambda: draw_all(options))


if __name__ == "__main__":
    sys.exit(main())
