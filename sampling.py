"""Sampling: the loop that turns a Chameleon into something that answers and draws.

    ids (B,T) --prefill--> logits of the last place (B,V) --grammar, filters--> one id each (B,)
                                ^                                                   |
                                +----- one token through the cache (B,1) <----------+

The prompt goes through the model once, all tokens at a time, and fills the KV cache; then every
new token costs one step of one column. Text and pictures come from the same loop: a picture is
begin-image, exactly S codes, end-image, and the grammar says where in this a row stands. The
grammar and guidance, which a Llama does not need, are in modality.py, with what the letters mean.

Rows of a batch are independent: each has its own positions, its own modality, its own end, its own
random numbers. So each gives what it would give alone, as long as the longest prompt leaves it the
same room. (Not with dynamic RoPE, whose theta follows the longest row.)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from image_processor import ChameleonImageProcessor
from modality import Contexts, Grammar, guidance_streams, guide
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# From logits to an id. The filters are (B, V) -> (B, V).


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Makes every id of `ids` (B, T) less likely, prompt included (CTRL, arXiv 1909.05858).

        logit / penalty where positive, logit * penalty where negative
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
    kth = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of most likely ids whose probability reaches p; at least one."""
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # An id falls out if those BEFORE it reach p already; so the one that crosses p stays.
    out = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(out.scatter(-1, order, out), float("-inf"))


def draw(logits: Tensor, generators: list[torch.Generator | None]) -> Tensor:
    """One id for each row, distributed as softmax(logits).   (B, V) -> (B,)

    A row without a generator is one whose id is not needed; no number is drawn for it.

    If e_i are independent and exponential, argmax_i p_i / e_i is i with probability p_i: no
    cumulative sum, no host synchronization, and every row keeps its own stream of numbers.
    """
    noise = torch.ones_like(logits)  # (B, V)
    for row, generator in zip(noise, generators):
        if generator is not None:
            row.exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)  # (B,)


def choose(logits: Tensor, generators: list[torch.Generator | None], *, temperature: float,
           top_k: int | None, top_p: float) -> Tensor:
    """logits (B, V) -> the index chosen in each row (B,). The order of transformers' processors.

    Temperature 0 takes the most likely one.
    """
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    return draw(keep_top_p(keep_top_k(logits / temperature, top_k), top_p), generators)


# ---------------------------------------------------------------------------------------------
# The loop


def check_options(max_new_tokens: int | None, **options: float | None) -> None:
    """ValueError, naming the option, if one is out of range."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for name, value in options.items():
        if value is None and "top_k" not in name:
            raise ValueError(f"{name} is None: leave it out for its default")
        if "temperature" in name and not (value == 0 or 1e-4 <= value < float("inf")):
            raise ValueError(f"{name} must be 0 (greedy) or at least 0.0001, got {value}")
        if "top_k" in name and value is not None and value < 0:
            raise ValueError(f"{name} must be 1 or more, or 0 for no limit, got {value}")
        if "top_p" in name and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        if "penalty" in name and not 0.01 <= value <= 100:
            raise ValueError(f"{name} must be from 0.01 to 100 (1 is none), got {value}")
        if "guidance" in name and not 0 <= value <= 1000:
            raise ValueError(f"{name} must be from 0 to 1000 (1 is none), got {value}")


def check_seeds(seeds: int | list[int], rows: int) -> list[int]:
    """-> a seed for each row; ValueError if their number is another, or one is too large."""
    seeds = [seeds + b for b in range(rows)] if isinstance(seeds, int) else seeds
    if len(seeds) != rows or not all(abs(s) < 2**63 for s in seeds):
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one below 2^63 each")
    return seeds


def check_room(config: ChameleonConfig, prompt_length: int, mode: str = "text") -> int:
    """-> how many tokens fit behind the prompt. ValueError if none does, or no picture."""
    factor = config.rope_factor if config.rope_type != "default" else 1
    context = int(config.max_position_embeddings * factor)
    picture = config.vq_config.codes_per_image + 2
    if prompt_length + (picture if mode == "image" else 1) > context:
        raise ValueError(f"the prompt has {prompt_length} tokens, pictures included, but the "
                         f"context holds {context}"
                         + (f" and a picture takes {picture}" if mode == "image" else "")
                         + ": shorten it or use fewer pictures")
    return context - prompt_length


def steps_to_make(model: ChameleonForConditionalGeneration, prompt_length: int, mode: str,
                  max_new_tokens: int | None) -> int:
    """How many ids to make at most: 256 of text, one picture, or all that fits."""
    room = check_room(model.config, prompt_length, mode)
    if mode == "image":
        return model.config.vq_config.codes_per_image + 2
    return min(room, max_new_tokens or (256 if mode == "text" else room))


def check_prompt(model: ChameleonForConditionalGeneration, input_ids: Tensor,
                 attention_mask: Tensor | None, pixel_values: Tensor | None) -> None:
    """ValueError for what would run and give a wrong answer."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (B, T) with T > 0, got {tuple(input_ids.shape)}")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("the prompts are padded on the right, and the next token would follow "
                         "padding: use padding_side='left'")
    placeholder = model.model.vocabulary.image_token_id
    if pixel_values is None and placeholder is not None and (input_ids == placeholder).any():
        raise ValueError("the prompt has <image> placeholders but there are no pixel_values")


