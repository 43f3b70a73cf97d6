"""One safetensors file: the scheme in its header, kept values and packed positions of every site, all else as it is.

Layout: ``NAME:values`` (1-D, the weight's dtype) and ``NAME:positions`` (uint8) for each sparse site, every other entry of the
state dict under its own name. The header's ``nmfx`` entry is JSON: where the model came from, each site's pattern, rows and
shape, names that share memory, and a SHA-256 over all of it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nmfx.errors import CheckpointError, ModelError
from nmfx.files import write_atomic
from nmfx.graph.masked import GIVEN, STATES, MaskedSite, mask_attribute, masked_sites, renew, unmask
from nmfx.graph.reading import MaskSpec, mask_name
from nmfx.scheme import Scheme
from nmfx.sparsity.layout import Grouping
from nmfx.sparsity.packing import pack, unpack
from nmfx.sparsity.pattern import Pattern
from nmfx.zoo.building import check_state, load_state
from nmfx.zoo.source import Source, identify

VERSION = 1


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    source: Source | None
    model: str
    sites: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    info: dict[str, str]

    @property
    def scheme(self) -> Scheme:
        """The scheme the weights were packed with."""
        flat = any(site["flat"] for site in self.sites.values())
        short = any(not site["flat"] and site["rows"][1] % Pattern(site["pattern"]).m for site in self.sites.values())
        patterns = {name: Pattern(site["pattern"]) for name, site in self.sites.items() if name not in self.aliases}
        return Scheme(patterns, "flat" if flat else "strict", short, info=self.info)

    def grouping(self, name: str) -> Grouping:
        """Groups of a packed site."""
        site = self.sites[name]
        return Grouping(tuple(site["rows"]), Pattern(site["pattern"]).m, site["flat"])


def save_checkpoint(model: nn.Module, path: str | Path, *, info: Mapping[str, str] | None = None, force: bool = True) -> Header:
    """Write a converted model to one compressed safetensors file.

    Args:
        info: what to say of the scheme's origin (see `nmfx.scheme.INFO`).
        force: overwrite an existing file.

    The file takes the kept values, ``ceil(log2 C(M, N))`` bits a group, and the other tensors as they are. Dropped weights are
    not kept.

    Raises:
        CheckpointError: the state dict holds something that is not a tensor, or has no values (meta device).
    """
    renew(model)
    packed = {f"{site.path}.{site.attr}".lstrip("."): site for site in masked_sites(model)}
    whole = {name for name, site in packed.items() if site.spec.derived}  # all of the weight is standardised
    tensors, aliases = _unpacked(model, packed.keys() - whole)  # first, as it refuses what cannot be saved
    for name, site in packed.items():
        if name in whole:
            tensors |= {f"{name}:mask": site.mask.cpu().contiguous()} if site.spec.frozen else {}
        elif name not in aliases:
            values, positions = pack(site.parameter.detach().cpu(), site.mask.cpu(), site.spec.pattern.n, site.spec.grouping)
            tensors |= {f"{name}:values": values, f"{name}:positions": positions}
    sites = {name: _describe(site) for name, site in packed.items()}
    header = Header(identify(model), _class_name(model), sites, aliases, {k: str(v) for k, v in (info or {}).items()})
    content = {"version": VERSION, **asdict(header)}
    content["digest"] = _digest(content, tensors)
    metadata = {"nmfx": json.dumps(content, sort_keys=True)}
    write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata), force=force)
    return header


def _unpacked(model: nn.Module, packed: Set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State-dict entries that are stored as they are, and names that share memory with an earlier one."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: extra state of type {type(value).__name__} cannot be stored in safetensors")
        if value.device.type == "meta":
            raise CheckpointError(f"{name}: on the meta device, without values; load weights before saving")
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        first = seen.setdefault(key, name) if value.numel() else name
        if first != name:
            aliases[name] = first
        elif name not in packed:
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _describe(site: MaskedSite) -> dict[str, Any]:
    spec = site.spec
    return {
        "pattern": str(spec.pattern),
        "rows": list(spec.grouping.rows),
        "flat": spec.grouping.flat,
        "shape": list(site.parameter.shape),
        "decay": spec.decay,
        "frozen": spec.frozen,
    } | ({"derived": True} if spec.derived else {})


def _class_name(model: nn.Module) -> str:
    cls = getattr(type(model), "_plain_class", type(model))
    return f"{cls.__module__}.{cls.__qualname__}"


def _digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in content.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and stored tensors of a checkpoint, after checking that not a bit has changed since it was written.

    Raises:
        CheckpointError: no such file; truncated, altered or foreign.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from error
    if "nmfx" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of nmfx; load it with --weights instead")
    try:
        content = json.loads(metadata["nmfx"])
        version, digest = content["version"], content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r}); make the checkpoint anew") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: checkpoint version {version}, this nmfx reads version {VERSION}; upgrade nmfx")
    if digest != _digest(content, tensors):
        raise CheckpointError(f"{path}: altered since it was written (the SHA-256 differs); make or copy it anew")
    source = Source(**content["source"]) if content["source"] else None
    return Header(source, content["model"], content["sites"], content["aliases"], content["info"]), tensors


def load_checkpoint(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The converted model of a checkpoint, in eval mode, its weights bit for bit as they were saved.

    Args:
        model: a dense or converted model to load into, in place. None: the model is rebuilt, which works for those of timm and
            torchvision.

    Raises:
        CheckpointError: the file is truncated, altered or foreign, says nothing of how to build its model, or does not fit
            `model`, naming the first difference. `model` is not changed then.
    """
    header, tensors = read_checkpoint(path)
    state: dict[str, Tensor] = {name: value for name, value in tensors.items() if ":" not in name}
    masks: dict[str, Tensor] = {}
    for name, site in header.sites.items():
        if site.get("derived"):
            masks |= {name: tensors[f"{name}:mask"]} if f"{name}:mask" in tensors else {}
        elif name not in header.aliases:
            parts = tensors.get(f"{name}:values"), tensors.get(f"{name}:positions")
            if parts[0] is None or parts[1] is None:
                raise CheckpointError(f"{path}: {name}: its values or positions are missing")
            n, shape = Pattern(site["pattern"]).n, tuple(site["shape"])
            try:
                state[name], masks[name] = unpack(parts[0], parts[1], n, header.grouping(name), shape)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {name}: {error}") from error
    for name, first in header.aliases.items():
        state[name] = state[first]
        if first in masks:
            masks[name] = masks[first]
    return _fill(_rebuild(header, path) if model is None else model, header, state, masks, str(path), model is None)


