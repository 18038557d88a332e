"""Training: documents, packing, losses, the codebook, resuming - and the checkpoint it made."""

import argparse
import csv
import json
import re
import shutil
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SIZES, V, ended, left_padded, randomize, scrambled_vocabulary, start_two
from small import VQ as SMALL_VQ
from torch.nn.utils.parametrize import is_parametrized

import train
from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras import convert
from chameleon_extras.files import fast_bf16, hold
from processor import ChameleonProcessor
from tiny_world import code_rows, documents, evaluate, vqvae_stage, world
from tiny_world.documents import (
    Corpus,
    Document,
    Pictures,
    Rows,
    Shares,
    Writer,
    encode_scenes,
    visible,
)
from tiny_world.run import Run, autocast
from tokenizer import load_tokenizer
from vqvae import ChameleonVQVAE

ROOT = Path(train.__file__).parent
TINY = ROOT / "tiny"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    """The real corpus over pictures whose codes are random: fast, and the text is the same."""
    pictures, generator = Pictures.sample(0, 200), rng()
    S, K = vqvae_stage.VQ.codes_per_image, vqvae_stage.VQ.num_embeddings
    pictures.codes = {scene: generator.integers(0, K, S) for scene in pictures.scenes()}
    pictures.alike = np.arange(K)[:, None] ^ np.array([1, 2, 3])  # in blocks of four
    return Corpus(Writer(tokenizer, pictures.codes), pictures, generator)


@pytest.fixture(scope="module")
def small_model():
    config = ChameleonConfig(**SIZES, vq_config=SMALL_VQ, vocabulary_map=scrambled_vocabulary())
    model = ChameleonForConditionalGeneration(config)
    randomize(model)
    return model.eval()


# --- documents


def test_a_chat_document_is_what_the_processor_makes_plus_the_answer(corpus, tokenizer):
    scene = corpus.pictures.singles[0]
    document = corpus.writer.chat((("What is this? ", scene), ("A star.",)))
    prompt = ChameleonProcessor.from_pretrained(TINY)(
        text="What is this? <image>", images=Image.fromarray(world.render(scene))
    )["input_ids"][0]
    codes = tokenizer.vocabulary.code_to_id[torch.tensor(corpus.writer.codes[scene])]
    prompt[prompt == tokenizer.image_token_id] = codes
    answer = [*tokenizer.text_ids("A star."), tokenizer.eos_token_id]
    assert document.ids == prompt.tolist() + answer
    weight = documents.CONCLUSION_WEIGHT / len(answer)
    assert document.weight == [0.0] * len(prompt) + [weight] * len(answer)
    position = documents.packed([[document]], len(document.ids), 0)["position"]
    assert position.tolist() == [list(range(len(document.ids)))]


def test_a_conversation_is_what_the_chat_template_makes_plus_the_last_answer(corpus, tokenizer):
    scene, other = corpus.pictures.singles[:2]
    turns = ((scene, "Is it red?"), ("A star. No.",)), (("Make it red.",), (other,)), (
        ("And now?",), ("Yes.",))
    document = corpus.writer.chat(*turns)
    parts = [part for turn in turns for part in turn][:-1]
    ids = ChameleonProcessor.from_pretrained(TINY).apply_chat_template([
        {"role": ("user", "assistant")[n % 2], "content": [
            {"type": "text", "text": x} if isinstance(x, str) else
            {"type": "image", "image": Image.fromarray(world.render(x))} for x in part]}
        for n, part in enumerate(parts)])["input_ids"][0]
    codes = np.concatenate([corpus.writer.codes[scene], corpus.writer.codes[other]])
    ids[ids == tokenizer.image_token_id] = tokenizer.vocabulary.code_to_id[torch.tensor(codes)]
    answer = [*tokenizer.text_ids("Yes."), tokenizer.eos_token_id]
    assert document.ids == ids.tolist() + answer
    # In the loss are the answers and the token that ends each, and nothing of the prompts.
    counted = [i for i, w in zip(document.ids, document.weight) if w]
    turn, drawn = tokenizer.vocabulary.end_of_turn_id, corpus.writer.code_to_id[
        corpus.writer.codes[other]].tolist()
    v = tokenizer.vocabulary
    assert counted == [*tokenizer.text_ids("A star. No."), turn,
                       v.begin_image_id, *drawn, v.end_image_id, turn, *answer]


