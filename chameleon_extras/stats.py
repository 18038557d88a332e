"""How fast it was, and how fast it could have been: what `generate.py --stats` prints.

    stream's ids (B,) --watch--> the same ids; the clock runs only while they are made

Who needs it: whoever asks whether a step could be faster. At batch 1 a step reads all weights and
the keys and values so far, and little else takes time. So its bytes divided by its seconds,
relative to the bandwidth of this memory, say how good the step is. The bandwidth is measured in the
same run, because other load on the machine affects both.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from chameleon import ChameleonForConditionalGeneration, KVCache

READ = 2**28  # bytes of the memory that is read to measure it: more than most processors' caches
READ_CUDA = 2**32  # the same of a GPU's, if it is free


class Stats:
    """Watches one `generate.stream` of a model; `report` is a line of text."""

    def __init__(self, model: ChameleonForConditionalGeneration) -> None:
        self.model, self.seconds, self.ids = model, [], []  # of each step
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)

    def watch(self, steps: Iterator[Tensor]) -> Iterator[Tensor]:
        start = time.perf_counter()
        for ids in steps:
            self.seconds.append(time.perf_counter() - start)
            self.ids.append(ids)
            yield ids
            start = time.perf_counter()

    def report(self, cache: KVCache | None = None) -> str:
        """What was seen, with the cache of the last step. Measures the memory's bandwidth, too."""
        if len(self.seconds) < 2:
            return f"{len(self.seconds)} step(s): too few to tell a speed"
        later, rows = self.seconds[1:], len(self.ids[0])
        step = statistics.median(later)  # not the mean: a few steps may have compiled
        codes = self.model.model.vocabulary.code_to_id.cpu()
        is_code = torch.isin(torch.stack(self.ids)[:, 0], codes)  # of the first row
        read = step_bytes(self.model, is_code.double().mean().item())
        if cache is not None:
            column = sum(b.nbytes for b in (*cache.k, *cache.v)) / cache.max_length
            read += column * (cache.length - len(later) / 2)  # as long as it was on average
        peak = peak_memory(self.model.device)  # before `bandwidth`, which takes memory, too
        rate, most = read / step, bandwidth(self.model.device)
        return (f"{len(self.seconds)} steps of {rows} row(s): first after "
                f"{self.seconds[0]:.3f} s, then {rows / step:.1f} tokens/s "
                f"({1000 * step:.2f} ms a step); reads {rate / 1e9:.1f} GB/s, "
                f"{100 * rate / most:.0f} % of the {most / 1e9:.1f} GB/s measured here; "
                f"peak memory {peak / 1e9:.2f} GB")


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def step_bytes(model: ChameleonForConditionalGeneration, share_of_codes: float = 0.0) -> float:
    """Bytes of weights that a step reads: the layers, and the head or its rows for codes."""
    part = model.model.vocabulary.num_codes / model.config.vocab_size
    head = weight_bytes(model.lm_head) * (1 - share_of_codes + share_of_codes * part)
    return weight_bytes(model.model.layers) + head


def bandwidth(device: torch.device) -> float:
    """Bytes a second at which a large array in this device's memory is read; best of five."""
    cuda, size = device.type == "cuda", READ
    if cuda:  # a quarter of a gigabyte would be read in less time than a launch and a wait take
        size = min(READ_CUDA, torch.cuda.mem_get_info(device)[0] // 2)
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    with torch.cuda.device(device) if cuda else nullcontext():
        return data.nbytes / min(seconds_of(data.sum, cuda) for _ in range(5))


def seconds_of(task: Callable[[], Tensor], cuda: bool) -> float:
    """Seconds of `task`; on CUDA by the clock of the current device, without launches."""
    if not cuda:
        start = time.perf_counter()
        task().item()  # waits for the GPU of a Mac
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    task()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> float:
    """Bytes: on CUDA those that tensors held, else those of the whole process; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return float("nan")
    import resource  # here: not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
