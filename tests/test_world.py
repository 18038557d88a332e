"""The toy world: pictures and their reader."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tiny_world import world
from tiny_world.world import COLOURS, HELD_OUT, Scene, Thing, pairs


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
        wanted = [replace(t, dy=0.0, dx=0.0) for t in scene.things]
        wrong += sum(a != b for a, b in zip(wanted, seen.things))
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
    assert not pairs(*scenes(2000)) & HELD_OUT
    assert all(pairs(scene) & HELD_OUT for scene in scenes(100, held_out=True))
    assert pairs(*scenes(500, held_out=None)) > HELD_OUT  # what the VQ-VAE learns from: all
    generator = rng()
    for _ in range(500):
        a, b = world.sample_pair(generator)
        c, d = world.sample_edit(generator)
        assert not pairs(a, b, c, d) & HELD_OUT
        a, _ = world.sample_pair(generator, held_out=True)
        c, _ = world.sample_edit(generator, held_out=True)
        assert pairs(a, c) <= HELD_OUT


def test_a_scene_holds_one_held_out_pair_and_nothing_twice():
    for scene in scenes(300, count=3, held_out=True) + scenes(300, seed=1, held_out=None):
        assert len(pairs(scene)) == len(scene.things)
    for count in (1, 2, 3):
        for scene in scenes(100, count=count, held_out=True):
            assert len(pairs(scene) & HELD_OUT) == 1


def test_scenes_pairs_and_edits_of_each_kind_are_as_frequent_as_they_should_be():
    generator, kinds = rng(2), []
    for scene in scenes(1000, seed=2):
        (thing, *_) = scene.things
        kinds += [len(scene.things), ("up", thing.dy < 0), ("left", thing.dx < 0)]
        first, second = world.sample_pair(generator)
        a, b = first.things[0], second.things[0]
        kinds += [("shared", a.colour == b.colour, a.shape == b.shape)]
        kinds += [world.changed(*world.sample_edit(generator))]
        assert max(abs(thing.dy), abs(thing.dx)) <= world.JITTER
    wanted = {1: 0.35, 2: 0.4, 3: 0.25, ("up", True): 0.5, ("left", True): 0.5}
    wanted |= {("shared", colour, shape): 0.25 for colour in (True, False)
               for shape in (True, False)}
    wanted |= dict.fromkeys(("colour", "shape", "size", "place", "background"), 0.2)
    for kind, share in wanted.items():
        assert abs(kinds.count(kind) / 1000 - share) < 0.06, kind


def test_a_twin_differs_in_colours_and_shapes_alone():
    generator, changed = rng(), set()
    for scene in scenes(300):
        twin = world.sample_twin(generator, scene)
        assert twin != scene and twin.background == scene.background
        assert len(twin.things) == len(scene.things)
        for a, b in zip(scene.things, twin.things):
            assert replace(b, colour=a.colour, shape=a.shape) == a
            assert (b.colour, b.shape) not in HELD_OUT
            changed.add((a.colour != b.colour, a.shape != b.shape))
    assert len(changed) == 4


def test_pixels_are_those_of_the_image_processor():
    from processor import ChameleonImageProcessor

    some = scenes(3)
    pictures = [Image.fromarray(world.render(scene)) for scene in some]
    processor = ChameleonImageProcessor(size=world.SIDE, crop_size=world.SIDE)
    wanted = processor(pictures, return_tensors="np")["pixel_values"]
    assert np.array_equal(world.render_pixels(some), wanted)


def test_edits_change_one_thing():
    generator = rng(10)
    for _ in range(300):
        before, after = world.sample_edit(generator)
        fields = [f for f in world.FIELDS
                  if getattr(before.things[0], f) != getattr(after.things[0], f)]
        fields += ["background"] * (before.background != after.background)
        assert fields == [world.changed(before, after)]
