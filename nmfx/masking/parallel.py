"""Several processes over one model: every process the whole of it (DDP), or a share of it (FSDP), around masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmfx.errors import NmfxError
from nmfx.masking.modes import keep_modes
from nmfx.masking.sites import masked_sites
from nmfx.masking.weight import evidence_name, mask_name
from nmfx.processes import rank, world


def wrap(model: nn.Module, ignore: Iterable[str] = ()) -> nn.Module:
    """Under several processes, `model` in DDP; masks follow from the weights and, as the buffers in `ignore`, are not sent."""
    if world() == 1:
        return model
    names = (mask_name, evidence_name)
    own = [name(masked.name) for masked in masked_sites(model) for name in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*own, *ignore])
    return DistributedDataParallel(model)


def shard(model: nn.Module, units: Iterable[nn.Module]) -> None:
    """Share the parameters of `model` out over the processes, in place, as the first process has them (`fully_shard`).

    Args:
        units: modules inside it whose parameters come and go together (see `find_units`).

    Raises:
        NmfxError: a parameter that cannot be shared out.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, as not every build of torch has them
    from torch.distributed.fsdp import fully_shard

    if scalars := [name for name, parameter in model.named_parameters() if parameter.dim() == 0]:
        raise NmfxError(f"{', '.join(scalars)}: a parameter without dimensions cannot be shared out; train with DDP instead")
    device = next(model.parameters()).device.type
    if device == "cpu" and not hasattr(torch.cpu.current_stream(), "record_event"):
        raise NmfxError(f"fully_shard of torch {torch.__version__} needs a GPU: take a newer torch, or train with DDP instead")
    for value in model.state_dict().values():
        dist.broadcast(value, 0)
    mesh = init_device_mesh(device, (world(),))
    for module in (*units, model):
        fully_shard(module, mesh=mesh)


@torch.no_grad()
def find_units(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The outermost entries of containers (blocks, stages, layers) that can be shared out each by itself.

    Such a module is called, once, by a forward pass of `example`, rather than read from outside, and it shares no parameter
    with the rest of the model.
    """
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, _: calls.update([module]))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with keep_modes(model):
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
    places = _places(model)
    units: list[nn.Module] = []
    covered: set[nn.Module] = set()
    for container in model.modules():
        if container in covered or not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        for entry in container.children():
            inside = _places(entry)
            own = inside and all(places[parameter] == n for parameter, n in inside.items())
            if own and calls[entry] == 1 and entry not in covered:
                units.append(entry)
                covered.update(entry.modules())
    return units


def _places(model: nn.Module) -> Counter[nn.Parameter]:
    """How many attributes hold each parameter: several when it is tied, or its module stands at several places."""
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    return Counter(parameter for module in modules for parameter in module._parameters.values() if parameter is not None)


def gathered(tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> dict[str, Tensor]:
    """Whole tensors from shares; every process has to ask.

    Args:
        everywhere: all processes get them; otherwise only the first one does, in the CPU's memory.
    """
    if world() == 1:
        return dict(tensors)
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if everywhere or not isinstance(value, DTensor):
            whole[name] = full
        elif rank() == 0:
            whole[name] = full.cpu()
    return whole


def as_share(value: Tensor, like: Any) -> Tensor:
    """This process's share of the first one's whole tensor, if `like` is shared out; every process has to ask."""
    if world() == 1:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements) if isinstance(like, DTensor) else value
