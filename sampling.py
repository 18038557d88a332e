"""Sampling: the loop that turns a Chameleon into something that answers and draws.

    ids (B,T) --prefill--> logits of the last place (B,V) --grammar, filters--> one id each (B,)
                                ^                                                   |
                                +----- one token through the cache (B,1) <----------+

The prompt goes through the model once, all tokens at a time, and fills the KV cache; then every
new token costs one step of one column. Text and pictures come from the same loop: a picture is
begin-image, exactly S codes, end-image, and the grammar says where in this a row stands.

    TEXT --begin-image--> PICTURE (S codes) --end-image, not asked for--> TEXT ... until an end

Letter  meaning
B, T    rows of the batch, tokens of a row so far
V, K    vocabulary; codes of the codebook
S       codes of a picture: 1024 in the release, where the grid is 512 / 16 squared
G       guidance streams: 1, 2 or 3 versions of each row's context in one batch

What differs from sampling a Llama: the grammar, and guidance for pictures. Rows of a batch are
independent: each has its own positions, its own modality, its own end, its own random numbers,
and gives exactly what it would give alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from tokenizer import ChameleonImageProcessor, Tokenizer, VocabularyMap

MODES = ("text", "image", "interleaved")


# ---------------------------------------------------------------------------------------------
# What may come next, and from logits to an id. The filters are (B, V) -> (B, V).


class Grammar:
    """The modality grammar: which ids may come next, as one function of the ids so far.

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

    def allowed(self, drawn: Tensor, room: int) -> Tensor:
        """`codes_so_far` (B,), places left for new ids -> bool (B, V); some id always is.

        Why exactly S codes, 1024 in the release: the VQ-VAE's decoder wants a whole grid, and
        the model never saw another number. So end-image is not asked for but put, and a picture
        begins only where begin-image, S codes and end-image still fit.
        """
        outside = self.text.clone()  # (V,)
        if self.mode == "image":
            outside = torch.zeros_like(outside)
        if self.mode != "text" and room >= self.S + 2:
            outside[self.begin] = True
        full = torch.zeros_like(outside)
        if self.end is not None:
            full[self.end] = True
        kind = (drawn >= 0).long() + (drawn >= self.S).long()  # 0 text, 1 inside, 2 full
        return torch.stack((outside, self.codes, full))[kind]  # (B, V)


def check_can_draw(model: ChameleonForConditionalGeneration) -> None:
    """ValueError if the weights or the vocabulary lack what a picture needs."""
    vocabulary = model.model.vocabulary
    if None in (vocabulary.begin_image_id, vocabulary.end_image_id) or not vocabulary.num_codes:
        raise ValueError("this vocabulary has no image tokens, so the model cannot draw")
    if model.model.vqmodel.decoder is None:
        raise ValueError("these weights have no VQ-VAE decoder (model.vqmodel.decoder.*), so they "
                         "cannot draw: take Anole-7b or tiny/")


def picture_ids(vocabulary: VocabularyMap) -> list[int]:
    """All ids that belong to pictures: the codes, begin-image, end-image and <image>."""
    marks = (vocabulary.begin_image_id, vocabulary.end_image_id, vocabulary.image_token_id)
    return vocabulary.code_to_id.tolist() + [i for i in marks if i is not None]


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


