"""`generate.py --explain`: one prompt's way through the model, with the numbers of a real run.

    prompt, pictures --processor--> ids with <image> places --VQ-VAE--> ids (1,T) --decoder--> Walk
                                                                     (hooks note the shapes)
    Walk --report--> lines for a terminal        Walk --page--> one HTML file

Who needs it: whoever wants to see what becomes of a prompt: ids, codes, shapes, mask, attention.

Letters as in chameleon.py: T tokens, D width, V vocabulary; and h, w the grid of a picture's codes.

Two numbers stand beside each token, in bits. Both come from what the model gave before it:

    entropy   -sum_i p_i log2 p_i     how many bits the model expects the token to cost
    surprise  -log2 p(the token)      how many bits the token does cost

On text sampled at temperature 1 the two agree on average; greedy text surprises less. A prompt
surprises more, because alignment never trains on prompts (section 3). Codes are hard to predict.
"""

import html
import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration, KVCache, allowed_keys
from chameleon_extras.sheets import code_grid, data_uri, enlarge, heat_on
from processor import ChameleonImageProcessor
from tokenizer import IMAGE_TOKEN, Tokenizer, image_token_name

SHADES = " ░▒▓█"
CHUNK = 128  # positions whose logits exist at one time: 4096 x 65536 would take 1 GiB
AT_ONCE = 16  # tokens whose attentions of all layers and heads exist at one time, in `glances`
LINES, GRID = 40, 12  # on a terminal: the most lines of tokens, the most codes a side
VQ = "model.vqmodel."
FIRST = "model.layers.0."
# Modules whose output shapes are shown, with the letters of vqvae.py and chameleon.py.
WATCHED = {
    VQ + "encoder.conv_in": "(N, C, H, W)", VQ + "encoder.mid": "(N, C, h, w)",
    VQ + "encoder.conv_out": "(N, latent_channels, h, w)",
    VQ + "quant_conv": "(N, embed_dim, h, w)",
    "model.embed_tokens": "(B, T, D)", FIRST + "input_layernorm": "(B, T, D)",
    FIRST + "self_attn.q_proj": "(B, T, H * Dh)", FIRST + "self_attn.k_proj": "(B, T, Hkv * Dh)",
    FIRST + "self_attn.v_proj": "(B, T, Hkv * Dh)", FIRST + "self_attn.q_norm": "(B, T, H, Dh)",
    FIRST + "self_attn.k_norm": "(B, T, Hkv, Dh)", FIRST + "self_attn.o_proj": "(B, T, D)",
    FIRST + "mlp.gate_proj": "(B, T, F)", FIRST + "mlp.down_proj": "(B, T, D)",
    "model.norm": "(B, T, D)", "lm_head": "(B, V), last place",
}


class Token(NamedTuple):
    """One token of a prompt or of an answer."""

    id: int
    kind: str  # "text", "code" or "control"
    name: str  # its text, with · for a space, or the name of a control token or code
    surprise: float  # bits; nan for the first token, which nothing predicts
    entropy: float  # bits; nan for the first token


@dataclass
class Walk:
    """All numbers that are shown of one prompt. Its tensors are on the CPU."""

    tokens: list[Token]
    segments: list[tuple[str, int, int]]  # "text" or "picture 1", first position, end
    codes: list[Tensor]  # of each picture (h, w)
    images: list[Image.Image]  # each as the VQ-VAE sees it
    shapes: list[tuple[str, str, tuple[int, ...]]]  # module, letters, shape
    allowed: Tensor  # (T, T) bool: may query t attend to key j?
    attention: Tensor  # (layers, T): of the last token, mean over heads
    probs: Tensor  # (V,), the next token's
    best: list[tuple[int, str, float]]  # the most likely next tokens: id, name, probability
    shares: dict[str, float]  # probabilities of text, codes, control tokens


# ---------------------------------------------------------------------------------------------
# The run


def kind_and_name(tokenizer: Tokenizer, token_id: int) -> tuple[str, str]:
    """Id -> "text", "code" or "control"; and its readable name, as in Token."""
    try:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
    except ValueError:  # some checkpoints pad the vocabulary
        return "text", "(no token)"
    name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.replace(" ", "·"))
    if token_id not in tokenizer.special_ids:
        return "text", name
    return "code" if IMAGE_TOKEN.fullmatch(text) else "control", name


