"""The decoder of Chameleon: one Llama-like transformer over text AND image tokens.

    text ------tokenizer.py------------> ids --+
    picture --vqvae.py--> codes --names--> ids +--> ids (B,T) --embed--> x (B,T,D)
                                        x --layers--> --norm--> --lm_head--> logits (B,T,V)

    one layer (7B)      h = x + attention(norm(x))        out = h + mlp(norm(h))
    one layer (34B)     h = x + norm(attention(x))        out = h + norm(mlp(h))

Letter  meaning                         7B      34B     config field
B       sequences in the batch
T       new tokens in this call
L       keys: tokens in the cache + T   <=4096  <=4096  max_position_embeddings
D       width of the residual stream    4096    8192    hidden_size
H       query heads                     32      64      num_attention_heads
Hkv     heads of keys and values        32      8       num_key_value_heads
Dh      width of one head, D / H        128     128
F       width of the feed-forward       11008   22016   intermediate_size
-       layers                          32      48      num_hidden_layers
V       vocabulary: text AND images     65536   65536   vocab_size
S       image tokens per picture        1024    1024    vq_config.codes_per_image
N       pictures over all rows, pixels (N, 3, height, width)

What differs from a plain Llama (Chameleon, https://arxiv.org/abs/2405.09818, section 2.3):
- QK-norm: a LayerNorm on each query and key head, before RoPE. `ChameleonLayerNorm` says why.
- The 34B model (`swin_norm`) has its norms after attention and feed-forward, not before.
- Early fusion (section 2): the vocabulary holds 8192 image codes beside the text, and no layer
  knows which is which. Image tokens are causal like all others, because the model must also be
  able to WRITE them one by one.

A section cited without an arXiv number is a section of that paper. Parameter names are those of
the Hugging Face checkpoint, so its state dict loads without a table of names.

Read first: from "Norms and positions" to `ChameleonModel.forward`. Skip at first: the config's
checks, and the section "What a first reader skips", which holds what transformers' users expect.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Annotated, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenizer import IDS, IGNORE, VocabularyMap, check_ids
from vqvae import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Count,
    Flag,
    PreTrainedConfig,
    PreTrainedModel,
    Scale,
    Share,
    Size,
    check_fields,
    keeping_others,
    real,
)

QK_NORM_EPS = 1e-5  # fixed in the release, whatever rms_norm_eps says


# ---------------------------------------------------------------------------------------------
# Config: every size and switch, and the sizes of the larger release

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # the releases' choice; the others are for decoders of your own
    "relu": F.relu,
    "gelu": F.gelu,  # arXiv 1606.08415
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
# Types of fields as in vqvae.py: what an error message calls them, and the check.
Activation = Annotated[str | Callable, f"one of {', '.join(ACTIVATIONS)}, or a function",
                       lambda x: callable(x) or x in list(ACTIVATIONS)]
Positive = Annotated[float, "a number above 0, up to 1e9", lambda x: real(0, 1e9)(x) and x > 0]
Object = Annotated[dict, "an object of names and values", lambda x: isinstance(x, dict)]
VQ = Annotated[ChameleonVQVAEConfig, "an object of names and values",
               lambda x: isinstance(x, ChameleonVQVAEConfig)]


@keeping_others
@dataclass
class ChameleonConfig(PreTrainedConfig):
    """Sizes and switches; fields and defaults are those documented for transformers'
    ChameleonConfig (7B). Raises ValueError, naming the field, if a value is impossible.
    """

    vocab_size: Size = 65536
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None  # None: one per query head (7B: 32, 34B: 8 of 64)
    hidden_act: Activation = "silu"
    max_position_embeddings: Size = 4096
    initializer_range: Scale = 0.02
    rms_norm_eps: Positive = 1e-5
    use_cache: Flag = True  # a forward pass returns a cache
    pad_token_id: int | None = None  # ids are checked against vocab_size
    bos_token_id: int | None = 1  # transformers' default; really <pad> in the released vocabulary
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: Flag = False  # one matrix for embedding and head (arXiv 1608.05859)
    rope_theta: Positive = 10000.0  # the base of RoPE's angles (arXiv 2104.09864, section 3.2.2)
    rope_scaling: Object | None = None  # {"type": "linear" or "dynamic", "factor": 2.0}
    attention_bias: Flag = False
    attention_dropout: Share = 0.0
    # How many shards the model was trained in. In the release each shard has ONE q and k norm,
    # repeated here for each of its heads; the forward pass does not look at this number.
    model_parallel_size: Count = 1
    swin_norm: Flag = False
    vq_config: VQ = field(default_factory=ChameleonVQVAEConfig)  # may be given as a dict
    vocabulary_map: Object | None = None  # token name -> id; finds the image codes
    mlp_bias: Flag = False
    output_hidden_states: Flag = False  # defaults of forward's arguments of the same names
    output_attentions: Flag = False
    return_dict: Flag = True
    # transformers 5's one field for both: {rope_type, rope_theta, factor}. None as soon as read
    rope_parameters: Object | None = None
    model_type = "chameleon"

    def __post_init__(self) -> None:
        if self.vq_config is None or isinstance(self.vq_config, dict):
            self.vq_config = ChameleonVQVAEConfig.from_dict(self.vq_config or {})
        scaling = self.rope_scaling
        if self.rope_parameters is None and isinstance(scaling, dict) and "rope_theta" in scaling:
            self.rope_parameters, self.rope_scaling = scaling, None  # transformers 5's alias
        vars(self).update(self.rope_fields())
        check_fields(self)
        D, H = self.hidden_size, self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or H
        kind, factor = self.rope_type, self.rope_factor
        for wrong, message in (
            (D % (2 * H), f"hidden_size {D} must be an even multiple of num_attention_heads {H}"),
            (H % self.num_key_value_heads,
             f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads {H}"),
            (kind not in ("default", "linear", "dynamic"),
             f"rope_scaling type {kind!r:.80} is none of default, linear, dynamic"),
            (not real(1, 1000)(factor),
             f"rope_scaling needs a factor from 1 to 1000, got {factor!r:.80}"),
            (kind == "dynamic" and D == 2 * H, "rope_scaling dynamic needs a head_dim of at least "
             f"4, hidden_size {D} / num_attention_heads {H} is 2"),
        ):
            if wrong:
                raise ValueError(message)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if (ids := getattr(self, name)) is not None:
                several = name == "eos_token_id" and isinstance(ids, list)
                for token_id in ids if several else [ids]:
                    check_ids({name: token_id}, self.vocab_size)
        check_ids(self.vocabulary_map or {}, self.vocab_size, "vocabulary_map: ")

    def rope_fields(self) -> dict:
        """rope_parameters -> rope_theta and rope_scaling; ValueError if they contradict."""
        if not isinstance(given := self.rope_parameters, dict):
            return {}
        kind = given.get("rope_type", given.get("type", "default"))
        scaling = None if kind == "default" else {"type": kind, "factor": given.get("factor")}
        theta = given.get("rope_theta", self.rope_theta)
        # A rope_theta that is the default counts as not given.
        other_theta = self.rope_theta not in (theta, ChameleonConfig.rope_theta)
        if other_theta or (self.rope_scaling and self.rope_scaling != scaling):
            raise ValueError("rope_parameters contradict rope_theta or rope_scaling: give only one")
        return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": None}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_type(self) -> str | None:
        scaling = self.rope_scaling or {"type": "default"}
        return scaling.get("rope_type", scaling.get("type"))

    @property
    def rope_factor(self) -> float:
        """How many times longer rope_scaling makes the context; 1 without it."""
        return 1.0 if self.rope_type == "default" else (self.rope_scaling or {}).get("factor", 0)

    def to_dict(self) -> dict:
        """The config.json of transformers 4, which every version of transformers reads."""
        values = super().to_dict() | {"vq_config": self.vq_config.to_dict()} | self.rope_fields()
        del values["rope_parameters"]
        if not isinstance(self.hidden_act, str):
            raise ValueError("hidden_act is a function, which no config.json can hold: name one of "
                             + ", ".join(ACTIVATIONS))
        return values | {"architectures": ["ChameleonForConditionalGeneration"]}


# ---------------------------------------------------------------------------------------------
# What a first reader skips: the outputs and generic methods that transformers' users expect


@dataclass
class ChameleonOutput(Mapping):
    """What a forward pass returns, by attribute, name or index, as transformers' ModelOutput:
    `output.logits`, `output["logits"]`, `output[0]`, `output.to_tuple()`, `output.items()`.
    A field that was not asked for is None; names and indices leave it out.
    """

    loss: Tensor | None = None  # scalar, mean over the labels that count
    logits: Tensor | None = None  # (B, T, V), or the last logits_to_keep of T
    last_hidden_state: Tensor | None = None  # (B, T, D), after the final norm; ChameleonModel only
    past_key_values: "KVCache | None" = None
    hidden_states: tuple[Tensor, ...] | None = None  # embedding, then layers; the last normed
    attentions: tuple[Tensor, ...] | None = None  # for each layer (B, H, T, L)
    cache = property(lambda self: self.past_key_values)  # its name since transformers 5.24

    def __post_init__(self) -> None:
        if isinstance(self.loss, Mapping):  # accelerate copies an output by type(output)(a dict)
            fields, self.loss = self.loss, None
            vars(self).update(fields)
        elif isinstance(self.loss, Iterator):  # what torch makes of the outputs of several GPUs
            raise TypeError("nn.DataParallel cannot join these outputs: start with torchrun (DDP)")

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, value in vars(self).items() if value is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, key: str | int | slice) -> object:
        values = self.to_tuple()
        return dict(zip(self, values))[key] if isinstance(key, str) else values[key]


# Shows its tensors to torch.export and FSDP.
torch.export.register_dataclass(ChameleonOutput, serialized_type_name="chameleon.ChameleonOutput")


class ChameleonPreTrainedModel(PreTrainedModel):
    """What both models share under the names of transformers' class; libraries look for them."""

    config: ChameleonConfig
    config_class = ChameleonConfig
    gradient_checkpointing = False
    generation_config = None  # or transformers' GenerationConfig, whose values `generate` takes
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch to forward
    loss_type = "ForCausalLM"  # so the Trainer leaves the first label of a row out of that count
    base_model_prefix = "model"

    base_model = property(lambda self: cast("ChameleonModel", getattr(self, "model", self)))
    is_gradient_checkpointing = property(lambda self: self.base_model.gradient_checkpointing)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels -> embeddings of their ids (N, S, D). DIFFERS: transformers 5 wraps them."""
        return self.get_input_embeddings()(self.base_model.get_image_tokens(pixel_values))

    def tie_weights(self) -> None:
        """One matrix for embedding and head, if the config says so."""
        head = self.get_output_embeddings()
        if self.config.tie_word_embeddings and head is not None:
            head.weight = self.base_model.embed_tokens.weight

    def resize_token_embeddings(self, new_num_tokens: int | None = None,
                                pad_to_multiple_of: int | None = None) -> nn.Embedding:
        """Keeps the rows of ids that stay; new rows are the mean of the old ones, as in
        transformers. ValueError if the new size drops an id of the vocabulary_map or the config.
        """
        # Only to fine-tune with a larger vocabulary: no part of the model.
        from chameleon_extras.pretrained import resize_embeddings

        return resize_embeddings(self, new_num_tokens, pad_to_multiple_of)

    def gradient_checkpointing_enable(self, *ignored: object, **also_ignored: object) -> None:
        """Training keeps only each layer's input, and computes the rest again when it is needed:
        about a third more time, and memory for one layer instead of all (arXiv 1604.06174).
        """
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    activation_checkpointing_enable = gradient_checkpointing_enable  # transformers' new name
    activation_checkpointing_disable = gradient_checkpointing_disable

    def enable_input_require_grads(self) -> None:
        """Does nothing: here, adapters get their gradients without it, checkpointing or not."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Tensor) -> dict:
        """What wrappers such as peft's look for; `generate` itself has no use for it."""
        return {"input_ids": input_ids, **inputs}

    def set_attn_implementation(self, name: str) -> None:
        """Chooses one of the names of `from_pretrained`'s attn_implementation for all layers."""
        # Which kernel is fastest depends on the device: that is no part of the model.
        from chameleon_extras.pretrained import attention_of, set_attention

        set_attention(self, attention_of(name))