def stop_ids(model: ChameleonForConditionalGeneration, eos_token_id, mode: str) -> list[int]:
    """Where an answer ends: the ids asked for, else end of sequence and end of turn."""
    vocabulary = model.model.vocabulary
    if mode == "image":
        return [vocabulary.end_image_id]
    asked = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ids = list(asked) if isinstance(asked, (list, tuple)) else [asked]
    if eos_token_id is None:
        ids.append(vocabulary.end_of_turn_id)
    return [i for i in ids if i is not None]


def rows_of(head: nn.Module, ids: Tensor) -> nn.Module:
    """The head for these ids alone: (..., D) -> (..., len(ids))."""
    if hasattr(head, "rows"):  # quantized: it has weights of its own kind
        return head.rows(ids)
    part = nn.Linear(head.in_features, len(ids), bias=False, device="meta")
    part.weight = nn.Parameter(head.weight.detach()[ids], requires_grad=False)  # (len(ids), D)
    return part


class Picker:
    """Hidden states of all guidance streams -> each row's next id: head, guidance, filters."""

    def __init__(self, model: ChameleonForConditionalGeneration, grammar: Grammar,
                 guidance: tuple[float, float], repetition_penalty: float, text: dict, image: dict,
                 generators: list[torch.Generator], decoder=None) -> None:
        self.model, self.grammar, self.guidance = model, grammar, guidance
        self.repetition_penalty, self.generators = repetition_penalty, generators
        self.text, self.image = text, image
        self.head, self.code_head = model.lm_head, None  # (..., D) -> (..., V), (..., K)
        if grammar.mode != "text":
            self.code_head = rows_of(model.lm_head, model.model.code_to_id)
        if decoder:
            self.head = decoder.product(self.head)
            self.code_head = self.code_head and decoder.product(self.code_head)

    def __call__(self, hidden: Tensor, seen: Tensor, drawn: list[int], room: int) -> Tensor:
        """hidden (G * B, D), ids so far (B, T), `codes_so_far` of B rows -> next ids (B,)

        Rows in text need the whole head, rows in a picture its K rows for codes: no other logit
        matters there. Where a batch has both, each is computed for all rows, and one taken.
        """
        hidden = hidden.unflatten(0, (-1, len(drawn)))  # (G, B, D)
        inside = [0 <= n < self.grammar.S for n in drawn]
        text = None if all(inside) else self.next_text(hidden[0], seen, drawn, room, inside)
        codes = self.next_code(hidden, inside) if any(inside) else None
        if text is None or codes is None:
            return codes if text is None else text  # (B,)
        return torch.where(torch.tensor(inside, device=text.device), codes, text)  # (B,)

    def next_text(self, hidden: Tensor, seen: Tensor, drawn: list[int], room: int,
                  inside: list[bool]) -> Tensor:
        """On the full context alone.   hidden (B, D) -> ids (B,)"""
        logits = self.head(hidden).float()  # (B, V)
        logits = penalize_repetition(logits, seen, self.repetition_penalty)
        logits = logits.masked_fill(~self.grammar.allowed(drawn, room), float("-inf"))
        generators = [None if codes else g for g, codes in zip(self.generators, inside)]
        return choose(logits, generators, **self.text)

    def next_code(self, hidden: Tensor, inside: list[bool]) -> Tensor:
        """hidden (G, B, D) -> ids (B,)"""
        logits = self.code_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])  # (G, B, K)
        logits = guide(logits, *self.guidance).float()  # (B, K)
        generators = [g if codes else None for g, codes in zip(self.generators, inside)]
        return self.model.model.code_to_id[choose(logits, generators, **self.image)]  # (B,)


