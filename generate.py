"""THE sampling loop: how a Chameleon answers, draws, and writes both into one document.

    prompt (B,T) --prefill--> hidden (G,B,D) --guidance, grammar, filters--> next ids (B,)
                                    ^                                              |
                                    +----- one more column of the KV cache <-------+

The prompt goes through the model once, all tokens at a time, and fills the KV cache. After that,
each new token costs a step over one position. `loop` shows the whole way from one id to the next.

Text and pictures come from the same loop. A picture is begin-image, exactly S codes, end-image:

    TEXT --begin-image--> PICTURE (S codes) --end-image, forced--> TEXT ... until an end

At a switch of modality only the choice of the next id changes. In text, the logits of the codes are
masked. In a picture, only the codes' logits are computed. The KV cache stays as it is, because all
tokens share one model. Each row of a batch switches on its own.

Rows of a batch are independent. Each has its own positions, modality, end and random numbers, so
each row gives the ids that it would give alone. Two exceptions: the longest prompt decides how much
room is left for all answers, and with dynamic RoPE theta follows the longest row.

Letter  meaning
B, T    rows of the batch; tokens of a row so far
V, K    ids of the vocabulary; codes of the codebook
S       codes of a picture, vq_config.codes_per_image
G       guidance streams: 1, 2 or 3 versions of each row's context, all in one batch
D, L    width of a hidden state; columns of the KV cache so far
N       pictures, as pixels (N, 3, height, width)

Run as a program, this file is the command: `python generate.py --help`.
"""

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from processor import ChameleonImageProcessor
from tokenizer import IDS, StreamDecoder, Tokenizer, VocabularyMap, check_ids
from vqvae import Flag, check_fields, real, whole

MODES = ("text", "image", "interleaved")
NO_ID = -1  # in place of an id where logits are inf or nan: argmax would choose the nan
CACHE_STEP = 256  # the length of a KV cache is a multiple of it, so that the next may reuse it

# ---------------------------------------------------------------------------------------------
# The options. As in the configs, a type says in words, and by a check, which values are possible.

Mode = Annotated[str, f"one of {', '.join(MODES)}", lambda x: x in MODES]
Number = Annotated[int, "a whole number, at least 1", whole(1, 2**62)]
Rows = Annotated[int, "a whole number from 1 to 65536", whole(1, 2**16)]
Temperature = Annotated[float, "0 (greedy), or from 0.0001 to 1e30",
                        lambda x: x == 0 or real(1e-4, 1e30)(x)]
NumberOr0 = Annotated[int, "a whole number, 0 for no limit", whole(0, 2**62)]
TopP = Annotated[float, "above 0 and at most 1", lambda x: real(0, 1)(x) and x > 0]
Penalty = Annotated[float, "from 0.01 to 100 (1 is none)", real(0.01, 100)]
Guidance = Annotated[float, "from 0 to 1000 (1 is none)", real(0, 1000)]


@dataclass(frozen=True)
class Options:
    """All options of `stream` and `generate`. ValueError, naming it, for a wrong value."""

    mode: Mode = "text"  # "image": one picture at once; "interleaved": as the model decides
    max_new_tokens: Number | None = None  # not for "image"; None: 256 for "text", else all that fit
    max_length: Number | None = None  # prompt and answer together; max_new_tokens has precedence
    min_new_tokens: NumberOr0 = 0  # a text does not end before
    do_sample: Flag = False  # of text; pictures are sampled unless image_temperature is 0
    temperature: Temperature = 1.0
    top_k: NumberOr0 | None = None
    top_p: TopP = 1.0
    repetition_penalty: Penalty = 1.0  # never acts inside a picture
    image_temperature: Temperature = 1.0
    image_top_k: NumberOr0 | None = None
    image_top_p: TopP = 1.0
    guidance_text: Guidance = 1.0
    guidance_image: Guidance = 1.0
    num_return_sequences: Rows = 1  # so many rows of each prompt, one after the other
    seed: int | list[int] = 0  # row b draws with seed + b, or with its own of a list
    eos_token_id: int | list[int] | None = None  # None: the config's, and end of turn
    pad_token_id: int | None = None  # what a row yields that has ended; None: the config's
    stop_strings: str | Sequence[str] | None = None  # a row also ends when its answer holds one
    tokenizer: Tokenizer | None = None  # needed for stop_strings
    past_key_values: KVCache | None = None  # of an earlier call; see `stream`
    compile: bool = False  # the same ids sooner, after seconds of compiling in the first call
    decoder: Any = None  # of chameleon_extras.decoding; None: the model's; False: plain steps

    def __post_init__(self) -> None:
        check_fields(self)


