"""A module of torch.nn becomes one of rnnkern, or the other way: same parameters, same names, another class.

Everything that a user has hung on a module (parameters, buffers, hooks, mode, attributes) lives in the instance, and
what it computes in the class. So the class is all that changes, and with it what torch.nn.RNN keeps beside its
parameters: a flat list of them, which rnnkern.RNN does not need.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one beneath it where torch.nn.utils.parametrize has made a class of its own."""
    return parametrize.type_before_parametrizations(module)


def recast(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give ``module`` the class ``kind``, in place. A parametrized class is made anew, on top of ``kind``."""
    if isinstance(module, nn.RNN):
        module.nonlinearity = module.mode.removeprefix("RNN_").lower()  # nn.RNN computes by its mode
    if parametrize.is_parametrized(module):
        made = type(module)
        namespace = {name: value for name, value in vars(made).items() if name not in ("__dict__", "__weakref__")}
        kind = type(made.__name__, (kind,), namespace)
    module.__class__ = kind
    if isinstance(module, nn.RNNBase):
        module.mode = f"RNN_{str(module.nonlinearity).upper()}"
        module.__dict__.pop("_flat_weights", None)
        module._flat_weight_refs = []
        module._init_flat_weights()  # nn.RNN's; rnnkern.RNN reads its weights by name


def share(module: nn.Module, kind: type[nn.Module]) -> Any:
    """A new module of class ``kind``: a copy of ``module`` with the same parameters, buffers, hooks and attributes.

    The objects are the same, what holds them is the copy's own: adding or removing one there leaves ``module`` alone.

    Raises:
        ValueError: ``forward`` was replaced on the instance, where it may be bound to ``module`` itself.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of this {type(module).__name__} was replaced on the instance, and knows it alone"
        )
    own = vars(nn.Module())  # what holds parameters, buffers, hooks, submodules
    attributes = [value for name, value in vars(module).items() if name not in own]
    hooks = [hook for name in own if "hooks" in name for hook in vars(module)[name].values()]
    # nn.Module wraps some hooks together with their module: those wrappers are copied, to lead to the copy.
    shared = [*module.parameters(), *module.buffers(), *attributes, *(getattr(hook, "hook", hook) for hook in hooks)]
    other = copy.deepcopy(module, {id(value): value for value in shared})
    for name in ("_compiled_call_impl", "tap"):  # these know the original
        other.__dict__.pop(name, None)
    recast(other, kind)
    return other
