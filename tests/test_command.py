"""The command line: everything a user can get wrong, and what is written to disk."""

import argparse
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file
from synthetic import png

import generate as module
from chameleon import ChameleonForConditionalGeneration, KVCache
from chameleon_extras import chat, command, files, sheets, stats
from chameleon_extras.decoding import ATTENTIONS
from chameleon_extras.files import hold
from chameleon_extras.quantize import quantize_model
from generate import pieces
from tokenizer import load_tokenizer


def test_text_streams_to_stdout_and_nothing_else_does(run):
    code, out, err = run("--prompt", "Hi<image>", "--image", "red.png", "--max-new-tokens", "5")
    assert code == 0 and out.endswith("\n") and len(out) > 1 and err == ""


def test_a_batch_answers_in_order_and_each_as_if_alone(run):
    prompts = ["a", "What do you see?<image>"]
    picture, limit = ("--image", "red.png"), ("--max-new-tokens", "6")
    first = run("--prompt", prompts[0], *limit)[1]
    second = run("--prompt", prompts[1], *picture, *limit)[1]
    code, out, err = run("--prompt", prompts[0], "--prompt", prompts[1], *picture, *limit)
    assert code == 0 and out == first + second and err.splitlines() == prompts


def test_completion_leaves_the_end_of_turn_out(run):
    both = [run("--prompt", "abc", "--max-new-tokens", "8", *extra)[1]
            for extra in ([], ["--completion"])]
    assert both[0] != both[1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_answer_and_draw(run, tmp_path, kind):
    code, out, _ = run("--prompt", "abc", "--quantize", kind, "--max-new-tokens", "4")
    assert code == 0 and len(out) > 1
    code, _, _ = run("--prompt", "Draw", "--quantize", kind, "--mode", "image", "--out", "q.png")
    assert code == 0 and Image.open(tmp_path / "q.png").size == (16, 16)


def test_quantized_weights_on_a_cpu_are_computed_in_bf16_unless_one_says_otherwise(
        untrained_folder, tmp_path):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    quantize_model(model, "int8").save_pretrained(tmp_path / "packed")
    for folder, words, dtype in (
            (untrained_folder, (), torch.float32),
            (untrained_folder, ("--quantize", "int8"), torch.bfloat16),
            (tmp_path / "packed", (), torch.bfloat16),
            (tmp_path / "packed", ("--dtype", "float32"), torch.float32)):
        options = ["--model", str(folder), "--device", "cpu", "--attention", "eager", *words]
        model = command.load_model(command.parse(options))
        assert model.dtype == dtype
        assert model.model.layers[-1].self_attn.attend is ATTENTIONS["eager"]


def test_a_picture_is_written_where_one_says(run, tmp_path):
    code, out, err = run("--prompt", "Draw", "--mode", "image", "--out", "a.png")
    assert code == 0 and out == "" and "a.png: 1 picture" in err
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_several_pictures_come_with_a_contact_sheet(run, tmp_path):
    code, _, _ = run("--prompt", "Draw", "--mode", "image", "--out", "a.png", "--count", "3")
    assert code == 0
    sheet = Image.open(tmp_path / "a.png").convert("RGB")
    for n in (1, 2, 3):
        single = Image.open(tmp_path / f"a-{n}.png")
        y, x = divmod(n - 1, 2)
        box = (4 + 148 * x, 4 + 148 * y)  # nine times as large as the picture's own file
        large = sheet.crop((*box, box[0] + 144, box[1] + 144))
        assert single.size == (16, 16)
        assert large.tobytes() == single.resize((144, 144), Image.NEAREST).tobytes()
    # Picture n of a batch is the one that its own seed draws alone.
    run("--prompt", "Draw", "--mode", "image", "--out", "b.png", "--seed", "1")
    assert Image.open(tmp_path / "b.png").tobytes() == Image.open(tmp_path / "a-2.png").tobytes()
    run("--prompt", "a", "--prompt", "Draw", "--mode", "image", "--out", "c.png")
    assert Image.open(tmp_path / "c-2.png").tobytes() == Image.open(tmp_path / "a-2.png").tobytes()


def test_a_picture_and_a_sheet_are_enlarged_by_a_whole_factor(run, tmp_path):
    ask = ("--prompt", "Draw", "--mode", "image")
    run(*ask, "--out", "a.png")
    assert run(*ask, "--out", "b.png", "--scale", "3")[0] == 0
    small, large = (Image.open(tmp_path / f"{name}.png") for name in "ab")
    assert large.tobytes() == small.resize((48, 48), Image.NEAREST).tobytes()
    run(*ask, "--out", "c.png", "--scale", "2", "--count", "2")
    assert Image.open(tmp_path / "c.png").size == (2 * 36 + 4, 40)
    assert Image.open(tmp_path / "c-1.png").size == (16, 16)
    for refused, why in ((("--scale", "65"), "whole factor, 1 to 64"),
                         (("--scale", "2", "--mode", "interleaved"), "leave --scale out"),
                         (("--scale", "2", "--mode", "text"), "leave --scale out")):
        code, _, err = run(*ask, *refused)
        assert code == 2 and why in err


@pytest.mark.parametrize("prompt, named", [
    ("Draw a star.", True), ("please paint a cat", True), ("Can you draw it?", True),
    ("What did she draw?", False), ("drawings", False)])
def test_a_drawing_asked_for_in_text_mode_is_told_the_mode(run, prompt, named):
    code, _, err = run("--prompt", prompt, "--max-new-tokens", "2")
    assert code == 0 and ("add --mode image" in err) == named and err.count("\n") == named
    assert run("--prompt", prompt, "--mode", "image")[2].count("\n") == 1  # the file's name


def test_help_gives_each_number_its_default_and_three_examples(capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text, examples = " ".join(capsys.readouterr().out.split()).split("three examples:")
    for group in ("what goes in:", "what comes out:", "how text is chosen:", "the model:"):
        assert group in text
    for name in ("--count", "--scale", "--max-new-tokens", "--temperature", "--top-k", "--top-p",
                 "--repetition-penalty", "--seed", "--image-temperature", "--image-top-k",
                 "--image-top-p", "--guidance-text", "--guidance-image"):
        about = re.split(r" --\S+ [NX] ", text[text.rindex(f"{name} ") :])[0]
        assert "default" in about and re.search(r"\d", about), name
    assert examples.count("python generate.py --") == 3


def test_a_document_holds_text_and_pictures_in_order(run, tmp_path):
    for seed in range(60):  # hot enough that some seed soon begins a picture
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        code, out, err = run("--prompt", "Tell", "--mode", "interleaved", "--out", "d", "--seed",
                             str(seed), "--max-new-tokens", "60", "--temperature", "30")
        assert code == 0 and "document.html" in err
        if "[d/1.png]" in out:
            break
    markdown = (tmp_path / "d" / "document.md").read_text()
    page = (tmp_path / "d" / "document.html").read_text()
    pictures = sorted((tmp_path / "d").glob("*.png"))
    assert len(pictures) == out.count(".png]") >= 1
    assert markdown.count("![picture") == page.count("data:image/png;base64") == len(pictures)
    assert page.count("<p>") <= 2 * len(pictures) + 1  # text is in one piece
    assert "color-scheme" in page and "http" not in page  # dark mode safe, self-contained


def test_the_seed_of_an_answer_and_warnings_are_lines_of_stderr(run, monkeypatch):
    told = []
    for seed in ("random", None):
        code, out, err = run("--prompt", "a", "--temperature", "9", "--quantize", "int8", "--dtype",
                             "float32", "--seed", seed or re.search("seed (\\d+)", told[0][1])[1])
        assert code == 0 and "generate.py: int8 weights save memory but no time" in err
        told.append((out, err))
    assert told[0][0] == told[1][0] and all(err.count("\n") == 2 - n for n, (_, err) in
                                            enumerate(told))
    assert command.read_seed("random") != command.read_seed("random")
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process would draw another
    with pytest.raises(ValueError, match="whole number below 2\\^63$"):
        command.read_seed("random")


def test_two_processes_never_write_one_document(run, tmp_path):
    ask = ("--prompt", "a", "--mode", "interleaved", "--out", "story")
    (tmp_path / "story").mkdir()
    with hold(tmp_path / "story"):
        code, _, err = run(*ask)
        assert code == 2 and "another process writes to story" in err
    assert run(*ask)[0] == 0 and (tmp_path / "story" / "document.html").is_file()


def test_no_document_is_written_over_another(run, tmp_path):
    ask = ("--prompt", "Tell", "--mode", "interleaved", "--max-new-tokens", "3")
    for name in ("document", "document-2", "document-3"):
        code, _, err = run(*ask)
        assert code == 0 and err.splitlines() == [
            "no picture will come: it takes 18 tokens, and only 3 may follow",
            f"{name}/document.html: seed 0"]
    first = (tmp_path / "document" / "document.html").read_bytes()
    code, out, err = run(*ask, "--out", "document", "--seed", "5")
    assert code == 2 and out == "" and "holds a document already" in err and err.count("\n") == 1
    assert (tmp_path / "document" / "document.html").read_bytes() == first


def test_a_bar_grows_with_the_picture_and_passes_every_id_on(untrained_folder, monkeypatch):
    import tqdm

    bars, Bar = [], tqdm.tqdm

    def shown(*arguments, **options):
        bars.append(Bar(*arguments, **options | dict(disable=False, file=io.StringIO())))
        return bars[-1]

    monkeypatch.setattr(tqdm, "tqdm", shown)
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    vocabulary = model.model.vocabulary
    code = int(vocabulary.code_to_id[0])
    picture = [vocabulary.begin_image_id, *[code] * 16, vocabulary.end_image_id]
    ids = [300, *picture, 301, *picture[:4]]
    passed = list(command.with_bar((torch.tensor([i]) for i in ids), model))
    assert [int(i) for i in passed] == ids
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(17, 17, True), (3, 17, True)]


def test_the_peak_of_memory_is_that_of_the_answer(monkeypatch, untrained_folder):
    monkeypatch.setattr(stats, "bandwidth", lambda device: peaks.pop() and 1e9)
    monkeypatch.setattr(stats, "peak_memory", lambda device: peaks[-1])
    peaks, model = [1e9, 2e9], ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    watch = stats.Stats(model)
    list(watch.watch(iter([torch.tensor([3])] * 3)))
    assert watch.report().endswith("peak memory 2.00 GB")  # not the 1 GB that follows


def test_a_speed_is_that_of_the_middle_step_and_its_bytes(monkeypatch, untrained_folder):
    """Of 2 rows, 4 steps of 1 us, one slow, behind a first one of 9 s; and half of them codes."""
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    monkeypatch.setattr(stats, "bandwidth", lambda device: 1e12)
    clock, watch = [0.0], stats.Stats(model)
    monkeypatch.setattr(stats.time, "perf_counter", lambda: clock[0])
    code = int(model.model.vocabulary.code_to_id[3])

    def steps():
        for seconds, first in ((9, code), (1e-6, 300), (1e-6, code), (5, 300), (1e-6, code)):
            clock[0] += seconds
            yield torch.tensor([first, 300])

    for _ in watch.watch(steps()):
        clock[0] += 100  # what its caller does with the ids is no part of a step
    cache = KVCache(model.config, 2, 64)
    cache.length = 30
    column = sum(x.nbytes for x in (*cache.k, *cache.v)) / 64
    read = (stats.step_bytes(model, 3 / 5) + column * 28) * 1e6  # 28 columns in the middle
    report = watch.report(cache)
    assert "5 steps of 2 row(s): first after 9.000 s, then 2000000.0 tokens/s (0.00 ms" in report
    assert f"reads {read / 1e9:.1f} GB/s, {read / 1e10:.0f} % of the 1000.0 GB/s" in report


@pytest.mark.parametrize("mode", ["text", "image"])
def test_stats_are_one_line_on_stderr_and_change_no_answer(run, mode):
    ask = ("--prompt", "abc", "--mode", mode, *(("--out", "a.png") if mode == "image" else ()))
    _, plain, quiet = run(*ask)
    code, out, err = run(*ask, "--stats")
    assert code == 0 and out == plain
    line = err.removeprefix(quiet)
    found = re.fullmatch(
        r"(\d+) steps of 1 row\(s\): first after ([\d.]+) s, then ([\d.]+) tokens/s "
        r"\(([\d.]+) ms a step\); reads ([\d.]+) GB/s, (\d+) % of the ([\d.]+) GB/s "
        r"measured here; peak memory ([\d.]+) GB\n", line)
    steps, first, rate, step, *_, memory = map(float, found.groups())
    assert first > 0 and abs(rate * step / 1000 - 1) < 0.1 and memory > 0.1
    assert steps == 18 if mode == "image" else steps > 1


def test_a_sheet_of_decodings_is_in_order_and_its_psnr_is_that_of_the_pixels():
    """Red and blue come back darker by 0.1 of -1..1, and one value out of reach, which is cut."""
    pixels = torch.ones(2, 3, 4, 8) * torch.tensor([1.0, -0.5, -0.5])[:, None, None]
    pixels[1] = pixels[1].flip(0)
    codes = torch.arange(16).view(2, 8)

    def decode(codes, shape):
        assert shape == (2, 4)
        decoded = pixels - 0.1
        decoded[0, 0, 0, 0] = 1.3  # as 1
        return decoded

    vq = types.SimpleNamespace(encode=lambda pixels: codes, decode=decode)
    model = types.SimpleNamespace(model=types.SimpleNamespace(vqmodel=vq), config=(
        types.SimpleNamespace(vq_config=types.SimpleNamespace(downsampling=2))))
    sheet, shape, psnr = sheets.there_and_back(model, pixels, 80)
    assert shape == (2, 4) and sheet.size == (3 * 84 + 4, 2 * 44 + 4)
    assert psnr == pytest.approx(10 * math.log10(4 / (0.01 * 191 / 192)), abs=1e-3)
    for row in range(2):
        seen, again = (sheet.getpixel((4 + 84 * x + 40, 4 + 44 * row + 30)) for x in (0, 2))
        assert max(seen) > max(again) and seen.index(max(seen)) == 2 * row
        for n in range(8):  # 20 pixels a side
            y, x = divmod(n, 4)
            colour = sheet.getpixel((4 + 84 + 20 * x + 2, 4 + 44 * row + 20 * y + 2))
            assert colour == ImageColor.getrgb(sheets.code_colour(8 * row + n))


@pytest.mark.parametrize("name, pictures, side, columns, fits", [
    ("a.webp", 9, 5455, None, True), ("a.webp", 9, 5458, None, False),
    ("a.jpg", 255, 252, 1, True), ("a.JPG", 256, 252, 1, False), ("a.png", 4, 11180, None, True),
    ("a.png", 4, 11181, None, False)])
def test_a_sheet_is_refused_before_it_is_drawn_if_its_file_cannot_hold_it(name, pictures, side,
                                                                         columns, fits):
    with nullcontext() if fits else pytest.raises(ValueError, match="would"):
        sheets.check_sheet(Path(name), pictures, side, columns)


def test_marks_of_html_in_an_answer_are_text_on_its_page(tmp_path):
    sheets.write_document(tmp_path / "a", ["<b>1 & 2</b>"])
    assert "<p>&lt;b&gt;1 &amp; 2&lt;/b&gt;</p>" in (tmp_path / "a" / "document.html").read_text()


def test_a_picture_goes_through_the_vqvae_and_back(run, tmp_path, untrained_folder):
    code, _, err = run("--reconstruct", "--image", "red.png", "--out", "r.png")
    assert code == 0 and "4 x 4 codes each, PSNR" in err
    assert Image.open(tmp_path / "r.png").size == (3 * 516 + 4, 520)
    wide = shutil.copytree(untrained_folder, tmp_path / "wide") / "preprocessor_config.json"
    values = json.loads(wide.read_text()) | {"crop_size": {"height": 8, "width": 16}}
    wide.write_text(json.dumps(values))
    code, _, err = run("--reconstruct", "--image", "red.png", model=wide.parent)
    assert code == 0 and "2 x 4 codes each, PSNR" in err


@pytest.mark.parametrize("words", [("--prompt", "Hi"), ("--prompts", "asked.jsonl"), ("--chat",),
                                   ("--prompt", "Draw", "--mode", "image"),
                                   ("--prompt", "Hi", "--image", "red.png")])
@pytest.mark.parametrize("file, change, message", [
    ("config.json", {"vocabulary_map": {}}, "lacks image tokens"),
    ("processor_config.json", {"image_seq_length": 15}, "image_seq_length of the processor is 15"),
    ("processor_config.json", {"image_seq_length": 1024}, "image_seq_length of the processor is 1"),
    ("config.json", {"vocabulary_map": {}, "vocab_size": 9}, "take both from one folder"),
    ("config.json", {"vocabulary_map": {"<s>": 5}}, "<s> is 0 in the tokenizer and 5"),
    ("preprocessor_config.json", {"crop_size": {"height": 8, "width": 32}}, "are 2 x 8 codes"),
])
def test_files_that_do_not_fit_each_other_are_refused_before_weights_are_read(
        run, tmp_path, untrained_folder, monkeypatch, words, file, change, message):
    folder = Path(shutil.copytree(untrained_folder, tmp_path / "other"))
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Hi"}\n')
    monkeypatch.setattr(command, "load_checkpoint", None)
    code, out, err = run(*words, model=folder)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("error, known", [
    (MemoryError(), True), (RuntimeError("not enough memory: you tried"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), True), (RuntimeError("other"), False)])
def test_too_little_memory_is_one_line(run, monkeypatch, capsys, error, known):
    def load(*_):
        raise error

    monkeypatch.setattr(command, "load_checkpoint", load)
    if known:
        code, _, err = run("--prompt", "a")
        assert code == 2 and "memory is not enough" in err and err.count("\n") == 1
    else:
        with pytest.raises(RuntimeError, match="other"):
            run("--prompt", "a")


@pytest.mark.parametrize("reason", ["No working C++ compiler", "omp.h: No such file"])
def test_a_compiler_that_fails_is_one_line(run, monkeypatch, reason):
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    def load(*_):
        raise InvalidCxxCompiler if reason[0] == "N" else CppCompileError(
            ["g++", "-I" * 400], f"In file included:\na.cpp:1:10: fatal error: {reason}\n | here")

    monkeypatch.setattr(command, "load_checkpoint", load)
    code, _, err = run("--prompt", "a")
    assert code == 2 and err.count("\n") == 1
    assert "torch.compile failed, leave --compile out (" in err and reason in err


def test_singles_that_another_process_has_made_meanwhile_are_kept(tmp_path):
    options = argparse.Namespace(out=tmp_path / "a.png", count=2, prompt=["x"], given=["out"])
    (tmp_path / "a.png").touch()  # the sheet at --out may be replaced
    command.choose_name(options)
    assert options.out == tmp_path / "a.png"
    (tmp_path / "a-2.png").touch()
    command.choose_name(options)
    assert options.out == tmp_path / "a-3.png"


@pytest.mark.parametrize("count", [1, 3])
def test_processes_that_end_at_one_time_take_different_names(tmp_path, monkeypatch, count):
    one, two = (argparse.Namespace(out=tmp_path / "p.png", count=count, prompt=["x"], given=[])
                for _ in range(2))
    command.choose_name(one)
    unseen, exists = iter([False] * (count + (count > 1))), os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: next(unseen, exists(path)))
    command.choose_name(two)
    assert (one.out.name, two.out.name) == ("p.png", "p-2.png")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png", "p-2.png"]  # the sheets


