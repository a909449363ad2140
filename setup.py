"""Builds the kernel libraries. What the package is called and needs stands in pyproject.toml.

A kernel library is a plain shared library for `torch.ops.load_library`, not a Python module: it uses LibTorch's stable
ABI and no Python API, so that one build serves every torch from 2.10 on and every Python. Instruction sets are chosen
at run time inside the sources, hence no -march here.
"""

import os
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    raise SystemExit(
        "rnnkern is built against the torch that is already installed: "
        "install torch >= 2.10 first, then run pip install --no-build-isolation"
    ) from error

ROOT = Path(__file__).resolve().parent
HEADERS = sorted([*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inc", recursive=True)])
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


class BuildLibraries(BuildExtension):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile in a temporary folder, every file every time.
        self.build_temp = f"build/{SANITIZE or 'release'}"


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[cpu_library()], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
