"""A conversation: what the model reads of it, and what a person sees on a terminal."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate as module
from chameleon import ChameleonForConditionalGeneration, ChameleonProcessor
from chameleon_extras import chat
from chameleon_extras.chat import Conversation
from chameleon_extras.command import TINY
from chameleon_extras.files import stoppable

pty = pytest.importorskip("pty")  # not on Windows
ROOT = Path(module.__file__).parent
SHAPES, STAR = ROOT / "examples" / "shapes.png", ROOT / "examples" / "star.png"


@pytest.fixture(scope="module")
def tiny():
    return (ChameleonForConditionalGeneration.from_pretrained(TINY),
            ChameleonProcessor.from_pretrained(TINY))


def said(pieces) -> str:
    return "".join(piece.text for piece in pieces)


# ---------------------------------------------------------------------------------- the ids


def test_the_ids_are_those_of_the_chat_template_and_only_new_ones_are_read(tiny):
    model, processor = tiny
    talk, picture, reads = Conversation(model, processor), Image.open(SHAPES), []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, ids, __: reads.append(ids[0].shape[1]))
    messages = []
    for text, pictures in (("What do you see?", [picture]), ("Draw a star.", []), ("Hello", [])):
        start = len(reads)
        messages += [{"role": "user", "content": [
            *({"type": "image", "image": image} for image in pictures),
            {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(messages)
        expected = model.model.replace_image_placeholders(
            inputs["input_ids"], inputs.get("pixel_values"))[0].tolist()
        before = len(talk.ids)
        answer = said(talk.ask(text, pictures))
        assert talk.ids[: len(expected)] == expected
        assert 0 <= reads[start] - (len(expected) - before) <= 3  # end of turn, last ids before it
        messages += [{"role": "assistant", "content": answer}]
    hook.remove()


def test_a_drawn_picture_is_context_for_the_next_turn(tiny):
    for whole in (True, False):
        talk = Conversation(*tiny, whole=whole)
        drawn = list(talk.ask("Draw a large blue star.", [], "image", image_top_p=0.9))
        assert [piece.drawn for piece in drawn] == [81]
        answer = said(talk.ask("What colour is the star?", []))
        assert "blue" in answer
        assert isinstance(talk.parts[1], Image.Image) and talk.parts[3] == answer


def test_without_the_whole_each_question_sees_the_last_picture_alone(tiny):
    talk = Conversation(*tiny, whole=False)
    said(talk.ask("What do you see in this image?", [Image.open(SHAPES)]))
    assert said(talk.ask("Is there a red circle?", [])).endswith("Yes.")
    assert said(talk.ask("What colour is the star?", [Image.open(STAR)])).endswith("is yellow.")
    assert said(talk.ask("What do you see?", [])) == "A large yellow star on a black background."


def test_what_is_stopped_stays_as_text_and_an_unfinished_picture_goes(tiny):
    talk = Conversation(*tiny)
    steps = talk.ask("What do you see?", [Image.open(SHAPES)])
    begun = "".join(next(steps).text for _ in range(3))
    steps.close()
    names = tiny[1].tokenizer.vocabulary
    assert tiny[1].decode(talk.ids, True).endswith(begun) and talk.parts[-1] == begun
    assert talk.ids[-1] == names.end_of_turn_id
    before = len(talk.ids)
    steps = talk.ask("Draw a star.", [], "image", every=10)
    assert next(steps).drawn == 10
    steps.close()
    new = talk.ids[before:]
    assert names.begin_image_id not in new and new.count(names.end_of_turn_id) == 2
    assert len(talk.parts) == 4  # two questions, a picture in, one answer


@pytest.mark.parametrize("options, whole", [
    ([], False), (["--model", "tiny"], False), (["--context", "whole"], True),
])
def test_tiny_by_any_name_shows_a_turn_the_last_pictures(options, whole, monkeypatch):
    talks = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chat, "chat", lambda talk, *_: talks.append(talk))
    assert module.main(["--chat", *options]) == 0 and talks[0].whole == whole


def test_padding_that_was_sampled_is_no_part_of_a_turn(tiny):
    talk, tokenizer = Conversation(*tiny), tiny[1].tokenizer
    end = tokenizer.sep_token_id
    for made in ([900, tokenizer.pad_token_id, 901], [900, 901, end]):
        assert talk.finished(made) == [900, 901, end]


def test_a_turn_that_does_not_fit_is_one_line_and_no_turn(tiny):
    talk = Conversation(*tiny)
    said(talk.ask("Hello", []))
    state = list(talk.ids), list(talk.parts)
    with pytest.raises(ValueError, match="context holds 1024"):
        said(talk.ask("Hello", [Image.open(STAR)] * 13))
    assert (talk.ids, talk.parts) == state and talk.room() == (1024 - len(talk.ids), 1024)


# ------------------------------------------------------------------------------- the commands


@pytest.fixture
def lines(tiny, tmp_path, monkeypatch, capsys):
    """Answers lines in an empty folder -> stdout, stderr of each."""
    monkeypatch.chdir(tmp_path)
    terminal = chat.Terminal(Conversation(*tiny, whole=False), 3, {"image_top_p": 0.9})

    def answer(line: str) -> tuple[str, str]:
        try:
            terminal.answer(line)
        except (ValueError, OSError) as error:
            return "", f"{error}\n"
        return tuple(capsys.readouterr())

    answer.terminal = terminal
    return answer


def test_five_turns_with_two_pictures_in_and_two_out(lines, tmp_path):
    lines(f"/image {SHAPES}")
    assert lines("What do you see in this image?")[0] == (
        "A small red circle above a large blue square on a white background.\n")
    assert lines("/draw Draw a large blue star.")[0] == "[picture.png, seed 4]\n"
    lines(f"/image '{STAR}'")
    assert "yellow" in lines("What colour is the star?")[0]
    lines("/seed 4")
    assert lines("/draw Draw a large blue star.")[0] == "[picture-2.png, seed 4]\n"
    first, second = (Image.open(tmp_path / f"picture{n}.png") for n in ("", "-2"))
    assert first.tobytes() == second.tobytes() and first.size == (36, 36)
    out, _ = lines("/both Draw a blue star, then say what it is.")
    assert out.startswith("[picture-3.png, seed 5]\nA ") and out.endswith(".\n")
    assert "document.html" in lines("/save story")[1]
    assert len(list((tmp_path / "story").glob("*.png"))) == 5
    page = (tmp_path / "story" / "document.md").read_text()
    assert "> What do you see in this image?" in page and page.count("![picture") == 5


@pytest.mark.parametrize("line, message", [
    ("/image none.png", "none.png"),
    ("/image last", "no picture yet"),
    ("/image it's.png", "no such file (put a name with quotes or blanks into double quotes)"),
    ("/draw", "needs words"),
    ("/seed red", "give a whole number below 2^63, or the word random"),
    ("/seed random", "seed "),
    (f"/seed {2**70}", "below 2^63"),
    ("/save", "name of a folder"),
    ("/paint a star", "no command: /help"),
    ("What is this?<image>", "0 picture"),
])
def test_a_slip_is_one_line_that_says_what_to_do(lines, line, message):
    err = lines(line)[1]
    assert message in err and err.count("\n") == 1


def test_a_request_to_draw_that_is_no_command_is_answered_in_words_and_told_so(lines):
    assert lines("Draw a star.")[1].startswith("a turn is answered in words: /draw TEXT draws\n")


def test_too_little_memory_ends_a_turn_and_not_the_chat(lines, monkeypatch, capsys):
    said = iter([MemoryError(), RuntimeError("could not create a primitive"), EOFError()])

    def answer(self, line):
        raise next(said)

    terminal = lines.terminal
    monkeypatch.setattr(chat.Terminal, "answer", answer)
    monkeypatch.setattr("builtins.input", lambda _: "Hello")
    terminal.run()
    assert capsys.readouterr().err.count("the memory is not enough") == 2
    monkeypatch.undo()
    monkeypatch.setattr("builtins.input", lambda _: "/quit now")
    terminal.run()


def test_an_answer_that_begins_like_a_line_of_the_user_is_one_part(tiny, monkeypatch):
    ids = [*tiny[1].tokenizer.text_ids("> a star."), tiny[0].config.eos_token_id]
    monkeypatch.setattr(chat, "stream", lambda *_, **__: (torch.tensor([i]) for i in ids))
    talk = Conversation(*tiny)
    assert talk.parts == [] and said(talk.ask("Say it", [])) == talk.parts[1] == "> a star."


def test_an_answer_without_a_word_is_said_to_be_one(lines, monkeypatch):
    monkeypatch.setattr(chat, "stream", lambda model, *_, **__: iter([
        torch.tensor([model.config.eos_token_id])]))
    assert lines("Hello") == ("", "the answer has no words\n")


def test_the_end_of_the_context_is_said_before_it_is_met(tiny, capsys):
    terminal = chat.Terminal(Conversation(*tiny, whole=True), 0, {"max_new_tokens": 2})
    terminal.waiting = [Image.open(STAR)] * 6
    terminal.answer("What is this?")
    assert capsys.readouterr().err == ""
    terminal.waiting = [Image.open(STAR)] * 3
    terminal.answer("What is this?")
    assert re.fullmatch(r"\d+ of 1024 tokens are left, .* takes 83: /reset begins anew\n",
                        capsys.readouterr().err)


# --------------------------------------------------------------------------------- a terminal


class Session:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.file, theirs = pty.openpty()
        command = [sys.executable, str(ROOT / "generate.py"), "--chat", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
            preexec_fn=lambda: os.login_tty(0),  # so that Ctrl-C is its own
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"})
        os.close(theirs)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """Reads until the pattern comes -> all that came since the last call, with it."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.file, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    return self.seen
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text.replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_lines_are_edited_and_ctrl_c_ends_an_answer_alone(untrained_folder, tmp_path):
    session = Session("--model", str(untrained_folder), "--temperature", "9", cwd=tmp_path)
    session.until("> ")
    full, cut = [], []
    for answer in (full, cut):
        session.type("/reset\n/seed 1\n")
        session.until("/seed 1\r\n> ")
        session.type("abX\x7fc\n")  # the last letter is rubbed out
        session.until("\n")
        if answer is cut:
            answer.append(session.until("."))
            session.type("\x03")
        answer.append(session.until(r"\n> $"))
    assert 0 < len("".join(cut)) < len("".join(full))
    time.sleep(0.3)  # Python misses a signal between the prompt and the wait for a key
    session.type("\x03")  # at the prompt: a new line
    session.until("> ")
    session.type("/save kept\n")
    session.until("document.html")
    assert "> abc" in (tmp_path / "kept" / "document.md").read_text()
    session.type("/quit\n")
    assert session.process.wait(60) == 0
    os.close(session.file)


