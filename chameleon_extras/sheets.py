"""Pictures and pages to look at: contact sheets, codes as a grid, an interleaved document.

    pictures --contact_sheet--> one picture          text and pictures --write_document--> a folder
    pixels (N, 3, H, W) --there_and_back--> each picture, its codes, and their decoding

Who needs it: command.py, chat.py, demo.py, explain.py and tests/figures.py.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from chameleon_extras.files import own_rank, write_atomically
from generate import Piece
from processor import ChameleonImageProcessor

SIDE = 216  # in a document, smaller pictures are enlarged to at most so many pixels
GAP = 4  # pixels between pictures of a sheet
LARGEST = 500_000_000  # pixels of a sheet
LONGEST = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # pixels of a side, by format
HEAT = (0, 215, 215)  # the colour of where a token looked
GOLDEN_ANGLE = 137.508  # degrees between the hues of code k and k + 1; few codes look alike


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes a picture in the format of the file's name. ValueError as in `picture_format`."""
    kind = picture_format(path)
    if own_rank() == 0:
        write_atomically(path, lambda part: image.save(part, format=kind))


def picture_format(path: Path) -> str:
    """ "out.png" -> "PNG". ValueError for a format not in LONGEST: it changes colours or sizes."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in LONGEST:
        raise ValueError(f"{path} does not end in .png, .jpg or .webp: name it .png")
    return kind


def check_sheet(path: Path, pictures: int, side: int, columns: int | None = None) -> None:
    """ValueError if so many pictures of this side are a `contact_sheet` too large for the file."""
    columns = columns or math.ceil(math.sqrt(pictures))
    kind, rows = picture_format(path), math.ceil(pictures / columns)
    longest = max(columns, rows) * (side + GAP) + GAP
    if longest > LONGEST[kind]:
        raise ValueError(f"{path} would be {longest} pixels long, and {kind} holds "
                         f"{LONGEST[kind]}: ask for fewer or smaller ones, or for .png")
    if columns * rows * side**2 > LARGEST:
        raise ValueError(f"{path} would have more than 500 megapixels: ask for fewer pictures, or "
                         "for smaller ones")


def contact_sheet(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size, row by row. By default rows and columns are about equal."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    wide, high = (side + GAP for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * wide + GAP, rows * high + GAP), "lightgray")
    for n, picture in enumerate(pictures):
        row, column = divmod(n, columns)
        sheet.paste(picture, (column * wide + GAP, row * high + GAP))
    return sheet


def there_and_back(model, pixels: torch.Tensor, side: int,
                   columns: int = 3) -> tuple[Image.Image, tuple[int, int], float]:
    """pixels (N, 3, H, W) -> a sheet; rows and columns of codes; PSNR in dB.

    The sheet shows each picture, its codes and their decoding, each at most `side` pixels wide.
    """
    shape = tuple(side // model.config.vq_config.downsampling for side in pixels.shape[2:])
    codes = model.model.vqmodel.encode(pixels)  # (N, S)
    decoded = model.model.vqmodel.decode(codes, shape)  # (N, 3, H, W)
    seen, again = map(ChameleonImageProcessor.postprocess, (pixels, decoded))
    panels = []
    for original, grid, picture in zip(seen, codes.view(-1, *shape).tolist(), again):
        original, picture = enlarge(original, side), enlarge(picture, side)
        panels += [original, code_grid(grid, original.width).resize(original.size), picture]
    error = (pixels.clamp(-1, 1) - decoded.clamp(-1, 1)).square().mean()
    return contact_sheet(panels, columns), shape, 10 * math.log10(4 / error.item())


def code_colour(code: int) -> str:
    """A colour as CSS and PIL write it. Consecutive codes get very different hues."""
    return f"hsl({code * GOLDEN_ANGLE % 360:.0f},60%,75%)"


def code_grid(codes: Sequence[Sequence[int]], side: int) -> Image.Image:
    """Codes (h, w) -> a picture about `side` pixels wide. Equal codes have equal colours."""
    rows, columns = len(codes), len(codes[0])
    cell = max(1, side // columns)
    grid = Image.new("RGB", (columns * cell, rows * cell))
    pen = ImageDraw.Draw(grid)
    for y, row in enumerate(codes):
        for x, code in enumerate(row):
            box = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
            pen.rectangle(box, fill=code_colour(code))
            if cell >= 24:  # a smaller number would not be legible
                middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                pen.text(middle, str(code), fill="black", anchor="mm", font_size=cell * 0.36)
    return grid


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Enlarges by a whole factor to at most `side` pixels a side. Each pixel becomes a square."""
    return ImageOps.scale(picture, max(1, side // max(picture.size)), Image.NEAREST)


def gray_grid(values: torch.Tensor) -> Image.Image:
    """Numbers (h, w), none negative -> a gray picture with a pixel for each, the largest white."""
    levels = values / values.max().clamp(min=1e-12) * 255
    return Image.fromarray(levels.to(torch.uint8).numpy())


def heat_on(picture: Image.Image, weights: torch.Tensor) -> Image.Image:
    """A picture, and on it where weights (h, w) are large, the largest in full HEAT."""
    strength = gray_grid(weights).resize(picture.size, Image.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, HEAT), picture, strength)


def data_uri(picture: Image.Image) -> str:
    """A picture as the `src` of an HTML page that needs no other file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def parts_of(answer: Iterable[Piece]) -> list[str | Image.Image]:
    """The pieces of an answer -> its pictures, and one text of all pieces between two pictures."""
    parts = []
    for is_text, run in groupby(answer, key=lambda piece: piece.image is None):
        values = [piece.image or piece.text for piece in run]
        parts += ["".join(values)] if is_text else values
    return parts


def write_document(folder: Path, parts: Sequence[str | Image.Image]) -> None:
    """Text and pictures in order -> 1.png, 2.png ..., document.md, and document.html.

    The HTML page contains the pictures, and follows the reader's light or dark mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    markdown, body, n = [], [], 0
    for part in parts:
        if isinstance(part, str):
            markdown.append(part)
            body.append(f"<p>{html.escape(part)}</p>")
            continue
        n += 1
        save_picture(part, folder / f"{n}.png")
        markdown.append(f"![picture {n}]({n}.png)")
        width = enlarge(part, SIDE).width  # by CSS: the file stays as it was drawn
        body.append(f'<p><img alt="picture {n}" width="{width}" src="{data_uri(part)}"></p>')
    page = (
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        "<title>Chameleon</title><style>body{font:1.1rem/1.5 serif;max-width:40rem;margin:2rem "
        "auto}p{white-space:pre-wrap}img{max-width:100%;image-rendering:pixelated}</style>\n"
        + "\n".join(body) + "\n"
    )
    for name, text in (("document.md", "\n\n".join(markdown) + "\n"), ("document.html", page)):
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