def draw(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One id for each row, distributed as softmax(logits).   (B, V) -> (B,)

    If e_i are independent and exponential, argmax_i p_i / e_i is i with probability p_i: no
    cumulative sum, no host synchronization, and every row keeps its own stream of numbers.
    """
    noise = torch.stack([
        torch.empty_like(row).exponential_(generator=g) for row, g in zip(logits, generators)
    ])  # (B, V)
    return (logits.softmax(-1) / noise).argmax(-1)  # (B,)


def choose(
    logits: Tensor, seen: Tensor, generators: list[torch.Generator], *, temperature: float,
    top_k: int | None, top_p: float, repetition_penalty: float = 1.0,
) -> Tensor:
    """logits (B, V), ids so far (B, T) -> next ids (B,). The order of transformers' processors.

    Temperature 0 takes the most likely id; the penalty holds for it, too.
    """
    logits = penalize_repetition(logits.float(), seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    return draw(keep_top_p(keep_top_k(logits / temperature, top_k), top_p), generators)


# ---------------------------------------------------------------------------------------------
# Guidance: what the prompt changes, made larger


def guidance_streams(text: float, image: float, mode: str, has_pictures: bool) -> list[str]:
    """Which versions of a row's context the two scales compare; each costs a row of the batch.

    full      everything
    pictures  only <s>, pictures and their marks: what is drawn if the words are not read
    nothing   only <s> and the begin-image of the picture being drawn
    """
    if mode == "text" or text == image == 1.0:
        return ["full"]
    if image == 1.0:
        return ["full", "pictures"]
    if mode == "image" and not has_pictures:  # then "pictures" and "nothing" are the same
        return ["full", "nothing"]
    return ["full", "pictures", "nothing"]


def guide(logits: Tensor, text: float, image: float) -> Tensor:
    """Logits of the G streams (G, B, V) -> guided logits (B, V). On raw logits, before any filter.

        nothing + image (pictures - nothing) + text (full - pictures)

    written so that it holds for two streams, where the second is both of the others.
    """
    full, *others = logits
    if not others:
        return full
    guided = others[0] + text * (full - others[0])
    if len(others) == 2:
        guided = guided + (image - 1) * (others[0] - others[1])
    return guided  # (B, V)


class Contexts:
    """The G versions of B rows as one left-padded batch behind one cache, one prefill for all.

    Every step feeds one column to all G * B rows. Where a version does not get the new token (a
    word is no news to "pictures"), the column is masked: it is as if it were not there. So a row
    can go from text to picture and back without ever computing its past again.
    """

    def __init__(self, model: ChameleonForConditionalGeneration, rows: list[Tensor],
                 streams: list[str], steps: int) -> None:
        self.model, self.streams, self.B = model, streams, len(rows)
        V, device = model.config.vocab_size, model.device
        self.is_picture = torch.zeros(V, dtype=torch.bool, device=device)
        self.is_picture[picture_ids(model.model.vocabulary)] = True  # (V,)
        self.begin = model.model.vocabulary.begin_image_id
        self.end = model.model.vocabulary.end_image_id
        rows = [self.version(row, name) for name in streams for row in rows]  # G * B times (n,)
        T = max(map(len, rows))
        self.new = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (GB, T)
        self.mask = torch.zeros(len(rows), T + steps, dtype=torch.long, device=device)
        for mask, row in zip(self.mask, rows):
            mask[T - len(row) : T] = 1
        self.padded = len(streams) > 1 or not bool(self.mask[:, :T].all())
        self.cache = KVCache(model.config, len(rows), T + steps, model.dtype, device)

    def version(self, row: Tensor, stream: str) -> Tensor:
        """One row's ids (n,) -> those that the stream sees; <s> always stays."""
        if stream == "full":
            return row
        keep = self.is_picture[row] if stream == "pictures" else torch.zeros_like(row).bool()
        keep[0] = True
        return row[keep]

    def hidden(self) -> Tensor:
        """Runs the columns that are new -> the last one's hidden state (G * B, D)."""
        L = self.cache.length + self.new.shape[1]
        mask = positions = None  # no padding: every step may use the fastest attention
        if self.padded:
            mask = self.mask[:, :L]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self.cache.length :]
        # Only the last place gets logits: all of them would be (T, V), 1 GiB at 4096 x 65536.
        return self.model.model(self.new, attention_mask=mask, position_ids=positions,
                                past_key_values=self.cache).last_hidden_state[:, -1]  # (GB, D)

    def feed(self, chosen: Tensor) -> None:
        """The rows' next ids (B,) become the next column of all streams."""
        column = self.cache.length
        for g, stream in enumerate(self.streams):
            mask = self.mask[g * self.B : (g + 1) * self.B]  # (B, L), a view
            mask[:, column] = 1
            if stream != "full":
                mask[:, column] = self.is_picture[chosen].long()
            if stream == "nothing":  # a new picture forgets the one before; <s> stays
                forget = (chosen == self.begin)[:, None] & (mask.cumsum(-1) > 1)
                mask.masked_fill_(forget, 0)
                mask[:, column] = (self.is_picture[chosen] & (chosen != self.end)).long()
        self.new = chosen.repeat(len(self.streams))[:, None]  # (GB, 1)


# ---------------------------------------------------------------------------------------------
# The loop


def check_options(max_new_tokens: int | None, **options: float | None) -> None:
    """ValueError, naming the option, if one is out of range."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for name, value in options.items():
        if "temperature" in name and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be 0 (greedy) or above, got {value}")
        if "top_k" in name and value is not None and value < 0:
            raise ValueError(f"{name} must be 1 or more, or 0 for no limit, got {value}")
        if "top_p" in name and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        if "penalty" in name and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {value}")
        if "guidance" in name and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be 0 or above (1 is none), got {value}")


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
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
        ids = list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
        return [i for i in (*ids, vocabulary.end_of_turn_id) if i is not None]
    return list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]


class Picker:
    """Hidden states of all streams -> each row's next id: head, guidance, grammar, filters."""

    def __init__(self, model: ChameleonForConditionalGeneration, grammar: Grammar,
                 guidance: tuple[float, float], text: dict, image: dict,
                 generators: list[torch.Generator]) -> None:
        self.model, self.grammar, self.guidance = model, grammar, guidance
        self.text, self.image, self.generators = text, image, generators
        if grammar.mode != "text":
            self.code_rows = model.lm_head.weight[model.model.code_to_id]  # (K, D)

    def __call__(self, hidden: Tensor, seen: Tensor, drawn: Tensor, room: int) -> Tensor:
        """hidden (G * B, D), ids so far (B, T), `codes_so_far` (B,) -> next ids (B,)"""
        hidden = hidden.view(-1, *drawn.shape, hidden.shape[-1])  # (G, B, D)
        inside = (drawn >= 0) & (drawn < self.grammar.S)  # (B,): rows that draw a code now
        chosen = torch.empty_like(drawn)
        for rows, next_ids in ((~inside, self.text_ids), (inside, self.code_ids)):
            if rows.any():
                own = [g for g, here in zip(self.generators, rows.tolist()) if here]
                chosen[rows] = next_ids(hidden[:, rows], seen[rows], drawn[rows], room, own)
        return chosen

    def text_ids(self, hidden: Tensor, seen: Tensor, drawn: Tensor, room: int, own) -> Tensor:
        """Outside of pictures: the whole head on the full context. (G, B, D) -> (B,)"""
        logits = self.model.lm_head(hidden[0])  # (B, V)
        logits = logits.masked_fill(~self.grammar.allowed(drawn, room), float("-inf"))
        return choose(logits, seen, own, **self.text)

    def code_ids(self, hidden: Tensor, seen: Tensor, drawn: Tensor, room: int, own) -> Tensor:
        """Inside: no other logit matters, so K rows of the head, not V. (G, B, D) -> (B,)"""
        logits = guide(F.linear(hidden, self.code_rows), *self.guidance)  # (B, K)
        return self.model.model.code_to_id[choose(logits, seen, own, **self.image)]


