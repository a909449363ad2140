"""JAX: jit of lax.scan with the input projection before it, gradients by jax.vjp in the same jit."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch

from rnnkern.bench.cells import Cell
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.problem import Answers, Problem

#: Numbers of steps of the scan that are unrolled; the fastest of them is what is timed.
UNROLL = (1, 4)
TRIALS = 3


class Jax(Peer):
    name = "JAX"
    needs: ClassVar[dict[str, str]] = {"jax": "jax"}
    devices = ("cpu", "cuda")
    threads_for_good = True
    in_memory = True

    def unavailable(self, device: str) -> str | None:
        # XLA reads these when it makes its thread pool, and when it takes a GPU's memory.
        os.environ["PJRT_NPROC"] = str(torch.get_num_threads())
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        reason = super().unavailable(device)
        if reason is None and device == "cuda":
            import jax

            if jax.default_backend() != "gpu":
                return "this JAX has no GPU"
        return reason

    def refuses_cell(self, cell: Cell) -> str | None:
        return super().refuses_cell(cell) if cell.heads == 1 else "is written here for one of: heads"

    def prepare(self, problem: Problem) -> Work:
        import jax

        cell = problem.cell
        jax.config.update("jax_default_matmul_precision", "default" if cell.precision.tf32 else "highest")
        device = jax.devices("cpu" if problem.device == "cpu" else "gpu")[0]

        def there(value: torch.Tensor) -> Any:
            # through numpy; its bfloat16 is JAX's own
            value = value.detach().cpu()
            bits = value.view(torch.int16).numpy().view(jax.numpy.bfloat16) if value.dtype == torch.bfloat16 else None
            return jax.device_put(value.numpy() if bits is None else bits, device)

        weights = {name: there(value) for name, value in problem.weights[0].items()}
        inputs, gradient = [there(x) for x in problem.inputs], there(problem.gradient)
        trials: dict[int, Callable[[int], Any]] = {}
        for unroll in UNROLL:
            jitted = jax.jit(partial(_infer if cell.mode == "infer" else _train, unroll, cell.mode == "last"))
            compiled = jitted.lower(weights, inputs[0], gradient).compile()

            def call(i: int, compiled: Any = compiled) -> Any:
                return jax.block_until_ready(compiled(weights, inputs[i % len(inputs)], gradient))

            trials[unroll] = call
        unroll = _fastest(trials)
        if problem.device == "cpu" and (found := _pool_size()) not in (None, problem.threads):
            raise RuntimeError(f"XLA has {found} threads, not {problem.threads}: something has imported JAX before")

        def answers(result: Any) -> Answers:
            y, gradients = result
            named = {"output": y}
            if gradients is not None:
                named |= {"grad x": gradients[1], **{f"grad {n}": g for n, g in gradients[0].items()}}
            return {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in named.items()}

        others = ", ".join(str(n) for n in UNROLL if n != unroll)
        return Work(trials[unroll], answers, f"unroll={unroll} (faster than {others})")


def _pool_size() -> int | None:
    """Threads of XLA's pool, by the names that Linux knows them by; None where they cannot be counted."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("tf_XLAEigen") or None


def _rnn(unroll: int, weights: dict[str, Any], x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    z = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"] + weights["bias_hh_l0"]

    def step(h: Any, z_t: Any) -> tuple[Any, Any]:
        h = jnp.tanh(z_t + h @ weights["weight_hh_l0"].T)
        return h, h

    h0 = jnp.zeros(z.shape[1:], z.dtype)
    return jax.lax.scan(step, h0, z, unroll=unroll)[1]


def _infer(unroll: int, last: bool, weights: dict[str, Any], x: Any, gradient: Any) -> tuple[Any, None]:
    return _rnn(unroll, weights, x), None


def _train(unroll: int, last: bool, weights: dict[str, Any], x: Any, gradient: Any) -> tuple[Any, Any]:
    import jax

    def loss_side(weights: dict[str, Any], x: Any) -> tuple[Any, Any]:
        y = _rnn(unroll, weights, x)
        return (y[-1] if last else y), y

    _, pull, y = jax.vjp(loss_side, weights, x, has_aux=True)
    return y, pull(gradient)


def _fastest(trials: dict[int, Callable[[int], Any]]) -> int:
    """By the best of a few calls in turns."""
    best = dict.fromkeys(trials, float("inf"))
    for turn in range(TRIALS + 1):
        for key, call in trials.items():
            start = perf_counter()
            call(turn)
            if turn:
                best[key] = min(best[key], perf_counter() - start)
    return min(best, key=best.__getitem__)