def stream(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,  # (B, T), padded on the left
    attention_mask: Tensor | None = None,  # (B, T), 0 on padding
    pixel_values: Tensor | None = None,  # (N, 3, H, W), for the <image> placeholders in order
    *,
    mode: str = "text",  # "image": one picture at once; "interleaved": as the model decides
    max_new_tokens: int | None = None,  # None: 256 of text, else all that fits; one picture anyway
    do_sample: bool = False,  # of text; pictures are sampled unless image_temperature is 0
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,  # never acts inside a picture
    image_temperature: float = 1.0,
    image_top_k: int | None = None,
    image_top_p: float = 1.0,
    guidance_text: float = 1.0,
    guidance_image: float = 1.0,
    seed: int | list[int] = 0,  # row b draws with seed + b, or with its own of a list
    eos_token_id: int | list[int] | None = None,
    decoder=None,  # an engine.decoding.Decoder: the same ids, sooner
) -> Iterator[Tensor]:
    """Yields the next id of every row, (B,), until all have ended or the limit is reached.

    A row that has ended yields padding. Text is greedy by default. ValueError at once for options
    and prompts that cannot work; a wrong number of pictures shows at the first id.
    """
    text = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    image = dict(temperature=image_temperature, top_k=image_top_k, top_p=image_top_p)
    check_options(max_new_tokens, **text, **{f"image_{k}": v for k, v in image.items()},
                  repetition_penalty=repetition_penalty, guidance_text=guidance_text,
                  guidance_image=guidance_image)
    check_prompt(model, input_ids, attention_mask, pixel_values)
    grammar = Grammar(model, mode)
    steps = steps_to_make(model, input_ids.shape[1], mode, max_new_tokens)
    seeds = check_seeds(seed, len(input_ids))
    generators = [torch.Generator(input_ids.device).manual_seed(s) for s in seeds]
    text["temperature"] = temperature if do_sample else 0.0
    guidance = (guidance_text, guidance_image)
    pick = Picker(model, grammar, guidance, repetition_penalty, text, image, generators,
                  decoder)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    stops = stop_ids(model, eos_token_id, mode)
    ids = steps_of(model, input_ids, real.bool(), pixel_values, pick, stops, steps, decoder)
    return until_ended(decoder.read(ids) if decoder else ids, stops)


def until_ended(steps: Iterator[Tensor], stops: list[int]) -> Iterator[Tensor]:
    """Passes the ids (B,) on, up to the step with which the last row has ended."""
    ended, ends = False, torch.tensor(stops, dtype=torch.long)
    for ids in steps:
        yield ids
        ended = ended | torch.isin(ids.cpu(), ends)  # (B,)
        if ended.all():
            return


