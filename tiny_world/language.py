"""The English of the toy world: captions, questions with their answers, requests to draw.

    rng, Scene -> ask_*       -> question, answer     (None if the scene has no such question)
    rng, Scene -> state       -> a true statement, for pretraining
    rng, Scene -> ask_drawing -> Request              words, and what a drawing must show for them

Who needs it: whoever changes what the toy world talks about. Most questions have several wordings.
Every answer follows from the scenes alone.
"""

from dataclasses import dataclass
from functools import partial
from itertools import permutations

from numpy.random import Generator

from tiny_world.world import COLOURS, HELD_OUT, PLACES, SHAPES, Scene, Thing, changed, pick

Turn = tuple[str, str]  # question, answer

# What can be counted, looked for or said to be absent: a colour, a shape, or both. HELD_OUT pairs
# are left out: from "there is no purple star" the model would learn that there is none.
DESCRIPTIONS = [{"colour": colour} for colour in COLOURS] + [{"shape": shape} for shape in SHAPES]
DESCRIPTIONS += [{"colour": colour, "shape": shape} for colour in COLOURS for shape in SHAPES
                 if (colour, shape) not in HELD_OUT]  # fmt: skip
NUMBERS = ("None", "One", "Two", "Three")
WORDINGS = {
    "caption": (
        "What do you see in this image?", "What do you see?", "What is in this picture?",
        "Describe this image.", "Describe the picture.", "What does this image show?",
        "What can you see in this picture?", "Caption this image.", "What is this?",
        "Can you describe this image?", "Tell me what you see.", "What is shown here?"),
    "colour": (
        "What colour is the {}?", "Which colour is the {}?", "What is the colour of the {}?"),
    "shape": ("What shape is the {}?", "Which shape does the {} have?", "What is the {}?"),
    "size": (
        "Is the {} small or large?", "Is the {} large or small?", "What size is the {}?",
        "How large is the {}?"),
    "place": ("Where is the {}?", "Where do you see the {}?"),
    "background": (
        "What colour is the background?", "Which colour does the background have?",
        "What is the background?", "What is the colour of the background?"),
    "count": ("How many {} are there?", "How many {} do you see?", "Count the {}."),
    "existence": (
        "Is there {}?", "Do you see {}?", "Is there {} in the picture?", "Can you see {}?"),
    "both": (
        "What do these images show?", "What do you see in these pictures?",
        "Describe both images.", "What is in each picture?"),
    "common": (
        "What do these images have in common?", "What do these pictures have in common?",
        "What is the same in both images?"),
    "which": ("Which image has {}?", "Which picture shows {}?", "Which of the two has {}?"),
    "difference": (
        "What is different?", "What changed?", "What is the difference between these images?",
        "What is different in the second image?"),
}  # fmt: skip
EDIT_PROMPTS = {
    "colour": ("Draw this in {}.", "Make it {}.", "Change the colour to {}."),
    "shape": ("Draw this as a {}.", "Make it a {}.", "Turn this into a {}."),
    "size": ("Make it {}.", "Draw this {}."),
    "place": ("Draw this {}.", "Put it {}."),
    "background": ("Draw this on a {} background.", "Put it on a {} background."),
}
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


def vary(rng: Generator, text: str) -> str:
    """A text as people type it: British or American spelling, lower case, no last mark."""
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


