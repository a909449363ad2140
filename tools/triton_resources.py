"""What the Triton kernels take of a GPU, compiled for it ahead of time: no GPU is needed.

    python tools/triton_resources.py [--archs 80,90,100] [--dtypes bf16,tf32,fp32] [--hidden 64,128,...] [--batch 16]
                                     [--packed]

For each kernel at the sizes that the ladder chooses: registers of a thread, bytes of them that spill to memory, bytes
of shared memory, and how many tensor-core instructions it has. The last column is what the ladder counts on. It fails
where a program takes more shared memory than there is, or so many programs as the ladder counts on do not fit one
processor side by side, or the resident kernel spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: sm -> (multiprocessors, bytes of shared memory that a program can have), of the first chip that has it
DEVICES = {80: (108, 166912), 86: (82, 101376), 89: (128, 101376), 90: (132, 232448), 100: (148, 232448)}
#: name -> (Triton's type, bytes, PRECISION)
DTYPES = {
    "bf16": ("bf16", 2, "tf32"),
    "fp16": ("fp16", 2, "tf32"),
    "tf32": ("fp32", 4, "tf32"),
    "fp32": ("fp32", 4, "ieee"),
}
HIDDEN = (16, 64, 100, 128, 256, 512, 768, 1024, 2048, 4096)
#: What a pointer of that name points to, where not to the storage type.
POINTERS = {"rows": "*i64", "ready": "*i32", "error": "*i32", "stats": "*fp64", "partial": "*fp64"}
TENSORS = ("z", "h0", "w_hh", "h", "grad_h", "grad_hn", "delta", "grad_h0")


@dataclass(frozen=True)
class Row:
    arch: int
    dtype: str
    H: int
    kernel: str  # forward, backward, or backward with statistics
    regime: str
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    mma: int
    room: int  # bytes of shared memory that a program can have
    together: int  # programs on one processor, where they wait for each other

    def fits(self) -> bool:
        """Of a processor's shared memory the driver takes 1024 bytes for each program."""
        return self.shared <= self.room and self.together * (self.shared + 1024) <= self.room + 1024


def compile_kernel(kernel: Any, arch: int | str, dtype: str, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """The kernel as a launch with contiguous tensors compiles it, for NVIDIA's sm_<number> or AMD's "gfx..."."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    storage = DTYPES[dtype][0]
    constants = {**constants, "w_k": 1}  # as Triton specializes a stride of 1
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{storage}" if name in TENSORS else POINTERS.get(name, "fp32" if name == "clip" else "i32")
        aligned = constants["H"] % 16 == 0 or name in TENSORS
        if aligned and name not in kernel.do_not_specialize and name != "clip":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    if isinstance(arch, int):
        target = GPUTarget("cuda", arch, 32)
    else:
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return triton.compile(source, target=target, options=options)


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and bytes of spills, as ptxas reports them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if arch >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(tool), "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def rows(arch: int, dtype: str, H: int, B: int, packed: bool) -> list[Row]:
    """Forward, backward, and backward with statistics of one size."""
    from rnnkern.kernels import grid, resident
    from rnnkern.kernels.plan import Device, plan

    processors, room = DEVICES[arch]
    _, size, precision = DTYPES[dtype]
    p = plan(size, precision == "tf32", H, B, Device(processors, room), packed=packed)
    constants = dict(
        H=H, HIDDEN=p.hidden, BATCH=p.batch, NONLINEARITY="tanh", PACKED=packed, PRECISION=precision,
    )  # fmt: skip
    options: dict[str, Any] = {"num_warps": p.warps}
    if p.regime != "resident":
        constants.update(DEPTH=p.depth, WARPS=p.warps, RESIDENT=p.resident)
        options["maxnreg"] = p.registers
    module = resident if p.regime == "resident" else grid
    regime = p.regime + (" on chip" if p.resident else " streamed" if p.regime == "grid" else "")
    together = p.together if p.regime == "grid" else 1
    found = []
    for name, backward in (("forward", {}), ("backward", {"STATS": False}), ("backward+stats", {"STATS": True})):
        more = {"HAS_GRAD_HN": True, **backward} if backward else {}
        kernel = module.backward if backward else module.forward
        compiled = compile_kernel(kernel, arch, dtype, {**constants, **more}, options)
        ptx = compiled.asm["ptx"]
        registers, spills = assemble(ptx, arch)
        mma = len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))
        shared = compiled.metadata.shared
        found.append(Row(arch, dtype, H, name, regime, registers, spills, shared, mma, room, together))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--archs", type=numbers, default=list(DEVICES))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--hidden", type=numbers, default=list(HIDDEN))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--packed", action="store_true", help="packed sequences in the place of dense ones")
    options = parser.parse_args()
    print(
        f"{'sm':>4} {'dtype':<5}{'H':>6}  {'kernel':<15}{'regime':<14}{'registers':>9}{'spills':>8}{'shared':>9}"
        f"{'of':>8}{'mma':>5}"
    )
    bad = 0
    for arch in options.archs:
        for dtype in options.dtypes:
            for H in options.hidden:
                for r in rows(arch, dtype, H, options.batch, options.packed):
                    print(
                        f"{r.arch:>4} {r.dtype:<5}{r.H:>6}  {r.kernel:<15}{r.regime:<14}{r.registers:>9}{r.spills:>8}"
                        f"{r.shared:>9}{r.room:>8}{r.mma:>5}",
                        flush=True,
                    )
                    bad += not r.fits() or (r.regime == "resident" and r.spills > 0)
    return 1 if bad else 0


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):
        os.execv(sys.executable, [sys.executable, *sys.argv])  # an interpreted kernel cannot be compiled
    sys.exit(main())
