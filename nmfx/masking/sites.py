"""The masked sites of a model: finding them, changing what is asked of them, and noticing that some are gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from nmfx.errors import VerificationError
from nmfx.masking.owner import MASKED, is_masked, read_masked
from nmfx.masking.weight import STATES, MaskSpec, MaskState, evidence_name, mask_name


@dataclass(frozen=True)
class MaskedSite:
    """One masked attribute in a model.

    Attributes:
        owner: the module that holds the weight.
        path: name of the owner in the model.
        attr: name of the weight in the owner.
        state: its spec and cached value; owners of a tied weight share one.
    """

    owner: nn.Module
    path: str
    attr: str
    state: MaskState

    @property
    def name(self) -> str:
        """Its key in the state dict of the model; `spec` has that of the first owner."""
        return f"{self.path}.{self.attr}".lstrip(".")

    @property
    def spec(self) -> MaskSpec:
        """Pattern, groups and training settings."""
        return self.state.spec

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight, behind the mask."""
        return cast(nn.Parameter, self.owner._parameters[self.attr])

    @property
    def value(self) -> Tensor:
        """The masked weight as products read it."""
        return read_masked(self.owner, self.attr)

    @property
    def mask(self) -> Tensor:
        """The mask as of the current weights: bool, true = kept."""
        if not self.spec.frozen:
            read_masked(self.owner, self.attr)  # refreshes the mask when the weight has changed
        return cast(Tensor, self.owner._buffers[mask_name(self.attr)])

    @property
    def evidence(self) -> Tensor | None:
        """What its score needs beside the weights, if anything."""
        return self.owner._buffers.get(evidence_name(self.attr))

    def penalise(self, amount: float) -> None:
        """Have the next update add ``amount * weight`` to the gradient of what the last forward pass kept; 0: nothing."""
        mask = cast(Tensor, self.owner._buffers[mask_name(self.attr)])
        self.state.penalty = (amount, mask) if amount else None


def masked_sites(model: nn.Module) -> Iterator[MaskedSite]:
    """Every masked attribute of `model`, in module order; a tied weight comes once for each owner."""
    for path, module in model.named_modules():
        if is_masked(module):
            for attr, state in module.__dict__[STATES].items():
                yield MaskedSite(module, path, attr, state)


def recheck_weights(model: nn.Module) -> None:
    """Have the next read of every masked value compare it with its weight, which may have been written to without a trace."""
    for site in masked_sites(model):
        if site.state.cache is not None:
            site.state.cache.dirty = True


def respec(sites: Iterable[MaskedSite], *, keep_masks: bool = False, **changes: Any) -> None:
    """Change what is asked of masked sites: fields of `MaskSpec`, such as ``pattern`` or ``decay``. There is no other way.

    Args:
        sites: as `masked_sites` gives them; the owners of a tied weight share one spec.
        keep_masks: masks stay as they are until their weights change; otherwise the next read finds them anew.
        changes: new values of the fields, by name.
    """
    for site in sites:
        site.state.respec(keep_mask=keep_masks, **changes)


def freeze(model: nn.Module, frozen: bool = True) -> None:
    """Hold every mask as it is now, or with ``frozen=False`` let the masks follow the weights again.

    Raises:
        VerificationError: the masks are gone, as the model was fused since `transform`.
    """
    check_fused(model)
    sites = list(masked_sites(model))
    for site in sites if frozen else ():
        _ = site.mask  # the mask of the current weights is the one to hold
    respec(sites, frozen=frozen)


def note_masked(model: nn.Module, names: Iterable[str]) -> None:
    """Remember on a model which sites were masked in it, so that `check_masks` misses those that are gone."""
    model.__dict__[MASKED] = tuple(names)


def check_masks(model: nn.Module) -> None:
    """Raise if sites that `transform` masked are masked no more, as after fusing.

    Raises:
        VerificationError: naming them.
    """
    for path, module in model.named_modules():
        if (given := module.__dict__.get(MASKED)) is None:
            continue
        left = {site.spec.name for site in masked_sites(module)}
        if lost := [f"{path}.{name}".lstrip(".") for name in given if name not in left]:
            names = ", ".join(lost[:3]) + ", ..." * (len(lost) > 3)
            raise VerificationError(
                f"{len(lost)} of {len(given)} sites have lost their masks since the model was transformed ({names}): their "
                f"modules were fused or replaced, and compute with dense weights; transform the fused model instead"
            )


def check_fused(model: nn.Module) -> None:
    """Raise if most sites that `transform` masked are gone with their names, as after fusing; a new classifier is none of that.

    Raises:
        VerificationError: what would be baked or saved is dense.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        given = module.__dict__.get(MASKED, ())
        gone = [name for name in given if f"{path}.{name}".lstrip(".") not in names]
        if 2 * len(gone) > len(given):
            check_masks(model)