# ---------------------------------------------------------------------------------------------
# Filters, logits (B, V) -> logits (B, V), and from logits to an index


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes every id of `ids` (B, T) less likely, prompt included (CTRL, arXiv 1909.05858, 4.1).

        logit / penalty where positive, logit * penalty where negative (as in transformers)
    """
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, ids)  # (B, T)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.scatter(-1, ids, seen)


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Keeps the k highest logits of each row, and those equal to the k-th."""
    if not k or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1), the lowest logit that stays
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751, 3.1): keeps the smallest set of most likely ids whose
    probabilities sum to p or more. At least one id is kept.
    """
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # The sum BEFORE an id decides, so the id with which the sum crosses p is kept.
    drop = probs.cumsum(-1) - probs >= p
    drop[..., 0] = False  # a p below 1e-45 is 0 in fp32, and would drop even the first
    return logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))  # in order of ids


def sample(logits: Tensor, generators: list[torch.Generator | None]) -> Tensor:
    """One index for each row, distributed as softmax(logits).   (B, V) -> (B,)

        argmax_i p_i / e_i  is i with probability p_i, if the e_i are independent and exponential

    Compared with torch.multinomial, this needs no cumulative sum and no GPU synchronization (a wait
    of the host for the device), and each row keeps its own sequence of random numbers. A row whose
    generator is None uses no random number, and its index must not be used.
    """
    noise = torch.ones_like(logits)  # (B, V)
    for row, generator in zip(noise, generators):
        if generator is not None:
            row.exponential_(generator=generator).clamp_(1e-30)  # MPS may draw 0, and 0 / 0 is nan
    return (logits.softmax(-1) / noise).argmax(-1)  # (B,)


def choose(logits: Tensor, generators: list[torch.Generator | None], temperature: float,
           top_k: int | None, top_p: float) -> Tensor:
    """logits (B, V) -> an index for each row (B,). The filters' order is that of transformers."""
    if temperature == 0:  # greedy: the most likely one
        return logits.argmax(-1)  # (B,)
    logits = keep_top_k(logits / temperature, top_k)
    return sample(keep_top_p(logits, top_p), generators)


# ---------------------------------------------------------------------------------------------
# The grammar: which ids may come next


