"""Meta's layout and Anole's: the same function as computed from Meta's own files, and clear errors.

The releases are gated, so the test writes its own: true names, true shards, small sizes.
"""

import copy
import json
import os
import re
import shutil
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SIZES, VQ, K, randomize, scrambled_vocabulary
from synthetic import write_synthetic_tokenizer

import generate
from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras import convert as module
from chameleon_extras import release
from chameleon_extras.checkpoint import Stored, load_checkpoint, write_checkpoint
from chameleon_extras.quantize import KINDS, quantize_model
from processor import ChameleonProcessor
from tokenizer import load_tokenizer
from vqvae import ChameleonVQVAE, ChameleonVQVAEConfig

ROOT = Path(__file__).resolve().parent.parent
LAYERS, D, F, EPS, THETA = 2, 64, 128, 1e-5, 10000.0
SMALL = {  # the two releases in small: heads, kv heads, shards, order of norms
    "7b": dict(heads=4, kv=4, shards=1, swin=False),
    "30b": dict(heads=8, kv=4, shards=4, swin=True),
}
YAML = """model:
  base_learning_rate: 4.5e-06
  target: vqgan.VQModel
  params:
    embed_dim: 16
    ddconfig:
      z_channels: 24
      resolution: 32
      attn_resolutions: []
"""


def load(folder: Path, **options) -> ChameleonForConditionalGeneration:
    return ChameleonForConditionalGeneration.from_pretrained(folder, **options)


