"""Initial values for the recurrent weights: orthogonal, identity, a given spectral radius. In place, without gradients.

Each W_hh of every layer and direction is set on its own, and each of the H×H blocks that a gated net has in its one.
Modules: :class:`rnnkern.RNN`, :class:`torch.nn.RNN`, LSTM, GRU, and their cells.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def orthogonal_(rnn: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Each H×H block of W_hh becomes ``gain`` times an orthogonal matrix, uniformly distributed (Saxe et al. 2014).

    All singular values are ``gain``: with a state near zero the gradient changes by that factor per step, whatever its
    direction.

    Args:
        rnn: the module; all else in it stays as it is.
        gain: positive and finite.
        generator: to draw from; None for the global one of the weights' device.

    Returns:
        ``rnn``.

    Raises:
        TypeError: ``rnn`` is no recurrent module of torch.nn's kind.
        ValueError: a gain that does not fit; weights that are computed from others (parametrizations, pruning), are
            not square (``proj_size``), or are complex.
    """
    _check_positive("gain", gain)
    with torch.no_grad():
        for block in _blocks(rnn):
            device = block.device if generator is None else generator.device
            gaussian = torch.randn(block.shape, dtype=torch.float64, device=device, generator=generator)
            q, r = torch.linalg.qr(gaussian)
            q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # without it q prefers the signs that QR prefers
            block.copy_(gain * q)
    return rnn


def identity_(rnn: Module, scale: float = 1.0) -> Module:
    """W_hh becomes ``scale`` times the identity and the biases 0: the IRNN of Le, Jaitly & Hinton (2015).

    Meant for ReLU, which with ``scale=1`` adds up its input and passes the gradient on as it is. W_ih stays as it is
    (they drew it from a normal distribution with a standard deviation of 0.001).

    Args:
        rnn: an RNN or RNNCell; the gates of an LSTM or GRU would get nothing of what the identity is for.
        scale: positive and finite. They took 0.01 where long memory did harm.

    Returns:
        ``rnn``.

    Raises:
        TypeError: ``rnn`` is no RNN or RNNCell.
        ValueError: as :func:`orthogonal_`.
    """
    _check_positive("scale", scale)
    if not (isinstance(rnn, nn.RNNBase) and rnn.mode in ("RNN_TANH", "RNN_RELU")) and not isinstance(rnn, nn.RNNCell):
        raise TypeError(f"rnn must be an RNN or RNNCell, of rnnkern or torch.nn, got {type(rnn).__name__}")
    weights, biases = _blocks(rnn), [_own(rnn, name) for name in _names(rnn, "bias_")]
    with torch.no_grad():
        for block in weights:
            block.copy_(scale * torch.eye(len(block), dtype=torch.float64, device=block.device))
        for bias in biases:
            bias.zero_()
    return rnn


def spectral_radius_(rnn: Module, radius: float) -> Module:
    """Scale each H×H block of W_hh so that its largest eigenvalue has the modulus ``radius``; its direction stays.

    The reservoirs of Jaeger (2001) begin so, with a radius around 1. Eigenvalues are computed in float64.

    Args:
        rnn: the module; all else in it stays as it is.
        radius: positive and finite.

    Returns:
        ``rnn``.

    Raises:
        TypeError: as :func:`orthogonal_`.
        ValueError: as :func:`orthogonal_`; or a block has no eigenvalue but 0, or is not finite. Nothing has been
            changed then.
    """
    _check_positive("radius", radius)
    blocks = _blocks(rnn)
    with torch.no_grad():
        wide = [block.double() for block in blocks]
        if not all(w.isfinite().all() for w in wide):
            raise ValueError("weight_hh has values that are not finite: they cannot be scaled")
        radii = [torch.linalg.eigvals(w).abs().max() for w in wide]
        if not all(rho > 0 for rho in radii):
            raise ValueError("weight_hh has a spectral radius of 0, which cannot be scaled")
        for block, w, rho in zip(blocks, wide, radii):
            block.copy_(w * (radius / rho))
    return rnn


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}")


def _names(rnn: nn.Module, prefix: str) -> list[str]:
    """Of the parameters that begin with ``prefix``, as the module's forward knows them."""
    if isinstance(rnn, nn.RNNBase):
        return [name for names in rnn._all_weights for name in names if name.startswith(prefix)]
    if isinstance(rnn, nn.RNNCellBase):
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if rnn.bias else [])]
        return [name for name in names if name.startswith(prefix)]
    raise TypeError(f"rnn must be an RNN, LSTM, GRU or one of their cells, got {type(rnn).__name__}")


def _own(rnn: nn.Module, name: str) -> Tensor:
    """A parameter that is the module's own, and nobody else's result."""
    value = rnn._parameters.get(name)
    if value is None:
        raise ValueError(
            f"{name} of this {type(rnn).__name__} is computed from other parameters (parametrized, pruned, "
            "weight_norm): initialise it before, or initialise those"
        )
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}")
    return value


def _blocks(rnn: nn.Module) -> list[Tensor]:
    """Views of every H×H block of every W_hh."""
    blocks: list[Tensor] = []
    for name in _names(rnn, "weight_hh"):
        weight = _own(rnn, name)
        H = int(rnn.hidden_size)  # type: ignore[arg-type]
        if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] % H:
            raise ValueError(f"{name} must consist of blocks of {H}×{H}, got {list(weight.shape)} (proj_size?)")
        blocks += weight.detach().split(H)
    return blocks
