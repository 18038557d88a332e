"""Every number of the decoder: sizes, switches, and the three presets.

    config.json, of transformers 4 or 5 --from_dict--> ChameleonConfig --to_dict--> config.json

The VQ-VAE's numbers stand with it, in vqvae.py; letters as in chameleon.py.
Source: the documentation of transformers' ChameleonConfig.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae import ChameleonVQVAEConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
}


@dataclass
class ChameleonConfig:
    """Sizes and switches; fields and defaults are those documented for transformers'
    ChameleonConfig (7B). Raises ValueError, naming the field, if a value is impossible.
    """

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: one per query head (7B: 32, 34B: 8 of 64)
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True  # read and written back; nothing here uses it
    pad_token_id: int | None = None
    bos_token_id: int | None = 1  # transformers' default; really <pad> in the released vocabulary
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": 2.0}
    attention_bias: bool = False
    attention_dropout: float = 0.0
    # How many shards the model was trained in. In the release each shard has ONE q and k norm,
    # repeated here for each of its heads; the forward pass does not look at this number.
    model_parallel_size: int = 1
    swin_norm: bool = False
    vq_config: ChameleonVQVAEConfig | dict | None = None  # None: the released VQ-VAE
    vocabulary_map: dict[str, int] | None = None  # token name -> id; finds the image codes
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not isinstance(self.vq_config, ChameleonVQVAEConfig):
            self.vq_config = ChameleonVQVAEConfig.from_dict(self.vq_config or {})
        self._check_sizes()
        self._check_choices()

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                     "model_parallel_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        D, H, Hkv = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if D % (2 * H):
            raise ValueError(f"hidden_size {D} must be an even multiple of num_attention_heads {H}")
        if self.rope_type == "dynamic" and D == 2 * H:
            raise ValueError("rope_scaling dynamic needs a head_dim of at least 4, hidden_size "
                             f"{D} / num_attention_heads {H} is 2")
        if H % Hkv:
            raise ValueError(f"num_key_value_heads {Hkv} must divide num_attention_heads {H}")

    def _check_choices(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is none of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        if not (self.rope_theta > 0 and self.rms_norm_eps > 0):
            raise ValueError("rope_theta and rms_norm_eps must be above 0, got "
                             f"{self.rope_theta} and {self.rms_norm_eps}")
        kind, factor = self.rope_type, self.rope_factor
        if kind not in ("default", "linear", "dynamic"):
            raise ValueError(f"rope_scaling type {kind!r} is none of default, linear, dynamic")
        if kind != "default" and not (isinstance(factor, (int, float)) and factor >= 1):
            raise ValueError(f"rope_scaling needs a factor of at least 1, got {factor!r}")
        highest = max((self.vocabulary_map or {"": 0}).values())
        if highest >= self.vocab_size:
            raise ValueError(f"vocabulary_map names id {highest}, vocab_size is {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))

    @property
    def rope_factor(self) -> float | None:
        return (self.rope_scaling or {}).get("factor")

    @classmethod
    def tiny(cls, **changes) -> "ChameleonConfig":
        """The checkpoint in tiny/: 36x36 pictures of 81 codes, a world of coloured shapes."""
        vq = ChameleonVQVAEConfig(
            embed_dim=32, num_embeddings=512, latent_channels=64, resolution=36, attn_type="none",
            base_channels=64, channel_multiplier=(1, 1, 1), num_res_blocks=1,
        )
        sizes = dict(
            vocab_size=1032, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
            num_attention_heads=6, max_position_embeddings=1024, vq_config=vq,
            bos_token_id=0, pad_token_id=1, eos_token_id=2,
        )
        return cls(**(sizes | changes))

    @classmethod
    def chameleon_7b(cls, **changes) -> "ChameleonConfig":
        return cls(**changes)

    @classmethod
    def chameleon_34b(cls, **changes) -> "ChameleonConfig":
        """The larger release, called 30b on disk; sizes as in Hugging Face's converter."""
        sizes = dict(
            hidden_size=8192, intermediate_size=22016, num_hidden_layers=48,
            num_attention_heads=64, num_key_value_heads=8, model_parallel_size=4, swin_norm=True,
        )
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, values: dict) -> "ChameleonConfig":
        """Reads a config.json of transformers 4 or 5; keys we do not know are ignored.

        Version 4 says rope_theta and rope_scaling {type, factor}; transformers 5 says
        rope_parameters {rope_type, rope_theta, factor}.
        """
        values = dict(values)
        rope = values.pop("rope_parameters", None)
        if rope:
            values["rope_theta"] = rope.get("rope_theta", cls.rope_theta)
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                values["rope_scaling"] = {"type": kind, "factor": rope.get("factor")}
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict:
        """The config.json of transformers 4, which every version of transformers reads."""
        head = {"architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon"}
        return head | dataclasses.asdict(self) | {"vq_config": self.vq_config.to_dict()}
