"""One CUDA card: is every fast way right on it, how fast is it, and where does the time go?

    python tests/cuda_report.py                        a card with 40 GB: five to ten minutes
    python tests/cuda_report.py --only card,steps      some of its parts
    python tests/cuda_report.py --size toy --device cpu      what the tests run

    card           versions and the bandwidth at which memory is read
    steps          7B, random weights: one step of 1, 2, 3 rows, and the kernels it launches
    pictures       7B: a whole guided picture of 1024 codes
    tiny           tiny/ on the card and on the CPU: equal ids, and no waiting for the device
    vqvae          a picture to codes and back
    loading        a checkpoint of 2 GB, from disk to the card
    transformers   the same 7B shape in transformers

Each part has a deadline. Each line is printed when it is known. A part that fails or is late is one
line with the reason, and the next one begins.
"""

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import LARGE, SIZES, make_writer, quantized  # noqa: E402
from measuring import make_config, now, random_model, timed  # noqa: E402

from chameleon import ChameleonForConditionalGeneration  # noqa: E402
from chameleon_extras.checkpoint import load_checkpoint  # noqa: E402
from chameleon_extras.decoding import Decoder  # noqa: E402
from chameleon_extras.files import pick_device  # noqa: E402
from chameleon_extras.quantize import quantize_model  # noqa: E402
from chameleon_extras.stats import bandwidth, step_bytes, weight_bytes  # noqa: E402
from generate import stream  # noqa: E402
from processor import ChameleonProcessor  # noqa: E402

KINDS = (None, "int8", "nf4")  # of weights; None is bf16
ROWS = {1: "plain", 2: "guided by text", 3: "guided by text and image"}