def test_of_several_ranks_the_one_that_saves_takes_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "own_rank", lambda: 1)
    options = argparse.Namespace(out=tmp_path / "p.png", count=1, prompt=["x"], given=[])
    command.choose_name(options)
    assert options.out.name == "p.png" and not options.out.exists()


def test_a_document_that_cannot_be_written_leaves_the_line_ended(run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "1.png")

    monkeypatch.setattr(command, "write_document", full)
    code, out, err = run("--prompt", "a", "--mode", "interleaved", "--max-new-tokens", "9",
                         "--out", str(tmp_path / "story"))
    assert code == 2 and out.endswith("\n") and "1.png: No space left on device" in err
    assert not (tmp_path / "story").exists()


def interrupted(steps, after: int):
    yield from itertools.islice(steps, after)
    raise KeyboardInterrupt


@pytest.mark.parametrize("after, drawn", [(0, []), (1, []), (5, [4]), (17, [16])])
def test_ctrl_c_hands_over_what_is_done_and_goes_on_up(untrained_folder, after, drawn):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    tokenizer = load_tokenizer(untrained_folder)
    steps = module.stream(model, torch.tensor([[0, 300]]), mode="image")
    made = []
    with pytest.raises(KeyboardInterrupt):
        for piece in pieces(model, tokenizer, interrupted(steps, after)):
            made.append(piece)
    assert [piece.drawn for piece in made] == drawn
    assert all(piece.image.size == (16, 16) for piece in made)


