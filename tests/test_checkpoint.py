"""Folders of weights: round trips, shards, exchange with transformers, and every broken folder."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from small import SIZES, VQ, batch_with_pictures, randomize, scrambled_vocabulary

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonModel
from chameleon_extras import checkpoint, convert
from chameleon_extras.checkpoint import load_checkpoint, open_config
from chameleon_extras.pretrained import load_pretrained
from chameleon_extras.quantize import KINDS, kind_of, pack, quantize_model
from vqvae import ChameleonVQVAE

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
    model.save_pretrained(tmp_path, max_shard_size=shard)
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
    model.save_pretrained(tmp_path, max_shard_size=shard)
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


@pytest.mark.parametrize("part", ["norm", "lm_head"])
def test_a_folder_of_two_dtypes_gives_a_model_of_one(folder, part):
    change_tensor(lambda t: t.update({
        name: x if part in name or "vqmodel" in name else x.bfloat16() for name, x in t.items()})
    )(folder)
    model = load(folder)
    assert {p.dtype for name, p in model.named_parameters() if "vqmodel" not in name} == {
        torch.bfloat16}
    model(torch.tensor([[0, 80, 81]]))


def test_a_pickle_is_not_read_where_safetensors_are_asked_for(folder):
    state = load_file(folder / "model.safetensors")
    torch.save({name: -x for name, x in state.items()}, folder / "pytorch_model.bin")
    for asked in (True, None):  # the pickle is an older save
        model = load(folder, use_safetensors=asked)
        assert torch.equal(model.lm_head.weight, state["lm_head.weight"]) and not model.training
    (folder / "model.safetensors").unlink()
    assert load(folder, use_safetensors=False)
    with pytest.raises(ValueError, match="use_safetensors=True, but .* holds none"):
        load(folder, use_safetensors=True)


def test_an_earlier_save_never_shines_through(tmp_path):
    for shard in (200_000, 200_000, 5 * 10**9, 200_000):
        model = small_model()
        with torch.no_grad():
            model.lm_head.weight.normal_()
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
        one = (tmp_path / "model.safetensors").exists()
        assert one != (tmp_path / "model.safetensors.index.json").exists()


def test_a_save_that_was_cut_short_is_not_read_as_a_mix_of_both(tmp_path, monkeypatch):
    model, write, calls = small_model(), checkpoint.write_atomically, []
    model.save_pretrained(tmp_path, max_shard_size=200_000)

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_atomically", second_fails)
    with pytest.raises(KeyboardInterrupt):
        small_model().save_pretrained(tmp_path, max_shard_size=200_000)
    with pytest.raises(ValueError, match="lacks model.safetensors, but holds model-0"):
        load(tmp_path)


def test_a_tied_matrix_may_have_either_name(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_model(model, tmp_path / "model.safetensors")  # keeps the head's name
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).lm_head.weight, model.model.embed_tokens.weight)


def test_what_shares_a_tensor_is_saved_and_computes_the_same(tmp_path):
    model = small_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.save_pretrained(tmp_path)
    assert bits_equal(load(tmp_path), model)


class Words(ChameleonModel):
    """A decoder that sees no pictures, and has a parameter whose name ends like a packed one's."""

    def __init__(self, config):
        super().__init__(config)
        del self.vqmodel
        self.layers[0].scale = torch.nn.Parameter(torch.ones(3))

    def train(self, mode=True):
        return torch.nn.Module.train(self, mode)


def test_a_subclass_without_a_vqvae_and_with_a_parameter_of_its_own_is_loaded(tmp_path):
    model = Words(small_model().config)
    model.save_pretrained(tmp_path)
    again = Words.from_pretrained(tmp_path, dtype="bfloat16")
    assert bits_equal(again, model.bfloat16()) and again.layers[0].scale.dtype == torch.bfloat16


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
    model.save_pretrained(folder, max_shard_size=200_000)
    (folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-0*"))[0].unlink()


def one_tensor_twice(folder):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=200_000)
    first, second, *_ = sorted(folder.glob("model-0*"))
    save_file(load_file(first), second)


