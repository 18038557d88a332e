"""What benchmark.py measures with: a clock, memory, rounds that alternate, a judge in fp32.

    random_model --twin--> rows that share its tensors     Judge: did a row choose right?
    alternate: round 1: row, row, row; round 2 ...         Peak: memory; read_bandwidth; now
"""

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from chameleon import ChameleonConfig, ChameleonForConditionalGeneration, KVCache
from chameleon_extras.stats import bandwidth, weight_bytes
from generate import ids_of_pictures
from tokenizer import image_token_name


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Measuring: time, memory, bandwidth


def now(device: torch.device) -> float:
    """Seconds, from an arbitrary zero: of this process's work, or of the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


def timed(device: torch.device, task: Callable[[], object]) -> tuple[float]:
    begin = now(device)
    task()
    return (now(device) - begin,)


class Peak:
    """The most memory that the block inside held on top of what was held before, in `bytes`.

    On CUDA the allocator's count. On Linux the process's high-water mark (VmHWM), which can be set
    back; elsewhere not a number.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.bytes = device.type == "cuda", float("nan")

    def __enter__(self) -> "Peak":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self.status("VmRSS")
        return self

    def __exit__(self, *error) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif hasattr(self, "before"):
            self.bytes = self.status("VmHWM") - self.before

    @staticmethod
    def status(name: str) -> int:
        lines = dict(line.split(":", 1) for line in
                     Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second at which `size` bytes, far more than any cache, are read and summed."""
    if device.type == "cuda":
        return bandwidth(device)
    numbers = torch.ones(size // 8, dtype=torch.int64, device=device)
    seconds = [timed(device, numbers.sum)[0] for _ in range(5)]
    return size / min(seconds)


def alternate(device: torch.device, tasks: dict[str, Callable[[], tuple[float, ...]]],
              rounds: int) -> dict[str, tuple[float, ...]]:
    """Runs every task once a round -> for each the medians of the numbers that it gave."""
    results = {name: [] for name in tasks}
    for n in range(rounds):
        for name, task in tasks.items():
            results[name].append(task())
            note(f"round {n + 1}/{rounds}  {name}: "
                 + "  ".join(f"{1000 * x:.2f} ms" for x in results[name][-1]))
    return {name: tuple(map(statistics.median, zip(*times))) for name, times in results.items()}


def compare(device: torch.device, tasks: dict[str, Callable[[], tuple[float]]],
            rounds: int) -> list[list[str]]:
    """Lines of the second table: name, milliseconds, ratio to the first task, memory on top."""
    peaks = {}
    for name, task in tasks.items():
        with Peak(device) as peak:
            task()
        peaks[name] = peak.bytes
    seconds = {name: median for name, (median,) in alternate(device, tasks, rounds).items()}
    base = next(iter(seconds.values()))
    return [[name, f"{1000 * s:.1f}", f"{base / s:.2f}", f"{peaks[name] / 1e6:.0f}"]
            for name, s in seconds.items()]


# ---------------------------------------------------------------------------------------------
# Models: the same random tensors for all


def make_config(sizes: dict) -> ChameleonConfig:
    """Sizes -> a config whose vocabulary has the image tokens; in reverse, so id != code + 4."""
    config = ChameleonConfig(**sizes, max_position_embeddings=4096, eos_token_id=None)
    K = config.vq_config.num_embeddings
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_token_name, reversed(range(K))),
             "<eoss>", "<racm3:break>", "<image>"]
    config.vocabulary_map = {name: n for n, name in enumerate(names)}
    return config


def random_model(config: ChameleonConfig,
                 device: torch.device) -> ChameleonForConditionalGeneration:
    """bf16, the VQ-VAE fp32. No weight is zero, no norm at one; all that is added to the residual
    stream is together as loud as what it began with, so that rounding is not made worse than it is.
    """
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    model.to(device).model.vqmodel.float()  # a buffer or two are made on the CPU
    for name, p in model.named_parameters():
        if p.ndim == 1 or "_norm." in name:  # weights of norms, biases
            p.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        else:  # matrices and convolutions
            added = name.endswith(("o_proj.weight", "down_proj.weight"))
            gain = (2 * config.num_hidden_layers) ** -0.5 if added else 1.0
            p.normal_(0.0, gain * p[0].numel() ** -0.5)
    return model


def twin(model: ChameleonForConditionalGeneration) -> ChameleonForConditionalGeneration:
    """A copy with modules of its own, to be changed from outside, but the same tensors."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def step_bytes(model: ChameleonForConditionalGeneration) -> int:
    """Bytes of the weights that one step reads: all but the embeddings, of which it reads a row."""
    modules = (model.model.layers, model.model.norm, model.lm_head)
    return sum(map(weight_bytes, modules))


# ---------------------------------------------------------------------------------------------
# Right or wrong


def plain_fp32(model: ChameleonForConditionalGeneration) -> ChameleonForConditionalGeneration:
    """A copy in fp32; its quantized layers become nn.Linear with the weights they stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "unpacked"):
            weight = layer.unpacked()  # (O, I)
            plain = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(name, plain)
    return model.float()


class Judge:
    """A model's weights in fp32: what was written must be its first choice after the same ids."""

    def __init__(self, model: ChameleonForConditionalGeneration) -> None:
        self.model, self.cache = plain_fp32(model), None
        self.text = torch.ones(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.text[ids_of_pictures(model.model.vocabulary)] = False  # (V,)

    @torch.inference_mode()
    def logits(self, before: Tensor, ids: Tensor) -> Tensor:
        """before (T,), ids (n,) that follow -> logits (n, V) at their places"""
        T = len(before)
        if self.cache is None or not torch.equal(self.before, before):  # the same for many rows
            self.before = before
            self.cache = KVCache(self.model.config, 1, T + len(ids), device=before.device)
            self.model.model(before[None, :-1], past_key_values=self.cache)
        self.cache.length = T - 1
        new = torch.cat((before[-1:], ids[:-1]))[None]  # (1, n)
        return self.model(new, past_key_values=self.cache, mask_image_logits=False).logits[0]

    def check_text(self, name: str, prompt: Tensor, ids: Tensor, tolerance: float) -> float:
        """ids (n,) written behind a prompt (1, T) -> the share that are the first choice."""
        logits = self.logits(prompt[0], ids).masked_fill(~self.text, float("-inf"))  # (n, V)
        return self.check(name, logits, logits[:, self.text].std(1), ids, tolerance)

    def check_picture(self, name: str, prompt: Tensor, ids: Tensor, scale: float,
                      tolerance: float) -> float:
        """The same for begin-image and codes, guided by `scale` from without the words."""
        begin, ids = ids[:1], ids[1:]
        full = self.logits(torch.cat((prompt[0], begin)), ids)  # (n, V)
        without = self.logits(torch.cat((prompt[0, :1], begin)), ids)
        code_ids = self.model.model.vocabulary.code_to_id
        guided = (without + scale * (full - without))[:, code_ids]  # (n, K)
        codes = self.model.model.vocabulary.codes_from_ids(ids)
        return self.check(name, guided, guided.std(1), codes, tolerance)

    @staticmethod
    def check(name: str, logits: Tensor, spread: Tensor, chosen: Tensor, tolerance: float) -> float:
        """ValueError if a choice lies further behind the first than rounding explains."""
        behind = logits.amax(1) - logits.gather(1, chosen[:, None])[:, 0]  # (n,)
        behind = behind / spread  # in standard deviations of the logits
        share = (behind <= 0).float().mean().item()
        note(f"{name}: {share:.0%} are the first choice, the others at most {behind.max():.3f} "
             "standard deviations of the logits behind it")
        if not behind.max() <= tolerance:
            raise ValueError(f"{name} chose an id {behind.max():.3f} standard deviations behind "
                             f"the first, {tolerance} is allowed: it computes something else")
        return share


# ---------------------------------------------------------------------------------------------
# Words


INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16",
                "amx_int8", "asimd", "bf16", "i8mm", "sve")  # as Linux calls them


def machine(device: torch.device, bandwidth: float) -> str:
    """Where the numbers were measured: processor, its instructions for vectors and matrices,
    threads, versions, bandwidth.
    """
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines}
        flags = facts.get("flags", facts.get("Features", "")).split()
        name = " ".join([facts.get("model name", name), *(f for f in INSTRUCTIONS if f in flags)])
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    clock = "process time" if device.type == "cpu" and threads == 1 else "wall time"
    try:
        theirs = version("transformers")
    except PackageNotFoundError:
        theirs = "not installed"
    return (f"{name}, {threads} thread(s), {clock}; torch {torch.__version__}, "
            f"transformers {theirs}; memory reads {bandwidth / 1e9:.1f} GB/s")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
