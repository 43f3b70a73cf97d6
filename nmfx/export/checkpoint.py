"""One safetensors file: the scheme in its header, kept values and packed positions of every site, all else as it is.

Layout: ``NAME:values`` (1-D, the weight's dtype) and ``NAME:positions`` (uint8) for each sparse site, every other entry of the
state dict under its own name. Rows that share a mask have one set of positions. The header's ``nmfx`` entry is JSON: where the
model came from, each site's pattern, rows and shape, names that share memory, and a SHA-256 over all of it. Nothing is pickled,
and a model that is loaded into changes only after everything has been read, checked and tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from nmfx.errors import CheckpointError, ModelError
from nmfx.export.header import VERSION, Header, PackedSite, parse_header
from nmfx.files import parsing
from nmfx.files.sealed import Tensors, find_aliases, read_sealed, write_sealed
from nmfx.masking.copies import throw_away_copy
from nmfx.masking.owner import FOLDED, mask_attribute, plain_class, restore_mask, unmask_model
from nmfx.masking.sites import MaskedSite, check_fused, masked_sites, note_masked, recheck_weights
from nmfx.masking.weight import MaskSpec
from nmfx.models.arguments import parse_kwargs
from nmfx.models.building import build_stored, check_state, load_state
from nmfx.models.source import Source, identify
from nmfx.sparsity.packing import pack, unpack


def save_checkpoint(model: nn.Module, path: str | Path, *, info: Mapping[str, str] | None = None, force: bool = True) -> Header:
    """Write a converted model to one compressed safetensors file.

    Args:
        info: what to say of the scheme's origin (see `nmfx.scheme.INFO`).
        force: overwrite an existing file.

    The file takes the kept values, ``ceil(log2 C(M, N))`` bits a group, and the other tensors as they are. Dropped weights are
    not kept, but for those that a module standardises before it reads them, which are stored whole (`Site.derived`).

    Raises:
        VerificationError: the masks are gone, as the model was fused since `transform`.
        CheckpointError: the state dict holds something that is not a tensor, or has no values (meta device).
    """
    check_fused(model)
    recheck_weights(model)
    packed = {site.name: site for site in masked_sites(model)}
    whole = {name for name, site in packed.items() if site.spec.derived}  # all of the weight is standardised
    tensors, aliases = _unpacked(model, packed.keys() - whole)  # first, as it refuses what cannot be saved
    for name, site in packed.items():
        if name in aliases:
            continue
        if name in whole:
            tensors |= {f"{name}:mask": site.mask.cpu().contiguous()} if site.spec.frozen else {}
        else:
            values, positions = pack(site.parameter.detach().cpu(), site.mask.cpu(), site.spec.pattern.n, site.spec.grouping)
            tensors |= {f"{name}:values": values, f"{name}:positions": positions}
        if (evidence := site.evidence) is not None:
            tensors[f"{name}:evidence"] = evidence.cpu().contiguous()
    sites = {name: _describe(site) for name, site in packed.items()}
    said = {key: str(value) for key, value in (info or {}).items()}
    header = Header(_storable(identify(model)), _class_name(model), sites, aliases, said)
    shared = any(site.outputs for site in sites.values())
    content = {"version": VERSION if shared else 1, **msgspec.to_builtins(header)}
    for site in content["sites"].values():
        if site["score"] == "magnitude":  # goes without saying, as in files from before there were others
            del site["score"]
        if site["outputs"] is None:
            del site["outputs"]
    parse_header(content, tensors, Path(path))  # what is written can be read
    write_sealed(Path(path), content, tensors, force=force)
    return header


def _storable(source: Source | None) -> Source | None:
    """A source that a file may give; None for arguments that it may not: `load_checkpoint` then needs the model."""
    try:
        if source is not None:
            parse_kwargs(source.kwargs, str(source))
    except ModelError:
        return None
    return source


def _unpacked(model: nn.Module, packed: Set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State-dict entries that are stored as they are, and names that share memory with an earlier one."""
    state = dict(sorted(model.state_dict().items(), key=lambda item: item[0] not in packed))  # a masked twin stands first
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: extra state of type {type(value).__name__} cannot be stored in safetensors")
        if value.device.type == "meta":
            raise CheckpointError(f"{name}: on the meta device, without values; load weights before saving")
    aliases = find_aliases(state)
    plain = (name for name in state if name not in packed and name not in aliases)
    return {name: state[name].detach().cpu().contiguous().clone() for name in plain}, aliases


