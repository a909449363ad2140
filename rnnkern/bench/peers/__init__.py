"""All peers, in the order of the tables. How to add one: docs/method.md."""

from __future__ import annotations

from rnnkern.backends import BACKENDS
from rnnkern.bench.peers.base import Peer, Work
from rnnkern.bench.peers.cell_loop import CellLoop
from rnnkern.bench.peers.flashrnn import FlashRnn
from rnnkern.bench.peers.gemm import Gemm
from rnnkern.bench.peers.graphs import Graphed
from rnnkern.bench.peers.jax import Jax
from rnnkern.bench.peers.onnxruntime import OnnxRuntime
from rnnkern.bench.peers.openvino import OpenVino
from rnnkern.bench.peers.torch_compile import TorchCompile
from rnnkern.bench.peers.torch_modules import Rnnkern, TorchRNN

__all__ = ["PEERS", "Peer", "Work"]

_KERNELS = [Rnnkern(backend) for backend in BACKENDS if backend != "reference"]
_ALL: tuple[Peer, ...] = (
    *_KERNELS,
    *(Graphed(peer) for peer in _KERNELS if peer.backend != "cpu"),
    TorchRNN(),
    Graphed(TorchRNN()),
    CellLoop(),
    TorchCompile(),
    Jax(),
    OnnxRuntime(),
    OpenVino(),
    FlashRnn(),
    Gemm(),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