def test_conversations_have_two_to_five_turns_and_fit_into_a_row(corpus, tokenizer):
    begin, turn = tokenizer.vocabulary.begin_image_id, tokenizer.vocabulary.end_of_turn_id
    seen = set()
    for _ in range(200):
        document = corpus.conversation()
        assert len(document.ids) <= corpus.row_tokens
        # Of n turns there are n ends of prompts and n - 1 of answers.
        seen.add(((document.ids.count(turn) + 1) // 2, document.ids.count(begin)))
    assert seen == {(2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1)}


def test_a_drawing_is_in_the_loss_and_a_given_picture_is_not(corpus, tokenizer):
    v = tokenizer.vocabulary
    scene, other = corpus.pictures.singles[:2]
    document = corpus.writer.chat((("Make it red.", scene), (other,)))
    places = [n for n, token in enumerate(document.ids) if token == v.begin_image_id]
    S = len(corpus.writer.codes[scene])
    weights = [document.weight[p : p + S + 2] for p in places]
    assert set(weights[0]) == {0.0}
    assert weights[1][0] == 1.0 and set(weights[1][1 : S + 1]) == {documents.IMAGE_WEIGHT}


def test_a_drawing_is_read_with_slips_and_learned_without(corpus, tokenizer):
    """The targets are the picture's own codes; what is read is now and then its twin's."""
    writer, map_ids = corpus.writer, corpus.writer.code_to_id
    scene, twin = next(iter(corpus.pictures.twins.items()))
    begin = tokenizer.vocabulary.begin_image_id
    slipped = []
    for _ in range(60):
        document = writer.chat((("Draw it.",), (corpus.drawn(scene),)))
        assert document.ids == writer.chat((("Draw it.",), (scene,))).ids
        start = document.ids.index(begin) + 1
        S = len(writer.codes[scene])
        read = np.array(document.read[start : start + S])
        own, other = map_ids[writer.codes[scene]], map_ids[writer.codes[twin]]
        assert ((read == own) | (read == other)).all()
        assert document.read[:start] == document.ids[:start]
        assert document.read[start + S :] == document.ids[start + S :]
        slipped.append((read != own).mean())
    few, many = (np.mean([abs(x - share) < 0.08 for x in slipped]) for share in (0.1, 0.3))
    assert few > 0.1 and many > 0.1 and slipped.count(0.0) >= 8


def test_a_given_picture_is_read_blurred(corpus):
    """Some codes of the prompt become similar ones; what is to be learned stays as it is."""
    writer, before = corpus.writer, corpus.pictures.edits[0][0]
    own, changed = writer.codes[before], []
    for _ in range(60):
        given = corpus.given(before)
        document = writer.chat(((given, "What is this?"), ("A star.",)))
        assert document.ids == writer.chat(((before, "What is this?"), ("A star.",))).ids
        assert (given.read // 4 == own // 4).all()  # one of the codes that look alike
        assert document.read[2 : 2 + len(own)] == writer.code_to_id[given.read].tolist()
        changed.append((given.read != own).mean())
    some, many = (np.mean([abs(x - share) < 0.1 for x in changed]) for share in (0.3, 0.5))
    assert some > 0.1 and many > 0.1 and changed.count(0.0) >= 8


def test_the_picture_to_be_edited_is_read_as_it_is(corpus):
    """What has to be copied from it, code by code, must be there."""
    slips = 0
    for document in (corpus.edit() for _ in range(40)):
        wrong = np.array(document.ids) != np.array(document.read)
        assert (np.array(document.weight)[wrong] == documents.IMAGE_WEIGHT).all()
        slips += wrong.sum()
    assert slips > 100


def test_codes_alike_are_the_nearest_of_the_codebook(tmp_path):
    vq = ChameleonVQVAE(vqvae_stage.VQ).eval()
    pictures = Pictures.sample(0, 30).encode(vq, tmp_path / "codes")
    vectors = vq.quantize.embedding.weight.detach()
    for code in (0, 7, 511):
        distance = (vectors - vectors[code]).square().sum(1)
        distance[code] = float("inf")  # not itself
        assert set(pictures.alike[code]) == set(distance.topk(4, largest=False).indices.tolist())


def test_words_of_a_document_are_about_the_pictures_in_it(corpus, monkeypatch):
    """Each word is replaced by the numbers of the scenes that it is made from."""
    number = {scene: n for n, scene in enumerate(corpus.pictures.scenes())}
    codes, made, kinds = corpus.writer.codes, [], set()
    edits = [tuple(number[scene] for scene in pair) for pair in corpus.pictures.edits]
    owner = {codes[scene].tobytes(): n for scene, n in number.items()}

    def number_of(part):  # of a Scene or a Corrupted
        own = part.codes if isinstance(part, documents.Corrupted) else codes[part]
        return owner[own.tobytes()]

    def named(kind):
        return lambda *given, **_: f"#{kind} " + " ".join(
            str(number.get(x, -1)) for x in given if isinstance(x, world.Scene))

    def keep(*parts):
        made.append([part if isinstance(part, str) else number_of(part) for part in parts])
        return Document([5])

    twice = {kind: lambda *given, kind=kind, **_: (named(kind)(*given),) * 2 for kind in (
        "ask", "ask_difference", "ask_which", "ask_common", "ask_both")}
    monkeypatch.setattr(documents.language, "QUESTIONS", dict.fromkeys(
        documents.ASKED, twice.pop("ask")))
    for name, words in (twice | {kind: named(kind) for kind in (
            "caption", "look", "state", "ask_edit")}).items():
        monkeypatch.setattr(documents.language, name, words)
    monkeypatch.setattr(documents.language, "ask_drawing", lambda _, scene: (
        documents.language.Request(named("draw")(scene), ())))
    monkeypatch.setattr(corpus, "shares", Shares(0.0, 0.0))
    writer = types.SimpleNamespace(
        codes=corpus.writer.codes, completion=keep,
        chat=lambda *turns: keep(*(part for turn in turns for side in turn for part in side)),
        branches=lambda shared, turns, image, room: (
            weights.append(image) or keep(*shared, *(text for turn in turns for text in turn))))
    monkeypatch.setattr(corpus, "writer", writer)
    for draw, weight in ((corpus.sft, 0.0), (corpus.pretrain, documents.IMAGE_WEIGHT)):
        weights = []
        for _ in range(300):
            draw(256)
        assert set(weights) == {weight}  # a given picture is not in the loss of an answer
    for parts in made:
        pictures = [part for part in parts if isinstance(part, int)]
        for place, part in enumerate(parts):
            for kind, scenes in re.findall(r"#(\w+) ([\d ]+)", str(part)):
                about = [int(n) for n in scenes.split()]
                after = [part for part in parts[place:] if isinstance(part, int)]
                if not pictures:
                    assert kind in ("caption", "look", "state")
                elif kind in ("draw", "caption"):  # of the picture that follows, or that was last
                    assert about == (after or pictures)[:1], parts
                elif len(about) == 2:
                    assert about == pictures, parts
                else:
                    assert about == pictures[:1], parts
                assert kind != "ask_edit" or tuple(about) in edits
                kinds.add((kind, len(pictures)))
    assert len(kinds) > 15
    firsts = {parts[2].split()[0] for parts in made if list(map(type, parts[:3])) == [int, int, str]
              and len(parts) > 4}  # in branches; what comes last may not fit
    assert len(firsts) == 4


def test_the_weights_of_plain_documents_by_hand(corpus, tokenizer):
    scene = corpus.pictures.singles[0]
    S, some = len(corpus.writer.codes[scene]), documents.IMAGE_WEIGHT
    words = [1.0] * len(tokenizer.text_ids("A star."))
    whole = corpus.writer.completion("A star.", scene)  # of <s> nothing foretells
    assert whole.weight == [0.0, *words, 1.0, *[some] * S, 1.0, 1.0]
    assert whole.ids[-1] == tokenizer.eos_token_id
    for shared in (scene, "A star."):
        for image in (0.0, some):
            document = corpus.writer.branches((shared,), [("Why?", "So.")], image, 200)
            begun = document.branch.count(0)
            assert document.weight[:begun] == [0.0, *[image] * (begun - 1)]


def test_slips_in_drawings_and_blur_in_prompts_and_nothing_else(corpus, tokenizer):
    rows, slips, blurs = Rows(tokenizer.pad_token_id), 0, 0
    for _ in range(10):
        batch = rows.batch(corpus.sft, 4, corpus.row_tokens)
        wrong = batch["ids"] != batch["read"]
        weight = batch["weight"][wrong]
        slips += (weight == documents.IMAGE_WEIGHT).sum().item()
        blurs += (weight == 0).sum().item()
        assert torch.isin(batch["ids"][wrong], tokenizer.vocabulary.code_to_id).all()
        assert ((weight == documents.IMAGE_WEIGHT) | (weight == 0)).all()
    assert slips > 100 and blurs > 100
    batch = Rows(tokenizer.pad_token_id).batch(corpus.pretrain, 8, corpus.row_tokens)
    assert torch.equal(batch["ids"], batch["read"])


def test_pictures_come_on_either_side_and_some_drawings_have_no_prompt(corpus):
    assert len({corpus.prompt("?", None)[0] is None for _ in range(40)}) == 2
    for draw in (corpus.drawing, lambda: corpus.pretrain(256)):
        assert any(len(draw().ids) == vqvae_stage.VQ.codes_per_image + 4 for _ in range(300))


def test_the_order_of_norms_is_the_one_asked_for(tokenizer):
    options = train.parse(["pretrain", "--out", "x", "--norm-order", "swin"])
    model = train.build_model(tokenizer, ChameleonVQVAE(vqvae_stage.VQ), options)
    assert model.config.swin_norm


def test_branches_share_the_picture_and_restart_their_positions(corpus):
    scene = corpus.pictures.singles[0]
    turns = [("What is this?", "A star."), ("How many?", "One."), ("", "There is one shape.")]
    document = corpus.writer.branches((scene,), turns, 0.0, room=1000)
    shared = document.branch.count(0)
    positions = documents.packed([[document]], 200, 0)["position"][0].tolist()
    assert not any(positions[len(document.ids) :])  # the padding
    assert shared == len(corpus.writer.codes[scene]) + 3  # <s>, begin image, end image
    for branch in (1, 2, 3):
        here = [p for p, b in zip(positions, document.branch) if b == branch]
        assert here == list(range(shared, shared + len(here)))


def test_branches_stop_before_the_room_is_full(corpus):
    scene = corpus.pictures.singles[0]
    document = corpus.writer.branches((scene,), [("Why?", "So.")] * 99, 0.0, room=100)
    assert 90 < len(document.ids) <= 100


@pytest.mark.parametrize("draw", ["pretrain", "sft"])
def test_rows_are_full_and_hold_only_what_was_drawn(corpus, tokenizer, draw):
    corpus = Corpus(corpus.writer, corpus.pictures, rng(5))  # whatever other tests have drawn
    rows, filled = Rows(tokenizer.pad_token_id), 0
    for _ in range(10):
        batch = rows.batch(getattr(corpus, draw), 4, corpus.row_tokens)
        padding = batch["ids"] == tokenizer.pad_token_id
        assert (batch["weight"][padding] == 0).all()
        assert batch["position"].max() < corpus.row_tokens
        filled += (~padding).float().mean().item() / 10
    assert filled > 0.8


@pytest.mark.parametrize("text", ["No.", "A red star at the top. No.", "A" + " very" * 30 + "."])
def test_what_an_answer_concludes_weighs_as_much_as_its_length_forbids(corpus, tokenizer, text):
    """The last sentence and </s> share CONCLUSION_WEIGHT, but no token weighs less than 1."""
    document = corpus.writer.chat((("Why?",), (text,)))
    begun = document.ids.index(tokenizer.vocabulary.end_of_turn_id) + 1
    ids, weights = document.ids[begun:], document.weight[begun:]
    assert ids == [*tokenizer.text_ids(text), tokenizer.eos_token_id] and len(weights) == len(ids)
    last = len(tokenizer.text_ids(text.split(". ")[-1])) + 1
    assert weights[:-last] == [1.0] * (len(ids) - last)
    assert set(weights[-last:]) == {max(1.0, documents.CONCLUSION_WEIGHT / last)}


def test_statements_without_a_question_weigh_the_same_everywhere(corpus):
    scene = corpus.pictures.singles[0]
    document = corpus.writer.branches((scene,), [("", "A star. No."), ("Is it?", "No.")], 0.0, 500)
    branches = {n: [w for w, b in zip(document.weight, document.branch) if b == n] for n in (1, 2)}
    assert set(branches[1]) == {1.0} and max(branches[2]) > 1.0


def test_conclusions_are_practised_without_the_sentence_that_nobody_could_know(corpus, tokenizer):
    # In the order of a real answer nothing is shared but <s>; that is a third of the documents.
    drawn = [corpus.practice(384) for _ in range(50)]
    document = next(document for document in drawn if document.branch.count(0) == 1)
    assert max(document.branch) >= 5
    codes = set(corpus.writer.code_to_id.tolist())
    assert not codes & set(document.ids)
    for n in range(1, max(document.branch) + 1):
        here = [i for i, branch in enumerate(document.branch) if branch == n]
        ids, weight = [document.ids[i] for i in here], [document.weight[i] for i in here]
        turn = ids.index(tokenizer.vocabulary.end_of_turn_id) + 1
        answer = tokenizer.decode(ids[turn:-1], True)
        given, concluded = answer.split(". ", 1)
        first = weight.index(next(w for w in weight if w))  # the first token that counts
        assert tokenizer.decode(ids[turn:first], True) == given + "."
        assert tokenizer.decode(ids[first:-1], True).strip() == concluded and all(weight[first:])


def test_a_shared_description_is_not_said_again_and_an_own_one_is_of_an_own_scene(
        corpus, tokenizer, monkeypatch):
    def difference(rng, *scenes):
        before, after = ((s.background, *vars(s.things[0]).values()) for s in scenes)
        changed.append(sum(a != b for a, b in zip(before, after)))
        return ask(rng, *scenes)

    changed, ask = [], documents.language.ask_difference
    monkeypatch.setattr(documents.language, "ask_difference", difference)
    monkeypatch.setattr(corpus, "rng", rng(1))
    turn, shared = tokenizer.vocabulary.end_of_turn_id, 0
    for document in (corpus.practice(384) for _ in range(25)):
        begun, answers = document.branch.count(0), []
        for n in range(1, max(document.branch) + 1):
            ids = [i for i, branch in zip(document.ids, document.branch) if branch == n]
            answers.append(tokenizer.decode(ids[ids.index(turn) + 1 :], True))
        seen = tokenizer.decode(document.ids[1:begun], True).strip()
        if seen:
            assert not any(seen in answer for answer in answers)
        else:
            assert len({answer.split(". ")[0] for answer in answers}) > 1
        shared += bool(seen)
    assert 5 < shared < 25 and changed and set(changed) == {1}  # an edit changes one thing


def test_statements_begin_with_caption_and_description(corpus):
    scene = corpus.pictures.singles[0]
    said = corpus.statements(scene, 4)
    assert said[:2] == [documents.language.caption(scene), documents.language.look(scene)]
    assert len(said) == 4 and not set(said[:2]) & set(said[2:])


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.3, 0.2), (1.0, 0.0), (0.0, 1.0)])
def test_practice_and_lists_are_as_frequent_as_asked_for(corpus, monkeypatch, shares):
    made = {"practice": 0, "lists": 0}

    def count(name, draw):
        def counted(*room):
            made[name] += 1
            return draw(*room)

        monkeypatch.setattr(corpus, name, counted)

    count("practice", corpus.practice)
    count("lists", corpus.lists)
    monkeypatch.setattr(corpus, "shares", Shares(*shares))
    for _ in range(80):
        corpus.sft(384)
    for number, share in zip(made.values(), shares):
        assert abs(number / 80 - share) <= (0 if share in (0.0, 1.0) else 0.15)


def test_places_are_practised_as_often_as_asked_for(corpus, monkeypatch):
    monkeypatch.setattr(corpus, "rng", rng())
    monkeypatch.setattr(documents.language, "ask_thing", lambda *_: ("Thing?", "Seen. Thing."))
    monkeypatch.setattr(corpus.writer, "branches", lambda shared, turns, image, room: turns)
    monkeypatch.setattr(corpus, "shares", Shares(1.0, 0.0, 0.2))
    asked = [[question.lower().startswith("thing") for question, _ in corpus.practice(384)]
             for _ in range(200)]
    assert all(all(each) or not any(each) for each in asked)  # of whole documents
    assert 0.12 < sum(map(all, asked)) / 200 < 0.28


