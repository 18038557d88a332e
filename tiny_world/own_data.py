"""Your own training data: a folder with a .jsonl file, one {"prompt", "images", "answer"} a line.

    folder --read_examples--> (where, prompt, answer) of each line --OwnData--> Documents

Who needs it: whoever fine-tunes a checkpoint with `train.py sft --data FOLDER`. All errors in the
folder are found, with file and line, before any weight is read.
"""

import re
from pathlib import Path

import numpy as np

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import json_lines
from processor import ChameleonProcessor, load_image
from tiny_world.documents import Document, Writer


def read_examples(folder: Path) -> list[tuple[str, list, list]]:
    """-> (file and line, prompt parts, answer parts) of each line; a part is text or a Path.

    In prompt and answer each `<image>` stands for the next file of "images", a path relative to
    the folder. ValueError names the file, the line and the error.
    """
    files = sorted(file for file in folder.glob("*.jsonl") if file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no .jsonl file: write one, with one example a line")
    examples = []
    for file in files:
        for where, data in json_lines(file):
            try:
                examples.append((where, *read_example(data, folder)))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    if not examples:
        raise ValueError(f"{folder}: its .jsonl files are empty")
    return examples


def read_example(line: object, folder: Path) -> tuple[list, list]:
    """A parsed line -> prompt parts, answer parts. ValueError names the error."""
    if not isinstance(line, dict):
        raise ValueError('a line must be an object like {"prompt": "...", "answer": "..."}')
    unknown = sorted(set(line) - {"prompt", "images", "answer"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}: the keys are prompt, images, answer")
    for key in ("prompt", "answer"):
        if not isinstance(line.get(key), str) or not line[key]:
            raise ValueError(f"{key!r} must be a text that is not empty")
    images = line.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError("'images' must be a list of file names")
    places = (line["prompt"] + line["answer"]).count("<image>")
    if places != len(images):
        raise ValueError(f"{places} <image> but {len(images)} file(s) in 'images'")
    paths = [folder / name for name in images]
    for path in paths:
        load_image(path)  # ValueError for a file that is no picture
    following = iter(paths)
    pieces = (re.split("(<image>)", line[key]) for key in ("prompt", "answer"))
    prompt, answer = ([next(following) if piece == "<image>" else piece for piece in some]
                      for some in pieces)  # fmt: skip
    return prompt, answer


class OwnData:
    """Takes the place of documents.Corpus: draws the user's documents, all equally likely.

    ValueError names the line whose document is longer than the model's context.
    """

    def __init__(
        self, examples: list[tuple[str, list, list]], model: ChameleonForConditionalGeneration,
        processor: ChameleonProcessor, rng: np.random.Generator,
    ) -> None:  # fmt: skip
        codes, parts = {}, {part for _, *both in examples for parts in both for part in parts}
        for path in sorted(part for part in parts if isinstance(part, Path)):
            image = processor.image_processor(load_image(path), return_tensors="pt")
            pixels = image["pixel_values"].to(model.device)  # (1, 3, H, W)
            codes[path] = model.model.vqmodel.encode(pixels)[0].cpu().numpy()  # (S,)
        writer, self.rng = Writer(processor.tokenizer, codes), rng
        self.documents = [writer.chat(prompt, answer) for _, prompt, answer in examples]
        self.row_tokens = max(len(document.ids) for document in self.documents)
        limit = model.config.max_position_embeddings
        for (where, *_), document in zip(examples, self.documents):
            if len(document.ids) > limit:
                raise ValueError(f"{where}: {len(document.ids)} tokens, the model holds {limit}")

    def sft(self, room: int) -> Document:
        return self.documents[int(self.rng.integers(len(self.documents)))]
