"""A page: `python generate.py --demo` shows a conversation, its ids and what the model looked at.

    browser --gradio--> Visit.ask --Conversation.ask--> pieces --> messages
                          |
                          +--> row: the ids, coloured by kind;  walk: entropy and attention

Who needs it: whoever shows the model to others. It listens on 127.0.0.1 only, to this machine. Each
browser has a conversation of its own, and they take turns at the model.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from html import escape

import torch
from PIL import Image
from torch import Tensor

from chameleon_extras.chat import Conversation
from chameleon_extras.explain import bits, chip, glances, kind_and_name
from chameleon_extras.files import line_of, say
from chameleon_extras.sheets import data_uri, enlarge, gray_grid, heat_on, parts_of
from generate import decode_pictures
from processor import load_image, rgb_levels

MODES = {"Answer": "text", "Draw": "image", "Both": "interleaved"}
KINDS = {"text": "of text", "code": "codes of pictures", "control": "marks"}
SIDE, WALKED = 216, 96  # pixels of a small picture; tokens of text in a walk, at most
STYLE = """
.side{--text:#cfe8ff;--code:#ffe39a;--control:#ffcfca;--bar:#0969da}
.dark .side{--text:#17406b;--code:#6b5310;--control:#6e2523;--bar:#4493f8}
:root:has(.dark){color-scheme:dark}
.side .t{display:inline-block;border-radius:3px;margin:1px;padding:1px 4px;
font:.8rem/1.3 monospace;vertical-align:top;text-align:center}
.side .code:empty{width:8px;height:10px;padding:0;vertical-align:middle}
.side .text{background:var(--text)}.side .code{background:var(--code)}
.side .control{background:var(--control)}.side small{display:block;opacity:.8}
.side .bar{display:block;height:4px;background:var(--bar)}
.side img,.chat img{image-rendering:pixelated}.side .t img{margin:3px auto 0}
.side figure{margin:.3rem 0}
input[type=radio]:checked{background-color:var(--checkbox-background-color-selected)!important}
.chat button[aria-label=Share],.chat button[title=Share]{display:none}
"""


class Visit:
    """What one browser sees: its conversation, and the messages (role, text or picture)."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation, self.messages, self.stopped = conversation, [], False

    def ask(self, text: str, files: list[str], mode: str, **options) -> Iterator[None]:
        """A turn. At each yield the messages have changed; `stopped` ends the answer."""
        self.stopped, said = False, []
        S = self.conversation.processor.image_seq_length
        every = 1 if S < 256 else math.isqrt(S)  # a large picture grows row by row
        self.messages += [("user", text)] if text else []
        try:
            pictures = [load_image(file) for file in files]
            self.messages += [("user", large(picture)) for picture in pictures]
            yield
            start = len(self.messages)
            with closing(self.conversation.ask(text, pictures, MODES[mode], every, **options)
                         ) as steps:
                for piece in steps:
                    if said and 0 < said[-1].drawn < S:  # the picture that has grown
                        said.pop()
                    said.append(piece._replace(image=piece.image and large(piece.image)))
                    self.messages[start:] = [("assistant", part) for part in parts_of(said)]
                    yield
                    if self.stopped:
                        break
            if not said and not self.stopped:
                self.messages.append(("assistant", "(the answer has no words)"))
                yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.messages.append(("assistant", f"({line_of(error)})"))
            yield


def large(picture: Image.Image) -> Image.Image:
    """A picture at a size that one can see, small ones enlarged by a whole factor."""
    picture = Image.fromarray(rgb_levels(picture))  # transparency on white, as the model sees it
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    return enlarge(picture, SIDE)


# ---------------------------------------------------------------------------------------------
# Beside the conversation


def row(conversation: Conversation) -> str:
    """The ids that the model has read and written, as HTML. Codes are many, so they are small."""
    chips, count = [], dict.fromkeys(KINDS, 0)
    for i in conversation.ids:
        kind, name = kind_and_name(conversation.processor.tokenizer, i)
        count[kind] += 1
        chips.append(chip(kind, "" if kind == "code" else name, f"{name} = {i}"))
    counts = " ".join(chip(kind, f"{n} {KINDS[kind]}") for kind, n in count.items())
    rest = f"{conversation.room()[0]} more fit." if conversation.whole else (
        "This is all that the model sees: the turn, and for a question the last pictures.")
    return f'<div class="side"><p>{len(chips)} ids: {counts} {rest}</p>{"".join(chips)}</div>'


def walk(conversation: Conversation) -> str:
    """The last answer as HTML: each token's entropy, and where it looked in one of the pictures."""
    model, processor, start = conversation.model, conversation.processor, conversation.start
    S, begin = processor.image_seq_length, processor.tokenizer.vocabulary.begin_image_id
    side, shown = math.isqrt(S), conversation.ids[: start + WALKED + S]
    if len(shown) <= start:
        return '<div class="side"></div>'
    ids = torch.tensor([shown], device=model.device)  # (1, T)
    tokens, looks = glances(model, processor.tokenizer, ids, start)
    places = [n + 1 for n, i in enumerate(shown) if i == begin and n + S < len(shown)]
    pictures = [(decoded(model, ids[:, n : n + S]), looks[:, n : n + S]) for n in places]
    parts, drawn = [], [token.entropy for token in tokens if token.kind == "code"]
    for n, token in enumerate(tokens):
        if token.kind == "code":
            continue
        below = (f'<small>{bits(token.entropy)}</small><span class="bar" '
                 f'style="width:{min(100, 15 * token.entropy):.0f}%"></span>')
        if pictures:
            picture, weights = max(pictures, key=lambda pair, n=n: pair[1][n].sum())
            if weights[n].any():  # else the pictures come after this token
                heat = heat_on(picture, weights[n].view(side, side)).resize((54, 54))
                below += f'<img alt="where it looked" src="{data_uri(heat)}">'
        parts.append(chip(token.kind, token.name, str(token.id), below))
    parts += [entropies(torch.tensor(drawn[n : n + S]).view(side, side))
              for n in range(0, len(drawn) - S + 1, S)]
    looked = ", and where it looked in the picture that it looked at most" * bool(pictures)
    return ('<div class="side"><p>The last answer. Below each token its entropy in bits, which '
            f"says how open the choice was{looked}.</p>{''.join(parts)}</div>")


def decoded(model, ids: Tensor) -> Image.Image:
    """A picture's ids (1, S) -> the picture; weights without a decoder give a gray one."""
    try:
        return large(decode_pictures(model, ids)[0])
    except ValueError:
        return Image.new("RGB", (SIDE, SIDE), "gray")


def entropies(values: Tensor) -> str:
    """The entropies of a drawing's codes (h, w): bright where the choice was open."""
    return (f'<figure><img alt="entropy of each code" width="{SIDE}" '
            f'src="{data_uri(enlarge(gray_grid(values), SIDE))}"><figcaption>entropy of each code, '
            f"white is {values.max():.1f} bits</figcaption></figure>")


# ---------------------------------------------------------------------------------------------
# The page


def check_gradio() -> None:
    """ValueError, with the remedy, where gradio is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no telemetry
    try:
        import gradio  # noqa: F401, an extra
    except ImportError:
        raise ValueError('--demo needs gradio: pip install -e ".[demo]"') from None


def page(start: Callable[[], Conversation], seed: int, sampling: dict):
    """The page as gradio's Blocks; `start` begins a conversation."""
    import gradio as gr

    def messages(visit: Visit) -> list[dict]:
        return [{"role": role, "content": gr.Image(
            said, show_label=False, buttons=[], container=False) if isinstance(said, Image.Image)
            else escape(said, quote=False)} for role, said in visit.messages]  # it expects HTML

    def ask(visit, message, mode, seed, temperature, guidance_text, guidance_image):
        visit = visit or Visit(start())
        options = sampling | dict(
            seed=int(seed or 0), temperature=temperature, do_sample=temperature > 0,
            guidance_text=guidance_text, guidance_image=guidance_image)
        for _ in visit.ask(message["text"], message["files"], mode, **options):
            yield visit, messages(visit), None, gr.skip(), gr.skip()
        talk = visit.conversation
        yield visit, messages(visit), None, row(talk), walk(talk)

    def stop(visit) -> None:
        if visit:
            visit.stopped = True

    with gr.Blocks(title="Chameleon", analytics_enabled=False, fill_width=True) as blocks:
        visit = gr.State(None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(label="Chameleon", render_markdown=False, height="60vh",
                                  elem_classes="chat", buttons=["copy"])
                line = gr.MultimodalTextbox(
                    show_label=False, file_types=["image"], file_count="multiple", autofocus=True,
                    placeholder="Ask, or say what to draw. Pictures can be dropped here.")
                mode = gr.Radio(list(MODES), value="Answer", show_label=False)
                with gr.Row():
                    end, anew = (gr.Button(name, size="md", min_width=120)
                                 for name in ("Stop", "New chat"))
                with gr.Accordion("Sampling", open=False):
                    numbers = [
                        gr.Number(seed, precision=0, label="Seed"),
                        gr.Slider(0, 2, sampling["temperature"], label="Temperature of text"),
                        gr.Slider(0, 5, sampling["guidance_text"], label="Guidance by the words"),
                        gr.Slider(0, 5, sampling["guidance_image"], label="Guidance by pictures")]
            with gr.Column(scale=2, min_width=320):
                ids, walked = gr.HTML(), gr.HTML(elem_id="walk")
        asking = line.submit(ask, [visit, line, mode, *numbers], [visit, chat, line, ids, walked],
                             concurrency_limit=1, show_progress="hidden")
        end.click(stop, visit, None, show_progress="hidden")
        for event in (anew.click, chat.clear):
            event(stop, visit, None, cancels=[asking]).then(
                lambda: (None, [], "", ""), None, [visit, chat, ids, walked])
    return blocks


def serve(start: Callable[[], Conversation], seed: int, sampling: dict) -> None:
    """Shows the page until Ctrl-C."""
    import gradio as gr

    blocks = page(start, seed, sampling)
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none is fetched
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True, css=STYLE,
        theme=gr.themes.Default(**fonts), footer_links=[], max_file_size="32mb")
    say(f"{address} (Ctrl-C ends it)")
    blocks.block_thread()
