"""The kernels of a compiled step on CUDA, from the code that torch writes; see cuda_code.py."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or shutil.which("g++") is None or sys.platform != "linux",
    reason="needs Triton (pip install triton) and g++, on Linux")


def launches(kind: str, rows: int) -> list[str]:
    command = [sys.executable, Path(__file__).with_name("cuda_code.py"), kind, str(rows)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


@pytest.mark.parametrize("kind, rows, most", [("bf16", 1, 13), ("int8", 3, 16), ("nf4", 1, 12)])
def test_a_layer_reads_each_weight_once_and_as_it_is_stored(kind, rows, most):
    """All products of weights are Triton's loops: cuBLAS has the two of attention alone, and would
    need a bf16 copy of quantized weights. The numbers are torch 2.13's: q, k and v are one launch.
    """
    lines = launches(kind, rows)
    libraries = [line.split("(")[0] for line in lines if line.startswith("extern_kernels")]
    assert libraries == ["extern_kernels.bmm"] * 2
    assert len(lines) <= most + 2 * (torch.__version__[:4] != "2.13")  # others join fewer loops