# ---------------------------------------------------------------------------------------------
# Norms and positions


class ChameleonRMSNorm(nn.Module):
    """Scales each vector to a root mean square of 1 (arXiv 1910.07467, equation 4; section 2.3).

    x (..., D) -> same. The statistics are fp32, whatever the dtype of x.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # y = x / sqrt(mean(x^2) + eps) * weight
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)  # cast first, weigh after: as in the release


class ChameleonLayerNorm(nn.Module):
    """QK-norm: LayerNorm over each head (section 2.3).   x (B, T, H, Dh) -> same

    Each head has its own weight and bias here, as in the Hugging Face checkpoint. In the release,
    the heads of one shard share them (`model_parallel_size`).

    Why: a constant added to all scores changes no softmax, so the loss does not keep scores small.
    Text and images share all weights, and each modality gains by making its q and k longer. So the
    scores grow, and large scores lose precision in bf16: the paper's 7B training without QK-norm
    diverged after 20 % of an epoch. QK-norm itself is from arXiv 2302.05442.
    Why before RoPE: RoPE keeps lengths, so the norm still holds after it. In the other order,
    weight and bias would change the two halves of a pair differently, and q.k would no longer
    depend on the distance of the positions alone.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        # y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          (arXiv 1607.06450)
        normed = F.layer_norm(x, x.shape[-1:], eps=QK_NORM_EPS)
        return normed * self.weight + self.bias