class Grammar:
    """The modality grammar: which ids may come next in each row.

    `mode` is "text" (no id of a picture at all), "image" (one picture, at once) or "interleaved"
    (text, and a picture wherever the model begins one).

    `missing` says for each row how many ids its picture still lacks: S + 1 after begin-image. At 1
    the next id must be end-image. In text it is 0.

    Why a picture has exactly S codes (1024 in the release): the VQ-VAE's decoder needs a whole grid
    (section 2.1), and the model was trained on no other number. So end-image is never sampled but
    inserted after S codes, and begin-image is allowed only where S codes and end-image still fit.

    `stops` are the ids that end a row. In text, none is allowed while more than `end_room` ids may
    still be made: min_new_tokens.

    ValueError if these weights cannot draw and `mode` wants pictures.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, mode: str,
                 stops: Sequence[int] = (), end_room: int = 0) -> None:
        self.mode, self.S = mode, model.config.vq_config.codes_per_image
        vocabulary, V = model.model.vocabulary, model.config.vocab_size
        self.begin, self.end = vocabulary.begin_image_id, vocabulary.end_image_id
        if mode != "text":
            if None in (self.begin, self.end) or not vocabulary.num_codes:
                raise ValueError("this vocabulary has no image tokens, so the model cannot draw")
            model.model.vqmodel.needed_decoder()

        def only(ids: Sequence[int | None]) -> Tensor:
            mask = torch.zeros(V, dtype=torch.bool, device="cpu")  # then one copy to the device
            mask[[i for i in ids if i is not None]] = True
            return mask.to(model.device)  # (V,)

        self.stops, self.end_room = only(stops), end_room
        self.codes, self.end_only = only(vocabulary.code_to_id.tolist()), only([self.end])
        self.pictures = only(ids_of_pictures(vocabulary))
        self.text = ~self.pictures if mode != "image" else only([])
        self.text_or_begin = self.text | only([self.begin])

    def fits(self, room: int) -> bool:
        """May a picture begin: does all of it, with its marks, fit into `room` more ids?"""
        return self.mode != "text" and room >= self.S + 2

    def missing(self, ids: Tensor) -> list[int]:
        """ids of prompts (B, T) -> for each row, how many ids the picture at its end lacks."""
        T = ids.shape[1]
        if self.mode == "text":
            return [0] * len(ids)
        column = torch.arange(1, T + 1, device=ids.device)  # from 1, so that 0 means "nowhere"
        begun = torch.where(ids == self.begin, column, 0).amax(1).tolist()  # B numbers
        ended = torch.where(ids == self.end, column, 0).amax(1).tolist()
        # A picture is open if it began after the last one ended; T - b ids follow its begin-image.
        return [max(1, self.S + 1 - (T - b)) if b > e else 0 for b, e in zip(begun, ended)]

    def advance(self, missing: list[int], chosen: Tensor, room: int) -> list[int]:
        """`missing` one id later. `chosen` (B,) are the ids just chosen, `room` is how many ids
        could still be made when they were chosen.

        To read the ids on the host is a GPU synchronization. They are read only where a row of an
        interleaved document is in text; a whole picture, or plain text, needs no synchronization.
        """
        if self.mode == "interleaved" and 0 in missing:
            begins = (chosen == self.begin).tolist()
        else:  # in mode "image" a picture fits before the first id, begin-image, and not later
            begins = [self.mode == "image" and self.fits(room)] * len(missing)
        return [n - 1 if n else self.S + 1 if begin else 0 for n, begin in zip(missing, begins)]

    def allowed(self, missing: list[int], room: int) -> Tensor:
        """`missing` of B rows, and how many ids may still be made -> bool (B, V).

        After the picture of mode "image" no id is allowed: the row has ended.
        """
        text = self.text_or_begin if self.fits(room) else self.text
        if room > self.end_room:
            text = text & ~self.stops
        masks = text, self.end_only, self.codes  # 1: end-image is forced; 2 or more: a code
        return torch.stack([masks[min(n, 2)] for n in missing])  # (B, V)


def ids_of_pictures(vocabulary: VocabularyMap) -> list[int]:
    """All ids that belong to pictures: the codes, begin-image, end-image and <image>."""
    marks = (vocabulary.begin_image_id, vocabulary.end_image_id, vocabulary.image_token_id)
    return vocabulary.code_to_id.tolist() + [i for i in marks if i is not None]


# ---------------------------------------------------------------------------------------------
# Guidance: it strengthens the effect of the prompt on the logits


def guidance_weights(s_text: float, s_image: float, mode: str,
                     has_pictures: bool) -> dict[str, float]:
    """The versions (streams) of a row's context to compare -> the weight of each one's logits.

    full      the whole context
    pictures  only the first id (<s>), the pictures and their marks: as if the words were not read
    nothing   only the first id and the picture being drawn, from its begin-image on

    Classifier-free guidance (arXiv 2207.12598) with two scales, as InstructPix2Pix has them
    (arXiv 2211.09800, equation 3):

        nothing + s_image (pictures - nothing) + s_text (full - pictures)
      = s_text full + (s_image - s_text) pictures + (1 - s_image) nothing

    Each stream costs a row of the batch, so one of weight 0 is left out. "full" stays: text is
    written from it.
    """
    if mode == "text":
        s_text = s_image = 1.0  # no guidance
    if mode == "image" and not has_pictures:
        s_image = 1.0  # without pictures in the prompt, "pictures" and "nothing" are the same
    weights = {"full": s_text, "pictures": s_image - s_text, "nothing": 1 - s_image}
    return {name: weight for name, weight in weights.items() if weight or name == "full"}


def guide(logits: Tensor, weights: Iterable[float]) -> Tensor:
    """The weighted sum of G streams' raw logits, before any filter.   (G, B, K) -> (B, K)"""
    return torch.stack([weight * stream for weight, stream in zip(weights, logits)]).sum(0)