def test_ctrl_c_while_a_picture_is_decoded_does_not_lose_it(untrained_folder, monkeypatch):
    def interrupted_once(*arguments):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "decode_pictures", interrupted_once)
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    steps = module.stream(model, torch.tensor([[0, 300]]), mode="image")
    made = pieces(model, load_tokenizer(untrained_folder), steps)
    assert next(made).drawn == 16
    with pytest.raises(KeyboardInterrupt):
        next(made)


def test_ctrl_c_on_the_command_saves_the_partial_picture_and_exits_130(run, tmp_path, monkeypatch):
    stream = module.stream
    monkeypatch.setattr(command, "stream", lambda *a, **o: interrupted(stream(*a, **o), 9))
    code, _, err = run("--prompt", "Draw", "--mode", "image", "--out", "a.png")
    assert code == 130 and Image.open(tmp_path / "a.png").size == (16, 16)


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_the_lines_of_text_and_writes_nothing_empty(run, tmp_path, monkeypatch, after):
    stream = module.stream
    monkeypatch.setattr(command, "stream", lambda *a, **o: interrupted(stream(*a, **o), after))
    for words, lines in (("a",), 1), (("a", "--prompt", "abc"), 2 if after else 0):
        code, out, _ = run("--prompt", *words)
        assert code == 130 and out.count("\n") == lines
    for mode in ("image", "interleaved"):
        assert run("--prompt", "a", "--mode", mode)[0] == 130
    assert len(list(tmp_path.iterdir())) == (3 if after else 1)  # red.png alone


