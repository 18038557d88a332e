"""Measures how often a checkpoint answers and draws right, on freshly drawn scenes.

    seed -> scene -> picture --processor--> ids --generate, greedy--> text ?= the one right answer

Who needs it: `train.py evaluate`, which prints the table of the README.

A text is right if it equals the answer to the letter. A drawing is right if the rule-based reader
finds every named colour, shape, size, place and background, and no other thing. Everything is
measured twice: on ordinary pictures, and on pictures with a (colour, shape) pair of world.HELD_OUT,
which the decoder never saw. Of two pictures the first shows that pair, of an edit the picture to be
changed. The seeds are fixed, and far from those of training.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chameleon import ChameleonForConditionalGeneration
from generate import decode_pictures, generate
from processor import ChameleonProcessor
from tiny_world import language, world
from tiny_world.world import Scene

SEED = 10**9  # training draws its scenes from small seeds
BATCH = 50

# A prompt with <image> placeholders, the scenes of its pictures, and the right answer. For a
# drawing, that is a function which decides whether the Scene it shows is right. Instead of a prompt
# there may be a conversation: first prompt, its answer, second prompt.
Item = tuple[str | tuple[str, ...], tuple[Scene, ...], str | Callable[[Scene], bool]]
Sampler = Callable[[np.random.Generator, bool], Item]  # rng, held_out


def place_pictures(rng: np.random.Generator, question: str, images: str) -> str:
    """The pictures before or after the question, with equal probability."""
    return question + images if rng.random() < 0.5 else images + question


def question(sample: Callable) -> Sampler:
    """`sample` draws (scenes, turn). It is called until the scenes have such a question."""

    def item(rng: np.random.Generator, held_out: bool) -> Item:
        while True:
            scenes, turn = sample(rng, held_out)
            if turn:
                return place_pictures(rng, turn[0], "<image>" * len(scenes)), scenes, turn[1]

    return item


def about_one(kind: str, count: int | None = None) -> Sampler:
    """Questions of one kind about a picture of `count` things, by default one to three."""

    def sample(rng: np.random.Generator, held_out: bool) -> tuple:
        scene = world.sample_scene(rng, count, held_out)
        return (scene,), language.QUESTIONS[kind](rng, scene)

    return question(sample)


def about_two(ask: Callable) -> Sampler:
    """Questions about two pictures of one thing each."""

    def sample(rng: np.random.Generator, held_out: bool) -> tuple:
        if ask is language.ask_difference:
            first, second, change = world.sample_edit(rng, held_out)
            return (first, second), ask(rng, first, second, change)
        first, second, _ = world.sample_pair(rng, held_out)
        return (first, second), ask(rng, first, second)

    return question(sample)


def second_turn(rng: np.random.Generator, held_out: bool) -> Item:
    """A second question about a picture, after a first one that was answered right."""
    prompt, scenes, answer = world.pick(rng, ONE)(rng, held_out)
    turn = None
    while not turn:
        turn = language.QUESTIONS[world.pick(rng, language.QUESTIONS)](rng, scenes[0])
    return (prompt, answer, turn[0]), scenes, turn[1]


ONE = [about_one(kind) for kind in language.QUESTIONS]
ROWS = {
    "caption of one thing": about_one("caption", 1),
    "caption of two": about_one("caption", 2),
    "caption of three": about_one("caption", 3),
} | {
    kind: about_one(kind) for kind in (
        "colour", "shape", "count", "background", "existence", "relation", "size", "place")
} | {
    "two pictures: in common": about_two(language.ask_common),
    "two pictures: difference": about_two(language.ask_difference),
    "two pictures: which": about_two(language.ask_which),
    "second turn": second_turn,
}  # fmt: skip


def drawing_of(count: int) -> Sampler:
    """Requests to draw `count` things."""

    def sample(rng: np.random.Generator, held_out: bool) -> Item:
        request = language.ask_drawing(rng, world.sample_scene(rng, count, held_out))
        prompt = world.pick(rng, language.DRAW_PROMPTS).format(request.text)
        return prompt, (), lambda seen: language.fulfils(seen, request)

    return sample


def edit(rng: np.random.Generator, held_out: bool) -> Item:
    """A picture of one thing and a request to change it."""
    before, after, change = world.sample_edit(rng, held_out)

    def without_offset(scene: Scene) -> Scene:
        return replace(scene, things=tuple(replace(t, dy=0.0, dx=0.0) for t in scene.things))

    prompt = place_pictures(rng, language.ask_edit(rng, after, change), "<image>")
    return prompt, (before,), lambda seen: without_offset(seen) == without_offset(after)


DRAWINGS = {"drawing of one thing": drawing_of(1), "drawing of two": drawing_of(2), "edit": edit}


def load(folder: Path, device: str = "cpu"):
    """A checkpoint folder -> model in fp32, processor."""
    model = ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map=device)
    return model, ChameleonProcessor.from_pretrained(folder)


def batches(table: dict[str, Sampler], row: str, questions: int, held_out: bool
            ) -> Iterator[tuple[list, list[Image.Image], list]]:
    """The items of one row of a table, in batches -> prompts, pictures, right answers."""
    rng = np.random.default_rng((SEED, list(table).index(row), held_out))
    items = [table[row](rng, held_out) for _ in range(questions)]
    for start in range(0, questions, BATCH):
        prompts, scenes, right = zip(*items[start : start + BATCH])
        pictures = [Image.fromarray(world.render(scene)) for some in scenes for scene in some]
        yield list(prompts), pictures, list(right)


def read(processor, prompts: list, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """A batch of prompts, or of conversations -> what the model takes. Pictures are in the order of
    their placeholders.
    """
    if isinstance(prompts[0], str):
        return processor(text=prompts, images=pictures or None, padding=True)
    rest = iter(pictures)

    def content(turn: str) -> list[dict]:
        return [{"type": "image", "image": next(rest)} if part == "<image>"
                else {"type": "text", "text": part}
                for part in re.split("(<image>)", turn) if part]

    conversations = [[{"role": ("user", "assistant")[n % 2], "content": content(turn)}
                      for n, turn in enumerate(turns)] for turns in prompts]
    return processor.apply_chat_template(conversations, padding=True)


def answer(model, processor, prompts: list, pictures: list[Image.Image]) -> list[str]:
    """Greedy answers to a batch, see `read`."""
    inputs = read(processor, prompts, pictures).to(model.device)
    with torch.inference_mode():  # the longest answer: three things, then two of them again
        ids = generate(model, **inputs, max_new_tokens=96)  # (B, T + new)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :],
                                  skip_special_tokens=True)


def accuracy(model, processor, row: str, questions: int, held_out: bool = False) -> float:
    """Share of right answers to `questions` questions of one row of ROWS, 0..1."""
    right = 0
    for prompts, pictures, wanted in batches(ROWS, row, questions, held_out):
        given = answer(model, processor, prompts, pictures)
        right += sum(text.strip() == one for text, one in zip(given, wanted))
    return right / questions


@torch.inference_mode()
def draw(model, inputs: dict, seed: int, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One drawing for each prompt -> ids of its codes (B, S), log-likelihood (B,)."""
    S, T = model.config.vq_config.codes_per_image, inputs["input_ids"].shape[1]
    ids = generate(
        model, **inputs, mode="image", image_top_p=0.9, guidance_text=guidance,
        guidance_image=guidance, seed=seed,
    )  # (B, T + S + 2), with begin-image and end-image
    if "pixel_values" in inputs:
        prompt = model.model.replace_image_placeholders(ids[:, :T], inputs["pixel_values"])
        ids = torch.cat((prompt, ids[:, T:]), dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - T), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, mask_image_logits=False,
                   return_dict=True).logits
    codes = ids[:, T + 1 : T + 1 + S]  # (B, S)
    logp = logits[:, T : T + S].log_softmax(-1).gather(-1, codes[..., None])  # (B, S, 1)
    return codes, logp.sum((1, 2))


