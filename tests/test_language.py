"""The English of the toy world: what is said of a picture is true and names nothing held out."""

from test_world import TWO, rng, scenes

from tiny_world import language, world
from tiny_world.language import QUESTIONS
from tiny_world.world import COLOURS, Scene, Thing


def test_captions_by_hand():
    assert language.caption(TWO) == (
        "A small red circle above a large blue square on a white background."
    )
    row = Scene("gray", tuple(Thing("orange", "star", "small", (1, n)) for n in range(2)))
    assert language.caption(row) == (
        "A small orange star to the left of a small orange star on a gray background."
    )


def test_every_answer_is_true():
    """Answers are checked against the scene by other means than those that made them."""
    generator = rng(5)
    for scene in scenes(400, seed=5):
        for kind in ("colour", "shape", "size"):
            turn = QUESTIONS[kind](generator, scene)
            if turn:
                said = conclusion(turn[1], language.look(scene)).rstrip(".")
                name, word = said.removeprefix("The ").split(" is ")
                assert f"the {name}" in turn[0]
                named = set(turn[0].rstrip("?").split())
                assert word.removeprefix("a ") in {
                    getattr(thing, kind) for thing in scene.things
                    if named & set(COLOURS) <= {thing.colour}
                    and named & set(world.SHAPES) <= {thing.shape}
                }
        question, answer = language.ask_count(generator, scene)
        words = question.rstrip("?.").split()
        fitting = [
            t for t in scene.things
            if (t.colour in words or not set(COLOURS) & set(words))
            and (t.shape + "s" in words or "shapes" in words or "objects" in words)
        ]  # fmt: skip
        number = language.NUMBERS[len(fitting)] + "."
        assert answer == f"{language.look(scene)} {number}"
        question, answer = language.ask_existence(generator, scene)
        words = question.rstrip("?").split()
        fitting = [
            t for t in scene.things
            if (t.colour in words or not set(COLOURS) & set(words))
            and (t.shape in words or "shape" in words or "object" in words)
        ]  # fmt: skip
        assert answer == language.look(scene) + (" Yes." if fitting else " No.")


def test_what_is_seen_is_said_by_hand():
    seen = "A small red circle at the top and a large blue square at the bottom."
    assert language.look(TWO) == seen
    assert language.look(Scene("gray", TWO.things[:1])) == "A small red circle at the top."
    three = Scene("gray", (*TWO.things, Thing("green", "star", "small", (2, 2))))
    assert language.look(three) == ("A small red circle at the top, a large blue square at the "
                                    "bottom and a small green star in the bottom right.")
    both = language.look_at_both(*(Scene("gray", (thing,)) for thing in TWO.things))
    assert both == ("The first shows a small red circle at the top on gray, the second a large "
                    "blue square at the bottom on gray.")


def conclusion(answer: str, seen: str) -> str:
    """What an answer says behind what it has seen."""
    assert answer.startswith(seen + " ")
    return answer.removeprefix(seen + " ")


def test_relations_follow_the_places():
    generator, seen, answers = rng(6), set(), set()
    for _ in range(300):
        turn = language.ask_relation(generator, TWO)
        if turn:
            answers.add(conclusion(turn[1], language.look(TWO)))
            seen.add((turn[0], turn[1].split(". ")[-1]))
            if turn[0].startswith("What is"):  # finds what the question names, not what it asks
                above = turn[0].startswith("What is above")
                found = conclusion(turn[1], language.look(TWO)).split(". ")[0]
                assert found == f"The {turn[0].split(' the ')[-1].rstrip('?')} is at the " + (
                    "bottom" if above else "top")
    both = "The red circle is at the top and the blue square is at the bottom"
    assert f"{both}. Above. Yes." in answers
    assert ("Is the red circle above the blue square?", "Yes.") in seen
    assert ("Is the red circle below the blue square?", "No.") in seen
    assert all("left" not in question for question, _ in seen)  # both are in the middle column
    assert {answer for question, answer in seen if question.startswith("What is above")} == {
        "A red circle."
    }


