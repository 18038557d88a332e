"""Which weights learn: rows for the codes, computed from the codebook; the choices of `--train`.

    codebook (K, E) --standardize--> x (K, E) --CodeRows.map--> rows (K, D)
                                                                   |
    table (V, D) of embed_tokens or lm_head -----------------------+--> table with these rows

Who needs it: whoever asks why the tiny checkpoint names compositions that it has never seen.

In a plain table a code is only a number: nothing says that two codes are both purple. The
model learns the meaning of each code from the pictures in which it occurs. If no picture shows a
purple star, it learns that no purple code belongs to a star. Code vectors of similar patches are
close to each other. Rows that a small network computes from these vectors are close, too. So what
the model learns about a blue star's tip holds in part for a purple one.

`bake` replaces the computed rows by plain numbers before a checkpoint is saved. This is our own
addition: neither the paper nor the released model has it.

`add_learned` is for a checkpoint that is fine-tuned (`train.py sft --data`): all of it learns, a
LoRA adapter, or the image codes' rows of the head alone.

Letters: K codes of the codebook, E their width, V vocabulary, D width of the residual stream.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from chameleon import ChameleonForConditionalGeneration

WIDTH = 384  # of the map's two hidden layers
LORA = dict(r=16, lora_alpha=32, target_modules=[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])  # fmt: skip


class CodeRows(nn.Module):
    """A parametrization of a table (V, D) that computes the rows of the codes."""

    def __init__(self, code_to_id: Tensor, codebook: Tensor, D: int) -> None:
        super().__init__()
        self.register_buffer("code_to_id", code_to_id, persistent=False)  # (K,)
        self.register_buffer("x", standardize(codebook))  # (K, E)
        E = codebook.shape[1]
        self.map = nn.Sequential(
            nn.Linear(E, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)
        )
        with torch.no_grad():  # the rows start with the standard deviation of a fresh table
            self.map[-1].weight.mul_(0.02 / self.map(self.x).std())
            nn.init.zeros_(self.map[-1].bias)

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.code_to_id, self.map(self.x).to(table.dtype))  # (V, D)


def standardize(codebook: Tensor) -> Tensor:
    """(K, E) -> (K, E) with values of about 1. Medians hardly notice codes that were retired."""
    x = codebook.detach() - codebook.detach().median(0).values  # (K, E)
    return (x / (1.5 * x.abs().median()).clamp(min=1e-8)).clamp(-8, 8)


def add_code_rows(model: ChameleonForConditionalGeneration) -> None:
    """Adds CodeRows to the embedding and to the head. Call it before the model changes device."""
    codebook = model.model.vqmodel.quantize.embedding.weight  # (K, E)
    for table in (model.model.embed_tokens, model.lm_head):
        rows = CodeRows(model.model.vocabulary.code_to_id, codebook, model.config.hidden_size)
        parametrize.register_parametrization(table, "weight", rows)


def bake(model: ChameleonForConditionalGeneration) -> None:
    """Turns parametrized tables into plain ones with the same numbers."""
    for table in (model.model.embed_tokens, model.lm_head):
        if parametrize.is_parametrized(table):
            parametrize.remove_parametrizations(table, "weight")


# ---------------------------------------------------------------------------------------------
# What --train names


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
