"""From scenes to training rows: documents in the model's own format, packed side by side.

    Corpus --draws--> Document --Rows packs--> ids, read, position, weight (B, T), mask (B, T, T)

    document of many questions about one picture, drawn as a tree:

        <s> <racm3:break> S codes <eoss> -+- question <reserved08706> answer </s>     branch 1
        branch 0, the shared beginning    +- question <reserved08706> answer </s>     branch 2
                                          +- ...

Letters: B rows, T tokens of a row, S codes of a picture, K codes of the codebook. `weight` is that
of a token's loss.

A picture costs S + 2 tokens, a question and its answer about 35, so one picture serves several.
But in plain sequence a later answer could be read off an earlier one; so branches do not see each
other, and positions of each go on right behind the shared beginning, as they will in a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizer import Tokenizer
from training import language, world
from training.pictures import Pictures
from training.world import Scene

IMAGE_WEIGHT = 0.6  # of a picture's token in the loss, relative to a text token's; the paper: 1
DECISION = 12.0  # of an answer's last sentence as a whole: often one word, but the one that counts
EMPTY_PROMPT = 0.1  # share of drawings without a prompt, for guidance
SLIPS = (0.0, 0.1, 0.3)  # share of a drawing's codes that are read wrongly, see Corpus.drawn
BLUR = (0.0, 0.3, 0.5)  # share of a given picture's codes read as similar ones, see Corpus.given


@dataclass
class Document:
    """One sequence, or several that share a beginning. All lists have one entry per token."""

    ids: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)  # of the loss of predicting THIS token
    branch: list[int] = field(default_factory=list)  # 0: the shared beginning, seen by all
    position: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)  # what the model reads: `ids`, but for slips

    def add(self, ids: list[int], weight: float | list[float], branch: int = 0,
            read: list[int] | None = None) -> None:
        """Continues a branch; its first token is placed right behind the shared beginning."""
        if branch and branch not in self.branch[-1:]:
            start = self.branch.count(0)
        else:
            start = self.position[-1] + 1 if self.ids else 0
        self.ids += ids
        self.read += read or ids
        self.weight += weight if isinstance(weight, list) else [weight] * len(ids)
        self.branch += [branch] * len(ids)
        self.position += range(start, start + len(ids))


class Picture(NamedTuple):
    """The codes of a picture (S,): those to be learned, and those read in their place."""

    codes: np.ndarray
    read: np.ndarray


class Writer:
    """Turns text and scenes into ids, in exactly the format of ChameleonProcessor.

        <s> text <racm3:break> S codes <eoss> text <reserved08706> answer </s>
    """

    def __init__(self, tokenizer: Tokenizer, codes: dict) -> None:
        self.tokenizer, self.codes = tokenizer, codes
        v = self.vocabulary = tokenizer.vocabulary
        self.code_to_id = v.code_to_id.numpy()
        self.bos, self.eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        self.turn = [v.end_of_turn_id]
        self.begin, self.end = [v.begin_image_id], [v.end_image_id]

    def write(self, document: Document, parts: Sequence, text: float, image: float) -> None:
        """Appends text (str) and pictures (Scene, Picture), with the weight of their tokens."""
        for part in parts:
            if isinstance(part, str):
                document.add(self.tokenizer.encode(part), text)
                continue
            both = part if isinstance(part, Picture) else (self.codes[part], self.codes[part])
            ids, read = (self.code_to_id[codes].tolist() for codes in both)
            weight = [text, *[image] * len(ids), text]  # the two marks count as text does
            document.add(self.begin + ids + self.end, weight, read=self.begin + read + self.end)

    def answer(self, text: str) -> tuple[list[int], list[float]]:
        """An answer to a question -> its ids with </s>, and the weight of each in the loss."""
        ids = self.tokenizer.encode(text) + self.eos
        last = 1 + len(self.tokenizer.encode(text.rsplit(". ", 1)[-1]))
        return ids, [1.0] * (len(ids) - last) + [max(1.0, DECISION / last)] * last

    def asked(self, prompt: Sequence) -> Document:
        """A prompt and the end of its turn, without loss: what an answer is added to."""
        document = Document()
        document.add(self.bos, 0.0)
        self.write(document, prompt, 0.0, 0.0)
        document.add(self.turn, 0.0)
        return document

    def question(self, prompt: Sequence, answer: str) -> Document:
        """One question about pictures, one answer; loss as `answer` weighs it."""
        document = self.asked(prompt)
        document.add(*self.answer(answer))
        return document

    def chat(self, prompt: Sequence, answer: Sequence) -> Document:
        """One prompt, one answer of text and pictures; loss on the answer and the final </s>."""
        document = self.asked(prompt)
        self.write(document, answer, 1.0, IMAGE_WEIGHT)
        document.add(self.eos, 1.0)
        return document

    def completion(self, *parts: str | Scene) -> Document:
        """Plain text and pictures, no turns; loss on every token."""
        document = Document()
        document.add(self.bos, 0.0)
        self.write(document, parts, 1.0, IMAGE_WEIGHT)
        document.add(self.eos, 1.0)
        return document

    def branches(
        self, shared: tuple, turns: list[tuple[str, str]], image: float, room: int
    ) -> Document:
        """What is shared first, then turns that do not see each other, as many as fit into `room`.

        turns: (question, answer) for chat; an empty question makes the answer a plain statement.
        Without a picture nobody could know what an answer begins with: no loss on that sentence.
        """
        document = Document()
        document.add(self.bos, 0.0)
        self.write(document, shared, image, image)
        for branch, (question, text) in enumerate(turns, start=1):
            question = self.tokenizer.encode(question) + self.turn if question else []
            answer, weight = self.answer(text)
            if not question:
                weight = 1.0
            elif not shared:
                seen = len(self.tokenizer.encode(text.split(". ")[0])) + 1  # and the full stop
                weight[:seen] = [0.0] * seen
            if len(document.ids) + len(question) + len(answer) > room:
                break
            document.add(question, 0.0, branch)
            document.add(answer, weight, branch)
        return document


# What a user may leave between a picture and the words beside it.
GAPS = ("",) * 6 + (" ", " ", "\n")
# How often each question is asked in sft: what is learned last is asked most.
ASKED = {
    "caption": 1.5, "existence": 3.0, "relation": 3.0, "shape": 1.5, "colour": 1.5,
    "size": 1.0, "place": 3.5, "count": 3.0, "background": 0.3,
}  # fmt: skip


class Corpus:
    """Draws documents about a fixed set of pictures, whose codes are computed once."""

    row_tokens = 384  # the paper: 4096
    shares = (0.14, 0.18)  # of practice and of lists in sft, until train.PRACTICE changes them

    def __init__(self, writer: Writer, pictures: Pictures, rng: np.random.Generator) -> None:
        self.writer, self.pictures, self.rng = writer, pictures, rng
        names = list(ASKED)
        weights = np.array([ASKED[name] for name in names])
        self.questions, self.asked = names, weights / weights.sum()

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, options):
        return world.pick(self.rng, options)

    def scene(self) -> Scene:
        return self.one_of(self.pictures.singles)

    def busy_scene(self) -> Scene:
        """Mostly two or three things: with one, a question is answered without being read."""
        scene = self.scene()
        while len(scene.things) == 1 and self.chance(0.5):
            scene = self.scene()
        return scene

    def question(self, scene: Scene) -> tuple[str, str]:
        while True:
            name = self.questions[self.rng.choice(len(self.questions), p=self.asked)]
            turn = language.QUESTIONS[name](self.rng, scene)
            if turn:
                return language.vary(self.rng, turn[0]), turn[1]

    def place_pictures(self, question: str, scenes: tuple) -> tuple:
        """Question and pictures in either order, each as often."""
        gap = self.one_of(GAPS)
        if self.chance(0.5):
            return (question + gap, *scenes)
        return (*scenes, gap + question)

    # --- pretraining: statements, no turns

    def statements(self, scene: Scene, n: int) -> list[str]:
        both = [language.caption(scene), language.look(scene)]
        return (both + [language.state(self.rng, scene) for _ in range(n)])[:n]

    def pretrain(self, room: int) -> Document:
        rng, writer, kind = self.rng, self.writer, self.rng.random()
        scene = self.scene()
        if kind < 0.35:  # picture first: many statements, each read off the picture alone
            turns = [("", text) for text in self.statements(scene, 12)]
            return writer.branches((scene,), turns, IMAGE_WEIGHT, room)
        if kind < 0.45:  # picture, then its caption and where things are
            return writer.completion(scene, " ".join(self.statements(scene, 2)))
        if kind < 0.77:  # caption first
            words = language.caption(scene) if self.chance(0.5) else None
            words = words or language.sentence(language.ask_drawing(rng, scene).text)
            prompt = () if self.chance(EMPTY_PROMPT) else (language.vary(rng, words),)
            return writer.completion(*prompt, scene)
        if kind < 0.85:  # interleaved
            other = self.scene()
            return writer.completion(
                language.caption(scene), scene, language.caption(other), other
            )
        if kind < 0.88:  # text alone
            return writer.completion(" ".join(self.statements(scene, 4)))
        return writer.completion(" ".join(self.again()))

    # --- sft: prompt and answer

    def sft(self, room: int) -> Document:
        """One of eight kinds. The shares are of documents. A practice document fills what is left
        of its row, so that a share of 0.14 makes 25 % of all tokens, and one of 0.36 makes 56 %.
        """
        kind, (practice, lists) = self.rng.random(), self.shares
        if kind < practice:
            return self.practice(room)
        if kind < practice + lists:
            return self.lists()
        kind = (kind - practice - lists) / (1 - practice - lists)  # 0..1 among the others
        if kind < 0.14:
            scene = self.busy_scene()
            turns = [self.question(scene) for _ in range(14)]
            gap = self.one_of(GAPS)
            turns = [(gap + question, answer) for question, answer in turns]
            return self.writer.branches(self.given(scene), turns, 0.0, room)
        if kind < 0.23:
            scene = self.busy_scene()
            question, answer = self.question(scene)
            return self.writer.question(self.place_pictures(question, self.given(scene)), answer)
        if kind < 0.62:
            return self.drawing()
        if kind < 0.81:
            return self.two_pictures(room)
        if kind < 0.98:
            return self.edit()
        question = self.one_of(language.SMALL_TALK)
        answer = language.SMALL_TALK[question]
        return self.writer.chat((language.vary(self.rng, question),), (answer,))

    def practice(self, room: int) -> Document:
        """Conclusions alone, from a description in words, as if it had been read off a picture.

        To describe a picture is learned long before, but to find one of its things again in the
        description takes some ten million tokens of practice, and a picture costs as many as six
        of these: <s> description -+- question <reserved08706> conclusion </s>, and so on. A third
        is in the order of a real answer, with the question in front.
        """
        rng, turns = self.rng, []
        in_order, kind = self.chance(0.35), rng.random()
        while len(turns) < (12 if in_order else 30):
            if in_order or not turns:  # one scene for all, or for each its own
                count = int(rng.choice((1, 2, 3), p=(0.3, 0.35, 0.35)))
                scene = world.sample_scene(rng, count, self.heard_of())
                pair = world.sample_pair(rng, self.chance(0.3))
                while pair[2] in ("colour", "both") and self.chance(0.6):
                    pair = world.sample_pair(rng, self.chance(0.3))  # equal shapes are found last
                edit = world.sample_edit(rng, self.chance(0.3))
            share = rng.random()
            if kind < 0.5:
                turn = self.question(scene)
            elif kind < 0.7:
                first, second, change = edit
                turn = language.ask_difference(rng, first, second, change)
                if share < 0.6:
                    turn = language.ask_which(rng, first, second)
            else:
                ask = language.ask_common if share < 0.6 else language.ask_which
                turn = ask(rng, *pair[:2])
            if turn and ". " in turn[1]:  # more than a description
                turns.append((language.vary(rng, turn[0]), turn[1]))
        if in_order:
            return self.writer.branches((), turns, 0.0, room)
        seen = turns[0][1].split(". ")[0] + "."
        turns = [(question, answer.removeprefix(seen + " ")) for question, answer in turns]
        return self.writer.branches((seen,), turns, 0.0, room)

    def heard_of(self) -> bool | None:
        """Half of the scenes in words have a HELD_OUT pair for sure: pictures never will."""
        return True if self.chance(0.5) else None

    def again(self) -> tuple[str, str]:
        """Many things in words, and each of them again, in another order.

        Finding again, as in `practice`, in its purest form: once colour and shape are said, the
        place can only be looked up, and with up to eight things a guess is seldom right.
        """
        scene = world.sample_scene(self.rng, int(self.rng.integers(3, 9)), self.heard_of())
        said = [language.found(thing) for thing in scene.things]
        order = self.rng.permutation(len(said))
        return language.look(scene), " ".join(said[i] for i in order)

    def lists(self) -> Document:
        """What `again` says, as a conversation."""
        words, found = self.again()
        return self.writer.chat((words,), (found,))

    def drawing(self) -> Document:
        scene = self.scene()
        if self.chance(EMPTY_PROMPT):  # what guidance compares with: <s> <racm3:break> codes
            return self.writer.completion(scene)
        wanted = language.ask_drawing(self.rng, scene).text
        request = self.one_of(language.DRAW_PROMPTS).format(wanted)
        answer = (self.drawn(scene),)
        if self.chance(0.1):
            request = request.rstrip(".?") + self.one_of(language.THEN_SAY)
            answer = (scene, language.caption(scene))
        return self.writer.chat((language.vary(self.rng, request),), answer)

    def drawn(self, scene: Scene) -> Scene | Picture:
        """A picture as an answer: some of its codes are read as those of its twin.

        A twin has other colours or shapes at the same places. What was drawn so far cannot be
        trusted then, and each code has to be found from the words. Else a purple tip is always
        continued as a purple triangle, for it is never that of a star.
        """
        twin = self.pictures.twins.get(scene)
        slips = self.one_of(SLIPS)
        if twin is None or not slips:
            return scene
        codes, other = self.writer.codes[scene], self.writer.codes[twin]
        return Picture(codes, np.where(self.rng.random(len(codes)) < slips, other, codes))

    def given(self, *scenes: Scene) -> tuple[Picture, ...]:
        """Pictures in a question: some of their codes are read as others that look alike.

        A code is learned from the pictures it occurs in, and a tip that only blue stars had will
        say "blue" on a purple star. Read for each other, codes that decode to nearly the same
        pixels come to mean the same; code_rows.py is the other means to this end.
        """
        alike, pictures = self.pictures.alike, []
        for scene in scenes:
            codes = self.writer.codes[scene]
            other = alike[codes, self.rng.integers(alike.shape[1], size=len(codes))]  # (S,)
            blurred = self.rng.random(len(codes)) < self.one_of(BLUR)
            pictures.append(Picture(codes, np.where(blurred, other, codes)))
        return tuple(pictures)

    def edit(self) -> Document:
        before, after, change = self.one_of(self.pictures.edits)
        request = language.vary(self.rng, language.ask_edit(self.rng, after, change))
        pictures = before, self.drawn(after)
        if change == "place" and self.chance(0.5):
            pictures = self.recoded(before, after)
        return self.writer.chat(self.place_pictures(request, pictures[:1]), pictures[1:])

    def recoded(self, *scenes: Scene) -> tuple[Picture, ...]:
        """Pictures in which about half of the codes have changed their meaning with each other.

        They show nothing known, so that a thing can only be moved by copying its codes.
        """
        meaning = np.arange(len(self.pictures.alike))  # (K,)
        changed = self.rng.random(len(meaning)) < 0.5
        meaning[changed] = self.rng.permutation(meaning[changed])
        recoded = (meaning[self.writer.codes[scene]] for scene in scenes)
        return tuple(Picture(codes, codes) for codes in recoded)

    def two_pictures(self, room: int) -> Document:
        """Two pictures and several questions, or one question on either side of them."""
        rng = self.rng
        if self.chance(0.5):
            first, second, change = self.one_of(self.pictures.edits)
            turns = [language.ask_difference(rng, first, second, change)]
        else:
            first, second, _ = self.one_of(self.pictures.pairs)
            turns = [language.ask_common(rng, first, second)]
        turns += [language.ask_which(rng, first, second) for _ in range(2)]
        turns += [language.ask_both(rng, first, second)]
        turns = [(language.vary(rng, turn[0]), turn[1]) for turn in turns if turn]
        if self.chance(0.7):
            order = self.rng.permutation(len(turns))  # the last ones may find no room
            turns = [turns[i] for i in order]
            return self.writer.branches(self.given(first, second), turns, 0.0, room)
        question, answer = self.one_of(turns)
        pictures = self.given(first, second)
        return self.writer.question(self.place_pictures(question, pictures), answer)


# ---------------------------------------------------------------------------------------------
# Rows: documents packed side by side, with positions and a mask that keep them apart


class Rows:
    """Draws batches of B rows of T tokens."""

    def __init__(self, corpus: Corpus, pad: int) -> None:
        self.corpus, self.pad, self.waiting = corpus, pad, None

    def row(self, draw: Callable[[int], Document], T: int) -> list[Document]:
        """Documents until less than T / 4 is free or one does not fit: that opens the next row."""
        documents, room = [], T
        while room >= T // 4:
            document = self.waiting or draw(room)
            self.waiting = None
            if len(document.ids) > room:
                self.waiting = document
                break
            documents.append(document)
            room -= len(document.ids)
        return documents

    def batch(self, draw: Callable[[int], Document], B: int, T: int) -> dict[str, Tensor]:
        """-> ids, read, position, weight (B, T), mask (B, T, T): who may see whom, causality aside

        ids are the targets; the model reads `read`, which is the same but for slips.
        """
        arrays = {
            "ids": np.full((B, T), self.pad), "read": np.full((B, T), self.pad),
            "position": np.zeros((B, T), np.int64), "branch": np.zeros((B, T), np.int64),
            "document": np.full((B, T), -1), "weight": np.zeros((B, T), np.float32),
        }  # fmt: skip
        for b in range(B):
            start = 0
            for n, document in enumerate(self.row(draw, T)):
                place = b, slice(start, start + len(document.ids))
                for name in ("ids", "read", "position", "weight", "branch"):
                    arrays[name][place] = getattr(document, name)
                arrays["document"][place] = n
                start += len(document.ids)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["mask"] = visible(batch.pop("document"), batch.pop("branch"))  # (B, T, T)
        return batch


def visible(document: Tensor, branch: Tensor) -> Tensor:
    """document, branch (B, T) -> bool (B, T, T): token t may look at token j.

    Only inside one document, and there at the shared beginning (branch 0) or the own branch.
    """
    same = document[:, :, None] == document[:, None]  # (B, T, T)
    return same & ((branch[:, None] == 0) | (branch[:, :, None] == branch[:, None]))
