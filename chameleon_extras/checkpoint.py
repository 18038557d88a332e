"""Weights on disk: reads (memory-mapped) and writes the layout of Hugging Face.

    folder/config.json -----------------> ChameleonConfig --> model on the "meta" device
    folder/model.safetensors -----------> headers: names and shapes --compare--+
        or model.safetensors.index.json                                        |
        naming model-0000i-of-0000n.safetensors                                v
                              tensors, memory-mapped --assign--> the model's parameters

Who needs it: `from_pretrained` and `save_pretrained` of the model, command.py, convert.py.

"meta" tensors have a shape but no storage, so a 7B model is soon built. Wrong names, shapes and
dtypes are found before the weights are read, inf and nan after. The memory-mapped tensors become
the parameters (assign=True). Another dtype or device, and Meta's shards, make new tensors.

With `quantize="int8"`, each matrix is packed right after it is read, and its pages are freed. So
memory holds the quantized model and one matrix. A quantized model can be saved, too. Its folder has
the same layout, with the field "quantized_weights" in config.json and these tensors for each linear
layer (quantize.py explains them; of two weights in a byte, the first is the high half):

    NAME.weight  (O, I) int8       NAME.scale  (O,) fp32          "quantized_weights": "int8"
    NAME.weight  (O, I/2) uint8    NAME.scale  (O, I/g) bf16      "quantized_weights": "int4"
    NAME.weight  (O, I/2) uint8    NAME.scale  (O, I/64) fp32     "quantized_weights": "nf4"

Its files are called model.int8.safetensors, so that no other reader takes them for plain weights.

There is no table of names, because parameters have the names of the files. The 7B model has 712
tensors. The 164 of the VQ-VAE's decoder (model.vqmodel.decoder.*) may be missing, as in
facebook/chameleon-7b. release.py reads Meta's and Anole's files under the same names.
"""

import json
import re
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chameleon import ChameleonConfig, ChameleonModel
from chameleon_extras.files import Stored, open_tensors, write_atomically
from chameleon_extras.quantize import KINDS, kind_of, pack, swap_layers
from chameleon_extras.release import (
    DECODER_PREFIX,
    VQ_PREFIX,
    find_release,
    open_release,
    pairs_to_halves,
    with_vqgan,
)
from tokenizer import read_json
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig

OWN_FILES = re.compile(r"model(?:\.(int[48]|nf4))?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PICKLE = "pytorch_model.bin"  # the file of older checkpoints
QUANTIZED = "quantized_weights"  # in config.json: one of KINDS; absent where weights are plain


def open_config(folder: Path) -> tuple[ChameleonConfig, str | None]:
    """A folder in Meta's or Hugging Face's layout -> config, and how the weights are quantized: one
    of KINDS, or None. ValueError names what is wrong.
    """
    release = find_release(folder)
    if release:
        return open_release(release)[0], None
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter: PeftModel.from_pretrained(model, folder) "
                         "loads it; to load the model alone, move adapter_config.json out")
    if not folder.is_dir():
        raise ValueError(f"no model folder {folder}: give a folder that holds config.json, or a "
                         "hub id with its owner, such as facebook/chameleon-7b")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is neither a Hugging Face model folder "
                         "nor Meta's release (models/7b beside tokenizer/); after transformers' "
                         "Trainer, save with model.save_pretrained(folder)")
    kind = read_json(path).get(QUANTIZED)
    if kind not in (None, *KINDS):
        raise ValueError(f"{path}: {QUANTIZED} {kind!r} is none of {', '.join(KINDS)}")
    return ChameleonConfig.from_pretrained(folder), kind


def file_stem(kind: str | None) -> str:
    """The start of the names of the files with the weights."""
    return f"model.{kind}" if kind else "model"


def read_folder(folder: Path, kind: str | None, *arguments) -> dict[str, Stored]:
    """All tensors of a folder: of its safetensors files, else of its pytorch_model.bin. `arguments`
    are those of `open_tensors`. ValueError if a file is missing, or a name is in two of them.
    """
    whole = f"{file_stem(kind)}.safetensors"
    if not any(folder.glob(f"{whole}*")) and any(folder.glob(f"{PICKLE}*")):
        whole = PICKLE
    index, files = folder / f"{whole}.index.json", [whole]
    try:  # a TypeError if a name is no string
        if index.is_file() and not (folder / whole).is_file():  # else it is of an earlier save
            files = sorted(set(read_json(index)["weight_map"].values()))
        absent = [file for file in files if not (folder / file).is_file()]
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is broken: it has no readable weight_map") from None
    if absent:
        patterns = ("*.safetensors", "*.bin", "*.pt*", "*/*.distcp")
        others = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
        there = f", but holds {', '.join(others):.80}: save with model.save_pretrained(folder), or"
        known = others and not index.is_file()  # else a shard is missing
        raise ValueError(f"{folder} lacks {', '.join(absent)}{there if known else ':'} download "
                         "the checkpoint again")
    tensors = {}
    for file in files:
        found = open_tensors(folder / file, *arguments)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{folder / file} holds {twice[0]}, and so does another file of its "
                             "index: download the checkpoint again")
        tensors |= found
    return tensors


