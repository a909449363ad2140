"""Every backend runs the same tests. A missing one is skipped, or fails where RNNKERN_REQUIRE=cpu,... names it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:  # they share the processors
    # Before torch reads it. Two threads at least, as a team of one shows little; who waits lets others compute.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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
    # torch.nn.RNN is what tests compare with, by its plain operations: on cuDNN it has random numbers that no seed
    # repeats, no backward in eval mode and no second derivative.
    torch.backends.cudnn.enabled = False
    if interprets() and BACKENDS["triton"].unavailable() is None:
        triton_interpreter.convert_as_devices_do()
        triton_interpreter.look_for_builtins_once()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process for each processor, each takes a gigabyte; one where they would share a GPU."""
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 8)


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
    named = preferred if request.node.get_closest_marker("unnamed") else rnnkern.use_backend
    unspoken = "device" not in request.fixturenames  # then what the test makes is made where the backend computes
    with named(request.param), few, on(device_of(backend) if unspoken else "cpu"):
        yield backend


@contextmanager
def preferred(name: str) -> Iterator[None]:
    """The backend is the first in the table: ``auto`` takes it, and the reference where no kernel serves."""
    with rnnkern.use_backend("auto"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnnkern.backends, "BACKENDS", {name: BACKENDS[name], **BACKENDS})
        yield


def on(device: str) -> AbstractContextManager[object]:
    """Tensors and modules for which no device is named are made there."""
    return nullcontext() if device == "cpu" else torch.device(device)


def device_of(backend: Backend) -> str:
    """Where the backend computes."""
    return "cpu" if backend.refuses("cpu", torch.float32, 64) is None else "cuda"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where there is a GPU, a test that is to run everywhere runs there as well."""
    marker = metafunc.definition.get_closest_marker
    marked = marker("everywhere") and not marker("cpu_only") and "backend" not in metafunc.fixturenames
    if marked and torch.cuda.is_available():
        metafunc.parametrize("made_there", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def made_there(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors and modules for which no device is named are made on the CPU, or in the place of the parameter."""
    with on(getattr(request, "param", "cpu")):
        yield


@pytest.fixture
def cpu_library() -> None:
    """For tests of the registered operators themselves."""
    need("cpu")


@pytest.fixture
def device(backend: Backend) -> str:
    """Where the backend computes."""
    return device_of(backend)


@pytest.fixture(scope="session")
def shared_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if hasattr(request.config, "workerinput") else mine


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


@pytest.fixture
def without_gc() -> Iterator[None]:
    """What goes now goes by its reference count alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
