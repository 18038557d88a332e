"""One prompt's walk through the model, every number taken from the run: `generate.py --explain`.

    prompt, pictures --processor--> ids with <image> places --VQ-VAE--> ids (1,T) --decoder--> Walk
                                                                     (hooks note the shapes)
    Walk --report--> lines for a terminal        Walk --page--> one HTML file, light and dark

Letters as in chameleon.py: T tokens, D width, V vocabulary; and h, w the grid of a picture's codes.

Two numbers stand beside each token, both in bits, both said BEFORE the token is seen:

    entropy   -sum_i p_i log2 p_i     how many bits the model expects the next token to cost
    surprise  -log2 p(the token)      how many it did cost

On text that the model writes itself the two agree on average. A prompt surprises it more, as
alignment never trains on prompts (section 3 of the paper); codes of a picture are hard to foresee.
"""

import base64
import html
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration, KVCache, allowed_keys
from chameleon_extras.sheets import code_colour
from processor import ChameleonImageProcessor
from tokenizer import Tokenizer, image_token_name

SHADES = " ░▒▓█"
CHUNK = 128  # places whose logits exist at one time: all of 4096 x 65536 would be 1 GiB
LINES, GRID = 40, 12  # most lines of tokens, most codes a side, that a terminal is shown
VQ = "model.vqmodel."
FIRST = "model.layers.0."
# What is watched, in the letters of vqvae.py and chameleon.py.
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
    """One place of the row."""

    id: int
    name: str  # text as it is, with · for a space; control tokens and codes by their names
    kind: str  # "text", "code" or "control"
    surprise: float  # bits; nan in front, where nothing stands before
    entropy: float


@dataclass
class Walk:
    """All that is shown of one prompt; tensors on the CPU."""

    tokens: list[Token]
    segments: list[tuple[str, int, int]]  # "text" or "picture 1", first place, place behind
    codes: list[Tensor]  # of each picture (h, w)
    images: list[Image.Image]  # each as the VQ-VAE sees it
    shapes: list[tuple[str, str, tuple[int, ...]]]  # module, letters, the true shape
    allowed: Tensor  # (T, T) bool: may query t look at key j?
    attention: Tensor  # (layers, T): of the last token, mean over heads
    probs: Tensor  # (V,), the next token's
    best: list[tuple[int, str, float]]  # the most likely ids: id, name, probability
    shares: dict[str, float]  # probability of text, codes, control tokens; together 1


# ---------------------------------------------------------------------------------------------
# The run


