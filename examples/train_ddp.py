"""An RNN in DDP learns to add, and rank 0 prints the gradient flow of all ranks.

    torchrun --nproc-per-node 2 examples/train_ddp.py      # gloo; nccl where each process has a GPU
    python examples/train_ddp.py                           # one process, the same numbers

The task (Hochreiter & Schmidhuber 1997): of a sequence of random numbers add the two that are marked; the loss comes at
the end. The batch is shared out between the ranks, evenly or not: each loss is a sum over the rank's samples, so scaled
that DDP's mean over the ranks is the mean over the batch.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rnnkern


class Adder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = rnnkern.RNN(2, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1]).squeeze(-1)


def adding(T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input (T, B, 2), numbers and marks, and the sums (B,): one mark in each half."""
    numbers = torch.rand(T, B, generator=generator)
    halves = torch.stack([torch.randint(0, T // 2, (B,), generator=generator) + half * (T // 2) for half in (0, 1)])
    marks = torch.zeros(T, B).scatter_(0, halves, 1)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> list[Tensor]:
    """The global norms of each step, (layers, directions, T) float64."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    model: nn.Module = Adder(args.hidden).to(device, dtype)
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(args.seed)  # all ranks make the same batch and take their share
    norms = []
    with rnnkern.watch(model, every=args.every) as flow:
        for step in range(args.steps):
            x, y = (a.to(device, dtype) for a in adding(args.length, args.batch, generator))
            mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
            loss = (model(x[:, mine]) - y[mine]).square().sum() * world / args.batch
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % args.every == 0:  # on every rank: all_reduce is a collective
                record = flow.read()
                if world > 1:
                    record = record.all_reduce()
                norms.append(torch.from_numpy(record.norm))
                if rank == 0:
                    print(record, flush=True)
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps from one record to the next")
    parser.add_argument("--length", type=int, default=50, help="T, at least 2")
    parser.add_argument("--batch", type=int, default=64, help="samples of all ranks together")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--out", type=Path, help="where rank 0 saves the norms of all records, with torch.save")
    args = parser.parse_args()
    rank, world, local = (int(os.environ.get(name, one)) for name, one in
                          [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])  # fmt: skip
    if args.length < 2 or args.batch < world:
        parser.error(f"--length must be at least 2 and --batch at least {world}")
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    norms = train(args, rank, world, device)
    if rank == 0 and args.out:
        torch.save(torch.stack(norms), args.out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
