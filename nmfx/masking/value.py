"""The masked value of a weight as a tensor of its own kind, so that writes to it reach the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MaskedWeight(Tensor):
    """The masked value of a weight, as a tensor whose writes reach the parameter.

    In-place methods, ``.data``, ``.grad`` and hooks act on the parameter (or, for a view of the value, on the same view of the
    parameter), and the value follows. It computes as any tensor does, at no extra cost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: Tensor
    refresh_value: Callable[[], None]

    @staticmethod
    def over(value: Tensor, parameter: Tensor, refresh_value: Callable[[], None]) -> MaskedWeight:
        """`value`, tied to `parameter`; `refresh_value` recomputes the value's memory after a write."""
        result = value.as_subclass(MaskedWeight)
        result.parameter, result.refresh_value = parameter, refresh_value
        return result

    def _get_data(self) -> MaskedWeight:
        return MaskedWeight.over(Tensor.detach(self), self.parameter.detach(), self.refresh_value)

    def _set_data(self, value: Tensor) -> None:
        own = getattr(value, "parameter", value)
        if own.data_ptr() != self.parameter.data_ptr() or own.shape != self.parameter.shape:
            self.parameter.data = value  # otherwise the end of `weight.data *= 2`, which has written already

    data = property(_get_data, _set_data)  # type: ignore[assignment]
    grad = property(  # type: ignore[assignment]
        lambda self: self.parameter.grad, lambda self, value: setattr(self.parameter, "grad", value)
    )
    requires_grad = property(  # type: ignore[assignment]
        lambda self: self.parameter.requires_grad, lambda self, value: setattr(self.parameter, "requires_grad", value)
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return Tensor.detach(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tensor.detach(self).clone().__reduce_ex__(protocol)


def _writing(name: str) -> Any:
    def method(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.parameter, name)(*args, **kwargs)
        self.refresh_value()
        return result

    return method


def _viewing(name: str) -> Any:
    plain = getattr(Tensor, name)

    def tie(self: MaskedWeight, value: Any, parameter: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(tie(self, v, p) for v, p in zip(value, parameter, strict=True))
        if value.untyped_storage()._cdata != self.untyped_storage()._cdata:
            return value  # a copy
        return MaskedWeight.over(value, parameter, self.refresh_value)

    def method(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        value = plain(self, *args, **kwargs)
        if torch.is_grad_enabled() and name != "detach" and isinstance(self.parameter, nn.Parameter):
            return value  # part of a computation
        return tie(self, value, plain(self.parameter, *args, **kwargs))

    return method


_WRITES = [name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")]
_WRITES += ["__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "register_hook"]
_VIEWS = "view view_as reshape reshape_as flatten unflatten t transpose permute movedim swapaxes swapdims squeeze unsqueeze "
_VIEWS += "narrow select expand expand_as diagonal unfold chunk split unbind __getitem__ detach"
for _name in _WRITES:
    setattr(MaskedWeight, _name, _writing(_name))
for _name in _VIEWS.split():
    setattr(MaskedWeight, _name, _viewing(_name))
