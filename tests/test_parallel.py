"""Tensor parallelism: two processes on the CPU (gloo) write what one writes."""

import re
import sys
from pathlib import Path

import pytest
import torch
from small import SIZES, VQ, ended, start_two

from chameleon import ChameleonConfig
from chameleon_extras.parallel import check_ranks, join, own_part, ranks
from chameleon_extras.quantize import KINDS, quantize_model

TESTS = Path(__file__).resolve().parent

# Each of the two processes runs this; only the first one's stdout is left.
BOTH = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import generate
from chameleon_extras import parallel
from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras.quantize import quantize_model
from small import SIZES, VQ, V, batch_with_pictures, randomize, scrambled_vocabulary

torch.set_num_threads(1)
device = parallel.join(torch.device("cpu"))
sizes = SIZES | dict(num_hidden_layers=2, vq_config=VQ, vocabulary_map=scrambled_vocabulary())
gqa, tied = dict(num_key_value_heads=2, swin_norm=True), dict(tie_word_embeddings=True)
biased = dict(attention_bias=True, mlp_bias=True)
wide = dict(hidden_size=256, intermediate_size=256, vocab_size=V + 1)
for name, kind, changes in (("mha", None, {{}}), ("gqa", None, gqa | tied),
                            ("biased", None, wide | biased), ("int8", "int8", gqa | biased),
                            ("int4", "int4", wide | biased), ("nf4", "nf4", wide)):
    model = ChameleonForConditionalGeneration(ChameleonConfig(**sizes | changes)).eval()
    randomize(model)
    if kind:
        quantize_model(model, kind)
    inputs = batch_with_pictures()
    def look(model):
        with torch.inference_mode():
            logits = model(**inputs, mask_image_logits=False).logits
        logits = logits[inputs["attention_mask"].bool()]
        return logits, [generate.generate(model, **inputs, mode=mode, max_new_tokens=8, **sampling)
                        for mode in ("text", "interleaved")
                        for sampling in (dict(do_sample=False), dict(do_sample=True, seed=1))]
    bytes_of = lambda model: sum(p.untyped_storage().nbytes()
                                 for n, p in model.state_dict().items() if "vqmodel" not in n)
    (alone, ids), whole = look(model), bytes_of(model)
    parallel.shard(model, device)
    (both, again), part = look(model), bytes_of(model)
    print(name, "error", float((alone - both).abs().max()), "part", part / whole,
          "ids", all(torch.equal(a, b) for a, b in zip(ids, again)))
    # What another rank computes must be the same to the bit, or the processes part ways.
    everyone = [torch.empty_like(both) for _ in range(2)]
    torch.distributed.all_gather(everyone, both)
    print(name, "same", torch.equal(*everyone))
    learning = [p for p in model.parameters() if p.requires_grad]  # it would learn wrongly
    print(name, "learning", len(learning))
    for one in (model, model.model):
        try:
            one.save_pretrained("never")
        except ValueError as error:
            print(name, "save:", error)
    if kind == "int8":
        options = dict(max_new_tokens=4, eos_token_id=[])
        steps = [generate.generate(model, **inputs, compile=c, **options) for c in (False, True)]
        print("compiled", torch.equal(*steps))
options = ["--model", {model!r}, "--device", "cpu", "--prompt", "Draw"]
print("text", generate.main([*options, "--max-new-tokens", "8"]))
print("picture", generate.main([*options, "--mode", "image", "--out", {picture!r}]))
print("int8", generate.main([*options, "--max-new-tokens", "8", "--quantize", "int8"]))
print("compile", generate.main([*options, "--compile"]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_write_what_one_writes(untrained_folder, tmp_path):
    import generate

    options = ["--model", str(untrained_folder), "--device", "cpu", "--prompt", "Draw"]
    generate.main([*options, "--mode", "image", "--out", str(tmp_path / "one.png")])
    script = BOTH.format(root=str(TESTS.parent), tests=str(TESTS), model=str(untrained_folder),
                         picture=str(tmp_path / "two.png"))
    written, errors = ended(start_two(script))
    lines = written.splitlines()
    # The scales of int8 columns are whole on every rank, the bias of a sum on the first.
    for name, most in dict(mha=0.52, gqa=0.52, biased=0.52, int8=0.56, int4=0.56, nf4=0.56).items():
        found = re.search(rf"{name} error (\S+) part (\S+) ids (\S+)", written)
        error, part, ids = found.groups()
        assert float(error) < 1e-4 and ids == "True" and 0.5 <= float(part) < most, name
        assert f"{name} same True" in lines and f"{name} learning 0" in lines
        assert written.count(f"{name} save: every rank has only a part") == 2
    assert "compiled True" in lines
    assert "text 0" in lines and "picture 0" in lines and "int8 0" in lines
    assert "compile 2" in lines and "--compile is for one process" in errors
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_has_been_used_is_cut_with_all_that_it_keeps(kind):
    """int4 keeps its weights once more, in the order of a kernel, from its first use in bf16 on."""
    (layer,) = quantize_model(torch.nn.Sequential(torch.nn.Linear(256, 64)), kind)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        whole = layer(x)  # (2, 64)
        own_part(layer, 1, 2, "cpu")
        torch.testing.assert_close(layer(x), whole[:, 32:])


@pytest.mark.parametrize("changes, N, message", [
    (dict(num_key_value_heads=2), 4, "4 processes cannot share 2 key/value heads"),
    (dict(num_key_value_heads=1), 2, "2 processes cannot share 1 key/value heads"),
    ({}, 3, "3 processes cannot share 4 key/value heads"),
    (dict(intermediate_size=97), 2, "2 processes cannot share 97 units of feed-forward"),
])
def test_a_number_of_processes_that_does_not_divide_is_one_clear_line(changes, N, message):
    with pytest.raises(ValueError, match=message):
        check_ranks(ChameleonConfig(**SIZES | changes, vq_config=VQ), N)


def test_a_process_without_a_device_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in dict(LOCAL_RANK="2", WORLD_SIZE="3").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="3 processes for 2 CUDA devices: start one for each"):
        join(torch.device("cuda"))


@pytest.mark.parametrize("rank, printed", [(0, "seen"), (1, "")])
def test_only_the_first_process_prints(rank, printed, monkeypatch, capsys):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", getattr(sys, name))  # put back at the end
    join(torch.device("cpu"))
    print("seen", end="")
    print("seen", end="", file=sys.stderr)
    assert capsys.readouterr() == (printed, printed)


def test_one_process_is_not_parallel(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks() == 1


@pytest.mark.parametrize("changes, kind, message", [
    (dict(hidden_size=256, intermediate_size=192), "int4",
     "2 processes cannot share 192 inputs in 4-bit groups"),
    (dict(hidden_size=256, intermediate_size=192), "nf4", "192 inputs in 4-bit groups of 64"),
    (dict(hidden_size=128), "int4", "128 inputs in 4-bit groups of 128: take --quantize int8"),
])
def test_weights_that_cannot_be_cut_are_refused_before_they_are_read(changes, kind, message):
    config = ChameleonConfig(**SIZES | changes, vq_config=VQ)
    with pytest.raises(ValueError, match=message):
        check_ranks(config, 2, kind)
    check_ranks(config, 2, "int8")
