"""A toy world of coloured shapes: it renders pictures, and reads from a picture what it shows.

    rng -> sample_scene -> Scene -> render -> picture (N, N, 3) uint8
                picture -> read_scene -> Scene        judges reconstructions and drawings

    Thing    one coloured shape: colour, shape, size, place, and a small random offset
    Scene    a plain background with things in reading order, for the decoder one to three

Who needs it: whoever trains or evaluates the tiny checkpoint. language.py holds its English.
All random draws come from the numpy Generator that the caller passes, so a seed is a data set.

HELD_OUT holds two (colour, shape) pairs that test composition. No picture of the decoder's training
set shows them, and no sentence about a picture names them. The VQ-VAE sees them, because it learns
pixels and no words. Sentences without a picture name them, as people talk of things they have never
seen. A decoder that names or draws these pairs has learned colour and shape separately.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.random import Generator
from PIL import Image

COLOURS = {
    "red": (214, 32, 36),
    "green": (32, 160, 64),
    "blue": (40, 76, 224),
    "yellow": (244, 214, 44),
    "purple": (144, 48, 184),
    "orange": (246, 128, 20),
}
# Radius (of a square: half its side) relative to the circle's, so that all are about equally wide.
SHAPES = {"circle": 1.0, "square": 0.90, "triangle": 1.22, "star": 1.2}
SIZES = {"small": 0.1, "large": 0.15}  # radius of a circle, in picture widths
BACKGROUNDS = {"white": 255, "black": 0, "gray": 128}
# (row, column) of a 3 x 3 grid -> the words for it
PLACES = {
    (0, 0): "in the top left", (0, 1): "at the top", (0, 2): "in the top right",
    (1, 0): "on the left", (1, 1): "in the middle", (1, 2): "on the right",
    (2, 0): "in the bottom left", (2, 1): "at the bottom", (2, 2): "in the bottom right",
}  # fmt: skip
SIDE = 36  # pixels: each place is 12 x 12, exactly 3 x 3 patches of a VQ-VAE that divides by 4
HELD_OUT = frozenset({("purple", "star"), ("green", "triangle")})
JITTER = 1 / 48  # largest random offset of a thing from its place, in picture widths
BLOB = 0.25  # above this squared error per covered pixel, the reader recognizes no shape
FIELDS = ("colour", "shape", "size", "place")  # of a thing, as words name them


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    place: tuple[int, int]  # (row, column), 0..2
    dy: float = 0.0  # random offset, in picture widths
    dx: float = 0.0

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    def only(self, fields: Iterable[str]) -> dict:
        """Some of its fields: only(("colour", "shape")) -> {"colour": "red", "shape": "star"}"""
        return {field: getattr(self, field) for field in fields}


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # reading order: top to bottom, then left to right


def pairs(*scenes: Scene) -> set[tuple[str, str]]:
    """The (colour, shape) of all things."""
    return {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}


def pick(rng: Generator, options):
    """One of the options (a sequence, or a dict's keys), all equally likely."""
    options = options if isinstance(options, Sequence) else list(options)
    return options[rng.integers(len(options))]


def sample_thing(rng: Generator, place: tuple[int, int], held_out: bool | None = False) -> Thing:
    """A thing at `place`. `held_out`: is its (colour, shape) in HELD_OUT? None: it may be."""
    while True:
        colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
        if held_out is None or ((colour, shape) in HELD_OUT) == held_out:
            dy, dx = rng.uniform(-JITTER, JITTER, 2)
            return Thing(colour, shape, pick(rng, SIZES), place, float(dy), float(dx))


def sample_scene(rng: Generator, count: int | None = None, held_out: bool | None = False) -> Scene:
    """A random scene of 1 to 9 things, by default 1 to 3, no two alike in colour and shape.

    held_out: True makes the first thing drawn a HELD_OUT pair, and only that; False allows none;
    None allows any.
    """
    count = count or rng.choice((1, 2, 3), p=(0.35, 0.4, 0.25))
    places, things = list(PLACES), {}  # (colour, shape) -> Thing
    order = rng.permutation(len(places))
    while len(things) < count:
        place = places[order[len(things)]]
        thing = sample_thing(rng, place, held_out and not things)  # None stays None
        things.setdefault((thing.colour, thing.shape), thing)  # if it is new, else tries again
    return Scene(pick(rng, BACKGROUNDS), tuple(sorted(things.values(), key=lambda t: t.place)))


def sample_pair(rng: Generator, held_out: bool = False) -> tuple[Scene, Scene]:
    """Two scenes of one thing each, which share colour, shape, both or nothing.

    held_out: the first scene shows a HELD_OUT pair; else neither does.
    """
    shared = pick(rng, (["colour"], ["shape"], ["colour", "shape"], []))
    while True:
        first, second = sample_scene(rng, 1, held_out), sample_scene(rng, 1)
        (thing,), (other,) = first.things, second.things
        other = replace(other, **thing.only(shared))
        second = replace(second, things=(other,))
        same = [field for field in ("colour", "shape")
                if getattr(thing, field) == getattr(other, field)]
        if same == shared and (held_out or not HELD_OUT & pairs(second)):
            return first, second


def sample_edit(rng: Generator, held_out: bool = False) -> tuple[Scene, Scene]:
    """A scene of one thing, and the same with one field changed.

    held_out: the first scene shows a HELD_OUT pair; else neither does.
    """
    before = sample_scene(rng, 1, held_out)
    field = pick(rng, (*FIELDS, "background"))
    while True:
        other = sample_scene(rng, 1).things[0]
        after = replace(before, background=pick(rng, BACKGROUNDS))
        if field != "background":
            after = replace(before, things=(replace(before.things[0], **other.only([field])),))
        if after != before and (held_out or not HELD_OUT & pairs(after)):
            return before, after


def changed(before: Scene, after: Scene) -> str:
    """The name of the field that `sample_edit` changed."""
    (old,), (new,) = before.things, after.things
    return next((field for field in FIELDS if getattr(old, field) != getattr(new, field)),
                "background")


def sample_twin(rng: Generator, scene: Scene) -> Scene:
    """The scene with other colours, other shapes or both at the same places."""
    while True:
        things = []
        for thing in scene.things:
            other = sample_thing(rng, thing.place)
            fields = pick(rng, (["colour"], ["shape"], ["colour", "shape"]))
            things.append(replace(thing, **other.only(fields)))
        twin = replace(scene, things=tuple(things))
        if twin != scene and not HELD_OUT & pairs(twin):
            return twin


# ---------------------------------------------------------------------------------------------
# Pictures


def coverage(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """The share of each pixel that a shape covers, 0 to 1. y, x, radius: pixels from its centre.

    d is the signed distance to the outline, negative inside. A pixel at distance d from a straight
    edge is covered by about 1/2 - d. This is the anti-aliasing.
    """
    if shape == "circle":
        d = np.hypot(x, y) - radius
    elif shape == "square":
        d = np.maximum(abs(x), abs(y)) - radius
    else:
        # A regular n-gon or n-star consists of 2n mirrored wedges. In each the outline is one
        # straight line from the tip (radius, angle 0) to the notch (inner * radius, angle pi / n).
        n, inner = (3, 0.5) if shape == "triangle" else (5, 0.42)
        r, angle = np.hypot(x, y), np.arctan2(x, -y)  # angle from the upward tip
        angle = abs((angle + np.pi / n) % (2 * np.pi / n) - np.pi / n)  # folded into one wedge
        ny, nx = inner * np.sin(np.pi / n), inner * np.cos(np.pi / n) - 1  # notch minus tip
        length = np.hypot(ny, nx)
        d = ((r * np.cos(angle) - radius) * ny - r * np.sin(angle) * nx) / length
    return np.clip(0.5 - d, 0, 1)


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """scene -> picture (N, N, 3) uint8, where N is `side`."""
    picture = np.full((side, side, 3), BACKGROUNDS[scene.background], np.float32)  # (N, N, 3)
    y, x = np.indices((side, side), np.float32) + 0.5  # (N, N), (N, N): the middles of the pixels
    for thing in scene.things:
        radius = SIZES[thing.size] * SHAPES[thing.shape]  # this, cy and cx in picture widths
        # The middle of a triangle's height lies a quarter of its radius above its centre.
        drop = radius / 4 if thing.shape == "triangle" else 0.0
        cy = (2 * thing.place[0] + 1) / 6 + thing.dy + drop
        cx = (2 * thing.place[1] + 1) / 6 + thing.dx
        alpha = coverage(thing.shape, y - cy * side, x - cx * side, radius * side)  # (N, N)
        picture += alpha[..., None] * (np.array(COLOURS[thing.colour], np.float32) - picture)
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


def render_pixels(scenes: Sequence[Scene]) -> np.ndarray:
    """B scenes -> pixels (B, 3, N, N) fp32, as ChameleonImageProcessor computes them.

    White is 255 * 0.0078 - 1 = 0.989.
    """
    pictures = np.stack([render(scene) for scene in scenes])  # (B, N, N, 3)
    pixels = (pictures * 0.0078).astype(np.float32) - 1
    # Contiguous, since on a permuted view every convolution would run in channels_last: slower.
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, 3, N, N)


# ---------------------------------------------------------------------------------------------
# The reader finds what a picture shows by rules, without any learning.


def read_scene(picture: np.ndarray | Image.Image) -> Scene:
    """A square picture (N, N, 3) -> the Scene it shows, without offsets.

    Analysis by synthesis: for each of the nine places, the reader takes the colour that explains
    the pixels best, then the shape and size whose rendering comes nearest. It calls the shape
    "blob" where no rendering comes near, so that a smeared drawing does not count as a circle.
    """
    picture = np.asarray(picture, np.float32)  # (N, N, 3)
    middle = np.median(picture, axis=(0, 1))  # (3,), as things cover less than half
    background = min(BACKGROUNDS, key=lambda name: np.abs(middle - BACKGROUNDS[name]).sum())
    level = BACKGROUNDS[background]
    things = (read_place(picture - level, place, level) for place in PLACES)
    return Scene(background, tuple(filter(None, things)))


def read_place(difference: np.ndarray, place: tuple[int, int], background: float) -> Thing | None:
    """The thing at one place, None if there is none. difference (N, N, 3): picture - background."""
    side = len(difference)
    rows, columns = (slice(round(side * i / 3), round(side * (i + 1) / 3)) for i in place)
    window = difference[rows, columns]  # (h, w, 3)

    fits = {}  # colour -> the squared error, and the coverage (h, w)
    for colour, rgb in COLOURS.items():
        direction = np.array(rgb, np.float32) - background  # (3,), pixel = coverage * direction
        alpha = np.clip(window @ direction / (direction @ direction), 0, 1)  # (h, w)
        fits[colour] = np.square(window - alpha[..., None] * direction).sum(), alpha
    colour = min(fits, key=lambda name: fits[name][0])
    alpha = fits[colour][1]  # (h, w)
    if alpha.sum() < 0.5 * (SIZES["small"] * side) ** 2:  # a small star has 3.5 times as much
        return None
    y, x = np.indices(alpha.shape) + 0.5  # (h, w), (h, w)
    cy, cx = (alpha * y).sum() / alpha.sum(), (alpha * x).sum() / alpha.sum()
    errors = {}  # (shape, size) -> squared error per covered pixel
    for shape, size in product(SHAPES, SIZES):
        template = coverage(shape, y - cy, x - cx, SIZES[size] * SHAPES[shape] * side)  # (h, w)
        errors[shape, size] = np.square(alpha - template).sum() / template.sum()
    shape, size = best = min(errors, key=errors.get)
    return Thing(colour, shape if errors[best] < BLOB else "blob", size, place)
