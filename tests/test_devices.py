"""Which GPUs and drivers are refused, with a reason, before a kernel meets them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rnnkern.backends import cuda, devices, triton

pytestmark = pytest.mark.cpu_only("what is asked of a GPU is made up here")


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Neither what was found before, nor afterwards what is made up here."""
    devices.too_old.cache_clear()
    cuda._driver_too_old.cache_clear()
    yield
    devices.too_old.cache_clear()
    cuda._driver_too_old.cache_clear()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities, to be filled in."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"model {i}")
    return found


def test_old_gpus(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.too_old() is None
    devices.too_old.cache_clear()
    gpus += [(8, 0), (12, 0), (7, 5)]
    reason = devices.too_old()
    assert reason is not None and "GPU 2 (model 2) has compute capability 7.5, and 8.0 or later" in reason
    if triton._LACK is None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert triton.TRITON.unavailable() == reason
        assert triton.TRITON.refuses("cuda", torch.float32, 64) == reason


def test_amd_has_other_numbers(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.append((1, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.too_old() is None


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (13000, 13000, None),
        (12080, 12090, None),  # CUDA's minor versions are compatible
        (13020, 12080, None),
        (12080, 13000, "built with CUDA 13, and the NVIDIA driver serves CUDA 12.8 at most"),
    ],
)
def test_old_drivers(driver: int, runtime: int, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.rnnkern, "cuda_versions", lambda: [driver, runtime], raising=False)
    found = cuda._driver_too_old()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"triton": "3.7.1"}, None),
        ({"triton-windows": "3.6.0.post25"}, None),
        ({"pytorch-triton-rocm": "3.6.0+git1234"}, None),
        ({"triton": "3.5.1"}, "Triton 3.5.1 is too old: 3.6 or later is needed"),
        ({}, "there is a module named triton, but none of triton, "),
    ],
)
def test_triton_by_any_name(names: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def distributions(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(version=names[name])] if name in names else []

    monkeypatch.setattr(triton, "distributions", distributions)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = triton._find_lack()
    assert found is None if reason is None else reason in str(found)
