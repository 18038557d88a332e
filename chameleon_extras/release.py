"""Reads Meta's release and checkpoints of Anole's fork, under Hugging Face's names.

    models/7b/consolidated.00.pth ...  --open_release--> config, {Hugging Face's name: tensor}
    tokenizer/vqgan.ckpt               --open_vqgan----> {Hugging Face's name: tensor} of the VQ-VAE
    tokenizer/text_tokenizer.json    --load_processor--> ChameleonProcessor

Who needs it: whoever has Meta's own files, or a VQ-VAE in a file of its own. `open_checkpoint` of
checkpoint.py calls it for a folder of one of these layouts:

    consolidated*.pth, params.json             one model of Meta's release
    models/7b or models/30b, tokenizer/        the release's root, also GAIR/Anole-7b-v0.1
    *.safetensors, q_norm.weight of one dimension    written by Anole's fork of transformers

`name_table` lists Meta's and Hugging Face's names, and how the P shards of a tensor are joined.

Halves: RoPE rotates pairs of numbers. Meta pairs neighbours (x_2i, x_2i+1); Hugging Face and
chameleon.py pair (x_i, x_i+Dh/2). Putting the even rows of each head before its odd rows turns one
into the other. The vectors of QK-norm act on these rows and move with them. q and k are permuted
alike, so no attention score changes.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chameleon import ChameleonConfig
from chameleon_extras.files import Stored, open_tensors
from processor import ChameleonImageProcessor, ChameleonProcessor
from tokenizer import IMAGE_PLACEHOLDERS, load_tokenizer, read_json
from vqvae import ChameleonVQVAEConfig, whole

VQ_PREFIX = "model.vqmodel."
DECODER_PREFIX = VQ_PREFIX + "decoder."
CODEBOOK = VQ_PREFIX + "quantize.embedding.weight"
VQ_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")

# ---------------------------------------------------------------------------------------------
# How P shards of a tensor are joined. On meta tensors these functions only compute the shape.


def rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)  # (P * rows, columns)


def columns(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (rows, P * columns)


def mean(parts: list[Tensor]) -> Tensor:
    """The mean of P copies of a norm's weight.

    DIFFERS: Meta's code uses each copy in its own shard, and training may have let them drift
    apart. One model has room for one, and takes the mean, as transformers' converter does.
    """
    # In float64 such sums are exact, so the mean of equal numbers is that number.
    return torch.stack(parts).double().mean(dim=0).to(parts[0].dtype)  # (D,)


def halves(parts: list[Tensor], head_dim: int) -> Tensor:
    """Joins rows and reorders those of each head, 0 1 2 3 .. to 0 2 .. 1 3 ..   -> (H Dh, D)"""
    joined = rows(parts)  # (H Dh, D)
    paired = joined.unflatten(0, (-1, head_dim // 2, 2))  # (H, Dh/2, 2, D)
    return paired.transpose(1, 2).reshape(joined.shape)  # (H Dh, D)


def every_head(parts: list[Tensor], heads: int) -> Tensor:
    """P vectors (Dh,) -> (heads, Dh), in the order of `halves`. A shard's heads share one."""
    vectors = torch.stack(parts)  # (P, Dh)
    vectors = vectors.unflatten(1, (-1, 2)).mT.flatten(1)  # (P, 2, Dh/2) -> (P, Dh)
    return vectors.repeat_interleave(heads // len(parts), dim=0)  # (heads, Dh)


def join_stored(parts: list[Stored], join: Callable) -> Stored:
    """P shards on disk -> one tensor, joined when read. RuntimeError or IndexError: no fit."""
    shape = join([torch.empty(part.shape, device="meta") for part in parts]).shape
    return Stored(tuple(shape), parts[0].dtype, lambda: join([part.read() for part in parts]))


def name_table(c: ChameleonConfig) -> dict[str, tuple[str, Callable]]:
    """{Hugging Face's name: (Meta's name, function that joins its shards)} of the decoder.

    In comments: the shape in each of the P shards, with the letters of chameleon.py.
    """
    turn = partial(halves, head_dim=c.head_dim)
    q_heads = partial(every_head, heads=c.num_attention_heads)
    k_heads = partial(every_head, heads=c.num_key_value_heads)
    layer = {
        "self_attn.q_proj.weight": ("attention.wq.weight", turn),  # (H Dh/P, D)
        "self_attn.k_proj.weight": ("attention.wk.weight", turn),  # (Hkv Dh/P, D)
        "self_attn.v_proj.weight": ("attention.wv.weight", rows),  # (Hkv Dh/P, D)
        "self_attn.o_proj.weight": ("attention.wo.weight", columns),  # (D, H Dh/P)
        "self_attn.q_norm.weight": ("attention.q_normalization.weight", q_heads),  # (Dh,)
        "self_attn.q_norm.bias": ("attention.q_normalization.bias", q_heads),
        "self_attn.k_norm.weight": ("attention.k_normalization.weight", k_heads),
        "self_attn.k_norm.bias": ("attention.k_normalization.bias", k_heads),
        "mlp.gate_proj.weight": ("feed_forward.w1.weight", rows),  # (F/P, D)
        "mlp.up_proj.weight": ("feed_forward.w3.weight", rows),  # (F/P, D)
        "mlp.down_proj.weight": ("feed_forward.w2.weight", columns),  # (D, F/P)
        "input_layernorm.weight": ("attention_norm.weight", mean),  # (D,)
        "post_attention_layernorm.weight": ("ffn_norm.weight", mean),  # (D,)
    }
    table = {"model.embed_tokens.weight": ("tok_embeddings.weight", columns)}  # shape: (V, D/P)
    for n in range(c.num_hidden_layers):
        for ours, (metas, join) in layer.items():
            table[f"model.layers.{n}.{ours}"] = (f"layers.{n}.{metas}", join)
    table["model.norm.weight"] = ("norm.weight", mean)
    table["lm_head.weight"] = ("output.weight", rows)  # shape: (V/P, D)
    return table


# ---------------------------------------------------------------------------------------------
# Meta's release


def find_release(folder: Path) -> Path | None:
    """The folder with consolidated*.pth: `folder` itself, or the only one in its models/.

    None if `folder` has another layout. ValueError if it holds more than one model.
    """
    def is_model(path: Path) -> bool:
        return (path / "params.json").is_file() or any(path.glob("consolidated*.pth"))

    if is_model(folder):
        return folder
    if (folder / "config.json").is_file():
        return None
    found = sorted(path for path in folder.glob("models/*") if is_model(path))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} models: name one of them, "
                         f"{' or '.join(map(str, found))}")
    return found[0] if found else None


