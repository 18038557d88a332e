"""Measures how often a checkpoint answers and draws right, on freshly drawn scenes.

    seed -> scene -> picture --processor--> ids --generate, greedy--> text ?= the one right answer

Who needs it: `train.py evaluate`, which prints the table of tiny/README.md.

A text is right if it equals the answer to the letter. A drawing is right if the rule-based reader
finds every named colour, shape, size, place and background, and no other thing. Everything is
measured twice: on ordinary pictures, and on pictures with a (colour, shape) pair of world.HELD_OUT,
which the decoder never saw. Of two pictures the first shows that pair, of an edit the picture to be
changed. The seeds are fixed, and far from those of training.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration
from generate import decode_pictures, generate
from processor import ChameleonImageProcessor, ChameleonProcessor
from tiny_world import language, world
from tiny_world.world import Scene

SEED = 10**9  # training draws its scenes from small seeds
BATCH = 50

# The turns of a conversation, each of text and pictures: a prompt, or prompt, answer, prompt. And
# the right answer, or for a drawing what it must show.
Turns = list[list[str | Scene | Image.Image]]
Item = tuple[Turns, str | language.Request]
Sampler = Callable[[np.random.Generator, bool], Item]  # rng, held_out


def prompt(rng: np.random.Generator, text: str, scenes: tuple[Scene, ...]) -> list[str | Scene]:
    """The pictures before or after the text, with equal probability."""
    return [text, *scenes] if rng.random() < 0.5 else [*scenes, text]


def question(ask: Callable, sample: Callable, rng: np.random.Generator, held_out: bool) -> Item:
    """`sample` draws scenes until `ask` has a question about them."""
    turn = None
    while not turn:
        scenes = sample(rng, held_out)
        turn = ask(rng, *scenes)
    return [prompt(rng, turn[0], scenes)], turn[1]


def about_one(kind: str, count: int | None = None) -> Sampler:
    """Questions of one kind about a picture of `count` things, by default one to three."""
    return partial(question, language.QUESTIONS[kind],
                   lambda rng, held_out: (world.sample_scene(rng, count, held_out),))


def later_turn(number: int, rng: np.random.Generator, held_out: bool) -> Item:
    """The last of `number` questions about a picture, after right answers to those before."""
    turns, answer = about_one(world.pick(rng, language.QUESTIONS))(rng, held_out)
    (scene,) = (part for part in turns[0] if isinstance(part, Scene))
    while len(turns) < 2 * number - 1:
        if turn := language.QUESTIONS[world.pick(rng, language.QUESTIONS)](rng, scene):
            turns, answer = [*turns, [answer], [turn[0]]], turn[1]
    return turns, answer


ROWS = {
    "caption of one thing": about_one("caption", 1),
    "caption of two": about_one("caption", 2),
    "caption of three": about_one("caption", 3),
    **{kind: about_one(kind) for kind in ("colour", "shape", "count", "background", "existence",
                                          "relation", "size", "place", "thing")},
    "two pictures: in common": partial(question, language.ask_common, world.sample_pair),
    "two pictures: difference": partial(question, language.ask_difference, world.sample_edit),
    "two pictures: which": partial(question, language.ask_which, world.sample_pair),
    "second turn": partial(later_turn, 2), "third turn": partial(later_turn, 3),
    "fourth turn": partial(later_turn, 4),
}  # fmt: skip


def drawing(count: int, rng: np.random.Generator, held_out: bool) -> Item:
    """A request to draw `count` things."""
    request = language.ask_drawing(rng, world.sample_scene(rng, count, held_out))
    return [[world.pick(rng, language.DRAW_PROMPTS).format(request.text)]], request


def edit(rng: np.random.Generator, held_out: bool) -> Item:
    """A picture of one thing and a request to change it."""
    before, after = world.sample_edit(rng, held_out)
    text, named = language.ask_edit(rng, before, after), after.things[0].only(world.FIELDS)
    return [prompt(rng, text, (before,))], language.Request(text, (named,), after.background)


DRAWINGS = {
    "drawing of one thing": partial(drawing, 1), "drawing of two": partial(drawing, 2),
    "edit": edit,
}  # fmt: skip


def load(folder: Path, device: str = "cpu"):
    """A checkpoint folder -> model in fp32, processor."""
    model = ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map=device)
    return model, ChameleonProcessor.from_pretrained(folder)


def batches(table: dict[str, Sampler], row: str, questions: int, held_out: bool
            ) -> Iterator[tuple[int, list[Turns], list]]:
    """The items of one row of a table, in batches -> first number, conversations, right answers."""
    rng = np.random.default_rng((SEED, list(table).index(row), held_out))
    items = [table[row](rng, held_out) for _ in range(questions)]
    for start in range(0, questions, BATCH):
        yield start, *map(list, zip(*items[start : start + BATCH]))


def read(processor, conversations: list[Turns]) -> dict[str, Tensor]:
    """Conversations -> what the model takes."""

    def content(part: str | Scene | Image.Image) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": world.render(part) if isinstance(part, Scene) else part}

    messages = [[{"role": ("user", "assistant")[n % 2], "content": [*map(content, turn)]}
                 for n, turn in enumerate(turns)] for turns in conversations]
    return processor.apply_chat_template(messages, padding=True)


def answer(model, processor, conversations: list[Turns]) -> list[str]:
    """Greedy answers to a batch."""
    inputs = read(processor, conversations).to(model.device)
    # The longest answer: three things, then two of them again.
    ids = generate(model, **inputs, max_new_tokens=96)  # (B, T + new)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model, processor, row: str, questions: int, held_out: bool = False) -> float:
    """Share of right answers to `questions` questions of one row of ROWS, 0..1."""
    right = 0
    for _, conversations, wanted in batches(ROWS, row, questions, held_out):
        given = answer(model, processor, conversations)
        right += sum(text.strip() == one for text, one in zip(given, wanted))
    return right / questions


@torch.inference_mode()
def draw(model, inputs: dict, seed: int, guidance: float) -> tuple[Tensor, Tensor]:
    """One drawing for each prompt -> ids of its codes (B, S), log-likelihood (B,)."""
    S, T = model.config.vq_config.codes_per_image, inputs["input_ids"].shape[1]
    ids = generate(
        model, **inputs, mode="image", image_top_p=0.9, guidance_text=guidance,
        guidance_image=guidance, seed=seed,
    )  # (B, T + S + 2), with begin-image and end-image
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, S + 2), value=1)
    logits = model(ids, inputs.get("pixel_values"), mask, mask_image_logits=False,
                   return_dict=True).logits
    codes = ids[:, T + 1 : T + 1 + S]  # (B, S)
    logp = logits[:, T : T + S].log_softmax(-1).gather(-1, codes[..., None])  # (B, S, 1)
    return codes, logp.sum((1, 2))


def drawn_right(model, processor, row: str, questions: int, held_out: bool = False,
                guidance: float = 1.0, tries: int = 1) -> float:
    """Share of right drawings, 0..1. Of `tries` drawings, the most likely one counts."""
    right = 0
    for seed, conversations, wanted in batches(DRAWINGS, row, questions, held_out):
        inputs = read(processor, conversations).to(model.device)
        tried = [draw(model, inputs, seed + n * questions, guidance) for n in range(tries)]
        codes, logp = map(torch.stack, zip(*tried))  # (tries, B, S), (tries, B)
        best = codes[logp.argmax(0), torch.arange(len(wanted))]  # (B, S)
        seen = map(world.read_scene, decode_pictures(model, best))
        right += sum(map(language.fulfils, seen, wanted))
    return right / questions


@torch.no_grad()
def survival(vq, pictures: int, held_out: bool = False) -> float:
    """Sends pictures through codes and back -> the share of things whose colour and shape the
    reader finds again.
    """
    rng, kept = np.random.default_rng((SEED, held_out)), []
    for start in range(0, pictures, BATCH):
        scenes = [world.sample_scene(rng, held_out=held_out)
                  for _ in range(min(BATCH, pictures - start))]
        pixels = torch.from_numpy(world.render_pixels(scenes)).to(vq.device)
        back = vq.decode(vq.encode(pixels))  # (B, 3, H, W)
        for scene, image in zip(scenes, ChameleonImageProcessor.postprocess(back)):
            seen = {t.place: (t.colour, t.shape) for t in world.read_scene(image).things}
            kept += [seen.get(t.place) == (t.colour, t.shape) for t in scene.things]
    return sum(kept) / len(kept)


def table(folder: Path, questions: int, device: str = "cpu") -> None:
    """Prints the table, row by row as it is measured. A guided row costs up to twelve plain ones,
    so it has a quarter of the questions.
    """
    model, processor = load(folder, device)

    def show(name: str, measure: Callable, *arguments, **options) -> None:
        shares = [measure(*arguments, held_out=held_out, **options) for held_out in (False, True)]
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)

    guided = -(-questions // 4)
    print(f"| {questions} questions each (guided: {guided}) | ordinary | held-out |\n|---|---|---|")
    show("codes: colour and shape survive", survival, model.model.vqmodel, questions)
    for row in ROWS:
        show(row, accuracy, model, processor, row, questions)
    for row in DRAWINGS:
        show(row, drawn_right, model, processor, row, questions)
        show(f"{row}, guided, best of 4", drawn_right, model, processor, row, guided,
             guidance=1.5, tries=4)
