"""Around the training loops: folders, saved states, curves, several processes, mixed precision.

    Run.save ----> OUT.train/<stage>.pt ----> Run.resume     model, optimizer, random numbers, step
    Run.log -----> OUT.train/curves.csv                      a line every EVERY steps

Who needs it: whoever resumes a training run or trains on several GPUs:

    torchrun --nproc-per-node 2 train.py pretrain ...

FSDP2 (arXiv 2304.11277) stores a slice of every matrix of the decoder on each rank. All ranks draw
the same batch, and each takes its own rows of it. So two processes together compute what one alone
would compute.
"""

import argparse
import csv
import hashlib
import math
import pickle
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp

from chameleon import ChameleonForConditionalGeneration
from chameleon_extras.files import fast_bf16, own_rank, pick_device, ranks, say, write_atomically

WARM_UP = 100  # steps; 4000 in pretraining (section 2.3)
COLUMNS = ("stage", "step", "seconds", "text_loss", "image_loss", "z_loss", "log_z", "q_norm",
           "grad_norm", "code_perplexity", "psnr")  # fmt: skip


class Run:
    """One training run on one rank.

    `out` is the checkpoint folder. `state`, which is OUT.train, holds what is needed to resume, and
    curves.csv. Rank 0 writes all but the other ranks' codes.
    """

    EVERY, SAVE = 20, 500  # steps between two lines of curves.csv; between two saves
    PAUSE, SAVE_AFTER = 20, 600  # seconds between two lines of progress; between saves

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.state = self.out.with_name(self.out.name + ".train")
        self.device = pick_device(options.device)
        self.rank, self.world_size = own_rank(), ranks()
        if options.stage != "evaluate":
            if self.out.exists() and not self.out.is_dir():
                raise ValueError(f"--out {self.out} is no folder: name another")
            held = [*self.out.glob("config.json"), *self.out.glob("model*.safetensors*")]
            if held and not any(self.state.glob("*")):  # a command that fails leaves it empty
                raise ValueError(f"--out {self.out} is a checkpoint, and the state of its "
                                 f"training, {self.state}, is not there: name another --out")
            self.state.mkdir(parents=True, exist_ok=True)
        self.began = self.saved = time.monotonic()
        self.curves: dict[str, float] = {}
        self.extra: Any = None  # what else of a stage has to be saved; has state_dict
        self.made_by = {"--seed": options.seed, "--data": None}  # `resume` compares these

    def say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def progress(self, steps: range, name: str) -> Iterator[int]:
        """The steps, with a line every PAUSE seconds and at the end."""
        told = began = time.monotonic()
        for done, step in enumerate(steps, start=1):
            yield step
            now = time.monotonic()
            if now - told > self.PAUSE or done == len(steps):
                told, left = now, (now - began) / done * (len(steps) - done)
                losses = "".join(f", {n} {x:.3f}" for n, x in self.curves.items() if "_loss" in n)
                reached = min(step + steps.step, steps.stop)
                self.say(f"{name}: {reached} of {steps.stop}{losses}, {left:.0f} s to go")

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch -> this rank's rows, on its device, and "total", the divisor of their loss.

        FSDP averages gradients over the ranks. So each rank divides its sum by the mean total
        weight of all ranks.
        """
        total = batch["weight"][:, 1:].sum() / self.world_size
        rows = {name: t[self.rank :: self.world_size].to(self.device) for name, t in batch.items()}
        return rows | {"total": total.to(self.device)}

    def due(self, step: int, steps: int) -> bool:
        """Is a save due after this step? A single process looks at the clock, too; the clocks of
        several would disagree.
        """
        late = self.world_size == 1 and time.monotonic() - self.saved > self.SAVE_AFTER
        return late or step + 1 == steps or (step + 1) % self.SAVE == 0

    def whole_state(self, model: nn.Module, optimizers=()) -> tuple[dict, dict]:
        """The unsharded states of a model and its optimizers, on the CPU. All ranks call it."""
        how = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dcp.get_state_dict(model, optimizers, options=how)

    def file(self, stage: str) -> Path:
        return self.state / f"{stage}.pt"

    def save(self, stage: str, step: int, model, optimizers, rng) -> None:
        weights, state = self.whole_state(model, optimizers)
        data = {
            "step": step, "model": weights, "optimizer": state,
            "rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
            "extra": self.extra and self.extra.state_dict(), "made_by": self.made_by,
        }  # fmt: skip
        if self.rank == 0:
            write_atomically(self.file(stage), lambda part: torch.save(data, part))
        self.saved = time.monotonic()

    def take_over(self, stage: str, model: nn.Module, optimizers=()) -> dict:
        """Loads the weights, and the optimizers' state, that a stage saved last -> all it saved.

        ValueError if the file is missing or damaged, or if they do not fit.
        """
        path, how = self.file(stage), dcp.StateDictOptions(full_state_dict=True)
        if not path.is_file():
            raise ValueError(f"{path} is missing: run `train.py {stage}` before this stage")
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            weights, state = data["model"], data["optimizer"] if optimizers else {}
            step, _ = data["step"], data["extra"]  # KeyError if one is missing
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise ValueError(f"{path} is damaged: remove it to begin the stage again") from None
        try:
            dcp.set_state_dict(model, optimizers, options=how, model_state_dict=weights,
                               optim_state_dict=state)
        except (RuntimeError, ValueError, KeyError):
            raise ValueError(f"{path} was saved with other options: give those, or remove it to "
                             "begin the stage anew") from None
        if not optimizers:
            self.say(f"{stage}: its weights of step {step} are used")
        return data

    def resume(self, stage: str, model, optimizers, rng) -> int:
        """Restores what `save` wrote -> the next step, which is 0 if there is no such file.

        ValueError if other options or other data made it.
        """
        if not self.file(stage).is_file():
            return 0
        data = self.take_over(stage, model, optimizers)
        before = data.get("made_by", {})
        changed = [f"{name} {before[name]}, not {value}" for name, value in self.made_by.items()
                   if before.get(name, value) != value]
        if changed:
            raise ValueError(f"{self.file(stage)} was made with {'; '.join(changed)}: remove this "
                             "file to begin the stage anew, or give the options as before")
        rng.bit_generator.state = data["rng"]
        torch.set_rng_state(data["torch_rng"])
        if self.extra is not None:
            self.extra.load_state_dict(data["extra"])
        self.say(f"{stage}: goes on at step {data['step']}")
        return data["step"]

    def check_gradient(self, stage: str, step: int, norm: Tensor | float) -> None:
        """ValueError for the norm of a gradient that would spoil the weights."""
        if not math.isfinite(float(gathered(norm))):
            raise ValueError(f"{stage}: the gradient of step {step} is inf or nan: remove "
                             f"{self.file(stage)}, if there is one, and set a lower "
                             "--learning-rate")

    def log(self, stage: str, step: int, curves: dict[str, float]) -> None:
        self.curves = curves
        if self.rank:
            return
        row = {"stage": stage, "step": step, "seconds": time.monotonic() - self.began} | curves
        with open(self.state / "curves.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def fingerprint(arrays: Iterable) -> str:
    """A short text that differs if a number of the arrays does."""
    numbers = b"".join(np.asarray(array).tobytes() for array in arrays)
    return f"(fingerprint {hashlib.sha256(numbers).hexdigest()[:8]})"


def rate(stage: str, step: int, steps: int) -> float:
    """Learning rate / peak: warm-up, then exponential (section 2.3) or cosine decay (section 3)."""
    done = step / steps
    if stage == "pretrain":
        shape = 0.3**done  # down to 0.3; the paper decays to 0
    else:
        flat = 0.5 if stage == "sft" else 0.0  # the share of the steps before the decay
        shape = 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - flat) / (1 - flat))
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (0.98 * shape + 0.02)


def autocast(device: torch.device):
    """Mixed precision: bf16 products of fp32 weights. All in fp32 where bf16 is slow."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device))


def shard(model: ChameleonForConditionalGeneration) -> None:
    """FSDP2: every rank stores a slice of each matrix. A layer is whole only while it computes. The
    VQ-VAE stays whole on every rank.
    """
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.layers, model.lm_head):
        fully_shard(module)
    fully_shard(model.model, ignored_params=set(model.model.vqmodel.parameters()))


def gathered(x: Tensor) -> Tensor:
    """A sharded tensor -> the whole tensor. Other tensors are returned unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
