"""How fast: one command, tables of ratios that hold on the machine they were made on.

    python tests/benchmark.py                       --size mid, on a CPU a quarter of an hour
    python tests/benchmark.py --size wide           two layers of the released 7B
    python tests/benchmark.py --size 7b             all of them, on CUDA
    python tests/benchmark.py --only ours,transformers,encode

    random weights --> every row writes once --> judged by an fp32 model --> round 1, round 2 ...,
                       (compiles, warms up)      (wrong: no time at all)     each row once a round

What makes the numbers mean something:
- Rows take turns within one process, and the median of the rounds counts: whatever else the machine
  does strikes all rows alike. Ratios say more than seconds.
- On a CPU with one thread the seconds are those of this process's own work, not the wall's. On
  CUDA, and with more threads, they are the wall's, with the device synchronized.
- Nothing is timed that is wrong: each id that a row wrote must be the first choice of the same
  model in fp32 after the same ids, up to rounding; codes must be equal, pixels close.
- A step reads every weight once and every cached key and value, so (bytes) / (seconds) can be set
  against the bandwidth at which this machine, in the same run, reads plain memory.
- Both libraries are called as a user calls them, loop and checks included: `stream` here,
  `generate` with a streamer there, on the same tensors in memory.

The tables go to stdout as Markdown, all else to stderr.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from measuring import (  # noqa: E402
    Judge,
    Peak,
    alternate,
    compare,
    machine,
    make_config,
    markdown,
    note,
    now,
    random_model,
    read_bandwidth,
    step_bytes,
    timed,
    twin,
)

from chameleon import ChameleonForConditionalGeneration  # noqa: E402
from chameleon_extras.decoding import MEASUREMENTS, Decoder, decode_codes  # noqa: E402
from chameleon_extras.files import OneLineParser, exit_code, pick_device  # noqa: E402
from chameleon_extras.quantize import quantize_model  # noqa: E402
from generate import ids_of_pictures, stream  # noqa: E402
from vqvae import ChameleonVQVAE  # noqa: E402

TOY_VQ = dict(embed_dim=16, num_embeddings=64, latent_channels=16, resolution=32,
              base_channels=32, channel_multiplier=(1, 1, 2), num_res_blocks=1)
SIZES = {
    "toy": dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=512, vq_config=TOY_VQ),
    "mid": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
                num_attention_heads=16),
    "wide": dict(num_hidden_layers=2, vocab_size=9216),  # two layers of the 7B
    "7b": {},
}
LARGE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=15,
             num_attention_heads=16)  # 2 GB in bf16, for the loading rows
TOLERANCE = 0.2  # standard deviations of the logits that rounding may move a choice by
PROMPT = {"toy": 40, "mid": 1100, "wide": 600, "7b": 1100}
OURS = {  # row: kind of weights, compiled
    "ours": (None, False), "compiled": (None, True), "int8": ("int8", False),
    "int8-compiled": ("int8", True), "int4": ("int4", False),
}
WRITERS = ("transformers", "transformers-static", *OURS)
OTHERS = ("picture", "encode", "decode", "load", "start")


# ---------------------------------------------------------------------------------------------
# Writing tokens


class Written(NamedTuple):
    ids: Tensor  # (n,)
    first: float  # seconds until the first id: the prompt
    step: float  # seconds for each id after it


class Writer(NamedTuple):
    """A row of the table: something that continues a prompt greedily."""

    write: Callable[[Tensor], Written]  # ids (1, T) -> what it wrote
    weights: int  # bytes that a step reads
    model: ChameleonForConditionalGeneration  # our class with the same weights, for the judge


def ours(model: ChameleonForConditionalGeneration, n: int, compiled: bool = False,
         **options) -> Callable[[Tensor], Written]:
    """Our loop as generate.py calls it; options are those of `stream`."""
    decoder = Decoder(model, compiled)

    def write(prompt: Tensor) -> Written:
        begin = now(model.device)
        steps = stream(model, prompt, decoder=decoder, **options)
        ids = [next(steps)]
        first = now(model.device)
        ids += itertools.islice(steps, n - 1)
        step = (now(model.device) - first) / (n - 1)
        return Written(torch.cat(ids), first - begin, step)

    return write


def transformers_model(model: ChameleonForConditionalGeneration) -> nn.Module:
    """transformers' class with the same tensors in it."""
    import transformers

    config = transformers.ChameleonConfig(**model.config.to_dict())
    with torch.device(model.device):
        theirs = transformers.ChameleonForConditionalGeneration(config).eval()
    state = {name: p for name, p in model.state_dict().items() if ".decoder." not in name}
    theirs.load_state_dict(state, assign=True)
    theirs.generation_config.eos_token_id = None
    return theirs


