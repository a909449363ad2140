"""What two processes make of a model with an rnnkern.RNN, under DDP and FSDP2, with gloo.

    torchrun --standalone --nproc-per-node=2 tests/distributed_worker.py DIRECTORY

Each rank trains on its half of the batch, and writes what its cases return, or their traceback, to
DIRECTORY/rank{r}.pt. test_distributed.py compares with one process on the whole batch: same model, data and loop.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rnnkern

WORLD, STEPS, T, B = 2, 5, 6, 4
Records = list[Tensor]  # of each step: norms (layers, directions, T, samples), those of several modules stacked


class Model(nn.Module):
    """Two layers in both directions, and one of another size. None of the sizes divides by two: shards are uneven."""

    def __init__(self, kind: type[nn.RNNBase] = rnnkern.RNN, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.rnn = kind(3, 5, 2, bidirectional=True, dtype=torch.float64)
        self.last = kind(10, 7, nonlinearity="relu", dtype=torch.float64)
        self.head = nn.Linear(7, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.rnn, x, use_reentrant=False) if self.checkpointed else self.rnn(x)
        return self.head(self.last(hidden[0])[1][-1])


def batches(steps: int = STEPS) -> Tensor:
    """(steps, T, B, 3)."""
    return torch.randn(steps, T, B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(
    model: nn.Module,
    xs: Tensor,  # (steps, T, B, 3)
    optimizer: torch.optim.Optimizer | None = None,
    flow: rnnkern.gradflow.Flow | None = None,
    last_micro_batch: Callable[[bool], Any] | None = None,
) -> list[Tensor]:
    """Steps of Adam on the mean loss, and the norms of each step.

    Where there is a ``last_micro_batch``, every sample is a micro-batch of its own, and it makes the context of each:
    told whether this is the last one of the step.
    """
    optimizer = optimizer or adam(model)
    norms = []
    for x in xs:
        parts = [x] if last_micro_batch is None else x.split(1, dim=1)
        for i, part in enumerate(parts):
            with nullcontext() if last_micro_batch is None else last_micro_batch(i == len(parts) - 1):
                (model(part).square().mean() / len(parts)).backward()
        if flow is not None:
            record = flow.read(per_sample=True)
            norms.append(torch.cat([torch.from_numpy(record[name].norm).flatten(0, 1) for name in record.modules]))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, on every rank; by the names that the model has in one process."""
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): p.detach().clone() for name, p in full.items()}


def share(xs: Tensor) -> Tensor:
    """This rank's samples."""
    return xs.chunk(WORLD, dim=-2)[dist.get_rank()]


def ddp(directory: Path) -> Any:
    model = DistributedDataParallel(Model())
    train(model, share(batches()))
    return weights(model)


def ddp_static_graph_with_checkpointing(directory: Path) -> Any:
    model = DistributedDataParallel(Model(checkpointed=True), static_graph=True, gradient_as_bucket_view=True)
    train(model, share(batches()))
    return weights(model)


def ddp_accumulation(directory: Path) -> Any:
    model = DistributedDataParallel(Model())
    train(model, share(batches()), last_micro_batch=lambda last: nullcontext() if last else model.no_sync())
    return weights(model)


def ddp_frozen(directory: Path) -> Any:
    model = Model()
    model.rnn.requires_grad_(False)
    model = DistributedDataParallel(model)
    train(model, share(batches()))
    return weights(model)


def ddp_watched(directory: Path) -> Any:
    model = DistributedDataParallel(Model())
    with rnnkern.watch(model) as flow:
        norms = train(model, share(batches()), flow=flow)
        assert flow.modules == ("module.rnn", "module.last"), flow.modules
    return weights(model), norms


def sharded(model: Model, **options: Any) -> Model:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model.rnn, model.last, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def fsdp(directory: Path) -> Any:
    model = sharded(Model())
    assert isinstance(model.rnn, rnnkern.RNN) and isinstance(model.rnn, FSDPModule)
    train(model, share(batches()))
    local = sum(p.to_local().numel() for p in model.parameters())
    assert 0 < local < sum(p.numel() for p in model.parameters()), "nothing is sharded"
    return weights(model)


def fsdp_kept_gathered(directory: Path) -> Any:
    model = sharded(Model(), reshard_after_forward=False)
    train(model, share(batches()))
    return weights(model)


def fsdp_checkpointing(directory: Path) -> Any:
    model = sharded(Model(checkpointed=True))
    train(model, share(batches()))
    return weights(model)


def fsdp_accumulation(directory: Path) -> Any:
    model = sharded(Model())

    def last_micro_batch(last: bool) -> Any:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    train(model, share(batches()), last_micro_batch=last_micro_batch)
    return weights(model)


def fsdp_watched(directory: Path) -> Any:
    model = sharded(Model())
    with rnnkern.watch(model) as flow:
        norms = train(model, share(batches()), flow=flow)
    return weights(model), norms


def fsdp_mixed_precision(directory: Path) -> Any:
    """The RNN in bfloat16; outputs and gradients of one step."""
    model = Model().rnn.float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    output, h_n = model(share(batches()[0]).float())
    output.float().square().sum().backward()
    return output.detach(), h_n.detach(), [p.grad.full_tensor() for p in model.parameters()]


def batch_first(kind: type[nn.RNNBase]) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(3, 5, batch_first=True, dtype=torch.float64)


def gradients_of_h_n_in_place(model: nn.RNNBase, x: Tensor) -> list[Tensor]:
    """Of a loss on the final states alone, which are written to before; x is (T, B, 3)."""
    _, h_n = model(x.transpose(0, 1))
    h_n.mul_(2)
    h_n.square().mean().backward()
    return [p.grad for p in model.parameters()]


def fsdp_in_place(directory: Path) -> Any:
    """FSDP2 hangs its work on the outputs; where these are views, what writes to them cuts it off."""
    model = batch_first(rnnkern.RNN)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    gradients = gradients_of_h_n_in_place(model, share(batches()[0]))
    return [g.full_tensor() for g in gradients]  # type: ignore[attr-defined]


def fsdp_saves(directory: Path) -> Any:
    """Two steps, then a checkpoint of model and optimizer, which one process will go on from."""
    model = sharded(Model())
    optimizer = adam(model)
    train(model, share(batches()[:2]), optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory / "sharded")
    return weights(model)


def fsdp_loads(directory: Path) -> Any:
    """Goes on from the checkpoint of one process, which has trained an nn.RNN for two steps."""
    model = sharded(Model())
    optimizer = adam(model)
    load(model, optimizer, directory / "plain")
    train(model, share(batches()[2:]), optimizer)
    return weights(model)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint_id: Path) -> None:
    """A distributed checkpoint into whatever shape the model has here."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # nothing of what comes can have been there
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint_id)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


CASES = (
    ddp,
    ddp_static_graph_with_checkpointing,
    ddp_accumulation,
    ddp_frozen,
    ddp_watched,
    fsdp,
    fsdp_kept_gathered,
    fsdp_checkpointing,
    fsdp_accumulation,
    fsdp_watched,
    fsdp_mixed_precision,
    fsdp_in_place,
    fsdp_saves,
    fsdp_loads,
)


def attempt(case: Callable[[Path], Any], directory: Path) -> Any:
    try:
        return case(directory)
    except Exception:
        return traceback.format_exc()


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    # A case that fails on one rank alone keeps the other waiting: for so long.
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    answers: dict[str, Any] = {}
    for case in CASES:
        answers[case.__name__] = attempt(case, directory)
    torch.save(answers, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
