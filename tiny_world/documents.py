"""Training documents in the model's own format, and the batches they are packed into.

    seed --Pictures--> scenes, and the codes (S,) of their pictures, cached in a file
    scenes --Corpus--> Document --Rows--> ids, read, position, weight (B, T), mask (B, T, T)
    folder of your own --read_examples--> Lines --OwnData--> batches as above

Who needs it: whoever wants to know what the decoder is trained on. Several questions about one
picture form one document with a shared beginning and independent branches:

    <s> <racm3:break> S codes <eoss> -+- question <reserved08706> answer </s>     branch 1
    branch 0, the shared beginning    +- question <reserved08706> answer </s>     branch 2
                                      +- ...

A picture costs S + 2 tokens; a question with its answer costs about 35. So one picture serves
several questions. The branches cannot attend to each other, because a later answer could otherwise
be copied from an earlier one. The positions of every branch continue from the shared beginning, as
they will in a real prompt.

Letters: B rows or pictures at once, T tokens of a row, N pictures, S codes of a picture, K codes of
the codebook, E their width.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import Line, read_lines, write_atomically
from processor import IGNORE, ChameleonProcessor, load_image
from tiny_world import language, world
from tiny_world.world import Scene, pick
from tokenizer import Tokenizer
from vqvae import ChameleonVQVAE

IMAGE_WEIGHT = 0.6  # loss weight of a picture's token; a text token has 1; the paper: 1
CONCLUSION_WEIGHT = 12.0  # loss weight of an answer's last sentence, at least 1 for a token
EMPTY_PROMPT = 0.1  # share of drawings without a prompt; classifier-free guidance needs them
# The share of input codes that are corrupted is drawn anew for each picture, from one of these.
CORRUPTED_DRAWING = (0.0, 0.1, 0.3)  # in an answer, see Corpus.drawn
CORRUPTED_PROMPT = (0.0, 0.3, 0.5)  # in a question, see Corpus.given
ALIKE = 4  # nearest neighbours kept for each code

# ---------------------------------------------------------------------------------------------
# The training set: scenes, and the codes of their pictures, computed once


@dataclass
class Pictures:
    """Scenes, and the codes of their pictures."""

    singles: list[Scene]
    pairs: list[tuple[Scene, Scene]]
    edits: list[tuple[Scene, Scene]]  # before, after
    twins: dict[Scene, Scene]  # of scenes to be drawn, see world.sample_twin
    codes: dict[Scene, np.ndarray] = field(default_factory=dict)
    alike: np.ndarray | None = None  # (K, ALIKE): nearest neighbours of each code

    @classmethod
    def sample(cls, seed: int, count: int) -> "Pictures":
        """About `count` pictures: half of them alone, a quarter in pairs, a quarter in edits."""
        rng = np.random.default_rng(seed)
        singles = [world.sample_scene(rng) for _ in range(count // 2)]
        pairs = [world.sample_pair(rng) for _ in range(count // 8)]
        edits = [world.sample_edit(rng) for _ in range(count // 8)]
        drawn = singles[: count // 4] + [after for _, after in edits]
        return cls(singles, pairs, edits, {s: world.sample_twin(rng, s) for s in drawn})

    def scenes(self) -> list[Scene]:
        return [*self.singles, *chain(*self.pairs, *self.edits), *self.twins.values()]

    def encode(self, vq: ChameleonVQVAE, cache: Path,
               progress: Callable = lambda steps, name: steps) -> "Pictures":
        """Fills `codes` and `alike`. The file `cache` keeps the codes once they are computed.

        `progress(range, name)` shows a progress bar while one iterates over what it returns.
        """
        scenes = self.scenes()
        ends = encode_scenes(vq, scenes[:10] + scenes[-10:])  # (20, S)
        # One array from the start: many small results between large temporary tensors would
        # fragment the heap, to 17 GB for 110,000 pictures.
        codes = np.full((len(scenes), ends.shape[1]), -1, np.int16)  # (N, S); -1 is no code
        with suppress(OSError, ValueError):  # the file is missing, damaged, or of other pictures
            codes = np.fromfile(cache, np.int16).reshape(codes.shape)
        # Codes of other pictures or of another VQ-VAE must not be used. So the first and the last
        # are compared: another `count` may give the same first pictures, but other twins.
        if not np.array_equal([*codes[:10], *codes[-10:]], ends):
            for n in progress(range(0, len(scenes), 50), "codes"):
                codes[n : n + 50] = encode_scenes(vq, scenes[n : n + 50])
            write_atomically(cache, codes.tofile)
        self.codes = dict(zip(scenes, codes))
        vectors = vq.quantize.embedding.weight.detach().cpu()  # (K, E)
        self.alike = torch.cdist(vectors, vectors).argsort(1)[:, 1 : 1 + ALIKE].numpy()
        return self


def encode_scenes(vq: ChameleonVQVAE, scenes: list[Scene]) -> np.ndarray:
    """B scenes -> the codes of their pictures (B, S)"""
    pixels = torch.from_numpy(world.render_pixels(scenes)).to(vq.device)  # (B, 3, H, W)
    return vq.encode(pixels).cpu().numpy()


# ---------------------------------------------------------------------------------------------
# Documents


@dataclass
class Document:
    """One sequence, or several that share a beginning. Each list has one entry per token."""

    ids: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)  # of the loss of predicting this token
    branch: list[int] = field(default_factory=list)  # 0 is the shared beginning
    read: list[int] = field(default_factory=list)  # the inputs: `ids` with some corrupted codes

    def add(self, ids: list[int], weight: float, read: list[int] | None = None) -> None:
        """Appends tokens of one weight to the shared beginning. Default of `read`: `ids`."""
        self.extend(Document(ids, [weight] * len(ids), read=read or ids))

    def extend(self, other: "Document", branch: int = 0) -> None:
        """Appends all tokens of another document, whatever branches it has, to this branch."""
        self.ids += other.ids
        self.weight += other.weight
        self.branch += [branch] * len(other.ids)
        self.read += other.read
        assert len(self.read) == len(self.weight) == len(self.ids)  # else `packed` would shift them


class Corrupted(NamedTuple):
    """A picture whose inputs and targets differ: teacher forcing with corrupted codes."""

    codes: np.ndarray  # (S,), the targets
    read: np.ndarray  # (S,), the inputs


class Writer:
    """Writes text and scenes as ids, in exactly the format of ChameleonProcessor.

        <s> text <racm3:break> S codes <eoss> text <reserved08706> answer </s>

    The parts of a document are text (str), pictures (Scene or Corrupted) and special tokens (int).
    """

    def __init__(self, tokenizer: Tokenizer, codes: dict) -> None:
        self.tokenizer, self.codes, v = tokenizer, codes, tokenizer.vocabulary
        self.code_to_id, self.end_of_turn = v.code_to_id.numpy(), v.end_of_turn_id
        self.begin_image, self.end_image = v.begin_image_id, v.end_image_id
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def write(self, parts: Sequence, text_weight: float, code_weight: float) -> Document:
        """Parts -> tokens. Codes have `code_weight` in the loss, all others `text_weight`."""
        document = Document()
        for part in parts:
            if isinstance(part, str):
                document.add(self.tokenizer.text_ids(part), text_weight)
            elif isinstance(part, int):
                document.add([part], text_weight)
            else:
                both = part if isinstance(part, Corrupted) else (self.codes[part], self.codes[part])
                ids, read = (self.code_to_id[codes].tolist() for codes in both)
                document.add([self.begin_image], text_weight)
                document.add(ids, code_weight, read)
                document.add([self.end_image], text_weight)
        return document

    def turn(self, prompt: Sequence, answer: Sequence, end: int) -> Document:
        """A prompt and an answer, which alone is in the loss.

        The answer's last sentence is its conclusion, and often a single word. It weighs
        CONCLUSION_WEIGHT in total (or 1 a token, if that is more), so that a long description does
        not outweigh it. With an empty prompt the answer is a plain statement, and all its tokens
        have the same weight.
        """
        turn = self.write((*prompt, self.end_of_turn) if prompt else (), 0.0, 0.0)
        turn.extend(self.write((*answer, end), 1.0, IMAGE_WEIGHT))
        if prompt and isinstance(answer[-1], str):
            last = len(self.tokenizer.text_ids(answer[-1].rsplit(". ", 1)[-1])) + 1  # with `end`
            turn.weight[-last:] = [max(1.0, CONCLUSION_WEIGHT / last)] * last
        return turn

    def chat(self, *turns: tuple[Sequence, Sequence]) -> Document:
        """Prompts and answers of text and pictures. Only answers are in the loss, see `turn`."""
        document = self.write((self.bos,), 0.0, 0.0)
        for n, (prompt, answer) in enumerate(turns, start=1):
            end = self.eos if n == len(turns) else self.end_of_turn
            document.extend(self.turn(prompt, answer, end))
        return document

    def completion(self, *parts: str | Scene) -> Document:
        """Text and pictures without turns. Every token is in the loss."""
        return self.chat(((), parts))

    def branches(self, shared: tuple, turns: list[tuple[str, str]], weight: float,
                 room: int) -> Document:
        """A shared beginning and one branch for each turn, as many as fit into `room` tokens.

        `weight`: of each token of `shared`. A turn is (question, answer), see `turn`. With an empty
        `shared`, no picture tells what an answer's first sentence describes, so it weighs 0.
        """
        document = self.write((self.bos,), 0.0, 0.0)
        document.extend(self.write(shared, weight, weight))
        for branch, (question, answer) in enumerate(turns, start=1):
            turn = self.turn((question,) if question else (), (answer,), self.eos)
            if question and not shared:
                seen = turn.ids.index(self.end_of_turn) + 1
                seen += len(self.tokenizer.text_ids(answer.split(". ")[0])) + 1  # and the full stop
                turn.weight[:seen] = [0.0] * seen
            if len(document.ids) + len(turn.ids) > room:
                break
            document.extend(turn, branch)
        return document


GAPS = ("",) * 6 + (" ", " ", "\n")  # what a user may type between a picture and the words
# How often sft asks each kind of question, relative to the others: hard kinds more often.
ASKED = {
    "caption": 1.5, "existence": 3.0, "relation": 6.0, "shape": 1.2, "colour": 1.0,
    "size": 1.0, "place": 2.2, "thing": 3.2, "count": 3.0, "background": 0.3,
}  # fmt: skip


class Shares(NamedTuple):
    """How often exercises in words alone are drawn."""

    practice: float  # of all documents, see Corpus.practice
    lists: float  # of all documents, see Corpus.lists
    places: float = 0.0  # of the documents of `practice`: what is at a place


class Corpus:
    """Draws random documents about a fixed set of pictures."""

    row_tokens = 256  # the paper: 4096
    shares = Shares(0.14, 0.18)  # late in pretraining; in sft: train.PRACTICE

    def __init__(self, writer: Writer, pictures: Pictures, rng: np.random.Generator) -> None:
        self.writer, self.pictures, self.rng = writer, pictures, rng
        self.asked = np.array(list(ASKED.values())) / sum(ASKED.values())

    def scene(self) -> Scene:
        return pick(self.rng, self.pictures.singles)

    def busy_scene(self) -> Scene:
        """A scene, less often of one thing: then the answers depend little on the question."""
        scene = self.scene()
        while len(scene.things) == 1 and self.rng.random() < 0.5:
            scene = self.scene()
        return scene

    def question(self, scene: Scene) -> tuple[str, str]:
        """A random question that has an answer for this scene, and the answer."""
        while True:
            name = self.rng.choice(list(ASKED), p=self.asked)
            if turn := language.QUESTIONS[name](self.rng, scene):
                return language.vary(self.rng, turn[0]), turn[1]

    def prompt(self, question: str, *pictures: Scene | Corrupted) -> tuple:
        """Question and pictures as parts of a prompt, in either order with equal probability."""
        gap, behind = pick(self.rng, GAPS), self.rng.random() < 0.5
        return (question + gap, *pictures) if behind else (*pictures, gap + question)

    # --- pretraining: statements, no turns

    def statements(self, scene: Scene, n: int) -> list[str]:
        """The first n of: the caption, the description, random statements."""
        both = [language.caption(scene), language.look(scene)]
        return (both + [language.state(self.rng, scene) for _ in range(n)])[:n]

    def pretrain(self, room: int) -> Document:
        """Statements and pictures without turns. `room` is the number of tokens left in the row."""
        rng, writer, kind = self.rng, self.writer, self.rng.random()
        scene = self.scene()
        if kind < 0.35:  # a picture, then independent statements about it
            turns = [("", text) for text in self.statements(scene, 12)]
            return writer.branches((scene,), turns, IMAGE_WEIGHT, room)
        if kind < 0.45:  # a picture, then its caption and description
            return writer.completion(scene, " ".join(self.statements(scene, 2)))
        if kind < 0.77:  # a caption or a request, then the picture
            words = (language.caption(scene) if rng.random() < 0.5
                     else language.sentence(language.ask_drawing(rng, scene).text))
            prompt = () if rng.random() < EMPTY_PROMPT else (language.vary(rng, words),)
            return writer.completion(*prompt, scene)
        if kind < 0.85:  # interleaved
            other = self.scene()
            return writer.completion(language.caption(scene), scene, language.caption(other), other)
        if kind < 0.88:  # text alone
            return writer.completion(" ".join(self.statements(scene, 4)))
        return writer.completion(" ".join(self.again()))

    # --- sft: prompt and answer

    def sft(self, room: int) -> Document:
        """Prompts with answers, of a random kind. `room` is as in `pretrain`.

        Shares are shares of the documents, not of the tokens.
        """
        kind, (practice, lists, _) = self.rng.random(), self.shares
        if kind < practice:
            return self.practice(room)
        if kind < practice + lists:
            return self.lists()
        kind = (kind - practice - lists) / (1 - practice - lists)  # uniform in 0..1 again
        if kind < 0.14:  # many questions about one picture
            scene = self.busy_scene()
            turns = [self.question(scene) for _ in range(14)]
            gap = pick(self.rng, GAPS)
            turns = [(gap + question, answer) for question, answer in turns]
            return self.writer.branches((self.given(scene),), turns, 0.0, room)
        if kind < 0.23:  # one question
            scene = self.busy_scene()
            question, answer = self.question(scene)
            return self.writer.chat((self.prompt(question, self.given(scene)), (answer,)))
        if kind < 0.33:
            return self.conversation()
        if kind < 0.61:
            return self.drawing()
        if kind < 0.77:
            return self.two_pictures(room)
        if kind < 0.98:
            return self.edit()
        question, answer = pick(self.rng, list(language.SMALL_TALK.items()))
        return self.writer.chat(((language.vary(self.rng, question),), (answer,)))

    def conversation(self) -> Document:
        """Two to five turns about a scene that is given or drawn in the first: as many questions
        as fit into a row, or one question and a request to change the scene.

            <s> prompt <reserved08706> answer <reserved08706> prompt <reserved08706> answer </s>
        """
        rng, turns, after = self.rng, [], None
        scene = self.busy_scene()
        if rng.random() < 0.5:
            scene, after = pick(rng, self.pictures.edits)
        if rng.random() < 0.5:
            request = pick(rng, language.DRAW_PROMPTS).format(language.ask_drawing(rng, scene).text)
            turns = [((language.vary(rng, request),), (self.drawn(scene),))]
        for _ in range(1 if after else rng.integers(2, 5)):
            question, answer = self.question(scene)
            prompt = (question,) if turns else self.prompt(question, self.given(scene))
            longer = [*turns, (prompt, (answer,))]
            if len(self.writer.chat(*longer).ids) > self.row_tokens:
                break
            turns = longer
        if after:
            request = language.vary(rng, language.ask_edit(rng, scene, after))
            turns.append(((request,), (self.drawn(after),)))
        return self.writer.chat(*turns)

    def practice(self, room: int) -> Document:
        """Conclusions drawn from a description in words, without a picture.

            <s> description -+- question <reserved08706> conclusion </s>
                             +- ...

        The model learns to describe a picture early. To look up one thing in that description
        takes about ten million tokens more. Text is the cheap way to learn it: a picture costs as
        many tokens as five of these branches. In a third of these documents each branch has the
        order of a real answer: question, description, conclusion.
        """
        rng, turns = self.rng, []
        in_order, kind = rng.random() < 0.35, rng.random()
        while len(turns) < (12 if in_order else 30):
            if in_order or not turns:  # a new scene for each turn, or one scene for all
                scene = self.told_scene(rng.choice((1, 2, 3), p=(0.2, 0.35, 0.45)))
                pair = world.sample_pair(rng, rng.random() < 0.3)
                while pair[0].things[0].colour == pair[1].things[0].colour and rng.random() < 0.6:
                    pair = world.sample_pair(rng, rng.random() < 0.3)  # equal colours are too easy
                edit = world.sample_edit(rng, rng.random() < 0.3)
            chance, field = rng.random(), "background" if rng.random() < 0.4 else ""
            if kind < 0.5:
                turn = self.question(scene)
            elif kind > 1 - self.shares.places:  # instead of questions about pairs, see below
                turn = language.ask_thing(rng, scene)
            else:
                two, ask, of_which = ((edit, language.ask_difference, 0.4) if kind < 0.7 else
                                      (pair, language.ask_common, 0.5))
                turn = ask(rng, *two)
                if chance < of_which:
                    turn = language.ask_which(rng, *two, field)
            if turn and ". " in turn[1]:  # a description and a conclusion
                turns.append((language.vary(rng, turn[0]), turn[1]))
        if in_order:
            return self.writer.branches((), turns, 0.0, room)
        seen = turns[0][1].split(". ")[0] + "."
        turns = [(question, answer.removeprefix(seen + " ")) for question, answer in turns]
        return self.writer.branches((seen,), turns, 0.0, room)

    def told_scene(self, count: int) -> Scene:
        """A scene for words alone: at least half have a pair that no picture shows."""
        return world.sample_scene(self.rng, count, True if self.rng.random() < 0.5 else None)

    def again(self) -> tuple[str, str]:
        """A description of three to eight things, and all of them again in another order.

        This is the purest exercise in looking things up. Once colour and shape are said, only the
        description tells the place, and a guess is seldom right.
        """
        scene = self.told_scene(self.rng.integers(3, 9))
        said = [language.found(thing) for thing in scene.things]
        order = self.rng.permutation(len(said))
        return language.look(scene), " ".join(said[i] for i in order)

    def lists(self) -> Document:
        """The two texts of `again` as prompt and answer."""
        return self.writer.chat(tuple((text,) for text in self.again()))

    def drawing(self) -> Document:
        """A request to draw, and the picture; sometimes a caption behind it, or no request."""
        rng, scene = self.rng, self.scene()
        if rng.random() < EMPTY_PROMPT:
            return self.writer.completion(scene)
        wanted = language.ask_drawing(rng, scene).text
        request = pick(rng, language.DRAW_PROMPTS).format(wanted)
        answer = (self.drawn(scene),)
        if rng.random() < 0.1:
            request = request.rstrip(".?") + pick(rng, language.THEN_SAY)
            answer = (scene, language.caption(scene))
        return self.writer.chat(((language.vary(rng, request),), answer))

    def drawn(self, scene: Scene) -> Scene | Corrupted:
        """A picture to be drawn, with corrupted inputs: codes of its twin replace some of its own.

        The twin has other colours or shapes at the same places. Such inputs cannot be trusted, so
        the model has to predict each code from the prompt. Otherwise it would continue the purple
        tip of a star as a triangle, because no picture of the training set shows a purple star.
        """
        twin = self.pictures.twins.get(scene)
        share = pick(self.rng, CORRUPTED_DRAWING)
        if twin is None or not share:
            return scene
        codes, other = self.writer.codes[scene], self.writer.codes[twin]
        corrupted = self.rng.random(len(codes)) < share  # (S,)
        return Corrupted(codes, np.where(corrupted, other, codes))

    def given(self, scene: Scene) -> Corrupted:
        """A picture of a question, with corrupted inputs.

        Some codes are replaced by one of their nearest neighbours in the codebook, which decode to
        almost the same pixels. So neighbours come to mean the same. Otherwise a code that occurs
        in blue stars only would mean "blue" in a purple star, too. code_rows.py has the same aim.
        """
        rng, codes, alike = self.rng, self.writer.codes[scene], self.pictures.alike
        other = alike[codes, rng.integers(alike.shape[1], size=len(codes))]  # (S,)
        corrupted = rng.random(len(codes)) < pick(rng, CORRUPTED_PROMPT)  # (S,)
        return Corrupted(codes, np.where(corrupted, other, codes))

    def edit(self) -> Document:
        """A picture with a request to change it, and the changed picture."""
        before, after = pick(self.rng, self.pictures.edits)
        request = language.vary(self.rng, language.ask_edit(self.rng, before, after))
        return self.writer.chat((self.prompt(request, before), (self.drawn(after),)))

    def two_pictures(self, room: int) -> Document:
        """Two pictures with a branch for each of several questions, or with one question."""
        rng = self.rng
        if rng.random() < 0.5:
            two, ask = pick(rng, self.pictures.edits), language.ask_difference
        else:
            two, ask = pick(rng, self.pictures.pairs), language.ask_common
        asks = (ask, language.ask_which, language.ask_which, language.ask_both)
        turns = [ask(rng, *two) for ask in asks]
        turns = [(language.vary(rng, turn[0]), turn[1]) for turn in turns if turn]
        if rng.random() < 0.7:
            turns = [turns[i] for i in rng.permutation(len(turns))]  # the last may not fit
            return self.writer.branches(tuple(map(self.given, two)), turns, 0.0, room)
        question, answer = pick(rng, turns)
        return self.writer.chat((self.prompt(question, *map(self.given, two)), (answer,)))


# ---------------------------------------------------------------------------------------------
# Rows of documents, one after the other; positions and a mask keep them independent


class Rows:
    """Packs documents into batches of B rows of T tokens."""

    WAITING = 16  # so many documents at most wait for a row with enough room

    def __init__(self, pad: int) -> None:
        self.pad, self.waiting = pad, []

    def state_dict(self) -> dict:
        return {"waiting": [vars(document) for document in self.waiting]}

    def load_state_dict(self, state: dict) -> None:
        self.waiting = [Document(**values) for values in state["waiting"]]

    def row(self, draw: Callable[[int], Document], T: int) -> list[Document]:
        """The documents of one row, which ends when less than T / 8 is free. A document that does
        not fit waits for another row. Waiting documents come first, and few wait.
        """
        documents, room = [], T
        while room >= T // 8:
            fitting = [d for d in self.waiting if len(d.ids) <= room]
            if fitting:
                documents.append(max(fitting, key=lambda d: len(d.ids)))
                self.waiting.remove(documents[-1])
                room -= len(documents[-1].ids)
            elif len(self.waiting) < self.WAITING:
                self.waiting.append(draw(room))
            else:
                break
        return documents

    def batch(self, draw: Callable[[int], Document], B: int, T: int) -> dict[str, Tensor]:
        """-> ids, read, position, weight (B, T) and mask (B, T, T), see `visible`.

        `ids` are the targets and `read` the inputs, in which some codes are corrupted.
        """
        return packed([self.row(draw, T) for _ in range(B)], T, self.pad)


def packed(rows: list[list[Document]], T: int, pad: int) -> dict[str, Tensor]:
    """B rows of documents -> the tensors of `Rows.batch`."""

    def filled(lists: Iterable[list], value: float) -> Tensor:
        return torch.tensor([row + [value] * (T - len(row)) for row in lists])  # (B, T)

    fills = {"ids": pad, "read": pad, "branch": 0, "weight": 0.0}
    batch = {name: filled(([x for document in row for x in getattr(document, name)]
                           for row in rows), value) for name, value in fills.items()}
    document = filled(([n for n, d in enumerate(row) for _ in d.ids] for row in rows), -1)  # (B, T)
    batch["mask"] = visible(document, batch.pop("branch"))  # (B, T, T)
    # A token's position is the number of earlier tokens that it attends to; 0 in the padding.
    batch["position"] = batch["mask"].tril(-1).sum(-1) * (document >= 0)  # (B, T)
    return batch


def visible(document: Tensor, branch: Tensor) -> Tensor:
    """document, branch (B, T) -> bool (B, T, T): may token t attend to token j, causality aside?

    It may if both are in one document, and j is in its shared beginning (branch 0) or t's branch.
    """
    same = document[:, :, None] == document[:, None]  # (B, T, T)
    return same & ((branch[:, None] == 0) | (branch[:, :, None] == branch[:, None]))


# ---------------------------------------------------------------------------------------------
# Your own training data, `train.py sft --data FOLDER`: a folder with a .jsonl file, one {"prompt",
# "images", "answer"} a line. `read_examples` finds what is wrong in it before any weight is read;
# `OwnData`, with the model, finds what is too long.


def read_examples(folder: Path) -> list[Line]:
    """The lines of the folder's .jsonl files, with a path for each `<image>` of prompt and answer.

    ValueError names the file, the line and the error.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder: name the one with the .jsonl file in it")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".jsonl" and f.is_file())
    if not files:
        raise ValueError(f"{folder} holds no .jsonl file: write one, with one example a line")
    examples = []
    for line in chain(*(read_lines(file, "prompt", "answer") for file in files)):
        places = line.prompt.count("<image>") + line.answer.count("<image>")
        paths = [folder / name for name in line.images]
        try:
            if places != len(paths):
                raise ValueError(f"{places} <image> but {len(paths)} file(s) in 'images'")
            for path in paths:
                load_image(path)
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from None
        examples.append(line._replace(images=paths))
    if not examples:
        raise ValueError(f"{folder}: its .jsonl files are empty")
    return examples