@torch.inference_mode()
def stream(
    model: ChameleonForConditionalGeneration,
    input_ids: Tensor,  # (B, T), padded on the left
    attention_mask: Tensor | None = None,  # (B, T), 0 on padding
    pixel_values: Tensor | None = None,  # (N, 3, H, W), for the <image> placeholders in order
    *,
    mode: str = "text",  # "image": one picture at once; "interleaved": as the model decides
    max_new_tokens: int | None = None,  # None: 256 of text, one picture, all that fits
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    image_temperature: float = 1.0,
    image_top_k: int | None = None,
    image_top_p: float = 1.0,
    guidance_text: float = 1.0,
    guidance_image: float = 1.0,
    seed: int | list[int] = 0,
    eos_token_id: int | list[int] | None = None,
) -> Iterator[Tensor]:
    """Yields the next id of every row, (B,), until all have ended or the context is full.

    A row that has ended yields padding. Text is greedy unless `do_sample`; pictures are drawn at
    random unless `image_temperature` is 0. Row b draws with seed + b (or its own seed of a list),
    so it can be repeated alone. The repetition penalty never acts inside a picture.
    Raises ValueError on options or prompts that cannot work.
    """
    text = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    image = dict(temperature=image_temperature, top_k=image_top_k, top_p=image_top_p)
    check_options(max_new_tokens, **text, **{f"image_{k}": v for k, v in image.items()},
                  repetition_penalty=repetition_penalty, guidance_text=guidance_text,
                  guidance_image=guidance_image)
    check_prompt(model, input_ids, attention_mask, pixel_values)
    (B, T), device = input_ids.shape, input_ids.device
    grammar = Grammar(model, mode)
    steps = steps_to_make(model, T, mode, max_new_tokens)
    text |= dict(repetition_penalty=repetition_penalty, temperature=do_sample and temperature)
    seeds = [seed + b for b in range(B)] if isinstance(seed, int) else seed
    generators = [torch.Generator(device).manual_seed(s) for s in seeds]
    pick = Picker(model, grammar, (guidance_text, guidance_image), text, image, generators)
    stops = stop_ids(model, eos_token_id, mode)
    pad = model.config.pad_token_id
    pad = pad if pad is not None else stops[0] if stops else 0

    model.eval()
    if pixel_values is not None:
        input_ids = model.model.replace_image_placeholders(input_ids, pixel_values)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, real)]
    has_pictures = any(grammar.begin in row.tolist() for row in rows)
    streams = guidance_streams(guidance_text, guidance_image, mode, has_pictures)
    contexts = Contexts(model, rows, streams, steps)
    seen = torch.where(real.bool(), input_ids, input_ids[:, -1:])  # padding counts for nothing
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(steps):
        chosen = pick(contexts.hidden(), seen, grammar.codes_so_far(seen), steps - step)  # (B,)
        chosen = torch.where(ended, pad, chosen)
        yield chosen
        ended = ended | torch.isin(chosen, torch.tensor(stops, device=device))
        if ended.all():
            return
        seen = torch.cat((seen, chosen[:, None]), dim=1)  # (B, T + 1)
        contexts.feed(chosen)


def generate(model: ChameleonForConditionalGeneration, input_ids: Tensor, attention_mask=None,
             pixel_values=None, **options) -> Tensor:
    """Prompt ids (B, T) -> prompt and answer (B, T + new), ended rows padded.

    Options are those of `stream`; greedy text by default. Equals transformers' model.generate,
    where `model.generate(**inputs, ...)` is written `generate(model, **inputs, ...)`.
    DIFFERS: draws, if asked to; ends at end of turn, too; in text never yields begin-image or
    end-image (transformers masks the codes only); top_k defaults to none, not 50.
    """
    new = list(stream(model, input_ids, attention_mask, pixel_values, **options))
    return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1)  # (B, T + new)


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
    missing ones filled with its first. Ctrl-C still gives what is done, then goes on up.
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
