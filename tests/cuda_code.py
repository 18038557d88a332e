"""What a compiled step would launch on an H100, seen on any machine: torch writes the code of one
layer at the 7B shape, and this stops before it is run.

    pip install triton
    python tests/cuda_code.py bf16 1      weights, rows of the batch -> a line for each launch

It shows which kernels there are, not how fast they are. CUDA is pretended: the tensors are fake,
and what torch asks about a card is answered here. It needs g++.
"""

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

from chameleon_extras.files import OneLineParser, exit_code  # noqa: E402

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10 { namespace impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
} }
"""
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132,
    warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="", is_integrated=False)
COLUMNS = 1280  # of the cache


class Written(Exception):
    """Raised with the code instead of running it."""


def register_guard() -> None:
    """Gives torch a device guard for CUDA that does nothing, compiled once for each version."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = Path(tempfile.gettempdir(), f"no_cuda_guard_{torch.__version__}_{os.getuid()}.so")
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-x", "c++", "-",
                        *(f"-I{path}" for path in include_paths()),
                        *(f"-L{path}" for path in library_paths()), "-lc10", "-o", part],
                       input=GUARD, text=True, check=True)
        part.rename(library)
    ctypes.CDLL(str(library))


def pretend_cuda() -> None:
    """Answers all that torch and Triton ask about the card."""
    import torch._dynamo.device_interface as interfaces
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import fake_tensor

    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError:
        raise ValueError("this needs Triton: pip install triton") from None

    register_guard()
    for module, answers in (
        (torch.cuda, dict(
            is_available=True, device_count=1, current_device=0, get_device_properties=H100,
            get_device_capability=(9, 0), get_device_name=H100.name, _lazy_init=None,
            synchronize=None, is_initialized=True, get_rng_state_all=[], set_rng_state_all=None,
            get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None,
            is_current_stream_capturing=False)),
        (interfaces.CudaInterface, dict(
            is_available=True, device_count=1, is_triton_capable=True, set_device=None,
            current_device=0, get_device_properties=H100, raise_if_triton_unavailable=None,
            synchronize=None, is_bf16_supported=True, get_raw_stream=0, get_compute_capability=90,
            is_dtype_supported=True)),
        (interfaces.CudaInterface.Worker, dict(get_device_properties=H100, current_device=0)),
        (pad_mm, dict(_pad_mm_init=None)), (misc_patterns, dict(_misc_patterns_init=None)),
        (fake_tensor, dict(init_gpu_context=None)),  # a CUDA build looks for a driver
    ):
        for name, answer in answers.items():
            function = lambda *_, answer=answer, **__: answer  # noqa: E731
            setattr(module, name, staticmethod(function) if isinstance(module, type) else function)

    class Guard:
        __init__ = __enter__ = __exit__ = lambda *_, **__: None

    torch.cuda.device = torch.cuda._DeviceGuard = Guard
    torch.version.cuda = "13.0"
    interfaces.init_device_reg()
    patterns = fuse_attention._get_sfdp_patterns
    fuse_attention._get_sfdp_patterns = lambda device=None: patterns(torch.device("cpu"))
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.fx_graph_cache = False
    triton.runtime.driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0), utils=None,
        get_current_stream=lambda device: 0))

    def written(graph: GraphLowering) -> None:
        code = graph.codegen()[0]
        raise Written(getattr(code, "value", code))

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = written


def code(kind: str, B: int) -> str:
    """The code that torch.compile writes for a layer and B rows. kind: "bf16" or one of KINDS."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from chameleon import ChameleonConfig, ChameleonDecoderLayer
    from chameleon_extras import decoding
    from chameleon_extras.quantize import KINDS

    nn.init.kaiming_uniform_ = lambda t, *_, **__: t
    torch.set_default_dtype(torch.bfloat16)
    c = ChameleonConfig()
    shape = B, c.num_key_value_heads, COLUMNS + decoding.UNREAD, c.head_dim
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            layer = ChameleonDecoderLayer(c, 0).eval().requires_grad_(False)
            layer.self_attn.attend = decoding.auto_attention
            linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            for name, module in linear.items() if kind in KINDS else ():
                twin = KINDS[kind](module.in_features, module.out_features).to_empty(device="cuda")
                twin._table = torch.empty(16, dtype=torch.float32)  # of 4 bits
                layer.set_submodule(name, twin)
            x, angles = torch.empty(B, 1, c.hidden_size), torch.empty(2, B, 1, 1, c.head_dim)
            k, v = (torch.empty(shape)[:, :, :COLUMNS] for _ in range(2))
            allowed = torch.zeros(B, 1, 1, shape[2], dtype=torch.bool)[..., :COLUMNS]
            column = torch.zeros(1, dtype=torch.long)
        for tensor, axis in ((k, 2), (v, 2), (allowed, 3)):  # as StepCache.first
            torch._dynamo.mark_dynamic(tensor, axis)
        layer = decoding.with_row_products(layer, B, torch.bfloat16)
        step = decoding.compile_step(decoding.copy_of(decoding.block), torch.device("cuda"))
        try:
            step(layer, x, *angles, allowed, k, v, column)
        except Exception as error:
            while not isinstance(error, Written):  # torch wraps it
                if error.__cause__ is None and error.__context__ is None:
                    raise
                error = error.__cause__ or error.__context__
            return str(error)
    raise AssertionError("nothing was compiled")


def launches(code: str) -> list[str]:
    """The lines of the code that start a kernel."""
    call = code[code.index("def call(") :]
    return re.findall(r"^ *((?:\w+\.run|extern_kernels\.\w+)\(.*)$", call, re.MULTILINE)


def show(options: argparse.Namespace) -> None:
    pretend_cuda()
    print("\n".join(launches(code(options.weights, options.rows))))


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser("cuda_code.py", description="What a layer launches on CUDA, a line each")
    parser.add_argument("weights", choices=("bf16", "int8", "int4", "nf4"))
    parser.add_argument("rows", type=int, choices=range(1, 65), metavar="ROWS",
                        help="of the batch, guidance streams included: 1 to 64")
    options = parser.parse_args(arguments)
    return exit_code("cuda_code.py", lambda: show(options))


if __name__ == "__main__":
    sys.exit(main())
