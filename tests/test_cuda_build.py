"""The machine code of the CUDA library, wherever nvcc has built one: registers, local memory, tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parent.parent / "rnnkern" / "_cuda.so"


def cuobjdump(*options: str, of: Path = LIBRARY, folder: Path | None = None) -> str:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built: no nvcc")
    tool = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        tool = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    if tool is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    return subprocess.run([tool, *options, of], cwd=folder, capture_output=True, text=True, check=True).stdout


# Two registers too many for ptxas 13.0, in one instance of two dtypes and one of a third: KC, NT and regime (2: grid,
# 1: cluster) of backward kernels. Not a list to grow.
KNOWN_TO_SPILL = {
    ("sm_100", "BFloat16", "RegimeE2ELb1ELi8ELi2"),
    ("sm_100", "Float16", "RegimeE2ELb1ELi8ELi2"),
    ("sm_100", "Float32", "RegimeE1ELb1ELi6ELi2"),
}


BFLOAT16_KERNEL = rb"chain_kernelINS0_\d+BFloat16"


def identity(architecture: str, function: str) -> tuple[str, str, str]:
    """Architecture, dtype and the template's other arguments of a mangled kernel name."""
    match = re.search(r"chain_kernelINS0_\d+(\w+?)ELNS0_6(RegimeE\dELb\dELi\dELi\d)", function)
    assert match is not None, function
    return architecture, match[1], match[2]


def test_no_kernel_spills() -> None:
    """A stack frame is where registers are spilled to; every step would go there."""
    spilling, kernels = set(), 0
    for part in re.split(r"\narch = ", cuobjdump("--dump-resource-usage"))[1:]:
        for name, stack in re.findall(r"Function (\S*chain_kernel\S+?):\s+REG:\d+ STACK:(\d+)", part):
            kernels += 1
            if int(stack) > 0:
                assert int(stack) <= 8, name
                spilling.add(identity(part.split()[0], name))
    assert kernels > 100
    assert spilling <= KNOWN_TO_SPILL


def test_bfloat16_runs_on_tensor_cores(tmp_path: Path) -> None:
    architectures = set(re.findall(r"arch = (sm_\d+a?)", cuobjdump("--dump-resource-usage")))
    assert architectures
    cuobjdump("--extract-elf", "all", folder=tmp_path)
    for architecture in architectures:
        # A cubin holds the kernels of one source: to disassemble those of every dtype takes five times as long.
        cubins = [f for f in tmp_path.glob(f"*.{architecture}.cubin") if re.search(BFLOAT16_KERNEL, f.read_bytes())]
        code = "".join(cuobjdump("--dump-sass", of=cubin) for cubin in cubins)
        functions = re.split(r"\n\s*Function : ", code)[1:]
        kernels = [f for f in functions if "chain_kernel" in f[:200] and "BFloat16" in f[:200]]
        # sm_80 has no clusters, and nothing in the kernels for them.
        kernels = [f for f in kernels if architecture != "sm_80" or "RegimeE1" not in f[:200]]
        assert len(kernels) > 10
        for kernel in kernels:
            assert "HMMA" in kernel, kernel[:200]
            if identity(architecture, kernel[:200]) not in KNOWN_TO_SPILL:
                assert not re.search(r"\b(LDL|STL)\b", kernel), kernel[:200]
