"""Modality: what sampling text AND pictures takes beyond sampling a Llama: a grammar, and guidance.

    TEXT --begin-image--> PICTURE (S codes) --end-image, forced--> TEXT ... until an end

Grammar says which ids may come next, from where in a picture each row stands.
Guidance compares what the model expects with and without the prompt, and enlarges the difference;
Contexts holds the versions of the prompt that it compares, as one batch behind one cache.

What happens at a switch: only what may come next changes. The cache stays as it is, as all tokens
share one model; in text the codes' logits are masked, in a picture only the codes' are computed;
and every row of a batch switches when it likes.

Letter  meaning
B, T    rows of the batch, tokens of a row so far
V, K    vocabulary; codes of the codebook
S       codes of a picture, vq_config.codes_per_image
G       guidance streams: 1, 2 or 3 versions of each row's context in one batch
D, L    width of a hidden state; columns of the cache so far
N       pictures, (N, 3, height, width) as pixels
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration, KVCache
from tokenizer import VocabularyMap

MODES = ("text", "image", "interleaved")
CACHE_STEP = 256  # the KV cache is a multiple of it, so that few shapes need to be compiled


# ---------------------------------------------------------------------------------------------
# The grammar: what may come next


class Grammar:
    """The modality grammar: which ids may come next, from where a row stands and the room left.

    `mode` is "text": no id of a picture at all; "image": one picture, at once; "interleaved":
    text, and a picture wherever the model begins one. ValueError if these weights cannot draw.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        self.mode, self.S = mode, model.config.vq_config.codes_per_image
        self.vocabulary = model.model.vocabulary
        self.begin, self.end = self.vocabulary.begin_image_id, self.vocabulary.end_image_id
        if mode != "text":
            check_can_draw(model)
        V, device = model.config.vocab_size, model.device
        self.codes = torch.zeros(V, dtype=torch.bool, device=device)
        self.codes[model.model.code_to_id] = True  # (V,)
        self.text = torch.ones(V, dtype=torch.bool, device=device)
        self.text[picture_ids(self.vocabulary)] = False  # (V,)

    def codes_so_far(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> codes since the begin-image that is still open (B,), -1 in text."""
        T = ids.shape[1]
        if self.mode == "text" or self.begin is None:
            return torch.full_like(ids[:, 0], -1)
        place = torch.arange(1, T + 1, device=ids.device)  # 1 .. T, so that 0 is "nowhere"
        begun = torch.where(ids == self.begin, place, 0).amax(1)  # (B,)
        ended = torch.where(ids == self.end, place, 0).amax(1)  # (B,)
        return torch.where(begun > ended, T - begun, -1)

    def advance(self, drawn: list[int], chosen: Tensor, room: int) -> list[int]:
        """`codes_so_far` of B rows, one id later: `chosen` (B,) with `room` places left for it.

        The ids are read only where text might have begun a picture: reading makes the host wait
        for CUDA, and so a picture, and text alone, are written without waiting.
        """
        if self.mode == "text":
            return drawn
        if self.mode == "image":  # begins at once, if it fits
            begun = [room >= self.S + 2] * len(drawn)
        else:
            begun = [False] * len(drawn) if min(drawn) >= 0 else (chosen == self.begin).tolist()
        after_text = [0 if begins else -1 for begins in begun]
        return [start if n < 0 else n + 1 if n < self.S else -1
                for n, start in zip(drawn, after_text)]

    def allowed(self, drawn: list[int], room: int) -> Tensor:
        """`codes_so_far` of B rows, places left for new ids -> bool (B, V).

        Some id is always allowed, except after the one picture of mode "image": there a row ends.
        Why exactly S codes, 1024 in the release: the VQ-VAE's decoder wants a whole grid, and
        the model never saw another number. So end-image is never sampled but inserted after S
        codes, and a picture may begin only where begin-image, S codes and end-image still fit.
        """
        outside = self.text.clone()  # (V,)
        if self.mode == "image":
            outside = torch.zeros_like(outside)
        if self.mode != "text" and room >= self.S + 2:
            outside[self.begin] = True
        full = torch.zeros_like(outside)
        if self.end is not None:
            full[self.end] = True
        return torch.stack([outside if n < 0 else self.codes if n < self.S else full
                            for n in drawn])  # (B, V)


def check_can_draw(model: ChameleonForConditionalGeneration) -> None:
    """ValueError if the weights or the vocabulary lack what a picture needs."""
    vocabulary = model.model.vocabulary
    if None in (vocabulary.begin_image_id, vocabulary.end_image_id) or not vocabulary.num_codes:
        raise ValueError("this vocabulary has no image tokens, so the model cannot draw")
    model.model.vqmodel.check_decoder()


def picture_ids(vocabulary: VocabularyMap) -> list[int]:
    """All ids that belong to pictures: the codes, begin-image, end-image and <image>."""
    marks = (vocabulary.begin_image_id, vocabulary.end_image_id, vocabulary.image_token_id)
    return vocabulary.code_to_id.tolist() + [i for i in marks if i is not None]


# ---------------------------------------------------------------------------------------------
# Guidance: what the prompt changes, made larger


def guidance_streams(text: float, image: float, mode: str, has_pictures: bool) -> list[str]:
    """Which versions of a row's context the two scales compare; each costs a row of the batch.

    full      everything
    pictures  only <s>, pictures and their marks: what is drawn if the words are not read
    nothing   only <s> and the picture being drawn, from its begin-image on
    """
    if mode == "image" and not has_pictures:
        image = 1.0  # "pictures" and "nothing" are the same context, whatever the scale
    if mode == "text" or text == image == 1.0:
        return ["full"]
    return ["full", "pictures"] if image == 1.0 else ["full", "pictures", "nothing"]


def guide(logits: Tensor, text: float, image: float) -> Tensor:
    """Logits of the G streams (G, B, K) -> guided logits (B, K). On raw logits, before any filter.

        nothing + image (pictures - nothing) + text (full - pictures)

    written as pictures + text (full - pictures) + (image - 1) (pictures - nothing): without the
    third stream the last term is left out.
    """
    full, *others = logits
    if not others:
        return full
    guided = others[0] + text * (full - others[0])
    if len(others) == 2:
        guided = guided + (image - 1) * (others[0] - others[1])
    return guided  # (B, K)


class Contexts:
    """The G versions of B rows as one left-padded batch behind one cache, one prefill for all.

    Every step feeds one column to all G * B rows. Where a version does not get the new token (a
    word is no news to "pictures"), the column is masked: it is as if it were not there. So a row
    can go from text to picture and back without ever computing its past again.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, rows: list[Tensor],
                 streams: list[str], steps: int, decoder=None) -> None:
        self.model, self.streams, self.B, self.decoder = model, streams, len(rows), decoder
        V, device = model.config.vocab_size, model.device
        self.is_picture = torch.zeros(V, dtype=torch.bool, device=device)
        self.is_picture[picture_ids(model.model.vocabulary)] = True  # (V,)
        self.begin = model.model.vocabulary.begin_image_id
        self.end = model.model.vocabulary.end_image_id
        rows = [self.version(row, name) for name in streams for row in rows]  # G * B times (n,)
        T = max(map(len, rows))
        self.new = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (GB, T)
        size = -(-(T + steps) // CACHE_STEP) * CACHE_STEP  # rounded up
        self.mask = torch.zeros(len(rows), size, dtype=torch.long, device=device)
        for mask, row in zip(self.mask, rows):
            mask[T - len(row) : T] = 1
        self.padded = len(streams) > 1 or not bool(self.mask[:, :T].all())
        self.cache = KVCache(model.config, len(rows), size, model.dtype, device)

    def version(self, row: Tensor, stream: str) -> Tensor:
        """One row's ids (n,) -> those that the stream sees; <s> always stays."""
        if stream == "full":
            return row
        keep = self.is_picture[row]  # (n,)
        if stream == "nothing":  # a picture that the prompt itself began is still being drawn
            begun = int((row == self.begin).nonzero().max()) if (row == self.begin).any() else 0
            finished = bool((row[begun:] == self.end).any())
            keep[: len(row) if finished else begun] = False
        keep[0] = True
        return row[keep]

    def hidden(self) -> Tensor:
        """Runs the columns that are new -> the last one's hidden state (G * B, D)."""
        past = self.cache.length
        L = past + self.new.shape[1]
        mask = positions = None  # no padding: every step may use the fastest attention
        if self.padded:
            mask = self.mask[:, :L]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # (GB, T)
        if self.decoder and past:  # one column behind the prompt, by faster means
            return self.decoder(self.new, self.mask if self.padded else None, positions, self.cache)
        # Only the last place's: logits of all places would be (T, V), 1 GiB at 4096 x 65536.
        return self.model.model(self.new, attention_mask=mask, position_ids=positions,
                                past_key_values=self.cache).last_hidden_state[:, -1]  # (GB, D)

    def feed(self, chosen: Tensor) -> None:
        """The rows' next ids (B,) become the next column of all streams."""
        column = self.cache.length
        for g, stream in enumerate(self.streams):
            mask = self.mask[g * self.B : (g + 1) * self.B]  # (B, size), a view
            mask[:, column] = 1 if stream == "full" else self.is_picture[chosen].long()
            if stream == "nothing":  # a new picture forgets the one before; <s> stays
                forget = (chosen == self.begin)[:, None] & (mask.cumsum(-1) > 1)  # (B, size)
                mask[:, :column].masked_fill_(forget[:, :column], 0)
        self.new = chosen.repeat(len(self.streams))[:, None]  # (GB, 1)
