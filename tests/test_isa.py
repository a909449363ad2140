"""The CPU kernels of every instruction set that this processor has, not only of the one that is used by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("cpu_library")


def run_tests(isa: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_properties.py",
        "test_operators.py",
    ]
    return subprocess.run(
        [*command, "-k", "cpu and (exact or against_truth) and not float64"],
        cwd=Path(__file__).parent,
        env=os.environ | {"RNNKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "generic"])
def test_every_instruction_set(isa: str) -> None:
    if isa not in torch.ops.rnnkern.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    if isa == torch.ops.rnnkern.cpu_isa():
        return  # all other tests run on it
    done = run_tests(isa)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
