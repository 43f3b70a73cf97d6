"""What the products of a model receive: the model runs once, and every operand is looked at where it is multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nmfx.masking.modes import keep_modes
from nmfx.masking.owner import masks_derived
from nmfx.masking.sites import masked_sites
from nmfx.models.example import Example
from nmfx.models.following import Census, plain_kernels
from nmfx.models.places import held_by, is_plain, places_in
from nmfx.models.products import Operand
from nmfx.models.storages import storage_of


class Receipts(Census):
    """Notes which entries of each parameter arrive as something other than zero.

    Attributes:
        nonzero: bool, shaped as the parameter, by its id; true where any product received a number other than zero. Where one
            read something else that was made of the parameter, all of it counts as that.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__(model.parameters(), (example.args, example.kwargs))
        self.nonzero: dict[int, Tensor] = {}
        self.seen: set[tuple[object, ...]] = set()
        for site in masked_sites(model):  # a masked value has memory of its own; products read that
            if not masks_derived(site.owner):
                value = getattr(site.owner, site.attr)
                self.storages.own.add(storage_of(value))
                self.storages.held[storage_of(value)] = replace(held_by(value), parameters=(site.parameter,))

    def _record_weight(self, operand: Operand) -> None:
        tensor, key = operand.tensor.detach(), storage_of(operand.tensor)
        held, view = (
            self.storages.held[key],
            (key, operand.tensor.storage_offset(), operand.tensor.shape, operand.tensor.stride()),
        )
        if view in self.seen:
            return  # a recurrent weight is read once a step
        self._record_lost(held.beside, "")
        if held.made or (held.altered and tensor.numel() != held.numel):
            if not held.made or self._is_weight(held, operand):
                self._record_lost(held.parameters, "")
            return
        if key in self.storages.own:
            self.seen.add(view)
        if len(held.parameters) == 1 and is_plain(held, tensor):
            self._arrive(held.parameters[0], tensor != 0)
            return
        places = places_in(replace(held, order=None) if held.altered else held, tensor)
        if places is None:
            return
        arrived = torch.zeros(held.numel + 1, dtype=torch.bool)
        values = torch.view_as_real(tensor.resolve_conj()) if places.dim() > tensor.dim() else tensor
        arrived[places[values.cpu() != 0]] = True
        for parameter, part in zip(held.parameters, arrived[1:].split([p.numel() for p in held.parameters]), strict=True):
            self._arrive(parameter, part)

    def _record_lost(self, parameters: Iterable[Tensor], name: str) -> None:
        for parameter in parameters:
            self._arrive(parameter, torch.ones(parameter.shape, dtype=torch.bool))

    def _arrive(self, parameter: Tensor, nonzero: Tensor) -> None:
        nonzero = nonzero.reshape(parameter.shape).cpu()
        before = self.nonzero.get(id(parameter))
        self.nonzero[id(parameter)] = nonzero if before is None else before | nonzero


@torch.no_grad()
def received(model: nn.Module, example: Example) -> dict[int, Tensor]:
    """Entries of each parameter, by its id, that arrive at a product as something other than zero in an eval forward pass.

    A parameter that no product received is not there.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    placed = example.to(device, dtype)
    with keep_modes(model), torch.random.fork_rng(devices=[]), plain_kernels():
        model.eval()
        receipts = Receipts(model, placed)
        with receipts, device:
            model(*placed.args, **placed.kwargs)
    return receipts.nonzero
