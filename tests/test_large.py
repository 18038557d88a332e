"""Checkpoints as large as the released ones: memory is that of one copy, and of one file.

The small size runs always, so that the code stays alive. The true one is
    pytest -m slow -s tests/test_large.py            needs 45 GB of disk and 20 GB of memory
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import SIZES, VQ, scrambled_vocabulary
from synthetic import write_synthetic_tokenizer

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration
from chameleon_extras.checkpoint import Stored, WithoutInit, open_model, write_checkpoint
from chameleon_extras.release import name_table
from tokenizer import image_token_name, load_tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
RELEASED = pytest.param("7b", marks=pytest.mark.slow)

STEP = """
import sys, time, json, torch
from pathlib import Path
from chameleon import ChameleonForConditionalGeneration, KVCache
from chameleon_extras.checkpoint import load_checkpoint
from chameleon_extras.quantize import quantize_model
before = memory("VmRSS")
begin = time.perf_counter()
kind = None if sys.argv[2] == "bf16" else sys.argv[2]
model = load_checkpoint(
    ChameleonForConditionalGeneration, Path(sys.argv[1]), None, "cpu", quantize=kind)
after_loading = dict(before=before, loading=memory("VmHWM") - before, own_loading=max(own))
loaded, cpu = time.perf_counter(), time.process_time()
cache = KVCache(model.config, 1, 64, model.dtype)
seconds = []
for ids in ([[0] * 16], [[3]], [[3]]):  # a prompt, a first token from disk, and one from memory
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(torch.tensor(ids), past_key_values=cache, logits_to_keep=1).logits
    seconds.append(round(time.perf_counter() - start, 3))
