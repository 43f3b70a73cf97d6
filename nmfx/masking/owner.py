"""The masked attribute: a module's weight read as ``where(mask, weight, 0)``, everything else as it was.

The owner changes class to a subclass of its own class in which the attribute is a property. The Parameter stays in
``_parameters`` under its own name, so state-dict keys, optimisers and checkpoints see what they always saw; whoever reads
``module.weight`` (its own forward, a parent's ``F.linear``, ``F.multi_head_attention_forward``, an LSTM) gets the masked value.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmfx.errors import NmfxError
from nmfx.masking.derived import Substitute, derive, fold, is_derivable
from nmfx.masking.updates import register_owner
from nmfx.masking.weight import STATES, MaskSpec, MaskState, evidence_name, mask_name, write_mask

FOLDED = "_derivation_folded"  # in the __dict__ of a baked module: the class that derived its weight before
MASKED = "_sites_masked"  # in the __dict__ of a model: names of the sites that were masked in it as a whole


@cache
def _masked_class(base: type[nn.Module], attrs: tuple[str, ...], derived: bool = False) -> type[nn.Module]:
    """Subclass of `base` in which `attrs` are read masked. Made once for each pair, so that compilers see stable types.

    Args:
        derived: its one attribute is masked as its forward pass hands it to a product.
    """

    def masked(attr: str) -> property:
        def read(self: nn.Module) -> Any:
            # Through __getattr__, which fx patches while it traces; reading _parameters would bake a constant.
            return self.__dict__[STATES][attr].read(self, attr, nn.Module.__getattr__(self, attr))

        def write(self: nn.Module, value: Any) -> None:
            raise NmfxError(f"{type(self).__name__}.{attr} is masked: assign an nn.Parameter, got {type(value).__name__}")

        return property(read, write)

    def reduce(self: nn.Module, protocol: int) -> Any:
        for state in self.__dict__[STATES].values():
            state.check_writes()
        state = base.__getstate__(self)  # type: ignore[attr-defined]
        return _rebuild, (base, attrs, derived), dict(state)

    def save(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        for state in self.__dict__[STATES].values():
            state.check_writes()
        base._save_to_state_dict(self, *args, **kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        (attr, state), *_ = self.__dict__[STATES].items()
        shape = cast(Tensor, nn.Module.__getattr__(self, attr)).shape
        with Substitute(shape, lambda value: state.read_derived(self, attr, value)):
            return base.forward(self, *args, **kwargs)

    body: dict[str, Any] = {"forward": forward} if derived else {attr: masked(attr) for attr in attrs}
    body["_save_to_state_dict"] = save
    if issubclass(base, nn.RNNBase):  # keeps its weights in a list of its own: read them by name instead
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
        body["__setattr__"] = nn.Module.__setattr__  # its own would read that list, and mask what FSDP is about to put there
    # fx takes modules for leaves by their class's __module__: a masked convolution is as much a leaf as a plain one.
    body |= {"__module__": base.__module__, "__reduce_ex__": reduce, "_plain_class": base, "_masked_attrs": attrs}
    body["_masks_derived"] = derived
    return type(f"Masked{base.__name__}", (base,), body)


def _rebuild(base: type[nn.Module], attrs: tuple[str, ...], derived: bool = False) -> nn.Module:
    cls = _masked_class(base, attrs, derived)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    register_owner(module)
    return module


def is_masked(module: nn.Module) -> bool:
    """Whether any attribute of this module is masked."""
    return hasattr(type(module), "_plain_class")


def masks_derived(module: nn.Module) -> bool:
    """Whether a module masks what its forward pass makes of its weight, rather than the weight itself."""
    return getattr(type(module), "_masks_derived", False)


def can_derive(model: nn.Module, owners: list[tuple[str, str]]) -> bool:
    """Whether the weight at these places can be masked where its own module's forward pass reads it."""
    owner, attr = model.get_submodule(owners[0][0]), owners[0][1]
    return len(owners) == 1 and attr == "weight" and is_derivable(owner, plain_class(owner))


