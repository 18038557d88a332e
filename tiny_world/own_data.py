"""Your own training data: a folder with a .jsonl file, one {"prompt", "images", "answer"} a line.

    folder --read_examples--> Lines --ChameleonProcessor--> ids, labels --OwnData--> batches

Who needs it: whoever fine-tunes a checkpoint with `train.py sft --data FOLDER`. All errors in the
folder are found, with file and line, before any weight is read. Also what `--train` names: a LoRA
adapter, or the image codes' rows of the head alone.
"""

from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import Line, read_lines
from processor import IGNORE, ChameleonProcessor, load_image
from tiny_world.documents import IMAGE_WEIGHT, Document, packed

LORA = dict(r=16, lora_alpha=32, target_modules=[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])  # fmt: skip


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
        if places != len(line.images):
            raise ValueError(f"{line.where}: {places} <image> but {len(line.images)} file(s) in "
                             "'images'")
        examples.append(line._replace(images=[folder / name for name in line.images]))
        try:
            for path in examples[-1].images:
                load_image(path)
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from None
    if not examples:
        raise ValueError(f"{folder}: its .jsonl files are empty")
    return examples


class OwnData:
    """The user's examples as documents, and the batches of step 0, 1, 2, ... made of them.

    ValueError names the line whose document is longer than the model's context.
    """

    def __init__(self, examples: list[Line], model: ChameleonForConditionalGeneration,
                 processor: ChameleonProcessor, seed: int) -> None:
        mark, self.pad = model.model.vocabulary.image_token_id, processor.tokenizer.pad_token_id
        self.seed, self.documents = seed, []

        @cache  # several lines may ask about one picture
        def picture_ids(path: Path) -> Tensor:
            pixels = processor.image_processor(load_image(path), return_tensors="pt")
            return model.get_image_tokens(pixels.to(model.device)["pixel_values"])[0].cpu()  # (S,)

        limit = model.config.max_position_embeddings
        for where, prompt, paths, answer in examples:
            try:
                batch = processor(text=prompt, answers=answer, images=paths or None)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            ids, labels = batch["input_ids"][0], batch["labels"][0]  # (T,), (T,)
            weight = torch.where(labels == mark, IMAGE_WEIGHT, (labels != IGNORE).float())  # (T,)
            if paths:
                ids[ids == mark] = torch.cat([picture_ids(path) for path in paths])
            if len(ids) > limit:
                raise ValueError(f"{where}: {len(ids)} tokens, the model holds {limit}")
            self.documents.append(Document())
            self.documents[-1].add(ids.tolist(), weight.tolist())

    def batch(self, step: int, B: int) -> dict[str, Tensor]:
        """As `Rows.batch`, one document a row. Each epoch is a random permutation of its own."""
        chosen = []
        for n in range(step * B, step * B + B):
            epoch, place = divmod(n, len(self.documents))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
            chosen.append(self.documents[order[place]])
        longest = max(len(document.ids) for document in chosen)
        return packed([[document] for document in chosen], longest, self.pad)


class ImageRows(nn.Module):
    """A parametrization of the head (V, D): the rows of the image codes are a parameter (K, D).
    Only they get gradients, and weight decay spares the other rows.
    """

    def __init__(self, table: Tensor, code_to_id: Tensor) -> None:
        super().__init__()
        self.register_buffer("code_to_id", code_to_id, persistent=False)  # (K,)
        self.rows = nn.Parameter(table.detach()[code_to_id].float())  # (K, D)

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.code_to_id, self.rows.to(table.dtype))  # (V, D)


def add_learned(model: ChameleonForConditionalGeneration, kind: str):
    """Freezes what --train leaves out -> peft's wrapper around the model for lora, else None.

    all: every weight but the VQ-VAE. lora: low-rank updates of all matrices of the layers (arXiv
    2106.09685). image-head: the image codes' rows of lm_head (Anole, arXiv 2407.06135).
    """
    if kind == "all":
        return None
    model.requires_grad_(False)
    if kind == "image-head":
        if model.config.tie_word_embeddings:
            raise ValueError("--train image-head needs a head of its own, and this one is the "
                             "embedding's matrix, too (tie_word_embeddings): --train all or lora")
        rows = ImageRows(model.lm_head.weight, model.model.vocabulary.code_to_id)
        parametrize.register_parametrization(model.lm_head, "weight", rows)
        return None
    try:
        import peft  # here: an extra
    except ImportError:
        raise ValueError('--train lora needs peft: pip install -e ".[lora]"') from None
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))