class Late(BaseException):
    """A deadline has passed. No Exception, so that nothing on the way catches it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    def late(*_) -> None:
        raise Late(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The parts: each yields its lines."""

    def __init__(self, size: str, device: torch.device) -> None:
        self.sizes, self.device = SIZES[size], device
        self.cuda = device.type == "cuda"

    @cache  # noqa: B019  (one report lives as long as the program)
    def model(self, kind: str | None) -> ChameleonForConditionalGeneration:
        with torch.inference_mode(False):  # whichever part asks first
            if kind:
                return quantized(self.model(None), kind)
            return random_model(make_config(self.sizes), self.device)

    @cache  # noqa: B019
    def decoder(self, kind: str | None) -> Decoder:
        return Decoder(self.model(kind), compiled=True)

    @cache  # noqa: B019
    def bandwidth(self) -> float:
        return bandwidth(self.device)

    def share(self, kind: str | None, rows: int, columns: float, seconds: float,
              head: bool) -> str:
        """What a step reads, by its seconds, as a share of the bandwidth measured."""
        model, c = self.model(kind), self.model(kind).config
        read = step_bytes(model, share_of_codes=1.0) if head else weight_bytes(model.model.layers)
        read += rows * columns * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
        return f"{read / seconds / self.bandwidth():.0%} of the bandwidth"

    def milliseconds(self, task: Callable[[], object], runs: int = 20) -> float:
        """The median of some runs, by the device's own clock."""
        task()
        if not self.cuda:
            return 1000 * statistics.median(timed(self.device, task)[0] for _ in range(3))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        marks[0].record()
        for mark in marks[1:]:
            task()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))

    # ---------------------------------------------------------------------------- the parts

    def card(self) -> Iterator[str]:
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        yield f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        yield f"reads memory at {self.bandwidth() / 1e9:.0f} GB/s"

    def steps(self) -> Iterator[str]:
        """The middle of a picture: column 600 of a cache of 1280."""
        for kind in KINDS:
            for rows, name in ROWS.items():
                yield from self.step(kind, rows, f"{kind or 'bf16'}, {rows} row(s), {name}")

    @torch.inference_mode()
    def step(self, kind: str | None, rows: int, name: str, columns: int = 600) -> Iterator[str]:
        decoder, begin = self.decoder(kind), now(self.device)
        cache = decoder.new_cache(rows, 1280)
        new = torch.full((rows, 1), 5, device=self.device)
        mask = torch.ones(rows, columns + 1, dtype=torch.bool, device=self.device)
        positions = torch.full((rows, 1), columns, device=self.device)

        def step() -> Tensor:
            cache.length = columns
            return decoder(new, mask, positions, cache)

        step()
        first = now(self.device) - begin
        ms = self.milliseconds(step)
        share = self.share(kind, rows, columns, ms / 1000, head=False)
        yield f"{name}: {ms:.2f} ms a step, {share}; the first took {first:.0f} s"
        if self.cuda:
            [(graph, _)] = cache.graphs.values()
            ms = self.milliseconds(lambda: decoder.walk(cache, *cache.first(768)), 5)
            yield f"    without the CUDA graph {ms:.2f} ms"
            yield from kernels(graph.replay)
        decoder.keep(cache)

    def pictures(self) -> Iterator[str]:
        text = max(self.model(None).model.vocabulary.code_to_id.tolist()) + 4
        prompt = torch.arange(text, text + 20, device=self.device)[None]
        for kind in KINDS:
            plain = dict(mode="image", guidance_text=3.0)
            yield self.picture(kind, prompt, plain, "guided by text, for the first time")
            yield self.picture(kind, prompt, plain, "guided by text")
            yield self.picture(kind, prompt, plain | dict(image_top_p=0.9), "the same with top-p")

    def picture(self, kind: str | None, prompt: Tensor, options: dict, name: str) -> str:
        decoder, begin = self.decoder(kind), now(self.device)
        steps = stream(self.model(kind), prompt, decoder=decoder, **options)
        next(steps)
        first, n = now(self.device), 1 + sum(1 for _ in steps)
        seconds = now(self.device) - first
        share = self.share(kind, 2, prompt.shape[1] + n / 2, seconds / (n - 1), head=True)
        return (f"{kind or 'bf16'}, {n - 2} codes {name}: {first - begin + seconds:.2f} s, the "
                f"first id after {first - begin:.2f}; {1000 * seconds / (n - 1):.2f} ms each, "
                f"{share}")

    def tiny(self) -> Iterator[str]:
        for kind in KINDS:
            model, other = (load_tiny(device, kind) for device in ("cpu", self.device))
            ways = {compiled: Decoder(other, compiled) for compiled in (False, True)}
            for name, inputs, options in tiny_cases():
                expected = torch.stack(list(stream(model, **inputs, **options)))  # (n, B)
                inputs = {k: x.to(self.device) for k, x in inputs.items()}
                for compiled, decoder in ways.items():
                    way = f"{kind or 'fp32'} {'compiled' if compiled else 'eager'}"
                    yield f"{way}, {name}: " + self.equal(other, decoder, inputs, options, expected)

    def equal(self, model: ChameleonForConditionalGeneration, decoder: Decoder, inputs: dict,
              options: dict, expected: Tensor) -> str:
        """Compares, and writes again, when all is compiled, with an error for every wait."""
        ids = torch.stack(list(stream(model, **inputs, **options, decoder=decoder)))  # (n, B)
        same = ids.shape == expected.shape and torch.equal(ids, expected)
        n = min(len(ids), len(expected))
        first = (ids[:n] != expected[:n]).any(1).tolist()
        words = f"{ids.numel()} ids equal" if same else f"DIFFERENT from step {first.index(True)}"
        if self.cuda:
            words += ", " + waits(stream(model, **inputs, **options, decoder=decoder))
        return words

    def vqvae(self) -> Iterator[str]:
        vq, side = self.model(None).model.vqmodel, self.model(None).config.vq_config.resolution
        pixels = torch.rand(1, 3, side, side, device=self.device) * 2 - 1
        codes = vq.encode(pixels)
        yield f"encode {side}x{side}: {self.milliseconds(lambda: vq.encode(pixels), 5):.1f} ms"
        yield f"decode: {self.milliseconds(lambda: vq.decode(codes), 5):.1f} ms"
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            yield f"decode in bf16: {self.milliseconds(lambda: vq.decode(codes), 5):.1f} ms"

    def loading(self) -> Iterator[str]:
        sizes = LARGE if self.cuda else SIZES["toy"]
        with tempfile.TemporaryDirectory() as folder:
            random_model(make_config(sizes), self.device).save_pretrained(folder)
            for kind in KINDS:
                seconds = timed(self.device, lambda kind=kind: load_checkpoint(
                    ChameleonForConditionalGeneration, Path(folder), None, self.device,
                    quantize=kind))[0]
                yield f"{kind or 'as it is'}: {seconds:.1f} s"

    def transformers(self) -> Iterator[str]:
        prompt = torch.arange(20, device=self.device)[None]
        for name in ("transformers", *(("transformers-static",) if self.cuda else ())):
            write = make_writer(name, self.model(None), 33).write
            write(prompt)
            done = write(prompt)
            yield f"{name}, bf16, 1 row: {1000 * done.step:.2f} ms a step"


