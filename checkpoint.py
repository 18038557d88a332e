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
facebook/chameleon-7b was published without them.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from chameleon import ChameleonConfig

DECODER_PREFIX = "model.vqmodel.decoder."


def read_config(folder: Path) -> ChameleonConfig:
    """config.json of a folder -> ChameleonConfig; ValueError says what is wrong with it."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"no model folder {folder}: give a folder that holds config.json")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder")
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
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is broken: it has no readable weight_map") from None
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}: download the checkpoint again")
    return [folder / name for name in names]


def open_checkpoint(folder: Path, device: str | torch.device) -> dict[str, tuple]:
    """-> {tensor name: (opened file, shape)}; reads headers only."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in checkpoint_files(folder):
        try:
            file = safe_open(path, framework="pt", device=str(device))
            tensors |= {n: (file, tuple(file.get_slice(n).get_shape())) for n in file.keys()}
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is truncated or no safetensors file ({e}): "
                             "download it again") from None
    return tensors


def check_tensors(folder: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Both {name: shape}. ValueError lists all that is missing, unknown or misshapen."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items() if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: the weights do not fit config.json: "
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


def load_checkpoint(cls: type, folder: Path, dtype: torch.dtype | None, device) -> nn.Module:
    config = read_config(folder)
    files = open_checkpoint(folder, device)
    files = {n: f for n, f in files.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)  # some writers store the tied matrix twice
    with torch.device("meta"), WithoutInit():
        has_decoder = any(name.startswith(DECODER_PREFIX) for name in files)
        model = cls(config, with_vq_decoder=has_decoder)
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}  # tied matrices once
    check_tensors(folder, wanted, {n: shape for n, (_, shape) in files.items()})
    state = {}
    for name, (file, _) in files.items():
        to = torch.float32 if name.startswith("model.vqmodel.") else dtype
        state[name] = file.get_tensor(name).to(to)
    model.load_state_dict(state, strict=False, assign=True)  # checked above, so strict in effect
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """A reader sees the old file or the whole new one, never half of it."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save_checkpoint(model: nn.Module, folder: Path, max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards, room = [{}], max_shard_bytes
    for name, tensor in model.named_parameters():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.detach().contiguous()
        room -= tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        save = partial(save_file, shard, metadata={"format": "pt"})
        write_atomically(folder / file, save)
    values = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    documents = {"config.json": values}
    if len(shards) > 1:
        size = sum(t.nbytes for shard in shards for t in shard.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        documents["model.safetensors.index.json"] = {
            "metadata": {"total_size": size}, "weight_map": weight_map,
        }
    for file, document in documents.items():
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(folder / file, partial(Path.write_text, data=text, encoding="utf-8"))
