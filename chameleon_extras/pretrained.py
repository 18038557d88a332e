"""Options of `from_pretrained` and `generate` under transformers' names: what they mean here.

    ("facebook/chameleon-7b", torch_dtype=..., device_map=..., quantization_config=...)
        --find_folder--> a folder --load_checkpoint--> the model, on its device

Who needs it: whoever comes from transformers' documentation. Each option is turned into one of our
own; an option that is not offered is refused by name.
Source: the documentation of transformers' PreTrainedModel.from_pretrained and BitsAndBytesConfig.
"""

import inspect
import warnings
from dataclasses import dataclass, replace
from os import PathLike
from typing import TypeVar

import torch
import torch.nn as nn

from chameleon import ChameleonPreTrainedModel
from chameleon_extras.checkpoint import load_checkpoint
from chameleon_extras.decoding import set_attention
from chameleon_extras.files import HUB_OPTIONS, find_folder, pick_device
from tokenizer import read_json
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig, PreTrainedModel

# DIFFERS: flash_attention_2 is torch's own flash kernel, where it can run (CUDA, half precision,
# no padding), and torch's next best kernel elsewhere; the flash-attn package is not used.
OUR_ATTENTION = {"eager": "eager", "sdpa": "auto", "flash_attention_2": "auto"}

# Options of transformers' `generate`, with the one value of each that changes nothing here.
NEUTRAL = dict.fromkeys((
    "output_scores", "output_attentions", "output_hidden_states", "output_logits",
    "return_dict_in_generate", "synced_gpus", "early_stopping", "renormalize_logits"), False) | {
    "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1.0, "typical_p": 1.0,
    "diversity_penalty": 0.0, "no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "logits_processor": [], "stopping_criteria": [], "cache_implementation": "dynamic"}
# mode -> beginnings of the names of options that change nothing in it
IDLE = {"text": ("image_", "guidance_text", "guidance_image"), "image": ("max_", "min_")}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
# What else a GenerationConfig holds.
NO_OPTIONS = ("bos_token_id", "transformers_version", "_from_model_config")

Config, Model = TypeVar("Config"), TypeVar("Model")


@dataclass
class BitsAndBytesConfig:
    """As transformers' class of that name. Its other arguments are refused by a TypeError.

    load_in_8bit   one scale for each output row, as `--quantize int8`
                   DIFFERS: bitsandbytes computes input features with large activations in fp16
                   (LLM.int8, arXiv 2208.07339), and leaves the head as it is
    load_in_4bit   bnb_4bit_quant_type "nf4": the same numbers as bitsandbytes, bit for bit
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_compute_dtype: torch.dtype | str | None = None  # the model's dtype is used
    bnb_4bit_use_double_quant: bool = False


def kind_of_quantization(config: object) -> str | None:
    """BitsAndBytesConfig, ours or transformers', or a dict -> one of quantize.KINDS, or None.
    ValueError for a config of another method.
    """
    read = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    if read("load_in_8bit") is None and read("load_in_4bit") is None:
        raise ValueError(f"quantization_config {config!r:.80} is not offered: use "
                         "BitsAndBytesConfig(load_in_8bit=True) or (load_in_4bit=True, "
                         "bnb_4bit_quant_type='nf4')")
    in_8, in_4 = (read(name) or False for name in ("load_in_8bit", "load_in_4bit"))
    if {type(in_8), type(in_4)} != {bool} or (in_8 and in_4):
        raise ValueError("load_in_8bit and load_in_4bit are true or false, and not both are true")
    for name in ("llm_int8_skip_modules", "bnb_4bit_use_double_quant"):
        if read(name):
            raise ValueError(f"{name} is not offered: leave it out")
    if in_4 and read("bnb_4bit_quant_type") != "nf4":
        raise ValueError(f"bnb_4bit_quant_type {read('bnb_4bit_quant_type')!r} is not offered: "
                         "use 'nf4'")
    return "int8" if in_8 else "nf4" if in_4 else None


def as_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """torch.bfloat16, "bfloat16" -> the dtype; "auto" and None -> None, the file's own."""
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{name!r} is no dtype of torch to compute in: say bfloat16, float32 ...")
    return dtype


def as_device(device_map: str | int | dict | torch.device | None) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:0", 0, {"": 0} -> the device; None is the CPU."""
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError("device_map spreads the model over several devices: use torchrun for "
                             "that, or name one device")
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    return pick_device("cpu" if device_map is None else device_map)


def attention_of(name: str) -> str:
    """attn_implementation -> its name here. ValueError for one that is not offered."""
    if name not in list(OUR_ATTENTION):  # a list compares: `name` may be a dict, without a hash
        raise ValueError(f"attn_implementation {name!r} is none of {', '.join(OUR_ATTENTION)}")
    return OUR_ATTENTION[name]


def generation_options(*configs, **options: object) -> dict:
    """Options of transformers' `model.generate` -> those of ours. A value of a GenerationConfig
    counts if neither an option nor an earlier config has one. Configs may be None. NEUTRAL values
    and None change nothing and are left out.
    """
    mode = options.get("mode", "text")
    if idle := [name for name, value in options.items()
                if value is not None and name.startswith(IDLE.get(str(mode), ()))]:
        warnings.warn(f"with mode={mode!r}, {', '.join(idle)} changes nothing", stacklevel=3)
    for config in [config for config in configs if config is not None]:
        if not hasattr(config, "to_diff_dict"):
            raise ValueError("generation_config must be a GenerationConfig, got a "
                             f"{type(config).__name__}: give options by name")
        options = config.to_diff_dict() | options
    for theirs, ours in (("cache", "past_key_values"), ("inputs", "input_ids")):
        if (value := options.pop(theirs, None)) is not None:
            if options.get(ours) is not None:
                raise ValueError(f"{theirs} and {ours} are names of one argument: give one")
            options[ours] = value
    return {name: value for name, value in options.items()
            if value is not None and name not in NO_OPTIONS and (
                name not in NEUTRAL or value != NEUTRAL[name])}


def resize_embeddings(model: ChameleonPreTrainedModel, new_num_tokens: int | None,
                      multiple: int | None) -> nn.Embedding:
    """As `resize_token_embeddings` of the models."""
    V = new_num_tokens or model.config.vocab_size
    V += -V % (multiple or 1)
    replace(model.config, vocab_size=V)  # a copy, only for its checks
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear | None):
        raise ValueError("a quantized head cannot be resized: resize before quantizing")
    for old in [table.weight] if head is None else [table.weight, head.weight, head.bias]:
        if old is not None and len(old) != V:  # in place: an optimizer may hold this Parameter
            mean = old.data.mean(0).expand(max(V - len(old), 0), *old.shape[1:])
            old.data, old.grad = torch.cat((old.data[:V], mean)), None
    model.config.vocab_size = table.num_embeddings = V
    if head is not None:
        head.out_features = V
    model.tie_weights()
    return table


