"""Many prompts from a file: the answers, where a stopped run goes on, and files that are wrong."""

import json
import shutil
from functools import partial

import pytest
from PIL import Image

from chameleon_extras import prompts
from chameleon_extras.files import hold
from chameleon_extras.prompts import read_prompts
from processor import ChameleonProcessor
from tiny_world.documents import read_examples
from tokenizer import read_json


@pytest.fixture
def run(run, tmp_path):
    """Runs the command in a folder with two files of prompts -> exit code, stdout, stderr."""
    Image.new("RGB", (1, 500_000), "red").save(tmp_path / "long.png")
    lines = [{"prompt": "What?", "images": ["red.png"]}, {"prompt": "a\u2028b"},
             {"prompt": "<image>or<image>", "images": ["red.png", "red.png"]},
             {"prompt": "Hi", "answer": "not read"}, {"prompt": "Hello"}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "asked.txt").write_text("a\n\nabc\n")
    return partial(run, "--max-new-tokens", "6", "--prompts")


def test_each_prompt_gets_a_line_whatever_the_batch(run):
    hot = ("--temperature", "3", "--seed", "5")
    code, out, err = run("asked.jsonl", *hot)
    lines = [json.loads(line) for line in out.split("\n")[:-1]]  # one has U+2028
    assert code == 0 and err == "" and len(lines) == 5
    assert lines[0]["prompt"] == "<image>What?" and lines[0]["images"] == ["red.png"]
    for size in ("1", "2"):
        assert run("asked.jsonl", "--batch", size, *hot)[1] == out
    assert run("asked.txt", "--completion")[1] != run("asked.txt")[1]
    answers = [json.loads(line) for line in run("asked.txt")[1].splitlines()]
    assert [answer["prompt"] for answer in answers] == ["a", "abc"]


def test_a_file_of_json_that_is_not_of_lines_is_refused(run, tmp_path):
    (tmp_path / "asked.jsonl").rename(tmp_path / "asked.json")
    code, out, err = run("asked.json")
    assert code == 2 and out == "" and "name it .jsonl" in err and err.count("\n") == 1


def test_a_long_prompt_does_not_shorten_the_answers_of_others(run, tmp_path, untrained_folder):
    processor = ChameleonProcessor.from_pretrained(untrained_folder)
    context = read_json(untrained_folder / "config.json")["max_position_embeddings"]
    long = next("a " * n for n in range(context) if len(
        processor.prompt_ids("a " * n, False)) >= context - 2)
    (tmp_path / "asked.txt").write_text(f"{long}\nHi\n")
    both = run("asked.txt", "--temperature", "3")[1]
    assert len(both.splitlines()) == 2
    assert both == run("asked.txt", "--batch", "1", "--temperature", "3")[1]


