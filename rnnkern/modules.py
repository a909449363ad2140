"""RNN and RNNCell: torch.nn's contract on top of the fused recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern.functional import LayerWeights, TapFactory, autocast_enabled, rnn
from rnnkern.recast import plain_class, share


class RNN(nn.RNNBase):
    """A drop-in replacement for :class:`torch.nn.RNN`, computed by fused kernels.

    Arguments, inputs, outputs, parameter names, initial values and errors are those of :class:`torch.nn.RNN`;
    ``state_dict`` moves both ways. In addition:

    - weights are read by name at every call, so that parametrizations, pruning, ``.data =`` and
      ``functional_call`` always reach the output;
    - double backward, forward-mode AD and ``torch.func`` transforms work;
    - :func:`rnnkern.watch` sees ‖∂L/∂h_t‖ for every step of the training run.

    Args:
        input_size: number of input features I.
        hidden_size: number of hidden units H.
        num_layers: number of stacked layers.
        nonlinearity: ``'tanh'`` or ``'relu'``.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are (B, T, ·) instead of (T, B, ·); states are not affected.
        dropout: probability of dropout on the output of each layer but the last, while training.
        bidirectional: a second set of weights (``_reverse``) walks the sequence from its end.
        proj_size: not for RNN; as with :class:`torch.nn.RNN` it is a ValueError.

    Shapes:
        input (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence;
        hx (num_layers·D, B, H), zeros by default; output (T, B, D·H); h_n (num_layers·D, B, H).
        D is 2 if bidirectional, else 1.

    Raises:
        ValueError, TypeError: from the constructor, as torch.nn.RNN.
        ValueError: input that is not 2-D or 3-D, or whose dtype is not that of the weights.
        RuntimeError: sizes of ``input`` or ``hx`` that do not fit, an empty sequence, ``hx`` of another dtype, or
            tensors on different devices.
    """

    #: set by rnnkern.watch for as long as it watches
    tap: TapFactory | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        proj_size: int | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if nonlinearity not in modes:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """output and h_n; see the class for shapes and errors."""
        if isinstance(input, PackedSequence):
            output, h_n = self._run(input.data, hx, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices), h_n
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        if not batched:
            output, h_n = self._run(input.unsqueeze(1), None if hx is None else hx.unsqueeze(1))
            return output.squeeze(1), h_n.squeeze(1)
        if not self.batch_first:
            return self._run(input, hx)
        output, h_n = self._run(input.transpose(0, 1), hx)
        return output.transpose(0, 1), h_n

    def _run(
        self,
        input: Tensor,  # (T, B, I), or packed (N, I)
        hx: Tensor | None,
        batch_sizes: Tensor | None = None,
        sorted_indices: Tensor | None = None,
        unsorted_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        B = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        states = (self.num_layers * (2 if self.bidirectional else 1), B, self.hidden_size)
        if hx is None:
            hx = torch.zeros(states, dtype=input.dtype, device=input.device)
        elif sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hx, states)
        if batch_sizes is None and input.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        self._check_places(hx, input)
        T = input.shape[0] if batch_sizes is None else len(batch_sizes)
        output, h_n = rnn(
            input,
            hx,
            self._weights(),
            nonlinearity=self.nonlinearity,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            taps=None if self.tap is None else self.tap(T, B, batch_sizes, unsorted_indices, input.device),
        )
        return output, h_n if unsorted_indices is None else h_n.index_select(1, unsorted_indices)

    def _check_places(self, hx: Tensor, input: Tensor) -> None:
        weight = self.weight_hh_l0
        if weight.device != input.device:
            raise RuntimeError(
                f"input must be on the device of the weights ({weight.device}), got {input.device}. "
                f"Convert input: input.to('{weight.device}'), or convert model: model.to('{input.device}')"
            )
        if hx.device != input.device:
            raise RuntimeError(f"hx must be on the device of input ({input.device}), got {hx.device}")
        if hx.dtype != input.dtype and not autocast_enabled(input.device):
            raise RuntimeError(f"hx must have the dtype of input ({input.dtype}), got {hx.dtype}")

    def _weights(self) -> list[LayerWeights]:
        """The weights by name, as they are at this moment."""
        biases = (None, None)
        return [
            (*(getattr(self, name) for name in names), *(() if self.bias else biases)) for names in self._all_weights
        ]

    # torch.nn.RNN keeps its weights a second time in a flat list, which falls behind when a weight is replaced, and
    # cannot be copied when a weight is computed. There is no such list here; the base class's uses of it read by name.

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the weights where they are."""

    def _replicate_for_data_parallel(self) -> Any:
        return nn.Module._replicate_for_data_parallel(self)

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("tap", None)  # a copy or a file is not watched
        state.pop("_compiled_call_impl", None)  # it would call the original; nn.Module leaves it out too
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_flat_weights", None)  # pickles of torch.nn.RNN carry one

    @classmethod
    def from_torch(cls, rnn: nn.RNN) -> RNN:
        """A new module that shares the parameters of a torch.nn.RNN: the same objects, so training one trains both.

        Options, mode, buffers, hooks, parametrizations and attributes come along; see :func:`rnnkern.convert` for a
        whole model, in place.

        Raises:
            TypeError: ``rnn`` is not a torch.nn.RNN, or is of a subclass, whose own methods would be lost.
            ValueError: its ``forward`` was replaced on the instance.
        """
        if plain_class(rnn) is not nn.RNN:
            raise TypeError(f"rnn must be a torch.nn.RNN, and of no subclass, got {type(rnn).__name__}")
        return share(rnn, cls)

    def to_torch(self) -> nn.RNN:
        """A torch.nn.RNN that shares the parameters: for what knows torch.nn's modules alone, as TorchScript and ONNX.

        What :meth:`from_torch` says of what comes along holds here too. The new module is not watched.

        Raises:
            TypeError: this is a subclass of rnnkern.RNN, whose own methods would be lost.
            ValueError: options are in use that torch.nn.RNN does not have; it names them. Or ``forward`` was replaced
                on the instance.
        """
        if plain_class(self) is not RNN:
            raise TypeError(f"{type(self).__name__} is a subclass of rnnkern.RNN: torch.nn.RNN lacks what it adds")
        beyond = self._beyond_nn_rnn()
        if beyond:
            raise ValueError(f"torch.nn.RNN has no {', '.join(beyond)}")
        return share(self, nn.RNN)

    def _beyond_nn_rnn(self) -> list[str]:
        """Names of the options in use that torch.nn.RNN does not have."""
        return []


class RNNCell(nn.RNNCell):
    """:class:`torch.nn.RNNCell`: one step, h' = f(x W_ihᵀ + b_ih + h W_hhᵀ + b_hh).

    A single step has no chain to fuse: its two products and its activation are PyTorch's own operators, which are the
    fastest there are for it. The class stands here so that one import serves both. Where you hold a whole sequence,
    give it to :class:`RNN` instead of looping over cells.

    Shapes: input (B, I) or (I), hx (B, H) or (H), zeros by default; output like hx.

    Raises:
        ValueError: input or hx that is not 1-D or 2-D.
        RuntimeError: sizes or dtypes that do not fit, an unknown nonlinearity.
    """

    @classmethod
    def from_torch(cls, cell: nn.RNNCell) -> RNNCell:
        """A new cell that shares the parameters of a torch.nn.RNNCell, as :meth:`RNN.from_torch` does."""
        if plain_class(cell) is not nn.RNNCell:
            raise TypeError(f"cell must be a torch.nn.RNNCell, and of no subclass, got {type(cell).__name__}")
        return share(cell, cls)

    def to_torch(self) -> nn.RNNCell:
        """A torch.nn.RNNCell that shares the parameters, as :meth:`RNN.to_torch` makes one."""
        if plain_class(self) is not RNNCell:
            raise TypeError(
                f"{type(self).__name__} is a subclass of rnnkern.RNNCell: torch.nn.RNNCell lacks what it adds"
            )
        return share(self, nn.RNNCell)