def listed(words: list[str], last: str = "and") -> str:
    """["a", "b", "c"] -> "a, b and c". `last` stands between the last two."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def relation(first: Thing, second: Thing) -> str:
    """Where a thing is, seen from a later one in reading order: above, or left in the same row."""
    return "above" if first.place[0] < second.place[0] else "to the left of"


def caption(scene: Scene) -> str:
    """The one caption: "A small red circle above a large blue square on a white background." """
    names = [article(str(thing)) for thing in scene.things]
    between = relation(*scene.things) if len(names) == 2 else "and"
    return sentence(f"{listed(names, between)} on a {scene.background} background")


def how_many(scene: Scene, named: dict) -> int:
    """The number of things with these values of colour, shape, size or place."""
    return sum(thing.only(named) == named for thing in scene.things)


def phrase(rng: Generator, size: str = "", colour: str = "", shape: str = "") -> str:
    """The named fields in order: "small red circle", "red shape" or "red object"."""
    return " ".join(filter(None, (size, colour, shape or pick(rng, ("shape", "object")))))


def refer(rng: Generator, scene: Scene, thing: Thing, hide: str = "") -> str | None:
    """Words that fit this thing alone and do not name its field `hide`; None if there are none."""
    ways = (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour"),
            ())  # (): "object" fits alone if there is one thing
    fitting = [thing.only(fields) for fields in ways
               if hide not in fields and how_many(scene, thing.only(fields)) == 1]
    return phrase(rng, **pick(rng, fitting)) if fitting else None


# ---------------------------------------------------------------------------------------------
# Questions about one picture: (rng, scene) -> (question, answer), or None if the scene has no
# such question. Where an answer could be guessed, it is chosen before the question.
#
# Where a thing has to be found or compared, the answer describes the scene before it concludes. A
# model of this size does not learn a bare "Yes." or "No.". It can look up what it has written, and
# it learns to do so from text alone (Corpus.practice). If the question names a thing, the sentence
# after the description repeats these words: "Where is the star?" - "A small red star at the top.
# The star is at the top." The model copies them, and they lead to the thing in the description.


def look(scene: Scene) -> str:
    """All things with their places: "A small red circle at the top and a ... on the left." """
    return sentence(listed([f"{article(str(t))} {PLACES[t.place]}" for t in scene.things]))


def found(thing: Thing) -> str:
    """A thing once more, with its place: "I see the large blue square on the left." """
    return f"I see the {thing} {PLACES[thing.place]}."


def look_at_both(first: Scene, second: Scene) -> str:
    """What two pictures of one thing each show."""
    shown = (f"{article(str(s.things[0]))} {PLACES[s.things[0].place]} on {s.background}"
             for s in (first, second))  # fmt: skip
    return "The first shows {}, the second {}.".format(*shown)


def ask_caption(rng: Generator, scene: Scene) -> Turn:
    return pick(rng, WORDINGS["caption"]), caption(scene)


def ask_field(rng: Generator, scene: Scene, field: str) -> Turn | None:
    """Colour, shape, size or place of a thing that the question names by its other fields."""
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide=field)
    words = {"shape": article(thing.shape), "place": PLACES[thing.place]}
    answer = f"{look(scene)} The {name} is {words.get(field, getattr(thing, field))}."
    return name and (pick(rng, WORDINGS[field]).format(name), answer)


def ask_thing(rng: Generator, scene: Scene) -> Turn:
    """What is at a place, which is empty in about a third of the questions."""
    place = pick(rng, scene.things).place if rng.random() < 0.6 else pick(rng, PLACES)
    there = [thing for thing in scene.things if thing.place == place]
    answer = found(there[0]) if there else f"I see nothing {PLACES[place]}."
    return f"What is {PLACES[place]}?", f"{look(scene)} {answer}"


def ask_background(rng: Generator, scene: Scene) -> Turn:
    return pick(rng, WORDINGS["background"]), sentence(scene.background)


def ask_count(rng: Generator, scene: Scene) -> Turn:
    groups = {}  # number -> the descriptions that fit so many things
    for named in DESCRIPTIONS + [{}] * 3:  # {}: "How many shapes are there?"
        groups.setdefault(how_many(scene, named), []).append(named)
    number = pick(rng, groups)
    words = phrase(rng, **pick(rng, groups[number])) + "s"
    return pick(rng, WORDINGS["count"]).format(words), f"{look(scene)} {NUMBERS[number]}."


def ask_existence(rng: Generator, scene: Scene) -> Turn:
    """Half of the answers are yes. A "no" keeps a field of a real thing where it can."""
    fields = pick(rng, (("colour",), ("shape",), ("colour", "shape"), ("colour", "shape")))
    named, wanted = pick(rng, scene.things).only(fields), rng.random() < 0.5
    while not wanted and (named not in DESCRIPTIONS or how_many(scene, named)):
        field = pick(rng, fields)
        named[field] = pick(rng, COLOURS if field == "colour" else SHAPES)
    question = pick(rng, WORDINGS["existence"]).format(article(phrase(rng, **named)))
    return question, f"{look(scene)} {'Yes' if wanted else 'No'}."


def relate(rng: Generator, scene: Scene) -> tuple[tuple, tuple, tuple] | None:
    """Two things, their names, and two words: where the first is seen from the second, and the
    opposite. None without two things, or without names for them.
    """
    if len(scene.things) < 2:
        return None
    i, j = rng.choice(len(scene.things), 2, replace=False)
    axis = pick(rng, [n for n in (0, 1) if scene.things[i].place[n] != scene.things[j].place[n]])
    first, second = sorted((scene.things[i], scene.things[j]), key=lambda t: t.place[axis])
    words = ("to the left of", "to the right of") if axis else ("above", "below")
    if rng.random() < 0.5:
        first, second, words = second, first, words[::-1]
    names = refer(rng, scene, first), refer(rng, scene, second)
    return None if None in names else ((first, second), names, words)


def ask_relation(rng: Generator, scene: Scene) -> Turn | None:
    """Above, below, left or right: which of two, yes or no, or what is there."""
    related = relate(rng, scene)
    if not related:
        return None
    things, names, words = related
    places = [f"the {name} is {PLACES[t.place]}" for name, t in zip(names, things)]
    kind = pick(rng, ("which", "yes", "no", "what"))
    if kind == "what" and len(scene.things) == 2:
        question = f"What is {words[0]} the {names[1]}?"
        answer, places = article(f"{things[0].colour} {things[0].shape}"), places[1:]
    elif kind in ("which", "what"):
        either = " or ".join(words if rng.random() < 0.5 else words[::-1])
        question = f"Is the {names[0]} {either} the {names[1]}?"
        answer = words[0].removesuffix(" of")
    else:
        question = f"Is the {names[0]} {words[kind == 'no']} the {names[1]}?"
        # "To the left. No.": first the true relation, then whether the question names it.
        answer = f"{words[0].removesuffix(' of')}. {sentence(kind).removesuffix('.')}"
    return question, f"{look(scene)} {sentence(listed(places))} {sentence(answer)}"


QUESTIONS = {
    "caption": ask_caption, "colour": partial(ask_field, field="colour"),
    "shape": partial(ask_field, field="shape"), "count": ask_count,
    "background": ask_background, "existence": ask_existence, "relation": ask_relation,
    "size": partial(ask_field, field="size"), "place": partial(ask_field, field="place"),
    "thing": ask_thing,
}  # fmt: skip


def state(rng: Generator, scene: Scene) -> str:
    """A true statement about the scene, never the caption."""
    kind = pick(rng, ("thing", "thing", "place", "count", "background", "absence", "relation"))
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing, hide=pick(rng, ("colour", "shape", "size")))
    if kind == "count":
        number = ("is one shape", "are two shapes", "are three shapes")[len(scene.things) - 1]
        return sentence(f"there {number}")
    if kind == "background":
        return sentence(f"the background is {scene.background}")
    if kind == "absence":
        absent = [named for named in DESCRIPTIONS if not how_many(scene, named)]
        return sentence(f"there is no {phrase(rng, **pick(rng, absent))}")
    if kind == "relation" and (related := relate(rng, scene)):
        _, names, words = related
        return sentence(f"the {names[0]} is {words[0]} the {names[1]}")
    if kind == "place" or name is None:
        return sentence(f"{article(str(thing))} is {PLACES[thing.place]}")
    return sentence(f"the {name} is {article(str(thing))}")


# ---------------------------------------------------------------------------------------------
# Two pictures of one thing each, from `sample_pair` or `sample_edit`.


def ask_both(rng: Generator, first: Scene, second: Scene) -> Turn:
    """What both pictures show. All other answers about two pictures begin with this one."""
    return pick(rng, WORDINGS["both"]), look_at_both(first, second)


def ask_common(rng: Generator, first: Scene, second: Scene) -> Turn:
    a, b = first.things[0], second.things[0]
    words = [a.colour] * (a.colour == b.colour) + [a.shape + "s"] * (a.shape == b.shape)
    answer = f"Both are {' '.join(words)}." if words else "Nothing."
    return pick(rng, WORDINGS["common"]), f"{look_at_both(first, second)} {answer}"


def ask_which(rng: Generator, first: Scene, second: Scene, field: str = "") -> Turn | None:
    """A colour, a shape or a background that only one of the two pictures has.

    `field` names which of these is asked about, by default a random one.
    """
    chosen, other = (first, second) if rng.random() < 0.5 else (second, first)
    field = field or pick(rng, ("colour", "shape", "both", "background"))
    if field == "background":
        differs = chosen.background != other.background
        words = f"a {chosen.background} background"
    else:
        named = chosen.things[0].only(("colour", "shape") if field == "both" else (field,))
        differs = not how_many(other, named)
        words = article(phrase(rng, **named))
    answer = f"{look_at_both(first, second)} The {'first' if chosen is first else 'second'}."
    return (pick(rng, WORDINGS["which"]).format(words), answer) if differs else None


def ask_difference(rng: Generator, first: Scene, second: Scene) -> Turn:
    answer = f"{look_at_both(first, second)} The {changed(first, second)}."
    return pick(rng, WORDINGS["difference"]), answer


def ask_edit(rng: Generator, before: Scene, after: Scene) -> str:
    """The request that turns `before` into `after`, for example "Draw this in blue." """
    (thing,), change = after.things, changed(before, after)
    words = vars(thing) | {"place": PLACES[thing.place], "background": after.background}
    return pick(rng, EDIT_PROMPTS[change]).format(words[change])


# ---------------------------------------------------------------------------------------------
# Drawing


@dataclass(frozen=True)
class Request:
    """What a drawing must show. Fields that are empty or not named are free."""

    text: str  # "a small red circle above a blue square on a white background"
    things: tuple[dict, ...]  # the named fields of each thing
    background: str = ""
    relation: str = ""  # between the two things


def ask_drawing(rng: Generator, scene: Scene) -> Request:
    """A request that the scene fulfils. It always names colour and shape, sometimes the rest."""
    named, words = [], []
    for thing in scene.things:
        named.append(thing.only(["colour", "shape"] + ["size"] * (rng.random() < 0.5)))
        words.append(article(phrase(rng, **named[-1])))
        if len(scene.things) == 1 and rng.random() < 0.3:
            named[-1]["place"] = thing.place
            words[-1] += " " + PLACES[thing.place]
    between = relation(*scene.things) if len(words) == 2 and rng.random() < 0.7 else ""
    background = scene.background if rng.random() < 0.5 else ""
    text = listed(words, between or "and")
    if background:
        text += f" on a {background} background"
    return Request(text, tuple(named), background, between)


def fulfils(scene: Scene, request: Request) -> bool:
    """Does a scene show the requested things and no more, with all that the request names?"""
    if len(scene.things) != len(request.things):
        return False
    if request.background not in ("", scene.background):
        return False
    for things in permutations(scene.things):
        named = all(t.only(wanted) == wanted for t, wanted in zip(things, request.things))
        in_order = things[0].place < things[-1].place  # as `relation` needs them
        if named and (not request.relation or in_order and request.relation == relation(*things)):
            return True
    return False