def tokenizer_folder(release: Path) -> Path:
    """The folder tokenizer/, which is beside models/. ValueError if there is none."""
    places = [folder / "tokenizer" for folder in (release, *release.absolute().parents[:2])]
    for place in places:
        if (place / "text_tokenizer.json").is_file():
            return place
    raise ValueError(f"{release} has no tokenizer: put Meta's tokenizer/ (text_tokenizer.json, "
                     f"vqgan.ckpt, vqgan.yaml) at {places[-1]}")


def read_params(release: Path) -> dict:
    """params.json, updated by its "model" part and then by consolidate_params.json. ValueError."""
    if not (release / "params.json").is_file():
        raise ValueError(f"{release} lacks params.json: download it again")
    params = {}
    for file in (release / "params.json", release / "consolidate_params.json"):
        values = read_json(file) if file.is_file() else {}
        model = values.get("model")
        params |= values | (model if isinstance(model, dict) else {})
    missing = [name for name in ("dim", "n_layers", "n_heads", "swin_norm") if name not in params]
    if missing:
        raise ValueError(f"{release / 'params.json'} lacks {', '.join(missing)}")
    if not params.get("qk_normalization", True):
        raise ValueError(f"{release / 'params.json'}: qk_normalization is off: Chameleon has it on")
    return params