# ---------------------------------------------------------------------------------------------
# What the parts use


def kernels(replay: Callable[[], None], most: int = 10) -> Iterator[str]:
    """The kernels of one replay: how many, and those that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1000
    yield f"    {sum(e.count for e in events)} kernels, {total:.2f} ms; most of it:"
    for e in events[:most]:
        yield f"    {e.self_device_time_total / 1000:7.2f} ms in {e.count:3d} x {e.key[:64]}"


def waits(steps: Iterator[Tensor]) -> str:
    """Goes through the steps, the first few aside; every wait for the device is an error."""
    for _ in range(5):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
        return "no wait"
    except RuntimeError as e:
        return f"WAITS ({str(e).splitlines()[0]})"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def load_tiny(device: str | torch.device, kind: str | None) -> ChameleonForConditionalGeneration:
    """tiny/ in fp32, in which equally good ids are rare."""
    model = ChameleonForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    return (quantize_model(model, kind) if kind else model).to(device)


def tiny_cases() -> list[tuple[str, dict, dict]]:
    """name, inputs, options: greedy, as everything that is compared."""
    processor = ChameleonProcessor.from_pretrained(ROOT / "tiny")
    look = "What do you see in this image?<image>"
    picture = Image.open(ROOT / "examples" / "shapes.png")
    seen = processor(text=look, images=picture)
    drawn = processor(text="Draw a red circle.")
    both = processor(text=["Draw a red circle.", "Draw a blue square and a green triangle."],
                     padding=True)
    image = dict(mode="image", image_temperature=0.0)
    document = image | dict(mode="interleaved", max_new_tokens=300)
    return [
        ("text about a picture", seen, dict(max_new_tokens=40)),
        ("a picture", drawn, image),
        ("a guided picture", drawn, image | dict(guidance_text=3.0)),
        ("two pictures", both, image),
        ("a document, whose text is read", drawn, document),
    ]


PARTS = {"card": 20, "steps": 240, "pictures": 90, "tiny": 120, "vqvae": 30, "loading": 60,
         "transformers": 120}  # part: seconds it may take


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("cuda_report.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"parts, comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--size", default="7b", choices=SIZES)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only {unknown.pop()} is none of {', '.join(PARTS)}")
    report, failed = Report(options.size, pick_device(options.device)), 0
    start = time.perf_counter()
    for name in names:
        print(f"\n## {name}", flush=True)
        try:
            with deadline(PARTS[name]):
                for line in getattr(report, name)():
                    print(f"[{time.perf_counter() - start:4.0f} s] {line}", flush=True)
        except (Exception, Late) as e:
            reason = " ".join(str(e).split())[:300] or "no reason given"
            print(f"{name} ends here: {type(e).__name__}: {reason}", flush=True)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