def change_tensor(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def wrap(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")


NORM, VQ_NAMES = "model.norm.weight", "model.vqmodel."
BROKEN = {
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"),
                   "PeftModel.from_pretrained.model, folder. loads it"),
    "another name": (lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors"),
                     r"lacks model.safetensors, but holds model.fp16.safetensors: save with"),
    "of a wrapper": (wrap, r"one is 'module\.lm_head.weight': save model.state_dict\(\)"),
    "of bitsandbytes": (change_tensor(lambda t: t.update({f"{NORM}.absmax": torch.ones(2)})),
                        "quantized elsewhere"),
    "no VQ-VAE": (change_tensor(lambda t: [t.pop(n) for n in list(t) if n.startswith(VQ_NAMES)]),
                  "the VQ-VAE is missing: --vqgan of"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json: broken JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "broken JSON: an obj"),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
                      "describes a llama, not a chameleon"),
    "impossible config": (lambda f: (f / "config.json").write_text('{"vocab_size": 0}'),
                          "config.json cannot be used: vocab_size must be"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no shard": (break_index, r"lacks model-0[^ ]*(, model-0[^ ]*)*: download"),
    "a tensor in two shards": (one_tensor_twice, "so does another file of its index"),
    "broken index": (lambda f: (f / "model.safetensors").rename(
        f / "model-00001-of-00001.safetensors").with_name(
            "model.safetensors.index.json").write_text("{}"),
                     "no readable weight_map"),
    "truncated": (truncate, "truncated or no safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or no safe"),
    "missing tensor": (change_tensor(lambda t: t.pop(NORM)), f"missing {NORM}"),
    "unknown tensor": (change_tensor(lambda t: t.update(extra=torch.ones(2))), "unknown extra"),
    "misshapen tensor": (change_tensor(lambda t: t.update({NORM: torch.ones(7)})),
                         rf"{NORM} is \[7\] instead of \[64\]"),
    "fewer layers": (lambda f: change_config(num_hidden_layers=2)(f), "the weights have 3 layers"),
    "more layers": (lambda f: change_config(num_hidden_layers=4)(f), "the config is 4: take the"),
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


@pytest.mark.parametrize("part", [ChameleonModel, ChameleonVQVAE])
def test_a_part_of_the_model_is_read_beside_another_head(folder, part):
    change_tensor(lambda t: t.update({"score.weight": torch.ones(2)}))(folder)
    part.from_pretrained(folder)


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
    expected = open_config(folder)
    values["vq_config"] |= {"ch_mult": [1, 2], "n_embed": 3}
    path.write_text(json.dumps(values | {"future": True, "use_cache": True}))
    assert open_config(folder) == expected


def test_old_files_with_stored_rotary_frequencies_load(folder):
    add = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensor(lambda t: t.update(add))(folder)
    load(folder)


# --- weights in 8 and 4 bits


def bits_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """{"bf16", "int8", "int4": folder}, the last two converted from the first; as they came."""
    root = tmp_path_factory.mktemp("quantized")
    small_model().bfloat16().save_pretrained(root / "bf16")
    for kind in KINDS:
        assert convert.main([str(root / "bf16"), str(root / kind), "--quantize", kind]) == 0
    return {kind: root / kind for kind in ("bf16", *KINDS)}


def load_as(folder, kind=None, dtype=None):
    return load_checkpoint(ChameleonForConditionalGeneration, folder, dtype, "cpu", quantize=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(
    num_key_value_heads=2, swin_norm=True, attention_bias=True, mlp_bias=True)])
@pytest.mark.parametrize("shard", [5 * 10**9, 100_000])
def test_all_ways_to_quantize_give_the_same_bits(tmp_path, kind, changes, shard):
    """In memory, while loading, and from a folder that was saved or converted, in any sharding."""
    small_model(**changes).bfloat16().save_pretrained(tmp_path / "a", max_shard_size=shard)
    expected = quantize_model(load(tmp_path / "a"), kind)
    assert kind_of(expected) == kind and expected.dtype == torch.bfloat16
    assert bits_equal(load_as(tmp_path / "a", kind), expected)
    convert.convert(tmp_path / "a", tmp_path / "b", None, shard, kind)
    expected.save_pretrained(tmp_path / "c", max_shard_size=shard)
    for folder in (tmp_path / "b", tmp_path / "c"):
        assert len(list(folder.glob(f"model.{kind}*.safetensors"))) > (shard == 100_000)
        again = load(folder)
        assert bits_equal(again, expected) and again.config == expected.config
        assert bits_equal(load_as(folder, kind), expected)  # asked for what it is
        with torch.no_grad():
            inputs = batch_with_pictures()
            assert torch.equal(again(**inputs).logits, expected(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_file_are_quantized_whatever_one_computes_in(quantized, kind):
    a, b = (load_as(quantized["bf16"], kind, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
    body = load_checkpoint(ChameleonModel, quantized["bf16"], torch.float32, "cpu", quantize=kind)
    assert bits_equal(body, a.model)
    a, b = (model.model.layers[0].mlp.up_proj for model in (a, b))
    assert torch.equal(a.weight, b.weight)
    assert a.scale.dtype == b.scale.dtype == pack(torch.ones(1, 64), kind)["scale"].dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["stored", "while loading"])
def test_packed_weights_lie_where_kernels_can_read_them(quantized, tmp_path, kind, way):
    """In a file they begin anywhere; PyTorch's int8 kernel ends the process then."""
    folder = shutil.copytree(quantized[kind], tmp_path / "a")
    path = folder / f"model.{kind}.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "some": "x" * 8})
    model = load_as(folder) if way == "stored" else load_as(quantized["bf16"], kind)
    assert all(t.data_ptr() % 64 == 0 for t in model.state_dict().values())
    with torch.no_grad():
        assert model(torch.tensor([[80]])).logits[..., 100:].isfinite().all()


def linear_bytes(folder) -> int:
    """Of all tensors but those that stay as they are."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += sum(t.nbytes for n, t in load_file(path).items()
                     if "_proj." in n or n.startswith("lm_head."))
    return total


@pytest.mark.parametrize("kind, share", [("int8", 0.53), ("int4", 0.32)])
def test_a_quantized_folder_is_as_small_as_promised(tmp_path, kind, share):
    """Here the groups are of 32 and 64 inputs; at widths that 128 divides int4 needs 0.26."""
    small_model(hidden_size=256, intermediate_size=512).bfloat16().save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", quantize=kind)
    assert 0.25 < linear_bytes(tmp_path / "b") / linear_bytes(tmp_path / "a") < share
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantized_weights"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_is_converted_as_it_is(quantized, tmp_path, kind, capsys):
    assert convert.main([str(quantized[kind]), str(tmp_path / "b"), "--shard-size", "50KB"]) == 0
    assert bits_equal(load(tmp_path / "b"), load(quantized[kind]))
    other = "int8" if kind != "int8" else "int4"
    assert convert.main([str(quantized[kind]), str(tmp_path / "c"), "--quantize", other]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"holds {kind} weights: leave --quantize {other} out" in error
    with pytest.raises(ValueError, match=f"holds {kind} weights"):
        load_as(quantized[kind], other)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_never_takes_packed_weights_for_numbers(quantized, kind):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.ChameleonForConditionalGeneration.from_pretrained(quantized[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_saving_plain_weights_over_quantized_ones_leaves_only_the_new(tmp_path, kind):
    quantize_model(small_model(), kind).save_pretrained(tmp_path, max_shard_size=100_000)
    assert (tmp_path / f"model.{kind}.safetensors.index.json").exists()
    small_model().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert kind_of(load(tmp_path)) is None


def test_quantized_weights_never_replace_those_they_were_made_from(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="before quantization, model.safetensors: name another"):
        quantize_model(load(folder), "int8").save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before and kind_of(load(folder)) is None


@pytest.mark.parametrize("name", [
    "lm_head.weight", "model.norm.weight", "model.vqmodel.quantize.embedding.weight",
    "model.layers.1.mlp.up_proj.weight", "model.vqmodel.decoder.conv_in.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder, name, value):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds inf or nan in float32"):
        load(folder)
    with pytest.raises(ValueError, match=f"{name.removesuffix('.weight')}.* inf or nan"):
        load_as(folder, "nf4")
    if "vqmodel" in name:
        with pytest.raises(ValueError, match="holds inf or nan"):
            ChameleonVQVAE.from_pretrained(folder)


def test_the_vqvae_comes_back_from_several_files(folder, tmp_path):
    vq = ChameleonVQVAE.from_pretrained(folder)
    vq.save_pretrained(tmp_path / "vq", max_shard_size="50KB")
    assert len(list((tmp_path / "vq").glob("*.safetensors"))) > 1
    assert bits_equal(ChameleonVQVAE.from_pretrained(tmp_path / "vq"), vq)
    change_tensor(lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))(folder)
    assert {p.dtype for p in ChameleonVQVAE.from_pretrained(folder).parameters()} == {torch.float32}
    shutil.rmtree(tmp_path / "vq")
    vq.config.save_pretrained(tmp_path / "vq")
    torch.save(vq.state_dict(), tmp_path / "vq" / "pytorch_model.bin")
    assert bits_equal(ChameleonVQVAE.from_pretrained(tmp_path / "vq"), vq)


def test_a_head_that_is_called_tied_but_is_another_matrix_is_refused(folder):
    change_config(tie_word_embeddings=True)(folder)
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight differ"):
        load(folder)


def change_config(**values):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return apply


def as_plain(folder):
    change_config(quantized_weights=None)(folder)
    (folder / "model.int8.safetensors").rename(folder / "model.safetensors")


def change_packed(change):
    def apply(folder):
        (folder / "model.int8.safetensors").rename(folder / "model.safetensors")
        change_tensor(change)(folder)
        (folder / "model.safetensors").rename(folder / "model.int8.safetensors")
    return apply


HEAD = "lm_head.weight"
BROKEN_INT8 = {
    "another kind": (change_config(quantized_weights="int3"), "'int3' is none of int8, int4"),
    "kind is a list": (change_config(quantized_weights=["int8"]), "is none of int8, int4"),
    "int4 in config": (change_config(quantized_weights="int4"), "lacks model.int4.safetensors"),
    "not said in config": (as_plain, "unknown .*scale.* and .* more"),
    "truncated": (lambda f: (f / "model.int8.safetensors").write_bytes(
        (f / "model.int8.safetensors").read_bytes()[:-1000]), "truncated or no safetensors file"),
    "missing scale": (change_packed(lambda t: t.pop("lm_head.scale")), "missing lm_head.scale"),
    "misshapen": (change_packed(lambda t: t.update({HEAD: t[HEAD][:, :-1].contiguous()})),
                  r"lm_head.weight is \[160, 63\] instead of \[160, 64\]"),
    "misshapen scale": (change_packed(lambda t: t.update({"lm_head.scale": torch.ones(3)})),
                        r"lm_head.scale is \[3\] instead of \[160\]"),
    "not packed": (change_packed(lambda t: t.update({HEAD: t[HEAD].bfloat16()})),
                   "lm_head.weight is bfloat16 instead of int8"),
    "unsigned": (change_packed(lambda t: t.update({HEAD: t[HEAD].view(torch.uint8)})),
                 "lm_head.weight is uint8 instead of int8"),
    "rounded scale": (change_packed(lambda t: t.update(
        {"lm_head.scale": t["lm_head.scale"].bfloat16()})), "is bfloat16 instead of float32"),
    "norm of integers": (change_packed(lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
                         f"{NORM} is int8 instead of floating"),
    "unknown dtype": (change_packed(lambda t: t.update({HEAD: t[HEAD].int()})),
                      "lm_head.weight is I32, which is none of"),
}


@pytest.mark.parametrize("name", BROKEN_INT8)
def test_a_broken_quantized_folder_is_one_clear_line(quantized, tmp_path, name):
    breaks, message = BROKEN_INT8[name]
    folder = shutil.copytree(quantized["int8"], tmp_path / "a")
    breaks(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_weights_of_other_makers_are_not_written():
    model = small_model()
    part = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Foreign))
    model.lm_head.weight = part
    with pytest.raises(ValueError, match="lm_head.weight is a Foreign, which is not written"):
        model.save_pretrained("nowhere")


class Foreign(torch.Tensor):
    """As DTensor is: a class of its own."""


class Doubled(ChameleonForConditionalGeneration):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 2
        return output


class Body(ChameleonModel):
    pass


def test_a_subclass_is_loaded_as_such_and_a_copied_class_refused(folder):
    ids = torch.tensor([[0, 5, 6]])
    plain = ChameleonForConditionalGeneration.from_pretrained(folder)
    mine, body = Doubled.from_pretrained(folder), Body.from_pretrained(folder)
    assert type(mine) is Doubled and torch.equal(mine(ids).logits, 2 * plain(ids).logits)
    assert type(body) is Body
    assert torch.equal(body(ids).last_hidden_state, plain.model(ids).last_hidden_state)
    with pytest.raises(ValueError, match="is a copy of a class"):
        load_pretrained(type("ChameleonVQVAE", (torch.nn.Module,), {}), folder)


def test_the_index_of_an_earlier_save_is_not_followed(folder):
    """transformers, too, takes model.safetensors, and leaves such an index behind."""
    index = {"weight_map": {"a": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bits_equal(load(folder), small_model())


def test_weights_are_written_with_the_rights_that_any_new_file_has(folder):
    (folder / "other").touch()
    modes = {(folder / name).stat().st_mode for name in ("other", "config.json",
                                                         "model.safetensors")}
    assert len(modes) == 1


class Counted(ChameleonForConditionalGeneration):
    """A class of one's own with a counter and a flag, as BatchNorm has."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("used", torch.tensor([True, False]))


def test_counters_and_flags_of_a_class_of_ones_own_are_read_again(tmp_path):
    model = Counted(small_model().config)
    model.steps += 4
    model.save_pretrained(tmp_path)
    again = Counted.from_pretrained(tmp_path)
    assert again.steps.item() == 7 and again.used.tolist() == [True, False]


def test_a_pickle_may_be_in_several_files(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: x for name, x in state.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert bits_equal(load(folder), small_model())


def test_what_is_given_to_be_saved_stays_as_it_is(tmp_path):
    model = small_model(tie_word_embeddings=True)
    state = dict(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=state)
    assert state.keys() == model.state_dict().keys()
    model.to("meta").save_pretrained(tmp_path / "a", state_dict=state)  # its own are not looked at
    assert bits_equal(load(tmp_path / "a"), load(tmp_path))


@pytest.mark.parametrize("cls", [ChameleonForConditionalGeneration, ChameleonModel])
def test_a_folder_in_a_new_folder_holds_a_turned_matrix_and_says_whose_it_is(tmp_path, cls):
    model = small_model().bfloat16()
    turned = model.get_input_embeddings().weight.T.contiguous().T
    model.get_input_embeddings().weight = torch.nn.Parameter(turned)
    model.model.norm.float()
    part = model if cls is ChameleonForConditionalGeneration else model.model
    part.save_pretrained(tmp_path / "a" / "b")
    again = cls.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(again.get_input_embeddings().weight, turned) and not again.training
    values = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert values["architectures"] == [cls.__name__] and values["torch_dtype"] == "bfloat16"


def test_a_config_that_cannot_be_written_whole_leaves_the_one_before(folder, monkeypatch):
    before = (folder / "config.json").read_bytes()

    def half(path, data, encoding):
        path.write_bytes(data[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        small_model(swin_norm=True).save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == before


def test_a_vqvae_of_other_sizes_than_its_config_is_one_clear_line(folder):
    ChameleonVQVAE.from_pretrained(folder).save_pretrained(folder / "vq")
    assert not ChameleonVQVAE.from_pretrained(folder / "vq").training
    change_tensor(lambda t: t.pop("quant_conv.bias"))(folder / "vq")
    with pytest.raises(ValueError, match="do not fit the config: missing quant_conv.bias"):
        ChameleonVQVAE.from_pretrained(folder / "vq")
