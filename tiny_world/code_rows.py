"""The codes' rows of the decoder's two tables, computed from the codebook while it learns.

    codebook (K, E) --standardize--> x (K, E) --CodeRows.map--> rows (K, D)
                                                                   |
    table (V, D) of embed_tokens or lm_head -----------------------+--> table with these rows

In a table a code is a number: nothing says that 57 and 111 are both purple. What each of them means
is learned from the pictures it occurs in, and a decoder that never saw a purple star has learned
that no purple code belongs to a star. Code vectors are near each other where patches look alike;
so are rows computed from them, and what is learned of a blue tip is in part learned of a purple
one. An exported checkpoint has plain tables (`bake`). Our own addition, in neither paper nor model.

Letters: K codes of the codebook, E their width, V vocabulary, D width of the residual stream.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from chameleon import ChameleonForConditionalGeneration

WIDTH = 384  # of the map's two hidden layers


class CodeRows(nn.Module):
    """A parametrization of a table (V, D): the rows of the codes come from the codebook."""

    def __init__(self, code_to_id: Tensor, codebook: Tensor, D: int) -> None:
        super().__init__()
        self.register_buffer("code_to_id", code_to_id, persistent=False)  # (K,)
        self.register_buffer("x", standardize(codebook))  # (K, E), saved: a state is whole
        E = codebook.shape[1]
        self.map = nn.Sequential(
            nn.Linear(E, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)
        )
        with torch.no_grad():  # rows begin as large as the other rows of a fresh table
            self.map[-1].weight.mul_(0.02 / self.map(self.x).std())
            nn.init.zeros_(self.map[-1].bias)

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.code_to_id, self.map(self.x).to(table.dtype))  # (V, D)


def standardize(codebook: Tensor) -> Tensor:
    """(K, E) -> (K, E), about 1 in size. Codes moved out of reach must not set the measure."""
    x = codebook.detach() - codebook.detach().median(0).values  # (K, E)
    return (x / (1.5 * x.abs().median()).clamp(min=1e-8)).clamp(-8, 8)


def add_code_rows(model: ChameleonForConditionalGeneration) -> None:
    """Computes the rows of the codes in the embedding and in the head; before the model moves."""
    codebook = model.model.vqmodel.quantize.embedding.weight  # (K, E)
    for table in (model.model.embed_tokens, model.lm_head):
        rows = CodeRows(model.model.vocabulary.code_to_id, codebook, model.config.hidden_size)
        parametrize.register_parametrization(table, "weight", rows)


def has_code_rows(model: ChameleonForConditionalGeneration) -> bool:
    return parametrize.is_parametrized(model.lm_head)


def bake(model: ChameleonForConditionalGeneration) -> None:
    """Writes the computed rows into plain tables, which need no codebook."""
    for table in (model.model.embed_tokens, model.lm_head):
        parametrize.remove_parametrizations(table, "weight")