assert logits[..., 100:].isfinite().all()
report = dict(load=round(loaded - begin, 2), load_cpu=round(cpu, 2), steps=seconds) | after_loading
"""
CONVERT = """
import sys, time, json
from pathlib import Path
from chameleon_extras.convert import convert
before = memory("VmRSS")
begin = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]), None, int(sys.argv[3]), *sys.argv[4:])
report = dict(seconds=round(time.perf_counter() - begin, 1), before=before)
"""
WATCH = """
import threading
def memory(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024
own = [0]
def watch():
    while not done.wait(0.005):
        own.append(memory("RssAnon"))
done = threading.Event()
threading.Thread(target=watch, daemon=True).start()
"""
REPORT = """
done.set()
print(json.dumps(report | dict(own=max(own), mapped=memory("RssFile"), peak=memory("VmHWM"))))
"""


def measure(script: str, *arguments) -> dict:
    """Runs it in a process of its own -> its report, with its memory in bytes.

    own: the most that it held itself (RssAnon). peak: with the pages of mapped files (VmHWM), which
    the kernel takes back when it needs them; mapped: those at the end.
    """
    command = [sys.executable, "-c", WATCH + script + REPORT, *map(str, arguments)]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def config_of(size: str) -> ChameleonConfig:
    """small: some 100 KB, for the way through the code. middle: 250 MB, to see memory. 7b."""
    if size == "middle":
        sizes = SIZES | dict(vocab_size=8192, hidden_size=1024, intermediate_size=2816,
                             num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16)
        return ChameleonConfig(**sizes, vq_config=VQ, vocabulary_map=scrambled_vocabulary())
    if size == "small":
        return ChameleonConfig(**SIZES, vq_config=VQ, vocabulary_map=scrambled_vocabulary())
    names = {image_token_name(code): 4 + code for code in range(8192)}
    names |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<racm3:break>": 8197, "<eoss>": 8196}
    return ChameleonConfig(vocabulary_map=names | {"<image>": 8711})


def random_tensors(config: ChameleonConfig) -> dict[str, Stored]:
    """Tensors of a model that are made when they are read: none exists before."""
    with torch.device("meta"), WithoutInit():
        model = ChameleonForConditionalGeneration(config)

    def make(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        # One random block, repeated: random numbers for 7B would take longer than all the rest.
        block = torch.randn(2**20) * shape[-1] ** -0.5
        return block.to(dtype).repeat(math.ceil(shape.numel() / 2**20))[: shape.numel()].view(shape)

    tensors = {}
    for name, p in model.named_parameters():
        dtype = torch.float32 if "vqmodel" in name else torch.bfloat16
        read = lambda shape=p.shape, dtype=dtype: make(shape, dtype)  # noqa: E731
        tensors[name] = Stored(tuple(p.shape), dtype, read)
    return tensors


def room(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk")


def quantized_bytes(tensors: dict[str, Stored], weights: str) -> int:
    """Of a model whose linear layers have `weights`: 1 byte, or a half and 1/64 for the scales."""
    each = {"bf16": 2, "int8": 1, "int4": 0.5 + 2 / 128}[weights]
    linear = {name for name in tensors if name.endswith(("_proj.weight", "lm_head.weight"))}
    return sum(int(each * math.prod(t.shape)) if n in linear else t.nbytes
               for n, t in tensors.items())


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("size", ["small", RELEASED])
def test_a_checkpoint_is_loaded_and_stepped_in_the_memory_of_one_copy(tmp_path, size, weights):
    config = config_of(size)
    tensors = random_tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    room(tmp_path, total)
    try:
        begin = time.perf_counter()
        write_checkpoint(tmp_path / "hf", config, tensors, max_shard_bytes=5 * 10**9)
        written = time.perf_counter() - begin
        report = measure(STEP, tmp_path / "hf", weights)
    finally:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    print(f"\n{size}: {total / 1e9:.2f} GB written in {written:.1f} s, {weights}: {report}")
    own = 10**9 + (quantized_bytes(tensors, "int8") if weights == "int8" else 0)
    assert report["own"] < own and report["peak"] < total + own


@pytest.mark.parametrize("weights, shard", [("int8", 10**9), ("int4", 50 * 10**6)])
def test_quantizing_while_loading_holds_one_matrix_besides(tmp_path, weights, shard):
    """The most that the process ever had in memory, mapped files included."""
    tensors = random_tensors(config_of("middle"))
    write_checkpoint(tmp_path / "hf", config_of("middle"), tensors, max_shard_bytes=shard)
    report = measure(STEP, tmp_path / "hf", weights)
    largest = max(tensor.nbytes for tensor in tensors.values())
    bound = quantized_bytes(tensors, weights) + largest + 40 * 10**6  # for code and holes
    total = sum(tensor.nbytes for tensor in tensors.values())
    print(f"\n{total / 1e6:.0f} MB in {weights}, at most {bound / 1e6:.0f} MB: {report}")
    assert report["loading"] < bound < 0.8 * total


def write_release(root: Path, config: ChameleonConfig, hf: Path) -> None:
    """The tensors of a Hugging Face folder as Meta's, memory-mapped all the way. The rows of q and
    k stay in Hugging Face's order: here only sizes count.
    """
    _, tensors = open_model(ChameleonForConditionalGeneration, hf, "cpu")
    (root / "models" / "7b").mkdir(parents=True)
    state = {}
    for ours, (metas, _) in name_table(config).items():
        tensor = tensors[ours].read()
        state[metas] = tensor[0].clone() if "q_norm" in ours or "k_norm" in ours else tensor
    torch.save(state, root / "models" / "7b" / "consolidated.pth")
    params = dict(dim=config.hidden_size, n_layers=config.num_hidden_layers, swin_norm=False,
                  n_heads=config.num_attention_heads, model_parallel_size=1)
    (root / "models" / "7b" / "params.json").write_text(json.dumps(params))
    vq = {n.removeprefix("model.vqmodel."): t.read() for n, t in tensors.items() if "vqmodel" in n}
    torch.save({"state_dict": vq}, root / "tokenizer" / "vqgan.ckpt")
    yaml = f"resolution: {config.vq_config.resolution}\n"
    (root / "tokenizer" / "vqgan.yaml").write_text(yaml)


@pytest.mark.parametrize("size", ["small", RELEASED])
def test_a_release_is_converted_in_the_memory_of_one_file(tmp_path, size):
    config, root = config_of(size), tmp_path / "release"
    codes = config.vq_config.num_embeddings
    write_synthetic_tokenizer(root / "tokenizer", codes, num_merges=20, meta=True)
    config.vocab_size = max(config.vocab_size, load_tokenizer(root).vocab_size)
    tensors = random_tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    room(tmp_path, 3 * total)
    shard = 2 * 10**9
    try:
        write_checkpoint(tmp_path / "hf", config, tensors, max_shard_bytes=shard)
        write_release(root, config, tmp_path / "hf")
        shutil.rmtree(tmp_path / "hf")
        report = measure(CONVERT, root, tmp_path / "again", shard)
        files = [path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors")]
    finally:
        for name in ("hf", "release", "again"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    print(f"\n{size}: {total / 1e9:.2f} GB converted: {report}")
    assert sum(files) >= total and max(files) < shard + 10**6
    assert report["own"] < shard + 10**9