def open_checkpoint(folder: Path, device: str | torch.device, vqgan: Path | None = None,
                    apart: bool = False) -> tuple[ChameleonConfig, str | None, dict[str, Stored]]:
    """A folder of any layout -> config, kind of quantized weights, {Hugging Face's name: tensor}.

    `vqgan` names a file whose VQ-VAE replaces the folder's, see release.py. `apart` is an argument
    of `open_tensors`.
    """
    release = find_release(folder)
    if release:
        config, tensors = open_release(release)
        kind = None
    else:
        config, kind = open_config(folder)
        tensors = read_folder(folder, kind, device, apart or kind is not None)
        tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
        head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if config.tie_word_embeddings and not kind and head:
            # Some writers store the tied matrix under this name, or twice.
            tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
            if table and not torch.equal(head.read(), table.read()):
                raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight and "
                                 "model.embed_tokens.weight differ: take the weights' config.json")
        if "embed_tokens.weight" in tensors:  # a ChameleonModel's folder, without a head
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors = pairs_to_halves(config, tensors)
    return config, kind, with_vqgan(tensors, vqgan) if vqgan else tensors


def open_vqvae(folder: Path, device: str | torch.device
               ) -> tuple[ChameleonVQVAEConfig, str | None, dict[str, Stored]]:
    """As `open_checkpoint`, with the VQ-VAE's config; the folder may hold a VQ-VAE alone, too."""
    file = folder / "config.json"
    if file.is_file() and read_json(file).get("model_type") == ChameleonVQVAEConfig.model_type:
        tensors = read_folder(folder, None, device)
        return (ChameleonVQVAEConfig.from_pretrained(folder), None,
                {VQ_PREFIX + name: tensor for name, tensor in tensors.items()})
    config, kind, tensors = open_checkpoint(folder, device)
    return config.vq_config, kind, tensors


def check_layers(folder: Path, config: ChameleonConfig, tensors: dict[str, Stored]) -> None:
    """ValueError, before a layer is built, if weights and config differ in their number."""
    layers = [int(match[1]) for name in tensors
              if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))]
    found, said = max(layers, default=-1) + 1, config.num_hidden_layers
    if not found:
        raise ValueError(f"{folder}: none of the weights is called model.layers.0..., but one is "
                         f"{min(tensors, default='')!r:.80}: save model.state_dict() of the plain "
                         "model, without wrappers")
    if found != said:
        raise ValueError(f"{folder}: the weights have {found} layers, but num_hidden_layers of the "
                         f"config is {said}: take the config.json that came with the weights")


def tensors_of(model: nn.Module, state_dict: dict | None = None) -> dict[str, Tensor]:
    """The tensors that a checkpoint of this model contains, by name: its own, or `state_dict`'s.

    A tied head is not among them, unless it is quantized: then it has weights of its own.
    """
    state = model.state_dict()
    if state_dict is not None:
        if state_dict.keys() != state.keys():
            raise ValueError("state_dict has other names than the model's own: "
                             f"{min(state_dict.keys() ^ state.keys())} is in one of them alone")
        state = dict(state_dict)
    tied = getattr(model.config, "tie_word_embeddings", False)  # a VQ-VAE's config has none
    if tied and isinstance(head := model.get_output_embeddings(), nn.Linear):
        table = model.get_input_embeddings().weight
        if head.weight is not table and not table.is_meta and not torch.equal(head.weight, table):
            raise ValueError("tie_word_embeddings is true, but the head has weights of its own, "
                             "which the file would lack: set config.tie_word_embeddings = False")
        del state["lm_head.weight"]
    return state