def test_a_place_is_that_of_the_thing_asked_for():
    generator, places = rng(13), set()
    for _ in range(100):
        question, answer = language.QUESTIONS["place"](generator, TWO)
        name = question.split(" the ")[-1].rstrip("?")
        place = "top" if set(name.split()) & {"red", "circle", "small"} else "bottom"
        assert conclusion(answer, language.look(TWO)) == f"The {name} is at the {place}."
        assert set(name.split()) & {"red", "circle", "small", "blue", "square", "large"}
        places.add(place)
    assert places == {"top", "bottom"}


def test_a_thing_is_the_one_at_the_place_asked_for():
    generator, answers = rng(13), {}
    for _ in range(300):
        question, answer = language.ask_thing(generator, TWO)
        place = question.removeprefix("What is ").removesuffix("?")
        answers[place] = conclusion(answer, language.look(TWO))
    assert answers.pop("at the top") == "I see the small red circle at the top."
    assert answers.pop("at the bottom") == "I see the large blue square at the bottom."
    assert answers == {place: f"I see nothing {place}." for place in answers} and len(answers) == 7


def test_yes_and_no_are_equally_frequent():
    generator = rng(7)
    answers = [language.ask_existence(generator, scene)[1] for scene in scenes(1000, seed=7)]
    assert 0.45 < sum(answer.endswith(" No.") for answer in answers) / len(answers) < 0.55


def test_a_scene_fulfils_its_own_drawing_request_and_a_changed_one_does_not():
    generator = rng(8)
    for scene in scenes(300, seed=8):
        request = language.ask_drawing(generator, scene)
        assert language.fulfils(scene, request)
        fewer = Scene(scene.background, scene.things[1:])
        assert not language.fulfils(fewer, request)
        gone = {"colour": "no colour at all"}
        other = (Thing(**(vars(scene.things[0]) | gone)),) + scene.things[1:]
        assert not language.fulfils(Scene(scene.background, other), request)


def test_a_request_with_a_relation_is_not_fulfilled_upside_down():
    request = language.Request("", ({"colour": "red"}, {"colour": "blue"}), relation="above")
    below = Scene("white", (
        Thing("blue", "square", "large", (0, 1)), Thing("red", "circle", "small", (2, 1)),
    ))  # fmt: skip
    assert language.fulfils(TWO, request) and not language.fulfils(below, request)
    request = language.Request("", ({"colour": "red"}, {"colour": "blue"}),
                               relation="to the left of")
    places = {"left": (1, 0), "right": (1, 2), "above": (0, 1), "below": (2, 1)}
    for where, place in places.items():
        things = (Thing("red", "circle", "small", place), Thing("blue", "square", "large", (1, 1)))
        scene = Scene("white", tuple(sorted(things, key=lambda thing: thing.place)))
        assert language.fulfils(scene, request) == (where == "left")


def words_of(scene: Scene) -> set[str]:
    return {scene.background} | {w for t in scene.things for w in (t.colour, t.shape)}


def test_a_drawing_that_shows_more_is_wrong_and_the_order_is_free():
    request = language.Request("", ({"colour": "blue"}, {"colour": "red"}), background="white")
    assert language.fulfils(TWO, request)
    assert not language.fulfils(Scene("black", TWO.things), request)
    third = Thing("green", "star", "small", (2, 2))
    assert not language.fulfils(Scene("white", (*TWO.things, third)), request)


def fits(name: str, thing: Thing) -> bool:
    """Does "small red shape" name this thing?"""
    known = {"shape", "object", thing.size, thing.colour, thing.shape}
    return set(name.split()) <= known