def test_a_list_names_every_thing_again(corpus, tokenizer):
    orders = set()
    for _ in range(20):
        document = corpus.lists()
        turn = document.ids.index(tokenizer.vocabulary.end_of_turn_id)
        given, again = (tokenizer.decode(ids, True) for ids in
                        (document.ids[1:turn], document.ids[turn + 1 : -1]))
        things = again.removesuffix(".").split(". ")
        assert len(things) >= 3 and len(set(things)) == len(things)
        assert all(thing.removeprefix("I see the ") in given for thing in things)
        assert len(things) == given.count(" in the ") + given.count(" at the ") + (
            given.count(" on the "))  # fmt: skip
        where = [given.index(thing.removeprefix("I see the ")) for thing in things]
        orders.add(where == sorted(where))
    assert False in orders


@pytest.mark.parametrize("draw", ["practice", "lists"])
def test_sentences_without_a_picture_name_what_no_picture_shows(corpus, tokenizer, draw,
                                                                monkeypatch):
    monkeypatch.setattr(corpus, "rng", rng())  # not what other tests have left of it
    room = (384,) if draw == "practice" else ()
    said = [tokenizer.decode(getattr(corpus, draw)(*room).ids, True) for _ in range(100)]
    assert "purple star" in " ".join(said) and "green triangle" in " ".join(said)
    heard = [text for text in said if "purple star" in text or "green triangle" in text]
    assert len(heard) >= 50  # half of the scenes for sure, what no picture will make up for
    assert not world.pairs(*corpus.pictures.scenes()) & world.HELD_OUT


def test_every_step_has_its_shares_of_practice():
    ends = [end for end, _ in train.PRACTICE]
    assert ends == sorted(ends) and ends[-1] == 1.0


def test_visible_by_hand():
    document = torch.tensor([[0, 0, 0, 0, 1]])
    branch = torch.tensor([[0, 1, 1, 2, 0]])
    wanted = torch.tensor([
        [1, 0, 0, 0, 0],  # the shared beginning sees itself
        [1, 1, 1, 0, 0],  # branch 1 sees it and itself (the model adds causality)
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],  # branch 2 does not see branch 1
        [0, 0, 0, 0, 1],  # another document sees only itself
    ]).bool()  # fmt: skip
    assert torch.equal(visible(document, branch)[0], wanted)


def test_packed_branches_get_the_logits_they_would_get_alone(small_model):
    """The mask and the positions together: packing changes nothing but the speed."""
    g = torch.Generator().manual_seed(0)
    shared, one, two = (torch.randint(74, V, (n,), generator=g).tolist() for n in (6, 4, 5))
    ids = shared + one + two
    packed = Document(ids, [1.0] * 15, [0] * 6 + [1] * 4 + [2] * 5, ids)

    class Once:
        def __init__(self):
            self.left = [packed, packed]

        def draw(self, room):
            return self.left.pop() if self.left else Document(ids=[0] * 10**6)

    batch = Rows(1).batch(Once().draw, 1, 40)  # the same document twice in a row
    with torch.no_grad():
        both = small_model(
            batch["ids"], attention_mask=batch["mask"], position_ids=batch["position"]
        ).logits[0]
        alone = [small_model(torch.tensor([shared + branch])).logits[0] for branch in (one, two)]
    for start in (0, 15):
        torch.testing.assert_close(both[start + 6 : start + 10], alone[0][6:])
        torch.testing.assert_close(both[start + 10 : start + 15], alone[1][6:])


def test_cached_codes_are_used_only_if_they_are_those_of_this_vqvae(tmp_path):
    torch.manual_seed(0)
    one, other = (ChameleonVQVAE(vqvae_stage.VQ) for _ in range(2))
    for vq in (one, other):
        torch.nn.init.normal_(vq.quantize.embedding.weight)
    cache = tmp_path / "codes"
    first = Pictures.sample(0, 30).encode(one, cache).codes
    again = Pictures.sample(0, 30).encode(one, cache).codes
    changed = Pictures.sample(0, 30).encode(other, cache).codes
    scene = next(iter(first))
    assert np.array_equal(first[scene], again[scene])
    fresh = encode_scenes(other, [scene])[0]
    assert np.array_equal(changed[scene], fresh) and not np.array_equal(first[scene], fresh)
    codes = np.fromfile(cache, np.int16).reshape(-1, len(fresh))
    np.concatenate((codes[:-1], codes[-2:-1])).tofile(cache)  # made with another last twin
    again = Pictures.sample(0, 30).encode(other, cache)
    assert np.array_equal(again.codes[again.scenes()[-1]], codes[-1])
    cache.write_bytes(cache.read_bytes()[:-9])  # the disk was full: computed anew
    assert np.array_equal(Pictures.sample(0, 30).encode(one, cache).codes[scene], first[scene])
    assert list(tmp_path.iterdir()) == [cache]
    assert cache.stat().st_size == codes.nbytes