def test_lines_may_come_from_a_file_and_other_options_are_refused(untrained_folder, tmp_path):
    command = [sys.executable, str(ROOT / "generate.py"), "--chat", "--device", "cpu", "--model",
               str(untrained_folder)]
    run = subprocess.run([*command, "--max-new-tokens", "3"], cwd=tmp_path, text=True,
                         input=f"/image {SHAPES}\na\n/nothing\n", capture_output=True)
    assert run.returncode == 0 and run.stdout.count("\n") >= 1 and "> " not in run.stdout
    assert "/nothing is no command" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--chat", "--prompt", "a"], "--explain, not for --chat: leave --prompt out"),
    (["--context", "last", "--prompt", "a"], "--context is for --demo, --chat, not for --mode"),
])
def test_options_that_do_not_go_together_are_one_line(arguments, message, capsys):
    assert module.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_two_conversations_share_a_model(tiny):
    alone = Conversation(*tiny, whole=True)
    expected = [said(alone.ask(text, [])) for text in ("Hello", "What can you do?")]
    both = [Conversation(*tiny, whole=True) for _ in range(2)]
    for text, wanted in zip(("Hello", "What can you do?"), expected):
        for talk in both:
            assert said(talk.ask(text, [])) == wanted
    assert torch.equal(both[0].cache.ids, both[1].cache.ids)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device", "picture.png"),
    OSError("picture.png cannot be written, is the disk full?")])