def load_config(cls: type[Config], folder: str | PathLike, **changes: object) -> Config:
    """What `from_pretrained` of both configs does; the VQ-VAE's may lie inside the model's."""
    hub = {name: changes.pop(name) for name in HUB_OPTIONS if name in changes}
    file = find_folder(folder, False, **hub) / str(changes.pop("subfolder", "")) / "config.json"
    values = read_json(file)
    if issubclass(cls, ChameleonVQVAEConfig) and (
            "vq_config" in values or values.get("model_type") == "chameleon"):
        values = values.get("vq_config") or {}
    try:
        if not isinstance(values, dict):
            raise ValueError("vq_config must be an object of names and values")
        if ROPE & changes.keys() & cls.__dataclass_fields__.keys():
            # Theta and scaling each come from the changes, or else from the file. Either may give
            # them under each of the names in ROPE.
            given = {name: changes.pop(name) for name in ROPE & changes.keys()}
            new = cls.from_dict(given)  # ValueError if they contradict each other
            own = cls.from_dict({name: values.pop(name) for name in ROPE & values.keys()})
            told = [given, given.get("rope_parameters") or {}, given.get("rope_scaling") or {}]
            scaled = "rope_scaling" in given or given.get("rope_parameters") is not None
            values |= {
                "rope_theta": (new if any("rope_theta" in d for d in told) else own).rope_theta,
                "rope_scaling": (new if scaled else own).rope_scaling}
        if (kind := values.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"it describes a {kind!s:.40}, not a {cls.model_type}")
        return cls.from_dict(values | changes)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}") from None


def load_pretrained(
    cls: type[Model], folder: str | PathLike, dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None, device_map=None, device=None,
    low_cpu_mem_usage: bool = True,  # accepted: the file is memory-mapped in any case
    attn_implementation: str | None = None, quantization_config: object = None,
    use_safetensors: bool | None = None,  # None: they are read first
    **hub: object,
) -> Model:
    """What `from_pretrained` of all models does. ValueError, in one line, for what is wrong."""
    if unknown := sorted(hub.keys() - set(HUB_OPTIONS)):
        own = list(inspect.signature(load_pretrained).parameters)[2:-1]  # not cls, folder, hub
        raise ValueError(f"from_pretrained has no option {', '.join(unknown)}; it has "
                         f"{', '.join([*own, *HUB_OPTIONS])}")
    if not issubclass(cls, PreTrainedModel):
        raise ValueError(f"{cls.__module__}.{cls.__name__} is a copy of a class: from_pretrained "
                         "is for those of vqvae.py and chameleon.py and their subclasses")
    attention = None if attn_implementation is None else attention_of(attn_implementation)
    kind = kind_of_quantization(quantization_config) if quantization_config is not None else None
    dtype = as_dtype(torch_dtype if dtype is None else dtype)
    place = as_device(device if device_map is None else device_map)
    name, folder = str(folder), find_folder(folder, **hub)
    if use_safetensors is not None and use_safetensors != any(folder.glob("*.safetensors")):
        raise ValueError(f"use_safetensors={use_safetensors}, but {folder} holds "
                         + ("none" if use_safetensors else "some, which are read first")
                         + ": leave it out")
    if issubclass(cls, ChameleonVQVAE) and (kind or attention):
        raise ValueError("a VQ-VAE has no quantization_config and no attn_implementation: "
                         "leave them out")
    model = load_checkpoint(cls, folder, dtype, place, quantize=kind)
    model.name_or_path = name  # peft writes it into its adapters, which find their model by it
    return set_attention(model, attention) if attention else model
