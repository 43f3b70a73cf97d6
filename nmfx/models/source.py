"""Where a model comes from: a name of timm or torchvision (or the embedded demos), and back from a model to its name."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmfx.demo.digits import load_demo
from nmfx.demo.resnet import CifarResNet, load_resnet
from nmfx.errors import ModelError
from nmfx.masking.owner import plain_class

# Arguments that torchvision's builders change by themselves when they are given weights.
IMPLIED: tuple[dict[str, Any], ...] = (
    {"transform_input": True},
    {"transform_input": True, "aux_logits": False},
    {"aux_logits": False},
    {"aux_loss": True},
)
DEMOS: dict[str, Callable[..., nn.Module]] = {
    "digits": load_demo,
    "resnet20": partial(load_resnet, 20),
    "resnet56": partial(load_resnet, 56),
}
SOURCE = "nmfx_source"  # attribute of models built here: where they came from


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``library`` is torchvision, timm or demo; ``kwargs`` go to its builder."""

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """The model in eval mode, random weights unless `pretrained`."""
        if self.library == "torchvision":
            import torchvision

            extra = {"weights_backbone": None} if _takes_backbone(self.name) else {}
            weights = "DEFAULT" if pretrained else None
            with contextlib.redirect_stdout(io.StringIO()):  # torch.hub says there what it downloads
                model = torchvision.models.get_model(self.name, weights=weights, **({} if pretrained else extra), **self.kwargs)
        elif self.library == "timm":
            import timm

            with _hub() if pretrained else contextlib.nullcontext():
                model = timm.create_model(self.name, pretrained=pretrained, **self.kwargs)
        else:
            model = DEMOS[self.name](trained=pretrained, **self.kwargs)
        result: nn.Module = model.eval()
        setattr(result, SOURCE, self)
        if pretrained and self.library == "torchvision":  # weights may imply other arguments (auxiliary heads)
            setattr(result, SOURCE, identify(result) or self)
        return result

    def build_meta(self, *, strict: bool = False) -> nn.Module:
        """The model without memory, on the meta device; the global random state stays as it is.

        Args:
            strict: raise where the constructor needs the values of weights, which are then on the CPU otherwise.
        """
        with torch.random.fork_rng(devices=[]):
            with contextlib.suppress(Exception), torch.device("meta"):
                return self.build()
            try:
                with _WeightsOnMeta():
                    return self.build()
            except Exception:
                if strict:
                    raise
            return self.build()


class _WeightsOnMeta(TorchFunctionMode):
    """Weights without memory, numbers with: torchvision's RegNet reads the widths of its blocks back from tensors."""

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {"device": "meta"} if func in self.FACTORIES else {}
        return func(*args, **{**(kwargs or {}), **place})


def _takes_backbone(name: str) -> bool:
    import inspect

    import torchvision

    return "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """Fail at once, not after 45 s of retries, when timm's hub cannot be reached; weights in the local cache still load."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not before and not proxied:
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def list_models() -> list[str]:
    """All known names with their prefix: ``torchvision:resnet50``, ``timm:resnet50``, ..., ``demo:digits``, ..."""
    import timm
    import torchvision

    names = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    return [*names, *(f"timm:{name}" for name in timm.list_models()), *(f"demo:{name}" for name in DEMOS)]


def find_source(name: str) -> Source:
    """The source of a model name; torchvision is asked before timm when the name has no prefix.

    Other spellings: ``timm/NAME`` and ``hf-hub:timm/NAME.TAG``, as the hub has them, and ``torchvision.models.NAME``.

    Raises:
        ModelError: no library has it; the message lists the nearest names.
    """
    known = list_models()
    wanted = _spelt(name)
    for candidate in (wanted, f"torchvision:{wanted}", f"timm:{wanted}", f"demo:{wanted}"):
        base = candidate.rpartition(".")[0]  # a timm tag such as resnet50.a1_in1k
        if candidate in known or (base in known and base.startswith("timm:")):
            library, _, model = candidate.partition(":")
            return Source(library, model)
    if "/" in wanted:
        raise ModelError(
            f"no model is called {name!r} in torchvision or timm, and nmfx takes none from a hub: build it in Python, and use "
            f"nmfx.find_scheme and nmfx.transform there"
        )
    near = nearest_models(wanted, known)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ModelError(
        f"no model is called {name!r} in torchvision or timm{hint}; `nmfx models PART` lists those with PART in them"
    )


def _spelt(name: str) -> str:
    """A name as nmfx spells it: ``library:name``, or the name alone."""
    name = re.sub(r"^(hf[-_]hub:)?timm/", "timm:", name.strip())
    return re.sub(r"^(torchvision|timm)(/|\.models\.)", r"\1:", name)