def test_a_stopped_run_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    assert run("asked.jsonl", "--out", "whole.jsonl")[2] == "whole.jsonl: 5 answer(s)\n"
    whole, calls, generate = (tmp_path / "whole.jsonl").read_bytes(), [], prompts.generate

    def stopped(*arguments, **options):
        calls.append(len(options["input_ids"]))
        if len(calls) == 3:
            assert (tmp_path / "part.jsonl").read_bytes().count(b"\n") == 2  # on disk at once
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(prompts, "generate", stopped)
    assert run("asked.jsonl", "--batch", "1", "--out", "part.jsonl")[0] == 130
    part = tmp_path / "part.jsonl"
    assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    part.write_bytes(whole[: len(part.read_bytes()) + 9])  # cut short inside the third line
    code, _, err = run("asked.jsonl", "--batch", "1", "--out", "part.jsonl")
    assert code == 0 and part.read_bytes() == whole and len(calls) == 3 + 3
    assert "5 answer(s), 2 of them from before" in err
    part.write_bytes(whole[:-1])  # an editor has taken the last end of line
    told = run("asked.jsonl", "--out", "part.jsonl")[2]
    assert "5 of them from before, with that run's options" in told
    assert part.read_bytes() == whole


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "a.jsonl line 2: 'prompt' must be"),
    ("a.jsonl", '{"prompt": "a", "image": []}', "line 1: unknown key 'image'"),
    ("a.jsonl", "[]", "line 1: a line must be an object"),
    ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: broken JSON (a key stands there twice)"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "images": ["long.png"]}',
     "line 2: a picture of 1 x 500000 pixels is too long"),
    ("a.jsonl", "{", "line 1: broken JSON"),
    ("a.jsonl", '{"prompt": "a", "images": "b.png"}', "line 1: 'images' must be"),
    ("a.jsonl", '{"prompt": "a", "images": ["b.png"]}', "line 1: picture 'b.png'"),
    ("a.jsonl", '{"prompt": "<image>"}', "line 1: 1 <image> but 0 picture"),
    ("a.jsonl", '{"prompt": "<image>a", "images": ["red.png", "red.png"]}',
     "line 1: 1 <image> but 2 picture"),
    ("a.txt", "a\nWhat is this?<image>", "line 2: 1 <image> but 0 picture"),
    ("a.txt", "a\n" + "b" * 3000, "line 2: the prompt has"),
    ("a.txt", "\n\n", "is empty"),
    ("none.txt", None, "none.txt is no file"),
])
def test_a_wrong_file_is_one_line_before_the_weights_are_read(
        run, tmp_path, monkeypatch, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(prompts, "load_model", None)
    code, out, err = run(name)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("options, message", [
    (("--batch", "0"), "1 to 1024"),
    (("--seed", str(2**63 - 1), "--batch", "1"), "row b adds b: take a smaller one"),
    (("--mode", "image"), "interleaved, not for --prompts: leave --mode out"),
    (("--out", "missing/a.jsonl"), "the folder missing of a.jsonl does not exist"),
    (("--out", "other.jsonl"), "line 1 is not prompt 1"),
    (("--out", "/dev/null"), "/dev/null is a folder or a device"),
    (("--out", "deep.jsonl"), "line 1 is not prompt 1"),
])
def test_options_that_cannot_work_are_one_line(run, tmp_path, options, message):
    (tmp_path / "other.jsonl").write_text('{"prompt": "b", "answer": "c"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    code, out, err = run("asked.txt", *options)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert (tmp_path / "other.jsonl").read_text() == '{"prompt": "b", "answer": "c"}\n'


def test_the_file_of_the_prompts_is_no_place_for_the_answers(run, tmp_path):
    content = '{"prompt": "a", "answer": "one to learn from"}\n'
    (tmp_path / "both.jsonl").write_text(content)
    code, _, err = run("both.jsonl", "--out", "both.jsonl")
    assert code == 2 and "both.jsonl is the file of the prompts" in err and err.count("\n") == 1
    assert (tmp_path / "both.jsonl").read_text() == content


def test_two_never_write_one_file(run, tmp_path):
    (tmp_path / "both.jsonl").touch()
    with hold(tmp_path / "both.jsonl"):
        code, out, err = run("asked.txt", "--out", "both.jsonl")
    assert code == 2 and "another process writes to both.jsonl" in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [
    b"my note", b"[1]\n", b'{"prompt": "other", "ans', b'{"prompt": "\xc3',
    b'{"prompt": "a", "answer": "cut\nmy note'])
def test_a_file_of_something_else_stays_as_it_is(run, tmp_path, content):
    (tmp_path / "note.txt").write_bytes(content)
    code, _, err = run("asked.txt", "--out", "note.txt")
    assert code == 2 and "something else" in err and err.count("\n") == 1
    assert (tmp_path / "note.txt").read_bytes() == content


def test_answers_are_examples_for_training(run, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("red.png", "asked.jsonl"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    run("data/asked.jsonl", "--out", "data/answers.jsonl", "--temperature", "3")
    (tmp_path / "data" / "asked.jsonl").unlink()
    examples = read_examples(tmp_path / "data")
    assert len(examples[0].images) == 1 and "<image>" in examples[0].prompt
    assert len(read_prompts(tmp_path / "data" / "answers.jsonl")) == len(examples) == 5


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_line_survives_any_encoding(encoding):
    line = prompts.Line("here", "a \u2605 \xe9", ["caf\udce9.png"])
    text = prompts.written(line, "yes", encoding).encode(encoding)
    assert json.loads(text.decode(encoding)) == {
        "prompt": line.prompt, "images": line.images, "answer": "yes"}
    assert "\xe9" in prompts.written(line._replace(prompt="\xe9", images=[]), "yes", encoding)


def test_prompt_n_draws_with_the_seed_plus_n_wherever_it_stands(run, tmp_path):
    hot = ("--temperature", "3", "--seed")
    (tmp_path / "two.txt").write_text("a\na\n")
    (tmp_path / "one.txt").write_text("a\n")
    first, second = run("two.txt", *hot, "5")[1].splitlines()
    assert first != second == run("one.txt", *hot, "6")[1].strip()


def test_without_a_length_a_batch_has_room_for_whole_answers(run, monkeypatch):
    sizes = []

    def stopped(model, **inputs):
        sizes.append(len(inputs["input_ids"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "generate", stopped)
    code, _, err = run.func("--prompts", "asked.txt")  # the context is no longer than an answer
    assert code == 130 and "--batch 1: behind one" in err and sizes == [1]


def test_the_options_reach_the_decoder_and_what_is_answered_is_not_asked_again(run, monkeypatch):
    told = []
    monkeypatch.setattr("chameleon_extras.command.check_compile", lambda _: None)
    monkeypatch.setattr(prompts, "Decoder", lambda model, *how: told.append(how))
    assert run("asked.txt", "--compile", "--attention", "eager", "--out", "a.jsonl")[0] == 0
    assert told == [(True, "eager")]
    monkeypatch.setattr(prompts, "load_model", None)
    assert run("asked.txt", "--out", "a.jsonl")[0] == 0


def test_a_run_goes_on_wherever_its_last_line_was_cut_and_loses_nothing_else(tmp_path):
    asked, out = [prompts.Line("", "a", []), prompts.Line("", "\xe9", ["b.png"])], tmp_path / "out"
    lines = [(prompts.written(line, "an answer \u2605") + "\n").encode() for line in asked]
    whole, ends = b"".join(lines), [len(lines[0]) - 1, len(lines[0] + lines[1]) - 1]
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        done = prompts.answered(out, asked)
        assert done == sum(cut >= end for end in ends)
        assert out.read_bytes() == b"".join(lines[:done])
    out.write_bytes(whole + b"my note")
    with pytest.raises(ValueError, match="line 3 is not prompt 3"):
        prompts.answered(out, asked)
    assert out.read_bytes() == whole + b"my note"


def test_a_tokenizer_that_pads_on_the_right_changes_no_answer(run, untrained_folder, tmp_path):
    folder = shutil.copytree(untrained_folder, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(read_json(file) | {"padding_side": "right"}))
    assert run("asked.txt", model=folder)[:2] == run("asked.txt")[:2]