def mask_attribute(
    owner: nn.Module,
    attr: str,
    spec: MaskSpec,
    twin: tuple[nn.Module, str] | None = None,
    evidence: Tensor | None = None,
) -> None:
    """Mask ``owner.attr`` in place from now on.

    Args:
        owner, attr: the module, and the name of its weight.
        spec: what is asked of the mask.
        evidence: what the score needs, broadcastable to the rows of the grouping.
        twin: another owner and attribute of the same, tied, parameter: both read one masked value, in one autograd node.

    Raises:
        NmfxError: the module already has something under the mask's name.
    """
    weight = cast(nn.Parameter, owner._parameters[attr])
    attrs: tuple[str, ...] = (attr,)
    if is_masked(owner):
        attrs = tuple(dict.fromkeys((*type(owner)._masked_attrs, attr)))  # type: ignore[attr-defined]
    states = owner.__dict__.get(STATES, {})
    if attr not in states:
        for name in (mask_name(attr), evidence_name(attr)) if evidence is not None else (mask_name(attr),):
            if hasattr(owner, name):
                raise NmfxError(f"{spec.name}: its module already has an attribute {name!r}; rename that one")
        if evidence is not None:
            owner.register_buffer(evidence_name(attr), evidence.to(weight.device), persistent=False)
        if twin is not None:
            mask = cast(Tensor, twin[0]._buffers[mask_name(twin[1])])
        else:
            mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
        if twin is None and weight.device.type != "meta":
            value = derive(owner, plain_class(owner)) if spec.derived else weight
            mask = torch.empty_like(value, dtype=torch.bool, requires_grad=False)
            write_mask(owner, attr, spec, value, mask, torch.empty_like(value, requires_grad=False))
        owner.register_buffer(mask_name(attr), mask, persistent=False)
    owner.__dict__[STATES] = states
    states[attr] = MaskState(spec) if twin is None else twin[0].__dict__[STATES][twin[1]]
    owner.__dict__.pop("_flat_weights", None)
    owner.__class__ = _masked_class(plain_class(owner), attrs, spec.derived)  # type: ignore[arg-type]
    register_owner(owner)


def restore_mask(owner: nn.Module, attr: str, mask: Tensor) -> None:
    """Give a masked attribute the mask it had, in place of the one that was found from its weight; reads are by that one."""
    weight, state = cast(nn.Parameter, owner._parameters[attr]), owner.__dict__[STATES][attr]
    owner._buffers[mask_name(attr)] = mask.to(weight.device)
    if weight.device.type != "meta" and not state.spec.derived:
        state.refresh(owner, attr, weight, update=False)


def unmask(module: nn.Module, *, keep_masked: bool) -> None:
    """Give `module` its own class back, in place.

    Args:
        keep_masked: write the masked values into the parameters; otherwise the dense ones stay.
    """
    module.__dict__.pop(MASKED, None)
    if not is_masked(module):
        return
    values = {attr: read_masked(module, attr) for attr in module.__dict__[STATES]} if keep_masked else {}
    derived = masks_derived(module)
    for attr, state in module.__dict__.pop(STATES).items():
        state.check_writes()
        for name in (mask_name(attr), evidence_name(attr)):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
    module.__class__ = cls = plain_class(module)
    if derived and values and (off := fold(module, cls, values["weight"])) > 1e-3:
        raise NmfxError(
            f"{cls.__name__}: its forward pass does more than make a weight and read it (off by {off:.1g}), so it "
            f"cannot be baked into a plain layer"
        )
    if derived and values:
        module.__dict__[FOLDED] = cls.__name__
    with torch.no_grad():
        for attr, value in values.items():
            cast(nn.Parameter, module._parameters[attr]).copy_(value)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def unmask_model(model: nn.Module, *, keep_masked: bool) -> None:
    """The same for every module of `model`."""
    for module in model.modules():
        unmask(module, keep_masked=keep_masked)


@torch.no_grad()
def read_masked(owner: nn.Module, attr: str) -> Tensor:
    """The masked value of an attribute as products read it, without gradients."""
    if not masks_derived(owner):
        return cast(Tensor, getattr(owner, attr))
    state: MaskState = owner.__dict__[STATES][attr]
    return state.read_derived(owner, attr, derive(owner, plain_class(owner)))


@torch.no_grad()
def derived_or_own(owner: nn.Module, attr: str, *, derived: bool) -> Tensor:
    """The value that a product reads of an attribute, masked or plain.

    Args:
        derived: the module makes it of the attribute in its forward pass (see `nmfx.masking.derived`).
    """
    if derived and not masks_derived(owner):
        return derive(owner, plain_class(owner))
    return read_masked(owner, attr)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any of its attributes was masked."""
    return getattr(type(module), "_plain_class", type(module))