def nearest_models(name: str, known: Iterable[str], limit: int = 4) -> list[str]:
    """At most `limit` known names like `name`: equal but for case and punctuation, then beginning so, then look-alikes."""
    library, colon, plain = name.rpartition(":")
    pool = {entry: _letters(entry.partition(":")[2]) for entry in known if not colon or entry.startswith(f"{library}:")}
    wanted = _letters(plain.partition(".")[0])
    same = [entry for entry, letters in pool.items() if letters == wanted]
    begin = sorted(
        (entry for entry, letters in pool.items() if wanted and letters.startswith(wanted)), key=lambda e: len(pool[e])
    )
    near = set(difflib.get_close_matches(wanted, set(pool.values()), n=limit, cutoff=0.6))
    alike = sorted(
        (entry for entry, letters in pool.items() if letters in near),
        key=lambda e: -difflib.SequenceMatcher(None, wanted, pool[e]).ratio(),
    )
    found = list(dict.fromkeys([*same, *begin, *alike]))
    return found[:limit] if found or not colon else nearest_models(plain, known, limit)


def matching(pattern: str, known: Iterable[str]) -> list[str]:
    """Known names that a glob matches, or that hold a plain text; without a prefix such as ``timm:``, those of all libraries.

    Raises:
        ModelError: there is none; the message lists the nearest names.
    """
    known, wanted = list(known), pattern.lower()
    is_glob, prefixed = any(mark in wanted for mark in "*?["), ":" in wanted

    def matches(name: str) -> bool:
        library, _, plain = name.partition(":")
        text = (name if prefixed else plain).lower()
        return fnmatchcase(text, wanted) if is_glob else wanted in text or wanted == library

    if names := [name for name in known if matches(name)]:
        return names
    near = nearest_models(wanted.strip("*?"), known)
    hint = f"nearest: {', '.join(near)}" if near else "`nmfx models` lists them all"
    raise ModelError(f"no model of torchvision or timm matches {wanted!r}; {hint}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def identify(model: nn.Module) -> Source | None:
    """Where `model` came from, proved by a rebuilt copy with the same modules, settings and shapes; None when unknown."""
    for source in _candidates(model):
        with contextlib.suppress(Exception):
            if _signature(source.build_meta()) == _signature(model):
                return source
    return None


def _signature(model: nn.Module) -> dict[str, Any]:
    """Shapes of the state dict, and of every module its class, its settings and its switches."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    modules = {}
    for path, module in model.named_modules():
        switches = {k: v for k, v in vars(module).items() if isinstance(v, bool) and not k.startswith("_")}
        switches = {k: v for k, v in switches.items() if k != "training" and "checkpoint" not in k}
        modules[path] = (plain_class(module), module.extra_repr(), switches)
    return {"shapes": shapes, "modules": modules}


def _candidates(model: nn.Module) -> Iterator[Source]:
    if isinstance(source := getattr(model, SOURCE, None), Source):
        yield source
        if source.library == "torchvision":
            yield from (Source(source.library, source.name, {**source.kwargs, **extra}) for extra in IMPLIED)
    if type(model).__module__ == "nmfx.demo.digits":
        yield Source("demo", "digits")
    if isinstance(model, CifarResNet):
        kwargs = {"num_classes": model.fc.out_features, "in_chans": model.conv1.in_channels}
        yield Source("demo", f"resnet{6 * model.blocks + 2}", kwargs)
    last = list(model.parameters())[-1:]
    classes: dict[str, Any] = {"num_classes": last[0].shape[0]} if last and last[0].dim() else {}
    if architecture := getattr(model, "pretrained_cfg", {}).get("architecture"):
        yield Source("timm", architecture)
        known = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
        yield Source("timm", architecture, known)
        first = next((p for n, p in model.named_parameters() if p.dim() == 4 and n.endswith("weight")), None)
        if first is not None:
            yield Source("timm", architecture, {**known, "in_chans": first.shape[1]})
    defined = plain_class(model).__module__
    if defined.startswith("torchvision.models"):
        import torchvision

        for name in torchvision.models.list_models():
            if torchvision.models.get_model_builder(name).__module__ == defined:
                yield from (Source("torchvision", name, extra) for extra in ({}, classes, *IMPLIED))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import importlib.metadata as metadata

    names = ("torch", "torchvision", "timm")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in names}


def identify_quickly(model: nn.Module) -> Source | None:
    """Where `model` says it came from, without rebuilding it: our own mark, or timm's configuration."""
    if isinstance(source := getattr(model, SOURCE, None), Source):
        return source
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return Source("timm", architecture) if architecture else None