def rotary_table(config: ChameleonConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE's angles (arXiv 2104.09864, section 3.2.2).   position_ids (B, T) -> cos, sin

        angle(p, i) = p * theta^(-2i / Dh)       position p, pair i = 0 .. Dh/2 - 1

    cos and sin are (B, 1, T, Dh) in fp32. They are computed anew in each call, so there is no
    table that a cast to bf16 could round.
    linear:   p is divided by the factor (arXiv 2306.15595).
    dynamic:  theta (f n / M - (f - 1))^(Dh / (Dh - 2)) replaces theta. f is the factor, M is
              max_position_embeddings, and n the highest position + 1, cache included, at least M.
    DIFFERS: transformers keeps the theta of the longest sequence that it has seen, so that a long
    prompt changes the answers to later ones. Here theta depends on this call's positions only. In
    both, cached keys are not rotated again.
    """
    Dh, device = config.head_dim, position_ids.device
    theta, factor = config.rope_theta, config.rope_factor
    exponent = torch.arange(0, Dh, 2, device=device, dtype=torch.float32) / Dh  # (Dh/2,)
    if config.rope_type == "dynamic":
        M = config.max_position_embeddings
        length = (position_ids.max() + 1).clamp(min=M)
        theta = theta * (factor * length / M - (factor - 1)) ** (Dh / (Dh - 2))
    inv_freq = 1.0 / theta**exponent  # (Dh/2,)
    if config.rope_type == "linear":
        inv_freq = inv_freq / factor
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, Dh/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, Dh)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+Dh/2}) by angle(p, i).   x (B, H, T, Dh) -> same

        (a, b) -> (a cos - b sin, b cos + a sin)        (arXiv 2104.09864, equation 34)

    DIFFERS: Meta's own files pair neighbours (x_2i, x_2i+1). That is the same function with another
    order of rows in q_proj and k_proj. The Hugging Face checkpoint uses halves, as this file does.
    """
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, Dh/2)
    return x * cos + torch.cat((-b, a), dim=-1) * sin  # (B, H, T, Dh)


