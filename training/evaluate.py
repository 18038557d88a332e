"""Questions a checkpoint about freshly drawn pictures, and prints the table of the README.

    seed -> scene -> picture --processor--> ids --generate, greedy--> text ?= the one right answer

An answer counts only if it is right to the letter; a drawing only if the rule-based reader finds
every named colour, shape, size, place and background, and nothing more. Everything is asked twice:
about ordinary pictures, and about pictures with a (colour, shape) pair from world.HELD_OUT, which
the decoder never saw (of two pictures the first, of an edit the one to be changed, shows it). Seeds
are fixed and far from those of training.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chameleon import ChameleonForConditionalGeneration
from generate import generate
from processor import ChameleonProcessor
from sampling import decode_pictures
from training import language, world
from training.world import Scene

SEED = 10**9  # training draws its scenes from small seeds
BATCH = 50

# An item: prompt with <image> places, the scenes of its pictures, the right answer.
Item = tuple[str, tuple[Scene, ...], str]


def place_pictures(rng: np.random.Generator, question: str, images: str) -> str:
    """Before the question or behind it, each as often: people do both."""
    return question + images if rng.random() < 0.5 else images + question


def about_one(kind: str, count: int | None = None) -> Callable[..., Item]:
    """Questions of one kind about one picture of `count` things."""

    def sample(rng: np.random.Generator, held_out: bool) -> Item:
        while True:
            scene = world.sample_scene(rng, count, held_out)
            turn = language.QUESTIONS[kind](rng, scene)
            if turn:
                return place_pictures(rng, turn[0], "<image>"), (scene,), turn[1]

    return sample


def about_two(kind: str) -> Callable[..., Item]:
    """Questions about two pictures of one thing each."""

    def sample(rng: np.random.Generator, held_out: bool) -> Item:
        while True:
            if kind == "difference":
                first, second, change = world.sample_edit(rng, held_out)
                turn = language.ask_difference(rng, first, second, change)
            else:
                first, second, _ = world.sample_pair(rng, held_out)
                ask = {"common": language.ask_common, "which": language.ask_which}[kind]
                turn = ask(rng, first, second)
            if turn:
                prompt = place_pictures(rng, turn[0], "<image><image>")
                return prompt, (first, second), turn[1]

    return sample


ROWS = {
    "caption of one thing": about_one("caption", 1),
    "caption of two": about_one("caption", 2),
    "caption of three": about_one("caption", 3),
    "colour": about_one("colour"),
    "shape": about_one("shape"),
    "count": about_one("count"),
    "background": about_one("background"),
    "existence": about_one("existence"),
    "relation": about_one("relation"),
    "size": about_one("size"),
    "place": about_one("place"),
    "two pictures: in common": about_two("common"),
    "two pictures: difference": about_two("difference"),
    "two pictures: which": about_two("which"),
}


def load(folder: Path, device: str = "cpu"):
    """A checkpoint folder -> model, processor. fp32 on a CPU, where bf16 would save nothing."""
    model = ChameleonForConditionalGeneration.from_pretrained(folder, torch.float32, device)
    return model, ChameleonProcessor.from_pretrained(folder)


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(world.render(scene))


def answer(model, processor, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
    """Greedy answers to a batch of prompts; pictures in the order of their <image> places."""
    inputs = processor(text=prompts, images=pictures or None, padding=True).to(model.device)
    with torch.inference_mode():  # the longest answer: three things, then two of them again
        ids = generate(model, **inputs, max_new_tokens=96)  # (B, T + new)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


def accuracy(model, processor, row: str, questions: int, held_out: bool = False) -> float:
    """Share of right answers to `questions` questions of one row of the table, 0..1."""
    rng = np.random.default_rng((SEED, list(ROWS).index(row), held_out))
    items = [ROWS[row](rng, held_out) for _ in range(questions)]
    right = 0
    for start in range(0, questions, BATCH):
        some = items[start : start + BATCH]
        pictures = [picture(scene) for _, scenes, _ in some for scene in scenes]
        given = answer(model, processor, [prompt for prompt, _, _ in some], pictures)
        right += sum(text.strip() == wanted for text, (_, _, wanted) in zip(given, some))
    return right / questions


# Drawing. A request asks for so many things; an edit shows a picture and asks for a change.


def drawing_of(count: int) -> Callable:
    """-> prompt, no picture, and what decides whether a drawing is right."""

    def sample(rng: np.random.Generator, held_out: bool):
        request = language.ask_drawing(rng, world.sample_scene(rng, count, held_out))
        prompt = world.pick(rng, language.DRAW_PROMPTS).format(request.text)
        return prompt, (), lambda seen: language.fulfils(seen, request)

    return sample


def edit(rng: np.random.Generator, held_out: bool):
    before, after, change = world.sample_edit(rng, held_out)

    def right(seen: Scene) -> bool:
        thing, *more = seen.things or (None,)
        return not more and thing is not None and seen.background == after.background and all(
            getattr(thing, field) == getattr(after.things[0], field)
            for field in ("colour", "shape", "size", "place")
        )  # fmt: skip

    prompt = place_pictures(rng, language.ask_edit(rng, after, change), "<image>")
    return prompt, (before,), right


DRAWINGS = {"drawing of one thing": drawing_of(1), "drawing of two": drawing_of(2), "edit": edit}


@torch.inference_mode()
def draw(model, inputs: dict, seed: int, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One drawing for each prompt -> ids of its codes (B, S), their log-likelihood (B,)."""
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
    logits = model(ids, attention_mask=mask, position_ids=positions, mask_image_logits=False).logits
    codes = ids[:, T + 1 : T + 1 + S]  # (B, S)
    logp = logits[:, T : T + S].log_softmax(-1).gather(-1, codes[..., None])  # (B, S, 1)
    return codes, logp.sum((1, 2))


