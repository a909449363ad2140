"""Methods of our own in the place of an object's: on the instance, and only for as long as somebody watches it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

Owner = TypeVar("Owner")


class StandIn(Generic[Owner]):
    """What stands in for some methods of one object, the owner, which it does not keep alive.

    Copies and files of the owner do not get it: ``__getstate__`` is among the methods of every subclass.

    Attributes:
        METHODS: what stands on the instance, and the method of the subclass that does.
        replaced: what the instance had there before.
    """

    METHODS: ClassVar[dict[str, str]]

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.ref(owner)
        self.replaced = {method: vars(owner)[method] for method in self.METHODS if method in vars(owner)}

    @classmethod
    def of(cls, owner: object) -> Any:
        """The one that stands on that object, or None."""
        found = getattr(vars(owner).get("__getstate__"), "__self__", None)
        return found if isinstance(found, cls) else None

    @property
    def owner(self) -> Owner:
        """The object, which must still be there."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"{self!r}: the object whose method this was is gone")
        return owner

    def stand_in(self) -> None:
        """Take the place of the owner's methods."""
        vars(self.owner).update({method: getattr(self, own) for method, own in self.METHODS.items()})

    def give_back(self, attributes: dict[str, Any]) -> None:
        """Take back what is still this one's own, in the attributes of the owner or of a copy."""
        for method in self.METHODS:
            if getattr(attributes.get(method), "__self__", None) is self:
                del attributes[method]
                if method in self.replaced:
                    attributes[method] = self.replaced[method]

    def own(self, method: str) -> Callable[..., Any]:
        """The owner's method, as if nobody stood in for it."""
        if method in self.replaced:
            replaced: Callable[..., Any] = self.replaced[method]
            return replaced
        return functools.partial(getattr(type(self.owner), method), self.owner)

    def state(self) -> Any:
        """For copies and files: nobody stands in there."""
        state = self.own("__getstate__")()
        if isinstance(state, dict):
            state = state.copy()
            self.give_back(state)
        return state
