"""The decoder of Chameleon: one Llama-like transformer over text AND image tokens.

    text ------tokenizer.py-----------> ids --+
    picture --vqvae.py--> codes --names--> ids +--> ids (B,T) --embed--> x (B,T,D)
                                        x --layers--> --norm--> --lm_head--> logits (B,T,V)

    one layer (7B)      h = x + attention(norm(x))        out = h + mlp(norm(h))
    one layer (34B)     h = x + norm(attention(x))        out = h + norm(mlp(h))

Letter  meaning                         7B      config field
B       sequences in the batch
T       new tokens in this call
L       keys: tokens in the cache + T   <=4096  max_position_embeddings
D       width of the residual stream    4096    hidden_size
H, Hkv  query heads, key/value heads    32, 32  num_attention_heads, num_key_value_heads
Dh      width of one head, D / H        128
F       width of the feed-forward       11008   intermediate_size
V       vocabulary: text AND images     65536   vocab_size
S       image tokens per picture        1024    vq_config.codes_per_image
N       pictures over all rows, pixels (N, 3, height, width)

What differs from a plain Llama (https://arxiv.org/abs/2405.09818, section 2.3):
- QK-norm: a LayerNorm on every query and key head, before RoPE (ChameleonLayerNorm says why).
- The 34B model also moves its norms after attention and feed-forward (`swin_norm`), which
  bounds what each block adds to the residual stream.
- Early fusion: the vocabulary holds 8192 image codes beside the text, and nothing below the
  embedding knows which is which. Image tokens are causal like all others, because the same
  next-token objective must also be able to WRITE them one by one.

Parameter names are those of the Hugging Face checkpoint, so its state dict loads without a table.
Attention comes in two forms behind one interface; choose with `model.set_attention(name)`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import ACTIVATIONS, ChameleonConfig
from tokenizer import VocabularyMap
from vqvae import ChameleonVQVAE

QK_NORM_EPS = 1e-5  # fixed in the release, whatever rms_norm_eps says
IGNORE = -100  # a label that counts for nothing, as in torch's cross_entropy


# ---------------------------------------------------------------------------------------------
# Norms and positions


class ChameleonRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)  # cast first, weigh after: as in the release


class ChameleonLayerNorm(nn.Module):
    """QK-norm: LayerNorm over each head, every head with its own weight and bias.

    x (B, T, H, Dh) -> same. Section 2.3: without it, training diverged after 20 % of an epoch.

    Why: softmax does not notice when all its inputs are shifted, so norms can grow slowly until
    bf16 no longer holds them; text and images, sharing all weights, compete by growing. Normed
    queries and keys bound the scores.
    Why before RoPE: a rotation keeps length and so keeps the bound, while a weight and
    bias applied after it would scale the two halves of a pair differently, and q.k would no longer
    depend on the distance of the positions only.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=QK_NORM_EPS)
        return normed * self.weight + self.bias


def rotary_table(config: ChameleonConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids (B, T) -> cos, sin (B, 1, T, Dh), fp32   (RoPE, https://arxiv.org/abs/2104.09864)

        angle(p, i) = p * theta^(-2i / Dh)       i = 0 .. Dh/2 - 1

    Computed anew in each call from the config alone: nothing to store, nothing to round to bf16.
    linear:   p is divided by the factor.
    dynamic:  past max_position_embeddings, theta grows with the highest position, cache included.
    DIFFERS: transformers remembers the longest call so far, so a long prompt changes the answers
    to later ones. Here the table depends on this call's positions only. (As there, keys already
    in a cache keep the theta they were made with.)
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
    """Turns the pair (x_i, x_{i+Dh/2}) by angle(p, i).   x (B, H, T, Dh) -> same

        (a, b) -> (a cos - b sin, b cos + a sin)

    DIFFERS: Meta's own files pair neighbours (x_2i, x_2i+1). Same function, other order of rows
    in q_proj and k_proj; the Hugging Face checkpoint, and so this file, uses halves.
    """
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, Dh/2)
    return x * cos + torch.cat((-b, a), dim=-1) * sin  # (B, H, T, Dh)


