"""RNN and RNNCell: torch.nn's contract on top of the fused recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import padding
from rnnkern.functional import INF, LayerWeights, NormWeights, Output, TapFactory, at_once, autocast_enabled, rnn
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

    What torch.nn.RNN does not have:

    Args:
        clip: clamp every element of ∂L/∂h_t to ±clip on its way back through time (Graves 2013), inside the backward
            kernel. Units of L / h; inf for none.
        recurrent_dropout: probability of dropping a unit of h_{t-1} on its way into h_t while training, with one mask
            per sequence (Gal & Ghahramani 2016). No kernel computes it: it runs in plain PyTorch, step by step.
        layer_norm: ``'input'`` normalises x_t W_ihᵀ + b_ih + b_hh over its H units, outside the kernel;
            ``'preactivation'`` normalises all that the nonlinearity gets (Ba, Kiros & Hinton 2016), which no kernel
            computes: it runs in plain PyTorch, step by step. Adds ``norm_weight_l{k}`` and ``norm_bias_l{k}`` (H),
            with ``_reverse`` for the other direction, which begin at 1 and 0.
        residual: add its input to the output of every layer but the first.
        allow_empty: T = 0 is no error; its output is empty and h_n is hx. With ``lengths``, samples may have length 0.

    Shapes:
        input (T, B, I), (B, T, I) with ``batch_first``, (T, I) unbatched, or a PackedSequence;
        hx (num_layers·D, B, H), zeros by default; output (T, B, D·H); h_n (num_layers·D, B, H).
        D is 2 if bidirectional, else 1.

    Raises:
        ValueError, TypeError: from the constructor, as torch.nn.RNN.
        ValueError: input that is not 2-D or 3-D, or whose dtype is not that of the weights; lengths that do not fit.
        RuntimeError: sizes of ``input`` or ``hx`` that do not fit, an empty sequence, ``hx`` of another dtype,
            tensors on different devices, or an option that a backend named by the caller does not serve.
    """

    #: set by rnnkern.watch for as long as it watches
    tap: TapFactory | None = None

    # What modules have that were made by torch.nn.RNN or by an earlier version, and read from a file.
    clip: float = INF
    recurrent_dropout: float = 0.0
    layer_norm: str | None = None
    residual: bool = False
    allow_empty: bool = False

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
        clip: float = INF,
        recurrent_dropout: float = 0.0,
        layer_norm: str | None = None,
        residual: bool = False,
        allow_empty: bool = False,
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
        self._set_options(clip, recurrent_dropout, layer_norm, residual, allow_empty)
        for suffix in self._suffixes() if layer_norm is not None else ():
            for name, value in (("norm_weight", torch.ones), ("norm_bias", torch.zeros)):
                setattr(self, name + suffix, nn.Parameter(value(hidden_size, device=device, dtype=dtype)))

    def _set_options(
        self, clip: float, recurrent_dropout: float, layer_norm: str | None, residual: bool, allow_empty: bool
    ) -> None:
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0:
            raise ValueError(f"clip must be a positive number (inf for none), got {clip!r}")
        if isinstance(recurrent_dropout, bool) or not isinstance(recurrent_dropout, (int, float)):
            raise TypeError(f"recurrent_dropout must be a number, got {type(recurrent_dropout).__name__}")
        if not 0 <= recurrent_dropout <= 1:
            raise ValueError(f"recurrent_dropout must be in [0, 1], got {recurrent_dropout}")
        if layer_norm not in (None, "input", "preactivation"):
            raise ValueError(f"layer_norm must be None, 'input' or 'preactivation', got {layer_norm!r}")
        for name, value in (("residual", residual), ("allow_empty", allow_empty)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        self.clip, self.recurrent_dropout = float(clip), float(recurrent_dropout)
        self.layer_norm, self.residual, self.allow_empty = layer_norm, residual, allow_empty

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, one for each layer and direction."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def reset_parameters(self) -> None:
        """Weights and biases from U(±1/√H), in the order of torch.nn.RNN; normalisations at 1 and 0."""
        norms = {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("norm_")}
        bound = self.hidden_size**-0.5
        for name, p in self.named_parameters():
            if name not in norms:
                nn.init.uniform_(p, -bound, bound)
        for name, p in norms.items():
            nn.init.constant_(p, 1 if name.startswith("norm_weight") else 0)

    def extra_repr(self) -> str:
        """As torch.nn.RNN's, and the options that it does not have where they are in use."""
        return ", ".join([super().extra_repr(), *self._beyond_nn_rnn()])

    def _beyond_nn_rnn(self) -> list[str]:
        """The options in use that torch.nn.RNN does not have, as keyword arguments."""
        options = ("clip", "recurrent_dropout", "layer_norm", "residual", "allow_empty")
        return [f"{name}={getattr(self, name)!r}" for name in options if getattr(self, name) != getattr(RNN, name)]

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_states: bool = False,
    ) -> Any:
        """output and h_n; see the class for shapes and errors.

        Args:
            input, hx: as for torch.nn.RNN.
            lengths: (B,) the steps that each sample of a padded, batched ``input`` has, in any order: as a
                PackedSequence without packing. output is 0 in the steps that a sample does not have, and h_n is each
                sample's state after its own last step. A tensor on a GPU is waited for.
            return_states: also return a tuple with the states of every layer, each shaped like output; before dropout
                and residual connections.
        """
        if isinstance(input, torch.fx.Proxy):
            return _leaf(self, input, hx, {"lengths": lengths, "return_states": return_states})
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which has its own")
            indices = input.sorted_indices, input.unsorted_indices
            result = self._run(input.data, hx, input.batch_sizes, *indices, with_states=return_states)
            return _returned(result, lambda rows: PackedSequence(rows, input.batch_sizes, *indices), return_states)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        if not batched:
            if lengths is not None:
                raise ValueError(f"lengths must be None for an unbatched input, got {lengths}")
            result = self._run(input.unsqueeze(1), None if hx is None else hx.unsqueeze(1), with_states=return_states)
            result = result._replace(h_n=result.h_n.squeeze(1))
            return _returned(result, lambda rows: rows.squeeze(1), return_states)
        x = input.transpose(0, 1) if self.batch_first else input
        if lengths is None:
            result = self._run(x, hx, with_states=return_states)
        else:
            result = padding.run(self._run, x, hx, lengths, self.allow_empty, return_states)
        return _returned(result, (lambda rows: rows.transpose(0, 1)) if self.batch_first else None, return_states)

    def _run(
        self,
        input: Tensor,  # (T, B, I), or packed (N, I)
        hx: Tensor | None,
        batch_sizes: Tensor | None = None,
        sorted_indices: Tensor | None = None,
        unsorted_indices: Tensor | None = None,
        with_states: bool = False,
    ) -> Output:
        T, B = input.shape[:2] if batch_sizes is None else (len(batch_sizes), _samples(hx, batch_sizes, sorted_indices))
        weights = self._weights()
        tap = None if self.tap is None or T == 0 else self.tap
        make_taps = None if tap is None else lambda: tap(input, T, B, batch_sizes, unsorted_indices)
        if batch_sizes is None and not with_states and self._is_plain():
            done = at_once(input, hx, weights, self.nonlinearity, self.bidirectional, self.clip, make_taps)
            if done is not None:
                return Output(*done, [])
        states = (self.num_layers * (2 if self.bidirectional else 1), B, self.hidden_size)
        self._check(input, hx, batch_sizes, weights, states)
        if hx is None:
            hx = torch.zeros(states, dtype=input.dtype, device=input.device)
        elif sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        if T == 0 and not self.allow_empty:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        result = rnn(
            input,
            hx,
            weights,
            nonlinearity=self.nonlinearity,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            clip=self.clip,
            recurrent_dropout=self.recurrent_dropout,
            layer_norm=self.layer_norm,
            norms=() if self.layer_norm is None else self._norms(),
            residual=self.residual,
            with_states=with_states,
            taps=None if make_taps is None else make_taps(),
        )
        if unsorted_indices is None:
            return result
        return result._replace(h_n=result.h_n.index_select(1, unsorted_indices))

    def _is_plain(self) -> bool:
        """Whether a forward is that of a torch.nn.RNN without dropout."""
        drops = self.training and (self.dropout > 0 or self.recurrent_dropout > 0)
        return self.layer_norm is None and not self.residual and not drops

    def _check(
        self,
        input: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        weights: list[LayerWeights],
        states: tuple[int, int, int],
    ) -> None:
        """Raise where an argument does not fit: torch.nn.RNN's checks, and that all lies in one place."""
        weight, casts = weights[0][0], torch._C._is_any_autocast_enabled()
        dtype_fits = input.dtype == weight.dtype or casts
        shape_fits = input.dim() == (3 if batch_sizes is None else 2) and input.shape[-1] == self.input_size
        if not (dtype_fits and shape_fits):
            self.check_input(input, batch_sizes)  # raises; it reads the weights anew, which may have to be computed
        if weight.device != input.device:
            raise RuntimeError(
                f"input must be on the device of the weights ({weight.device}), got {input.device}. "
                f"Convert input: input.to('{weight.device}'), or convert model: model.to('{input.device}')"
            )
        for names, of_layer in zip(self._all_weights, weights):
            for name, w in zip(names, of_layer):
                if w is not None and (w.device != weight.device or (w.dtype != weight.dtype and not casts)):
                    kind = "dtype" if w.device == weight.device else "device"
                    expected, got = getattr(weight, kind), getattr(w, kind)
                    raise RuntimeError(f"{name} must have the {kind} of weight_ih_l0 ({expected}), got {got}")
        if hx is None:
            return
        self.check_hidden_size(hx, states)
        if hx.device != input.device:
            raise RuntimeError(f"hx must be on the device of input ({input.device}), got {hx.device}")
        if hx.dtype != input.dtype and not autocast_enabled(input.device):
            raise RuntimeError(f"hx must have the dtype of input ({input.dtype}), got {hx.dtype}")

    def _weights(self) -> list[LayerWeights]:
        """The weights by name, as they are at this moment."""
        parameters, biases = self._parameters, (None, None)
        try:  # half the time of getattr, which comes last to where parameters are
            if not torch.compiler.is_compiling():
                return [
                    (*[parameters[name] for name in names], *(() if self.bias else biases))
                    for names in self._all_weights
                ]
        except KeyError:
            pass  # one is computed, and an attribute of another kind
        return [
            (*(getattr(self, name) for name in names), *(() if self.bias else biases)) for names in self._all_weights
        ]

    def _norms(self) -> list[NormWeights]:
        return [(getattr(self, "norm_weight" + end), getattr(self, "norm_bias" + end)) for end in self._suffixes()]

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
        """Take the states of all versions of torch.nn.RNN too: beside the parameters they keep this and that."""
        nn.Module.__setstate__(self, state)
        for name in ("_flat_weights", "all_weights", "_data_ptrs"):
            self.__dict__.pop(name, None)
        self.__dict__.setdefault("proj_size", 0)
        self.__dict__.setdefault("nonlinearity", self.mode.removeprefix("RNN_").lower())
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        self._all_weights = [[kind + suffix for kind in kinds] for suffix in self._suffixes()]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._flat_weight_refs = []

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


def _samples(hx: Tensor | None, batch_sizes: Tensor, sorted_indices: Tensor | None) -> Any:
    """B of packed rows. A compiler does not know what batch_sizes holds: there B comes from a shape where it can."""
    if not torch.compiler.is_compiling():
        return int(batch_sizes[0])
    if hx is not None and hx.dim() == 3:
        return hx.shape[1]
    return int(batch_sizes[0]) if sorted_indices is None else sorted_indices.shape[0]


def _leaf(module: nn.Module, input: torch.fx.Proxy, hx: Any, options: dict[str, Any]) -> torch.fx.Proxy:
    """A call of the module in the graph that torch.fx.symbolic_trace makes, as torch.nn's modules have one."""
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, hx), options)


def _returned(result: Output, form: Callable[[Tensor], Any] | None, with_states: bool) -> Any:
    """What forward returns: ``form`` gives every layer's rows the form of the input."""
    output = result.output if form is None else form(result.output)
    if not with_states:
        return output, result.h_n
    return output, result.h_n, tuple(result.states if form is None else map(form, result.states))


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

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state; see the class for shapes and errors."""
        if isinstance(input, torch.fx.Proxy):
            return _leaf(self, input, hx, {})
        return super().forward(input, hx)

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