def load_shards(release: Path, params: dict) -> list[dict[str, Stored]]:
    """All P consolidated*.pth in order. ValueError names those that are missing."""
    found = sorted(path.name for path in release.glob("consolidated*.pth"))
    P = params.get("model_parallel_size") or len(found) or 1
    if not whole(1, 256)(P):
        raise ValueError(f"{release}: model_parallel_size {P!r:.80} of the params is no whole "
                         "number from 1 to 256")
    wanted = [f"consolidated.{n:02}.pth" for n in range(P)]
    if P == 1 and found != wanted:
        wanted = ["consolidated.pth"]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{release} lacks {', '.join(missing)}: download it again")
    if len(found) > P:
        raise ValueError(f"{release} has {len(found)} shards, but its params say "
                         f"model_parallel_size {P}: {', '.join(found)}")
    return [open_tensors(release / name) for name in wanted]


def release_config(release: Path, params: dict, shards: list[dict], vq: dict) -> ChameleonConfig:
    """The sizes in params.json, and those that only the tensors' shapes tell (F, V). ValueError."""
    names = dict(load_tokenizer(tokenizer_folder(release)).vocab)
    if IMAGE_PLACEHOLDERS[1] in names:  # Meta's name for <image>
        names[IMAGE_PLACEHOLDERS[0]] = names.pop(IMAGE_PLACEHOLDERS[1])
    try:
        V = shards[0]["tok_embeddings.weight"].shape[0]
        F = shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(shards)
    except KeyError as e:
        raise ValueError(f"{release}: the first shard has no tensor {e}") from None
    except IndexError:
        raise ValueError(f"{release}: a matrix of the first shard is a single number") from None
    if params.get("vocab_size", -1) not in (-1, V):
        raise ValueError(f"{release}: params.json says vocab_size {params['vocab_size']}, "
                         f"but tok_embeddings has {V} rows")
    try:
        c = ChameleonConfig(
            vocab_size=V, hidden_size=params["dim"], intermediate_size=F,
            num_hidden_layers=params["n_layers"], num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads"), rms_norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 10000.0), swin_norm=params["swin_norm"],
            model_parallel_size=len(shards), vq_config=vq_config(release, vq),
            vocabulary_map=names, bos_token_id=names.get("<s>"), pad_token_id=names.get("<pad>"),
            eos_token_id=names.get("</s>"))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{release / 'params.json'} cannot be used: {e}") from None
    if c.num_key_value_heads % len(shards):
        raise ValueError(f"{release}: {len(shards)} shards cannot share {c.num_key_value_heads} "
                         "key/value heads (n_kv_heads): params.json is another model's")
    return c


