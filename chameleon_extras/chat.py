"""A conversation: `python generate.py --chat` on a terminal, and what the page of demo.py shows.

    line, pictures --Conversation.ask--> ids so far, and the turn --stream--> pieces --> terminal
                        ^                                                        |
                        +------ the answer's ids, and the cache of all read <----+

Who needs it: whoever wants to talk to a model, and whoever builds a user interface of their own.

With `whole`, the ids of all turns go into each call of `stream`, with the cache of the call before.
So a turn reads only its own tokens, unless it is guided. A drawn picture is context, too. The paper
trains on turns that alternate (section 3), so each turn ends with the end-of-turn id.

Without `whole`, a turn sees no turn before it; a question without a picture of its own sees the
last pictures. tiny/ is used like this, because it has learned from conversations of 256 tokens at
most, which are two to five turns about one picture.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from chameleon import ChameleonForConditionalGeneration, KVCache
from chameleon_extras.command import ASKS_TO_DRAW, check_folder, place_images, read_seed, with_bar
from chameleon_extras.files import STOPS, line_of, say, stop
from chameleon_extras.sheets import parts_of, save_picture, write_document
from generate import Piece, pieces, room_behind, seeds_of, stream
from processor import ChameleonImageProcessor, ChameleonProcessor, load_image

HELP = """\
TEXT            a turn; <image> in it marks a picture's place, else pictures come first
/image FILE     adds pictures to the next turn; /image last: the last again; /image: takes all back
/draw TEXT      answers with a picture, saved as picture.png, picture-2.png ...
/both TEXT      answers with text and pictures
/seed N         sets the next answer's seed, a number or random; each turn adds 1
/reset          begins a new conversation
/save FOLDER    writes the conversation as document.html and document.md
/help, /quit    Ctrl-C ends an answer and keeps the conversation"""


class Conversation:
    """The turns so far. One model can have many conversations, one at a time."""

    def __init__(self, model: ChameleonForConditionalGeneration, processor: ChameleonProcessor,
                 decoder=None, whole: bool = True) -> None:
        self.model, self.processor, self.decoder, self.whole = model, processor, decoder, whole
        self.reset()

    def reset(self) -> None:
        self.ids = [self.processor.tokenizer.bos_token_id]  # of all turns, or of the last one
        self.start = 1  # where the last answer begins
        self.pictures = []  # ids of the last pictures, marks included
        self.seen = None  # the last picture, as it was given or drawn
        self.parts = []  # text and pictures to look at, lines of the user begin with ">"
        self.cache = KVCache(self.model.config)

    def ask(self, text: str, pictures: list, mode: str = "text", every: int = 0,
            **options) -> Iterator[Piece]:
        """A turn of text and pictures -> the answer's pieces, as `pieces` gives them.

        `every` is an option of `pieces`, `options` are those of `stream`. Whatever ends the answer,
        it stays in the conversation: text as far as it came, and whole pictures. ValueError, and no
        turn, for what cannot be read or does not fit.
        """
        text = place_images([text], len(pictures))[0]
        inputs = self.processor(text=text, images=pictures or None).to(self.model.device)
        turn = self.model.model.replace_image_placeholders(
            inputs["input_ids"], inputs.get("pixel_values"))[0].tolist()[1:]  # without <s>
        before = self.ids
        if not self.whole:  # a drawing sees the pictures of its own turn alone
            before = before[:1] + (self.pictures if mode == "text" and not pictures else [])
        prompt, made, said = before + turn, [], []
        steps = stream(self.model, torch.tensor([prompt], device=self.model.device), mode=mode,
                       past_key_values=self.cache, decoder=self.decoder, **options)
        self.parts.append("> " + text.replace("<image>", ""))
        if pictures:
            self.parts += ChameleonImageProcessor.postprocess(inputs["pixel_values"])
            self.seen = pictures[-1]

        def watched() -> Iterator[torch.Tensor]:
            for ids in with_bar(steps, self.model):
                made.append(int(ids[0]))
                yield ids

        try:
            for piece in pieces(self.model, self.processor.tokenizer, watched(), every):
                if piece.drawn in (0, self.processor.image_seq_length):  # text, a whole picture
                    said.append(piece)
                    self.seen = piece.image or self.seen
                yield piece
        finally:
            self.parts += parts_of(said)
            answer = self.finished(made)
            self.ids, self.start = prompt + answer, len(prompt)
            self.pictures = self.pictures_of(answer) or self.pictures_of(turn) or self.pictures

    def finished(self, made: list[int]) -> list[int]:
        """An answer's ids as a turn: no unfinished picture, and one end of turn at its end."""
        names, tokenizer = self.processor.tokenizer.vocabulary, self.processor.tokenizer
        begun = max((n for n, i in enumerate(made) if i == names.begin_image_id), default=0)
        if made.count(names.begin_image_id) > made.count(names.end_image_id):
            made = made[:begun]
        ends = {tokenizer.eos_token_id, names.end_of_turn_id, tokenizer.pad_token_id}
        return [i for i in made if i not in ends] + [names.end_of_turn_id]

    def pictures_of(self, ids: list[int]) -> list[int]:
        """The pictures among ids, with their marks."""
        names, S = self.processor.tokenizer.vocabulary, self.processor.image_seq_length
        starts = [n for n, i in enumerate(ids) if i == names.begin_image_id]
        return [i for n in starts for i in ids[n : n + S + 2]]

    def room(self) -> tuple[int, int]:
        """-> the tokens that the next turn and its answer may have, and those of the context."""
        context = room_behind(self.model.config, 0)
        return context - (len(self.ids) if self.whole else 0), context


