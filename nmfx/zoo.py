"""Models of timm and torchvision (and the embedded demo): built by name, recognised again, and fed an input that fits."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nmfx.errors import ModelError

# Arguments that torchvision's builders change by themselves when they are given weights.
IMPLIED: tuple[dict[str, Any], ...] = (
    {"transform_input": True},
    {"transform_input": True, "aux_logits": False},
    {"aux_logits": False},
    {"aux_loss": True},
)
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
            from nmfx.demo.digits import load_demo

            model = load_demo(trained=pretrained)
        result: nn.Module = model.eval()
        setattr(result, SOURCE, self)
        if pretrained and self.library == "torchvision":  # weights may imply other arguments (auxiliary heads)
            setattr(result, SOURCE, identify(result) or self)
        return result

    def build_meta(self) -> nn.Module:
        """The model without memory, on the meta device (on the CPU where its constructor needs values)."""
        try:
            with torch.device("meta"):
                return self.build()
        except Exception:  # torchvision's RegNet reads block widths back from tensors
            return self.build()


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
    """All known names with their prefix: ``torchvision:resnet50``, ``timm:resnet50``, ..., ``demo:digits``."""
    import timm
    import torchvision

    names = [f"torchvision:{name}" for name in torchvision.models.list_models()]
    return [*names, *(f"timm:{name}" for name in timm.list_models()), "demo:digits"]


def find_source(name: str) -> Source:
    """The source of a model name; torchvision is asked before timm when the name has no prefix.

    Raises:
        ModelError: no library has it; the message lists the nearest names.
    """
    known = list_models()
    for candidate in (name, f"torchvision:{name}", f"timm:{name}", f"demo:{name}"):
        base = candidate.rpartition(".")[0]  # a timm tag such as resnet50.a1_in1k
        if candidate in known or (base in known and base.startswith("timm:")):
            library, _, model = candidate.partition(":")
            return Source(library, model)
    plain = {entry.partition(":")[2]: entry for entry in reversed(known)}
    near = difflib.get_close_matches(name.rpartition(":")[2].lower(), plain, n=4, cutoff=0.6)
    hint = f"; nearest: {', '.join(plain[n] for n in near)}" if near else "; see timm.list_models() and torchvision's list"
    raise ModelError(f"no model is called {name!r} in torchvision or timm{hint}")


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
        modules[path] = (getattr(type(module), "_plain_class", type(module)), module.extra_repr(), switches)
    return {"shapes": shapes, "modules": modules}


def _candidates(model: nn.Module) -> Iterator[Source]:
    if isinstance(source := getattr(model, SOURCE, None), Source):
        yield source
        if source.library == "torchvision":
            yield from (Source(source.library, source.name, {**source.kwargs, **extra}) for extra in IMPLIED)
    if type(model).__module__ == "nmfx.demo.digits":
        yield Source("demo", "digits")
    last = list(model.parameters())[-1:]
    classes: dict[str, Any] = {"num_classes": last[0].shape[0]} if last and last[0].dim() else {}
    if architecture := getattr(model, "pretrained_cfg", {}).get("architecture"):
        yield Source("timm", architecture)
        known = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
        yield Source("timm", architecture, known)
        first = next((p for n, p in model.named_parameters() if p.dim() == 4 and n.endswith("weight")), None)
        if first is not None:
            yield Source("timm", architecture, {**known, "in_chans": first.shape[1]})
    defined = getattr(type(model), "_plain_class", type(model)).__module__
    if defined.startswith("torchvision.models"):
        import torchvision

        for name in torchvision.models.list_models():
            if torchvision.models.get_model_builder(name).__module__ == defined:
                yield from (Source("torchvision", name, extra) for extra in ({}, classes, *IMPLIED))


@dataclass(frozen=True)
class Example:
    """The arguments of one forward pass; only shapes and dtypes matter."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(value: Any) -> Example:
        """A tensor or list is one argument, a tuple the positional ones, a dict the keyword ones."""
        if isinstance(value, Example):
            return value
        if isinstance(value, dict):
            return Example((), value)
        return Example(value if isinstance(value, tuple) else (value,))

    @property
    def batch(self) -> int:
        """Samples in the example: the first tensor's first dimension, or the length of a list of pictures."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, list):
            return max(1, len(first))
        tensor = next((t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.dim()), None)
        return max(1, tensor.shape[0]) if tensor is not None else 1

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Example:
        """The same on a device, floating-point tensors in `dtype`."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.detach().to(device, dtype if leaf.is_floating_point() else None)

        return Example(*tree_map(move, (self.args, self.kwargs)))

    def doubled(self) -> Example:
        """Every sample twice: batch normalisation in train mode needs more than one value a channel."""

        def twice(leaf: Any) -> Any:
            if isinstance(leaf, list):
                return leaf + leaf
            return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

        is_list = lambda leaf: isinstance(leaf, list)  # noqa: E731
        return Example(*tree_map(twice, (self.args, self.kwargs), is_leaf=is_list))

    def __str__(self) -> str:
        shapes = ["x".join(map(str, t.shape)) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return f"an input of {', '.join(shapes) or 'no tensors'}"


VIDEO = {"resnet": (16, 112, 112), "mvit": (16, 224, 224), "swin_transformer": (16, 224, 224), "s3d": (16, 224, 224)}


def example_for(model: nn.Module) -> Example:
    """An input as the model's own configuration describes it; 1x3x224x224 when it has none.

    Reads ``input_size`` (an attribute of the model, without the batch), timm's ``pretrained_cfg`` and ``patch_embed``,
    torchvision's ``image_size`` and the families of torchvision that take videos, pairs of pictures or lists of them.
    """
    defined = getattr(type(model), "_plain_class", type(model)).__module__
    if size := getattr(model, "input_size", None):
        return Example((torch.empty(1, *size),))
    if config := getattr(model, "pretrained_cfg", None):
        channels, height, width = config.get("input_size", (3, 224, 224))
        height, width = _patch_size(model) or (height, width)
        first = next((p for n, p in model.named_parameters() if p.dim() == 4 and n.endswith("weight")), None)
        if first is not None and config.get("first_conv") and first.shape[1] != channels:
            channels = first.shape[1] if first.shape[1] <= 16 else channels
        return Example((torch.empty(1, channels, height, width),))
    if defined.startswith("torchvision.models.video"):
        return Example((torch.empty(1, 3, *VIDEO.get(defined.rpartition(".")[2], (16, 224, 224))),))
    if defined.startswith("torchvision.models.optical_flow"):
        return Example((torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)))
    if defined.startswith("torchvision.models.detection"):
        return Example(([torch.rand(3, 320, 320)],))
    side = 299 if defined.endswith(".inception") else getattr(model, "image_size", 224)
    return Example((torch.empty(1, 3, side, side),))


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    """The picture size a timm transformer was made for, which its pretrained_cfg does not follow."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (size[0], size[1]) if isinstance(size, tuple) and len(size) == 2 and all(size) else None


@dataclass(frozen=True)
class Built:
    """A model built by name. ``weights``: pretrained, file, or random; ``note``: why it is not what was hoped for."""

    model: nn.Module
    source: Source
    weights: str
    note: str = ""


def build_model(name: str, *, weights: str = "auto", seed: int = 0) -> Built:
    """Build a model of torchvision, timm or the demo by name, in eval mode.

    Args:
        weights: ``auto`` takes pretrained weights and goes on with random ones (saying why) when they cannot be had;
            ``pretrained`` makes that an error; ``none`` takes random ones; anything else is a safetensors or .pth file.

    Raises:
        ModelError: unknown name, weights that cannot be had, or a file that does not fit.
    """
    source, note = find_source(name), ""
    if weights in ("auto", "pretrained"):
        try:
            return Built(source.build(pretrained=True), source, "pretrained")
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            note = f"pretrained weights of {source} cannot be had: {_first_line(error)}"
            if weights == "pretrained":
                raise ModelError(f"{note}. Use --weights FILE, or --weights none for the structure only") from error
    model = build_random(source, seed)
    if weights in ("auto", "none"):
        return Built(model, source, "random", note)
    load_weights(model, Path(weights))
    return Built(model, source, "file", f"weights from {weights}")


def build_random(source: Source, seed: int = 0) -> nn.Module:
    """The model with random weights, the same ones for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return source.build()
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"{source} cannot be built: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.strip())[:200]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file, or a .pth/.pt/.bin read with ``weights_only``, into `model`; every key must match.

    Raises:
        ModelError: the file cannot be read, or the first key that is missing, unknown or of another shape.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as weights: {_first_line(error)}") from error
    for key in ("state_dict", "model_state_dict", "model", "state_dict_ema"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds no state dict of tensors")
    if state and all(key.startswith("module.") for key in state):  # saved from a DataParallel wrapper
        state = {key.removeprefix("module."): value for key, value in state.items()}
    check_state(model, state, str(path))
    model.load_state_dict(state, strict=False)


def check_state(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Check that `state` has the keys and shapes of `model`.

    Raises:
        ModelError: naming the first difference. Missing ``num_batches_tracked`` counters are allowed: old files lack them.
    """
    own = model.state_dict()
    for key, value in own.items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise ModelError(f"{origin}: {key} {tuple(value.shape)} is missing; the file holds {len(state)} tensors")
        if key in state and state[key].shape != value.shape:
            raise ModelError(f"{origin}: {key} has shape {tuple(state[key].shape)}, the model expects {tuple(value.shape)}")
    if extra := next((key for key in state if key not in own), None):
        raise ModelError(f"{origin}: {extra} {tuple(state[extra].shape)} is not a weight of {type(model).__name__}")


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