@torch.inference_mode()
def steps_of(model: ChameleonForConditionalGeneration, input_ids: Tensor, real: Tensor,
             pixel_values: Tensor | None, pick: Picker, stops: list[int], steps: int,
             decoder=None) -> Iterator[Tensor]:
    """The loop of `stream`, whose arguments are checked. `real` (B, T) is False on padding.

    Goes on with padding when all rows have ended: to ask would be to wait for the device.
    """
    was_training = model.training
    model.eval()
    if pixel_values is not None:
        input_ids = model.model.replace_image_placeholders(input_ids, pixel_values)
    rows = [ids[here] for ids, here in zip(input_ids, real)]
    has_pictures = any(pick.grammar.begin in row.tolist() for row in rows)
    streams = guidance_streams(*pick.guidance, pick.grammar.mode, has_pictures)
    contexts = Contexts(model, rows, streams, steps, decoder)
    # What the penalty and the grammar look at. Padding becomes a copy of the row's last id, which
    # is in the row anyway.
    seen = torch.where(real, input_ids, input_ids[:, -1:])  # (B, T)
    drawn = pick.grammar.codes_so_far(seen).tolist()  # B numbers
    ended = torch.zeros_like(seen[:, 0], dtype=torch.bool)  # (B,)
    ends = torch.tensor(stops, dtype=torch.long, device=seen.device)
    pad = next((i for i in (model.config.pad_token_id, *stops) if i is not None), 0)
    try:
        for room in range(steps, 0, -1):
            hidden = contexts.hidden()  # (GB, D)
            if room == steps and not hidden.isfinite().all():  # once: later it would be a wait
                raise ValueError("the model computes inf or nan: its weights are damaged, or too "
                                 "large for this dtype")
            chosen = pick(hidden, seen, drawn, room)  # (B,)
            chosen = chosen.masked_fill(ended, pad)
            yield chosen
            if room == 1:
                return
            ended = ended | (chosen[:, None] == ends).any(1)
            drawn = pick.grammar.advance(drawn, chosen, room)
            seen = torch.cat((seen, chosen[:, None]), dim=1)  # (B, T + 1)
            contexts.feed(chosen)
    finally:
        model.train(was_training)


def generate(model: ChameleonForConditionalGeneration, input_ids: Tensor, attention_mask=None,
             pixel_values=None, **options) -> Tensor:
    """Prompt ids (B, T) -> prompt and answer (B, T + new), ended rows padded.

    Options are those of `stream`; greedy text by default. Equals transformers' model.generate,
    where `model.generate(**inputs, ...)` is written `generate(model, **inputs, ...)`.
    DIFFERS: makes pictures, if asked to; ends at end of turn, too; in text never yields
    begin-image or end-image (transformers masks the codes only); top_k defaults to none, not 50.
    """
    new = list(stream(model, input_ids, attention_mask, pixel_values, **options))
    new = torch.stack(new, dim=1).to(input_ids.device)  # (B, new)
    return torch.cat((input_ids, new), dim=1)  # (B, T + new)


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
    codes = model.model.vocabulary.codes_from_ids(ids)  # (N, S)
    return ChameleonImageProcessor.postprocess(model.model.vqmodel.decode(codes))


def pieces(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer,
           steps: Iterator[Tensor], every: int = 0) -> Iterator[Piece]:
    """What `stream` yields -> text as soon as it is valid text, and pictures.

    A picture comes when its last code is drawn; with `every` also after so many codes each, the
    missing ones filled with its first. On Ctrl-C, first yields what is half done, then re-raises.
    """
    vocabulary, S = tokenizer.vocabulary, model.config.vq_config.codes_per_image
    decoders, codes, interrupt = [], [], None

    def picture(row: int) -> Piece:
        n = len(codes[row])
        whole = torch.tensor([codes[row] + codes[row][:1] * (S - n)], device=model.device)  # (1, S)
        return Piece(row, image=decode_pictures(model, whole)[0], drawn=n)

    try:
        for ids in steps:
            for row, i in enumerate(ids.tolist()):
                if row == len(decoders):
                    decoders.append(tokenizer.stream_decoder())
                    codes.append(None)
                if i == vocabulary.begin_image_id:
                    codes[row] = []
                elif codes[row] is None:
                    if text := decoders[row].feed(i):
                        yield Piece(row, text)
                elif len(codes[row]) == S:
                    codes[row] = None  # this is end-image
                else:
                    codes[row].append(i)
                    n = len(codes[row])
                    if n == S or (every and n % every == 0):
                        yield picture(row)
    except KeyboardInterrupt as stop:
        interrupt = stop  # first hand over what is done
    for row, decoder in enumerate(decoders):
        if rest := decoder.flush():
            yield Piece(row, rest)
        if codes[row] and len(codes[row]) < S:
            yield picture(row)
    if interrupt:
        raise interrupt