def drawn_right(
    model, processor, row: str, questions: int, held_out: bool = False, guidance: float = 1.0,
    tries: int = 1,
) -> float:  # fmt: skip
    """Share of right drawings, 0..1. Of `tries` drawings, the most likely one counts."""
    right = 0
    found = batches(DRAWINGS, row, questions, held_out)
    for seed, (prompts, pictures, checks) in zip(range(0, questions, BATCH), found):
        inputs = read(processor, prompts, pictures).to(model.device)
        tried = [draw(model, inputs, seed + n * questions, guidance) for n in range(tries)]
        best = torch.stack([logp for _, logp in tried]).argmax(0)  # (B,)
        ids = torch.stack([tried[n][0][b] for b, n in enumerate(best.tolist())])  # (B, S)
        images = decode_pictures(model, ids)
        right += sum(check(world.read_scene(image)) for image, check in zip(images, checks))
    return right / questions


@torch.no_grad()
def survival(vq, pictures: int, held_out: bool = False) -> tuple[float, int]:
    """Sends pictures through codes and back -> the share of things that keep colour and shape for
    the reader, the number of things.
    """
    rng, right, total = np.random.default_rng((SEED, held_out)), 0, 0
    for _ in range(0, pictures, BATCH):
        scenes = [world.sample_scene(rng, held_out=held_out) for _ in range(BATCH)]
        pixels = torch.from_numpy(world.render_pixels(scenes))
        back = vq.decode(vq.encode(pixels.to(vq.post_quant_conv.weight.device)))  # (B, 3, H, W)
        for scene, image in zip(scenes, back.float().clamp(-1, 1).permute(0, 2, 3, 1).cpu()):
            seen = world.read_scene((image.numpy() + 1) * 127.5)
            seen = {t.place: (t.colour, t.shape) for t in seen.things}
            right += sum(seen.get(t.place) == (t.colour, t.shape) for t in scene.things)
            total += len(scene.things)
    return right / total, total


def table(folder: Path, questions: int, device: str = "cpu") -> None:
    """Prints the table, row by row as it is measured. A guided row costs twelve plain ones, so it
    has a quarter of the questions.
    """
    model, processor = load(folder, device)

    def show(name: str, measure: Callable[[bool], float]) -> None:
        print(f"| {name} | {measure(False):.1%} | {measure(True):.1%} |", flush=True)

    guided = -(-questions // 4)
    print(f"| {questions} questions each (guided: {guided}) | ordinary | held-out |\n|---|---|---|")
    show("codes: colour and shape survive",
         lambda held_out: survival(model.model.vqmodel, questions, held_out)[0])
    for row in ROWS:
        show(row, partial(accuracy, model, processor, row, questions))
    for row in DRAWINGS:
        show(row, partial(drawn_right, model, processor, row, questions))
        show(f"{row}, guided, best of 4",
             partial(drawn_right, model, processor, row, guided, guidance=1.5, tries=4))