class Contexts:
    """The G versions of B rows: one batch, one KV cache, one prefill for all.

    All versions hold the same ids. Where one must not see an id (a word, in the stream "pictures"),
    its column is masked for that row. So a row can go from text to a picture and back, and nothing
    of its past is computed again.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, grammar: Grammar,
                 is_token: Tensor, streams: list[str], limit: int, decoder=None) -> None:
        self.model, self.grammar, self.streams, self.decoder = model, grammar, streams, decoder
        self.is_token = F.pad(is_token, (0, limit), value=True)  # (B, T + limit)
        self.needs_mask = len(streams) > 1 or not bool(is_token.all())
        rows, size = len(is_token) * len(streams), self.is_token.shape[1]
        size = -(-size // CACHE_STEP) * CACHE_STEP  # rounded up
        if decoder:  # of decoding.py, for fast steps: it may reuse the last answer's cache
            self.cache = decoder.new_cache(rows, size)
        else:
            self.cache = KVCache(model.config, rows, size, model.dtype, model.device)

    def take_over(self, past: KVCache, seen: Tensor) -> None:
        """Copies from `past` the columns of the first ids that are equal in both; the model reads
        only the rest. It always reads the last id, because a cache holds no hidden states.
        """
        ids = seen if past.ids is None else past.ids  # None: filled by forward, taken as equal
        n = min(past.length, ids.shape[1], seen.shape[1] - 1)
        same = (ids[:, :n] == seen[:, :n]).all(0)  # (n,)
        self.cache.length = n = int(same.cumprod(0).sum())
        for ours, theirs in zip(self.cache.k + self.cache.v, past.k + past.v):
            ours[:, :, :n] = theirs[:, :, :n]

    def hand_over(self, past: KVCache, seen: Tensor) -> None:
        """`past` gets the columns of the stream "full", and their ids out of `seen` (B, T)."""
        n = min(self.cache.length, seen.shape[1] - 1)  # Ctrl-C may leave the last column unfilled
        past.k, past.v = ([x[: len(seen), :, :n].clone() for x in kind]
                          for kind in (self.cache.k, self.cache.v))
        past.ids, past.length, past.max_length = seen[:, :n].clone(), n, None

    def visible(self, seen: Tensor, stream: str) -> Tensor:
        """Ids so far (B, L) -> those that the stream sees, bool (B, L). All see a row's first."""
        is_token = self.is_token[:, : seen.shape[1]]  # (B, L)
        if stream == "full":
            return is_token
        sees = self.grammar.pictures[seen]  # (B, L)
        if stream == "nothing":  # only the last picture, from its begin-image on
            begun = (seen == self.grammar.begin).cumsum(1)  # (B, L)
            sees = sees & (begun == begun[:, -1:])
        return is_token & (sees | (is_token.cumsum(1) == 1))  # (B, L)

    def hidden(self, seen: Tensor) -> Tensor:
        """Runs the ids (B, L) that the cache does not hold -> the last hidden states (G, B, D)."""
        filled = self.cache.length
        new = seen[:, filled:].repeat(len(self.streams), 1)  # (GB, T)
        mask = positions = None  # without padding and guidance: the fastest attention
        if self.needs_mask:
            mask = torch.cat([self.visible(seen, stream) for stream in self.streams])  # (GB, L)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, filled:]  # (GB, T)
        if self.decoder and self.decoder.compiled and filled and new.shape[1] == 1:  # a step
            hidden = self.decoder(new, mask, positions, self.cache)  # (GB, D)
        else:  # no head yet: fp32 logits of all T positions would be 1 GiB at 4096 x 65536
            with self.decoder.kernels(new.numel(), False) if self.decoder else nullcontext():
                hidden = self.model.model(
                    new, attention_mask=mask, position_ids=positions,
                    past_key_values=self.cache, return_dict=True).last_hidden_state[:, -1]  # (GB,D)
        return hidden.unflatten(0, (-1, len(seen)))  # (G, B, D)


# ---------------------------------------------------------------------------------------------
# The loop