def test_a_picture_that_cannot_be_saved_does_not_end_the_chat(lines, monkeypatch, capsys, error):
    def full(*_):
        raise error

    monkeypatch.setattr(chat, "save_picture", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw Draw a star.\n/help\n"))
    lines.terminal.run()
    out, err = capsys.readouterr()
    assert "picture.png" in err and out.endswith(chat.HELP + "\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
@pytest.mark.parametrize("where, message", [
    (">/dev/full", "No space left on device"), ("<&-", "standard input, which is closed"),
])
def test_a_chat_that_cannot_read_or_write_ends(where, message):
    command = f"printf 'hi\\nhi\\n' | {sys.executable} generate.py --chat --device cpu {where}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") < 9
    assert "Traceback" not in done.stderr


def test_a_chat_whose_reader_has_gone_ends():
    command = f"yes hi | {sys.executable} generate.py --chat --max-new-tokens 4 | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.count("\n") == 1 and "Errno" not in done.stderr


def test_a_drawing_never_replaces_one_that_another_chat_made_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = chat.Terminal.__new__(chat.Terminal)
    monkeypatch.setattr(chat, "save_picture", lambda picture, path: path.write_text(picture))
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # looked before the other made it
    assert [str(terminal.keep(word)) for word in "ab"] == ["picture.png", "picture-2.png"]
    assert (tmp_path / "picture.png").read_text() == "a"
    (tmp_path / "picture.png").unlink()
    monkeypatch.setattr(chat, "save_picture", lambda picture, path: Path("no/where").touch())
    with pytest.raises(OSError):
        terminal.keep("c")
    assert not (tmp_path / "picture.png").exists()  # no empty file


def test_the_last_picture_again_is_the_same_picture(lines, tmp_path):
    lines(f"/image {SHAPES}")
    for _ in range(3):
        lines("What do you see?")
        lines("/image last")
    lines("/save story")
    assert len({file.read_bytes() for file in (tmp_path / "story").glob("*.png")}) == 1


@pytest.fixture
def silent(lines, monkeypatch):
    """As `lines`, but no answer has a word; no weights are used for it."""
    monkeypatch.setattr(chat, "stream", lambda model, *_, **__: iter([
        torch.tensor([model.config.eos_token_id])]))
    return lines


def test_reset_forgets_all_that_was_said_and_shown(silent):
    silent(f"/image {SHAPES}")
    silent("What is this?")
    silent(f"/image {STAR}")
    talk = silent.terminal.conversation
    new, cache = Conversation(talk.model, talk.processor, whole=False), talk.cache
    silent("/reset")
    assert silent.terminal.waiting == [] and talk.cache is not cache
    for name in ("ids", "start", "pictures", "seen", "parts"):
        assert getattr(talk, name) == getattr(new, name)
    assert "no picture yet" in silent("/image last")[1]
    assert "a conversation" in silent("/save story")[1]


def test_pictures_alone_are_a_turn_and_so_is_a_line_about_a_path(silent):
    parts = silent.terminal.conversation.parts
    for line in ("", "/draw", "/both"):
        silent(f"/image {SHAPES} {STAR}")
        silent(line)
        assert silent.terminal.conversation.seen is not None and silent.terminal.waiting == []
    silent("/usr/bin is what?")
    silent(" ")
    silent(f"/image {SHAPES}")
    seed = silent.terminal.seed
    assert "2 <image>" in silent("What are these?<image><image>")[1]  # refused: nothing is lost
    assert len(silent.terminal.waiting) == 1 and silent.terminal.seed == seed
    assert [part for part in parts if isinstance(part, str)] == ["> "] * 3 + ["> /usr/bin is what?"]


def test_a_picture_may_have_blanks_in_its_name_or_lie_at_home(silent, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name, colour in (("my picture.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / name)
    assert silent("/image my picture.png")[1] == "1 picture(s) for the next turn\n"
    assert silent('/image "my picture.png" ~/b.png')[1] == "3 picture(s) for the next turn\n"
    assert silent("/image")[1] == "0 picture(s) for the next turn\n"  # takes them back
    silent("/image ~/b.png")
    silent("What do you see?")
    silent("/image last")
    assert silent.terminal.waiting[0].getpixel((0, 0)) == (0, 0, 255)
    silent("/save ~/story")
    assert (tmp_path / "story" / "document.html").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.png").write_text("mine")
    assert silent("/save mine")[1].count("\n") == 1
    assert (tmp_path / "mine" / "1.png").read_text() == "mine"


def test_a_drawing_is_the_last_picture_and_a_new_question_sees_its_own_alone(tiny, monkeypatch):
    talk, names = Conversation(*tiny, whole=False), tiny[1].tokenizer.vocabulary
    drawing = [names.begin_image_id, *[int(names.code_to_id[5])] * 81, names.end_image_id]
    prompts = []

    def first_drawn(model, ids, **_):
        prompts.append(ids[0].tolist())
        return (torch.tensor([i]) for i in (drawing if len(prompts) == 1 else [900]))

    monkeypatch.setattr(chat, "stream", first_drawn)
    said(talk.ask("", [Image.open(STAR)]))
    assert talk.seen.size == (36, 36) and talk.pictures == drawing  # not the star
    for _ in range(2):
        said(talk.ask("What is this?", []))
    said(talk.ask("What is this?", [Image.open(STAR)]))
    said(talk.ask("Draw a star.", [], mode="image"))
    assert talk.room() == (1024, 1024)
    assert [prompt.count(names.begin_image_id) for prompt in prompts] == [1, 1, 1, 1, 0]
    assert all(prompt[1 : 1 + len(drawing)] == drawing for prompt in prompts[1:3])


def test_ctrl_c_ends_an_answer_and_other_signals_the_program(monkeypatch, signals):
    ran = []
    monkeypatch.setattr(chat.Terminal, "run", lambda self: ran.extend(
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)))
    with stoppable():
        chat.chat(types.SimpleNamespace(whole=True), 0, {})
    assert ran == [signal.default_int_handler, signal.SIG_DFL]


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(lines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n/help\n"), "utf-8"))
    lines.terminal.run()
    out, err = capsys.readouterr()
    assert "not valid unicode" in err and err.count("\n") == 1 and out == chat.HELP + "\n"
