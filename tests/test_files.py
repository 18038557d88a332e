"""chameleon_extras/files.py alone: signals, lines of errors, files that are written whole."""

import shutil
import signal
import sys
import types

import pytest
import torch

from chameleon import ChameleonConfig, ChameleonImageProcessor, ChameleonProcessor
from chameleon_extras import convert, files
from chameleon_extras.files import (
    Stored,
    exit_code,
    find_folder,
    hold,
    load_pickle,
    one_line,
    own_rank,
    pick_device,
    read_lines,
    say,
    stoppable,
    write_atomically,
)
from tokenizer import AutoTokenizer

STOPS = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
on_posix = pytest.mark.skipif(None in STOPS, reason="a signal that Windows has not")


@pytest.fixture
def handlers():
    """What the signals did before: a function that does nothing."""
    def nothing(*_):
        pass

    before = {number: signal.signal(number, nothing) for number in STOPS}
    yield nothing
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# The command line


@on_posix
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_the_work_and_the_next_ones_do_not_disturb_what_saves_it(handlers, number):
    with stoppable():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert all(signal.getsignal(other) is signal.SIG_IGN for other in STOPS)
    assert all(signal.getsignal(other) is handlers for other in STOPS)


@on_posix
def test_a_signal_that_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_without_stderr_a_message_goes_nowhere_and_a_full_one_is_no_error(monkeypatch, capsys):
    def fail():
        raise ValueError("wrong")

    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code("a", fail) == 2
    sys.stderr.close()
    assert capsys.readouterr().out == ""

    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=full, flush=lambda: None))
    say("a line")


def test_a_long_message_keeps_its_beginning_and_its_end():
    line = one_line("a" + "x" * 5000 + "\nz")
    assert len(line) <= 1000 and line[0] == "a" and line.endswith("x z")


# ---------------------------------------------------------------------------------------------
# Files


def test_two_processes_write_a_file_without_each_others_parts(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"

    def write(part):
        part.write_text("mine")
        monkeypatch.setattr(files.os, "getpid", lambda: 1)
        write_atomically(path, lambda other: other.write_text("of the other"))
        assert part.read_text() == "mine"

    write_atomically(path, write)
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd")])
def test_a_file_that_cannot_be_written_is_named_and_its_part_removed(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(part):
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match="a.txt"):
        write_atomically(path, fail)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_was_held_can_be_held_again(tmp_path):
    pytest.importorskip("fcntl")
    for _ in range(2):
        with hold(tmp_path), pytest.raises(ValueError, match="another process"), hold(tmp_path):
            pass


@pytest.mark.parametrize("name, content, found", [
    ("a.txt", "\ufeffHi\n \nb", [("Hi", []), ("b", [])]),
    ("a.JSONL", '\ufeff{"prompt": "a", "images": ["b.png"]}\r\n', [("a", ["b.png"])]),
])
def test_lines_may_have_a_byte_order_mark_and_any_case_of_ending(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content.encode())
    assert [(line.prompt, line.images) for line in read_lines(tmp_path / name, "prompt")] == found


@pytest.mark.parametrize("content, message", [
    (b"\xff", "a.jsonl is no text in UTF-8"),
    (b"\n" + b"[" * 100_000, "a.jsonl line 2: broken JSON"),
    (b'{"prompt": ""}', "line 1: 'prompt' must be a text that is not empty"),
    (b'{"prompt": "a", "images": [1]}', "line 1: 'images' must be a list of file names"),
])
def test_a_line_that_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_lines(tmp_path / "a.jsonl", "prompt")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Devices, processes, tensors, the hub


def test_a_device_is_one_to_compute_on_and_the_cpu_has_one_name():
    assert pick_device("cpu:0") == torch.device("cpu")
    for name in ("meta", "cuda:99", "cpu:x"):
        with pytest.raises(ValueError, match=f"the device '?{name}") as error:
            pick_device(name)
        assert "\n" not in str(error.value)


def test_a_rank_alone_is_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert own_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_rank() == 3


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_each_dtype_of_a_file_is_read(tmp_path, dtype):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3, 2).to(dtype)}, tmp_path / "a.safetensors")
    stored = files.open_tensors(tmp_path / "a.safetensors")["a"]
    assert stored[:2] == ((3, 2), dtype) and stored.nbytes == 6 * dtype.itemsize
    assert torch.equal(stored.read(), torch.ones(3, 2).to(dtype))
    assert Stored.of(stored.read())[:2] == stored[:2]


def test_a_pickle_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ValueError, match="a.ckpt cannot be read: Permission denied"):
        load_pickle(tmp_path / "a.ckpt")


def test_the_hub_is_asked_for_all_that_a_folder_needs_and_with_ones_own_options(
        monkeypatch, tmp_path):
    hub, asked = types.ModuleType("huggingface_hub"), {}
    hub.snapshot_download = lambda name, **options: asked.update(options, name=name) or tmp_path
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    own = dict(token="mine", revision="main", cache_dir="here", local_files_only=True,
               force_download=True)
    assert find_folder("org/small", **own) == tmp_path
    patterns = asked.pop("allow_patterns")
    assert asked == own | {"name": "org/small"}
    for file in ("config.json", "tokenizer.model", "model-00001-of-00002.safetensors",
                 "pytorch_model-00001-of-00002.bin", "chat_template.jinja"):
        assert any(files.Path(file).match(pattern) for pattern in patterns), file
    assert not any(files.Path("consolidated.00.pth").match(pattern) for pattern in patterns)
    shutil.copytree(files.Path(__file__).parent.parent / "tiny", tmp_path, dirs_exist_ok=True)
    for part in (ChameleonConfig, ChameleonImageProcessor, ChameleonProcessor, AutoTokenizer):
        part.from_pretrained("org/small")
        patterns = asked.pop("allow_patterns")
        assert any(files.Path("tokenizer.model").match(pattern) for pattern in patterns)
        for file in ("model.safetensors", "pytorch_model.bin"):  # they may take hours
            assert not any(files.Path(file).match(pattern) for pattern in patterns)

    def refused(*_, **__):
        raise RuntimeError("gated\nlog in")

    hub.snapshot_download = refused
    with pytest.raises(ValueError, match=r"\(gated\): log in .* or download") as error:
        find_folder("org/small")
    assert "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "small").mkdir(parents=True)
    assert find_folder("org/small") == files.Path("org/small")  # a folder comes first


def test_convert_takes_a_hub_id(monkeypatch, tmp_path):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **_: files.Path(__file__).parent.parent / "tiny"
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    asked = []
    find = lambda name: asked.append(name) or find_folder(name)  # noqa: E731
    monkeypatch.setattr(convert, "find_folder", find)
    for target in (tmp_path, tmp_path / "missing" / "new"):  # refused before the hub is asked
        assert convert.main(["org/small", str(target)]) == 2 and not asked
    assert convert.main(["org/small", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "config.json").is_file()


def test_a_pickle_may_hold_numbers_that_nobody_needs(tmp_path):
    ema = torch.tensor(3, dtype=torch.int)  # latent-diffusion's model_ema.num_updates
    torch.save({"state_dict": {"a": torch.ones(2), "num_updates": ema}}, tmp_path / "a.ckpt")
    assert torch.equal(load_pickle(tmp_path / "a.ckpt")["a"], torch.ones(2))


def test_a_pickle_of_numbers_of_8_bits_is_refused(tmp_path):
    torch.save({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="'a' is no plain tensor"):
        load_pickle(tmp_path / "a.bin")