def rows_of(head: nn.Module, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The head for these ids alone: (..., D) -> (..., len(ids))."""
    plain = not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    if plain and (rows := getattr(head, "rows", None)):  # a quantized layer selects its own rows
        return rows(ids)
    if not plain or type(head) is not nn.Linear or head.bias is not None:
        return lambda hidden: head(hidden)[..., ids]  # the whole head, with what was added to it
    part = nn.Linear(head.in_features, len(ids), bias=False, device="meta")
    part.weight = nn.Parameter(head.weight.detach()[ids], requires_grad=False)  # (len(ids), D)
    return part


class Picker:
    """Hidden states of all guidance streams -> each row's next id. `weights` are the streams'."""

    def __init__(self, model: ChameleonForConditionalGeneration, grammar: Grammar,
                 options: Options, generators: list[torch.Generator],
                 weights: dict[str, float]) -> None:
        self.grammar, self.options, self.generators = grammar, options, generators
        self.weights, self.code_to_id = weights, model.model.vocabulary.code_to_id
        self.head = self.code_head = model.lm_head  # (..., D) -> (..., V), (..., K)
        if grammar.mode != "text":
            self.code_head = rows_of(model.lm_head, self.code_to_id)
        if options.decoder:
            self.head, self.code_head = map(options.decoder.fast_head, (self.head, self.code_head))

    def __call__(self, hidden: Tensor, seen: Tensor, missing: list[int], room: int) -> Tensor:
        """hidden (G, B, D), ids so far (B, T), `missing` of B rows -> next ids (B,), NO_ID for a
        row whose logits are inf or nan.

        Rows in text need the whole head. Rows in a picture need only the head's K rows for codes,
        since no other id is allowed there. A batch with both computes both for all rows, and takes
        one of the two for each.
        """
        inside = [n > 1 for n in missing]  # at 1, next_text makes end-image, the one allowed id
        if all(inside):
            return self.next_code(hidden, inside)
        text = self.next_text(hidden[0], seen, missing, room, inside)
        if not any(inside):
            return text
        codes = self.next_code(hidden, inside)
        return torch.where(torch.tensor(inside, device=text.device), codes, text)  # (B,)

    def next_text(self, hidden: Tensor, seen: Tensor, missing: list[int], room: int,
                  inside: list[bool]) -> Tensor:
        """The next id of rows in text, from the full context alone.   hidden (B, D) -> ids (B,)"""
        logits = computed = self.head(hidden).float()  # (B, V)
        logits = penalize_repetition(logits, seen, self.options.repetition_penalty)
        logits = logits.masked_fill(~self.grammar.allowed(missing, room), float("-inf"))
        generators = [None if drawing else g for g, drawing in zip(self.generators, inside)]
        o = self.options  # without do_sample the temperature below is 0: greedy
        ids = choose(logits, generators, o.temperature * o.do_sample, o.top_k, o.top_p)  # (B,)
        return ids.masked_fill(~computed.sum(-1).isfinite(), NO_ID)  # inf and nan stay in a sum

    def next_code(self, hidden: Tensor, inside: list[bool]) -> Tensor:
        """The next id of rows in a picture, from all streams.   hidden (G, B, D) -> ids (B,)"""
        logits = self.code_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])  # (G, B, K)
        o = self.options
        logits = guide(logits.float(), self.weights.values())  # (B, K)
        generators = [g if drawing else None for g, drawing in zip(self.generators, inside)]
        codes = choose(logits, generators, o.image_temperature, o.image_top_k, o.image_top_p)
        return self.code_to_id[codes].masked_fill(~logits.sum(-1).isfinite(), NO_ID)  # (B,)


def until_ended(steps: Iterator[Tensor], stops: Tensor, pad: int, strings: Sequence[str],
                readers: list[StreamDecoder]) -> Iterator[Tensor]:
    """Passes the ids (B,) on until the last row has ended. ValueError for NO_ID.

    A row ends with an id for which `stops` (V,) is True, or when its answer holds one of `strings`;
    `readers` has one for each row, or none without strings. Ended rows get `pad`.
    """
    ended = torch.tensor(False, device="cpu")  # whatever torch's default device is
    stops = stops.cpu()  # (V,)
    texts = [""] * len(readers)
    for ids in steps:
        ids = ids.cpu().masked_fill(ended, pad)  # (B,)
        if (ids == NO_ID).any():
            raise ValueError("the model computes inf or nan: its weights are damaged, or too large "
                             "for this dtype")
        yield ids
        ended = ended | stops[ids]  # (B,)
        for row, (reader, i) in enumerate(zip(readers, ids.tolist())):
            texts[row] += reader.feed(i)
            ended[row] |= any(string in texts[row] for string in strings)
        if ended.all():
            return


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, dropout is off. At the end, each module gets its training mode back. The loop leaves
    this between two ids, because the caller may then train the model, or drop the iterator. Threads
    may share a model only if no part of it is in training.
    """
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@torch.inference_mode()
def loop(model: ChameleonForConditionalGeneration, input_ids: Tensor, is_token: Tensor,
         pixel_values: Tensor | None, pick: Picker, pad: int, limit: int) -> Iterator[Tensor]:
    """One iteration for each token: hidden states, choice, update. `stream` checks the arguments.

    `is_token` (B, T) is False on padding. The loop itself does not stop when all rows have ended:
    asking the device for that in each step would be a GPU synchronization. `until_ended`, which
    reads ids that have arrived on the host, stops it.
    """
    input_ids = model.model.replace_image_placeholders(input_ids, pixel_values)  # (B, T)
    o, grammar = pick.options, pick.grammar
    start = int(is_token.any(0).nonzero()[0])  # before this column all is padding
    input_ids, is_token = (x[:, start:].repeat_interleave(o.num_return_sequences, dim=0)
                           for x in (input_ids, is_token))  # (B, T)
    # Padding becomes a copy of the row's last id: the grammar and the repetition penalty look at
    # all ids, and that one is in the row anyway.
    seen = torch.where(is_token, input_ids, input_ids[:, -1:])  # (B, T)
    missing = grammar.missing(seen)
    contexts = Contexts(model, grammar, is_token, list(pick.weights), limit, o.decoder)
    if o.past_key_values is not None and len(pick.weights) == 1:
        contexts.take_over(o.past_key_values, seen)
    ended = torch.zeros_like(seen[:, 0], dtype=torch.bool)  # (B,)
    modules = list(model.modules())
    try:
        for room in range(limit, 0, -1):  # how many ids may still be made
            with evaluating(modules):
                hidden = contexts.hidden(seen)  # (G, B, D)
                chosen = pick(hidden, seen, missing, room).masked_fill(ended, pad)  # (B,)
            yield chosen
            chosen = chosen.clamp(min=0)  # NO_ID is no index; until_ended raises on it
            ended = ended | grammar.stops[chosen]  # (B,)
            missing = grammar.advance(missing, chosen, room)
            seen = torch.cat((seen, chosen[:, None]), dim=1)  # (B, T + 1)
    finally:
        if o.past_key_values is not None:
            contexts.hand_over(o.past_key_values, seen)
        if o.decoder:
            o.decoder.keep(contexts.cache)


# ---------------------------------------------------------------------------------------------
# stream and generate: the loop, and the checks before its first step


def seeds_of(seed: int | list[int], rows: int) -> list[int]:
    """-> a seed for each row; ValueError if there is not one for each, or one is too large."""
    seeds = [seed + b for b in range(rows)] if isinstance(seed, int) else seed
    if not isinstance(seeds, (list, tuple)) or len(seeds) != rows:
        raise ValueError(f"seed must be a whole number or a list of {rows}, got {seed!r:.40}")
    if not all(isinstance(s, int) and abs(s) < 2**63 for s in seeds):
        raise ValueError("seeds are whole numbers below 2^63, and row b adds b: take a smaller one")
    return list(seeds)


def room_behind(config: ChameleonConfig, prompt_length: int, mode: str = "text") -> int:
    """How many ids fit behind a prompt. ValueError if none fits, or in mode "image" no picture."""
    context = int(config.max_position_embeddings * config.rope_factor)
    picture = config.vq_config.codes_per_image + 2
    if prompt_length + (picture if mode == "image" else 1) > context:
        raise ValueError(f"the prompt has {prompt_length} tokens, pictures included, but the "
                         f"context holds {context}"
                         + (f" and a picture takes {picture}" if mode == "image" else "")
                         + ": shorten it or use fewer pictures")
    return context - prompt_length


def real_tokens(model: ChameleonForConditionalGeneration, input_ids: Tensor,
                attention_mask: Tensor | None, pad: int | None, stops: list[int]) -> Tensor:
    """-> which ids are no padding, bool (B, T). ValueError for what would give a wrong answer.

    Without an attention_mask, padding is recognized by its id, as in transformers.
    """
    lowest, highest, V = int(input_ids.min()), int(input_ids.max()), model.config.vocab_size
    if lowest < 0 or highest >= V:
        raise ValueError(f"input_ids hold {lowest}..{highest}, but the ids of this model are 0 to "
                         f"{V - 1}: take the tokenizer of its own folder")
    if attention_mask is None:  # an id that ends a row is no padding
        attention_mask = torch.ones_like(input_ids) if pad in (None, *stops) else input_ids != pad
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        found = isinstance(attention_mask, Tensor) and tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be a tensor {tuple(input_ids.shape)}, as input_ids "
                         f"are, got {found or type(attention_mask).__name__}")
    if not attention_mask[:, -1].all():
        raise ValueError("the prompts are padded on the right, and the next token would follow "
                         "padding: use padding_side='left'")
    return attention_mask.bool()