class FirstToken:
    """What transformers calls a streamer: gets the prompt, then one id after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, 0

    def put(self, ids: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.time = now(self.device)

    def end(self) -> None:
        pass


def transformers_writer(model: nn.Module, n: int, **options) -> Callable:
    def write(prompt: Tensor) -> Written:
        begin, streamer = now(model.device), FirstToken(model.device)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=n, streamer=streamer, **options)
        step = (now(model.device) - streamer.time) / (n - 1)
        return Written(ids[0, prompt.shape[1]:], streamer.time - begin, step)

    return write


def quantized(model: ChameleonForConditionalGeneration,
              kind: str | None) -> ChameleonForConditionalGeneration:
    """A copy, if need be with weights of this kind; what is not quantized is shared."""
    return quantize_model(twin(model), kind) if kind else twin(model)


def make_writer(name: str, model: ChameleonForConditionalGeneration, n: int) -> Writer:
    """A row by its name, on weights that all rows share as far as they can."""
    if name == "transformers":
        return Writer(transformers_writer(transformers_model(model), n), step_bytes(model), model)
    if name == "transformers-static":
        from transformers import CompileConfig

        cuda = model.device.type == "cuda"
        options = CompileConfig(mode="reduce-overhead" if cuda else "default")
        options._compile_all_devices = True  # or it would not compile on a CPU
        write = transformers_writer(transformers_model(model), n, compile_config=options,
                                    cache_implementation="static")
        return Writer(write, step_bytes(model), model)
    kind, compiled = OURS[name]
    model = quantized(model, kind)
    return Writer(ours(model, n, compiled, max_new_tokens=n), step_bytes(model), model)


def first_runs(model: ChameleonForConditionalGeneration, names: list[str], prompt: Tensor,
               n: int) -> tuple[dict[str, Writer], dict[str, list[str]]]:
    """Makes the rows, runs each once and judges it -> rows; new memory and fp32's share of each.

    A row must make the choices of its own weights in fp32, up to bf16's rounding; the share tells
    how many are those of the weights before they were quantized. One judge at a time: at 7B each
    is 27 GB. A row that this machine cannot run is left out, with its reason.
    """
    writers, facts, written = {}, {}, {}
    for name in names:
        begin = time.perf_counter()
        try:
            writer = make_writer(name, model, n)
            with Peak(model.device) as peak:
                written[name] = writer.write(prompt).ids.to(model.device)
        except (ValueError, ImportError) as e:
            note(f"{name} is left out: {e}")
            continue
        note(f"{name}: first run took {time.perf_counter() - begin:.0f} s")
        writers[name], facts[name] = writer, [f"{peak.bytes / 1e6:.0f}"]
    kinds = {name: OURS.get(name, (None,))[0] for name in written}
    for kind in dict.fromkeys((None, *kinds.values())):
        own = [name for name in written if kinds[name] == kind]
        judge = Judge(writers[own[0]].model if kind else model)
        for name in own if kind else written:
            tolerance = TOLERANCE if kinds[name] == kind else math.inf
            share = judge.check_text(name, prompt, written[name], tolerance)
            if not kind:
                facts[name].append(f"{share:.0%}")
        del judge
    return writers, facts


def writing(model: ChameleonForConditionalGeneration, names: list[str], prompt: Tensor, n: int,
            rounds: int, bandwidth: float) -> list[list[str]]:
    """Lines of the first table."""
    writers, facts = first_runs(model, names, prompt, n)
    tasks = {name: partial(lambda write: write(prompt)[1:], w.write) for name, w in writers.items()}
    medians = alternate(model.device, tasks, rounds)
    base = medians.get("transformers", (math.nan, math.nan))
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2  # bf16
    lines = []
    for name, (first, step) in medians.items():
        weights = writers[name].weights
        rate = (weights + kv * (prompt.shape[1] + n // 2)) / step  # of the middle step
        lines.append([name, f"{1 / step:.1f}", f"{base[1] / step:.2f}", f"{1000 * step:.1f}",
                      f"{rate / 1e9:.1f}", f"{rate / bandwidth:.0%}", f"{first:.2f}",
                      f"{base[0] / first:.2f}", f"{weights / 1e6:.0f}", *facts[name]])
    return lines


WRITING_HEAD = ["writing", "tokens/s", "ratio", "ms", "GB/s", "of bandwidth", "prompt, s", "ratio",
                "weights, MB", "new memory, MB", "fp32's choice"]


# ---------------------------------------------------------------------------------------------
# Pictures


def dense_codebook(vq: ChameleonVQVAE, pixels: Tensor) -> None:
    """Gives the codes the spread of what the encoder makes, so that many are near the nearest."""
    with torch.no_grad():
        z = vq.quant_conv(vq.encoder(pixels))  # (B, E, h, w)
        e = vq.quantize.embedding.weight  # (K, E)
        e.copy_(torch.randn_like(e) * z.std((0, 2, 3)) + z.mean((0, 2, 3)))


def transformers_vqvae(vq: ChameleonVQVAE) -> nn.Module:
    import transformers

    config = transformers.ChameleonVQVAEConfig(**vq.config.to_dict())
    theirs = transformers.ChameleonVQVAE(config).eval().to(vq.quant_conv.weight.device)
    theirs.load_state_dict({name: p for name, p in vq.state_dict().items()
                            if not name.startswith("decoder.")}, assign=True)
    return theirs


def encoding(vq: ChameleonVQVAE, pixels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Rows of "encode" -> what each gives; ValueError if codes are not equal."""
    theirs = transformers_vqvae(vq)

    @torch.no_grad()
    def reference() -> Tensor:
        return theirs.encode(pixels).image_tokens

    name = f"VQ encode {pixels.shape[2]}x{pixels.shape[3]}"
    tasks = {f"{name}, transformers": reference, name: lambda: vq.encode(pixels).flatten()}
    codes = reference()
    for row, task in tasks.items():
        wrong = int((task() != codes).sum())
        note(f"{row}: {wrong} of {len(codes)} codes are not transformers'")
        if wrong > len(codes) // 500:  # those that lie between two code vectors, up to rounding
            raise ValueError(f"{row}: {wrong} codes are wrong")
    return tasks


