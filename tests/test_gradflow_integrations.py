"""The Lightning callback and the torchmetrics metric, with the real packages."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from gradflow_helpers import Classifier, read
from torch import Tensor
from torch.utils.data import DataLoader

import rnnkern
from rnnkern.gradflow import GradientFlow, GradientNorm, ModuleRecord

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
]
PACKAGES = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


def module(package: Any, fails_at: int = -1) -> Any:
    class Trained(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if index == fails_at:
                raise ZeroDivisionError
            return self.net(batch.transpose(0, 1)).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Trained()


def logger(package: Any) -> Any:
    class Memory(package.loggers.logger.Logger):
        name, version = "memory", 0

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.logged.append((step, metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Memory()


def trainer(package: Any, path: Path, **options: Any) -> Any:
    options = {"max_epochs": 1, **options}
    return package.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=path, **options,
    )  # fmt: skip


def data() -> DataLoader:
    return DataLoader(torch.randn(12, 6, 3), batch_size=2)  # 6 batches


@PACKAGES
def test_lightning(package: Any, tmp_path: Path) -> None:
    callback, loggers, model = GradientFlow(every=2), [logger(package), logger(package)], module(package)
    trainer(package, tmp_path, callbacks=[callback], logger=loggers).fit(model, data())
    for one in loggers:
        mine = [(step, found) for step, found in one.logged if any(name.startswith("gradflow/") for name in found)]
        assert [step for step, _ in mine] == [1, 3, 5]  # the steps 0, 2, 4 have ended
        assert all("gradflow/net.rnn/l0/slope" in found for _, found in mine)
    assert mine[-1][1] == read(callback.flow).scalars()
    assert "closed" in repr(callback.flow) and model.net.rnn.tap is None


@PACKAGES
def test_lightning_accumulation(package: Any, tmp_path: Path) -> None:
    """What is logged has all micro-batches."""
    callback, one = GradientFlow(every=1), logger(package)
    trainer(package, tmp_path, callbacks=[callback], logger=one, accumulate_grad_batches=3).fit(module(package), data())
    assert [step for step, found in one.logged if "gradflow/net.rnn/l0/slope" in found] == [1, 2]
    assert read(callback.flow)["net.rnn"].samples == 6
    assert one.logged[-1][1] == read(callback.flow).scalars()


@PACKAGES
def test_lightning_fails(package: Any, tmp_path: Path) -> None:
    callback, model = GradientFlow(), module(package, fails_at=2)
    with pytest.raises(ZeroDivisionError):
        trainer(package, tmp_path, callbacks=[callback], logger=False).fit(model, data())
    assert "closed" in repr(callback.flow) and model.net.rnn.tap is None


@PACKAGES
def test_lightning_finds_the_scaler(package: Any, tmp_path: Path) -> None:
    """A scale that is searched from 2**40: each batch is a step, whether it was skipped or not."""
    callback, one = GradientFlow(every=1, all_ranks=True), logger(package)  # alone it is all ranks
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-16)
    plugin = package.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    trainer(package, tmp_path, callbacks=[callback], logger=one, plugins=[plugin]).fit(module(package), data())
    mine = [
        (step, found["gradflow/net.rnn/l0/nonfinite"])
        for step, found in one.logged
        if "gradflow/net.rnn/l0/zeros" in found
    ]
    assert [step for step, _ in mine] == [1, 2, 3, 4, 5, 6]
    assert mine[0][1] > 0 and mine[-1][1] == 0
    assert (read(callback.flow).step, read(callback.flow).skipped) == (5, False)
    assert read(callback.flow).scale == scaler.get_scale() < 2.0**40
    assert "step" not in vars(scaler)


def test_lightning_ranks_must_agree() -> None:
    with pytest.raises(ValueError, match="every must be an int with all_ranks=True"):
        GradientFlow(every=lambda step: True, all_ranks=True)


def test_lightning_callback_is_pickled_without_its_flow() -> None:
    callback, model = GradientFlow(every=3), Classifier()
    callback.on_fit_start(None, model)
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.flow is None and copy.every == 3 and callback.flow is not None


@PACKAGES
def test_lightning_fits_again(package: Any, tmp_path: Path) -> None:
    callback, one, model = GradientFlow(every=4), logger(package), module(package)
    for _ in range(2):
        trainer(package, tmp_path, callbacks=[callback], logger=one).fit(model, data())
    assert [step for step, found in one.logged if "gradflow/net.rnn/l0/slope" in found] == [1, 5, 1, 5]


def test_metric_weighs_by_samples() -> None:
    """Records of other lengths and sizes: (9 + 9 + 1)/3 at lag 0, one sample at lag 1."""
    norm = GradientNorm(lags=3)
    short = np.full((3, 1, 1, 1, 2), 9.0)
    long = np.array([4.0, 1.0]).reshape(1, 1, 1, 2, 1) * np.ones((3, 1, 1, 1, 1))  # input order: lag 0 is the last
    norm.update(ModuleRecord("rnn", short, np.array([1, 1])))
    norm.update(ModuleRecord("rnn", long, np.array([2]), order="input", per_sample=True))
    assert norm.compute()[0, 0].tolist() == pytest.approx([(19 / 3) ** 0.5, 2, math.nan], nan_ok=True, rel=1e-15)
    assert norm.compute().dtype == torch.float64
    norm.reset()
    assert norm.compute().isnan().all()


def test_metric_is_the_record_of_one_batch() -> None:
    model, norm, x = Classifier(num_layers=2, bidirectional=True), GradientNorm(7, 2, 2), torch.randn(7, 4, 3)
    with rnnkern.watch(model) as flow:
        for part in x.split(1, dim=1):
            model(part).sum().backward()
            norm.update(read(flow))
        flow.step()
        model(x).sum().backward()
    np.testing.assert_allclose(norm.compute(), read(flow)["rnn"].rms_by_lag, rtol=1e-6)


def test_metric_leaves_out_what_is_not_finite() -> None:
    norm = GradientNorm(lags=2)
    squares = np.ones((3, 1, 1, 2, 2))
    squares[0, 0, 0, 0, 0] = np.inf
    norm.update(ModuleRecord("rnn", squares, np.array([2, 2])))
    assert norm.compute().tolist() == [[[1, 1]]]
    assert norm.nonfinite.tolist() == [[1]] and norm.samples.tolist() == [[[2, 1]]]


def test_metric_errors() -> None:
    record = ModuleRecord("rnn", np.ones((3, 2, 1, 2, 2)), np.array([2, 2]))
    with pytest.raises(ValueError, match=r"\(1, 1\) layers and directions, got \(2, 1\)"):
        GradientNorm(lags=2).update(record)
    with pytest.raises(ValueError, match="lags, layers and directions must be positive"):
        GradientNorm(lags=0)


@pytest.mark.parametrize(
    ("name", "module", "missing", "extra"),
    [
        ("GradientFlow", "lightning", ("lightning.pytorch", "pytorch_lightning"), "rnnkern[lightning]"),
        ("GradientNorm", "metric", ("torchmetrics",), "rnnkern[torchmetrics]"),
    ],
)
def test_missing_package(
    name: str, module: str, missing: tuple[str, ...], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"rnnkern.gradflow.{module}")
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as error:
        getattr(rnnkern.gradflow, name)
    assert extra in str(error.value)