def vq_config(release: Path, state: dict[str, Stored]) -> ChameleonVQVAEConfig:
    """The sizes of a VQGAN, from the shapes of its tensors; `resolution` is in vqgan.yaml."""
    file = tokenizer_folder(release) / "vqgan.yaml"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    written = re.search(r"^\s*resolution:\s*(\d+)", text, re.MULTILINE)
    resolution = int(written[1]) if written else ChameleonVQVAEConfig.resolution
    shapes = {name.removeprefix(VQ_PREFIX): tensor.shape for name, tensor in state.items()}

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    try:
        base, in_channels = shapes["encoder.conv_in.weight"][:2]
        levels = range(count(r"encoder\.down\.(\d+)\."))
        K, E = shapes["quantize.embedding.weight"]
        latent = shapes["post_quant_conv.weight"][0]
        widths = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in levels]
        return ChameleonVQVAEConfig(
            embed_dim=E, num_embeddings=K, latent_channels=latent, resolution=resolution,
            double_latent=shapes["encoder.conv_out.weight"][0] == 2 * latent,
            in_channels=in_channels, base_channels=base,
            channel_multiplier=[width // base for width in widths],
            num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            attn_resolutions=[resolution // 2**level for level in levels
                              if f"encoder.down.{level}.attn.0.q.weight" in shapes] or None,
            attn_type="vanilla" if "encoder.mid.attn_1.q.weight" in shapes else "none")
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as e:
        raise ValueError(f"the VQ-VAE of {file.parent} cannot be used: {e}") from None


def open_release(release: Path) -> tuple[ChameleonConfig, dict[str, Stored]]:
    """Meta's files -> config, and {Hugging Face's name: tensor, joined when read}. ValueError."""
    vq = open_vqgan(tokenizer_folder(release) / "vqgan.ckpt")
    params = read_params(release)
    shards = load_shards(release, params)
    config = release_config(release, params, shards, vq)
    tensors = {}
    for ours, (metas, join) in name_table(config).items():
        parts = [shard.pop(metas, None) for shard in shards]
        if None in parts:
            raise ValueError(f"{release}: a shard lacks {metas}, which params.json implies")
        try:
            tensors[ours] = join_stored(parts, join)
        except (RuntimeError, IndexError):
            sizes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(f"{release}: {metas} of {sizes} does not fit params.json") from None
    if unknown := set().union(*shards) - {"rope.freqs"}:
        raise ValueError(f"{release}: params.json does not imply {len(unknown)} of the tensors, as "
                         f"{min(unknown)}: they do not belong together")
    return config, tensors | vq


# ---------------------------------------------------------------------------------------------
# The VQ-VAE of another file, and Anole's fork


def open_vqgan(path: Path) -> dict[str, Stored]:
    """vqgan.ckpt, or safetensors with a VQ-VAE -> its tensors. Others, as loss.*, are left out."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a directory, a pipe or a device: name a file")
    found = {name.removeprefix(VQ_PREFIX): tensor for name, tensor in open_tensors(path).items()}
    tensors = {VQ_PREFIX + n: t for n, t in found.items() if n.startswith(VQ_PARTS)}
    if not tensors:
        raise ValueError(f"{path} holds no VQ-VAE: give Meta's tokenizer/vqgan.ckpt")
    return tensors


def with_vqgan(tensors: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """A model's tensors, with the VQ-VAE of another file in place of their own.

    The whole VQ-VAE is replaced, not only its decoder: Hugging Face's files round the encoder to
    bf16, which changes 1.6 % of a picture's codes. ValueError if the codebooks differ by more than
    that rounding, because the ids would then mean other pictures.
    """
    new = open_vqgan(path)
    if not any(name.startswith(DECODER_PREFIX) for name in new):
        raise ValueError(f"{path} has no VQ-VAE decoder: give Meta's tokenizer/vqgan.ckpt")
    if CODEBOOK in new and CODEBOOK in tensors:
        a, b = tensors[CODEBOOK].read().float().cpu(), new[CODEBOOK].read().float().cpu()  # (K, E)
        if a.shape != b.shape or not torch.allclose(a, b, rtol=2**-7, atol=1e-6):
            raise ValueError(f"{path} is the VQ-VAE of another model: its codebook has other "
                             f"numbers than this model's, {list(b.shape)} and {list(a.shape)}")
    return tensors | new


def pairs_to_halves(c: ChameleonConfig, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors of Anole's fork -> transformers' order of rows; those of others -> unchanged.

    The fork keeps Meta's order of rows under Hugging Face's names. Its QK-norm shows it: one vector
    (Dh,) for all heads, where transformers has (H, Dh).
    DIFFERS: a fork's file with (H, Dh) would be read in transformers' order. Nothing tells the two
    apart.
    """
    norm = tensors.get("model.layers.0.self_attn.q_norm.weight")
    if norm is None or norm.shape != (c.head_dim,):
        return tensors
    tensors = dict(tensors)
    for name, (_, join) in name_table(c).items():
        # What is missing, or of a wrong shape, stays like that: check_tensors will report it.
        with suppress(KeyError, RuntimeError, IndexError):
            tensors[name] = join_stored([tensors[name]], join)  # as if it were the only shard
    return tensors


def load_processor(folder: Path) -> ChameleonProcessor:
    """As ChameleonProcessor.from_pretrained, of Meta's release too, which has no file for it."""
    release = find_release(folder)
    if release is None:
        return ChameleonProcessor.from_pretrained(folder)
    place = tokenizer_folder(release)
    c = vq_config(release, open_vqgan(place / "vqgan.ckpt"))
    images = ChameleonImageProcessor(size=c.resolution, crop_size=c.resolution)
    return ChameleonProcessor(images, load_tokenizer(place), c.codes_per_image)
