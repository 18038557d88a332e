"""A toy world of coloured shapes: pictures, and a reader of pictures. Its English: language.py.

    rng -> sample_scene -> Scene -> render -> picture (H, W, 3) uint8
                picture -> read_scene -> Scene        the judge of reconstructions and drawings

Everything random comes from the one numpy Generator that is passed in, so a seed is a data set.

    Thing    one coloured shape: colour, shape, size, place (and a little jitter)
    Scene    a plain background with one to three things, listed in reading order

A few (colour, shape) pairs are HELD_OUT: no picture that the decoder learns from shows them, and no
sentence about a picture names them. The VQ-VAE, which learns pixels and no words, sees them, and
sentences without a picture name them, as people have heard of what they never saw. A model that
names or draws them has learned the colour and the shape, not the picture.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (214, 32, 36),
    "green": (32, 160, 64),
    "blue": (40, 76, 224),
    "yellow": (244, 214, 44),
    "purple": (144, 48, 184),
    "orange": (246, 128, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.1, "large": 0.15}  # radius of the circle, in picture widths
BACKGROUNDS = {"white": 255, "black": 0, "gray": 128}
# (row, column) of a 3 x 3 grid -> the words for it
PLACES = {
    (0, 0): "in the top left", (0, 1): "at the top", (0, 2): "in the top right",
    (1, 0): "on the left", (1, 1): "in the middle", (1, 2): "on the right",
    (2, 0): "in the bottom left", (2, 1): "at the bottom", (2, 2): "in the bottom right",
}  # fmt: skip
SIDE = 36  # pixels: each place is 12 x 12, exactly 3 x 3 patches of a VQ-VAE that divides by 4
HELD_OUT = frozenset({("purple", "star"), ("green", "triangle")})
JITTER = 1 / 48  # how far a thing strays from its place, in picture widths
# The outer radius of each shape relative to the circle's, so that all four look equally large.
REACH = {"circle": 1.0, "square": 0.90, "triangle": 1.22, "star": 1.2}
BLOB = 0.25  # the reader's limit: squared error of the best rendering, per covered pixel


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    place: tuple[int, int]  # (row, column), 0..2
    dy: float = 0.0  # jitter, in picture widths
    dx: float = 0.0

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # reading order: top to bottom, then left to right


def pick(rng: np.random.Generator, options):
    """One of the options (a sequence or a dict's keys), each as likely."""
    options = options if isinstance(options, Sequence) else list(options)
    return options[int(rng.integers(len(options)))]


def sample_thing(
    rng: np.random.Generator, place: tuple[int, int], held_out: bool | None = False
) -> Thing:
    """One thing at `place`; its (colour, shape) is in HELD_OUT or not; None: it may be either."""
    while True:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if held_out is None or ((colour, shape) in HELD_OUT) == held_out:
            break
    dy, dx = rng.uniform(-JITTER, JITTER, 2)
    return Thing(colour, shape, str(rng.choice(list(SIZES))), place, float(dy), float(dx))


def sample_scene(
    rng: np.random.Generator, count: int | None = None, held_out: bool | None = False
) -> Scene:
    """A random scene of `count` things, by default one to three.

    No two are alike in both colour and shape.

    held_out: the first thing drawn is a HELD_OUT composition (the others are ordinary); None: any
    thing may be.
    """
    count = count or int(rng.choice((1, 2, 3), p=(0.35, 0.4, 0.25)))
    places = sorted(PLACES)
    things = []
    for place in rng.permutation(len(places))[:count]:
        while True:
            thing = sample_thing(rng, places[place], held_out and not things)  # None stays None
            if all((t.colour, t.shape) != (thing.colour, thing.shape) for t in things):
                break
        things.append(thing)
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(background, tuple(sorted(things, key=lambda t: t.place)))


def sample_pair(rng: np.random.Generator, held_out: bool = False) -> tuple[Scene, Scene, str]:
    """Two pictures of one thing each, and what they share: colour, shape, both or nothing."""
    shared = pick(rng, ("colour", "shape", "both", "nothing"))
    while True:
        first, second = sample_scene(rng, 1, held_out), sample_scene(rng, 1)
        thing, other = first.things[0], second.things[0]
        if shared in ("colour", "both"):
            other = replace(other, colour=thing.colour)
        if shared in ("shape", "both"):
            other = replace(other, shape=thing.shape)
        same = thing.colour == other.colour, thing.shape == other.shape
        wanted = shared in ("colour", "both"), shared in ("shape", "both")
        if same == wanted and (held_out or (other.colour, other.shape) not in HELD_OUT):
            return first, replace(second, things=(other,)), shared


def sample_edit(rng: np.random.Generator, held_out: bool = False) -> tuple[Scene, Scene, str]:
    """A picture of one thing, the same with one field changed, and the field's name.

    held_out: the first picture shows a HELD_OUT composition; else neither does.
    """
    before = sample_scene(rng, 1, held_out)
    field = pick(rng, ("colour", "shape", "size", "place", "background"))
    while True:
        other = sample_scene(rng, 1).things[0]
        after = replace(before, background=pick(rng, BACKGROUNDS))
        if field != "background":
            thing = replace(before.things[0], **{field: getattr(other, field)})
            after = replace(before, things=(thing,))
        pair = after.things[0].colour, after.things[0].shape
        if after != before and (held_out or pair not in HELD_OUT):
            return before, after, field


def sample_twin(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same places, sizes and background with other colours, other shapes or both."""
    while True:
        things = []
        for thing in scene.things:
            other = sample_thing(rng, thing.place)
            field = pick(rng, ("colour", "shape", "both"))
            if field != "shape":
                thing = replace(thing, colour=other.colour)
            if field != "colour":
                thing = replace(thing, shape=other.shape)
            things.append(thing)
        twin = replace(scene, things=tuple(things))
        if twin != scene and not HELD_OUT & {(t.colour, t.shape) for t in things}:
            return twin


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def coverage(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, 0..1; y, x and radius in pixels, y down, centre 0.

    Each shape is a signed distance d (negative inside); a pixel whose centre is d away from a
    straight edge is covered by about 1/2 - d, which is the anti-aliasing.
    """
    if shape == "circle":
        d = np.hypot(x, y) - radius
    elif shape == "square":
        d = np.maximum(abs(x), abs(y)) - radius
    else:
        # A regular n-gon or n-star is 2n mirrored wedges; in each the outline is one straight
        # line, from the tip (radius, angle 0) to the notch (inner * radius, angle pi / n).
        n, inner = (3, 0.5) if shape == "triangle" else (5, 0.42)
        r, angle = np.hypot(x, y), np.arctan2(x, -y)  # angle from the upward tip
        angle = abs((angle + np.pi / n) % (2 * np.pi / n) - np.pi / n)  # folded into one wedge
        ny, nx = inner * np.sin(np.pi / n), inner * np.cos(np.pi / n) - 1  # notch minus tip
        length = np.hypot(ny, nx)
        d = ((r * np.cos(angle) - radius) * ny - r * np.sin(angle) * nx) / length
    return np.clip(0.5 - d, 0, 1)


def render(scene: Scene, height: int = SIDE, width: int | None = None) -> np.ndarray:
    """scene -> picture (H, W, 3) uint8.

    The scene fills the largest centred square; the rest of a wider or taller picture is
    background. So the centre crop of the image processor never cuts a thing.
    """
    width = width or height
    side = min(height, width)
    picture = np.full((height, width, 3), BACKGROUNDS[scene.background], np.float32)  # (H, W, 3)
    for thing in scene.things:
        cy, cx = thing_centre(thing, height, width)
        reach = int(side * 0.22) + 2  # no shape reaches farther
        rows = slice(max(0, int(cy) - reach), int(cy) + reach)
        columns = slice(max(0, int(cx) - reach), int(cx) + reach)
        window = picture[rows, columns]  # (h, w, 3), a view
        y = np.arange(window.shape[0], dtype=np.float32)[:, None] + rows.start + 0.5 - cy  # (h, 1)
        x = np.arange(window.shape[1], dtype=np.float32)[None] + columns.start + 0.5 - cx  # (1, w)
        radius = SIZES[thing.size] * REACH[thing.shape] * side
        alpha = coverage(thing.shape, y, x, radius)[..., None]  # (h, w, 1)
        colour = np.array(COLOURS[thing.colour], np.float32)
        window += alpha * (colour - window)
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


def thing_centre(thing: Thing, height: int, width: int) -> tuple[float, float]:
    """The centre (y, x) of a thing in pixels."""
    side = min(height, width)
    # A triangle's middle lies above the centre it is drawn around, by a quarter of its radius.
    drop = 0.25 * SIZES[thing.size] * REACH["triangle"] if thing.shape == "triangle" else 0.0
    y = (2 * thing.place[0] + 1) / 6 + thing.dy + drop
    x = (2 * thing.place[1] + 1) / 6 + thing.dx
    return (height - side) / 2 + y * side, (width - side) / 2 + x * side


def render_pixels(scenes: Sequence[Scene]) -> np.ndarray:
    """B scenes -> pixels (B, 3, H, W) fp32, -1 to 0.989.

    The very numbers of ChameleonImageProcessor, whose white is 255 * 0.0078 - 1 = 0.989.
    """
    pictures = np.stack([render(scene) for scene in scenes])  # (B, H, W, 3)
    pixels = (pictures * 0.0078).astype(np.float32) - 1
    # Contiguous: a permuted view would make every convolution run in the slower channels_last.
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------
# The reader: the judge of what a picture shows, with no learning in it


def read_scene(picture: np.ndarray | Image.Image) -> Scene:
    """A square picture of this world -> the Scene it shows (jitter included).

    Analysis by synthesis: in each of the nine places the colour that explains the pixels best,
    then the shape and size whose rendering comes nearest. `shape` is "blob" where no rendering
    comes near, so that a smeared drawing is not taken for a circle.
    """
    picture = np.asarray(picture, np.float32)  # (N, N, 3)
    middle = np.median(picture, axis=(0, 1))  # (3,), things never cover half of the picture
    background = min(BACKGROUNDS, key=lambda name: np.abs(middle - BACKGROUNDS[name]).sum())
    things = []
    for place in PLACES:
        thing = read_place(picture - BACKGROUNDS[background], place, BACKGROUNDS[background])
        if thing:
            things.append(thing)
    return Scene(background, tuple(things))


def read_place(difference: np.ndarray, place: tuple[int, int], background: float) -> Thing | None:
    """What stands at one place; difference (N, N, 3) is the picture minus its background."""
    side = len(difference)
    edges = [round(side * i / 3) for i in range(4)]
    rows, columns = (slice(edges[i], edges[i + 1]) for i in place)
    window = difference[rows, columns]  # (h, w, 3)
    # With alpha the coverage, a pixel is alpha * direction: project on it, see what is left over.
    best = None
    for name, colour in COLOURS.items():
        direction = np.array(colour, np.float32) - background  # (3,)
        alpha = np.clip(window @ direction / (direction @ direction), 0, 1)  # (h, w)
        rest = np.square(window - alpha[..., None] * direction).sum()
        if best is None or rest < best[0]:
            best = rest, name, alpha
    _, colour, alpha = best
    if alpha.sum() < 0.5 * (SIZES["small"] * side) ** 2:  # a small star covers 3.5 times as much
        return None
    y = np.arange(alpha.shape[0])[:, None] + 0.5  # (h, 1)
    x = np.arange(alpha.shape[1])[None] + 0.5  # (1, w)
    cy, cx = (alpha * y).sum() / alpha.sum(), (alpha * x).sum() / alpha.sum()
    best = None
    for shape in SHAPES:
        for size, radius in SIZES.items():
            template = coverage(shape, y - cy, x - cx, radius * REACH[shape] * side)  # (h, w)
            error = np.square(alpha - template).sum() / template.sum()
            if best is None or error < best[0]:
                best = error, shape, size
    error, shape, size = best
    dy = (rows.start + cy) / side - (2 * place[0] + 1) / 6
    dx = (columns.start + cx) / side - (2 * place[1] + 1) / 6
    return Thing(colour, shape if error < BLOB else "blob", size, place, float(dy), float(dx))


# ---------------------------------------------------------------------------------------------
# python -m training.world FOLDER: the pictures in examples/


def write_examples(folder: Path) -> None:
    """The README's pictures, larger than the model sees them, one of them not square."""
    def thing(words: str, row: int, column: int) -> Thing:
        size, colour, shape = words.split()
        return Thing(colour, shape, size, (row, column))

    pictures = {
        "shapes": (256, 256, "white", thing("small red circle", 0, 1),
                   thing("large blue square", 1, 1)),
        "star": (256, 256, "black", thing("large yellow star", 1, 1)),
        "wide": (240, 400, "gray", thing("large orange triangle", 1, 0),
                 thing("small blue circle", 1, 2)),
        "three": (384, 384, "black", thing("small green star", 0, 0),
                  thing("large red square", 1, 1), thing("large yellow circle", 2, 2)),
        "first": (256, 256, "white", thing("large green circle", 1, 1)),
        "second": (256, 256, "gray", thing("small purple circle", 0, 2)),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, (height, width, background, *things) in pictures.items():
        scene = Scene(background, tuple(things))
        Image.fromarray(render(scene, height, width)).save(folder / f"{name}.png")


if __name__ == "__main__":
    write_examples(Path(sys.argv[1] if len(sys.argv) > 1 else "examples"))
