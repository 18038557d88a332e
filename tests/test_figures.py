"""tests/figures.py: the figures show what the checkpoint computes and what training logged."""

import re
import xml.etree.ElementTree as xml
from pathlib import Path

import figures
import pytest
from PIL import Image

from generate import generate
from tiny_world import evaluate

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parent.parent
CURVES = """stage,step,text_loss,image_loss,log_z,q_norm
vqvae,0,,9.0,,
pretrain,0,4.0,5.0,1.0,2.0
pretrain,20,2.0,,1.5,2.5
sft,0,1.0,3.0,1.0,3.0
sft,20,0.5,,1.0,3.5
"""


@pytest.fixture(scope="module")
def tiny():
    return evaluate.load(ROOT / "tiny")


def test_the_stream_shows_every_id_of_prompt_picture_and_answer_in_order(tiny):
    model, processor = tiny
    picture, prompt = Image.open(ROOT / "examples" / "star.png"), "What colour is the star?<image>"
    drawn = figures.token_stream(model, processor, prompt, picture)
    assert xml.fromstring(drawn).tag.endswith("svg") and "prefers-color-scheme:dark" in drawn
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    ids = generate(model, **inputs, max_new_tokens=30)[0].tolist()
    codes = model.model.get_image_tokens(inputs["pixel_values"])[0].tolist()
    place = processor.tokenizer.image_token_id
    expected = [i for i in ids if i != place]
    expected[ids.index(place) : ids.index(place)] = codes
    shown = re.findall(r'class="(?:id|code)"[^>]*>(\d+)<', drawn)
    assert [int(i) for i in shown] == expected


def test_reconstructions_and_a_growing_picture_have_their_panels(tiny):
    model, processor = tiny
    side = 240 // model.config.vq_config.resolution * model.config.vq_config.resolution
    assert figures.reconstructions(model, 2).size == (6 * (side + 4) + 4, side + 8)
    sheet = figures.growing(model, processor, "Draw a star.", pictures=3)
    assert sheet.width > 3 * sheet.height - 16


def test_drawings_stand_in_a_frame_that_tells_right_from_wrong(tiny, monkeypatch):
    sheet = figures.drawings(*tiny, count=4)
    side = 180 // tiny[0].config.vq_config.resolution * tiny[0].config.vq_config.resolution + 8
    assert sheet.size == (2 * (side + 4) + 4, 2 * (side + 44 + 4) + 4)
    frames = {sheet.getpixel((4 + x * (side + 4), 4 + y * (side + 48)))
              for x in (0, 1) for y in (0, 1)}
    green, red = (46, 139, 87), (178, 34, 34)
    assert frames <= {green, red}
    monkeypatch.setattr(figures.language, "fulfils", lambda *_: False)
    assert figures.drawings(*tiny, count=4).getpixel((4, 4)) == red


def test_stages_of_the_curves_follow_each_other(tmp_path):
    file = tmp_path / "curves.csv"
    file.write_text(CURVES)
    assert losses(file) == [(0, "4.0"), (20, "2.0"), (20, "1.0"), (40, "0.5")]  # not the VQ-VAE's
    file.write_text(CURVES + "more,0,0.4,,,\nmore,20,0.3,,,\n")  # m comes before s
    assert losses(file)[3:] == [(40, "0.5"), (40, "0.4"), (60, "0.3")]


def losses(file: Path) -> list[tuple[int, str]]:
    return [(place, line["text_loss"]) for place, line in figures.read_curves(file)]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    file = tmp_path / "curves.csv"
    file.write_text(CURVES + "sft,0,0.9,,,\nsft,20,0.4,,,\nsft,40,0.3,,,\n")
    assert losses(file) == [(0, "4.0"), (20, "2.0"), (20, "0.9"), (40, "0.4"), (60, "0.3")]


def test_curves_of_several_runs_are_one_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(CURVES)
    runs = [f"with z-loss={tmp_path / 'a.csv'}", f"without={tmp_path / 'b.csv'}"]
    assert figures.main(["tiny", "--out", str(tmp_path), "--curves", *runs]) == 0
    drawn = (tmp_path / "curves.svg").read_text()
    assert figures.GRAY in drawn and xml.fromstring(drawn).tag.endswith("svg")


@pytest.mark.parametrize("options, words", [
    (("--curves", "a=b.csv", "a=c.csv"), "the same label"),
])
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(tmp_path, capsys, options, words):
    assert figures.main(["tiny", "--out", str(tmp_path / "new"), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message and not (tmp_path / "new").exists()


def test_without_out_no_figure_of_the_repository_is_replaced():
    tracked = ("README.md", "examples", "tests", "tiny", "tiny_world", "chameleon_extras")
    assert not figures.OUT.is_absolute() and figures.OUT.parts[0] not in tracked


@pytest.mark.parametrize("content, words", [
    (None, "no curves.csv"), ("a,b\n1,2\n", "no curves.csv"),
    ("stage,step\nvqvae,0\n", "no steps"),
])
def test_a_file_without_curves_is_one_line(tmp_path, capsys, content, words):
    if content:
        (tmp_path / "x.csv").write_text(content)
    assert figures.main(["tiny", "--curves", str(tmp_path / "x.csv")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message
