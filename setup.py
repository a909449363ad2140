"""Builds the kernel libraries. What the package is called and needs stands in pyproject.toml.

A kernel library is a plain shared library for `torch.ops.load_library`, not a Python module: it uses LibTorch's stable
ABI and no Python API, so that one build serves every torch from 2.10 on and every Python. Instruction sets are chosen
at run time inside the sources, hence no -march here.
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths
except ImportError as error:
    raise SystemExit(
        "rnnkern is built against the torch that is already installed: "
        "install torch >= 2.10 first, then run pip install --no-build-isolation"
    ) from error

ROOT = Path(__file__).resolve().parent
HEADERS = sorted([f for suffix in ("h", "inc", "cuh") for f in glob(f"csrc/**/*.{suffix}", recursive=True)])
CUDA_SOURCES = sorted([*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")])
# A dtype's kernels take nvcc a minute and all else seconds: they come first, so that no processor waits in the end.
CUDA_SOURCES.sort(key=lambda source: "instances.cuh" not in Path(source).read_text())
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10

SANITIZE = os.environ.get("RNNKERN_SANITIZE", "")
if SANITIZE not in ("", "address", "thread", "undefined"):
    raise SystemExit(f"RNNKERN_SANITIZE is {SANITIZE!r}, expected address, thread or undefined")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
# Python's own flags, which stand before these, hold -fwrapv: it would hide signed overflow from a sanitizer.
DEBUG_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", "-UNDEBUG"]
OPTIMIZE_FLAGS = DEBUG_FLAGS if SANITIZE else ["-O3", "-g0"]


def cpu_library() -> Extension:
    return CppExtension(
        "rnnkern._cpu",
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=["setup.py", *HEADERS],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[
            *OPTIMIZE_FLAGS,
            *SANITIZE_FLAGS,
            "-std=c++17",
            "-fopenmp",
            "-fvisibility=hidden",
            f"-ffile-prefix-map={ROOT}/=",
            "-Wall",
            "-Wextra",
            *(f"-isystem{path}" for path in include_paths()),  # our warnings, not those of torch's headers
            STABLE_ABI,
        ],
        extra_link_args=["-fopenmp", *SANITIZE_FLAGS],
        py_limited_api=True,  # leaves libtorch_python out
    )


def nvcc() -> str | None:
    """CUDA's compiler: RNNKERN_NVCC names one ('0': none), else CUDA_HOME's, else the one on the PATH."""
    named = os.environ.get("RNNKERN_NVCC")
    if named is not None:
        return None if named in ("", "0") else named
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuda_targets() -> list[str]:
    """What nvcc compiles for. RNNKERN_CUDA_ARCHS="90" narrows it for development; "80+PTX" keeps the PTX too."""
    named = os.environ.get("RNNKERN_CUDA_ARCHS")
    if named is None:
        known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        # No "90a": that runs on nothing but 9.0. The PTX of 90 has what clusters need, for every later device.
        named = " ".join(["80", "90+PTX", *(["100"] if "compute_100" in known else [])])
    targets = []
    for arch in named.split():
        number = arch.removesuffix("+PTX")
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch != number:
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return targets


def cuda_library() -> Extension:
    """Needs nvcc, but no CUDA build of torch: what it uses of that is looked up when it is loaded."""
    return Extension("rnnkern._cuda", [], depends=["setup.py", *HEADERS, *CUDA_SOURCES])


class BuildLibraries(BuildExtension):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def build_extension(self, ext):
        if ext.name == "rnnkern._cuda":
            self.build_with_nvcc(ext)
        else:
            super().build_extension(ext)

    def build_with_nvcc(self, ext):
        """One rule of ninja: torch's own builder would ask for a CUDA build of torch."""
        archs = "-".join(cuda_targets()).replace("-gencode=arch=", "").replace(",code=", ".")
        folder = ROOT / self.build_temp / "cuda" / archs
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter,-g0"
        torch_includes = " ".join(f"-isystem {path}" for path in include_paths())
        # Through libtorch.so, whatever it is built with, the loader finds that torch's CUDA part as well.
        libraries = " ".join(
            [*(f"-L{path}" for path in library_paths()), "-Xlinker=--no-as-needed -ltorch -ltorch_cpu -lc10"]
        )
        rules = [
            f"nvcc = {NVCC}",
            f"flags = -std=c++17 -O3 -I{ROOT / 'csrc'} {STABLE_ABI} -DUSE_CUDA -Xcompiler={host}",
            f"targets = {' '.join(cuda_targets())}",
            "rule compile",
            "  command = $nvcc $flags $extra -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $nvcc -shared $targets --cudart=static -o $out $in -Xcompiler=-fPIC {libraries}",
        ]
        objects = []
        for source in CUDA_SOURCES:
            objects.append(f"{folder}/{Path(source).name}.o")
            extra = "$targets" if source.endswith(".cu") else torch_includes
            rules += [f"build {objects[-1]}: compile {ROOT / source}", f"  extra = {extra}"]
        rules.append(f"build {library}: link {' '.join(objects)}\n")
        (folder / "build.ninja").write_text("\n".join(rules))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)

    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile in a temporary folder, every file every time.
        self.build_temp = f"build/{SANITIZE or 'release'}"


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


NVCC = nvcc()

setup(
    ext_modules=[cpu_library(), *([cuda_library()] if NVCC and not SANITIZE else [])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