def meta_shards(V: int, heads: int, kv: int, shards: int, swin: bool) -> list[dict]:
    """Random tensors as in consolidated.NN.pth; norms of the whole width are equal in all."""
    g, P, k = torch.Generator().manual_seed(0), shards, D // heads
    matrix = lambda *shape: torch.randn(shape, generator=g) * 1.5 * D**-0.5  # noqa: E731
    vector = lambda n: 1 + 0.3 * torch.randn(n, generator=g)  # noqa: E731
    # Meta's file holds the frequencies of the rotation, Anole's None in their place.
    whole = {"norm.weight": vector(D), "rope.freqs": None if P > 1 else torch.ones(k // 2)}
    for n in range(LAYERS):
        for name in ("attention_norm", "ffn_norm"):
            whole[f"layers.{n}.{name}.weight"] = vector(D)
    made = []
    for _ in range(P):
        shard = {"tok_embeddings.weight": matrix(V, D // P) * 8, "output.weight": matrix(V // P, D)}
        for n in range(LAYERS):
            layer = {
                "attention.wq.weight": matrix(heads * k // P, D),
                "attention.wk.weight": matrix(kv * k // P, D),
                "attention.wv.weight": matrix(kv * k // P, D),
                "attention.wo.weight": matrix(D, heads * k // P),
                "feed_forward.w1.weight": matrix(F // P, D),
                "feed_forward.w3.weight": matrix(F // P, D),
                "feed_forward.w2.weight": matrix(D, F // P),
            }
            for x in "qk":
                layer[f"attention.{x}_normalization.weight"] = vector(k)
                layer[f"attention.{x}_normalization.bias"] = vector(k) - 1
            shard |= {f"layers.{n}.{name}": tensor for name, tensor in layer.items()}
        made.append(shard | copy.deepcopy(whole))
    return made


def write_vqgan(path: Path) -> dict:
    torch.manual_seed(1)
    vq = ChameleonVQVAE(ChameleonVQVAEConfig.from_dict(VQ))
    randomize(vq, seed=1)
    state = dict(vq.state_dict())
    torch.save({"state_dict": state | {"loss.discriminator.weight": torch.ones(3)}}, path)
    return state


def write_release(root: Path, *sizes: str) -> None:
    """Meta's folders: tokenizer/ beside models/7b, models/30b."""
    # With more merges the small corpus has "IMGIMG" as a word, a picture's code to transformers.
    write_synthetic_tokenizer(root / "tokenizer", K, num_merges=20, shuffled_codes=True, meta=True)
    write_vqgan(root / "tokenizer" / "vqgan.ckpt")
    (root / "tokenizer" / "vqgan.yaml").write_text(YAML)
    V = -(-load_tokenizer(root).vocab_size // 4) * 4  # four shards share it
    for size in sizes:
        s, folder = SMALL[size], root / "models" / size
        folder.mkdir(parents=True)
        names = ["consolidated.pth"]
        if s["shards"] > 1:
            names = [f"consolidated.{n:02}.pth" for n in range(s["shards"])]
        for name, shard in zip(names, meta_shards(V, **s)):
            torch.save(shard, folder / name)
        model = dict(dim=D, n_layers=LAYERS, n_heads=s["heads"], norm_eps=EPS, rope_theta=THETA,
                     qk_normalization=True, swin_norm=s["swin"], vocab_size=V)
        model |= {} if s["kv"] == s["heads"] else {"n_kv_heads": s["kv"]}
        params = {"model_parallel_size": 8, "model": model}  # as trained; then consolidated
        (folder / "params.json").write_text(json.dumps(params))
        consolidated = json.dumps({"model_parallel_size": s["shards"]})
        (folder / "consolidate_params.json").write_text(consolidated)
        (folder / "config.json").write_text('{"model_type": "something"}')  # GAIR/Anole has one


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{size: root of a release with this one model}; not to be written to."""
    roots = {size: tmp_path_factory.mktemp(size) for size in SMALL}
    for size, root in roots.items():
        write_release(root, size)
    return roots


@pytest.fixture(scope="module")
def converted(releases, tmp_path_factory):
    folders = {size: tmp_path_factory.mktemp("hf") / size for size in releases}
    for size, folder in folders.items():
        module.convert(releases[size], folder, max_shard_bytes=100_000)
    return folders


@pytest.fixture
def root(releases, tmp_path):
    """A release to break."""
    return shutil.copytree(releases["30b"], tmp_path / "release")


def meta_logits(shards: list[dict], size: str, ids: torch.Tensor) -> torch.Tensor:
    """ids (T,) -> logits (T, V) in Meta's own layout, every shard on its own, in float64.

    Neighbours are rotated as complex numbers; partial results are summed or laid side by side.
    """
    s = SMALL[size]
    P, k, T = s["shards"], D // s["heads"], len(ids)
    shards = [{name: tensor.double() for name, tensor in shard.items() if name != "rope.freqs"}
              for shard in shards]
    frequency = THETA ** (-torch.arange(0, k, 2).double() / k)  # (k/2,)
    turns = torch.polar(torch.ones(T, k // 2).double(), torch.outer(torch.arange(T), frequency))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def heads(x, shard, name, count, w):  # (T, D) -> normed and rotated (T, count, k)
        x = (x @ w.T).view(T, count, k)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * shard[f"{name}_normalization.weight"] + shard[f"{name}_normalization.bias"]
        pairs = torch.view_as_complex(x.view(T, count, k // 2, 2)) * turns[:, None]
        return torch.view_as_real(pairs).flatten(2)

    def attention(x, shard):
        q = heads(x, shard, "attention.q", s["heads"] // P, shard["attention.wq.weight"])
        key = heads(x, shard, "attention.k", s["kv"] // P, shard["attention.wk.weight"])
        v = (x @ shard["attention.wv.weight"].T).view(T, s["kv"] // P, k)
        outputs, group = [], s["heads"] // s["kv"]
        for h in range(s["heads"] // P):
            scores = q[:, h] @ key[:, h // group].T / k**0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outputs.append(weights @ v[:, h // group])
        return torch.cat(outputs, -1) @ shard["attention.wo.weight"].T

    def feed_forward(x, shard):
        gate = torch.nn.functional.silu(x @ shard["feed_forward.w1.weight"].T)
        up = x @ shard["feed_forward.w3.weight"].T
        return (gate * up) @ shard["feed_forward.w2.weight"].T

    x = torch.cat([shard["tok_embeddings.weight"][ids] for shard in shards], -1)
    for n in range(LAYERS):
        cut = len(f"layers.{n}.")
        parts = [{m[cut:]: t for m, t in shard.items() if m.startswith(f"layers.{n}.")}
                 for shard in shards]
        for block, norm in ((attention, "attention_norm"), (feed_forward, "ffn_norm")):
            weight = parts[0][f"{norm}.weight"]
            if s["swin"]:
                x = x + rms(sum(block(x, part) for part in parts), weight)
            else:
                x = x + sum(block(rms(x, weight), part) for part in parts)
    x = rms(x, shards[0]["norm.weight"])
    return torch.cat([x @ shard["output.weight"].T for shard in shards], -1)


def some_ids(folder: Path) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, load_tokenizer(folder).vocab_size, (40,), generator=g)


@pytest.mark.parametrize("size", SMALL)
def test_logits_are_those_computed_in_metas_own_layout(releases, converted, size):
    ids = some_ids(releases[size])
    shards = [torch.load(path) for path in sorted(releases[size].glob("models/*/*.pth"))]
    expected = meta_logits(shards, size, ids).float()
    assert expected.std() > 0.3
    for folder in (releases[size], releases[size] / "models" / size, converted[size]):
        model = load(folder)
        with torch.no_grad():
            logits = model(ids[None], mask_image_logits=False).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SMALL)
def test_transformers_loads_what_is_converted(converted, size):
    assert len(list(converted[size].glob("*.safetensors"))) > 3
    assert not list(converted[size].glob("*.part"))
    theirs, report = transformers.ChameleonForConditionalGeneration.from_pretrained(
        converted[size], output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(".vqmodel.decoder." in name for name in report["unexpected_keys"])
    ids = some_ids(converted[size])[None]
    ours = load(converted[size])
    with torch.no_grad():
        a, b = ours(ids).logits, theirs.eval()(ids).logits
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
        pixels = torch.rand(1, 3, 32, 32) * 2 - 1
        assert torch.equal(ours.get_image_tokens(pixels), theirs.model.get_image_tokens(pixels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SMALL)
def test_a_release_is_quantized_while_it_is_joined(releases, converted, tmp_path, size, kind):
    expected = quantize_model(load(converted[size]), kind).state_dict()
    module.convert(releases[size], tmp_path / "q", quantize=kind)
    quantized = load_checkpoint(
        ChameleonForConditionalGeneration, releases[size], None, "cpu", quantize=kind)
    for model in (quantized, load(tmp_path / "q")):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in state.items())


def test_pictures_go_through_the_vqvae_of_the_release(releases):
    vq = ChameleonVQVAE(ChameleonVQVAEConfig.from_dict(VQ))
    state = torch.load(releases["7b"] / "tokenizer" / "vqgan.ckpt")["state_dict"]
    vq.load_state_dict({n: t for n, t in state.items() if not n.startswith("loss.")})
    model = load(releases["7b"])
    assert model.config.vq_config == ChameleonVQVAEConfig.from_dict(VQ)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        codes = vq.encode(pixels)
        assert torch.equal(model.model.vqmodel.encode(pixels), codes)
        assert torch.equal(model.model.vqmodel.decode(codes), vq.decode(codes))


def test_sizes_of_any_vqgan_are_told_by_its_tensors(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "text_tokenizer.json").write_text("{}")
    for change in (dict(attn_resolutions=(16,)), dict(double_latent=True), dict(attn_type="none"),
                   dict(num_res_blocks=1, channel_multiplier=(1, 2)), dict(in_channels=1)):
        c = ChameleonVQVAEConfig.from_dict(VQ | dict(resolution=64) | change)
        yaml = f"a:\n  resolution: {c.resolution}\n"
        (tmp_path / "tokenizer" / "vqgan.yaml").write_text(yaml)
        assert release.vq_config(tmp_path, ChameleonVQVAE(c).state_dict()) == c


def test_norms_that_drifted_apart_are_averaged_and_equal_ones_kept():
    a, b = torch.randn(2, 64).bfloat16()
    assert torch.equal(release.mean([a, b]), ((a.float() + b.float()) / 2).bfloat16())
    assert torch.equal(release.mean([a] * 3), a) and torch.equal(release.mean([a.float()] * 7), a)


def test_numbers_and_special_ids_of_the_release_are_those_of_its_files(root):
    change_model(root, norm_eps=1e-6, rope_theta=5e5)
    config, vocab = release.open_release(root / "models" / "30b")[0], load_tokenizer(root).vocab
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 5e5)
    assert config.model_parallel_size == 4
    assert [config.bos_token_id, config.pad_token_id, config.eos_token_id] == [
        vocab[name] for name in ("<s>", "<pad>", "</s>")]


def test_what_the_params_leave_out_is_as_meta_has_it(releases, tmp_path):
    """One shard is consolidated.00.pth, too; vocab_size -1 is that of the tokenizer."""
    root = shutil.copytree(releases["7b"], tmp_path / "release")
    folder = root / "models" / "7b"
    for name in ("consolidate_params.json", "config.json"):
        (folder / name).unlink()
    expected = release.open_release(releases["7b"] / "models" / "7b")
    (folder / "consolidated.pth").rename(folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(dict(
        dim=D, n_layers=LAYERS, n_heads=4, swin_norm=True, vocab_size=-1,
        model=dict(swin_norm=False))))  # what describes the model itself holds
    config, tensors = release.open_release(folder)
    assert config == expected[0] and tensors.keys() == expected[1].keys()
    (root / "tokenizer" / "vqgan.yaml").unlink()
    assert release.vq_config(folder, release.open_vqgan(root / "tokenizer" / "vqgan.ckpt")
                             ).resolution == 512


def test_shards_that_no_params_count_are_those_that_are_there(root):
    folder = root / "models" / "30b"
    expected = release.open_release(folder)[0]
    (folder / "consolidate_params.json").unlink()
    model = json.loads((folder / "params.json").read_text())["model"]
    (folder / "params.json").write_text(json.dumps(model))
    assert release.open_release(folder)[0] == expected


def test_a_release_is_found_from_inside_and_with_its_tokenizer_in_it(root, monkeypatch):
    monkeypatch.chdir(root / "models" / "30b")
    assert release.tokenizer_folder(Path(".")).samefile(root / "tokenizer")
    (root / "tokenizer").rename(root / "models" / "30b" / "tokenizer")
    assert load(Path(".")).config.num_attention_heads == SMALL["30b"]["heads"]


def test_every_shard_has_its_own_qk_norm(releases, converted):
    shards = [torch.load(path) for path in sorted(releases["30b"].glob("models/*/*.pth"))]
    weight = load(converted["30b"]).model.layers[1].self_attn.q_norm.weight  # (8, 8)
    for head in range(8):
        vector = shards[head // 2]["layers.1.attention.q_normalization.weight"]
        assert torch.equal(weight[head], torch.cat((vector[0::2], vector[1::2])))


# --- tokenizer and processor


TEXTS = ["Hello  world\n\tit's 42%", "Führer Việt 日本 🎨", "a", "    indented  twice "]


def test_transformers_tokenizer_of_a_converted_folder_gives_our_ids(releases, converted):
    ours = load_tokenizer(releases["7b"])
    theirs = transformers.AutoTokenizer.from_pretrained(converted["7b"])
    for text in TEXTS:
        ids = [ours.bos_token_id, *ours.text_ids(text)]
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    again = load_tokenizer(converted["7b"])
    assert again.image_token_id == ours.image_token_id == theirs.convert_tokens_to_ids("<image>")
    assert again.vocab.items() - ours.vocab.items() == {("<image>", ours.image_token_id)}
    assert len(theirs) == ours.vocab_size


def test_transformers_processor_of_a_converted_folder_gives_our_inputs(releases, converted):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    theirs = transformers.AutoProcessor.from_pretrained(converted["7b"])
    b = theirs(text="See <image>: what?", images=picture, return_tensors="pt")
    for ours in (ChameleonProcessor.from_pretrained(converted["7b"]),
                 release.load_processor(releases["7b"])):
        a = ours(text="See <image>: what?", images=picture)
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert (a["input_ids"] == load(converted["7b"]).model.vocabulary.image_token_id).sum() == 64
        torch.testing.assert_close(a["pixel_values"], b["pixel_values"], atol=0.02, rtol=0)
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(converted["7b"]).eval()
    with torch.no_grad():  # it knows the placeholder by its name in config.json
        logits = load(converted["7b"])(**b).logits
        torch.testing.assert_close(logits, model(**b).logits, atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def tiny_for_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    module.convert(ROOT / "tiny", folder)
    return folder


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["A small", " red", "circle", "  ", " ", "\n", "4", "17", "é", "日本",
                              "?", ".", "purple", "🎨", "tri", "angle", "x"]), max_size=12
             ).map("".join)))
def test_transformers_gives_our_ids_for_a_sentencepiece_model(tiny_for_transformers, text):
    ours, theirs = load_tokenizer(ROOT / "tiny"), tokenizer_of(tiny_for_transformers)
    text = text.replace("\u2581", "")  # the sign for a space, which transformers takes for one
    ids = [ours.bos_token_id, *ours.text_ids(text)]
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


@cache
def tokenizer_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_processor_gives_our_inputs_for_tiny(tiny_for_transformers):
    theirs = transformers.AutoProcessor.from_pretrained(tiny_for_transformers)
    picture = Image.open(ROOT / "examples" / "shapes.png")
    inputs = dict(text=["What is this?<image>", "How many shapes are in this image?<image>"],
                  images=[picture, picture], padding=True, return_tensors="pt")
    b = theirs(**inputs)
    for folder in (ROOT / "tiny", tiny_for_transformers):
        a = ChameleonProcessor.from_pretrained(folder)(**inputs)
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["attention_mask"], b["attention_mask"])
        torch.testing.assert_close(a["pixel_values"], b["pixel_values"], atol=1e-6, rtol=0)


# --- Hugging Face's folders


def hf_model(decoder: bool = True, dtype: torch.dtype = torch.float32, **changes):
    values = SIZES | dict(vq_config=VQ, vocabulary_map=scrambled_vocabulary()) | changes
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values), decoder)
    randomize(model)
    return model.to(dtype).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_hugging_face_to_ours_to_hugging_face_is_bit_identical(tmp_path, size, dtype):
    theirs = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(
        **SIZES, vq_config=VQ, vocabulary_map=scrambled_vocabulary())).to(dtype)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    write_synthetic_tokenizer(tmp_path / "a", num_codes=K)
    assert module.main([str(tmp_path / "a"), str(tmp_path / "b"), "--shard-size", size]) == 0
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype == dtype and torch.equal(a[n], b[n]) for n in a)
    files = len(list((tmp_path / "b").glob("*.safetensors")))
    assert files == 1 if size == "1GB" else files > 10
    one, two = (tmp_path / x / "tokenizer.json" for x in "ab")
    assert one.read_bytes() == two.read_bytes()
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert again.dtype == dtype
    expected = theirs.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())


def test_shards_are_no_larger_than_asked_for_unless_one_tensor_is(converted):
    for path in converted["30b"].glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(sizes) <= 100_000 or len(sizes) == 1


def test_a_folder_of_hugging_face_that_also_holds_metas_files_is_hugging_faces(releases, tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path)
    shutil.copytree(releases["7b"] / "models", tmp_path / "models")
    assert load(tmp_path).config == model.config


def test_tied_embeddings_stay_tied(tmp_path):
    model = hf_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "a")
    module.convert(tmp_path / "a", tmp_path / "b")
    assert "lm_head.weight" not in tensors_of(tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_memory_holds_the_tensors_of_one_file_at_a_time(tmp_path):
    made, alive = [], []

    def read():
        tensor = torch.ones(1000)
        made.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in made))
        return tensor

    names = ["model.embed_tokens.weight", *map(str, range(9))]
    tensors = {name: Stored((1000,), torch.float32, read) for name in names}
    write_checkpoint(tmp_path, ChameleonConfig(), tensors, max_shard_bytes=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5 and max(alive) == 2


def fork_of(model: ChameleonForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A model's tensors as Anole's fork would hold them: pairs, and one QK-norm for all heads."""
    tensors, k = {}, model.config.head_dim
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            p = p.view(-1, 2, k // 2, p.shape[1]).transpose(1, 2).reshape(p.shape)
        elif "q_norm" in name or "k_norm" in name:
            p = p[0].view(2, k // 2).T.flatten()
        tensors[name] = p.detach().clone()
    return tensors


def test_anoles_fork_is_known_by_its_norms_and_turned_round(tmp_path):
    model = hf_model(num_key_value_heads=2)
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            for p in (norm.weight, norm.bias):
                p.data[:] = p.data[0].clone()  # the fork has one for all heads
    model.save_pretrained(tmp_path / "fork")
    save_file(fork_of(model), tmp_path / "fork" / "model.safetensors", metadata={"format": "pt"})
    again = load(tmp_path / "fork").state_dict()
    assert all(torch.equal(t, again[n]) for n, t in model.state_dict().items())
    module.convert(tmp_path / "fork", tmp_path / "hf")
    assert all(torch.equal(t, again[n]) for n, t in tensors_of(tmp_path / "hf").items())


def test_a_fork_that_is_misshapen_is_one_clear_line(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "fork")
    tensors = fork_of(model)
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "fork" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_norm\.weight is \[7\]"):
        load(tmp_path / "fork")


# --- --vqgan


def load_with(folder: Path, vqgan: Path) -> ChameleonForConditionalGeneration:
    return load_checkpoint(ChameleonForConditionalGeneration, folder, None, "cpu", vqgan)


@pytest.mark.parametrize("kind", ["ckpt", "whole model", "decoder alone", "VQ-VAE alone"])
def test_vqgan_lets_a_checkpoint_without_decoder_draw(tmp_path, kind):
    whole = hf_model()
    state = {n: p.detach().clone() for n, p in whole.named_parameters()}
    vq = {n: p for n, p in state.items() if "vqmodel" in n}
    file = tmp_path / ("vqgan.ckpt" if kind == "ckpt" else "vq.safetensors")
    short = {n.removeprefix("model.vqmodel."): p for n, p in vq.items()}
    if kind == "ckpt":
        torch.save({"state_dict": short | {"loss.x": torch.ones(2)}}, file)
    else:
        save_file({"whole model": state, "VQ-VAE alone": short,
                   "decoder alone": {n: p for n, p in vq.items() if ".decoder." in n}}[kind], file)
    without = hf_model(decoder=False)
    without.load_state_dict(state, strict=False)
    # As published, the VQ-VAE is rounded to bf16: the file's own numbers replace it.
    rounded = {n: p.bfloat16() for n, p in without.named_parameters()}
    without.save_pretrained(tmp_path / "hf")
    save_file(rounded, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    model = load_with(tmp_path / "hf", file)
    codes = torch.randint(0, K, (1, 64))
    if kind != "decoder alone":
        assert all(torch.equal(t, vq[f"model.vqmodel.{n}"])
                   for n, t in model.model.vqmodel.named_parameters())
        assert torch.equal(model.model.vqmodel.decode(codes), whole.model.vqmodel.decode(codes))
    words = [str(tmp_path / "hf"), str(tmp_path / "new"), "--vqgan", str(file)]
    assert module.main(words) == 0
    again = load(tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(model.model.vqmodel.decode(codes), again.model.vqmodel.decode(codes))


def test_generate_draws_with_the_vqvae_of_a_file(untrained_folder, tmp_path, capsys):
    shutil.copytree(untrained_folder, tmp_path / "hf")
    tensors = tensors_of(untrained_folder)
    without = {n: t for n, t in tensors.items() if ".decoder." not in n}
    save_file(without, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    vq = {n.removeprefix("model.vqmodel."): t for n, t in tensors.items() if "vqmodel" in n}
    torch.save({"state_dict": vq}, tmp_path / "vqgan.ckpt")
    command = ["--model", str(tmp_path / "hf"), "--device", "cpu", "--prompt", "Draw",
               "--mode", "image", "--out", str(tmp_path / "a.png")]
    assert generate.main(command) == 2
    error = capsys.readouterr().err
    assert "decoder" in error and error.count("\n") == 1
    assert generate.main([*command, "--vqgan", str(tmp_path / "vqgan.ckpt")]) == 0
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_the_vqvae_of_another_model_is_refused(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    write_vqgan(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="VQ-VAE of another model"):
        load_with(tmp_path / "hf", tmp_path / "other.ckpt")
    torch.save({"a": torch.ones(1)}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="holds no VQ-VAE"):
        load_with(tmp_path / "hf", tmp_path / "none.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")  # without a writer: to open it would take for ever
    with pytest.raises(ValueError, match="a pipe or a device"):
        load_with(tmp_path / "hf", tmp_path / "pipe.ckpt")
    hf_model(decoder=False).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="has no VQ-VAE decoder"):
        load_with(tmp_path / "hf", tmp_path / "half" / "model.safetensors")


# --- the command, and all that can be wrong


def test_generate_reads_the_release_and_draws(releases, tmp_path, capsys):
    options = ["--model", str(releases["7b"]), "--device", "cpu", "--prompt", "Draw"]
    assert generate.main([*options, "--max-new-tokens", "4"]) == 0
    out = tmp_path / "a.png"
    assert generate.main([*options, "--mode", "image", "--out", str(out)]) == 0
    assert Image.open(out).size == (32, 32)


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_model(root: Path, **values):
    path = root / "models" / "30b" / "params.json"
    change(path, model=json.loads(path.read_text())["model"] | values)


def change_shard(root: Path, edit, name: str = "consolidated.01.pth"):
    path = root / "models" / "30b" / name
    shard = torch.load(path)
    edit(shard)
    torch.save(shard, path)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-5000])


class Evil:
    """A pickle that makes a folder when it is read by a reader that runs what it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


BROKEN = {
    "truncated shard": (lambda r: truncate(r / "models/30b/consolidated.02.pth"),
                        "consolidated.02.pth is truncated"),
    "empty shard": (lambda r: (r / "models/30b/consolidated.02.pth").write_bytes(b""),
                    "consolidated.02.pth is truncated"),
    "no shard 1": (lambda r: (r / "models/30b/consolidated.01.pth").unlink(),
                   "lacks consolidated.01.pth"),
    "no last shard": (lambda r: (r / "models/30b/consolidated.03.pth").unlink(),
                      "lacks consolidated.03.pth"),
    "no shards": (lambda r: [path.unlink() for path in (r / "models/30b").glob("*.pth")],
                  "lacks consolidated.00.pth, .*03.pth"),
    "shards are text": (lambda r: change(r / "models/30b/consolidate_params.json",
                                         model_parallel_size="4"), "'4' of the params is no"),
    "one shard too many": (lambda r: shutil.copy(r / "models/30b/consolidated.03.pth",
                                                 r / "models/30b/consolidated.04.pth"),
                           "5 shards, but its params say model_parallel_size 4"),
    "no params": (lambda r: (r / "models/30b/params.json").unlink(), "lacks params.json"),
    "broken params": (lambda r: (r / "models/30b/params.json").write_text("{"), "broken JSON"),
    "params without dim": (lambda r: (r / "models/30b/params.json").write_text("{}"),
                           "lacks dim, n_layers, n_heads, swin_norm"),
    "dim": (lambda r: change_model(r, dim=128), "fit|instead of"),
    "dim is text": (lambda r: change_model(r, dim="64"), "dim|hidden_size"),
    "more heads": (lambda r: change_model(r, n_heads=16), "fit|instead of"),
    "fewer kv heads": (lambda r: change_model(r, n_kv_heads=2), "cannot share 2"),
    "all kv heads": (lambda r: change_model(r, n_kv_heads=None), "fit|instead of"),
    "more layers": (lambda r: change_model(r, n_layers=3), "a shard lacks layers.2"),
    "fewer layers": (lambda r: change_model(r, n_layers=1), "13 of the tensors, as layers.1"),
    "vocabulary": (lambda r: change_model(r, vocab_size=5), "says vocab_size 5"),
    "no qk-norm": (lambda r: change_model(r, qk_normalization=False), "qk_normalization is off"),
    "missing tensor": (lambda r: change_shard(r, lambda s: s.pop("norm.weight")),
                       "a shard lacks norm.weight, which params.json implies"),
    "unknown tensor": (lambda r: change_shard(r, lambda s: s.update(lora=torch.ones(1))),
                       "1 of the tensors, as lora"),
    "a number": (lambda r: change_shard(r, lambda s: s.update({
        "tok_embeddings.weight": torch.tensor(1.0)}), "consolidated.00.pth"), "is a single number"),
    "misshapen": (lambda r: change_shard(r, lambda s: s.update({"norm.weight": torch.ones(3)})),
                  "norm.weight of .* does not fit"),
    "evil pickle": (lambda r: torch.save(Evil(r.parent / "evil"),
                                         r / "models/30b/consolidated.00.pth"),
                    "holds more than tensors"),
    "no tokenizer": (lambda r: shutil.rmtree(r / "tokenizer"), "has no tokenizer"),
    "no vqgan": (lambda r: (r / "tokenizer/vqgan.ckpt").unlink(), "no file .*vqgan.ckpt"),
    "broken tokenizer": (lambda r: (r / "tokenizer/text_tokenizer.json").write_text("{}"),
                         "not a BPE tokenizer"),
    "two models": (lambda r: shutil.copytree(r / "models/30b", r / "models/7b"),
                   "2 models: name one of them, .*models/30b or .*models/7b"),
    "no models": (lambda r: shutil.rmtree(r / "models"), "neither a Hugging Face"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_release_is_one_clear_line_and_leaves_nothing(root, tmp_path, capsys, name):
    breaks, message = BROKEN[name]
    breaks(root)
    assert module.main([str(root), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    assert generate.main(["--model", str(root), "--device", "cpu", "--prompt", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("target", [".", "/", ""])
def test_a_target_without_a_name_exists_already(converted, target):
    with pytest.raises(ValueError, match="exists already: name a folder that does not"):
        module.convert(converted["7b"], Path(target))


def test_nothing_is_written_over(releases, converted, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.part").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name, message in (("a", "exists already"), ("b", "interrupted conversion"),
                          ("link", "exists already"), ("no/where", "does not exist")):
        assert module.main([str(converted["7b"]), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert module.main([str(tmp_path / "nowhere"), str(tmp_path / "c")]) == 2
    assert "no model folder" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_said_before_writing(converted, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert module.main([str(converted["7b"]), str(tmp_path / "a")]) == 2
    assert "the disk has 0.0 left" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130),
                                         (OSError(28, "No space left on device"), 2)])
def test_an_interrupted_conversion_leaves_no_folder(
    converted, tmp_path, capsys, monkeypatch, error, code
):
    def write(folder, *arguments, **options):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(module, "write_checkpoint", write)
    assert module.main([str(converted["7b"]), str(tmp_path / "a")]) == code
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text, size", [
    ("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5G", 15 * 10**8), ("2000", 2000), ("3kb", 3000),
])
def test_sizes_are_written_as_people_write_them(text, size):
    assert module.byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5TB", "0"])
def test_what_is_no_size_is_refused(text, capsys):
    assert module.main(["a", "b", f"--shard-size={text}"]) == 2
    assert f"{text!r} is no size: write 5GB or 500MB" in capsys.readouterr().err


def test_a_tokenizer_under_metas_name_is_converted_too(tmp_path, bpe):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "tokenizer").mkdir(parents=True)
    target.mkdir()
    shutil.copyfile(bpe.path, source / "tokenizer" / "text_tokenizer.json")
    module.write_processor(source, target)
    assert load_tokenizer(target).vocab.keys() - {"<image>"} == bpe.vocab.keys() - {
        "<image>", "<reserved08707>"}


def test_files_of_ones_own_beside_the_weights_are_copied_and_a_template_kept(tmp_path):
    source, target = shutil.copytree(ROOT / "tiny", tmp_path / "a"), tmp_path / "b"
    target.mkdir()
    own = ["generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json",
           "special_tokens_map.json", "added_tokens.json"]
    assert all((source / name).write_text("{} ") for name in own)
    (source / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    module.write_processor(source, target)
    assert all((target / name).read_text() == "{} " for name in own)
    module.write_for_transformers(target)
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == "mine"


def test_a_tokenizer_without_a_config_gets_one_that_names_its_tokens(
        sentencepiece_folder, tmp_path):
    shutil.copyfile(sentencepiece_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    module.write_for_transformers(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values == json.loads((ROOT / "tiny" / "tokenizer_config.json").read_text())
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for name in ("bos", "eos", "pad", "unk", "sep"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_token_id")
    ids = [*ours.text_ids("a <s>"), ours.vocab["IMGIMGAZ"], ours.sep_token_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "a <s>"


def test_a_tokenizer_without_a_list_of_added_tokens_is_written_too(bpe, bpe_folder, tmp_path):
    values = json.loads((bpe_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"added_tokens": None}))
    module.write_for_transformers(tmp_path)
    assert load_tokenizer(tmp_path).vocab == bpe.vocab


def test_control_tokens_may_stand_among_the_added_tokens_alone(bpe, bpe_folder, tmp_path):
    values = json.loads((bpe_folder / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        values["model"]["vocab"].pop(token["content"], None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").vocab == bpe.vocab


def test_a_tokenizer_that_is_refused_is_refused_before_the_weights_are_written(
        tmp_path, monkeypatch):
    source = shutil.copytree(ROOT / "tiny", tmp_path / "a")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"pad_token": "[PAD]", "eos_token": ["a"]}')
    monkeypatch.setattr(module, "write_checkpoint", lambda *_: pytest.fail("weights are written"))
    with pytest.raises(ValueError, match="pad_token"):
        module.convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