# ---------------------------------------------------------------------------------------------
# Attention: who may look at whom, and two ways to compute it


def refuse(wrong: Tensor, message: str, *numbers: Tensor) -> None:
    """ValueError if `wrong`, a bool tensor, is true; `numbers` fill the {} of the message. To see
    that, the host waits for the device. Compiled code does not wait: it raises RuntimeError, or
    ends the process, and the message has no numbers.
    """
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(~wrong, message.replace("{}", "another number of"))
    elif not wrong.is_meta and wrong:
        raise ValueError(message.format(*map(int, numbers)))


def allowed_keys(attention_mask: Tensor | None, B: int, T: int, past: int,
                 device: torch.device) -> Tensor | None:
    """The ONE mask rule -> bool (B or 1, 1, T, L), True where a query may look at key j, or None.

    q = past .. L - 1 and j = 0 .. L - 1 are the places of query and key. `attention_mask` is one of

        (B, L)        1 for a real token, 0 for padding       allowed = j <= q and mask[b, j]
        (B, T, L)     for packed documents                    allowed = j <= q and mask[b, t, j]
        (B, 1, T, L)  bool, or float: 0 allows, -1000 or      allowed = mask[b, 0, t, j]
                      less forbids

    The last two may have one row for all. In each case a query may look at itself. Without that,
    padding, whose output is never used, would have no key, and a softmax over no key is NaN.

    Returns None when no mask tensor is needed: no token is padding, and either T = 1 or the cache
    is empty. The attention functions then apply the causal rule themselves. To see whether a token
    is padding, the host waits for the device (a GPU synchronization). That is not done for a single
    query, nor while torch.compile traces.
    """
    L, mask = past + T, attention_mask
    j = torch.arange(L, device=device)  # (L,)
    q = torch.arange(past, L, device=device)[:, None]  # (T, 1)
    if mask is not None:
        shape = tuple(mask.shape)
        per_query = len(shape) in (3, 4) and shape[-2:] == (T, L) and shape[0] in (1, B)
        if shape != (B, L) and not per_query:
            raise ValueError(f"attention_mask is {shape}, but there are {B} rows of {L} tokens "
                             f"({past} cached + {T} new): see allowed_keys")
        if mask.is_floating_point():  # DIFFERS: transformers adds any number
            # 1 and 0 may be floats; a negative number is of an additive mask.
            other = (mask != 0) & (mask > -1e3) if mask.ndim == 4 else mask < 0
            refuse(other.any(), "an additive attention_mask is (B, 1, T, L), and 0 or at most -1000"
                   f": give others as bool, this one is {shape}")
        if mask.ndim == 4:
            return (mask == 0 if mask.is_floating_point() else mask.bool()) | (j == q)
        reads = T > 1 and not mask.is_meta and not torch.compiler.is_compiling()
        if mask.ndim == 2 and reads and mask.all():
            mask = None  # the processor always sends a mask; most often nothing is padded
    if mask is None:
        return None if T == 1 or past == 0 else (j <= q)[None, None]  # (1, 1, T, L)
    token = mask.bool() if mask.ndim == 3 else mask.bool()[:, None]  # (B or 1, T or 1, L)
    return ((j <= q) & token | (j == q))[:, None]  # (B or 1, 1, T, L)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                    dropout: float) -> tuple[Tensor, Tensor | None]:
    """The readable form of attention (arXiv 1706.03762, equation 1). Query heads may share key and
    value heads (arXiv 2305.13245): the 34B model has 8 for 64 query heads.

    q (B, H, T, Dh), k and v (B, Hkv, L, Dh), mask as from `allowed_keys`
    -> output (B, H, T, Dh), weights (B, H, T, L)
    """
    T, L = q.shape[2], k.shape[2]
    sharing = q.shape[1] // k.shape[1]  # so many query heads share one key/value head
    k, v = (x.repeat_interleave(sharing, dim=1) for x in (k, v))  # (B, H, L, Dh)
    if mask is None:
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)  # (T, L)
    # y = softmax(q k^T / sqrt(Dh)) v
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, T, L)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights  # (B, H, T, Dh), (B, H, T, L)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                   dropout: float) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch. Its fused kernels never hold the (T, L) weights (arXiv 2205.14135)."""
    causal = False  # also without a mask, if T = 1: the only query may see every key
    if mask is None and q.shape[2] > 1:  # an `if` gives torch.export a bool, not a symbolic one
        causal = True
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True
    )
    return output, None  # (B, H, T, Dh)