def _describe(site: MaskedSite) -> PackedSite:
    spec, shape = site.spec, tuple(site.parameter.shape)
    rows, flat = spec.grouping.rows, spec.grouping.flat
    outputs = spec.grouping.run if spec.pattern.vector > 1 else None
    return PackedSite(str(spec.pattern), rows, flat, shape, spec.decay, spec.frozen, spec.derived, spec.score, outputs)


def _class_name(model: nn.Module) -> str:
    cls = plain_class(model)
    return f"{cls.__module__}.{cls.__qualname__}"


def read_checkpoint(path: str | Path) -> tuple[Header, Tensors]:
    """Header and stored tensors of a checkpoint, after checking that not a bit has changed since it was written.

    Raises:
        CheckpointError: no such file; truncated, altered or foreign; a header that is damaged, or not that of its tensors.
    """
    path = Path(path)
    content, tensors = read_sealed(path, "a checkpoint", VERSION, otherwise="; load it with --weights instead")
    return parse_header(content, tensors, path), tensors


def load_checkpoint(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The converted model of a checkpoint, in eval mode, its weights bit for bit as they were saved.

    Args:
        path: a file, or a folder that ``nmfx export --folder`` wrote.
        model: a dense or converted model to load into, in place. None: the model is rebuilt, which works for those of timm and
            torchvision, built without arguments or with those of `nmfx.models.arguments`.

    Raises:
        CheckpointError: the file is truncated, altered or foreign, says nothing of how to build its model, or does not fit
            `model`, naming the first difference. `model` is not changed then.
    """
    if Path(path).is_dir():
        from nmfx.export.hub import load_hub

        return load_hub(Path(path), model)
    header, tensors = read_checkpoint(path)
    source = _source_of(header, path) if model is None else None
    state: dict[str, Tensor] = {name: value for name, value in tensors.items() if ":" not in name}
    masks: dict[str, Tensor] = {}
    evidence = {name.removesuffix(":evidence"): value for name, value in tensors.items() if name.endswith(":evidence")}
    evidence |= {name: evidence[first] for name, first in header.aliases.items() if first in evidence}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    shapes |= {name: site.shape for name, site in header.sites.items()}
    shapes |= {name: shapes[first] for name, first in header.aliases.items()}
    rebuilt = _rebuild(source, shapes, path) if source else None
    for name, site in header.sites.items():
        if site.derived:
            masks |= {name: tensors[f"{name}:mask"]} if f"{name}:mask" in tensors else {}
        elif name not in header.aliases:
            values, positions = tensors[f"{name}:values"], tensors[f"{name}:positions"]
            try:
                state[name], masks[name] = unpack(values, positions, site.pattern.n, site.grouping, site.shape)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {parsing.printable(name)}: {error}") from error
    for name, first in header.aliases.items():
        state[name] = state[first]
        if first in masks:
            masks[name] = masks[first]
    if rebuilt is not None:
        return _load_masked(_in_dtypes_of(state, rebuilt, path), header, state, masks, evidence)
    assert model is not None
    if baked := next((name for name, module in model.named_modules() if FOLDED in module.__dict__), None):
        raise CheckpointError(f"{path}: cannot be loaded into a baked model ({baked} is folded); give the original one")
    _check_target(model, header, state, evidence, str(path))
    return _load_masked(model, header, state, masks, evidence)


def _source_of(header: Header, path: str | Path) -> Source:
    if header.source is None:
        ours = header.model.startswith(("timm.", "torchvision.", "nmfx."))
        why = "changed, or built with arguments that no file may give" if ours else "which is not of timm or torchvision"
        model = parsing.printable(header.model, 100)
        raise CheckpointError(f"{path}: holds a {model}, {why}; build it and call load_checkpoint(path, model)")
    return header.source


def _rebuild(source: Source, shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> nn.Module:
    try:
        return build_stored(source, shapes, str(path))
    except ModelError as error:
        said = parsing.printable(str(error).removeprefix(f"{path}: "))
        raise CheckpointError(f"{path}: {source} cannot be built here: {said}; give load_checkpoint a model") from error


def _in_dtypes_of(state: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> nn.Module:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            if tensor.is_floating_point() != state[name].is_floating_point():
                raise CheckpointError(f"{path}: {name} is {state[name].dtype}, the model has {tensor.dtype}")
            tensor.data = tensor.data.to(state[name].dtype)
    return model


def _load_masked(
    model: nn.Module, header: Header, state: Tensors, masks: Mapping[str, Tensor], evidence: Mapping[str, Tensor]
) -> nn.Module:
    """Load and mask a model that was found to fit."""
    unmask_model(model, keep_masked=False)
    load_state(model, state)  # check_state has named every difference but missing counters
    for name in sorted(header.sites, key=lambda name: name in header.aliases):  # first owners first
        site, (owner, attr) = header.sites[name], _owner(model, name)
        spec = MaskSpec(name, site.pattern, site.grouping, site.decay, site.frozen, site.derived, site.score)
        twin = _owner(model, header.aliases[name]) if name in header.aliases else None
        mask_attribute(owner, attr, spec, twin, evidence.get(name))
        if twin is None and name in masks:  # as it was, not found anew: kept weights may be zero, and dropped ones are zero now
            restore_mask(owner, attr, masks[name])
    note_masked(model, (name for name in header.sites if name not in header.aliases))
    return model.eval()


def _check_target(model: nn.Module, header: Header, state: Tensors, evidence: Mapping[str, Tensor], origin: str) -> None:
    """A given model must take the weights as they are: real memory, the same dtypes, equal values where it ties weights. Last,
    all of it is tried on a copy without memory.

    Raises:
        CheckpointError: naming the first weight that it cannot take.
    """
    try:
        check_state(model, state, origin)
    except ModelError as error:
        raise CheckpointError(f"{origin}: {parsing.printable(str(error).removeprefix(f'{origin}: '))}") from error
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name not in state:
            continue
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{origin}: {name} of the model is on the meta device; call model.to_empty(device='cpu') first"
            )
        if tensor.dtype != state[name].dtype:
            wanted = str(state[name].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{origin}: {name} is {wanted}, the model has {tensor.dtype}; call model.to(torch.{wanted}) first"
            )
        shared = any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride()))
        if shared or (tensor.is_inference() and not torch.is_inference_mode_enabled()):
            raise CheckpointError(f"{origin}: {name} of the model cannot be written to; clone it, outside of inference mode")
        twin = first.setdefault(id(tensor), name)
        if twin != name and not torch.equal(state[twin], state[name]):
            raise CheckpointError(f"{origin}: {twin} and {name} differ, but the model ties them; untie them first")
    own = dict(model.named_parameters(remove_duplicate=False))
    if lost := next((name for name in header.sites if name not in own), None):
        raise CheckpointError(f"{origin}: {lost} is no parameter of {type(model).__name__}, and cannot be masked")
    try:
        copy = throw_away_copy(model)
    except Exception:  # it holds what cannot be copied: what has been checked must do
        return
    try:
        for masked in masked_sites(model):
            masked.state.check_writes()  # raises what taking the masks off would
        places = {
            name: value.device for name, value in copy.state_dict().items()
        }  # a scripted module is copied with its values
        blank = {name: torch.empty_like(value, device=places.get(name, "meta")) for name, value in state.items()}
        masks = {name: torch.empty(site.shape, dtype=torch.bool, device="meta") for name, site in header.sites.items()}
        derived = {name for name, site in header.sites.items() if site.derived}
        _load_masked(copy, header, blank, {name: masks[name] for name in masks.keys() - derived}, evidence)
    except Exception as error:  # of hooks of any model
        why = parsing.printable(str(error))
        raise CheckpointError(f"{origin}: {type(model).__name__} cannot be loaded into: {why}") from error


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attr = name.rpartition(".")
    return model.get_submodule(path), attr
