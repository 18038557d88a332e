"""A toy world of coloured shapes: pictures, a small English about them, and a reader of pictures.

    rng -> sample_scene -> Scene -+-> render ------------> picture (H, W, 3) uint8
                                  +-> caption, ask_* ----> question, answer
           picture -> read_scene -> Scene                  the judge of reconstructions and drawings

Everything random comes from the one numpy Generator that is passed in, so a seed is a data set.

    Thing    one coloured shape: colour, shape, size, place (and a little jitter)
    Scene    a plain background with one to three things, listed in reading order
    Request  a drawing asked for in words: what the drawing must show, the rest is free

A few (colour, shape) pairs never occur in training, HELD_OUT: a model that names or draws them
has learned the colour and the shape, not the picture.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
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
SIDE = 48  # pixels: each place is 16 x 16, exactly 2 x 2 patches of a VQ-VAE that divides by 8
HELD_OUT = frozenset({("purple", "star"), ("green", "triangle")})
JITTER = 1 / 192  # how far a thing strays from its place, in picture widths
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


def sample_thing(rng: np.random.Generator, place: tuple[int, int], held_out: bool = False) -> Thing:
    """One thing at `place`; its (colour, shape) is in HELD_OUT exactly when `held_out`."""
    while True:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if ((colour, shape) in HELD_OUT) == held_out:
            break
    dy, dx = rng.uniform(-JITTER, JITTER, 2)
    return Thing(colour, shape, str(rng.choice(list(SIZES))), place, float(dy), float(dx))


def sample_scene(
    rng: np.random.Generator, count: int | None = None, held_out: bool = False
) -> Scene:
    """A random scene of `count` things (one to three), no two alike in both colour and shape.

    held_out: the first thing drawn is a HELD_OUT composition (the others are ordinary).
    """
    count = count or int(rng.choice((1, 2, 3), p=(0.35, 0.4, 0.25)))
    places = sorted(PLACES)
    things = []
    for place in rng.permutation(len(places))[:count]:
        while True:
            thing = sample_thing(rng, places[place], held_out and not things)
            if all((t.colour, t.shape) != (thing.colour, thing.shape) for t in things):
                break
        things.append(thing)
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(background, tuple(sorted(things, key=lambda t: t.place)))


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
        # line, from the tip (r, angle 0) to the notch (inner, angle pi / n).
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
    # A triangle's middle lies below its centre of rotation by an eighth of its height.
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
# Language: every sentence is a list of wordings, one of which is picked


# What can be counted, looked for or said to be absent: a colour, a shape, or both. No pair of
# HELD_OUT: hundreds of "there is no purple star" would teach that there never is one.
DESCRIPTIONS = [{"colour": colour} for colour in COLOURS] + [{"shape": shape} for shape in SHAPES]
DESCRIPTIONS += [{"colour": colour, "shape": shape} for colour in COLOURS for shape in SHAPES
                 if (colour, shape) not in HELD_OUT]  # fmt: skip
NUMBERS = ("None", "One", "Two", "Three")
CAPTION_PROMPTS = (
    "What do you see in this image?", "What do you see?", "What is in this picture?",
    "Describe this image.", "Describe the picture.", "What does this image show?",
    "What can you see in this picture?", "Caption this image.", "What is this?",
    "Can you describe this image?", "Tell me what you see.", "What is shown here?",
)  # fmt: skip
DRAW_PROMPTS = (
    "Draw {}.", "Draw me {}.", "Generate an image of {}.", "Show me {}.", "Paint {}.",
    "Make a picture of {}.", "Create an image of {}.", "Can you draw {}?", "Please draw {}.",
)  # fmt: skip
SMALL_TALK = {
    "Hello!": "Hello! Show me a picture of coloured shapes, or ask me to draw one.",
    "Hi, who are you?": "A tiny Chameleon. I know coloured shapes.",
    "What can you do?": "I describe, compare and draw coloured shapes.",
    "Which colours do you know?": "Red, green, blue, yellow, purple and orange.",
    "Which shapes do you know?": "The circle, the square, the triangle and the star.",
    "Which backgrounds do you know?": "White, black and gray.",
    "Thank you!": "You are welcome.",
}


THEN_SAY = (", then say what it is.", " and describe it.", ", then describe it.")


def pick(rng: np.random.Generator, options):
    """One of the options (a sequence or a dict's keys), each as likely."""
    options = options if isinstance(options, Sequence) else list(options)
    return options[int(rng.integers(len(options)))]


def vary(rng: np.random.Generator, text: str) -> str:
    """The small carelessness of people who type: case, final stop, spelling, politeness."""
    if rng.random() < 0.4:
        text = text.replace("olour", "olor")
    if rng.random() < 0.3:
        text = text.replace("gray", "grey")
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    return text


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def relation(first: Thing, second: Thing) -> str:
    """How a thing stands to a later one in reading order: above it, or in its row left of it."""
    return "above" if first.place[0] < second.place[0] else "to the left of"


def caption(scene: Scene) -> str:
    """The one caption: "A small red circle above a large blue square on a white background." """
    names = [article(str(thing)) for thing in scene.things]
    if len(names) == 2:
        names = [f"{names[0]} {relation(*scene.things)} {names[1]}"]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return sentence(f"{listed} on a {scene.background} background")


def matches(thing: Thing, **named: str) -> bool:
    return all(getattr(thing, field) == value for field, value in named.items())


def phrase(rng: np.random.Generator, size: str = "", colour: str = "", shape: str = "") -> str:
    return " ".join(filter(None, (size, colour, shape or pick(rng, ("shape", "object")))))


def refer(rng: np.random.Generator, scene: Scene, thing: Thing, hide: str = "") -> str | None:
    """Words that fit this thing alone and do not name its `hide`; None if there are none."""
    ways = [("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour")]
    if len(scene.things) == 1:
        ways.append(())
    fitting = []
    for fields in ways:
        named = {field: getattr(thing, field) for field in fields}
        if hide not in fields and sum(matches(t, **named) for t in scene.things) == 1:
            fitting.append(named)
    return phrase(rng, **pick(rng, fitting)) if fitting else None


# Questions about one picture: (rng, scene) -> (question, answer), or None if the scene has no
# such question. Where an answer could be guessed, the answer is drawn first.


def ask_caption(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return pick(rng, CAPTION_PROMPTS), caption(scene)


def ask_colour(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide="colour")
    wordings = "What colour is the {}?", "Which colour is the {}?", "What is the colour of the {}?"
    return name and (pick(rng, wordings).format(name), sentence(thing.colour))


def ask_shape(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide="shape")
    wordings = "What shape is the {}?", "Which shape does the {} have?", "What is the {}?"
    return name and (pick(rng, wordings).format(name), sentence(article(thing.shape)))


def ask_size(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide="size")
    wordings = (
        "Is the {} small or large?", "Is the {} large or small?", "What size is the {}?",
        "How large is the {}?",
    )  # fmt: skip
    return name and (pick(rng, wordings).format(name), sentence(thing.size))


def ask_place(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    if rng.random() < 0.3:  # the other way round: what is at this place?
        place = pick(rng, scene.things).place if rng.random() < 0.6 else pick(rng, PLACES)
        there = [str(thing) for thing in scene.things if thing.place == place]
        return f"What is {PLACES[place]}?", sentence(article(there[0])) if there else "Nothing."
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing)
    wordings = "Where is the {}?", "Where do you see the {}?"
    return name and (pick(rng, wordings).format(name), sentence(PLACES[thing.place]))


def ask_background(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    wordings = (
        "What colour is the background?", "Which colour does the background have?",
        "What is the background?", "What is the colour of the background?",
    )  # fmt: skip
    return pick(rng, wordings), sentence(scene.background)


def ask_count(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    groups = {}  # number -> the descriptions that so many things fit
    for named in DESCRIPTIONS:
        number = sum(matches(thing, **named) for thing in scene.things)
        groups.setdefault(number, []).append(named)
    groups.setdefault(len(scene.things), []).extend([{}] * 3)  # "How many shapes are there?"
    number = pick(rng, groups)
    words = phrase(rng, **pick(rng, groups[number])) + "s"
    wordings = "How many {} are there?", "How many {} do you see?", "Count the {}."
    return pick(rng, wordings).format(words), NUMBERS[number] + "."


def ask_existence(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Half of the answers are yes, and say where; a no shares a colour or a shape with the scene
    when it can."""
    fields = pick(rng, (("colour",), ("shape",), ("colour", "shape"), ("colour", "shape")))
    thing, wanted = pick(rng, scene.things), bool(rng.random() < 0.5)
    named = {field: getattr(thing, field) for field in fields}
    while not wanted and (named not in DESCRIPTIONS
                          or any(matches(t, **named) for t in scene.things)):
        field = pick(rng, fields)
        named[field] = pick(rng, COLOURS if field == "colour" else SHAPES)
    wordings = "Is there {}?", "Do you see {}?", "Is there {} in the picture?", "Can you see {}?"
    question = pick(rng, wordings).format(article(phrase(rng, **named)))
    where = [PLACES[t.place] for t in scene.things if matches(t, **named)]
    return question, f"Yes, {' and '.join(where)}." if where else "No."


def relate(rng: np.random.Generator, scene: Scene) -> tuple[Thing, Thing, tuple[str, str]]:
    """Two things and (how the first stands to the second, the opposite)."""
    i, j = rng.choice(len(scene.things), 2, replace=False)
    axes = [n for n in (0, 1) if scene.things[i].place[n] != scene.things[j].place[n]]
    axis = pick(rng, axes)
    first, second = sorted((scene.things[i], scene.things[j]), key=lambda t: t.place[axis])
    words = ("to the left of", "to the right of") if axis else ("above", "below")
    if rng.random() < 0.5:  # the same seen from the other thing
        first, second, words = second, first, words[::-1]
    return first, second, words


def ask_relation(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Above, below, left, right: which of two, yes or no, and what stands there."""
    if len(scene.things) < 2:
        return None
    first, second, words = relate(rng, scene)
    names = refer(rng, scene, first), refer(rng, scene, second)
    if None in names:
        return None
    kind = pick(rng, ("which", "yes", "no", "what"))
    if kind == "what" and len(scene.things) == 2:
        answer = article(f"{first.colour} {first.shape}")
        return f"What is {words[0]} the {names[1]}?", sentence(answer)
    if kind in ("which", "what"):
        either = " or ".join(words if rng.random() < 0.5 else words[::-1])
        return f"Is the {names[0]} {either} the {names[1]}?", sentence(words[0].removesuffix(" of"))
    return f"Is the {names[0]} {words[kind == 'no']} the {names[1]}?", sentence(kind)


QUESTIONS = {
    "caption": ask_caption, "colour": ask_colour, "shape": ask_shape, "count": ask_count,
    "background": ask_background, "existence": ask_existence, "relation": ask_relation,
    "size": ask_size, "place": ask_place,
}  # fmt: skip


def state(rng: np.random.Generator, scene: Scene) -> str:
    """A true statement about the scene, never the caption: what pretraining reads off a picture."""
    kind = pick(rng, ("thing", "thing", "place", "count", "background", "absence", "relation"))
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide=pick(rng, ("colour", "shape", "size")))
    if kind == "count":
        number = ("one shape", "two shapes", "three shapes")[len(scene.things) - 1]
        return sentence(f"there {'is' if len(scene.things) == 1 else 'are'} {number}")
    if kind == "background":
        return sentence(f"the background is {scene.background}")
    if kind == "absence":
        absent = [n for n in DESCRIPTIONS if not any(matches(t, **n) for t in scene.things)]
        return sentence(f"there is no {phrase(rng, **pick(rng, absent))}")
    if kind == "relation" and len(scene.things) > 1:
        first, second, words = relate(rng, scene)
        names = refer(rng, scene, first), refer(rng, scene, second)
        if None not in names:
            return sentence(f"the {names[0]} is {words[0]} the {names[1]}")
    if kind == "place" or name is None:
        return sentence(f"{article(str(thing))} is {PLACES[thing.place]}")
    return sentence(f"the {name} is {article(str(thing))}")


# Two pictures. A pair is made for its question, so each function also makes the scenes.


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


def ask_both(rng: np.random.Generator, first: Scene, second: Scene) -> tuple[str, str]:
    """What each of two pictures of one thing shows: all that the other questions compare."""
    wordings = (
        "What do these images show?", "What do you see in these pictures?",
        "Describe both images.", "What is in each picture?",
    )  # fmt: skip
    shown = (f"{article(str(s.things[0]))} {PLACES[s.things[0].place]} on {s.background}"
             for s in (first, second))  # fmt: skip
    return pick(rng, wordings), "The first shows {}, the second {}.".format(*shown)


def ask_common(rng: np.random.Generator, first: Scene, second: Scene) -> tuple[str, str]:
    """For two pictures of one thing each."""
    a, b = first.things[0], second.things[0]
    wordings = (
        "What do these images have in common?", "What do these pictures have in common?",
        "What is the same in both images?",
    )  # fmt: skip
    words = [a.colour] * (a.colour == b.colour) + [a.shape + "s"] * (a.shape == b.shape)
    return pick(rng, wordings), f"Both are {' '.join(words)}." if words else "Nothing."


def ask_which(rng: np.random.Generator, first: Scene, second: Scene) -> tuple[str, str] | None:
    """A colour, a shape or a background that only one of the two pictures has."""
    chosen, other = (first, second) if rng.random() < 0.5 else (second, first)
    field = pick(rng, ("colour", "shape", "both", "background"))
    if field == "background":
        there = chosen.background != other.background
        words = f"a {chosen.background} background"
    else:
        fields = ("colour", "shape") if field == "both" else (field,)
        thing = pick(rng, chosen.things)
        named = {name: getattr(thing, name) for name in fields}
        there = not any(matches(t, **named) for t in other.things)
        words = article(phrase(rng, **named))
    wordings = "Which image has {}?", "Which picture shows {}?", "Which of the two has {}?"
    answer = "The first." if chosen is first else "The second."
    return (pick(rng, wordings).format(words), answer) if there else None


def sample_edit(rng: np.random.Generator, held_out: bool = False) -> tuple[Scene, Scene, str]:
    """A picture of one thing, the same with one thing changed, and the name of the change."""
    before = sample_scene(rng, 1)
    field = pick(rng, ("colour", "shape", "size", "place", "background"))
    while True:
        other = sample_scene(rng, 1, held_out).things[0]
        after = replace(before, background=pick(rng, BACKGROUNDS))
        if field != "background":
            thing = replace(before.things[0], **{field: getattr(other, field)})
            after = replace(before, things=(thing,))
        pair = after.things[0].colour, after.things[0].shape
        if after != before and (held_out or pair not in HELD_OUT):
            return before, after, field


def ask_difference(rng: np.random.Generator, change: str) -> tuple[str, str]:
    wordings = (
        "What is different?", "What changed?", "What is the difference between these images?",
        "What is different in the second image?",
    )  # fmt: skip
    return pick(rng, wordings), f"The {change}."


def ask_edit(rng: np.random.Generator, after: Scene, change: str) -> str:
    """The request that turns the picture into `after`, for example "Draw this in blue." """
    thing = after.things[0]
    wordings = {
        "colour": ("Draw this in {}.", "Make it {}.", "Change the colour to {}."),
        "shape": ("Draw this as {}.", "Make it {}.", "Turn this into {}."),
        "size": ("Make it {}.", "Draw this {}."),
        "place": ("Draw this {}.", "Put it {}."),
        "background": ("Draw this on {} background.", "Put it on {} background."),
    }
    words = {
        "colour": thing.colour, "shape": article(thing.shape), "size": thing.size,
        "place": PLACES[thing.place], "background": article(after.background),
    }  # fmt: skip
    return pick(rng, wordings[change]).format(words[change])


# Drawing


@dataclass(frozen=True)
class Request:
    """What a drawing must show; an empty string or None is left to the painter."""

    text: str  # "a small red circle above a blue square on a white background"
    things: tuple[dict, ...]  # the named fields of each thing
    background: str = ""
    relation: str = ""  # between the two things


def ask_drawing(rng: np.random.Generator, scene: Scene) -> Request:
    """A request that the scene fulfils: colour and shape always, the rest sometimes."""
    named = []
    for thing in scene.things:
        fields = ["colour", "shape"] + ["size"] * bool(rng.random() < 0.5)
        fields += ["place"] * bool(len(scene.things) == 1 and rng.random() < 0.3)
        named.append({field: getattr(thing, field) for field in fields})
    words = []
    for n in named:
        place = " " + PLACES[n["place"]] if "place" in n else ""
        words.append(article(phrase(rng, **{k: v for k, v in n.items() if k != "place"})) + place)
    how = ""
    if len(words) == 2 and rng.random() < 0.7:
        how = relation(*scene.things)
        words = [f"{words[0]} {how} {words[1]}"]
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    background = scene.background if rng.random() < 0.5 else ""
    text += f" on a {background} background" if background else ""
    return Request(text, tuple(named), background, how)


def fulfils(scene: Scene, request: Request) -> bool:
    """Does a picture (as read) show exactly the requested things, with all that was named?"""
    if len(scene.things) != len(request.things):
        return False
    if request.background not in ("", scene.background):
        return False
    for things in permutations(scene.things):
        named = all(matches(t, **wanted) for t, wanted in zip(things, request.things))
        if named and (not request.relation or request.relation == relation(*things)):
            return True
    return False


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
    if alpha.sum() < 0.5 * (SIZES["small"] * side) ** 2:  # the smallest shape covers about twice
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
