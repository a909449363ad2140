"""The machine code of the CUDA library, wherever nvcc has built one: registers, local memory, tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parent.parent / "rnnkern" / "_cuda.so"


def cuobjdump(*options: str) -> str:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built: no nvcc")
    tool = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        tool = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    if tool is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    return subprocess.run([tool, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def test_no_kernel_spills() -> None:
    """A stack frame is where registers are spilled to; every step would go there."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("--dump-resource-usage"))
    kernels = [(name, int(stack)) for name, _, stack in usage if "chain_kernel" in name]
    assert len(kernels) > 100
    assert not [name for name, stack in kernels if stack > 0]


def test_bfloat16_runs_on_tensor_cores() -> None:
    architectures = set(re.findall(r"arch = (sm_\d+a?)", cuobjdump("--list-elf") + cuobjdump("--dump-resource-usage")))
    assert architectures
    for architecture in architectures:
        code = cuobjdump("--dump-sass", "--gpu-architecture", architecture)
        functions = re.split(r"\n\s*Function : ", code)[1:]
        kernels = [f for f in functions if "chain_kernel" in f[:200] and "BFloat16" in f[:200]]
        # sm_80 has no clusters, and nothing in the kernels for them.
        kernels = [f for f in kernels if architecture != "sm_80" or "RegimeE1" not in f[:200]]
        assert len(kernels) > 10
        for kernel in kernels:
            assert "HMMA" in kernel, kernel[:200]
            assert not re.search(r"\b(LDL|STL)\b", kernel), kernel[:200]