def drawn_right(
    model, processor, row: str, questions: int, held_out: bool = False, guidance: float = 1.0,
    tries: int = 1,
) -> float:  # fmt: skip
    """Share of drawings that are right; of `tries` the one the model finds most likely counts."""
    rng = np.random.default_rng((SEED, list(DRAWINGS).index(row), held_out))
    items = [DRAWINGS[row](rng, held_out) for _ in range(questions)]
    right = 0
    for start in range(0, questions, BATCH):
        some = items[start : start + BATCH]
        pictures = [picture(scene) for _, scenes, _ in some for scene in scenes]
        inputs = processor(
            text=[prompt for prompt, _, _ in some], images=pictures or None, padding=True
        ).to(model.device)
        tried = [draw(model, inputs, start + n * questions, guidance) for n in range(tries)]
        best = torch.stack([logp for _, logp in tried]).argmax(0)  # (B,)
        ids = torch.stack([tried[n][0][b] for b, n in enumerate(best.tolist())])  # (B, S)
        for image, (_, _, check) in zip(decode_pictures(model, ids), some):
            right += check(world.read_scene(image))
    return right / questions


@torch.no_grad()
def survival(vq, pictures: int, held_out: bool = False) -> tuple[float, int]:
    """Share of things whose colour and shape the reader finds again after codes and back, and n."""
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
    """Prints the table, row by row as it is measured."""
    model, processor = load(folder, device)
    print(f"| {questions} questions each | ordinary | held-out |\n|---|---|---|")
    kept = [survival(model.model.vqmodel, questions, held_out)[0] for held_out in (False, True)]
    print(f"| codes: colour and shape survive | {kept[0]:.1%} | {kept[1]:.1%} |")
    for row in ROWS:
        right = [accuracy(model, processor, row, questions, h) for h in (False, True)]
        print(f"| {row} | {right[0]:.1%} | {right[1]:.1%} |", flush=True)
    for row in DRAWINGS:
        for words, options in (("", {}), (", guided, best of 4", {"guidance": 1.5, "tries": 4})):
            right = [
                drawn_right(model, processor, row, questions, held_out, **options)
                for held_out in (False, True)
            ]
            print(f"| {row}{words} | {right[0]:.1%} | {right[1]:.1%} |", flush=True)
