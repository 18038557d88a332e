"""The page: what a visit shows, without gradio; and, marked slow, the page in a real browser."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from small import closed

import generate as module
from chameleon import ChameleonForConditionalGeneration, ChameleonProcessor
from chameleon_extras import demo
from chameleon_extras.chat import Conversation
from chameleon_extras.command import TINY
from chameleon_extras.demo import Visit, large, row, walk

ROOT = Path(module.__file__).parent
SHAPES, STAR = (str(ROOT / "examples" / f"{name}.png") for name in ("shapes", "star"))


@pytest.fixture(scope="module")
def tiny():
    return (ChameleonForConditionalGeneration.from_pretrained(TINY),
            ChameleonProcessor.from_pretrained(TINY))


def ask(visit: Visit, *turn, **options) -> list:
    """-> the number and the last of the messages, at each step."""
    return [(len(visit.messages), visit.messages[-1][1])
            for _ in visit.ask(*turn, **({"seed": 0, "image_top_p": 0.9} | options))]


def test_an_answer_streams_and_a_drawing_grows_code_by_code(tiny):
    visit = Visit(Conversation(*tiny, whole=False))
    steps = ask(visit, "What do you see?", [SHAPES], "Answer")
    assert [role for role, _ in visit.messages] == ["user", "user", "assistant"]
    answer = "A small red circle above a large blue square on a white background."
    assert steps[-1] == (3, answer) and len(steps) > 8
    assert all(answer.startswith(said) for _, said in steps[1:])
    steps = ask(visit, "Draw a large blue star.", [], "Draw")
    assert [count for count, _ in steps] == [4] + [5] * 81  # one picture, replaced as it grows
    assert all(picture.size == (216, 216) for _, picture in steps[1:])
    assert steps[1][1].tobytes() != steps[-1][1].tobytes()
    ask(visit, "Draw a blue star, then say what it is.", [], "Both")
    kinds = [type(said) for _, said in visit.messages[-3:]]
    assert kinds == [str, Image.Image, str]


def test_stop_keeps_what_is_said_and_the_conversation_goes_on(tiny):
    visit = Visit(Conversation(*tiny, whole=False))
    for n, _ in enumerate(visit.ask("What do you see?", [SHAPES], "Answer", seed=0)):
        visit.stopped = n == 3
    said = visit.messages[-1][1]
    assert 0 < len(said) < 20 and tiny[1].decode(visit.conversation.ids, True).endswith(said)
    for n, _ in enumerate(visit.ask("Draw a star.", [], "Draw", seed=0)):
        visit.stopped = n == 9
    before = len(visit.messages)
    assert ask(visit, "Hello", [], "Answer")[-1][0] == before + 2


def test_the_row_shows_every_id_by_kind_and_escapes_what_is_typed(tiny):
    talk = Conversation(*tiny)
    visit = Visit(talk)
    ask(visit, "<b>x</b> & <script>", [STAR], "Answer")
    page = row(talk)
    assert page.count('<span class="t') == len(talk.ids) + 3 and closed(page)
    assert len(re.findall(r'code" title="IMG[^"]*"></span>', page)) == 81  # narrow: no name in it
    assert "81 codes of pictures" in page
    assert "<script>" not in page and "&lt;" in page and f"{1024 - len(talk.ids)} more fit" in page


def test_the_walk_shows_each_tokens_entropy_and_where_it_looked(tiny, monkeypatch):
    visit = Visit(Conversation(*tiny, whole=False))
    assert walk(visit.conversation) == '<div class="side"></div>'
    ask(visit, "What do you see?", [SHAPES], "Answer")
    talk, page = visit.conversation, walk(visit.conversation)
    new = len(talk.ids) - talk.start
    assert page.count("<small>") == page.count("data:image/png") == new and closed(page)
    assert re.findall(r">(·circle)<small>[\d.]+<", page) == ["·circle"]
    ask(visit, "Draw a star.", [], "Draw")
    page = walk(talk)
    assert "entropy of each code" in page and closed(page)
    assert page.count("<small>") == 3  # begin-image, end-image, end of turn
    assert page.count("data:image/png") == 1 + 2  # the last two look back at the drawing
    talk.ids += talk.ids[talk.start :]
    monkeypatch.setattr(demo, "WALKED", 40)  # cuts the second drawing, which has no map then
    assert walk(talk).count("<figure>") == 1
    assert large(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_a_token_is_shown_on_the_picture_that_it_looked_at_most(tiny, monkeypatch):
    shown = []
    monkeypatch.setattr(demo, "heat_on", lambda picture, _: shown.append(picture) or picture)
    visit = Visit(Conversation(*tiny, whole=False))
    both = [STAR.replace("star", name) for name in ("first", "second")]
    ask(visit, "What do these images have in common?", both, "Answer")
    walk(visit.conversation)
    names = [tiny[1].decode([i]).strip() for i in visit.conversation.ids[visit.conversation.start:]]
    first, second = (shown[names.index(word)].tobytes() for word in ("green", "purple"))
    colours = [Image.frombytes("RGB", (216, 216), data).getpixel((108, 108))
               for data in (first, second)]
    assert colours[0][1] > 140 > colours[0][0]  # green in the middle of the first
    assert max(colours[1]) - min(colours[1]) < 12  # gray in that of the second


def test_an_answer_without_a_word_is_said_to_be_one(tiny, monkeypatch):
    monkeypatch.setattr("chameleon_extras.chat.stream", lambda model, *_, **__: iter([
        torch.tensor([model.config.eos_token_id])]))
    visit = Visit(Conversation(*tiny, whole=False))
    ask(visit, "Hello", [], "Answer")
    assert visit.messages == [("user", "Hello"), ("assistant", "(the answer has no words)")]


def test_two_visits_at_once_have_their_own_conversations(tiny):
    first, second = (Visit(Conversation(*tiny, whole=False)) for _ in range(2))
    one = first.ask("What do you see?", [SHAPES], "Answer", seed=0)
    two = second.ask("What do you see?", [STAR], "Answer", seed=0)
    for _ in zip(one, two):  # in turns, token by token
        pass
    assert "red circle" in first.messages[-1][1] and "yellow star" in second.messages[-1][1]


def test_what_is_no_picture_or_does_not_fit_is_a_message(tiny, tmp_path, monkeypatch):
    broken, visit = tmp_path / "a.png", Visit(Conversation(*tiny))
    broken.write_text("no picture")
    assert "a.png' cannot be read" in ask(visit, "What?", [str(broken)], "Answer")[-1][1]
    assert "context holds 1024" in ask(visit, "What?", [STAR] * 13, "Answer")[-1][1]
    assert "2^63" in ask(visit, "Hello", [], "Answer", seed=2**63)[-1][1]
    assert visit.conversation.parts == []

    def no_memory(*_, **__):
        raise RuntimeError("can't allocate memory: 9 bytes")

    monkeypatch.setattr("chameleon_extras.chat.stream", no_memory)
    assert "memory is not enough" in ask(visit, "Hello", [], "Answer")[-1][1]


@pytest.mark.parametrize("error", [OSError("no such device"), MemoryError()])
def test_what_stops_an_answer_is_a_message(tiny, monkeypatch, error):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr("chameleon_extras.chat.stream", stopped)
    visit = Visit(Conversation(*tiny))
    said = ask(visit, "Hello", [], "Answer")[-1][1]
    assert visit.messages[-1][0] == "assistant" and re.fullmatch(r"\(.+\)", said)


def test_a_walk_needs_no_decoder_and_a_photograph_is_shown_small(tiny, monkeypatch):
    monkeypatch.setattr(tiny[0].model.vqmodel, "decoder", None)
    codes = tiny[0].model.vocabulary.code_to_id[:81][None]
    assert demo.decoded(tiny[0], codes).getcolors() == [(216 * 216, (128, 128, 128))]
    assert large(Image.new("RGB", (4000, 2000))).size == (432, 216)


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("chameleon_extras.command.load_model", None)
    assert module.main(["--demo"]) == 2
    err = capsys.readouterr().err
    assert err == 'generate.py: --demo needs gradio: pip install -e ".[demo]"\n'
    assert module.main(["--demo", "--prompt", "a"]) == 2
    assert "not for --demo: leave --prompt out" in capsys.readouterr().err


def test_what_is_typed_is_shown_as_text_and_no_html(tiny, monkeypatch):
    """The page of the slow test below, with a gradio that only keeps what it is given."""
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    sampling = dict(temperature=0.0, guidance_text=1.0, guidance_image=1.0)
    demo.page(lambda: Conversation(*tiny, whole=False), 0, sampling)
    ask = gradio.MultimodalTextbox.return_value.submit.call_args[0][0]
    shown = [messages for _, messages, *_ in ask(
        None, {"text": "Is <s> & \"this\" here?", "files": []}, "Answer", 0, 0.0, 1.0, 1.0)][-1]
    assert shown[0] == {"role": "user", "content": 'Is &lt;s&gt; &amp; "this" here?'}


# ---------------------------------------------------------------------------- a real browser


@pytest.fixture
def browsers(tmp_path):
    """The address of a running page, and a function that opens it in a browser of its own."""
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium")
    from selenium.webdriver.chrome.service import Service

    command = [sys.executable, str(ROOT / "generate.py"), "--demo", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    address = server.stderr.readline().split(" ")[0]
    opened = []

    def open_page():
        options = webdriver.ChromeOptions()
        for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                     "disable-background-networking", "disable-component-update", "disable-sync",
                     f"user-data-dir={tempfile.mkdtemp(dir=tmp_path)}", "window-size=1280,1000"):
            options.add_argument(f"--{word}")
        options.binary_location = shutil.which("chromium")
        opened.append(webdriver.Chrome(options, Service(shutil.which("chromedriver"))))
        opened[-1].get(address)
        return Page(opened[-1])

    yield open_page
    for browser in opened:
        browser.quit()
    server.terminate()
    server.wait(20)


class Page:
    def __init__(self, browser) -> None:
        self.browser = browser
        self.until(lambda: self.all("textarea"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def until(self, holds) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.all("body")[0].text

    def ask(self, text: str, picture: str | None = None, mode: str | None = None) -> None:
        for label in self.all("label"):
            if mode and label.text.strip() == mode:
                label.click()
        if picture:
            self.all("input[type=file]")[0].send_keys(picture)
            self.until(lambda: self.all(".thumbnail-item, .thumbnails img"))
        self.all("textarea")[0].send_keys(text + "\n")

    def press(self, name: str) -> None:
        next(button for button in self.all("button") if button.text == name).click()


@pytest.mark.slow
def test_in_a_browser_one_asks_draws_stops_and_reloads(browsers):
    page, other = browsers(), browsers()
    page.ask("What do you see in this image?", SHAPES)
    page.until(lambda: "A small red circle above a large blue square" in page.text())
    page.until(lambda: len(page.all("#walk .t img")) == 15)
    assert "red circle" not in other.text()
    other.ask("What is this?", STAR)
    other.until(lambda: "A large yellow star" in other.text())
    assert "yellow star" not in page.text()
    page.ask("Draw a large blue star.", mode="Draw")
    page.until(lambda: page.all("#walk figure"))
    assert len(page.all(".chat .message img, .chat .bot img")) >= 2
    page.press("New chat")
    page.until(lambda: "red circle" not in page.text())
    page.ask("Draw a star.", mode="Draw")
    page.until(lambda: page.all(".chat img"))
    page.press("Stop")
    page.until(lambda: "ids:" in page.text())
    codes = len(page.all(".code:empty"))
    assert codes == 0  # the unfinished picture is no part of the conversation
    page.browser.refresh()
    page.until(lambda: page.all("textarea") and "ids:" not in page.text())
    page.ask("Hello", mode="Answer")
    page.until(lambda: "Show me a picture" in page.text())
    page.ask("Is <s> here?", mode="Answer")
    page.until(lambda: "Is <s> here?" in page.text())  # shown as it was typed, and no HTML