class KVCache:
    """Keys and values of all past tokens, so that a step computes those of the new token only
    (incremental decoding, arXiv 1911.02150).

    With `max_length`, one buffer (B, Hkv, max_length, Dh) for k and one for v is allocated for each
    layer, and `length` of its columns are filled. Without, the cache grows: each call copies what
    is there, which is simple, and slower for long answers.
    Memory per token: 2 * layers * Hkv * Dh * 2 bytes = 512 KiB for 7B in bf16.
    """

    def __init__(self, config: ChameleonConfig, batch_size: int = 1, max_length: int | None = None,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        Hkv = config.num_key_value_heads or config.num_attention_heads
        shape = (batch_size, Hkv, max_length or 0, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.max_length = max_length
        self.length = 0
        self.ids: Tensor | None = None  # (B, length), of the columns that `generate` has filled

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, Hkv, T, Dh) behind the filled columns -> all filled (B, Hkv, L, Dh).

        With `max_length` it writes in place and returns views of the buffers, which change when a
        later call overwrites their columns. ValueError for a full buffer.
        """
        if self.max_length is None:
            if self.length:
                k = torch.cat((self.k[layer][:, :, : self.length], k), dim=2)  # (B, Hkv, L, Dh)
                v = torch.cat((self.v[layer][:, :, : self.length], v), dim=2)  # (B, Hkv, L, Dh)
            self.k[layer], self.v[layer] = k, v
            return k, v
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {end} are needed: "
                             "make it with a larger max_length")
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        keys, values = self.k[layer][:, :, :end], self.v[layer][:, :, :end]  # (B, Hkv, L, Dh)
        return keys.to(k.dtype), values.to(v.dtype)  # no copy, unless a cache has another dtype

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def __len__(self) -> int:
        return len(self.k)  # layers, as in transformers; `length` counts the columns

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """The filled columns of a layer's keys and values, (B, Hkv, L, Dh) each."""
        return self.k[layer][:, :, : self.length], self.v[layer][:, :, : self.length]

    def check_batch(self, B: int) -> None:
        """ValueError for a batch that is not the cache's own."""
        if (self.length or self.max_length) and len(self.k[0]) != B:
            raise ValueError(f"the KV cache holds {len(self.k[0])} rows, the input has {B}: "
                             "make a cache for each batch")


class ChameleonAttention(nn.Module):
    """x (B, T, D) -> (B, T, D), weights (B, H, T, L) or None. Equals HF's ChameleonAttention."""

    def __init__(self, c: ChameleonConfig, layer: int) -> None:
        super().__init__()
        D, H, Dh = c.hidden_size, c.num_attention_heads, c.head_dim
        Hkv = c.num_key_value_heads or H
        self.layer, self.head_dim, self.dropout = layer, Dh, c.attention_dropout
        self.q_proj = nn.Linear(D, H * Dh, bias=c.attention_bias)
        self.k_proj = nn.Linear(D, Hkv * Dh, bias=c.attention_bias)
        self.v_proj = nn.Linear(D, Hkv * Dh, bias=c.attention_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=c.attention_bias)
        self.q_norm = ChameleonLayerNorm(H, Dh)
        self.k_norm = ChameleonLayerNorm(Hkv, Dh)
        self.attend = sdpa_attention

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
        cache: KVCache | None = None, output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hkv, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hkv, Dh)
        q, k = self.q_norm(q), self.k_norm(k)  # BEFORE the rotation: see ChameleonLayerNorm
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or Hkv, T, Dh)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Hkv, L, Dh)
        attend = eager_attention if output_attentions else self.attend  # only eager has weights
        y, weights = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).flatten(2)), weights  # (B, T, D), (B, H, T, L)