def decoding(vq: ChameleonVQVAE, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Rows of "decode" -> what each gives; ValueError if pixels are further off than rounding."""

    def plain() -> Tensor:  # one channel after the other in memory, as torch lays tensors out
        grid = math.isqrt(codes.shape[1])
        zq = vq.quantize.embedding(codes).mT.unflatten(2, (grid, grid)).contiguous()
        with torch.no_grad():
            return vq.decoder(vq.post_quant_conv(zq))

    def bf16() -> Tensor:
        with torch.autocast(codes.device.type, dtype=torch.bfloat16):
            return vq.decode(codes)

    reference = plain()
    name = f"VQ decode {reference.shape[2]}x{reference.shape[3]}"
    tasks = {f"{name}, plain NCHW": plain, name: lambda: vq.decode(codes),
             f"{name}, bf16": bf16, f"{name}, as chosen": lambda: decode_codes(vq, codes)}
    for (row, task), tolerance in zip(tasks.items(), (0, 1e-3, 0.1, 0.1)):
        error = (task() - reference).norm() / reference.norm()
        note(f"{row}: off by {error:.1e}")
        if not error <= tolerance:
            raise ValueError(f"{row} is off by {error:.1e}, {tolerance} is allowed")
    return tasks


def picturing(model: ChameleonForConditionalGeneration, prompt: Tensor,
              n: int) -> dict[str, Callable[[], tuple[float]]]:
    """Rows of "picture", seconds for each of the first n codes; ValueError for a wrong code."""
    judge, kind, tasks, scale = Judge(model), None, {}, 3.0
    for name in ("ours", "compiled", "int8", "int8-compiled"):
        before, (kind, compiled) = kind, OURS[name]
        row = quantized(model, kind)
        if kind != before:
            judge = None  # one at a time
            judge = Judge(row)
        name = f"a code of a guided picture, {name}"
        try:
            write = ours(row, n + 1, compiled, mode="image", guidance_text=scale,
                         image_temperature=0.0)
        except ValueError as e:  # no compiler
            note(f"{name} is left out: {e}")
            continue
        judge.check_picture(name, prompt, write(prompt).ids.to(model.device), scale, TOLERANCE)
        tasks[name] = partial(lambda write: (write(prompt).step,), write)
    return tasks


# ---------------------------------------------------------------------------------------------
# From disk, and from the command line, each in a fresh interpreter


BEGIN = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads({threads})
imported = time.process_time()
"""
LOAD = """
def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024
if {how!r} == "transformers":
    from transformers import ChameleonForConditionalGeneration
    load = lambda: ChameleonForConditionalGeneration.from_pretrained({folder!r}, dtype="auto")
else:
    from chameleon import ChameleonForConditionalGeneration
    from chameleon_extras.checkpoint import load_checkpoint
    load = lambda: load_checkpoint(ChameleonForConditionalGeneration, Path({folder!r}), None, "cpu",
                                   quantize={how!r} if {how!r} != "ours" else None)
before, begin = status("VmRSS"), time.process_time()
with torch.inference_mode():
    load()(torch.tensor([[0]]))
print(json.dumps([time.process_time() - begin, status("VmHWM") - before]))
"""
START = """
from generate import main
main(["--prompt", "What do you see in this image?<image>", "--image", {root!r} +
      "/examples/shapes.png", "--model", {root!r} + "/tiny", "--max-new-tokens", "{tokens}"])
print(json.dumps([imported, time.process_time() - imported]))
"""


def in_a_process(script: str, **values) -> list[float]:
    """Runs it -> the list that is its last line."""
    script = (BEGIN + script).format(root=str(ROOT), threads=torch.get_num_threads(), **values)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{done.stderr.strip().splitlines()[-1]} (in a process of its own)")
    return json.loads(done.stdout.splitlines()[-1])


def loading(sizes: dict, rounds: int) -> list[list[str]]:
    """Lines of "load": from the file to the first logits, and the peak on top of the imports."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(make_config(sizes), torch.device("cpu"))
        model.save_pretrained(folder)
        del model
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        ways = ["transformers", "ours", "int8", "int4"]
        if find_spec("transformers") is None:
            note(f"load, {ways.pop(0)} is left out: it is not installed")
        tasks = {how: partial(lambda how: tuple(in_a_process(LOAD, how=how, folder=folder)), how)
                 for how in ways}
        medians = alternate(torch.device("cpu"), tasks, rounds)
    base = medians[ways[0]][0]
    what = f"load {size / 1e9:.1f} GB, to the first logits"
    return [[f"{what}, {how}", f"{1000 * seconds:.0f}", f"{base / seconds:.2f}",
             f"{peak / 1e6:.0f}"] for how, (seconds, peak) in medians.items()]


def starting(rounds: int) -> list[list[str]]:
    """Lines of "start": the command line on tiny/."""
    task = lambda: tuple(in_a_process(START, tokens=1))  # noqa: E731
    medians = alternate(torch.device("cpu"), {"start": task}, rounds)["start"]
    names = "import torch", "then, to the first token of `generate.py` on `tiny/`"
    return [[name, f"{1000 * seconds:.0f}", "", ""] for name, seconds in zip(names, medians)]


# ---------------------------------------------------------------------------------------------
# The command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("benchmark.py", description="Speed, as Markdown tables of ratios.")
    add = parser.add_argument
    add("--size", default="mid", choices=SIZES)
    add("--only", help=f"rows, comma-separated: {', '.join((*WRITERS, *OTHERS))}")
    add("--rounds", type=int, default=3, help="each row runs so often, the median counts")
    add("--tokens", type=int, default=17, help="to write in a round; codes of a picture, too")
    add("--threads", type=int, default=1, help="of a CPU; with 1, process time is measured")
    add("--device", default="auto", help="cpu, cuda; auto takes the fastest there is")
    options = parser.parse_args(arguments)
    options.rows = options.only.split(",") if options.only else [*WRITERS, *OTHERS]
    unknown = [name for name in options.rows if name not in (*WRITERS, *OTHERS)]
    if unknown:
        raise ValueError(f"--only {unknown[0]} is none of {', '.join((*WRITERS, *OTHERS))}")
    if min(options.rounds, options.threads) < 1 or options.tokens < 2:
        raise ValueError("--rounds and --threads are at least 1, --tokens at least 2")
    options.device = pick_device(options.device)
    if options.size == "7b" and options.device.type != "cuda":
        raise ValueError("--size 7b is for CUDA: on a CPU --size wide has two of its layers")
    return options


def run(options: argparse.Namespace) -> None:
    device, rounds, n = options.device, options.rounds, options.tokens
    torch.set_num_threads(options.threads)
    bandwidth = read_bandwidth(device, 2**24 if options.size == "toy" else 2**29)
    print(machine(device, bandwidth), flush=True)

    def show(lines: list[list[str]]) -> None:
        print("\n" + markdown(["what", "ms", "ratio", "new memory, MB"], lines), flush=True)

    if "load" in options.rows:  # first: while nothing else is in memory
        show(loading(SIZES["toy"] if options.size == "toy" else LARGE, rounds))
    if "start" in options.rows:
        show(starting(rounds))
    model = random_model(make_config(SIZES[options.size]), device)
    config = model.config
    g = torch.Generator().manual_seed(1)
    text = max(ids_of_pictures(model.model.vocabulary)) + 1  # the first id of text
    prompt = torch.randint(text, config.vocab_size, (1, PROMPT[options.size]), generator=g)
    prompt = prompt.to(device)
    names = [name for name in WRITERS if name in options.rows]
    if names:
        print(f"\n{config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary "
              f"{config.vocab_size}, batch 1; a prompt of {prompt.shape[1]}, then {n} ids\n")
        print(markdown(WRITING_HEAD, writing(model, names, prompt, n, rounds, bandwidth)),
              flush=True)
    if "picture" in options.rows:
        show(compare(device, picturing(model, prompt[:, :20], n), rounds))
    vq, side = model.model.vqmodel, config.vq_config.resolution
    pixels = torch.rand(1, 3, side, side, generator=g).to(device) * 2 - 1
    dense_codebook(vq, pixels)
    for name, rows in (("encode", lambda: encoding(vq, pixels)),
                       ("decode", lambda: decoding(vq, vq.encode(pixels)))):
        if name in options.rows:
            try:
                tasks = {row: partial(timed, device, task) for row, task in rows().items()}
            except ImportError as e:  # of transformers, to which the others are compared
                note(f"{name} is left out: {e}")
                continue
            show(compare(device, tasks, rounds))
    if MEASUREMENTS:
        print("\nForms that were measured, the fastest is used:\n")
        print("\n".join(f"- {words}" for words in MEASUREMENTS), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit code: 2 also for a row that is wrong, else see `files.exit_code`."""
    return exit_code("benchmark.py", lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
