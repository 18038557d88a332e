"""During training, computes the codes' rows of the embedding and of the head from the codebook.

    codebook (K, E) --standardize--> x (K, E) --CodeRows.map--> rows (K, D)
                                                                   |
    table (V, D) of embed_tokens or lm_head -----------------------+--> table with these rows

Who needs it: whoever asks why the tiny checkpoint names compositions that it has never seen.

In a plain table a code is only a number: nothing says that codes 57 and 111 are both purple. The
model learns the meaning of each code from the pictures in which it occurs. If no picture shows a
purple star, it learns that no purple code belongs to a star. Code vectors of similar patches are
close to each other. Rows that a small network computes from these vectors are close, too. So what
the model learns about a blue star's tip holds in part for a purple one.

`bake` replaces the computed rows by plain numbers before a checkpoint is saved. This is our own
addition: neither the paper nor the released model has it.

Letters: K codes of the codebook, E their width, V vocabulary, D width of the residual stream.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from chameleon import ChameleonForConditionalGeneration

WIDTH = 384  # of the map's two hidden layers


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