# ---------------------------------------------------------------------------------------------
# Layers


class ChameleonMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, equation 6; section 2.3).   (B, T, D) -> (B, T, D)"""

    def __init__(self, c: ChameleonConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.hidden_act] if isinstance(c.hidden_act, str) else c.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class ChameleonDecoderLayer(nn.Module):
    """The layer of the 7B model: norms in front (pre-norm, as in Llama; section 2.3)."""

    def __init__(self, c: ChameleonConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = ChameleonAttention(c, layer)
        self.mlp = ChameleonMLP(c)
        self.input_layernorm = ChameleonRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = ChameleonRMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, *attention_arguments) -> tuple[Tensor, Tensor | None]:
        # attention_arguments: rope, mask, cache and output_attentions, as in ChameleonAttention
        y, weights = self.self_attn(self.input_layernorm(x), *attention_arguments)
        h = x + y
        return h + self.mlp(self.post_attention_layernorm(h)), weights


class ChameleonSwinDecoderLayer(ChameleonDecoderLayer):
    """The layer of the 34B model (section 2.3, from Swin Transformers): each norm bounds what its
    block can add to x. Names are those of the 7B, so input_layernorm stands after attention.
    """

    def forward(self, x: Tensor, *attention_arguments) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(x, *attention_arguments)
        h = x + self.input_layernorm(y)
        return h + self.post_attention_layernorm(self.mlp(h)), weights


# ---------------------------------------------------------------------------------------------
# The models


class ChameleonModel(ChameleonPreTrainedModel):
    """Everything but the head. Equals transformers' ChameleonModel. Weights start random, with a
    standard deviation of `initializer_range` and a row of zeros for padding.
    """

    def __init__(self, config: ChameleonConfig, with_vq_decoder: bool = True) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layer_class = ChameleonSwinDecoderLayer if config.swin_norm else ChameleonDecoderLayer
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = ChameleonRMSNorm(config.hidden_size, config.rms_norm_eps)
        # Frozen: argmin has no gradient. ChameleonVQVAE.forward trains a VQ-VAE by itself.
        self.vqmodel = ChameleonVQVAE(config.vq_config, with_vq_decoder).requires_grad_(False)
        self.vocabulary = VocabularyMap(config.vocabulary_map)  # codes <-> ids, by name
        n, K = self.vocabulary.num_codes, config.vq_config.num_embeddings
        if n not in (0, K):
            raise ValueError(f"vocabulary_map names {n} image codes, but vq_config has {K}: take "
                             "the config.json that came with the weights")
        self.embed_tokens.apply(self.init_weights)
        self.layers.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx].detach())
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "ChameleonModel":
        super().train(mode)
        self.vqmodel.eval()
        return self

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] (N, 3, height, width) -> vocabulary ids (N, S) in raster order."""
        if not self.vocabulary.num_codes:
            raise ValueError("this config has no vocabulary_map with IMGIMG... names, so pictures "
                             "have no ids: take the config.json of the checkpoint")
        return self.vocabulary.code_to_id[self.vqmodel.encode(pixel_values)]  # (N, S)

    def replace_image_placeholders(self, input_ids: Tensor,
                                   pixel_values: Tensor | None) -> Tensor:
        """input_ids (B, T) with `<image>` placeholders -> ids (B, T) with the pictures' own ids.

        Pictures (N, 3, height, width) fill the placeholders in order, row after row. With these ids
        the model needs no pictures. ValueError if there are not exactly N * S placeholders (none
        without pictures), or an id is not of this vocabulary. The checks are GPU synchronizations,
        so a single token is not checked.
        """
        if getattr(input_ids, "dtype", None) not in IDS or input_ids.ndim != 2:
            raise ValueError("input_ids must be an int64 tensor (B,T), as a processor gives it")
        placeholder, V = self.vocabulary.image_token_id, self.config.vocab_size
        checks = not input_ids.is_meta and (input_ids.shape[1] > 1 or pixel_values is not None)
        if checks and not torch.compiler.is_compiling() and (
                (input_ids < 0) | (input_ids >= V)).any():  # compiled code checks each index itself
            raise ValueError(f"input_ids hold {int(input_ids.min())}..{int(input_ids.max())}, but "
                             f"the ids of this model are 0 to {V - 1}")
        if pixel_values is None:
            if checks and placeholder is not None:
                refuse((input_ids == placeholder).any(), "the prompt has <image> placeholders but "
                       "there are no pixel_values: pass the pictures that the processor prepared")
            return input_ids
        image_ids = self.get_image_tokens(pixel_values)  # (N, S)
        if placeholder is None:
            raise ValueError("this vocabulary has no <image>: put the pictures' ids into input_ids")
        here = input_ids == placeholder  # (B, T)
        if checks:
            found = here.sum()
            refuse(found != image_ids.numel(), f"{image_ids.shape[0]} pictures are "
                   f"{image_ids.numel()} image tokens, but the prompt has {{}} <image> "
                   "placeholders", found)
        return input_ids.masked_scatter(here, image_ids.to(input_ids.dtype))

    def embed_pictures(self, inputs_embeds: Tensor, pixel_values: Tensor | None) -> Tensor:
        """inputs_embeds (B, T, D) -> the same, with the pictures in place of `<image>`."""
        here = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)  # (B, T)
        if (mark := self.vocabulary.image_token_id) is not None:
            place = self.embed_tokens(torch.tensor([mark], device=inputs_embeds.device))  # (1, D)
            here = (inputs_embeds == place).all(-1)  # (B, T)
        ids = torch.where(here, mark or 0, int(mark == 0))  # (B, T); elsewhere any id but the mark
        ids = self.replace_image_placeholders(ids, pixel_values)  # (B, T)
        if pixel_values is None:
            return inputs_embeds
        return torch.where(here[..., None], self.embed_tokens(ids), inputs_embeds)  # (B, T, D)

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        pixel_values: Tensor | None = None,  # (N, 3, height, width), N pictures over all rows
        attention_mask: Tensor | None = None,  # see `allowed_keys`
        position_ids: Tensor | None = None,  # (B, T); default: continues after the cache
        past_key_values: KVCache | None = None,  # read and, in place, written
        inputs_embeds: Tensor | None = None,  # (B, T, D), instead of input_ids
        use_cache: bool | None = None,  # None: the config's; True makes a cache if none is given
        output_attentions: bool | None = None,  # None: the config's; computed by eager attention
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,  # False: a plain tuple
        cache_position: Tensor | None = None,  # (T,), position_ids of all rows
        cache: KVCache | None = None,  # transformers 5.24's name for past_key_values
    ) -> "ChameleonOutput | tuple":
        """-> last_hidden_state (B, T, D) and what was asked for.

        Without a mask and with use_cache=False, a jump in position_ids begins a new document, as in
        transformers. With inputs_embeds, a placeholder is where the embedding of `<image>` stands.
        ValueError unless one of input_ids and inputs_embeds is given, and a picture for each place.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        c = self.config
        cache = past_key_values if cache is None else cache
        if not isinstance(cache, KVCache | None):
            raise ValueError("past_key_values must be a KVCache, as a forward pass returns it")
        use_cache = c.use_cache if use_cache is None else use_cache
        weighs = c.output_attentions if output_attentions is None else output_attentions
        hiddens = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        plain = not (c.return_dict if return_dict is None else return_dict)
        if input_ids is not None:
            input_ids = self.replace_image_placeholders(input_ids, pixel_values)  # (B, T)
            x = self.embed_tokens(input_ids)  # (B, T, D)
        else:
            assert inputs_embeds is not None
            x = self.embed_pictures(inputs_embeds, pixel_values)  # (B, T, D)
        recomputes = self.gradient_checkpointing and self.training
        if recomputes and cache is not None:
            raise ValueError("gradient checkpointing runs layers twice: pass past_key_values=None")
        past, B, T = 0, x.shape[0], x.shape[1]  # len(x) would be a constant to torch.export
        if cache is None and use_cache and not recomputes:
            cache = KVCache(c, B, dtype=x.dtype, device=x.device)
        if cache is not None:
            cache.check_batch(B)
            past = cache.length
            cache.ids = None if cache.ids is None else cache.ids[:, :past]  # the rest is stale
        packed = position_ids is not None and attention_mask is None and cache is None
        if position_ids is None:
            positions = torch.arange(past, past + T, device=x.device)  # (T,)
            position_ids = (positions if cache_position is None else cache_position)[None]  # (1, T)
        if position_ids.shape not in ((1, T), (B, T)):
            raise ValueError(f"position_ids are {tuple(position_ids.shape)}, but must be (1 or "
                             f"{B}, {T}): one for each new token, none for cached tokens")
        if packed:  # a document begins where a position does not follow the one before it
            begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))  # (B or 1, T)
            if torch.compiler.is_compiling() or begins.any():  # a GPU synchronization
                number = begins.cumsum(-1)  # (B or 1, T)
                attention_mask = number[:, None] == number[:, :, None]  # (B or 1, T, T)
        cos, sin = rotary_table(c, position_ids)  # (B or 1, 1, T, Dh)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        mask = allowed_keys(attention_mask, B, T, past, x.device)  # (B or 1, 1, T, L), or None
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states.append(x if hiddens else None)
            run = partial(checkpoint, layer, use_reentrant=False) if recomputes else layer
            x, weights = run(x, rope, mask, cache, weighs)
            attentions.append(weights)
        if cache is not None:
            cache.length += T  # every layer has written its columns
        x = self.norm(x)
        output = ChameleonOutput(
            last_hidden_state=x, past_key_values=cache,
            hidden_states=(*hidden_states, x) if hiddens else None,
            attentions=tuple(attentions) if weighs else None)
        return output.to_tuple() if plain else output


class ChameleonForConditionalGeneration(ChameleonPreTrainedModel):
    """The decoder with its head. Equals transformers' class of the same name. Weights start random,
    as those of ChameleonModel; `from_pretrained` reads a checkpoint.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # peft asks which, if any

    def __init__(self, config: ChameleonConfig, with_vq_decoder: bool = True) -> None:
        super().__init__(config)
        self.model = ChameleonModel(config, with_vq_decoder)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.apply(self.model.init_weights)
        self.tie_weights()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_tokens(pixel_values)

    def generate(self, *inputs: Tensor, generation_config=None, **options) -> Tensor:
        """generate.py's `generate` under transformers' names: `inputs` are input_ids, too."""
        from chameleon_extras.pretrained import generation_options  # transformers' options
        from generate import generate  # here, as generate.py imports this file

        options = generation_options(generation_config, self.generation_config, **options)
        return generate(self, *inputs, **options)

    def forward(
        self,
        input_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, T); IGNORE counts for nothing
        use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,  # how many last positions, or which; 0: all
        mask_image_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,  # see `_loss`
        cache: KVCache | None = None,
    ) -> "ChameleonOutput | tuple":
        """-> logits (B, T, V) and, with labels, loss. Other arguments as in ChameleonModel.

        `mask_image_logits` sets the logits of the image codes to the lowest number, as in the
        released models and transformers. Turn it off to draw, or to train on pictures.
        Raises ValueError if labels contain image codes while it is on.
        """
        if labels is not None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None and labels.shape != given.shape[:2]:
                raise ValueError(f"labels are {tuple(labels.shape)}, the tokens "
                                 f"{tuple(given.shape[:2])}: give each token a label")
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                raise ValueError("labels need all logits: leave logits_to_keep at 0")
            mark = self.model.vocabulary.image_token_id
            if input_ids is not None and pixel_values is not None:
                # DIFFERS: transformers leaves the placeholder as the label.
                filled = self.model.replace_image_placeholders(input_ids, pixel_values)  # (B, T)
                labels = torch.where(labels == mark, filled, labels)
                input_ids, pixel_values = filled, None
            elif mark is not None:
                refuse((labels == mark).any(), "labels hold <image>: put the pictures' ids there")
        body = self.model(
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache, output_attentions, output_hidden_states, True, cache_position, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(body.last_hidden_state[:, kept])  # (B, T or those kept, V)
        if mask_image_logits:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.index_fill(-1, self.model.vocabulary.code_to_id, lowest)
        loss = None if labels is None else self._loss(
            logits, labels, mask_image_logits, num_items_in_batch)
        output = ChameleonOutput(loss, logits, None, body.past_key_values, body.hidden_states,
                                 body.attentions)
        plain = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if plain else output

    def _loss(self, logits: Tensor, labels: Tensor, masked: bool, n: Tensor | int | None) -> Tensor:
        """Cross entropy of each token given those before it, be it text or image (section 2).

            loss = - 1/n sum_t log softmax(logits[t])[labels[t + 1]]    where labels are not IGNORE

        n: the number of labels that count: in this batch, or as given, in one optimizer step.
        """
        # DIFFERS: transformers returns a loss of 3e38 or inf here, and raises no error.
        if masked:
            refuse(torch.isin(labels, self.model.vocabulary.code_to_id).any(),
                   "labels contain image codes, whose logits are masked: call the model with "
                   "mask_image_logits=False to train on pictures")
        targets = labels[:, 1:].flatten().long()
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE,
                                reduction="sum")
        # DIFFERS: 0, where transformers returns nan, if no label counts.
        return total / ((targets != IGNORE).sum().clamp(min=1) if n is None else n)


# ---------------------------------------------------------------------------------------------
# transformers has all public classes in one module. So `from chameleon import ChameleonProcessor`
# works, too; processor.py and the others are imported at the first use of such a name.

AutoConfig, AutoModel = ChameleonConfig, ChameleonModel
AutoModelForImageTextToText = ChameleonForConditionalGeneration
HOMES = dict.fromkeys((
    "ChameleonProcessor", "ChameleonImageProcessor", "ChameleonImageProcessorPil",
    "ChameleonImageProcessorFast", "AutoProcessor", "AutoImageProcessor"), "processor") | {
    "AutoTokenizer": "tokenizer", "BitsAndBytesConfig": "chameleon_extras.pretrained"}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'chameleon' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