def check_past(config: ChameleonConfig, past: KVCache, rows: int, is_token: Tensor) -> None:
    """ValueError for a cache that these rows cannot continue. is_token (B, T): False on padding."""
    shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if not isinstance(past, KVCache) or shape != (
            len(past.k), past.k[0].shape[1], past.k[0].shape[3]):  # k (B, Hkv, L, Dh)
        raise ValueError("past_key_values is no cache of this model: begin with KVCache(config)")
    past.check_batch(rows)
    if not is_token.all():
        raise ValueError("past_key_values is for rows of one length, without padding")
    if past.ids is None and past.length >= is_token.shape[1]:
        raise ValueError(f"past_key_values holds {past.length} columns, the prompt has "
                         f"{is_token.shape[1]} ids: pass all ids, also those that it has read")


def stop_ids(model: ChameleonForConditionalGeneration, eos_token_id, mode: str) -> list[int]:
    """The ids that end a row: end-image for "image", else those given, or </s> and end of turn."""
    vocabulary = model.model.vocabulary
    asked = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ids: list[int | None] = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if mode == "image":
        ids = [vocabulary.end_image_id]
    elif eos_token_id is None:
        ids.append(vocabulary.end_of_turn_id)
    return [i for i in ids if i is not None]


def unwrapped(model: nn.Module) -> ChameleonForConditionalGeneration:
    """The model inside a wrapper, such as a LoRA model of peft. ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, ChameleonForConditionalGeneration):
            # Prompt tuning has a prompt_encoder, or replaces a method of the model inside.
            if hasattr(model, "prompt_encoder") or (
                    module.prepare_inputs_for_generation.__self__ is not module):
                raise ValueError("generate does not read the prompts that peft's prompt tuning has "
                                 "learned: use LoRA")
            return module
    raise ValueError(f"{type(model).__name__} holds no ChameleonForConditionalGeneration")


def stream(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,  # (B, T), padded on the left
    attention_mask: Tensor | None = None,  # (B, T), 0 on padding
    pixel_values: Tensor | None = None,  # (N, 3, H, W), for the <image> placeholders in order
    **options,  # those of Options
) -> Iterator[Tensor]:
    """Yields the next id of every row, (B,), until all have ended or the limit is reached.

    A row that has ended yields padding. Text is greedy by default. ValueError at once for options
    and prompts that cannot work; a wrong number of pictures shows at the first id.

    A conversation reads only what is new if each call gets the same `past_key_values`, which begins
    as KVCache(config, B). input_ids are the whole conversation; the ids at its start that are in
    the cache are not read again. The answers are those of a call without it, except with dynamic
    RoPE. Each call leaves its columns in the cache. Rows must have no padding. With guidance, the
    whole prompt is read again. Changed weights need a new cache.
    """
    if unknown := options.keys() - Options.__dataclass_fields__.keys():
        raise TypeError(f"generate has no option {min(unknown)!r}; it has "
                        + ", ".join(Options.__dataclass_fields__))
    o, model = Options(**options), unwrapped(model)
    if getattr(input_ids, "dtype", None) not in IDS or input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be int64 (B,T), T > 0, not {type(input_ids).__name__} "
                         f"{getattr(input_ids, 'dtype', '')} {getattr(input_ids, 'shape', '')}")
    if not o.do_sample and o.mode != "image" and (
            o.temperature not in (0, 1) or o.top_k or o.top_p < 1
            or (o.num_return_sequences > 1 and o.mode == "text")):
        warnings.warn("without do_sample=True, text is greedy: temperature, top_k and top_p change "
                      "nothing, and num_return_sequences gives equal rows", stacklevel=2)
    T = input_ids.shape[1]
    room, asked = room_behind(model.config, T, o.mode), o.max_new_tokens
    if asked is None and o.max_length is not None:
        asked = o.max_length - T
        if asked < 1:
            raise ValueError(f"max_length must be a whole number above {T}, the ids of the prompt, "
                             f"got {o.max_length}: or set max_new_tokens")
    limit = min(room, asked or (256 if o.mode == "text" else room))
    if o.mode == "image":
        limit = model.config.vq_config.codes_per_image + 2  # one picture with its marks
    if o.min_new_tokens > limit:
        raise ValueError(f"min_new_tokens {o.min_new_tokens} is more than the {limit} ids that may "
                         "come: raise max_new_tokens, or shorten the prompt")
    stops = stop_ids(model, o.eos_token_id, o.mode)
    padding = model.config.pad_token_id if o.pad_token_id is None else o.pad_token_id
    pad = next(i for i in (padding, *stops, 0) if i is not None)
    for name, i in ("pad_token_id", pad), *(("eos_token_id", i) for i in stops):
        check_ids({name: i}, model.config.vocab_size)
    is_token = real_tokens(model, input_ids, attention_mask, padding, stops)
    seeds = seeds_of(o.seed, len(input_ids) * o.num_return_sequences)
    if o.past_key_values is not None:
        check_past(model.config, o.past_key_values, len(seeds), is_token)
    strings, readers = o.stop_strings or (), []
    strings = [strings] if isinstance(strings, str) else list(strings)
    if strings:
        if not isinstance(o.tokenizer, Tokenizer):
            raise ValueError("stop_strings needs tokenizer=processor.tokenizer")
        readers = [StreamDecoder(o.tokenizer) for _ in seeds]
    if o.decoder is None:
        from chameleon_extras.decoding import decoder_of  # what is fast is no part of the loop

        o = replace(o, decoder=decoder_of(model, o.compile))
    generators = [torch.Generator(input_ids.device).manual_seed(s) for s in seeds]
    grammar = Grammar(model, o.mode, stops, limit - o.min_new_tokens)
    has_pictures = grammar.begin in input_ids.flatten().tolist()
    weights = guidance_weights(o.guidance_text, o.guidance_image, o.mode, has_pictures)
    pick = Picker(model, grammar, o, generators, weights)
    chosen = loop(model, input_ids, is_token, pixel_values, pick, pad, limit)
    chosen = o.decoder.read(chosen) if o.decoder else chosen
    return until_ended(chosen, grammar.stops, pad, strings, readers)


def generate(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,  # (B, T), padded on the left
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    *,
    streamer=None,  # an object with put(ids) and end(), as transformers' streamers
    use_cache: bool = True,  # accepted: the cache is always used, and changes no id
    **options,  # those of Options
) -> Tensor:
    """Prompt ids (B, T) -> prompt and answer (B, T + new), ended rows padded.

    `model.generate(**inputs, ...)` is the same, and takes a GenerationConfig, and options that
    change nothing, such as num_beams=1. TypeError for others.
    DIFFERS: it can make pictures. It calls `model.model` and `lm_head`, so no `forward` or hook of
    the whole model runs. An answer also ends at end of turn, or when the context is full. Text has
    no begin-image, end-image or <image>; transformers masks the codes only. The seed is 0 in each
    call, whatever torch.manual_seed was. top_k defaults to none, not 50, and the length to 256 new
    ids, not 20. A stop string must begin in the answer. No generation_config.json is read.
    """
    steps = stream(model, input_ids, attention_mask, pixel_values, **options)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    new = []
    for ids in steps:
        new.append(ids)
        if streamer is not None:
            streamer.put(ids)
    if streamer is not None:
        streamer.end()
    new = torch.stack(new, dim=1).to(input_ids.device)  # (B, new)
    prompts = input_ids.repeat_interleave(len(new) // len(input_ids), dim=0)  # (B, T)
    return torch.cat((prompts, new), dim=1)  # (B, T + new)


# ---------------------------------------------------------------------------------------------
# From ids to what a person reads and looks at


class Piece(NamedTuple):
    """Something new in one row's answer: text, or a picture with so many of its codes drawn."""

    row: int
    text: str = ""
    image: Image.Image | None = None
    drawn: int = 0  # S when the picture is whole


