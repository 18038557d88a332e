"""Helpers of several files: one-line errors, files written whole, devices, ranks, tensors on disk.

Who needs it: whoever reads another file of this folder, or train.py. It knows nothing of the model.
"""

import argparse
import json
import os
import platform
import re
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I8": torch.int8, "U8": torch.uint8, "I64": torch.int64, "BOOL": torch.bool}

MAX_PICKLE = 4 * 2**20  # bytes; the pickle of 10,000 tensors has 2 MB
OLD_PICKLE = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how torch before 1.6 began a file

# ---------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {one_line(message)} (see --help)\n")


def one_line(error: object) -> str:
    """The text of an error as one line of at most 1000 characters, without control characters."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-250:]}"


def exit_code(command: str, run: Callable[[], None], stopped: str = "interrupted") -> int:
    """Calls `run` -> 0; 2 after an error of which `line_of` makes one line; 130 after Ctrl-C."""
    code, sys.stderr = 0, sys.stderr or open(os.devnull, "w")  # noqa: SIM115, closed by 2>&-
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # it may be ASCII
    if sys.platform == "win32" and hasattr(sys.stdin, "reconfigure") and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")  # as files of prompts are, not the ANSI page
    try:
        with stoppable():
            run()
            print(end="", flush=True)
    except BrokenPipeError:  # the reader of stdout has ended, as in `| head`
        pass
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        say(f"{command}: {line_of(e)}")
        code = 2
    except KeyboardInterrupt:
        say(stopped)
        code = 130
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python flushes again at exit, and would report the same error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def line_of(error: Exception) -> str:
    """The line for wrong input, a file that cannot be used, too little memory or a failed
    torch.compile. Other errors are raised again.
    """
    if isinstance(error, (ValueError, OSError)):
        return one_line(error)
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        reasons = [line for line in str(error).splitlines() if "error:" in line]  # a compiler's
        reason = one_line(reasons[0] if reasons else error)
        return f"torch.compile failed, leave --compile out ({reason:.300})"
    if not isinstance(error, MemoryError) and not re.search(
            "(out of|allocate|enough) memory|could not create a", str(error)):  # oneDNN's words
        raise error
    return "the memory is not enough: ask for less at a time, or fewer bits a weight"


def say(text: str) -> None:
    """A line to stderr. If it cannot be written there, the work goes on."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt, once (see `stop`)."""
    before = {}
    if threading.current_thread() is threading.main_thread() and ranks() == 1:
        ignored = (signal.SIG_IGN, None)  # by nohup, for one
        before = {n: signal.signal(n, stop) for n in STOPS if signal.getsignal(n) not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(*_) -> None:
    """Ends the work. What is done is saved then, and a second Ctrl-C does not disturb that."""
    ignore_stops()
    raise KeyboardInterrupt


def ignore_stops() -> None:
    """From here to the end of `stoppable`, nothing stops the program."""
    for number in STOPS:
        if signal.getsignal(number) is stop:
            signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------
# Files, devices, processes


def write_atomically(path: Path, write: Callable[[Path], object], keep: bool = True) -> None:
    """Replaces `path` by what `write` writes, at once and as a whole. keep=False only tries it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write, too
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        if keep:
            os.replace(part, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    except Exception as e:
        if type(e).__name__ not in ("RuntimeError", "SafetensorError"):  # torch's, safetensors'
            raise
        raise OSError(f"{path} cannot be written, is the disk full? ({e})") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Inside, except on Windows, no other process can hold this path. ValueError if one does."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDONLY)  # flock, unlike a file of our own, ends with the process
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to {path}: name another") from None
        yield
    finally:
        os.close(handle)


class Line(NamedTuple):
    """A prompt or an example in a file of the user."""

    where: str  # file and line
    prompt: str
    images: list  # files, as the line names them
    answer: str = ""


def read_lines(file: Path, *required: str) -> list[Line]:
    """The lines of a file that are not blank: of JSON if it is named .jsonl, else each is a prompt.

    ValueError, with file and line, for JSON that is none, or lacks a text under a `required` key.
    """
    try:
        # utf-8-sig leaves a byte order mark out. Inside a string, JSON allows characters at which
        # splitlines() would split.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    found = []
    for n, line in enumerate(lines, start=1):
        if line.strip():
            where, of_json = f"{file} line {n}", file.suffix.lower() == ".jsonl"
            try:
                values = read_line(line, required) if of_json else {"prompt": line}
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            found.append(Line(where, **{"images": [], **values}))
    return found


def read_line(text: str, required: tuple[str, ...]) -> dict:
    """A line of JSON -> some of prompt, images and answer. ValueError: see `read_lines`."""
    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    try:
        line = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or too many digits
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(line, dict):
        raise ValueError('a line must be an object like {"prompt": "...", "answer": "..."}')
    if unknown := sorted(set(line) - {"prompt", "images", "answer"}):
        raise ValueError(f"unknown key {unknown[0]!r}: the keys are prompt, images, answer")
    for key in required:
        if not isinstance(line.get(key), str) or not line[key]:
            raise ValueError(f"{key!r} must be a text that is not empty")
    images = line.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError("'images' must be a list of file names")
    return line


def fast_bf16(device: torch.device) -> bool:
    """Does the device multiply bf16 in hardware? Emulation is 6 to 24 times as slow as fp32."""
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    # In a torch without oneDNN the operator does not exist.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pick_device(name: str | torch.device) -> torch.device:
    """A name -> the device, for "auto" the fastest there is. ValueError if it cannot be used."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", str(name)):
        raise ValueError(f"the device {name!r} is none of auto, cpu, cuda, cuda:1, mps")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return torch.device("cpu") if device.type == "cpu" else device  # not cpu:0
    except (RuntimeError, AssertionError, TypeError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise ValueError(f"the device {name} cannot be used here: {reason}") from None


def ranks() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_rank() -> int:
    """The number of this process among `ranks()`. What all of them would write, rank 0 writes."""
    return int(os.environ.get("RANK", 0)) if ranks() > 1 else 0


# ---------------------------------------------------------------------------------------------
# Tensors on disk


class Stored(NamedTuple):
    """A tensor, most often not in memory yet: `read` loads it, and may join or pack it then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """Of a tensor that is memory-mapped, or in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def copied(self) -> "Stored":
        """The same tensor, but `read` gives a copy, which starts at a multiple of 64 bytes. Kernels
        for packed weights need that; a tensor of a mapped file starts anywhere.
        """
        return self._replace(read=lambda: self.read().clone())


def open_tensors(path: Path, device: str | torch.device = "cpu", apart: bool = False
                 ) -> dict[str, Stored]:
    """A file of weights -> {name: tensor on disk}. ValueError if it is broken. What does not end in
    .safetensors is a pickle.

    Of safetensors it reads the header only. The file stays mapped while one of its tensors is in
    use. With `apart`, each has its own mapping, so its memory is freed before the next one is read.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {name: Stored.of(tensor) for name, tensor in load_pickle(path).items()}
    # On Windows a mapping counts as memory, and its file cannot be replaced.
    how: dict = {"backend": "pread"} if sys.platform == "win32" else {}
    opened = partial(safe_open, path, framework="pt", device=str(device), **how)

    def read_apart(name: str) -> Tensor:
        return opened().get_tensor(name)

    try:
        file, tensors = opened(), {}
        for name in file.keys():  # noqa: SIM118, no dict
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} is {header.get_dtype()}, which is none of "
                                 f"{', '.join(DTYPES)}: weights quantized elsewhere are not read")
            read = partial(read_apart if apart else file.get_tensor, name)
            tensors[name] = Stored(tuple(header.get_shape()), DTYPES[header.get_dtype()], read)
        return tensors
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): "
                         "download it again") from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth or .ckpt -> {name: tensor, memory-mapped}. ValueError if it is broken or holds more.

    A pickle can run any code. With weights_only, torch runs only what builds tensors.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(OLD_PICKLE))
        is_zip = head.startswith(b"PK")
        if is_zip:  # the pickle in it holds names and shapes; the tensors are beside it
            with zipfile.ZipFile(path) as entries:
                size = max(e.file_size for e in entries.infolist() if e.filename.endswith(".pkl"))
        if (size > MAX_PICKLE) if is_zip else (head != OLD_PICKLE):
            raise ValueError("more than names and shapes")
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except (IsADirectoryError, PermissionError) as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except Exception:  # a broken pickle raises errors of many kinds
        raise ValueError(f"{path} is truncated, or holds more than tensors: download it again, or "
                         "save a state_dict of plain CPU tensors") from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no tensors by name: it is no checkpoint")
    tensors = {name: tensor for name, tensor in data.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        odd = tensor.is_nested or tensor.itemsize == 1 and tensor.dtype not in DTYPES.values()
        if odd or not isinstance(name, str) or tensor.layout != torch.strided or not tensor.is_cpu:
            raise ValueError(f"{path}: the tensor {name!r:.80} is no plain tensor under a name: "
                             "save a state_dict of plain CPU tensors")
    return tensors


# ---------------------------------------------------------------------------------------------
# Folders of the Hugging Face hub

HUB_OPTIONS = ("token", "cache_dir", "revision", "local_files_only", "force_download")


def find_folder(name: str | PathLike, weights: bool = True, /, **options: object) -> Path:
    """A folder, or a hub id such as "facebook/chameleon-7b" -> the folder that holds its files.

    Without `weights`, the hub is not asked for them. `options` are those of HUB_OPTIONS. ValueError
    for any other option, and for a hub id that cannot be loaded: it says how to get the folder.
    """
    if unknown := sorted(options.keys() - set(HUB_OPTIONS)):
        raise ValueError(f"from_pretrained has no option {', '.join(unknown)} here; for the hub it "
                         f"has {', '.join(HUB_OPTIONS)}")
    path, name = Path(name), Path(name).as_posix()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    by_hand = f"or download it (hf download {name} --local-dir FOLDER) and name the FOLDER"
    try:
        from huggingface_hub import snapshot_download  # here: an extra
    except ImportError:
        raise ValueError(f'no folder {name}: pip install -e ".[hub]" to load it from the hub, '
                         + by_hand) from None
    try:
        files = ["*.json", "*.model", "*.jinja", *["*.safetensors", "pytorch_model*.bin"] * weights]
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except Exception as e:  # of many kinds: no network, no token, a gated or missing repository
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{name} is no folder and could not be loaded from the hub ({reason}): "
                         f"log in (hf auth login), {by_hand}") from None