def test_every_statement_is_true():
    """Read back by other means than those that made it."""
    generator, kinds = rng(14), set()
    words = {"above": (0, -1), "below": (0, 1),  # the axis, and the first one's side on it
             "to the left of": (1, -1), "to the right of": (1, 1)}
    for scene in scenes(1000, seed=14):
        said = language.state(generator, scene).removesuffix(".")
        if said in ("There is one shape", "There are two shapes", "There are three shapes"):
            kinds.add("count")
            assert ["one", "two", "three"].index(said.split()[2]) == len(scene.things) - 1
        elif said.startswith("The background is "):
            kinds.add("background")
            assert said.endswith(scene.background)
        elif said.startswith("There is no "):
            kinds.add("absence")
            assert not any(fits(said.removeprefix("There is no "), t) for t in scene.things)
        elif relation := next((w for w in words if f" is {w} the " in said), None):
            kinds.add("relation")
            names = said.removeprefix("The ").split(f" is {relation} the ")
            (a,), (b,) = ([t for t in scene.things if fits(name, t)] for name in names)
            axis, sign = words[relation]
            assert (a.place[axis] - b.place[axis]) * sign > 0
        elif said.startswith("A "):
            kinds.add("place")
            assert said in {f"A {t} is {world.PLACES[t.place]}" for t in scene.things}
        else:  # a thing, which is named without one of its fields
            kinds.add("thing")
            name, whole = said.removeprefix("The ").split(" is a ")
            (thing,) = (t for t in scene.things if fits(name, t))
            assert whole == str(thing)
    assert len(kinds) == 6


def test_what_is_asked_for_is_named_once_and_never_in_the_question():
    generator, orders = rng(15), set()
    for scene in scenes(600, seed=15):
        for kind in ("colour", "shape", "size", "place"):
            turn = QUESTIONS[kind](generator, scene)
            if turn and kind != "place":
                name = turn[1].split(" The ")[-1].split(" is ")[0]
                (thing,) = (t for t in scene.things if fits(name, t))
                assert getattr(thing, kind) not in name.split()
        turn = language.ask_relation(generator, scene)
        if turn and turn[0].startswith("What is"):
            assert len(scene.things) == 2  # of three, two may be there
        if turn and " or " in turn[0]:
            answer = turn[1].rsplit(". ", 1)[-1].removesuffix(".").lower()
            either = turn[0].split(" or ")[0]
            orders.add((answer, either.endswith((answer, f"{answer} of"))))
    assert len(orders) == 8  # each answer, named first or second


def test_every_number_is_counted_and_every_kind_of_wish_is_named():
    generator, numbers, named = rng(16), [], []
    for scene in scenes(600, seed=16, count=3):
        numbers.append(language.ask_count(generator, scene)[1].rsplit(". ", 1)[-1])
    for scene in scenes(600, seed=17, count=1):
        request = language.ask_drawing(generator, scene)
        named += ["background"] * bool(request.background) + list(request.things[0])
        assert request.text.endswith("background") == bool(request.background)
    for number in language.NUMBERS:
        assert numbers.count(f"{number}.") > 60
    for field, share in dict(colour=1, shape=1, size=0.5, place=0.3, background=0.5).items():
        assert abs(named.count(field) / 600 - share) < 0.08, field


def test_pairs_share_what_they_say():
    generator, found = rng(9), set()
    for n in range(300):
        first, second = world.sample_pair(generator)
        a, b = first.things[0], second.things[0]
        shared = a.colour == b.colour, a.shape == b.shape
        found.add(shared)
        seen = language.look_at_both(first, second)
        answer = conclusion(language.ask_common(generator, first, second)[1], seen)
        assert (answer == "Nothing.") == (not any(shared))
        field = ("", "background")[n % 2]
        turn = language.ask_which(generator, first, second, field)
        if turn:
            assert field in turn[0]
            names = set(COLOURS) | set(world.SHAPES) | set(world.BACKGROUNDS)
            asked = set(turn[0].rstrip("?").split()) & names
            first_fits, second_fits = (asked <= words_of(scene) for scene in (first, second))
            assert first_fits != second_fits
            assert conclusion(turn[1], seen) == ("The first." if first_fits else "The second.")
    assert len(found) == 4


def test_no_sentence_about_a_training_picture_names_a_held_out_pair():
    """Not even to deny it."""
    pairs = [f"{colour} {shape}" for colour, shape in world.HELD_OUT]
    generator = rng(12)
    for scene in scenes(2000, seed=12):
        said = [language.state(generator, scene), *language.ask_existence(generator, scene)]
        said += [*language.ask_count(generator, scene), language.caption(scene)]
        assert not [pair for pair in pairs for words in said if pair in words]