@torch.inference_mode()
def walk(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, input_ids: Tensor,
         pixel_values: Tensor | None = None) -> Walk:
    """input_ids (1, T) with `<image>` placeholders, no padding; pixels (N, 3, H, W) -> the Walk."""
    assert input_ids.shape[0] == 1, f"one prompt, not {input_ids.shape[0]}"
    T, shapes = input_ids.shape[1], []

    def note(name: str, letters: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shapes.append((name, letters, tuple(output.shape)))

    with ExitStack() as hooks:
        for name, letters in WATCHED.items():
            hooks.enter_context(model.get_submodule(name).register_forward_hook(
                partial(note, name, letters)))
        ids = model.model.replace_image_placeholders(input_ids, pixel_values)  # (1, T)
        cache = KVCache(model.config, 1, T, model.dtype, model.device)
        hidden = model.model(ids, past_key_values=cache, return_dict=True
                             ).last_hidden_state[0]  # (T, D)
        probs = model.lm_head(hidden[-1:]).float().softmax(-1)[0].cpu()  # (V,)
    cache.length -= 1  # the last token once more, with the attention that returns its weights
    last = model.model(ids[:, -1:], past_key_values=cache, output_attentions=True, return_dict=True)
    attention = torch.cat([weights[0].mean(0) for weights in last.attentions])  # (layers, T)
    allowed = allowed_keys(torch.ones(1, T, T), 1, T, 0, "cpu")[0, 0]  # (T, T); 2-D would give None
    tokens = tokens_of(model, tokenizer, ids[0], hidden)
    segments, codes, images = pictures_of(model, input_ids[0], ids[0], pixel_values)
    names = [kind_and_name(tokenizer, i) for i in range(len(probs))]  # (kind, name) of each id
    best = [(i, names[i][1], probs[i].item()) for i in probs.topk(10).indices.tolist()]
    shares = {"text": 0.0, "code": 0.0, "control": 0.0}
    for (kind, _), p in zip(names, probs.tolist()):
        shares[kind] += p
    return Walk(tokens, segments, codes, images, shapes, allowed, attention.float().cpu(), probs,
                best, shares)


@torch.inference_mode()
def glances(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, ids: Tensor,
            start: int) -> tuple[list[Token], Tensor]:
    """ids (1, T) without placeholders -> the n tokens from `start` on, and where each looks (n, T).

    A token is chosen at the place before it, so its look is the attention of that place, the mean
    over layers and heads. Letters: L columns of the cache so far.
    """
    T, states, looks = ids.shape[1], [], []
    cache = KVCache(model.config, 1, T, model.dtype, model.device)
    if start > 1:
        model.model(ids[:, : start - 1], past_key_values=cache)
    for part in ids[:, start - 1 :].split(AT_ONCE, dim=1):
        seen = model.model(part, past_key_values=cache, output_attentions=True)
        weights = torch.stack([w[0].float().mean(0) for w in seen.attentions]).mean(0)  # (n, L)
        looks.append(nn.functional.pad(weights, (0, T - weights.shape[1])))
        states.append(seen.last_hidden_state[0])
    tokens = tokens_of(model, tokenizer, ids[0, start - 1 :], torch.cat(states))
    return tokens[1:], torch.cat(looks)[:-1].cpu()  # (n, T)


def tokens_of(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, ids: Tensor,
              hidden: Tensor) -> list[Token]:
    """ids (T,), hidden states (T, D) -> the tokens, with their entropy and surprise."""
    surprise, entropy = [torch.full((1,), torch.nan)], [torch.full((1,), torch.nan)]
    for states, targets in zip(hidden[:-1].split(CHUNK), ids[1:].split(CHUNK)):
        logp = model.lm_head(states).float().log_softmax(-1)  # (n, V), nats
        surprise.append(-logp.gather(-1, targets[:, None])[:, 0].cpu())  # (n,)
        entropy.append(-torch.xlogy(logp.exp(), logp.exp()).sum(-1).cpu())  # (n,)
    bits = torch.stack((torch.cat(surprise), torch.cat(entropy)), dim=1) / math.log(2)
    return [Token(i, *kind_and_name(tokenizer, i), *pair)
            for i, pair in zip(ids.tolist(), bits.tolist())]


def pictures_of(model: ChameleonForConditionalGeneration, input_ids: Tensor, ids: Tensor,
                pixels: Tensor | None) -> tuple[list, list[Tensor], list[Image.Image]]:
    """ids (T,) -> the segments of text and pictures, each picture's codes (h, w), the pictures."""
    if pixels is None:
        return [("text", 0, len(ids))], [], []
    vocabulary, c = model.model.vocabulary, model.config.vq_config
    here = (input_ids == vocabulary.image_token_id).nonzero().flatten()  # (N * S,)
    h, w = (side // c.downsampling for side in pixels.shape[-2:])
    codes = vocabulary.codes_from_ids(ids[here]).cpu().view(len(pixels), h, w)  # (N, h, w)
    segments, end = [], 0
    for n, place in enumerate(here[:: h * w].tolist(), start=1):
        segments += [("text", end, place), (f"picture {n}", place, place + h * w)]
        end = place + h * w
    segments.append(("text", end, len(ids)))
    return segments, list(codes), ChameleonImageProcessor.postprocess(pixels)


# ---------------------------------------------------------------------------------------------
# On a terminal


def report(walk: Walk) -> str:
    """The walk as text."""
    parts = [
        [f"{len(walk.tokens)} tokens, {len(walk.codes)} picture(s), a vocabulary of "
         f"{len(walk.probs)}"],
        ["place      id  token                 surprise  entropy   (bits)", *token_lines(walk)],
        *(picture_lines(walk, n, codes) for n, codes in enumerate(walk.codes)),
        mask_lines(walk), shape_lines(walk), attention_lines(walk), next_lines(walk)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def bits(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"  # nan is not itself


def token_lines(walk: Walk) -> list[str]:
    """A line for each token of text and for each picture. A long prompt loses its middle."""
    lines = []
    for segment, start, end in walk.segments:
        tokens = walk.tokens[start:end]
        if segment != "text":
            surprise, entropy = (sum(column) / len(tokens) for column in list(zip(*tokens))[3:])
            lines.append(f"{start:5}  {tokens[0].id:6}  {segment + ': its codes':20}  "
                         f"{bits(surprise):>8} {bits(entropy):>8}   mean of {len(tokens)}, "
                         f"to place {end - 1}")
            continue
        lines += [f"{place:5}  {t.id:6}  {t.name:20}  {bits(t.surprise):>8} {bits(t.entropy):>8}"
                  for place, t in enumerate(tokens, start)]
    if len(lines) > LINES:
        half = LINES // 2
        lines[half:-half] = [f"  ...  ({len(lines) - 2 * half} more)"]
    return lines


def heat(walk: Walk, n: int) -> Tensor:
    """The last token's attention to each code of picture n, mean over layers and heads (h, w)."""
    _, start, end = walk.segments[2 * n + 1]  # text, picture 1, text, picture 2 ...
    return walk.attention[:, start:end].mean(0).view_as(walk.codes[n])  # (h, w)


def picture_lines(walk: Walk, n: int, codes: Tensor) -> list[str]:
    (h, w), first = codes.shape, int(codes[0, 0])
    start, picture, weights = walk.segments[2 * n + 1][1], walk.images[n], heat(walk, n)
    lines = [f"picture {n + 1}: {picture.width} x {picture.height} pixels, {w} x {h} codes, "
             f"the ids from place {start} on",
             f"its first code {first} is named {image_token_name(first)}, which is id "
             f"{walk.tokens[start].id}"]
    rows = [" ".join(f"{code:4}" for code in row[:GRID]) for row in codes[:GRID].tolist()]
    if max(h, w) <= GRID:
        lines += [f"{row}    |{shade}|" for row, shade in zip(rows, shades(weights))]
    else:
        lines += [f"{row} ..." for row in rows] + [f"|{shade}|" for shade in shades(weights)]
    return [*lines, f"shaded: attention of the last token, the darkest {weights.max():.2%}"]


def shades(weights: Tensor) -> list[str]:
    """(h, w) -> h lines of 2 w characters. The largest weight is the fullest block."""
    levels = (weights / weights.max().clamp(min=1e-12) * (len(SHADES) - 1)).round().long()
    return ["".join(SHADES[level] * 2 for level in row) for row in levels.tolist()]


def mask_lines(walk: Walk) -> list[str]:
    T, pairs = len(walk.tokens), int(walk.allowed.sum())
    lines = [f"positions 0 to {T - 1}, one each, text and pictures alike",
             f"mask: {pairs} of {T} x {T} pairs, each token looks at itself and what is before it"]
    widest = max(len(name) for name, _, _ in walk.segments)
    for name, start, end in walk.segments:  # its queries, and below the keys of each segment
        parts = [walk.allowed[start:end, first:last] for _, first, last in walk.segments]
        signs = ("█" if part.all() else "◣" if part.any() else "·" for part in parts)
        lines.append(f"  {name:{widest}}  {' '.join(signs)}")
    return lines


def shape_lines(walk: Walk) -> list[str]:
    widest = max(len(name) for name, _, _ in walk.shapes)
    return [f"{'module':{widest}}  {'gives':20} in letters",
            *(f"{name:{widest}}  {str(shape):20} {letters}"
              for name, letters, shape in walk.shapes)]


def attention_lines(walk: Walk) -> list[str]:
    lines = ["the last token's attention, mean over heads, layer by layer"]
    for name, start, end in walk.segments:
        shares = walk.attention[:, start:end].sum(1).tolist()
        lines.append(f"  {name:10}" + "".join(f" {share:4.0%}" for share in shares))
    return lines


def next_lines(walk: Walk) -> list[str]:
    entropy = -torch.xlogy(walk.probs, walk.probs).sum() / math.log(2)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in walk.shares.items())
    return [f"next token: {entropy:.2f} bits; {shares}",
            *(f"{i:7}  {name:20}  {p:6.1%} {'█' * round(30 * p)}".rstrip()
              for i, name, p in walk.best)]


# ---------------------------------------------------------------------------------------------
# As a page

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--paper:#fff;--line:#d1d9e0;
--text:#ddf4ff;--code:#fff1c4;--control:#ffe2e0;--bar:#0969da}
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--soft:#9198a1;--paper:#0d1117;
--line:#3d444d;--text:#12314f;--code:#4a3a08;--control:#5b1e1c;--bar:#4493f8}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:66rem;
margin:2rem auto;padding:0 1rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
small,figcaption{color:var(--soft)}figcaption{font-size:.8rem}
.t{display:inline-block;border-radius:4px;padding:0 .3rem;margin:1px;font-family:monospace}
.t small{display:block;font-size:.65rem}.text{background:var(--text)}.code{background:var(--code)}
.control{background:var(--control)}pre{overflow-x:auto}img{image-rendering:pixelated}
figure{display:inline-block;margin:0 1rem 1rem 0}.bar{fill:var(--bar)}
.line{stroke:var(--line);fill:none;vector-effect:non-scaling-stroke}
"""


def page(walk: Walk, title: str) -> str:
    """The walk as one HTML file that needs no other file."""
    title = html.escape(title)
    parts = [f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
             f"<style>{STYLE}</style><h1>{title}</h1>",
             f"<h2>{len(walk.tokens)} tokens</h2><p><small>id, and below it the surprise in bits; "
             "blue is text, yellow codes of a picture, red control tokens</small></p><p>",
             *(chip(t.kind, "▪" if t.kind == "code" else t.name,
                    f"{t.name}: entropy {bits(t.entropy)} bits",
                    f"<small>{t.id}<br>{bits(t.surprise)}</small>") for t in walk.tokens), "</p>"]
    for n, codes in enumerate(walk.codes):
        parts += [f"<h2>Picture {n + 1}: {codes.shape[1]} x {codes.shape[0]} codes</h2>",
                  *picture_figures(walk, n, codes)]
    parts += ["<h2>Who may look at whom</h2>", mask_figure(walk)]
    for heading, lines in (("Shapes", shape_lines(walk)), ("Attention", attention_lines(walk)),
                           ("Next token", next_lines(walk))):
        parts += [f"<h2>{heading}</h2><pre>", html.escape("\n".join(lines)), "</pre>"]
    return "\n".join(parts) + "\n"


def chip(kind: str, name: str, hint: str = "", below: str = "") -> str:
    """A token in the colour of its kind; a hint for the mouse; below the name, HTML."""
    return f'<span class="t {kind}" title="{html.escape(hint)}">{html.escape(name)}{below}</span>'


def picture_figures(walk: Walk, n: int, codes: Tensor) -> list[str]:
    """What the VQ-VAE sees, its codes, and the last token's attention to them."""
    side, weights = 320, heat(walk, n)
    seen = enlarge(walk.images[n], side)
    drawings = {
        "as the VQ-VAE sees it": seen, "its codes": code_grid(codes.tolist(), side),
        f"the last token's attention, at most {weights.max():.2%} of it": heat_on(seen, weights)}
    return [f'<figure><img alt="picture {n + 1}: {caption}" width="{side}" src="{data_uri(image)}">'
            f"<figcaption>{caption}</figcaption></figure>" for caption, image in drawings.items()]


def mask_figure(walk: Walk) -> str:
    """Queries downwards, keys to the right. Lines separate text and pictures."""
    T, keys = len(walk.tokens), walk.allowed.sum(1).tolist()  # each query sees the first so many
    edge = " ".join(f"{n},{t}" for t, n in enumerate(keys, start=1))
    lines = "".join(f"M0 {start}H{T}M{start} 0V{T}" for _, start, _ in walk.segments[1:])
    return (f'<figure><svg width="240" height="240" viewBox="0 0 {T} {T}"><polygon class="bar" '
            f'fill-opacity=".6" points="0,0 {edge} 0,{T}"/><path class="line" d="{lines}"/></svg>'
            f"<figcaption>{sum(keys)} of {T} x {T} pairs; a token of a picture, too, looks back "
            "only</figcaption></figure>")
