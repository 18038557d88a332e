"""What several files need, and what knows nothing of the model: the command line's errors, files
that are written whole or not at all, devices, processes, and tensors that still lie on disk.

Who needs it: whoever reads another file of this folder, or train.py. It imports none of them.
"""

import argparse
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I8": torch.int8, "U8": torch.uint8}

# ---------------------------------------------------------------------------------------------
# The command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def exit_code(command: str, run: Callable[[], None], stopped: str = "interrupted") -> int:
    """Runs it -> 0; 2 and one line for input that cannot work; 130 when interrupted."""
    try:
        run()
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that exit stays quiet
    except (ValueError, OSError) as e:
        print(f"{command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------------------------------
# Files, devices, processes


def write_atomically(path: Path, write: Callable[[Path], None], keep: bool = True) -> None:
    """A reader sees the old file or the whole new one, never half of it. keep=False: only a try."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it too
    try:
        write(part)
        if keep:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def pick_device(name: str | torch.device) -> torch.device:
    """A device by its name, "auto" being the fastest there is; ValueError if it is not there."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"the device {name} is none of cpu, cuda, mps")
        torch.empty(0, device=device)
        return torch.device("cpu") if device.type == "cpu" else device  # files know no cpu:0
    except (RuntimeError, AssertionError, TypeError) as e:
        reason = str(e).splitlines()[0].split(". ")[0]
        raise ValueError(f"the device {name} cannot be used here: {reason}") from None


def ranks() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def writes() -> bool:
    """Is this the process that writes the files? All of them make the same."""
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------------------------------------
# Tensors on disk


class Stored(NamedTuple):
    """A tensor that still lies on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def copied(self) -> "Stored":
        """The same, read into memory of its own. There it begins at a multiple of 64 bytes, as
        kernels for packed weights need it, wherever it lies in its file.
        """
        return self._replace(read=lambda: self.read().clone())


def open_safetensors(path: Path, device: str | torch.device, apart: bool = False
                     ) -> dict[str, Stored]:
    """-> {name: tensor on disk}; reads the header only.

    The file stays mapped as long as one of its tensors is used. `apart` maps it anew for each
    tensor, so that memory gets the pages of one back before the next is read.
    """
    from safetensors import SafetensorError, safe_open

    def read_apart(name: str) -> Tensor:
        with safe_open(path, framework="pt", device=str(device)) as again:
            return again.get_tensor(name)

    try:
        file, tensors = safe_open(path, framework="pt", device=str(device)), {}
        for name in file.keys():  # noqa: SIM118, it is no dict
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} is {header.get_dtype()}, which is none of "
                                 f"{', '.join(DTYPES)}: weights quantized elsewhere are not read")
            shape, dtype = tuple(header.get_shape()), DTYPES[header.get_dtype()]
            read = partial(read_apart if apart else file.get_tensor, name)
            tensors[name] = Stored(shape, dtype, read)
        return tensors
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): "
                         "download it again") from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth or .ckpt -> {name: tensor, memory-mapped}. ValueError if it is broken or more.

    A pickle is a program. weights_only runs the part of it that builds tensors and nothing else.
    """
    try:
        with open(path, "rb") as file:
            starts_as_zip = file.read(2) == b"PK"  # before torch 1.6: no zip, and no mmap
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=starts_as_zip)
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except (IsADirectoryError, PermissionError) as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError, TypeError, ValueError,
            pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError(f"{path} is truncated, or holds more than tensors: "
                         "download it again") from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no tensors by name: it is no checkpoint")
    return {name: tensor for name, tensor in data.items() if isinstance(tensor, Tensor)}