# ---------------------------------------------------------------------------------------------
# On a terminal


class Terminal:
    """Reads lines and answers them until the end of input."""

    def __init__(self, conversation: Conversation, seed: int, sampling: dict) -> None:
        self.conversation, self.seed, self.sampling = conversation, seed, sampling
        self.waiting = []  # pictures for the next turn

    def run(self) -> None:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401, edits and remembers the lines of `input`
        if sys.stdin is None:
            raise ValueError("--chat reads lines from standard input, which is closed")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a turn with such bytes is refused
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                try:
                    self.answer(line)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    if isinstance(error, OSError) and error.errno and not error.filename:
                        raise  # not of a file: stdout is full, or has no reader
                    say(line_of(error))  # the chat goes on
            except EOFError:
                return
            except KeyboardInterrupt:
                print(flush=True)

    def answer(self, line: str) -> None:
        """One line of the user. ValueError or OSError in one line for what cannot work; EOFError
        for /quit, as at the end of input.
        """
        word, rest = [*line.split(maxsplit=1), "", ""][:2]
        rest = rest.strip()
        if word in ("/draw", "/both"):
            if not rest and not self.waiting:
                raise ValueError(f"{word} needs words, such as: {word} Draw a blue star.")
            self.turn(rest, "image" if word == "/draw" else "interleaved")
        elif word == "/image":
            self.image(rest)
        elif word == "/seed":
            self.seed = seeds_of(read_seed(rest), 1)[0]
        elif word == "/reset":
            self.conversation.reset()
            self.waiting = []
        elif word == "/save":
            self.save(rest)
        elif word == "/help":
            print(HELP, flush=True)
        elif word == "/quit":
            raise EOFError
        elif word.startswith("/") and "/" not in word[1:]:
            raise ValueError(f"{word} is no command: /help lists them")
        elif line.strip() or self.waiting:
            self.turn(line.strip(), "text")

    def turn(self, text: str, mode: str) -> None:
        if mode == "text" and ASKS_TO_DRAW.match(text):
            say("a turn is answered in words: /draw TEXT draws")
        before, in_line, empty = len(self.conversation.parts), False, True
        steps = self.conversation.ask(text, self.waiting, mode, seed=self.seed, **self.sampling)
        try:
            for piece in steps:
                empty = False
                if piece.image is None:
                    print(piece.text, end="", flush=True)
                    in_line = not piece.text.endswith("\n")
                elif piece.drawn == self.conversation.processor.image_seq_length:
                    print("\n" * in_line + f"[{self.keep(piece.image)}, seed {self.seed}]",
                          flush=True)
                    in_line = False
            if empty:
                say("the answer has no words")
        finally:
            steps.close()
            if len(self.conversation.parts) > before:  # else the turn was refused
                self.waiting, self.seed = [], self.seed + 1
                print(end="\n" * in_line, flush=True)
        free, context = self.conversation.room()
        if free < context // 3:
            say(f"{free} of {context} tokens are left, and a picture takes "
                f"{self.conversation.processor.image_seq_length + 2}: /reset begins anew")

    def keep(self, picture: Image.Image) -> Path:
        """Saves a drawing under the first free name, made at once: others may draw, too."""
        for n in count(1):
            path = Path("picture.png" if n == 1 else f"picture-{n}.png")
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                try:
                    save_picture(picture, path)
                except OSError:
                    path.unlink()
                    raise
                return path

    def image(self, names: str) -> None:
        whole = os.path.exists(os.path.expanduser(names))  # a name with blanks
        escaped = names.replace("\\", "\\\\") if os.sep == "\\" else names  # for shlex
        if names == "last":
            if self.conversation.seen is None:
                raise ValueError("there is no picture yet: /image FILE")
            self.waiting.append(self.conversation.seen)
        elif not names:
            self.waiting = []  # a turn with too many is refused, and they would stay
        else:
            try:
                files = [names] if whole else shlex.split(escaped)
            except ValueError:
                raise ValueError(f"/image {names}: no such file (put a name with quotes or "
                                 "blanks into double quotes)") from None
            self.waiting += [load_image(os.path.expanduser(name)) for name in files]
        say(f"{len(self.waiting)} picture(s) for the next turn")

    def save(self, name: str) -> None:
        if not name or not self.conversation.parts:
            raise ValueError("/save needs the name of a folder, and a conversation")
        folder = Path(os.path.expanduser(name))  # an unknown ~user stays as it is
        check_folder(folder)
        write_document(folder, self.conversation.parts)
        say(str(folder / "document.html"))


def chat(conversation: Conversation, seed: int, sampling: dict) -> None:
    """The conversation on this terminal. Ctrl-C ends an answer; other signals end the program."""
    for number in STOPS:
        if signal.getsignal(number) is stop:  # it ignores what comes after the first
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                          else signal.SIG_DFL)
    say("A line is a turn, /help lists the commands."
        + ("" if conversation.whole else " A turn sees the last pictures, not the lines before "
           "(--context whole: all)."))
    Terminal(conversation, seed, sampling).run()