def decode_pictures(model: ChameleonForConditionalGeneration, ids: Tensor) -> list[Image.Image]:
    """Ids of pictures (N, S), no marks -> N pictures."""
    from chameleon_extras.decoding import decode_codes  # fp32 or bf16: that depends on the machine

    codes = model.model.vocabulary.codes_from_ids(ids)  # (N, S)
    return ChameleonImageProcessor.postprocess(decode_codes(model.model.vqmodel, codes))


def pieces(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer,
           steps: Iterator[Tensor], every: int = 0) -> Iterator[Piece]:
    """What `stream` yields -> text as soon as it is valid text, and pictures.

    A picture comes when its last code is drawn. With `every`, it also comes unfinished, after each
    so many codes; its first code fills the rest. On Ctrl-C, first yields what is half done, then
    re-raises.
    """
    vocabulary, S = tokenizer.vocabulary, model.config.vq_config.codes_per_image
    readers, interrupt = defaultdict(lambda: StreamDecoder(tokenizer)), None  # row -> its decoder
    drawn: dict[int, list[int]] = {}  # row -> the ids so far of the picture that it is in

    def picture(row: int) -> Piece:
        n = len(drawn[row])
        ids = torch.tensor([drawn[row] + drawn[row][:1] * (S - n)], device=model.device)  # (1, S)
        return Piece(row, image=decode_pictures(model, ids)[0], drawn=n)

    try:
        for ids in steps:
            for row, i in enumerate(ids.tolist()):
                if i == vocabulary.begin_image_id:
                    drawn[row] = []
                elif row in drawn:
                    drawn[row].append(i)
                    n = len(drawn[row])
                    if n == S or (every and n % every == 0):
                        yield picture(row)
                    if n == S:
                        del drawn[row]  # the next id is end-image, which is no text
                elif text := readers[row].feed(i):
                    yield Piece(row, text)
    except KeyboardInterrupt as stop:
        interrupt = stop  # first hand over what is done
    for row, reader in readers.items():
        if rest := reader.flush():
            yield Piece(row, rest)
    for row in drawn:
        if drawn[row]:
            yield picture(row)
    if interrupt:
        raise interrupt


# ---------------------------------------------------------------------------------------------
# The command


def main(arguments: list[str] | None = None) -> int:
    """`python generate.py ...` -> exit code: 0, 2 for input that cannot work, 130 for Ctrl-C."""
    # Options, their checks and what is written where: nothing that a library user imports.
    from chameleon_extras.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