def check_tensors(folder: Path, wanted: dict[str, Tensor], found: dict[str, Stored],
                  kind: str | None) -> None:
    """ValueError lists the first eight tensors that are missing, unknown, or of a wrong shape or
    dtype. `kind` is how those of the folder are quantized.
    """
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    for name, want in wanted.items():
        if name not in found:
            continue
        shape, dtype, _ = found[name]
        if shape != tuple(want.shape):
            problems.append(f"{name} is {list(shape)} instead of {list(want.shape)}")
        packed = not want.dtype.is_floating_point or (kind and name.endswith(".scale"))
        if not (dtype == want.dtype if packed else dtype.is_floating_point):
            problems.append(f"{name} is {dtype} instead of {want.dtype if packed else 'floating'}")
    if any(name.endswith((".absmax", ".SCB", ".qweight", "_scale")) for name in found):
        raise ValueError(f"{folder} holds weights quantized elsewhere, which are not read: take "
                         "the plain ones, with --quantize or a quantization_config")
    if any(name.endswith("quantize.embedding.weight") for name in wanted.keys() - found.keys()):
        problems.insert(0, "the VQ-VAE is missing: --vqgan of generate.py or convert takes another")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: the weights do not fit the config: "
                         f"{'; '.join(problems[:8])}{more}".replace("torch.", ""))