def test_partial_pictures_come_every_so_many_codes(untrained_folder):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    tokenizer = load_tokenizer(untrained_folder)
    steps = module.stream(model, torch.tensor([[0, 300]]), mode="image")
    assert [p.drawn for p in pieces(model, tokenizer, steps, every=6)] == [6, 12, 16]


def test_streamed_text_equals_the_text_of_all_ids(untrained_folder):
    model = ChameleonForConditionalGeneration.from_pretrained(untrained_folder)
    tokenizer = load_tokenizer(untrained_folder)
    options = dict(max_new_tokens=40, do_sample=True, temperature=3.0, eos_token_id=[])
    steps = list(module.stream(model, torch.tensor([[0, 300]]), **options))
    streamed = "".join(p.text for p in pieces(model, tokenizer, iter(steps)))
    assert streamed == tokenizer.decode([int(i) for i in steps], skip_special_tokens=True)


# ------------------------------------------------------------------------------------- bad input


def write_broken_pictures(folder):
    (folder / "text.png").write_text("this is no picture")
    (folder / "folder.png").mkdir()
    whole = (folder / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bomb.png").write_bytes(png(20_000, 20_000))
    os.mkfifo(folder / "pipe.png")
    (folder / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")


ASK = ("--prompt", "What is this?<image>", "--image")
BAD = {
    "missing picture": ((*ASK, "nowhere.png"), "nowhere.png"),
    "text file as picture": ((*ASK, "text.png"), "text.png"),
    "folder as picture": ((*ASK, "folder.png"), "folder.png"),
    "truncated picture": ((*ASK, "cut.png"), "cut.png"),
    "decompression bomb": ((*ASK, "bomb.png"), "too large"),
    "one picture too many": ((*ASK, "red.png", "--image", "red.png"), "1 <image> but 2"),
    "one picture too few": (("--prompt", "a<image>"), "1 <image> but 0"),
    "empty prompt": (("--prompt", ""), "empty"),
    "no prompt": ((), "--prompt"),
    "prompt too long": (("--prompt", "abc " * 2000), "context holds 256"),
    "no room for a picture": (("--prompt", "q" * 240, "--mode", "image"), "a picture takes 18"),
    "negative temperature": (("--prompt", "a", "--temperature", "-1"), "temperature must be"),
    "top-p 0": (("--prompt", "a", "--top-p", "0"), "top_p must be"),
    "negative top-k": (("--prompt", "a", "--top-k", "-2"), "top_k must be"),
    "no new tokens": (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens must be"),
    "unknown device": (("--prompt", "a", "--device", "quantum"), "is none of auto, cpu"),
    "text to a picture file": (("--prompt", "a", "--out", "a.png"), "--mode image"),
    "not a picture's ending": (("--prompt", "a", "--mode", "image", "--out", "a.doc"), ".png"),
    "no folder for it": (("--prompt", "a", "--mode", "image", "--out", "no/a.png"), "does not"),
    "document onto a file": (("--prompt", "a", "--mode", "interleaved", "--out", "red.png"),
                             "is a file"),
    "a hundred thousand pictures": (("--prompt", "a", "--mode", "image", "--count", "100000"),
                                    "1 to 1000"),
    "less than no picture": (("--prompt", "a", "--mode", "image", "--count", "-1"), "1 to 1000"),
    "equal pictures": (("--prompt", "a", "--mode", "image", "--count", "3", "--image-temperature",
                        "0"), "leave --count out"),
    "a pipe as picture": ((*ASK, "pipe.png"), "a pipe"),
    "a photograph of a telephone": ((*ASK, "photo.HEIC"), "pip install pillow-heif"),
    "a seed too large for the rows": (("--prompt", "a", "--prompt", "b", "--seed", str(2**63 - 1)),
                                      "row b adds b"),
    "a sheet too large for its format": (("--prompt", "a", "--mode", "image", "--count", "400",
                                          "--scale", "64", "--out", "a.webp"), "WEBP holds 16383"),
    "a format of few colours": (("--prompt", "a", "--mode", "image", "--out", "a.gif"), ".webp"),
    "more pictures than fit": (("--prompt", "a", "--image", *["red.png"] * 99),
                               "context holds 256"),
    "a line break in a name": (("--prompt", "a", "--model", "a\nb\x1b[31m"), "no model folder a b"),
    "a wall of pictures": (("--prompt", "a", "--mode", "image", "--count", "999", "--scale", "64",
                            "--out", "a.png"), "more than 500 megapixels"),
    "count of text": (("--prompt", "a", "--count", "2"), "--mode image"),
    "reconstruct nothing": (("--reconstruct",), "--image"),
    "a kernel of another device": (("--prompt", "a", "--attention", "efficient"),
                                   "attention 'efficient' is for CUDA"),
    "a temperature that is nearly greedy": (("--prompt", "a", "--temperature", "1e-39"),
                                            "temperature must be"),
    "a seed too large": (("--prompt", "a", "--seed", str(2**63)), "below 2^63"),
    "reconstruct a document": (("--reconstruct", "--image", "red.png", "--mode", "interleaved"),
                               "leave --mode"),
    "explain to no name": (("--prompt", "a", "--explain", "--out", ""), "name --out walk.html"),
    "a seed in words": (("--prompt", "a", "--seed", "abc"), "2^63, or the word random"),
    "explain fast": (("--prompt", "a", "--explain", "--compile"), "leave --compile out"),
    "reconstruct by sampling": (("--reconstruct", "--image", "red.png", "--image-top-k", "5"),
                                "leave --image-top-k out"),
    "a scale below 0": (("--prompt", "a", "--mode", "image", "--scale", "-1"), "1 to 64"),
    "two documents": (("--prompt", "a", "--prompt", "b", "--mode", "interleaved"), "one --prompt"),
    "reconstruct in int8": (("--reconstruct", "--image", "red.png", "--quantize", "int8"),
                            "leave --quantize out"),
    "guided text": (("--prompt", "a", "--guidance-text", "3"), "leave --guidance-text out"),
    "a long picture": (("--prompt", "a", "--mode", "image", "--max-new-tokens", "9"),
                       "leave --max-new-tokens out"),
    "greedy nucleus": (("--prompt", "a", "--top-p", "0.9"), "add --temperature 1"),
    "greedy codes": (("--prompt", "a", "--mode", "image", "--image-top-k", "5",
                      "--image-temperature", "0"), "add --image-temperature 1"),
    "weak guidance": (("--prompt", "a", "--mode", "image", "--guidance-text", "-1"),
                      "guidance_text must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_any_weight_is_read(run, tmp_path, name,
                                                                         monkeypatch):
    write_broken_pictures(tmp_path)
    if name != "unknown device":
        monkeypatch.setattr(command, "load_checkpoint", lambda *_: pytest.fail("weights were read"))
    arguments, message = BAD[name]
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [
    ("--prompt", "a", "--mode", "image"), ("--prompt", "a", "--mode", "interleaved"),
    ("--reconstruct", "--image", "red.png")])
def test_weights_that_cannot_draw_are_not_read_for_a_drawing(
        run, tmp_path, untrained_folder, monkeypatch, words):
    folder = Path(shutil.copytree(untrained_folder, tmp_path / "blind"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if ".decoder." not in name},
              folder / "model.safetensors")
    monkeypatch.setattr(files.Stored, "read", lambda _: pytest.fail("weights were read"))
    code, out, err = run(*words, model=folder)
    assert code == 2 and out == "" and "no VQ-VAE decoder" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, ranks, refused", [
    ("--demo --context last --guidance-text 3", 1, None), ("--explain --completion", 1, None),
    ("--prompts a --completion", 1, None),
    ("--chat --image-top-k 5 --seed 3 --compile --attention eager", 1, None),
    ("--reconstruct --vqgan b", 2, None), ("--chat", 2, "is for one process: leave torchrun out"),
    ("--chat --demo", 1, "--chat is not for --demo: leave --chat out$"),
    ("--prompt a --batch 3", 1, "--batch is for --prompts, not for --mode text: leave"),
    ("--mode image --temperature 1", 1, "for --mode text, .*, not for --mode image: leave --temp"),
])
def test_each_command_takes_the_options_that_it_reads(words, ranks, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        command.check_unused(command.parse(words.split()))


def test_the_options_reach_what_answers(run, monkeypatch):
    given = dict(temperature=0.5, top_k=3, top_p=0.8, repetition_penalty=1.2, max_new_tokens=9,
                 image_temperature=0.7, image_top_k=4, guidance_text=3.0, guidance_image=1.2)
    words = [w for k, v in given.items() for w in ("--" + k.replace("_", "-"), str(v))]
    seen, sampling = [], given | dict(do_sample=True, image_top_p=0.9)
    monkeypatch.setattr(command, "check_compile", lambda _: seen.append("checked"))
    monkeypatch.setattr(command, "Decoder", lambda model, *told: told)
    monkeypatch.setattr(command, "stream", lambda *_, decoder, **o: seen.append((decoder,)) or [])
    monkeypatch.setattr(chat, "chat", lambda t, *told: seen.append((t.decoder, t.whole, *told)))
    for ask in (["--chat", "--context", "last", *words], ["--prompt", "a"]):
        assert run(*ask, "--compile", "--attention", "eager", "--seed", "5")[0] == 0
    how = (True, "eager")
    assert seen == ["checked", (how, False, 5, sampling), "checked", (how,)]


@pytest.mark.parametrize("mode, out, theirs, words", [
    ("image", "a.png", "a-2.png", "would replace a-2.png"),
    ("interleaved", "d", "d/2.png", "holds a document already"),
    ("image", "x" * 250 + ".png", None, "File name too long"),
    ("image", "a.xbm", None, "name it .png"),
    ("interleaved", "red.png/d", None, "red.png"),
])
def test_no_file_of_others_is_lost_and_no_drawing_for_want_of_a_place(
        run, tmp_path, monkeypatch, mode, out, theirs, words):
    monkeypatch.setattr(command, "load_checkpoint", lambda *_: pytest.fail("weights were read"))
    if theirs:
        (tmp_path / theirs).parent.mkdir(exist_ok=True)
        (tmp_path / theirs).write_bytes(b"theirs")
    count = ("--count", "3") if mode == "image" else ()
    code, _, err = run("--prompt", "Draw", "--mode", mode, "--out", out, *count)
    assert code == 2 and words in err and err.count("\n") == 1
    assert not theirs or (tmp_path / theirs).read_bytes() == b"theirs"
    assert not list(tmp_path.rglob("*.part"))


def test_trying_whether_a_place_can_be_written_leaves_nothing_there(run, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("broken weights")

    monkeypatch.setattr(command, "load_checkpoint", broken)
    before = sorted(tmp_path.iterdir())
    code, _, err = run("--prompt", "Draw", "--mode", "image", "--out", "a.png")
    assert code == 2 and "broken weights" in err and sorted(tmp_path.iterdir()) == before


def test_of_several_processes_only_the_first_writes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # alone it means nothing
    assert run("--prompt", "Draw", "--mode", "image", "--out", "alone.png")[0] == 0
    assert (tmp_path / "alone.png").is_file()
    monkeypatch.setattr("chameleon_extras.files.ranks", lambda: 2)
    before = sorted(tmp_path.iterdir())
    for mode, out in (("image", "a.png"), ("interleaved", "d")):
        short = ("--max-new-tokens", "3") if mode == "interleaved" else ()
        code, _, _ = run("--prompt", "Draw", "--mode", mode, "--out", out, *short)
        assert code == 0 and sorted(tmp_path.iterdir()) == before


def test_pictures_without_a_name_get_one_each(run, tmp_path):
    for name in ("picture.png", "picture-2.png", "picture-3.png"):
        assert run("--prompt", "Draw", "--mode", "image")[0] == 0
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("mode, names, code", [
    ("image", {"picture.png", "picture-2.png"}, 0), ("interleaved --out d", {"d"}, 2),
    ("interleaved", {"document", "document-2"}, 0)])
def test_another_process_that_writes_meanwhile_has_another_name(run, tmp_path, monkeypatch, mode,
                                                                names, code):
    def meanwhile(*arguments):
        monkeypatch.setattr(command, "load_checkpoint", load)
        assert run(*words)[0] == 0
        return load(*arguments)

    load, before = command.load_checkpoint, {path.name for path in tmp_path.iterdir()}
    words = ("--prompt", "a", "--mode", *mode.split())
    words += ("--max-new-tokens", "3") if mode != "image" else ()
    monkeypatch.setattr(command, "load_checkpoint", meanwhile)
    assert run(*words)[0] == code
    assert {path.name for path in tmp_path.iterdir()} - before == names


def test_a_second_ctrl_c_loses_no_picture(run, tmp_path, monkeypatch, signals):
    def stopped(steps):
        yield from itertools.islice(steps, 9)
        os.kill(os.getpid(), signal.SIGTERM)
        yield next(steps)

    def save(image, path):
        os.kill(os.getpid(), signal.SIGINT)
        save_picture(image, path)

    stream, save_picture = module.stream, command.save_picture
    monkeypatch.setattr(command, "stream", lambda *a, **o: stopped(stream(*a, **o)))
    monkeypatch.setattr(command, "save_picture", save)
    code, _, err = run("--prompt", "Draw", "--mode", "image", "--count", "4", "--seed", "7")
    assert code == 130 and "picture.png: 4 picture(s), seed 7" in err
    assert len(list(tmp_path.glob("picture*.png"))) == 5 and not list(tmp_path.glob("*.part"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_files_after_one_option_and_a_prompt_from_stdin(run, monkeypatch):
    asked = ("--prompt", "ab<image><image>", "--max-new-tokens", "3")
    whole = run(*asked, "--image", "red.png", "--image", "red.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab<image><image>\n"))
    assert run("--prompt", "-", *asked[2:], "--image", "red.png", "red.png") == whole
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input" in run("--prompt", "-")[2]
    assert "give a whole number below 2^63" in run("--prompt", "a", "--seed", "9" * 5000)[2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file of Linux")
def test_what_is_done_is_saved_whatever_stops_the_rest(untrained_folder, tmp_path):
    """stderr or stdout closed or full, stdout in ASCII, the reader gone."""
    python = [sys.executable, str(Path(module.__file__)), "--model", str(untrained_folder)]
    ask = [*python, "--device", "cpu", "--prompt", "a", "--max-new-tokens", "5", "--temperature",
           "9", "--seed", "1"]
    draw = ("--mode", "interleaved", "--max-new-tokens", "3")

    def start(words: str, *more: str, **options):
        return subprocess.Popen(["sh", "-c", f'exec "$@" {words}', "sh", *ask, *more], cwd=tmp_path,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                **options)

    runs = [start("2>&-", *draw, "--out", "closed"), start(">/dev/full", *draw, "--out", "full"),
            start(">&-"), start("2>/dev/full", env=os.environ | {"PYTHONIOENCODING": "ascii"})]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in runs]
    assert [code for *_, code in ended] == [0, 2, 2, 0]
    assert all((tmp_path / name / "document.html").is_file() for name in ("closed", "full"))
    assert "No space left" in ended[1][1] and "stdout is closed" in ended[2][1]
    assert "?" in ended[3][0] and not any("Traceback" in err for _, err, _ in ended)


def test_a_disk_that_cannot_be_written_is_one_line(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save_picture", full)
    code, out, err = run("--prompt", "a", "--mode", "image")
    assert code == 2 and out == "" and "No space left" in err and err.count("\n") == 1


def test_the_command_imports_no_compiler_and_a_reader_that_goes_away_is_no_error(untrained_folder):
    """Its first answer does not wait for torch._dynamo, whose import takes a second."""
    script = ("import sys, generate; code = generate.main(sys.argv[1:]); "
              "sys.exit(code or 3 * ('torch._dynamo' in sys.modules))")
    command = [sys.executable, "-c", script, "--model", str(untrained_folder), "--device", "cpu",
               "--prompt", "a", "--max-new-tokens", "60", "--temperature", "9"]
    process = subprocess.Popen(command, cwd=Path(module.__file__).parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize("file, message", [
    (None, "folder"), ("config.json", "config.json"), ("model.safetensors", "model.safetensors"),
    ("tokenizer.model", "tokenizer"),
])
def test_an_incomplete_model_folder_is_one_line(run, untrained_folder, tmp_path, file, message):
    folder = tmp_path / "model"
    if file:
        shutil.copytree(untrained_folder, folder)
        (folder / file).unlink()
    code, out, err = run("--prompt", "a", model=folder)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "a", "--tempo", "3"], "--tempo"),
    (["--prompt", "a", "--temperature", "warm"], "--temperature"),
    (["--prompt", "a", "--dtype", "int3"], "--dtype"),
])
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("prompts, count, expected", [
    (["a"], 0, ["a"]),
    (["a"], 2, ["<image><image>a"]),
    (["a", "b"], 2, ["<image>a", "<image>b"]),
    (["a<image>", "b"], 1, ["a<image>", "b"]),
])
def test_pictures_without_a_place_go_in_front(prompts, count, expected):
    assert command.place_images(prompts, count) == expected


def test_pictures_that_could_go_anywhere_are_refused():
    with pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        command.place_images(["a", "b"], 3)


def test_a_hub_id_is_a_model(untrained_folder, tmp_path, monkeypatch, capsys):
    """A cache as huggingface_hub lays it out, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    store = tmp_path / "models--org--small"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    (store / "snapshots").mkdir()
    (store / "snapshots" / ("0" * 40)).symlink_to(untrained_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert module.main(["--model", "org/small", "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert module.main(["--model", "org/other", "--prompt", "a"]) == 2
    assert "hf download org/other" in capsys.readouterr().err
