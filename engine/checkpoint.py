"""Weights on disk: the Hugging Face layout, read and written with at most one copy in memory.

    folder/config.json -----------------> ChameleonConfig --> model on the "meta" device
    folder/model.safetensors -----------> headers: names and shapes --compare--+
        or model.safetensors.index.json                                        |
        naming model-0000i-of-0000n.safetensors                                v
                              tensors, memory-mapped --assign--> the model's parameters

The meta device gives tensors shapes but no storage, so building a 7B model costs nothing, and
whatever is wrong with the files is said before a single weight is read. Memory-mapped tensors
then BECOME the parameters (assign=True): memory never holds the checkpoint twice.

There is no table of names: parameters are called as in the files. `model.safetensors` of the 7B
model has 548 tensors; those of the VQ-VAE's decoder (model.vqmodel.decoder.*) may be absent, as
facebook/chameleon-7b was published without them. Meta's own files, and Anole's, look like such a
folder from here: engine/convert.py gives them these names.
"""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chameleon import ChameleonConfig

OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
DECODER_PREFIX = "model.vqmodel.decoder."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """A tensor that still lies on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_config(folder: Path) -> ChameleonConfig:
    """The config of a folder, Meta's or Hugging Face's; ValueError says what is wrong with it."""
    from engine.convert import find_release, open_release

    release = find_release(folder)
    if release:
        return open_release(release)[0]
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"no model folder {folder}: give a folder that holds config.json "
                         "(a checkpoint of the Hugging Face hub has to be downloaded first)")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is neither a Hugging Face model folder "
                         "nor Meta's release (models/7b beside tokenizer/)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("model_type", "chameleon") != "chameleon":
            raise ValueError("it does not describe a chameleon model")
        return ChameleonConfig.from_dict(values)
    except (TypeError, AttributeError, ValueError) as e:  # broken JSON and UTF-8 are ValueErrors
        raise ValueError(f"{path} cannot be used: {e}") from None


def checkpoint_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is broken: it has no readable weight_map") from None
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}: download the checkpoint again")
    return [folder / name for name in names]


def open_safetensors(path: Path, device: str | torch.device) -> dict[str, Stored]:
    """-> {name: tensor on disk}; reads the header only."""
    from safetensors import SafetensorError, safe_open

    try:
        file, tensors = safe_open(path, framework="pt", device=str(device)), {}
        names = file.keys()
        for name in names:
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} is {header.get_dtype()}, which is none of "
                                 f"{', '.join(DTYPES)}: quantized files are not read")
            shape, dtype = tuple(header.get_shape()), DTYPES[header.get_dtype()]
            tensors[name] = Stored(shape, dtype, partial(file.get_tensor, name))
        return tensors
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): "
                         "download it again") from None


def open_checkpoint(
    folder: Path, device: str | torch.device, vqgan: Path | None = None
) -> tuple[ChameleonConfig, dict[str, Stored]]:
    """A folder of any layout -> config, tensors under Hugging Face's names and in its order.

    `vqgan` is a file with a VQ-VAE to take instead of the folder's, see convert.py.
    """
    from engine.convert import find_release, open_release, pairs_to_halves, with_vqgan

    release = find_release(folder)
    if release:
        config, tensors = open_release(release)
    else:
        config, tensors = read_config(folder), {}
        for path in checkpoint_files(folder):
            tensors |= open_safetensors(path, device)
        tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some writers store the tied matrix twice
        tensors = pairs_to_halves(config, tensors)
    return config, with_vqgan(tensors, vqgan) if vqgan else tensors


def check_tensors(folder: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Both {name: shape}. ValueError lists what is missing, unknown or misshapen, first eight."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items() if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: the weights do not fit the config: "
                         f"{'; '.join(problems[:8])}{more}")


def pick_device(name: str | torch.device) -> torch.device:
    """A device by its name, "auto" being the fastest there is; ValueError if it is not there."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"the device {name} cannot be used here: {reason}") from None


class WithoutInit(TorchFunctionMode):
    """Inside, weights are not initialized. Meta tensors hold nothing to fill, and torch imports
    half of its compiler to find that out: two seconds before the first word.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None  # they work in place, nobody reads what they return
        return function(*args, **(kwargs or {}))


def open_model(
    cls: type, folder: Path, device: str | torch.device, vqgan: Path | None = None
) -> tuple[nn.Module, dict[str, Stored]]:
    """-> model on the "meta" device, and on disk exactly the tensors that it needs."""
    config, tensors = open_checkpoint(folder, device, vqgan)
    with torch.device("meta"), WithoutInit():
        has_decoder = any(name.startswith(DECODER_PREFIX) for name in tensors)
        model = cls(config, with_vq_decoder=has_decoder)
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}  # tied matrices once
    check_tensors(folder, wanted, {name: tensor.shape for name, tensor in tensors.items()})
    return model, tensors


def load_checkpoint(cls: type, folder: Path, dtype: torch.dtype | None, device,
                    vqgan: Path | None = None) -> nn.Module:
    model, tensors = open_model(cls, folder, device, vqgan)
    state = {}
    for name, tensor in tensors.items():
        to = torch.float32 if name.startswith("model.vqmodel.") else dtype
        state[name] = tensor.read().to(device=device, dtype=to)
    model.load_state_dict(state, strict=False, assign=True)  # checked above, so strict in effect
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """A reader sees the old file or the whole new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it too
    write(part)
    os.replace(part, path)


def save_checkpoint(model: nn.Module, folder: Path, max_shard_bytes: int) -> None:
    tensors = {name: Stored(tuple(p.shape), p.dtype, p.detach)
               for name, p in model.named_parameters()}
    write_checkpoint(folder, model.config, tensors, max_shard_bytes)


def write_checkpoint(folder: Path, config: ChameleonConfig, tensors: dict[str, Stored],
                     max_shard_bytes: int, progress: str | None = None) -> None:
    """Writes config.json, safetensors and, of several, their index; memory holds one file's.

    `progress` is the name of a bar on stderr, if one is wanted.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    shards, room = [[]], max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors.values())
    bar = tqdm(total=total, desc=progress, unit="B", unit_scale=True, leave=False,
               disable=None if progress else True)
    for file, names in zip(files, shards):
        shard = {}
        for name in names:
            shard[name] = tensors[name].read().contiguous()
            bar.update(tensors[name].nbytes)
        save = partial(save_file, shard, metadata={"format": "pt"})
        write_atomically(folder / file, save)
        del shard, save  # or the next file's tensors would join this one's in memory
    bar.close()
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    documents = {"config.json": config.to_dict() | {"torch_dtype": dtype}}
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        documents["model.safetensors.index.json"] = {
            "metadata": {"total_size": total}, "weight_map": weight_map,
        }
    for file, document in documents.items():
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(folder / file, partial(Path.write_text, data=text, encoding="utf-8"))
    for old in folder.iterdir():
        stale = old.name not in files and old.name not in documents
        if stale and OWN_FILES.fullmatch(old.name):
            old.unlink()  # an earlier save's, which a reader could take for this one's
