"""convert(): rnnkern's modules in the place of torch.nn's, inside a model as it is."""

from __future__ import annotations

import logging
import warnings
from typing import TypeVar

import torch
from torch import nn

from rnnkern.modules import RNN, RNNCell
from rnnkern.recast import plain_class, recast

_log = logging.getLogger("rnnkern")

Model = TypeVar("Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}


def convert(model: Model) -> Model:
    """Make every torch.nn.RNN and torch.nn.RNNCell in ``model`` an rnnkern.RNN or RNNCell, in place.

    A module that is converted stays the object that it is and changes its class alone. So all of this is kept:
    parameters (the very objects: an optimizer goes on, tied weights stay tied) and their names, buffers, hooks of every
    kind, parametrizations, pruning, ``training``, ``requires_grad``, attributes, a module's being reachable by several
    names, and graphs whose backward is still to come. ``state_dict`` does not change. A compiled model compiles anew
    at its next call. What is rnnkern's already stays as it is, and so do nn.LSTM, nn.GRU and all other modules.

    Left as they are, with one warning that names them: subclasses of torch.nn.RNN and RNNCell, whose own methods would
    be lost (derive them from :class:`rnnkern.RNN`), and modules whose ``forward`` was replaced on the instance, since
    what stands there calls torch.nn's (convert before it is replaced). Only registered submodules are found: those that
    ``model.named_modules()`` lists.

    Not kept: ``isinstance(module, torch.nn.RNN)`` is no longer true, ``isinstance(module, torch.nn.RNNBase)`` is.

    Args:
        model: any module; it may itself be a torch.nn.RNN.

    Returns:
        ``model``. Which modules were converted, if any, is logged at INFO by the logger ``rnnkern``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module; it is TorchScript or holds an RNN in TorchScript, whose code is
            fixed; or a class of torch.distributed wraps an RNN in it (``fully_shard(rnn)``): convert before that.
            Nothing has been converted then.

    Example::

        model = rnnkern.convert(model)
        type(model.encoder.rnn)  # rnnkern.RNN
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found, left = {}, []
    for path, module in model.named_modules():
        name = path or "the model itself"
        if isinstance(module, torch.jit.ScriptModule):
            if module is model or module.original_name in ("RNN", "RNNCell"):
                raise TypeError(f"cannot convert {name}: it is TorchScript. Convert before torch.jit.script or trace")
        elif isinstance(module, (nn.RNN, nn.RNNCell)) and not isinstance(module, RNNCell):
            kind = plain_class(module)
            base = "RNN" if isinstance(module, nn.RNN) else "RNNCell"
            if any(parent.__module__.startswith("torch.distributed") for parent in type(module).__mro__):
                raise TypeError(
                    f"cannot convert {name}: its class {type(module).__name__} was made by torch.distributed. "
                    "Convert before fully_shard or replicate"
                )
            if kind not in OURS:
                left.append(f"{name} ({kind.__name__} is a subclass of torch.nn.{base}: derive it from rnnkern.{base})")
            elif "forward" in vars(module):
                left.append(f"{name} (its forward was replaced on the instance: convert before that)")
            else:
                found[name] = module
    for module in found.values():
        recast(module, OURS[plain_class(module)])
    if left:
        warnings.warn(f"convert() has left as they are: {', '.join(left)}", stacklevel=2)
    _log.info(f"convert({type(model).__name__}): {', '.join(found) or 'nothing to convert'}")
    return model