def _rebuild(header: Header, path: str | Path) -> nn.Module:
    if header.source is None:
        raise CheckpointError(
            f"{path}: holds a {header.model}, which is not of timm or torchvision; build it and call "
            f"load_checkpoint(path, model)"
        )
    try:
        return header.source.build()
    except Exception as error:
        raise CheckpointError(f"{path}: {header.source} cannot be built here: {error}; give load_checkpoint a model") from error


def _fill(
    model: nn.Module, header: Header, state: dict[str, Tensor], masks: dict[str, Tensor], origin: str, rebuilt: bool
) -> nn.Module:
    try:
        check_state(model, state, origin)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    if not rebuilt:
        _check_target(model, state, origin)
    for module in model.modules():
        unmask(module, keep_masked=False)
    if rebuilt:  # in the dtypes of the file
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in state and tensor.dtype != state[name].dtype:
                tensor.data = tensor.data.to(state[name].dtype)
    load_state(model, state)  # check_state has named every difference but missing counters
    for name in sorted(header.sites, key=lambda name: name in header.aliases):  # first owners first
        site, (owner, attr) = header.sites[name], _owner(model, name)
        spec = MaskSpec(
            name, Pattern(site["pattern"]), header.grouping(name), site["decay"], site["frozen"], bool(site.get("derived"))
        )
        if name in header.aliases:
            mask_attribute(owner, attr, spec, _owner(model, header.aliases[name]))
            continue
        mask_attribute(owner, attr, spec)
        if spec.derived:
            if name in masks:
                owner._buffers[mask_name(attr)] = masks[name].to(cast(nn.Parameter, owner._parameters[attr]).device)
            continue
        # The mask as it was, not one found anew: kept weights may be zero, and dropped ones are zero now.
        weight = cast(nn.Parameter, owner._parameters[attr])
        owner._buffers[mask_name(attr)] = masks[name].to(weight.device)
        owner.__dict__[STATES][attr].refresh(owner, attr, weight, update=False)
    model.__dict__[GIVEN] = tuple(name for name in header.sites if name not in header.aliases)
    return model.eval()


def _check_target(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """A given model must take the weights as they are: real memory, the same dtypes, equal values where it ties weights.

    Raises:
        CheckpointError: naming the first weight that it cannot take.
    """
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
        twin = first.setdefault(id(tensor), name)
        if twin != name and not torch.equal(state[twin], state[name]):
            raise CheckpointError(f"{origin}: {twin} and {name} differ, but the model ties them; untie them first")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attr = name.rpartition(".")
    return model.get_submodule(path), attr