class WithoutInit(TorchFunctionMode):
    """Skips the initialization of weights. On meta tensors it would have no effect, but make torch
    import half of its compiler, which takes two seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def dtype_of(tensors: dict[str, Stored]) -> torch.dtype:
    """The dtype of the embeddings (some files hold norms or the head in another), else fp32."""
    return next((tensor.dtype for name, tensor in tensors.items()
                 if name.endswith("embed_tokens.weight") and tensor.dtype.is_floating_point),
                torch.float32)


def open_model(cls: type, folder: Path, device: str | torch.device, vqgan: Path | None = None,
               quantize: str | None = None, dtype: torch.dtype | None = None
               ) -> tuple[nn.Module, dict[str, Stored]]:
    """-> model on the "meta" device, and exactly those tensors on disk that it needs, by its names.

    With `quantize`, one of KINDS, its linear layers are quantized ones, whose tensors are packed
    when they are read. ValueError if the folder's are quantized already, in another way. The model,
    but not its tensors, has the `dtype`; None is the file's.
    """
    prefix = "model." if issubclass(cls, ChameleonModel) else ""  # of the names of its tensors
    if issubclass(cls, ChameleonVQVAE):
        prefix = VQ_PREFIX
        config, kind, tensors = open_vqvae(folder, device)
    else:
        config, kind, tensors = open_checkpoint(folder, device, vqgan, quantize is not None)
        check_layers(folder, config, tensors)
    if quantize and kind and quantize != kind:
        raise ValueError(f"{folder} holds {kind} weights: leave --quantize {quantize} out, or give "
                         "the folder they were made from")
    with torch.device("meta"), WithoutInit():
        # The VQ-VAE stays fp32. Packed weights and their scales come later, in dtypes of their own.
        model = cls(config).to(dtype or dtype_of(tensors))
    if not any(name.startswith(DECODER_PREFIX) for name in tensors):
        for part in model.modules():
            if isinstance(part, ChameleonVQVAE):
                part.decoder = None
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
               if name.startswith(prefix)}
    if kind:
        swap_layers(model, kind)
        tensors = {name: tensor.copied() for name, tensor in tensors.items()}
    check_tensors(folder, tensors_of(model), tensors, kind)
    if quantize and not kind:
        tensors = packed_when_read(model, tensors, quantize, device)
    return model, tensors


def packed_when_read(model: nn.Module, tensors: dict[str, Stored], kind: str,
                     device: str | torch.device) -> dict[str, Stored]:
    """Quantizes the layers of a meta model -> `tensors`, with packed weights for these layers."""
    layers = swap_layers(model, kind)

    @lru_cache(maxsize=1)  # weight and scale, read one after the other, come from one `pack`
    def packed(name: str) -> dict[str, Tensor]:
        stored = tensors[name if name in tensors else "model.embed_tokens.weight"]  # a tied head
        return pack(stored.read().to(device), kind)

    found = {}
    for name, want in tensors_of(model).items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in ("weight", "scale"):
            read = lambda name=f"{layer}.weight", part=part: packed(name)[part]  # noqa: E731
            found[name] = Stored(tuple(want.shape), want.dtype, read)
        else:
            found[name] = tensors[name].copied()
    return found


def load_checkpoint(cls: type, folder: Path, dtype: torch.dtype | None, device,
                    vqgan: Path | None = None, quantize: str | None = None, draws: bool = False
                    ) -> nn.Module:
    """A folder of any layout -> model. `dtype` is that of from_pretrained.

    Weights are quantized from the numbers of the file, whatever `dtype` is. ValueError names the
    error, in one line. Inf and nan are errors: not every kernel would carry them to the answer.
    With `draws`, so is a missing VQ-VAE decoder, before the weights are read.
    """
    model, tensors = open_model(cls, folder, device, vqgan, quantize, dtype)
    if draws:
        model.model.vqmodel.needed_decoder()
    state = {}
    for name, want in tensors_of(model).items():
        try:
            tensor = tensors[name].read().to(device=device, dtype=want.dtype)
        except ValueError as e:  # of `pack`
            raise ValueError(f"{folder}: {name}: {e}") from None
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{folder}: {name} holds inf or nan in {tensor.dtype}: download the "
                             "checkpoint again, or take another dtype".replace("torch.", ""))
        state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)  # check_tensors was strict
    if isinstance(getattr(model, "lm_head", None), nn.Linear):
        model.tie_weights()
    return model.to(device).eval()


def byte_size(text: str | int) -> int:
    """ "5GB", "500MB" or a number -> bytes; ValueError for what is no size."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?)B?", str(text).strip().upper())
    if not match or not float(match[1]):
        raise ValueError(f"{str(text)[:40]!r} is no size: write 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2] or " "))


def save_checkpoint(model: nn.Module, folder: Path, max_shard_size: int | str,
                    state_dict: dict | None = None) -> None:
    tensors, addresses = {}, set()
    for name, tensor in tensors_of(model, state_dict).items():
        if type(tensor) is not Tensor:  # such as a DTensor
            raise ValueError(f"{name} is a {type(tensor).__name__}, which is not written to a "
                             "file: save a whole model, quantized to int8 or int4 if need be")
        stored = Stored.of(tensor)
        # A tensor with two names is written twice: safetensors refuses shared memory.
        tensors[name] = stored.copied() if tensor.data_ptr() in addresses else stored
        addresses.add(tensor.data_ptr())
    write_checkpoint(folder, model.config, tensors, byte_size(max_shard_size), kind_of(model),
                     architecture=type(model).__name__)


def write_checkpoint(folder: Path, config: ChameleonConfig, tensors: dict[str, Stored],
                     max_shard_bytes: int, kind: str | None = None, progress: str | None = None,
                     architecture: str = "ChameleonForConditionalGeneration") -> None:
    """Writes config.json, safetensors and, if there are several, their index.

    Memory holds the tensors of one file. `kind` is how the weights are quantized. `progress` is the
    name of a progress bar on stderr.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    values = config.to_dict() | {  # first: ValueError before anything is written
        "architectures": [architecture],
        "torch_dtype": str(dtype_of(tensors)).removeprefix("torch.")}
    documents = {"config.json": values | ({QUANTIZED: kind} if kind else {})}
    folder.mkdir(parents=True, exist_ok=True)
    found = {path.name: match[1] for path in folder.iterdir()
             if (match := OWN_FILES.fullmatch(path.name))}  # {file: its kind}
    if kind and (plain := [name for name in found if found[name] is None]):
        raise ValueError(f"{folder} holds the weights before quantization, {plain[0]}: name "
                         "another folder")
    shards, room = [{}], max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    stem, n = file_stem(kind), len(shards)
    total = sum(tensor.nbytes for tensor in tensors.values())
    files, index = [f"{stem}.safetensors"], f"{stem}.safetensors.index.json"
    if n > 1:
        # If this save is cut short, nobody shall read its files by the index of an earlier one.
        (folder / index).unlink(missing_ok=True)
        files = [f"{stem}-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        documents[index] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with tqdm(total=total, desc=progress, unit="B", unit_scale=True, leave=False,
              disable=None if progress else True) as bar:
        for file, shard in zip(files, shards):
            state = {}  # and the tensors of the file before are gone
            for name, tensor in shard.items():
                state[name] = tensor.read().contiguous()
                bar.update(tensor.nbytes)
            write_atomically(folder / file, partial(save_file, state, metadata={"format": "pt"}))
    for file, document in documents.items():
        text = json.dumps(document, indent=2) + "\n"
        write_atomically(folder / file, partial(Path.write_text, data=text, encoding="utf-8"))
    for old in found.keys() - {*files, *documents}:  # of an earlier save
        (folder / old).unlink()