# ---------------------------------------------------------------------------------------------
# Attention: who may look at whom, and two ways to compute it


def allowed_keys(attention_mask: Tensor | None, T: int, past: int, device) -> Tensor | None:
    """The ONE mask rule -> bool (B or 1, 1, T, L), True where query t may look at key j, or None.

        allowed[b, t, j] = (j <= past + t) and real[b, j]   or   j == past + t

    The last clause lets padding look at itself: its output is never used, but a row of the
    softmax with nothing in it would be NaN. `attention_mask` is (B, L), 1 for real tokens, or
    (B, T, L) for packed documents that must not see each other. None means "causal, all real"
    when no mask tensor is needed to say so: one query, or no past.
    """
    L = past + T
    if attention_mask is not None and attention_mask.shape[-1] != L:
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns, but there are "
                         f"{L} tokens ({past} cached + {T} new)")
    if attention_mask is not None and attention_mask.ndim == 2 and T > 1 and attention_mask.all():
        attention_mask = None  # the processor always sends a mask; most often nothing is padded
    if attention_mask is None and (T == 1 or past == 0):
        return None
    j = torch.arange(L, device=device)  # (L,)
    t = torch.arange(past, L, device=device)[:, None]  # (T, 1), as places among the keys
    allowed = (j <= t)[None]  # (1, T, L)
    if attention_mask is not None:
        real = attention_mask.bool()
        real = real if real.ndim == 3 else real[:, None]  # (B, T or 1, L)
        allowed = allowed & real | (j == t)  # (B, T, L)
    return allowed[:, None]  # (B or 1, 1, T, L)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """The readable form: softmax(q k^T / sqrt(Dh)) v.

    q (B, H, T, Dh), k and v (B, Hkv, L, Dh), mask as from `allowed_keys`
    -> output (B, H, T, Dh), weights (B, H, T, L)
    """
    T, L = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]  # query heads h*groups .. share kv head h (GQA)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (B, H, L, Dh)
    if mask is None:
        mask = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)  # (T, L)
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, T, L)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights  # (B, H, T, Dh), (B, H, T, L)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch's fused kernels, which never hold the (T, L) weights."""
    causal = mask is None and q.shape[2] > 1  # one query may see every key: nothing to forbid
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True
    )
    return output, None  # (B, H, T, Dh)


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


class KVCache:
    """Keys and values of all past tokens, so that each new token costs one column, not a matrix.

    Allocated once at its full size, (B, Hkv, max_length, Dh) for each layer; `length` columns are
    filled. Memory: 2 * layers * Hkv * Dh * bytes per token = 512 KiB a token for 7B in bf16.
    """

    def __init__(self, config: ChameleonConfig, batch_size: int, max_length: int,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, Hkv, T, Dh) behind the filled columns -> all filled (B, Hkv, L, Dh).

        Writes in place: the views returned now change when a later call overwrites the columns.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {end} are needed: "
                             "make it with a larger max_length")
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]  # (B, Hkv, L, Dh)


class ChameleonAttention(nn.Module):
    """x (B, T, D) -> (B, T, D), weights (B, H, T, L) or None. Equals HF's ChameleonAttention."""

    def __init__(self, c: ChameleonConfig, layer: int) -> None:
        super().__init__()
        D, H, Hkv, Dh = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
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
# Layers and the model


class ChameleonMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))   (B, T, D) -> (B, T, D)"""

    def __init__(self, c: ChameleonConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class ChameleonDecoderLayer(nn.Module):
    """The layer of the 7B model: norms in front (pre-norm, as in Llama)."""

    def __init__(self, c: ChameleonConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = ChameleonAttention(c, layer)
        self.mlp = ChameleonMLP(c)
        self.input_layernorm = ChameleonRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = ChameleonRMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, *attention_arguments) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(self.input_layernorm(x), *attention_arguments)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class ChameleonSwinDecoderLayer(ChameleonDecoderLayer):
    """The layer of the 34B model: norms after the blocks, so that no block can add something huge.

    Same parameters, same names (section 2.3, which takes the order from Swin Transformers).
    """

    def forward(self, x: Tensor, *attention_arguments) -> tuple[Tensor, Tensor | None]:
        y, weights = self.self_attn(x, *attention_arguments)
        x = x + self.input_layernorm(y)
        return x + self.post_attention_layernorm(self.mlp(x)), weights


@dataclass
class ChameleonOutput:
    """What a forward pass gives; a field is None where it was not asked for or does not apply."""

    loss: Tensor | None = None  # scalar, mean over the labels that count
    logits: Tensor | None = None  # (B, T, V), or the last logits_to_keep of T
    last_hidden_state: Tensor | None = None  # (B, T, D), after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # embedding, then each layer; the last normed
    attentions: tuple[Tensor, ...] | None = None  # for each layer (B, H, T, L)


class ChameleonModel(nn.Module):
    """Everything but the head. Equals transformers' ChameleonModel."""

    def __init__(self, config: ChameleonConfig, with_vq_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer_class = ChameleonSwinDecoderLayer if config.swin_norm else ChameleonDecoderLayer
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = ChameleonRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vqmodel = ChameleonVQVAE(config.vq_config, with_vq_decoder)
        self.vocabulary = VocabularyMap(config.vocabulary_map)
        # A copy that follows the weights to their device; names, not numbers, define the ids.
        self.register_buffer("code_to_id", self.vocabulary.code_to_id.clone(), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> "ChameleonModel":
        """The model without its head, of a folder that holds both; options are those of
        ChameleonForConditionalGeneration.from_pretrained.
        """
        return ChameleonForConditionalGeneration.from_pretrained(folder, **options).model

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] (N, 3, height, width) -> vocabulary ids (N, S) in raster order."""
        if not len(self.code_to_id):
            raise ValueError("this config has no vocabulary_map with IMGIMG... names, so pictures "
                             "have no ids: take the config.json of the checkpoint")
        return self.code_to_id[self.vqmodel.encode(pixel_values)]  # (N, S)

    def replace_image_placeholders(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """input_ids (B, T) with `<image>` placeholders -> ids (B, T) with the pictures' own ids.

        Pictures (N, 3, height, width) fill the placeholders in order, row after row. ValueError if
        there are not exactly N * S of them. Feeding the result is the same as feeding pictures.
        """
        image_ids = self.get_image_tokens(pixel_values)  # (N, S)
        if self.vocabulary.image_token_id is None:
            raise ValueError("this vocabulary has no <image>: put the pictures' ids into input_ids")
        here = input_ids == self.vocabulary.image_token_id  # (B, T)
        if here.sum() != image_ids.numel():
            raise ValueError(f"{len(image_ids)} pictures are {image_ids.numel()} image tokens, but "
                             f"the prompt has {here.sum()} <image> placeholders")
        return input_ids.masked_scatter(here, image_ids.to(input_ids.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        pixel_values: Tensor | None = None,  # (N, 3, height, width), N pictures over all rows
        attention_mask: Tensor | None = None,  # (B, L), 1 for real tokens; or bool (B, T, L)
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values: KVCache | None = None,  # filled in place
        inputs_embeds: Tensor | None = None,  # (B, T, D), instead of input_ids
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ChameleonOutput:
        """-> last_hidden_state (B, T, D). Raises ValueError on inputs that do not fit together."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: embeddings have no placeholders")
            input_ids = self.replace_image_placeholders(input_ids, pixel_values)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        past, T = past_key_values.length if past_key_values else 0, x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)[None]  # (1, T)
        cos, sin = rotary_table(self.config, position_ids)  # (B or 1, 1, T, Dh)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        mask = allowed_keys(attention_mask, T, past, x.device)  # (B or 1, 1, T, L), or None
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, rope, mask, past_key_values, output_attentions)
            if output_hidden_states:
                hidden_states.append(x)
            attentions.append(weights)
        if past_key_values is not None:
            past_key_values.length += T  # every layer has written its columns
        x = self.norm(x)
        hidden_states[-1] = x  # transformers, too, gives the last one after the norm
        return ChameleonOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class ChameleonForConditionalGeneration(nn.Module):
    """The decoder with its head. Equals transformers' class of the same name.

    `generate.py` writes with it. Weights start random; `from_pretrained` reads a checkpoint.
    """

    def __init__(self, config: ChameleonConfig, with_vq_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = ChameleonModel(config, with_vq_decoder)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in (self.model.embed_tokens, self.model.layers, self.lm_head):
            module.apply(self._init_weights)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_tokens(pixel_values)

    def set_attention(self, name: str) -> "ChameleonForConditionalGeneration":
        """Chooses "eager" or "sdpa" for all layers; returns the model."""
        if name not in ATTENTION:
            raise ValueError(f"attention {name!r} is none of {', '.join(ATTENTION)}")
        for layer in self.model.layers:
            layer.self_attn.attend = ATTENTION[name]
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B, T); IGNORE counts for nothing
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,  # only the last so many positions get logits; 0 is all
        mask_image_logits: bool = True,
    ) -> ChameleonOutput:
        """-> logits (B, T, V) and, with labels, loss. Other arguments as in ChameleonModel.

        `mask_image_logits` sets the logits of the image codes to the lowest number, as the
        released text models and transformers do; drawing and training need it off.
        Raises ValueError if labels contain image codes while it is on.
        """
        if labels is not None and logits_to_keep:
            raise ValueError("labels need all logits: leave logits_to_keep at 0")
        if pixel_values is not None and input_ids is not None:
            filled = self.model.replace_image_placeholders(input_ids, pixel_values)  # (B, T)
            if labels is not None:  # DIFFERS: transformers leaves the placeholder as the label
                here = labels == self.model.vocabulary.image_token_id
                labels = torch.where(here, filled, labels)
            input_ids, pixel_values = filled, None
        output = self.model(
            input_ids, pixel_values, attention_mask, position_ids, past_key_values,
            inputs_embeds, output_attentions, output_hidden_states,
        )
        x = output.last_hidden_state[:, -logits_to_keep:]  # -0 is 0: all of them
        output.logits = self.lm_head(x)  # (B, T, V)
        if mask_image_logits:
            lowest = torch.finfo(output.logits.dtype).min
            output.logits = output.logits.index_fill(-1, self.model.code_to_id, lowest)
        if labels is not None:
            output.loss = self._loss(output.logits, labels, mask_image_logits)
        return output

    def _loss(self, logits: Tensor, labels: Tensor, masked: bool) -> Tensor:
        """Cross entropy of each token given those before it: logits[t] against labels[t + 1]."""
        # DIFFERS: transformers returns an infinite loss here, without a word.
        if masked and torch.isin(labels, self.model.code_to_id).any():
            raise ValueError("labels contain image codes, whose logits are masked: call the model "
                             "with mask_image_logits=False to train on pictures")
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | str | None = None,
                        device: str | torch.device = "cpu",
                        device_map: str | None = None) -> "ChameleonForConditionalGeneration":
        """Reads a folder in the Hugging Face layout. `dtype` None or "auto" keeps what the file
        holds; the VQ-VAE is fp32 in any case. `device_map` is transformers' word for `device`;
        both know "auto", the fastest there is. ValueError, in one line, says what is wrong.
        """
        from engine.checkpoint import (  # here: checkpoint imports this file
            load_checkpoint,
            pick_device,
        )

        if isinstance(dtype, str):
            name, dtype = dtype, getattr(torch, dtype, None)
            if name != "auto" and not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtype {name!r} is no dtype of torch: say bfloat16, float32 ...")
        return load_checkpoint(cls, Path(folder), dtype, pick_device(device_map or device))

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and safetensors that transformers and `from_pretrained` read."""
        from engine.checkpoint import save_checkpoint

        save_checkpoint(self, Path(folder), max_shard_bytes)