# --- loss, optimizer, schedule


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_used_only_where_it_is_fast(monkeypatch, fast):
    """On a CPU that has to imitate it a step took 19 times as long."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert fast_bf16(torch.device("cpu")) is fast and fast_bf16(torch.device("cuda"))
    with autocast(torch.device("cpu")):
        y = torch.ones(2, 2) @ torch.ones(2, 2)
    assert y.dtype is (torch.bfloat16 if fast else torch.float32)


def test_a_processor_without_onednn_trains_in_fp32(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: 1 / 0, raising=False)
    assert not fast_bf16(torch.device("cpu"))


def test_the_loss_is_weighted_cross_entropy_plus_z_loss(small_model):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(74, V, (2, 9), generator=g)
    weight = torch.tensor([[0.0] * 4 + [1.0] * 5, [0.0] * 3 + [0.5] * 6])
    mask = (torch.rand(2, 9, 9, generator=g) < 0.5) | torch.eye(9, dtype=torch.bool)
    read = ids.roll(3, 1)  # what is read need not be what is to be predicted: see Corpus.drawn
    position = torch.randint(50, (2, 9), generator=g)
    batch = dict(ids=ids, read=read, weight=weight, mask=mask, position=position)
    with torch.no_grad():
        loss, _ = train.decoder_loss(small_model, batch, z_weight=0.3)
        with autocast(ids.device):
            logits = small_model(read, attention_mask=mask, position_ids=position,
                                 mask_image_logits=False).logits[:, :-1].float()
    log_z = logits.logsumexp(-1)
    nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    w = weight[:, 1:]
    wanted = (w * (nll + 0.3 * log_z**2)).sum() / w.sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only(small_model, kind):
    optimizers = train.make_optimizers(small_model, 1e-3, kind)
    names = {id(p): name for name, p in small_model.named_parameters()}
    seen = []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        here = [(names[id(p)], p) for p in group["params"]]
        matrices = {p.ndim >= 2 and "norm" not in name for name, p in here}
        assert matrices == {group["weight_decay"] == train.WEIGHT_DECAY}
        if "eps" in group:  # AdamW's
            assert (group["betas"], group["eps"]) == (train.BETAS, train.EPS)
        seen += [name for name, _ in here]
    assert sorted(seen) == sorted(name for name in names.values() if "vqmodel" not in name)


def test_muon_moves_the_matrices_of_the_layers_in_all_directions_alike(small_model):
    (adamw, muon) = train.make_optimizers(small_model, 1e-3, "muon")
    names = {id(p): name for name, p in small_model.named_parameters()}
    assert all(".layers." in names[id(p)] for p in muon.param_groups[0]["params"])
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert tables <= {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    weight = small_model.model.layers[0].mlp.down_proj.weight  # (D, F)
    before, shape = weight.detach().clone(), weight.shape
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    step = before * (1 - 1e-3 * train.WEIGHT_DECAY) - weight.detach()
    sizes = torch.linalg.svdvals(step) / (1e-3 * 0.2 * max(shape) ** 0.5)  # 1 for each, about
    assert sizes.min() > 0.6 and sizes.max() < 1.3


@pytest.mark.parametrize("bf16, tolerance", [(True, 0), (False, 1e-3)])
def test_muon_equals_the_one_of_torch(bf16, tolerance, monkeypatch):
    """In bf16 bit for bit, and in fp32 to the rounding error of bf16."""
    monkeypatch.setattr(train, "fast_bf16", lambda device: bf16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (40, 16), (16, 40)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        train.Muon(ours, {"lr": 1e-2, "weight_decay": 0.1}),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stage", train.STEPS)
def test_the_learning_rate_warms_up_and_never_grows_again(stage):
    rates = [train.rate(stage, step, 1000) for step in range(1000)]
    top = rates.index(max(rates))
    assert rates[0] < max(rates) / 50
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("stage, step, wanted", [
    ("pretrain", 0, 0.01), ("pretrain", 500, 0.98 * 0.3**0.5 + 0.02), ("vqvae", 500, 0.51),
    ("sft", 500, 1.0), ("sft", 750, 0.51), ("sft", 1000, 0.02), ("pretrain", 1000, 0.314)])
def test_the_learning_rate_by_hand(stage, step, wanted):
    assert train.rate(stage, step, 1000) == pytest.approx(wanted)


def test_the_curves_tell_text_from_pictures(small_model):
    codes = small_model.model.vocabulary.code_to_id
    ids = torch.cat((torch.arange(80, 84), codes[:3], torch.tensor([90])))[None]  # (1, 8)
    batch = dict(ids=ids, read=ids, weight=torch.tensor([[0.0, 0.0, 1, 1, 1, 1, 1, 0]]),
                 mask=torch.ones(1, 8, 8, dtype=torch.bool), position=torch.arange(8)[None])
    with torch.no_grad():
        curves = train.decoder_loss(small_model, batch, 0.0)[1]
        with autocast(ids.device):
            logits = small_model(ids, mask_image_logits=False).logits[0, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert curves["text_loss"] == pytest.approx(float(nll[1:3].mean()), rel=1e-3)
    assert curves["image_loss"] == pytest.approx(float(nll[3:6].mean()), rel=1e-3)
    log_z = logits.logsumexp(-1)[1:6]  # of all that has weight; without a z-loss, too
    assert curves["log_z"] == pytest.approx(float(log_z.mean()), rel=1e-3)
    z_loss = train.Z_LOSS * float(log_z.square().mean())
    assert curves["z_loss"] == pytest.approx(z_loss, rel=1e-3)
    nothing = batch | dict(weight=torch.zeros(1, 8), total=torch.tensor(5.0))  # of one rank
    assert train.decoder_loss(small_model, nothing, 1e-4)[1] == {}


def test_what_a_layer_adds_begins_small_and_is_dropped_at_both_ends(tokenizer):
    options = train.parse(["pretrain", "--out", "x", "--dropout", "0.5", "--no-qk-norm"])
    model = train.build_model(tokenizer, ChameleonVQVAE(vqvae_stage.VQ), options)
    train.add_parts(model, options)
    for layer in model.model.layers:
        adding = (layer.self_attn.o_proj, layer.mlp.down_proj)
        for part in (layer.self_attn.q_proj, layer.mlp.up_proj, *adding):
            size = 0.02 / (12**0.5 if part in adding else 1)
            assert part.weight.std().item() == pytest.approx(size, rel=0.1)
            assert len(part._forward_hooks) == (part in adding)
        norms = layer.self_attn.q_norm, layer.self_attn.k_norm
        assert all(type(norm) is torch.nn.Identity for norm in norms)


@pytest.mark.parametrize("swin_norm", [False, True])
def test_the_query_norm_is_that_of_the_projection_in_the_forward_pass(swin_norm):
    sizes = SIZES | dict(vq_config=SMALL_VQ, vocabulary_map=scrambled_vocabulary())
    model = ChameleonForConditionalGeneration(ChameleonConfig(**sizes, swin_norm=swin_norm)).eval()
    randomize(model)
    measure, seen = train.QueryNorm(model), []
    last = model.model.layers[-1].self_attn.q_proj
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.arange(12).view(2, 6))
    heads = seen[0].unflatten(-1, (model.config.num_attention_heads, -1))  # (2, 6, H, D / H)
    assert measure() == pytest.approx(heads.norm(dim=-1).mean().item(), rel=1e-6)
    measure.q = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # the second is padding
    assert measure() == 5


def test_dropout_from_outside_works_in_training_only(small_model):
    import copy

    model = copy.deepcopy(small_model)
    train.add_parts(model, argparse.Namespace(data="x", train="all", no_qk_norm=False, dropout=0.5))
    ids = torch.randint(74, V, (1, 12))
    with torch.no_grad():
        plain = small_model(ids).logits
        assert torch.equal(model.eval()(ids).logits, plain)
        assert not torch.allclose(model.train()(ids).logits, plain)


# --- the VQ-VAE stage


def small_codebook(moved: bool = False) -> tuple[ChameleonVQVAE, vqvae_stage.Codebook]:
    """A new codebook; with `moved`, one whose code vectors are far apart."""
    torch.manual_seed(0)
    vq = ChameleonVQVAE(vqvae_stage.VQ)
    if moved:
        torch.nn.init.normal_(vq.quantize.embedding.weight)
    return vq, vqvae_stage.Codebook(vq)


def test_the_foreground_is_the_things():
    scene = world.sample_scene(rng(1), 1)
    thing = vqvae_stage.foreground(torch.from_numpy(world.render_pixels([scene])))[0, 0]
    y, x = (world.SIDE // 3 * n + world.SIDE // 6 for n in scene.things[0].place)
    assert thing[y, x] == 1 and 0.01 < thing.mean() < 0.12
    assert thing[0, 0] == 0


def test_moving_averages_move_codes_to_the_vectors_that_chose_them():
    _, codebook = small_codebook(moved=True)
    target, before = torch.full((8, 32), 3.0), codebook.e.clone()
    codes, level = torch.full((8,), 7), torch.zeros(8, dtype=torch.long)
    for _ in range(2000):
        codebook.update(target, codes, torch.ones(8, dtype=torch.bool), level)
    torch.testing.assert_close(codebook.e[7], target[0], rtol=1e-2, atol=1e-2)
    assert torch.allclose(codebook.e[8], before[8], atol=1e-4)


def test_duplicates_of_a_background_are_given_to_things():
    _, codebook = small_codebook(moved=True)
    K, z = codebook.K, codebook.e.clone()
    codes = torch.cat([torch.arange(K), torch.tensor([0, 0, 1])])  # 0 and 1: plain background
    thing = torch.cat([torch.arange(K) > 1, torch.zeros(3, dtype=torch.bool)])
    codebook.update(z[codes], codes, thing, torch.full((K + 3,), 255))
    codebook.revive(retire=False)  # code 1; code 0 is used more often and stays
    assert torch.allclose(codebook.e[0], z[0], atol=1e-5)
    assert (codebook.e[1] - z[thing[:K]]).abs().sum(1).min() < 1e-5


def test_a_network_begins_as_a_nearly_linear_one():
    torch.manual_seed(0)
    vq = ChameleonVQVAE(vqvae_stage.VQ).eval()
    vqvae_stage.initialize(vq)
    a, b = torch.from_numpy(world.render_pixels([world.sample_scene(rng(n), 3) for n in (1, 2)]))
    with torch.no_grad():
        one, two, middle = vq.quant_conv(vq.encoder(torch.stack((a, b, (a + b) / 2))))
        assert ((one + two) / 2 - middle).norm() < 0.3 * (one - two).norm()
        block = vq.encoder.mid.block_1
        x = torch.randn(1, 64, 9, 9)
        assert torch.equal(block(x), x)  # residual branches begin at zero


def test_a_codebook_starts_among_the_vectors_and_no_code_is_left_elsewhere():
    vq, codebook = small_codebook()
    vectors = torch.randn(20, 32) + 9
    codebook.start(vectors.repeat(30, 1), torch.ones(600))
    assert torch.cdist(codebook.e, vectors).min(1).values.max() < 0.1
    assert len(vq.quantize.nearest(vectors).unique()) == 20
    assert torch.equal(codebook.sum, codebook.e) and codebook.count.unique() == 1


def test_one_moving_average_by_hand():
    """A vector of background weighs PLAIN, and is no new home for a dead code."""
    _, codebook = small_codebook()
    d, before = codebook.DECAY, codebook.sum.clone()
    z, thing = torch.randn(2, 32), torch.tensor([True, False])
    codebook.update(z, torch.tensor([3, 4]), thing, torch.tensor([7, 255]))
    for n, (code, w) in enumerate(((3, 1 - d), (4, (1 - d) * codebook.PLAIN))):
        assert codebook.count[code] == pytest.approx(d + w)
        torch.testing.assert_close(codebook.sum[code], d * before[code] + w * z[n])
        torch.testing.assert_close(codebook.e[code], codebook.sum[code] / codebook.count[code])
    assert codebook.uses.nonzero().flatten().tolist() == [3, 4]
    assert codebook.plain.nonzero().tolist() == [[255, 4]] and torch.equal(codebook.pool, z[:1])
    many = torch.arange(2005.0)[:, None].expand(-1, 32)
    zero = torch.zeros(2005, dtype=torch.long)
    codebook.update(many, zero, zero == 0, zero)
    assert torch.equal(codebook.pool, many[-2000:])  # the latest


@pytest.mark.parametrize("retire", [False, True])
def test_unused_codes_move_to_things_and_retired_ones_out_of_reach(retire):
    vq, codebook = small_codebook(moved=True)
    z = codebook.e.clone()
    codes = torch.cat([torch.arange(codebook.K - 1), torch.tensor([0, 0, 1])])  # never the last
    thing = torch.cat([torch.arange(codebook.K - 1) > 1, torch.zeros(3, dtype=torch.bool)])
    codebook.update(z[codes], codes, thing, torch.full((len(codes),), 255))
    codebook.revive(retire)
    assert not codebook.uses.any() and not codebook.plain.any()
    if retire:  # the duplicate alone; an average more leaves it there
        codebook.update(z[2:3], torch.tensor([2]), torch.tensor([True]), torch.tensor([255]))
        assert codebook.e[1].min() > 99 and torch.allclose(codebook.e[-1], z[-1])
        assert 1 not in vq.quantize.nearest(z)
    else:
        moved = torch.cdist(codebook.e[[1, -1]], z[2:-1]).min(1).values
        assert moved.max() < 0.1


@pytest.mark.parametrize("quantized", [False, True])
def test_the_loss_of_the_vqvae_by_hand(quantized):
    pixels = torch.full((2, 3, 36, 36), 255 * 0.0078 - 1)  # white
    pixels[0, :, 10, 20] = -1  # a thing of one pixel
    error = torch.zeros_like(pixels)
    error[0, :, 10, 22], error[0, :, 10, 23] = 0.5, -0.2  # two pixels from it, and three
    z, codes = torch.randn(2, 32, 9, 9), torch.arange(162).view(2, 81)
    losses = types.SimpleNamespace(commitment=torch.tensor(0.8), perplexity=torch.tensor(7.0))
    vq = types.SimpleNamespace(
        encoder=lambda pixels: z, quant_conv=lambda z: z, quantize=lambda z: (z + 1, codes, losses),
        post_quant_conv=lambda z: z, decoder=lambda z: pixels + error)
    loss, curves, patches = vqvae_stage.vqvae_loss(vq, pixels, quantized)
    weights = 2 * 36 * 36 + 5 * 25
    wanted = (6 * (0.5 + 0.25) + (0.2 + 0.04)) / weights
    assert float(loss) == pytest.approx(wanted + quantized * vqvae_stage.VQ.beta * 0.8, rel=1e-3)
    assert curves["psnr"] == pytest.approx(
        10 * np.log10(4 / ((0.25 + 0.04) / (2 * 36 * 36))), abs=1e-3)
    if quantized:
        vectors, chosen, thing, level = patches
        assert torch.equal(vectors[9 * 2 + 5], z[0, :, 2, 5])
        assert torch.equal(vectors[-1], z[1, :, 8, 8])
        assert chosen.tolist() == list(range(162)) and set(level.tolist()) == {255}
        assert thing.nonzero().tolist() == [[9 * 2 + 5]]


def test_the_codebook_waits_for_the_network_and_rests_at_the_end(tmp_path, monkeypatch):
    """Of 20 steps: from the third on, to the 18th, the last two of which retire duplicates."""
    called, updated = [], []

    def loss(vq, pixels, quantized):
        called.append(quantized)
        return vq.quant_conv.weight.square().sum(), {}, (len(called) - 1,) * quantized

    monkeypatch.setattr(vqvae_stage, "vqvae_loss", loss)
    monkeypatch.setattr(vqvae_stage, "codebook_sample", lambda *_: (len(called), 0))
    monkeypatch.setattr(world, "render_pixels", lambda scenes: np.zeros(1))
    monkeypatch.setattr(Run, "save", lambda *_: None)
    monkeypatch.setattr(evaluate, "survival", lambda *_: 1.0)
    book, rates = vqvae_stage.Codebook, []
    monkeypatch.setattr(book, "EVERY", 1)
    monkeypatch.setattr(book, "start", lambda self, step, _: updated.append(("start", step)))
    monkeypatch.setattr(book, "update", lambda self, step: updated.append(step))
    monkeypatch.setattr(book, "revive", lambda self, retire: updated.append(retire))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        self.param_groups[0]["lr"]))
    assert train.main(["vqvae", "--steps", "20", "--out", str(tmp_path / "o")]) == 0
    assert called == [False] * 2 + [True] * 18
    assert updated[0] == ("start", 2) and updated[1::2] == list(range(2, 18))
    assert updated[2::2] == [False] * 14 + [True] * 2
    assert rates == [1e-3 * train.rate("vqvae", step, 20) for step in range(20)]


def test_the_vqvae_learns_from_held_out_compositions_too(tmp_path, monkeypatch):
    """It learns pixels, no words; without them it would not know the colours of these shapes."""
    seen, render = {}, world.render_pixels

    def watch(scenes):
        things = seen.setdefault(len(scenes), set())  # 6 a step, 16 where the codebook starts
        things |= world.pairs(*scenes)
        return render(scenes)

    monkeypatch.setattr(world, "render_pixels", watch)
    monkeypatch.setattr(evaluate, "survival", lambda *_: 1.0)  # slow, and not asked here
    assert train.main(["vqvae", "--steps", "4", "--out", str(tmp_path / "o")]) == 0
    assert seen[vqvae_stage.BATCH] >= world.HELD_OUT and seen[16] >= world.HELD_OUT


# --- the run


@pytest.mark.parametrize("options, words", [
    (["all"], "--out"), (["all", "--out", ""], "name of a folder"),
    (["sft", "--data", "d", "--out", str(train.TINY)], "would replace"),
    (["sft", "--out", "x", "--threads", "0"], "--threads"),
    (["evaluate", "--out", "x", "--questions", "0"], "--questions"),
    (["sft", "--out", "x", "--learning-rate", "nan"], "--learning-rate"),
    (["sft", "--out", "x", "--seed", "-1"], "--seed"),
    (["sft", "--out", "x", "--train", "lora"], "--train is for sft --data, not for sft"),
    (["sft", "--out", "x", "--epochs", "0"], "--epochs"),
    (["sft", "--out", "x", "--data", "d", "--no-qk-norm"],
     "--no-qk-norm is for pretrain, sft, not for sft --data"),
    (["all", "--out", "x", "--no-qk-norm"], "is for pretrain, sft, not for all"),
    (["sft", "--out", "x", "--model", "m"], "--model is for sft --data"),
    (["sft", "--out", "x", "--epochs", "3"], "--epochs is for sft --data"),
    (["tokenizer", "--out", "x", "--learning-rate", "0.1"], "not for tokenizer"),
    (["vqvae", "--out", "x", "--norm-order", "swin"], "all, pretrain, sft, not for vqvae"),
    (["evaluate", "--out", "x", "--compile"], "sft --data, not for evaluate"),
    (["sft", "--out", "x", "--questions", "5"], "--questions is for all, evaluate, not for sft"),
    (["evaluate", "--out", "x", "--seed", "5"], "vqvae, not for evaluate"),
    (["tokenizer", "--out", "x", "--steps", "5"], "vqvae, not for tokenizer"),
    (["sft", "--out", "x", "--data", "nowhere"], "--data nowhere is no folder"),
    (["sft", "--out", "x", "--data", "d", "--epochs", "3", "--steps", "2"], "with argument"),
    (["sft", "--out", "x", "--device", "abacus"], "abacus"),
    (["sft", "--out", "taken"], "taken.train"),  # a file
    (["sft", "--out", ".."], "--out must be the name"),
    (["sft", "--out", "x", "--seed", str(2**63)], "--seed must be from 0"),
    (["sft", "--out", "x", "--epochs", str(10**9)], "--epochs must be from 1 to 1000000"),
])
def test_options_that_cannot_work_are_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    Path("taken.train").touch()
    try:
        code = train.main(options)
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err
    assert code == 2 and words in message and message.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04"])
def test_a_damaged_state_is_named(tmp_path, capsys, content):
    file, arguments = tmp_path / "o.train" / "vqvae.pt", ["vqvae", "--out", str(tmp_path / "o")]
    file.parent.mkdir()
    file.write_bytes(content)
    assert train.main(arguments) == 2
    message = capsys.readouterr().err
    assert "vqvae.pt is damaged" in message and message.count("\n") == 1
    vq = ChameleonVQVAE(vqvae_stage.VQ)
    torch.save({"model": vq.state_dict(), "step": 2}, file)
    assert train.main(arguments) == 2
    message = capsys.readouterr().err
    assert "vqvae.pt is damaged" in message and message.count("\n") == 1


def test_two_runs_never_share_a_state(tmp_path, capsys):
    state = tmp_path / "o.train"
    state.mkdir()
    with hold(state):
        assert train.main(["vqvae", "--steps", "1", "--out", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert f"another process writes to {state}" in message and message.count("\n") == 1


@pytest.mark.parametrize("stage", ["vqvae", "sft"])
def test_a_gradient_that_is_no_number_is_not_learned(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    data = ["--data", str(own_folder(tmp_path, HELLO))] if stage == "sft" else []
    out = tmp_path / "o"
    assert train.main([stage, "--steps", "2", "--out", str(out), *data]) == 2
    message = capsys.readouterr().err
    assert f"{stage}: the gradient of step 0 is inf or nan" in message and not out.exists()


def make_small(monkeypatch) -> None:
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    for name, value in dict(SIZES=train.SIZES | small, ROWS=2, PICTURES=20).items():
        monkeypatch.setattr(train, name, value)


def test_a_smoke_run_of_all_stages_resumes_and_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    make_small(monkeypatch)
    monkeypatch.setattr(train.Run, "EVERY", 1)
    # The table in small: every row of it is asked for below, of the shipped checkpoint.
    few, survival = ("caption of one thing", "two pictures: which"), evaluate.survival
    monkeypatch.setattr(evaluate, "BATCH", 2)
    monkeypatch.setattr(evaluate, "ROWS", {name: evaluate.ROWS[name] for name in few})
    monkeypatch.setattr(evaluate, "DRAWINGS", {"edit": evaluate.DRAWINGS["edit"]})
    monkeypatch.setattr(evaluate, "survival", lambda vq, _, **held_out: survival(vq, 2, **held_out))
    out = tmp_path / "tiny"
    threads = torch.get_num_threads()
    train.main(["all", "--out", str(out), "--steps", "3", "--questions", "2"])
    assert "caption of one thing" in capsys.readouterr().out
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json",
            "processor_config.json", "tokenizer.json", "tokenizer_config.json"} == names
    rows = (tmp_path / "tiny.train" / "curves.csv").read_text().splitlines()
    stages = [row.split(",")[0] for row in rows[1:]]
    assert stages == [name for name in ("vqvae", "pretrain", "sft") for _ in range(3)]
    train.main(["sft", "--out", str(out), "--steps", "4"])
    assert "goes on at step 3" in capsys.readouterr().err
    saved = torch.load(tmp_path / "tiny.train" / "sft.pt")
    assert saved["extra"].keys() == {"waiting"}
    rates = {group["lr"] for group in saved["optimizer"]["param_groups"]}
    assert rates == {train.LEARNING_RATE * train.rate("sft", 3, 4)}
    options = train.parse(["sft", "--out", str(out), "--steps", "3"])  # begins where pretrain ended
    vq = train.trained_vqvae(train.Run(options)).state_dict().values()
    assert all(torch.equal(p, p.bfloat16().float()) for p in vq)  # as it will be shipped
    begun = train.toy_world("sft", train.Run(options), rng())[0].state_dict()
    ended = torch.load(tmp_path / "tiny.train" / "pretrain.pt")["model"]
    assert all(torch.equal(begun[name], ended[name]) for name in ended)
    # What is shipped are plain tables, whose rows of codes are those the maps gave at the end.
    model = train.toy_world("sft", train.Run(options), rng())[0]
    model.load_state_dict(torch.load(tmp_path / "tiny.train" / "sft.pt")["model"])
    shipped = ChameleonForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert is_parametrized(model.lm_head) and not is_parametrized(shipped.lm_head)
    rounded = model.lm_head.weight.detach().bfloat16().float()
    assert torch.equal(shipped.lm_head.weight, rounded)
    # A step has its own share of practice, which is in words alone.
    with monkeypatch.context() as patch:
        patch.setattr(train, "PRACTICE", ((0.5, Shares(0.0, 0.0)), (1.0, Shares(1.0, 0.0))))
        for step, shows in ((0, True), (2, False)):
            batch = train.toy_world("sft", train.Run(options), rng())[-1](step)
            assert torch.isin(batch["ids"], model.model.vocabulary.code_to_id).any() == shows
    # Without QK-norm there are curves, but no weights that no class could read.
    alone = tmp_path / "alone"
    (tmp_path / "alone.train").mkdir()
    alone.mkdir()
    shutil.copy(out / "tokenizer.model", alone)
    shutil.copy(tmp_path / "tiny.train" / "vqvae.pt", tmp_path / "alone.train")
    capsys.readouterr()
    assert train.main(["pretrain", "--no-qk-norm", "--out", str(alone), "--steps", "2"]) == 0
    assert "weights without QK-norm are not exported" in capsys.readouterr().err
    assert not (alone / "config.json").exists()
    # The weights before fit the options and the tokenizer, or are not used.
    for stage, option in ((["sft", "--norm-order", "swin"], "--norm-order pre: give it to sft"),
                          (["tokenizer", "--seed", "5"], "would change, and pretrain has used it")):
        assert train.main([*stage, "--out", str(out)]) == 2
        assert option in capsys.readouterr().err
    # Another stage's weights of another kind are named, not loaded.
    capsys.readouterr()
    assert train.main(["sft", "--no-qk-norm", "--out", str(out), "--steps", "3"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vqvae: its weights of step 3 are used\n")
    assert "pretrain.pt was saved with other options" in message and message.count("\n") == 2
    assert torch.get_num_threads() == threads


FIRST_STEPS = ["pretrain", "--steps", "2", "--optimizer", "adamw", "--learning-rate", "1e-3"]
RANK = f"""
import os
import sys
import torch
import train
torch.set_num_threads(1)
train.SIZES |= dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
train.SIZES["num_attention_heads"], train.ROWS, train.PICTURES = 2, 2, 20
code = train.main([*{FIRST_STEPS}, "--out", sys.argv[1]])
os._exit(code)  # torch's own threads now and then abort a process of two that ends
"""


def test_two_processes_learn_what_one_learns(tmp_path, monkeypatch):
    """FSDP2 over gloo: the same gradients, the same weights after two steps. By AdamW, because Muon
    makes the rounding errors of so few rows as large as the gradient.
    """
    torch.manual_seed(0)
    vq = ChameleonVQVAE(vqvae_stage.VQ).state_dict()
    for name in ("one", "two"):
        (tmp_path / f"{name}.train").mkdir()
        (tmp_path / name).mkdir()
        state = {"model": vq, "step": 0, "extra": None}
        torch.save(state, tmp_path / f"{name}.train" / "vqvae.pt")
        shutil.copy(TINY / "tokenizer.model", tmp_path / name)
    running = start_two(RANK, tmp_path / "two")
    make_small(monkeypatch)
    assert train.main([*FIRST_STEPS, "--out", str(tmp_path / "one")]) == 0
    ended(running)
    one, two = (torch.load(tmp_path / f"{n}.train" / "pretrain.pt") for n in ("one", "two"))
    assert one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        # Adam divides by the gradient's own size, so equal steps need gradients equal in sign
        # and proportion; a wrong share of the loss would differ by the whole step, 1e-3.
        far = (weight - two["model"][name]).abs() > 2e-4
        assert far.float().mean() < 0.02, name
    texts = [(tmp_path / f"{n}.train" / "curves.csv").read_text() for n in ("one", "two")]
    curves = [list(csv.DictReader(text.splitlines())) for text in texts]
    for name in ("q_norm", "grad_norm"):
        values = [float(rows[0][name]) for rows in curves]
        assert values[0] == pytest.approx(values[1], rel=0.02), name


# --- one's own data

HELLO = {"prompt": "Hi", "answer": "Hello"}
ZEBRAS = [{"prompt": "What is it?<image>", "images": ["a.png"], "answer": "A zebra."},
          {"prompt": "Draw a zebra.", "images": ["a.png"], "answer": "<image>"}]


def own_folder(tmp_path: Path, *lines: object) -> Path:
    Image.fromarray(world.render(world.sample_scene(rng()), 100)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "data.jsonl").write_text(text)
    return tmp_path


def test_examples_are_read_in_order(tmp_path):
    line = {"prompt": "Is <image> like <image>?", "images": ["a.png", "a.png"], "answer": "Yes."}
    folder = own_folder(tmp_path, line, "", HELLO)
    first, second = documents.read_examples(folder)
    assert first == (f"{folder / 'data.jsonl'} line 1", line["prompt"], [folder / "a.png"] * 2,
                     "Yes.")
    assert second[0].endswith("line 3") and second[1:] == ("Hi", [], "Hello")


def test_own_documents_are_those_of_the_writer_and_an_epoch_is_each_of_them_once(tmp_path, tiny):
    model, processor = tiny
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    folder = own_folder(tmp_path, {"prompt": "Like <image>?", "images": ["a.png", "b.png"],
                                   "answer": "So: <image>"},
                        *({"prompt": f"{n}?", "answer": "Hello"} for n in range(4)))
    corpus = documents.OwnData(documents.read_examples(folder), model, processor, seed=0)
    pixels = processor.image_processor([str(folder / name) for name in ("a.png", "b.png")],
                                       return_tensors="pt")["pixel_values"]
    one, two = (documents.Corrupted(x, x) for x in model.model.vqmodel.encode(pixels).numpy())
    writer = Writer(processor.tokenizer, {})
    wanted = writer.chat((("Like ", one, "?"), ("So: ", two)))
    assert corpus.documents[0].ids == wanted.ids and len(corpus.documents) == 5
    assert corpus.documents[0].weight == pytest.approx(wanted.weight)
    drawn = [row.tolist() for step in range(5) for row in corpus.batch(step, 2)["ids"]]
    seen = [[i for i in row if i != processor.tokenizer.pad_token_id] for row in drawn]
    for epoch in (seen[:5], seen[5:]):
        assert sorted(epoch) == sorted(document.ids for document in corpus.documents)
    assert seen[:5] != seen[5:]


def test_files_of_examples_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    names = [f"{letter}.jsonl" for letter in "bca"]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"prompt": name, "answer": "x"}))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / name for name in names]))
    assert [line.prompt for line in documents.read_examples(tmp_path)] == sorted(names)


def test_a_line_may_fill_the_context_but_no_more(tmp_path, tiny, monkeypatch):
    model, processor = tiny
    examples = documents.read_examples(own_folder(tmp_path, HELLO))
    length = len(documents.OwnData(examples, model, processor, seed=0).documents[0].ids)
    for limit in (length, length - 1):
        monkeypatch.setattr(model.config, "max_position_embeddings", limit)
        with pytest.raises(ValueError, match="line 1") if limit < length else nullcontext():
            documents.OwnData(examples, model, processor, seed=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("9" * 5000, "broken JSON"),
        ([1], "must be an object"),
        ({"prompt": "Hi"}, "'answer' must be a text"),
        ({"prompt": "", "answer": "x"}, "'prompt' must be a text"),
        ({"prompt": "Hi", "answer": "x", "image": "a.png"}, "unknown key 'image'"),
        ({"prompt": "Hi", "answer": "x", "images": "a.png"}, "'images' must be a list"),
        ({"prompt": "Hi", "answer": "x", "images": ["a.png"]}, "0 <image> but 1 file"),
        ({"prompt": "<image>", "answer": "x"}, "1 <image> but 0 file"),
        ({"prompt": "<image>", "answer": "x", "images": ["b.png"]}, "b.png"),
        ({"prompt": "<image>", "answer": "x", "images": ["broken.png"]}, "broken.png"),
        ({"prompt": "a " * 999, "answer": "b " * 99}, "tokens, the model holds 1024"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, capsys, line, words):
    folder = own_folder(tmp_path, HELLO, line)
    out = tmp_path / "out"
    assert train.main(["sft", "--data", str(folder), "--out", str(out), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data.jsonl line 2: " in error and words in error


def tuned(folder: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """train.py sft on two lines, from tiny/ -> the weights that it left."""
    assert train.main(["sft", "--data", str(own_folder(folder, *ZEBRAS)), "--out", str(out),
                       *options]) == 0
    return evaluate.load(out)[0].state_dict()


def test_own_data_is_learned_from_the_shipped_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "OWN_ROWS", 2)
    tuned(tmp_path, tmp_path / "out", "--steps", "40")
    asked = [[["What is it?", Image.open(tmp_path / "a.png")]]]
    assert evaluate.answer(*evaluate.load(tmp_path / "out"), asked) == ["A zebra."]


def test_a_step_learns_its_own_gradient_and_no_more_than_the_limit(tmp_path, monkeypatch):
    """Its norm is 0.5, 0.5 again, and 1 where it would be 9."""
    sizes, norms, factors = iter((0.5, 0.5, 9.0)), [], []

    def loss(model, batch, z_weight):
        factors.append(z_weight)
        weight = model.lm_head.parametrizations.weight[0].rows
        return next(sizes) * weight.sum() / weight.numel() ** 0.5, {}

    def step(self):
        norms.append(float(self.param_groups[0]["params"][0].grad.norm()))

    monkeypatch.setattr(train, "decoder_loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train, "QueryNorm", lambda model: lambda: 0.0)
    tuned(tmp_path, tmp_path / "out", "--steps", "3", "--train", "image-head", "--no-z-loss")
    assert norms == pytest.approx([0.5, 0.5, 1.0], rel=1e-3) and factors == [0.0] * 3


def test_each_line_is_learned_in_each_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "OWN_ROWS", 4)
    folder, seeds = own_folder(tmp_path, *[HELLO] * 3), []
    options = train.parse(["sft", "--data", str(folder), "--out", str(tmp_path / "o"),
                           "--seed", "3"])
    assert options.optimizer == "adamw"  # the paper's; of the toy world it is Muon
    monkeypatch.setattr(train, "OwnData", lambda *given: seeds.append(given[-1]) or (
        documents.OwnData(*given)))
    assert train.own_data(train.Run(options))[2] == 3  # 9 lines, 4 a step
    options.epochs = 1
    assert train.own_data(train.Run(options))[2] == 1 and seeds == [3, 3]


def test_weights_that_learn_are_fp32_and_those_that_do_not_may_be_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fast_bf16", lambda device: True)
    folder = own_folder(tmp_path, *ZEBRAS)
    for kind, dtype in (("all", torch.float32), ("image-head", torch.bfloat16)):
        options = train.parse(["sft", "--data", str(folder), "--out", str(tmp_path / "o"),
                               "--train", kind])
        assert train.own_data(train.Run(options))[0].dtype == dtype


def test_a_smoke_run_asks_as_few_questions_as_it_makes_steps():
    for more, wanted in (([], 200), (["--steps", "3"], 3), (["--steps", "300"], 200),
                         (["--steps", "3", "--questions", "5"], 5)):
        assert train.parse(["all", "--out", "x", *more]).questions == wanted


def test_every_stage_begins_with_the_seed_and_the_processor_is_left_as_it_was(tmp_path,
                                                                             monkeypatch):
    drawn = []
    for stage in train.STAGES:
        monkeypatch.setitem(train.STAGES, stage, lambda run: drawn.append(float(torch.rand(()))))
    assert train.main(["all", "--out", str(tmp_path / "a"), "--seed", "3"]) == 0
    torch.manual_seed(3)
    assert drawn == [float(torch.rand(()))] * len(train.STAGES)
    assert float(torch.tensor([1e-39]) * 1) > 0  # small numbers are numbers again


def test_each_stage_draws_documents_of_its_own_and_so_does_each_seed(tmp_path, monkeypatch):
    def prepare(stage, run, rng):
        drawn.add(rng.random())
        raise ValueError

    drawn = set()
    monkeypatch.setattr(train, "toy_world", prepare)
    for stage in train.STEPS:
        for seed in ("1", "1", "2"):
            assert train.main([stage, "--seed", seed, "--out", str(tmp_path / "o")]) == 2
    assert len(drawn) == 4


def test_the_end_of_pretraining_reads_every_second_batch_as_sft(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "trained_tokenizer", lambda run: tokenizer)
    monkeypatch.setattr(train, "trained_vqvae", lambda run: ChameleonVQVAE(vqvae_stage.VQ))
    monkeypatch.setattr(Pictures, "encode", lambda self, *_: self)
    for name in ("sft", "pretrain"):
        monkeypatch.setattr(Corpus, name, lambda self, room, name=name: drawn.append(name) or (
            Document([5] * 256, [1.0] * 256, [0] * 256, [5] * 256)))
    sample, asked = Pictures.sample, []
    monkeypatch.setattr(Pictures, "sample", lambda *given: asked.append(given) or sample(*given))
    options = train.parse(["pretrain", "--steps", "20", "--out", str(tmp_path / "o"),
                           "--seed", "3"])
    batch_of, kinds = train.toy_world("pretrain", Run(options), rng())[-1], []
    assert asked == [(3, 2000)] and options.optimizer == "muon"
    for step in range(20):
        drawn = []
        batch_of(step)
        kinds += {*drawn}
        assert len(drawn) == train.ROWS
    assert [step for step, kind in enumerate(kinds) if kind == "sft"] == [17, 19]


def test_a_vqvae_that_bf16_cannot_hold_is_written_as_it_was(tmp_path):
    model, processor = evaluate.load(TINY)[:2]
    with torch.no_grad():
        for weight in model.model.vqmodel.parameters():
            weight *= 1.0001
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    weights = tuned(tmp_path, tmp_path / "out", "--model", str(tmp_path / "base"), "--steps", "1")
    for name, weight in model.state_dict().items():
        if ".vqmodel." in name:
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("width, learned, wanted", [
    (192, "lora", 1e-3), (4096, "all", 1e-5), (1024, "lora", 1e-4), (8192, "image-head", 1e-4)])
def test_wide_models_learn_at_the_papers_rate(width, learned, wanted):
    assert train.own_rate(width, learned) == wanted


def test_without_a_terminal_progress_is_lines_and_three_epochs_are_the_default(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    monkeypatch.setattr(train.Run, "PAUSE", 0)
    tuned(tmp_path, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: ")]
    assert [line.split(",")[0] for line in lines] == [f"sft: {n} of 6" for n in range(1, 7)]
    assert "_loss " in lines[-1] and lines[-1].endswith(" 0 s to go")
    rows = (tmp_path / "out.train" / "curves.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["sft", "0"], ["sft", "5"]]  # and the last
    loss = rows[-1].split(",")[rows[0].split(",").index("text_loss")]
    assert f"text_loss {float(loss):.3f}" in lines[-1]
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(read).__name__ == "ChameleonProcessor"


def test_image_head_learns_the_rows_of_the_codes_and_nothing_else(tmp_path):
    before = evaluate.load(TINY)[0].state_dict()
    after = tuned(tmp_path, tmp_path / "out", "--train", "image-head", "--checkpointing")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lm_head.weight"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero()[:, 0]
    codes = load_tokenizer(TINY).vocabulary.code_to_id
    assert set(rows.tolist()) <= set(codes.tolist()) and len(rows) > len(codes) / 2


def test_lora_is_saved_as_an_adapter_and_merged_and_both_write_the_same(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(train, "OWN_ROWS", 2)
    out = tmp_path / "out"
    tuned(tmp_path, out, "--train", "lora", "--steps", "40", "--learning-rate", "0.01")
    merged, processor = evaluate.load(out)
    adapter = peft.PeftModel.from_pretrained(evaluate.load(TINY)[0], out / "adapter")
    picture, ask = [Image.open(tmp_path / "a.png")], ["What is it?<image>"]
    example = processor(text=ask, images=picture, answers=["A zebra."])
    with torch.no_grad():
        before, apart, whole = (model(**example).loss.item() for model in (
            evaluate.load(TINY)[0], adapter, merged))
        inputs = processor(text=ask, images=picture)
        ids = [model.generate(**inputs, max_new_tokens=20) for model in (adapter, merged)]
    assert whole < before / 3 and apart == pytest.approx(whole, rel=0.05, abs=0.01)
    assert torch.equal(*ids)
    before = evaluate.load(TINY)[0].state_dict()
    changed = {name for name, weight in merged.state_dict().items()
               if not torch.equal(weight, before[name])}
    assert changed and all("_proj.weight" in name for name in changed)


def test_the_smoke_runs_weights_depend_on_the_seed_alone(corpus):
    """The same seed draws the same documents; another seed draws others."""
    def first(seed):
        twin = Corpus(corpus.writer, corpus.pictures, rng(seed))
        return [twin.sft(200).ids for _ in range(5)]

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize("kind", ["all", "lora", "image-head"])
def test_what_learns_in_part_is_resumed_too(tmp_path, kind, monkeypatch, capsys):
    """Two steps and two more give the weights of four, with a save in between and with dropout."""
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    monkeypatch.setattr(train.Run, "SAVE", 2)
    if kind == "lora":
        pytest.importorskip("peft")
    monkeypatch.setattr(train, "rate", lambda *_: 1.0)
    _, a, b = (tuned(tmp_path, tmp_path / out, "--train", kind, "--steps", steps, "--seed", "3",
                     "--dropout", "0.1") for out, steps in (("a", "2"), ("a", "4"), ("b", "4")))
    assert "goes on at step 2" in capsys.readouterr().err
    tiny = evaluate.load(TINY)[0].state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], tiny[name]) for name in a)


def test_a_state_holds_the_random_numbers_and_the_documents_that_waited(tmp_path, monkeypatch):
    run, before, after = Run(train.parse(["vqvae", "--out", str(tmp_path / "a")])), rng(3), rng()
    run.extra, model = Rows(0), torch.nn.Linear(1, 1)
    run.extra.waiting = [Document([5], [1.0], [0], [5])]
    run.save("sft", 4, model, [], before)
    run.extra = Rows(0)
    assert run.resume("sft", model, [], after) == 4 and run.extra.waiting[0].ids == [5]
    assert after.random() == before.random()
    monkeypatch.setattr(Run, "SAVE", 2)
    assert [step for step in range(5) if run.due(step, 5)] == [1, 3, 4]


def test_rows_go_on_with_the_documents_that_waited(corpus):
    twin = Corpus(corpus.writer, corpus.pictures, rng(5))
    rows = documents.Rows(0)
    while not rows.waiting:
        rows.batch(twin.sft, 2, 256)
    state, numbers = rows.state_dict(), twin.rng.bit_generator.state
    expected = rows.batch(twin.sft, 2, 256)
    again, twin.rng.bit_generator.state = documents.Rows(0), numbers
    again.load_state_dict(state)
    got = again.batch(twin.sft, 2, 256)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_checkpoint_without_vqvae_decoder_is_tuned_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    model, processor = evaluate.load(TINY)
    model.model.vqmodel.decoder = None
    for part in (model, processor):
        part.save_pretrained(tmp_path / "blind")
    tuned(tmp_path, tmp_path / "out", "--model", str(tmp_path / "blind"), "--steps", "1")
    assert evaluate.load(tmp_path / "out")[0].model.vqmodel.decoder is None


def test_another_runs_checkpoint_is_never_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    shutil.copytree(TINY, tmp_path / "mine")
    ask = ["sft", "--data", str(own_folder(tmp_path, HELLO)), "--steps", "1", "--out"]
    assert train.main([*ask, str(tmp_path / "a")]) == 0
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    (tmp_path / "mine.train").mkdir()  # a command that fails leaves it empty
    assert train.main([*ask, str(tmp_path / "mine")]) == 2
    assert "mine.train, is not there: name another --out" in capsys.readouterr().err
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before
    assert train.main([*ask, str(tmp_path / "a")]) == 0  # its own


def test_compiled_layers_learn_as_plain_ones_and_the_curves_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = tuned(tmp_path, tmp_path / "compiled", "--steps", "1", "--compile")
    plain = tuned(tmp_path, tmp_path / "plain", "--steps", "1")
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight)
    curves = [(tmp_path / f"{kind}.train" / "curves.csv").read_text().splitlines()
              for kind in ("compiled", "plain")]
    norms = [float(next(csv.DictReader(lines))["q_norm"]) for lines in curves]
    assert norms[0] == pytest.approx(norms[1])


def test_without_a_compiler_all_is_refused_before_its_first_stage(tmp_path, monkeypatch, capsys):
    def refuse(device):
        raise ValueError("--compile needs a C++ compiler")

    monkeypatch.setattr(train, "check_compile", refuse)
    monkeypatch.setitem(train.STAGES, "vqvae", None)
    assert train.main(["all", "--compile", "--out", str(tmp_path / "a")]) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_a_saved_state_goes_on_with_its_own_options_and_data_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    folder, out = own_folder(tmp_path, ZEBRAS[1]), tmp_path / "out"
    asked = ["sft", "--data", str(folder), "--out", str(out), "--steps", "1"]
    assert train.main(asked) == 0
    shutil.rmtree(out)
    assert train.main(asked) == 0 and (out / "model.safetensors").is_file()
    assert "all 1 steps are done" in capsys.readouterr().err
    for more in (["--seed", "1"], ["--learning-rate", "0.01"]):
        assert train.main([*asked, *more]) == 2
        message = capsys.readouterr().err
        assert f"{more[0]} " in message and f", not {more[1]}: remove" in message
        assert message.count("\n") == 1
    shutil.copytree(out, tmp_path / "base")  # another model to start from
    for more, words in ((["--train", "image-head"], "saved with other options: give those, or"),
                        (["--dropout", "0.5"], "--dropout 0.0, not 0.5"),
                        (["--no-z-loss"], "--no-z-loss False, not True"),
                        (["--model", str(tmp_path / "base")], "first weights (fingerprint")):
        assert train.main([*asked, *more]) == 2 and words in capsys.readouterr().err
    moved = tmp_path / "moved" / "renamed"
    moved.parent.mkdir()
    for end in ("", ".train"):
        (tmp_path / f"out{end}").rename(f"{moved}{end}")
    asked[asked.index(str(out))] = str(moved)
    assert train.main(asked) == 0 and "all 1 steps are done" in capsys.readouterr().err
    own_folder(tmp_path, {"prompt": "Hi", "answer": "Good morning"})
    assert train.main(asked) == 2 and "--data (fingerprint" in capsys.readouterr().err
    assert train.main([*asked, "--train", "image-head"]) == 2
    assert "no answer holds <image>" in capsys.readouterr().err


def test_a_slow_run_is_saved_by_the_clock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "OWN_ROWS", 1)
    monkeypatch.setattr(train.Run, "SAVE_AFTER", 0)
    folder, step = own_folder(tmp_path, *ZEBRAS), train.decoder_loss
    losses = iter([step, step])

    def stopped(*arguments):
        model, _, z_weight = arguments
        assert model.training and model.is_gradient_checkpointing and z_weight == train.Z_LOSS
        for loss in losses:
            return loss(*arguments)
        raise KeyboardInterrupt

    ask = ["sft", "--data", str(folder), "--steps", "4", "--out", str(tmp_path / "out"),
           "--checkpointing"]
    monkeypatch.setattr(train, "decoder_loss", stopped)
    assert train.main(ask) == 130 and "goes on from the last save" in capsys.readouterr().err
    monkeypatch.setattr(train, "decoder_loss", step)
    assert train.main(ask) == 0 and "sft: goes on at step 2" in capsys.readouterr().err


def test_an_evaluation_that_was_stopped_promises_nothing(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(train.STAGES, "evaluate", stopped)
    assert train.main(["evaluate", "--out", str(TINY)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_survival_is_a_share_of_the_pictures_asked_for(tiny):
    seen = []

    def encode(pixels):
        seen.append(len(pixels))
        return tiny[0].model.vqmodel.encode(pixels)

    vq = types.SimpleNamespace(encode=encode, decode=tiny[0].model.vqmodel.decode, device="cpu")
    assert evaluate.survival(vq, 2) == 1 and seen == [2]


def test_a_full_disk_is_one_line_and_leaves_the_state_before(tmp_path, monkeypatch, capsys):
    def full(_, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("unexpected pos 576 vs 534")  # what torch.save says of it

    monkeypatch.setattr("torch.save", full)
    assert train.main(["vqvae", "--steps", "1", "--out", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert "vqvae.pt cannot be written, is the disk full?" in message and message.count("\n") == 1
    assert [path.name for path in (tmp_path / "o.train").iterdir()] == ["curves.csv"]


def test_own_lines_are_those_of_the_file_not_those_of_unicode(tmp_path):
    text = "a\u2028b\u2029c\u0085d"
    line = json.dumps({"prompt": text, "answer": "x"}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n{line}".encode())
    examples = documents.read_examples(tmp_path)
    assert [example.prompt for example in examples] == [text, text]
    assert examples[1].where.endswith("line 3")


# --- the shipped checkpoint


@pytest.fixture(scope="module")
def tiny():
    return evaluate.load(TINY)


# What each row of the table must reach on 100 questions, ordinary and held-out: a few points less
# than it did.
FLOORS = {
    "caption of one thing": (0.96, 0.96), "caption of two": (0.96, 0.96),
    "caption of three": (0.94, 0.94), "colour": (0.96, 0.95), "shape": (0.95, 0.95),
    "count": (0.96, 0.93), "background": (0.96, 0.96), "existence": (0.95, 0.95),
    "relation": (0.95, 0.95), "size": (0.95, 0.95), "place": (0.96, 0.95),
    "thing": (0.95, 0.94), "two pictures: in common": (0.96, 0.96),
    "two pictures: difference": (0.96, 0.95), "two pictures: which": (0.90, 0.88),
    "second turn": (0.95, 0.95), "third turn": (0.96, 0.95), "fourth turn": (0.94, 0.95),
    # Drawings, sampled once.
    "drawing of one thing": (0.95, 0.90), "drawing of two": (0.90, 0.83), "edit": (0.95, 0.91),
}  # fmt: skip


# 25 questions, one more of them wrong than the floor allows; the measure itself takes minutes.
@pytest.mark.parametrize("questions", [25, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", FLOORS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_shipped_checkpoint_still_answers_and_draws(tiny, row, held_out, questions):
    measure = evaluate.drawn_right if row in evaluate.DRAWINGS else evaluate.accuracy
    floor = FLOORS[row][held_out] - (1 / 25 if questions == 25 else 0)
    assert measure(*tiny, row, questions, held_out) >= floor


def test_half_of_the_table_shows_held_out_pairs_and_the_other_half_none(monkeypatch):
    generator, shown = rng(), []
    for name, sample in (evaluate.ROWS | evaluate.DRAWINGS).items():
        for held_out in [False, True] * 8:
            turns, wanted = sample(generator, held_out)
            pairs = world.pairs(*(part for turn in turns for part in turn
                                  if not isinstance(part, str)))
            if not pairs:  # what is to be drawn
                pairs = {(fields["colour"], fields["shape"]) for fields in wanted.things}
            assert bool(world.HELD_OUT & pairs) == held_out, name
            if name == "edit":
                assert wanted.background and len(wanted.things[0]) == 4
    monkeypatch.setattr(world, "render_pixels", lambda scenes: 1 / 0 if shown.append(scenes) else 0)
    for held_out in (False, True):
        with pytest.raises(TypeError):  # it stops where pictures would be rendered
            evaluate.survival(None, 9, held_out)
        assert all(held_out == bool(world.HELD_OUT & world.pairs(scene)) for scene in shown.pop())


def test_a_later_turn_follows_the_right_answers_to_the_turns_before(monkeypatch):
    given = iter([("q1", "a1"), None, ("q2", "a2"), None, None, ("q3", "a3")])  # None: no question
    monkeypatch.setattr(documents.language, "QUESTIONS", {"any": lambda *_: next(given)})
    turns, answer = evaluate.later_turn(3, rng(), False)
    said = [[part for part in turn if isinstance(part, str)] for turn in turns]
    assert said == [["q1"], ["a1"], ["q2"], ["a2"], ["q3"]] and answer == "a3"
    assert [len(turn) for turn in turns] == [2, 1, 1, 1, 1]  # the picture comes once


def test_a_share_is_that_of_the_answers_that_are_right_to_the_letter(monkeypatch):
    def almost(model, processor, conversations):
        right = [wanted.pop(0) for _ in conversations]
        return [text if n % 3 else text[:-1] for n, text in enumerate(right)]

    wanted = [text for _, _, batch in evaluate.batches(evaluate.ROWS, "place", 60, False)
              for text in batch]
    monkeypatch.setattr(evaluate, "answer", almost)
    assert evaluate.accuracy(None, None, "place", 60) == (33 + 6) / 60  # of 50, and of 10


def test_the_likelihood_of_a_drawing_is_that_of_its_codes(small_model):
    prompts = [[0, 80, 90, 72], [0, 85, 72]]
    codes, logp = evaluate.draw(small_model, left_padded(prompts), 3, 1.0)  # (2, S), (2,)
    begin = small_model.model.vocabulary.begin_image_id
    for prompt, own, likely in zip(prompts, codes, logp):  # each alone, without padding
        ids = torch.tensor([[*prompt, begin, *own]])
        with torch.inference_mode():
            logits = small_model(ids, mask_image_logits=False).logits[0, len(prompt) : -1]
        each = logits.log_softmax(-1)[torch.arange(len(own)), own]
        assert len(own) == 64 and float(likely) == pytest.approx(float(each.sum()), rel=1e-4)


def test_of_several_drawings_the_most_likely_counts(monkeypatch):
    seeds = []

    def draw(model, inputs, seed, guidance):
        seeds.append((seed, guidance))
        return torch.full((2, 4), len(seeds)), torch.tensor([-1.0 * len(seeds), 1.0 * len(seeds)])

    monkeypatch.setattr(evaluate, "draw", draw)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    monkeypatch.setattr(evaluate, "read", lambda *_: torch.zeros(()))
    monkeypatch.setattr(evaluate, "decode_pictures", lambda _, best: best[:, 0].tolist())
    monkeypatch.setattr(world, "read_scene", lambda picture: picture)
    monkeypatch.setattr(evaluate.language, "fulfils", lambda seen, _: counted.append(seen) or True)
    model, counted = types.SimpleNamespace(device="cpu"), []
    assert evaluate.drawn_right(model, None, "edit", 4, guidance=1.5, tries=3) == 1
    assert counted == [1, 3, 4, 6]  # of two pictures, one by its first try, one by its last
    assert len({seed for seed, _ in seeds}) == 6
    assert {guidance for _, guidance in seeds} == {1.5}


def test_the_table_has_the_ordinary_shares_first_and_the_guided_are_the_best_of_4(monkeypatch,
                                                                                  capsys):
    def measure(*given, held_out, **options):
        asked.append((given[-1], options))
        return 0.25 if held_out else 0.75

    asked, model = [], types.SimpleNamespace(model=types.SimpleNamespace(vqmodel=None))
    monkeypatch.setattr(evaluate, "load", lambda *_: (model, None))
    for name in ("survival", "accuracy", "drawn_right"):
        monkeypatch.setattr(evaluate, name, measure)
    evaluate.table(TINY, 10)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1 + len(evaluate.ROWS) + 2 * len(evaluate.DRAWINGS)
    assert all(row.endswith(" | 75.0% | 25.0% |") for row in rows)
    guided = [one for one in asked if one[1]]
    assert guided == [(3, dict(guidance=1.5, tries=4))] * 2 * len(evaluate.DRAWINGS)


def test_the_shipped_codes_keep_colour_and_shape(tiny):
    assert evaluate.survival(tiny[0].model.vqmodel, 100) >= 0.97


def test_weights_of_the_user_are_never_replaced(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("out", "is not there: name another --out"), ("file", "is no folder")):
        assert train.main(["vqvae", "--steps", "1", "--out", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").read_text() == "mine"


def test_a_tied_head_does_not_learn_alone():
    model = ChameleonForConditionalGeneration(ChameleonConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        code_rows.add_learned(model, "image-head")


def test_quantized_weights_are_refused_before_they_are_trained(tmp_path, untrained_folder, capsys):
    convert.convert(untrained_folder, tmp_path / "int8", quantize="int8")
    arguments = ["sft", "--data", str(own_folder(tmp_path, HELLO)), "--out", str(tmp_path / "out")]
    assert train.main([*arguments, "--model", str(tmp_path / "int8")]) == 2
    assert "holds int8 weights, which do not learn" in capsys.readouterr().err
