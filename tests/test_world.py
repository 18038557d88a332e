"""The toy world: pictures, their reader, and the truth of every sentence about them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import world
from training.world import COLOURS, HELD_OUT, QUESTIONS, Scene, Thing


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenes(n: int, seed: int = 0, **options) -> list[Scene]:
    generator = rng(seed)
    return [world.sample_scene(generator, **options) for _ in range(n)]


RED, BLUE = Thing("red", "circle", "small", (0, 1)), Thing("blue", "square", "large", (2, 1))
TWO = Scene("white", (RED, BLUE))


@pytest.mark.parametrize("side", [48, 64, 100])
def test_the_reader_is_right_on_what_was_rendered(side):
    things = wrong = 0
    for scene in scenes(150, seed=side) + scenes(50, seed=side, held_out=True):
        seen = world.read_scene(world.render(scene, side))
        assert seen.background == scene.background
        key = lambda t: (t.colour, t.shape, t.size, t.place)  # noqa: E731
        wrong += sum(a != b for a, b in zip(map(key, scene.things), map(key, seen.things)))
        wrong += abs(len(scene.things) - len(seen.things))
        things += len(scene.things)
    assert wrong <= 0.005 * things


def test_the_reader_calls_a_smear_a_blob():
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[2:14, 2:5] = picture[2:5, 2:14] = COLOURS["red"]  # a corner, no shape of this world
    (thing,) = world.read_scene(picture).things
    assert thing.shape == "blob" and thing.colour == "red"


def test_one_seed_is_one_data_set():
    assert scenes(20, seed=3) == scenes(20, seed=3) != scenes(20, seed=4)


def test_held_out_compositions_appear_only_when_asked_for():
    def pairs(some):
        return {(t.colour, t.shape) for scene in some for t in scene.things}

    assert not pairs(scenes(2000)) & HELD_OUT
    assert all(pairs([scene]) & HELD_OUT for scene in scenes(100, held_out=True))
    generator = rng()
    for _ in range(500):
        a, b, _ = world.sample_pair(generator)
        c, d, _ = world.sample_edit(generator)
        assert not pairs([a, b, c, d]) & HELD_OUT


def test_a_wide_picture_shows_the_scene_in_its_centred_square():
    square, wide = world.render(TWO, 48), world.render(TWO, 48, 80)
    assert wide.shape == (48, 80, 3)
    assert np.array_equal(wide[:, 16:64], square)
    assert (wide[:, :16] == 255).all() and (wide[:, 64:] == 255).all()


def test_pixels_are_those_of_the_image_processor():
    from image_processor import ChameleonImageProcessor

    some = scenes(3)
    pictures = [Image.fromarray(world.render(scene)) for scene in some]
    processor = ChameleonImageProcessor(size=world.SIDE, crop_size=world.SIDE)
    wanted = processor(pictures, return_tensors="np")["pixel_values"]
    assert np.array_equal(world.render_pixels(some), wanted)


def test_captions_by_hand():
    assert world.caption(TWO) == (
        "A small red circle above a large blue square on a white background."
    )
    row = Scene("gray", tuple(Thing("orange", "star", "small", (1, n)) for n in range(2)))
    assert world.caption(row) == (
        "A small orange star to the left of a small orange star on a gray background."
    )


def test_every_answer_is_true():
    """Answers are checked against the scene by other means than those that made them."""
    generator = rng(5)
    for scene in scenes(400, seed=5):
        for kind in ("colour", "shape", "size"):
            turn = QUESTIONS[kind](generator, scene)
            if turn:
                word = turn[1].rstrip(".").lower().removeprefix("a ")
                assert word in {getattr(thing, kind) for thing in scene.things}
        question, answer = world.ask_count(generator, scene)
        words = question.rstrip("?.").split()
        fitting = [
            t for t in scene.things
            if (t.colour in words or not set(COLOURS) & set(words))
            and (t.shape + "s" in words or "shapes" in words or "objects" in words)
        ]  # fmt: skip
        assert answer == world.NUMBERS[len(fitting)] + "."
        question, answer = world.ask_existence(generator, scene)
        words = question.rstrip("?").split()
        fitting = [
            t for t in scene.things
            if (t.colour in words or not set(COLOURS) & set(words))
            and (t.shape in words or "shape" in words or "object" in words)
        ]  # fmt: skip
        where = " and ".join(world.PLACES[t.place] for t in fitting)
        assert answer == (f"Yes, {where}." if fitting else "No.")


def test_relations_follow_the_places():
    generator, seen = rng(6), set()
    for _ in range(300):
        turn = world.ask_relation(generator, TWO)
        if turn:
            seen.add(turn)
    assert ("Is the red circle above the blue square?", "Yes.") in seen
    assert ("Is the red circle below the blue square?", "No.") in seen
    assert all("left" not in question for question, _ in seen)  # both are in the middle column
    assert {answer for question, answer in seen if question.startswith("What is above")} == {
        "A red circle."
    }


def test_yes_and_no_are_equally_frequent():
    generator = rng(7)
    answers = [world.ask_existence(generator, scene)[1] for scene in scenes(1000, seed=7)]
    assert 0.45 < answers.count("No.") / len(answers) < 0.55


def test_a_scene_fulfils_its_own_drawing_request_and_a_changed_one_does_not():
    generator = rng(8)
    for scene in scenes(300, seed=8):
        request = world.ask_drawing(generator, scene)
        assert world.fulfils(scene, request)
        fewer = Scene(scene.background, scene.things[1:])
        assert not world.fulfils(fewer, request)
        gone = {"colour": "no colour at all"}
        other = (Thing(**(vars(scene.things[0]) | gone)),) + scene.things[1:]
        assert not world.fulfils(Scene(scene.background, other), request)


def test_a_request_with_a_relation_is_not_fulfilled_upside_down():
    request = world.Request("", ({"colour": "red"}, {"colour": "blue"}), relation="above")
    below = Scene("white", (
        Thing("blue", "square", "large", (0, 1)), Thing("red", "circle", "small", (2, 1)),
    ))  # fmt: skip
    assert world.fulfils(TWO, request) and not world.fulfils(below, request)


def words_of(scene: Scene) -> set[str]:
    return {scene.background} | {w for t in scene.things for w in (t.colour, t.shape)}


def test_pairs_share_what_they_say():
    generator = rng(9)
    for _ in range(300):
        first, second, shared = world.sample_pair(generator)
        a, b = first.things[0], second.things[0]
        assert (a.colour == b.colour) == (shared in ("colour", "both"))
        assert (a.shape == b.shape) == (shared in ("shape", "both"))
        answer = world.ask_common(generator, first, second)[1]
        assert (answer == "Nothing.") == (shared == "nothing")
        turn = world.ask_which(generator, first, second)
        if turn:
            names = set(COLOURS) | set(world.SHAPES) | set(world.BACKGROUNDS)
            asked = set(turn[0].rstrip("?").split()) & names
            first_fits, second_fits = (asked <= words_of(scene) for scene in (first, second))
            assert first_fits != second_fits
            assert turn[1] == ("The first." if first_fits else "The second.")


def test_edits_change_one_thing():
    generator = rng(10)
    for _ in range(300):
        before, after, change = world.sample_edit(generator)
        fields = [f for f in ("colour", "shape", "size", "place")
                  if getattr(before.things[0], f) != getattr(after.things[0], f)]  # fmt: skip
        fields += ["background"] * (before.background != after.background)
        assert fields == [change]


def test_the_committed_examples_are_what_the_world_renders(tmp_path):
    committed = Path(world.__file__).parent.parent / "examples"
    world.write_examples(tmp_path)
    assert len(list(tmp_path.glob("*.png"))) >= 4
    for file in tmp_path.glob("*.png"):
        assert np.array_equal(Image.open(file), Image.open(committed / file.name))


def test_no_training_sentence_names_a_held_out_pair():
    """Not even to deny it."""
    pairs = [f"{colour} {shape}" for colour, shape in world.HELD_OUT]
    generator = rng(12)
    for scene in scenes(2000, seed=12):
        said = [world.state(generator, scene), *world.ask_existence(generator, scene)]
        said += [*world.ask_count(generator, scene), world.caption(scene)]
        assert not [pair for pair in pairs for words in said if pair in words]