class Names:
    """Ids as a person reads them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.codes = tokenizer, set(tokenizer.vocabulary.code_to_id.tolist())

    def kind(self, token_id: int) -> str:
        if token_id in self.codes:
            return "code"
        return "control" if token_id in self.tokenizer.special_ids else "text"

    def name(self, token_id: int) -> str:
        try:
            text = self.tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
        except ValueError:  # rows of the embedding that no token has: some checkpoints pad V
            return "(no token)"
        text = text.replace(" ", "·")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@torch.inference_mode()
def walk(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, input_ids: Tensor,
         pixel_values: Tensor | None = None, top: int = 10) -> Walk:
    """input_ids (1, T) with `<image>` places, pixels (N, 3, H, W) -> the Walk. No padding."""
    assert input_ids.shape[0] == 1, f"one prompt, not {input_ids.shape[0]}"
    names, T, shapes = Names(tokenizer), input_ids.shape[1], []
    hooks = watch(model, shapes)
    try:
        ids = input_ids
        if pixel_values is not None:
            ids = model.model.replace_image_placeholders(input_ids, pixel_values)  # (1, T)
        cache = KVCache(model.config, 1, T, model.dtype, model.device)
        hidden = model.model(ids, past_key_values=cache).last_hidden_state[0]  # (T, D)
        probs = model.lm_head(hidden[-1:]).float().softmax(-1)[0].cpu()  # (V,)
    finally:
        for hook in hooks:
            hook.remove()
    cache.length -= 1  # the last token once more, now through the attention that shows its weights
    last = model.model(ids[:, -1:], past_key_values=cache, output_attentions=True)
    attention = torch.cat([weights[0].mean(0) for weights in last.attentions])  # (layers, T)
    allowed = allowed_keys(torch.ones(1, T, T), T, 0, "cpu")[0, 0]  # (T, T); a 2-D mask: None
    tokens = tokens_of(model, names, ids[0], hidden)
    segments, codes, images = pictures_of(model, input_ids[0], ids[0], pixel_values)
    best = [(i, names.name(i), probs[i].item()) for i in probs.topk(top).indices.tolist()]
    shares = {"text": 0.0, "code": 0.0, "control": 0.0}
    for i, p in enumerate(probs.tolist()):
        shares[names.kind(i)] += p
    return Walk(tokens, segments, codes, images, shapes, allowed, attention.float().cpu(), probs,
                best, shares)


def watch(model: nn.Module, shapes: list) -> list:
    """Notes the shape of what each module of WATCHED gives, in the order they run -> the hooks."""

    def hook(name: str, letters: str):
        def note(module: nn.Module, inputs, output) -> None:
            shapes.append((name, letters, tuple(output.shape)))

        return model.get_submodule(name).register_forward_hook(note)

    return [hook(name, letters) for name, letters in WATCHED.items()]


def tokens_of(model: ChameleonForConditionalGeneration, names: Names, ids: Tensor,
              hidden: Tensor) -> list[Token]:
    """ids (T,), hidden states (T, D) -> the tokens with what the model expected in their place."""
    surprise, entropy = [torch.full((1,), torch.nan)], [torch.full((1,), torch.nan)]
    for states, targets in zip(hidden[:-1].split(CHUNK), ids[1:].split(CHUNK)):
        logp = model.lm_head(states).float().log_softmax(-1)  # (n, V), nats
        surprise.append(-logp.gather(-1, targets[:, None])[:, 0].cpu())  # (n,)
        entropy.append(-torch.xlogy(logp.exp(), logp.exp()).sum(-1).cpu())  # (n,)
    bits = torch.stack((torch.cat(surprise), torch.cat(entropy)), dim=1) / math.log(2)
    return [Token(i, names.name(i), names.kind(i), *pair)
            for i, pair in zip(ids.tolist(), bits.tolist())]


def pictures_of(model: ChameleonForConditionalGeneration, input_ids: Tensor, ids: Tensor,
                pixels: Tensor | None) -> tuple[list, list[Tensor], list[Image.Image]]:
    """Where the row (T,) is text and where a picture, and each picture's codes (h, w)."""
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
    T, V = len(walk.tokens), len(walk.probs)
    parts = [f"{T} tokens, {len(walk.codes)} picture(s), a vocabulary of {V}"]
    parts.append("\n".join(["place      id  token                 surprise  entropy   (bits)",
                            *token_lines(walk)]))
    for n, codes in enumerate(walk.codes):
        parts.append("\n".join(picture_lines(walk, n, codes)))
    parts.append("\n".join(mask_lines(walk)))
    names = ["module", *[name for name, _, _ in walk.shapes]]
    wide = max(map(len, names))
    lines = [f"{name.ljust(wide)}  {str(shape).ljust(20)} {letters}"
             for name, letters, shape in walk.shapes]
    parts.append("\n".join([f"{'module'.ljust(wide)}  {'gives'.ljust(20)} in letters", *lines]))
    parts.append("\n".join(attention_lines(walk)))
    parts.append("\n".join(next_lines(walk)))
    return "\n\n".join(parts)


