"""Folders of weights: round trips, shards, exchange with transformers, and every broken folder."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import SIZES, VQ, batch_with_pictures, randomize, scrambled_vocabulary

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from engine.checkpoint import read_config

load = ChameleonForConditionalGeneration.from_pretrained


def small_model(decoder: bool = True, **changes) -> ChameleonForConditionalGeneration:
    values = SIZES | dict(vq_config=VQ, vocabulary_map=scrambled_vocabulary()) | changes
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values), with_vq_decoder=decoder)
    randomize(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", [
    {}, dict(tie_word_embeddings=True), dict(num_key_value_heads=2, swin_norm=True),
    dict(rope_scaling={"type": "dynamic", "factor": 2.0}), dict(attention_bias=True),
])
@pytest.mark.parametrize("shard", [5 * 10**9, 200_000])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, changes, shard):
    model = small_model(**changes)
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard < 10**9)
    assert not list(tmp_path.glob("*.part"))
    again = load(tmp_path)
    assert again.config == model.config
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    inputs = batch_with_pictures()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(
    num_key_value_heads=2, swin_norm=True, rope_scaling={"type": "linear", "factor": 2.0})])
@pytest.mark.parametrize("shard", [5 * 10**9, 200_000])
def test_transformers_loads_what_we_save(tmp_path, changes, shard):
    model = small_model(**changes)
    model.save_pretrained(tmp_path, max_shard_bytes=shard)
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = batch_with_pictures()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        a, b = model(**inputs).logits[real], theirs(**inputs).logits[real]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shard", ["1GB", "200KB"])
def test_we_load_what_transformers_saves_without_decoder(tmp_path, shard):
    model = small_model(decoder=False)
    config = transformers.ChameleonConfig(**SIZES, vq_config=VQ,
                                          vocabulary_map=scrambled_vocabulary())
    theirs = transformers.ChameleonForConditionalGeneration(config)
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    ours = load(tmp_path)
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in ours.state_dict().items())
    with pytest.raises(ValueError, match="no VQ-VAE decoder"):
        ours.model.vqmodel.decode(torch.zeros(1, 64, dtype=torch.long))


def test_bfloat16_leaves_the_vqvae_in_float32(folder):
    model = load(folder, dtype=torch.bfloat16)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert all((t == torch.float32) == ("vqmodel" in n) for n, t in kinds.items())
    pixels = batch_with_pictures()["pixel_values"]
    assert torch.equal(model.get_image_tokens(pixels), load(folder).get_image_tokens(pixels))
    model.save_pretrained(folder / "again")
    assert load(folder / "again").dtype == torch.bfloat16


def test_an_earlier_save_never_shines_through(tmp_path):
    for shard in (200_000, 5 * 10**9, 200_000):
        model = small_model()
        with torch.no_grad():
            model.lm_head.weight.normal_()
        model.save_pretrained(tmp_path, max_shard_bytes=shard)
        assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
        one = (tmp_path / "model.safetensors").exists()
        assert one != (tmp_path / "model.safetensors.index.json").exists()


def test_saving_deletes_nothing_of_the_users(tmp_path):
    mine = [tmp_path / name for name in ("model_mine.safetensors", "model-ema.safetensors")]
    for path in mine:
        path.write_bytes(b"weights of a month")
    small_model().save_pretrained(tmp_path)
    assert all(path.read_bytes() == b"weights of a month" for path in mine)


@pytest.mark.parametrize("dtype, expected", [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_a_dtype_may_be_a_word(folder, dtype, expected):
    assert load(folder, dtype=dtype).dtype == expected
    with pytest.raises(ValueError, match="no dtype of torch"):
        load(folder, dtype="linear")


def break_index(folder):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_bytes=200_000)
    (folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-0*"))[0].unlink()


def change_tensor(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


NORM = "model.norm.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json cannot be used"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be"),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
                      "does not describe a chameleon model"),
    "impossible config": (lambda f: (f / "config.json").write_text('{"vocab_size": 0}'),
                          "vocab_size must be"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no shard": (break_index, "lacks model-0"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"),
                     "no readable weight_map"),
    "truncated": (truncate, "truncated or no safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or no safe"),
    "missing tensor": (change_tensor(lambda t: t.pop(NORM)), f"missing {NORM}"),
    "unknown tensor": (change_tensor(lambda t: t.update(extra=torch.ones(2))), "unknown extra"),
    "misshapen tensor": (change_tensor(lambda t: t.update({NORM: torch.ones(7)})),
                         rf"{NORM} is \[7\] instead of \[64\]"),
    "half a decoder": (change_tensor(lambda t: t.pop("model.vqmodel.decoder.conv_in.bias")),
                       "missing model.vqmodel.decoder.conv_in.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_line(folder, name):
    breaks, message = BROKEN[name]
    breaks(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_many_problems_are_listed_with_their_count(folder):
    change_tensor(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n])(folder)
    with pytest.raises(ValueError, match=r"missing model\.layers\.1.* and \d+ more"):
        load(folder)


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        load(tmp_path / "nowhere")


def test_unknown_config_keys_are_ignored(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    expected = read_config(folder)
    values["vq_config"] |= {"ch_mult": [1, 2], "n_embed": 3}
    path.write_text(json.dumps(values | {"future": True, "use_cache": True}))
    assert read_config(folder) == expected


def test_old_files_with_stored_rotary_frequencies_load(folder):
    add = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensor(lambda t: t.update(add))(folder)
    load(folder)
