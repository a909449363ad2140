"""Every backend runs the same tests. A missing one is skipped, or fails where RNNKERN_REQUIRE=cpu,... names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import triton_interpreter
from helpers import threads
from torch.optim import optimizer as torch_optimizer

import rnnkern
from rnnkern.backends import BACKENDS, Backend
from rnnkern.backends.triton import interprets
from rnnkern.gradflow import recorder

REQUIRED = set(filter(None, os.environ.get("RNNKERN_REQUIRE", "").split(",")))


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"RNNKERN_REQUIRE names {sorted(unknown)}, which are not among {list(BACKENDS)}")
    # What is said of float32 is said of float32. TF32, which PyTorch allows RNNs by default, has its own tests.
    torch.backends.cudnn.allow_tf32 = False
    if interprets() and BACKENDS["triton"].unavailable() is None:
        triton_interpreter.convert_as_devices_do()
        triton_interpreter.look_for_builtins_once()


def need(name: str) -> None:
    """Skip the test where a backend does not run here; fail where it is required."""
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        (pytest.fail if name in REQUIRED else pytest.skip)(f"backend {name}: {reason}")


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, chosen for the modules too."""
    need(request.param)
    backend = BACKENDS[request.param]
    if request.node.get_closest_marker("float64"):
        reason = backend.refuses(device_of(backend), torch.float64, 64)
        if reason is not None:
            pytest.skip(reason)
    few = threads(1 if request.param == "reference" else torch.get_num_threads())
    unspoken = "device" not in request.fixturenames  # then what the test makes is made where the backend computes
    with rnnkern.use_backend(request.param), few, on(device_of(backend) if unspoken else "cpu"):
        yield backend


def on(device: str) -> AbstractContextManager[object]:
    """Tensors and modules for which no device is named are made there."""
    return nullcontext() if device == "cpu" else torch.device(device)


def device_of(backend: Backend) -> str:
    """Where the backend computes."""
    return "cpu" if backend.refuses("cpu", torch.float32, 64) is None else "cuda"


@pytest.fixture
def cpu_library() -> None:
    """For tests of the registered operators themselves."""
    need("cpu")


@pytest.fixture
def device(backend: Backend) -> str:
    """Where the backend computes."""
    return device_of(backend)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Every test ends without an open Flow and without the hook on all optimizers."""
    with threads(1):  # small models: more threads only wait for one another
        yield
    assert not recorder._open
    assert recorder._optimizer_stepped not in torch_optimizer._global_optimizer_post_hooks.values()
