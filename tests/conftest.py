"""Every backend runs the same tests. A missing one is skipped, or fails where RNNKERN_REQUIRE=cpu,... names it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import threads
from torch.optim import optimizer as torch_optimizer

import rnnkern
from rnnkern.backends import BACKENDS, Backend
from rnnkern.gradflow import recorder

REQUIRED = set(filter(None, os.environ.get("RNNKERN_REQUIRE", "").split(",")))


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"RNNKERN_REQUIRE names {sorted(unknown)}, which are not among {list(BACKENDS)}")


def need(name: str) -> None:
    """Skip the test where a backend does not run here; fail where it is required."""
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        (pytest.fail if name in REQUIRED else pytest.skip)(f"backend {name}: {reason}")


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, chosen for the modules too."""
    need(request.param)
    with rnnkern.use_backend(request.param), threads(1 if request.param == "reference" else torch.get_num_threads()):
        yield BACKENDS[request.param]


@pytest.fixture
def cpu_library() -> None:
    """For tests of the registered operators themselves."""
    need("cpu")


@pytest.fixture
def device(backend: Backend) -> str:
    """Where the backend computes."""
    return "cpu" if backend.refuses("cpu", torch.float32, 64) is None else "cuda"


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