def bits(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"  # nan is not itself


def token_lines(walk: Walk) -> list[str]:
    """A line for each token; a picture is one line, a long text loses its middle."""
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
    pictures = [(start, end) for name, start, end in walk.segments if name != "text"]
    start, end = pictures[n]
    return walk.attention[:, start:end].mean(0).view_as(walk.codes[n])  # (h, w)


def picture_lines(walk: Walk, n: int, codes: Tensor) -> list[str]:
    h, w = codes.shape
    first = int(codes[0, 0])
    picture, weights = walk.images[n], heat(walk, n)
    start = [start for name, start, _ in walk.segments if name != "text"][n]
    lines = [f"picture {n + 1}: {picture.width} x {picture.height} pixels, {w} x {h} codes, "
             f"the ids from place {start} on",
             f"its first code {first} is named {image_token_name(first)}, which is id "
             f"{walk.tokens[start].id}"]
    shaded = shades(weights)
    rows = [" ".join(f"{code:4}" for code in row[:GRID].tolist()) for row in codes[:GRID]]
    cut = " ..." if max(h, w) > GRID else ""
    if w <= GRID and h <= GRID:
        lines += [f"{row}    |{shade}|" for row, shade in zip(rows, shaded)]
    else:
        lines += [row + cut for row in rows] + [f"|{shade}|" for shade in shaded]
    return [*lines, f"shaded: attention of the last token, the darkest {float(weights.max()):.2%}"]


def shades(weights: Tensor) -> list[str]:
    """(h, w) -> h lines of 2 w characters, the largest weight the fullest block."""
    levels = (weights / weights.max().clamp(min=1e-12) * (len(SHADES) - 1)).round().long()
    return ["".join(SHADES[level] * 2 for level in row) for row in levels.tolist()]


def block(walk: Walk, query: tuple, key: tuple) -> str:
    """How much of a segment's places another's may look at: "all", "none" or "half"."""
    part = walk.allowed[query[1] : query[2], key[1] : key[2]]  # (queries, keys)
    return "all" if part.all() else "half" if part.any() else "none"


def mask_lines(walk: Walk) -> list[str]:
    T, pairs = len(walk.tokens), int(walk.allowed.sum())
    lines = [f"positions 0 to {T - 1}, one each, text and pictures alike",
             f"mask: {pairs} of {T} x {T} pairs, each token looks at itself and what is before it"]
    signs = {"all": "█", "half": "◣", "none": "·"}
    wide = max(len(name) for name, _, _ in walk.segments)
    for query in walk.segments:
        row = " ".join(signs[block(walk, query, key)] for key in walk.segments)
        lines.append(f"  {query[0].ljust(wide)}  {row}")
    return lines


def attention_shares(walk: Walk) -> list[tuple[str, list[float]]]:
    """For each segment the last token's attention to it, layer by layer."""
    return [(name, walk.attention[:, start:end].sum(1).tolist())
            for name, start, end in walk.segments]


def attention_lines(walk: Walk) -> list[str]:
    lines = ["the last token's attention, mean over heads, layer by layer"]
    for name, shares in attention_shares(walk):
        lines.append(f"  {name:10}" + "".join(f" {share:4.0%}" for share in shares))
    return lines


def next_lines(walk: Walk) -> list[str]:
    p = walk.probs
    entropy = float(-torch.xlogy(p, p).sum()) / math.log(2)
    lines = [f"next token: {entropy:.2f} bits; " + ", ".join(
        f"{kind} {share:.1%}" for kind, share in walk.shares.items())]
    return lines + [f"{i:7}  {name:20}  {p:6.1%} {'█' * round(30 * p)}".rstrip()
                    for i, name, p in walk.best]


# ---------------------------------------------------------------------------------------------
# As a page

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--paper:#fff;--line:#d1d9e0;
--text:#ddf4ff;--code:#fff1c4;--control:#ffe2e0;--bar:#0969da;--heat:#d1242f}
@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--soft:#9198a1;--paper:#0d1117;
--line:#3d444d;--text:#12314f;--code:#4a3a08;--control:#5b1e1c;--bar:#4493f8;--heat:#ff7b72}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;
margin:2rem auto;padding:0 1rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
small,td.s{color:var(--soft)}
.t{display:inline-block;border-radius:4px;padding:0 .3rem;margin:1px;font-family:monospace}
.t small{display:block;font-size:.65rem}.text{background:var(--text)}.code{background:var(--code)}
.control{background:var(--control)}table{border-collapse:collapse}td{padding:.1rem .7rem .1rem 0}
td.n{text-align:right;font-variant-numeric:tabular-nums}code{font-family:monospace}
figure{display:inline-block;margin:0 1rem 1rem 0}figcaption{color:var(--soft);font-size:.8rem}
img{image-rendering:pixelated}.bar{fill:var(--bar)}.heat{fill:var(--heat)}.line{stroke:var(--line);
fill:none}text{font-family:monospace;fill:#1f2328;text-anchor:middle;dominant-baseline:central}
"""


def page(walk: Walk, title: str) -> str:
    """The walk as one HTML file that needs nothing beside it."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
             f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
             f"<h2>{len(walk.tokens)} tokens</h2><p><small>id, and below it the surprise in bits; "
             "blue is text, yellow codes of a picture, red control tokens</small></p><p>",
             *map(chip, walk.tokens), "</p>"]
    for n, codes in enumerate(walk.codes):
        parts += [f"<h2>Picture {n + 1}: {codes.shape[1]} x {codes.shape[0]} codes</h2>",
                  *picture_figures(walk, n, codes)]
    parts += ["<h2>Who may look at whom</h2>", mask_figure(walk), "<h2>Shapes</h2><table>"]
    parts += [f"<tr><td><code>{name}</code><td><code>{shape}</code><td class=s>{letters}"
              for name, letters, shape in walk.shapes]
    parts.append("</table><h2>The last token's attention, layer by layer</h2><table>")
    for name, shares in attention_shares(walk):
        cells = "".join(f"<td class=n>{share:.0%}" for share in shares)
        parts.append(f"<tr><td>{name}{cells}")
    parts.append(f"</table><h2>{html.escape(next_lines(walk)[0].capitalize())}</h2><table>")
    for i, name, p in walk.best:
        bar = (f'<svg width="{300 * p:.1f}" height="12"><rect class="bar" width="100%" '
               'height="12"/></svg>')
        parts.append(f"<tr><td class=n>{i}<td><code>{html.escape(name)}</code><td class=n>{p:.1%}"
                     f"<td>{bar}")
    return "\n".join(parts) + "</table>\n"


def chip(token: Token) -> str:
    name = html.escape(token.name) if token.kind != "code" else "&#9642;"
    hint = f"{html.escape(token.name)}: entropy {bits(token.entropy)} bits"
    return (f'<span class="t {token.kind}" title="{hint}">{name}<small>{token.id}<br>'
            f"{bits(token.surprise)}</small></span>")


def picture_figures(walk: Walk, n: int, codes: Tensor) -> list[str]:
    """What the VQ-VAE sees, the codes it names, and where the last token looks."""
    side, file = 320, io.BytesIO()
    walk.images[n].save(file, "png")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    weights = heat(walk, n)
    strong = (weights / weights.max().clamp(min=1e-12)).tolist()
    image = f'<img alt="picture {n + 1}" width="{side}" src="{source}">'
    shaded = lambda share: f'class="heat" fill-opacity="{0.85 * share:.2f}"'  # noqa: E731
    below = (f'<image width="{side}" height="{side}" preserveAspectRatio="none" '
             f'href="{source}"/>')
    overlay = svg_cells(strong, side, shaded, below)
    drawings = ((image, "as the VQ-VAE sees it"), (svg_codes(codes.tolist(), side), "its codes"),
                (overlay, f"the last token's attention, at most {float(weights.max()):.2%} of it"))
    return [f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
            for drawing, caption in drawings]


def svg_codes(codes: list[list[int]], side: int) -> str:
    """Codes (h, w) as an SVG: equal codes have equal colours, and their numbers if they fit in."""
    cell, digits = side / len(codes[0]), ""
    if cell >= 24:
        digits = "".join(f'<text x="{(x + 0.5) * cell:.1f}" y="{(y + 0.5) * cell:.1f}" '
                         f'font-size="{cell * 0.34:.0f}">{code}</text>'
                         for y, row in enumerate(codes) for x, code in enumerate(row))
    return svg_cells(codes, side, lambda code: f'fill="{code_colour(code)}"', over=digits)


def svg_cells(values: list[list], side: int, attributes, under: str = "", over: str = "") -> str:
    """A grid of values (h, w) as rectangles; `attributes` tells how one looks."""
    h, w = len(values), len(values[0])
    cell = side / w
    cells = "".join(f'<rect x="{x * cell:.2f}" y="{y * cell:.2f}" width="{cell:.2f}" '
                    f'height="{cell:.2f}" {attributes(value)}/>'
                    for y, row in enumerate(values) for x, value in enumerate(row))
    return (f'<svg width="{side}" height="{cell * h:.0f}" viewBox="0 0 {side} {cell * h:.2f}">'
            f"{under}{cells}{over}</svg>")


def mask_figure(walk: Walk, side: int = 240) -> str:
    """Queries downwards, keys to the right; a line wherever text and picture meet."""
    scale, drawn = side / len(walk.tokens), []
    for query in walk.segments:
        for key in walk.segments:
            x0, x1, y0, y1 = (place * scale for place in (*key[1:], *query[1:]))
            corners = {"all": [(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
                       "half": [(x0, y0), (x1, y1), (x0, y1)], "none": []}[block(walk, query, key)]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            drawn.append(f'<polygon class="bar" fill-opacity=".6" points="{points}"/>')
    for _, start, _ in walk.segments[1:]:
        at = start * scale
        drawn.append(f'<path class="line" d="M0 {at:.1f}H{side}M{at:.1f} 0V{side}"/>')
    return (f'<figure><svg width="{side}" height="{side}">{"".join(drawn)}</svg><figcaption>'
            f"{int(walk.allowed.sum())} of {len(walk.tokens)} x {len(walk.tokens)} pairs; a token "
            "of a picture, too, looks back only</figcaption></figure>")