class OwnData:
    """The user's examples as documents, and the batches of step 0, 1, 2, ... made of them.

    ValueError names a line that is too long for the model's context, or that cannot be read.
    """

    def __init__(self, examples: list[Line], model: ChameleonForConditionalGeneration,
                 processor: ChameleonProcessor, seed: int) -> None:
        mark, self.pad = model.model.vocabulary.image_token_id, processor.tokenizer.pad_token_id
        self.seed, self.documents, limit = seed, [], model.config.max_position_embeddings
        known = {}  # path -> ids of the picture (S,); several lines may ask about one
        for where, prompt, paths, answer in examples:
            try:
                batch = processor(text=prompt, answers=answer, images=paths or None)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            ids, labels = batch["input_ids"][0], batch["labels"][0]  # (T,), (T,)
            weight = torch.where(labels == mark, IMAGE_WEIGHT, (labels != IGNORE).float())  # (T,)
            if paths:
                for path, pixels in zip(paths, batch["pixel_values"].to(model.device)):
                    if path not in known:
                        known[path] = model.get_image_tokens(pixels[None])[0].cpu()  # (S,)
                ids[ids == mark] = torch.cat([known[path] for path in paths])
            if len(ids) > limit:
                raise ValueError(f"{where}: {len(ids)} tokens, the model holds {limit}")
            ids = ids.tolist()
            self.documents.append(Document(ids, weight.tolist(), [0] * len(ids), ids))

    def batch(self, step: int, B: int) -> dict[str, Tensor]:
        """As `Rows.batch`, one document a row. Each epoch is a random permutation of its own."""
        chosen = []
        for n in range(step * B, step * B + B):
            epoch, place = divmod(n, len(self.documents))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
            chosen.append(self.documents[order[place]])
        longest = max(len(document.ids) for document in chosen)
        return packed([[document] for document in chosen], longest, self.pad)
