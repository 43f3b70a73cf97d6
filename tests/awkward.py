"""Tiny models, each with one thing that makes finding or masking a weight hard. `MODELS` has them all by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmfx.models.example import Example


class Residual(nn.Module):
    """A stem, one residual block with batch normalisation, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    """A strided grouped, a depthwise and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(self.grouped(x)))


class Transposed(nn.Module):
    """Transposed convolutions store (in, out / groups, k, k); the second one has groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(8, 12, 3, stride=2)
        self.up2 = nn.ConvTranspose2d(12, 4, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up2(self.up1(x))


class Tied(nn.Module):
    """The decoder is the embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decoder = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.embed(tokens)))


class Twice(nn.Module):
    """One module called twice, another one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.alias = self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.again(x))))


class OwnWeight(nn.Module):
    """A functional linear with a parameter of its own, and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.kernel), 0.5, self.training)


class Functional(nn.Module):
    """A parent that reads its child's weight, and a child that owns a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv = OwnWeight(), nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.qkv.weight)


class Encoder(nn.Module):
    """Multi-head attention: in_proj_weight is a bare parameter, out_proj's forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """PyTorch's own layer has a fused path that reads all weights at once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CrossAttention(nn.Module):
    """Keys and values of other widths: three projections in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.cross(x, keys, values)[0]


class Recurrent(nn.Module):
    """An LSTM keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Standardised(nn.Module):
    """A convolution that reads its standardised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = ScaledStdConv2d(4, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Einsum(nn.Module):
    """Projections with three dimensions: one contracts the middle one, the other the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 8, 4))  # heads, features, head features
        self.out = nn.Parameter(torch.randn(2, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnhk,hkd->bnd", torch.einsum("bnd,hdk->bnhk", x, self.query), self.out)


class EinsumParent(nn.Module):
    """The root of a model should hold no weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = Einsum()

    def forward(self, x: Tensor) -> Tensor:
        return self.projections(x)


class Products(nn.Module):
    """Weights stored (in, out) and (heads, in, out), multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.ParameterDict({"flat": torch.randn(8, 12), "heads": torch.randn(3, 12, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.bank["flat"]).unsqueeze(1) @ self.bank["heads"]  # batch, heads, tokens, 4


class Transposing(nn.Module):
    """The product reads a transposed copy of the weight, (in, out) in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.ParameterList([torch.randn(8, 12)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.bank[0].t().contiguous())


class Query(nn.Module):
    """A learned query is projected: a product of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.q = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.q(self.query).t()


class BilinearPair(nn.Module):
    """Two inputs meet in one weight of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 8, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.pair(left, right)


class Experts(nn.Module):
    """CondConv mixes a bank of flattened kernels by the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.routing, self.conv = nn.Linear(4, 3), CondConv2d(4, 8, 3, padding=1, num_experts=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, torch.sigmoid(self.routing(x.mean((2, 3)))))


class Auxiliary(nn.Module):
    """A second head that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Listed(nn.Module):
    """Weights in a ParameterList: their attribute names are digits."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight)
        return x


class Keywords(nn.Module):
    """Keyword arguments only, one of them with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.extra = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, *, image: Tensor, text: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.proj(image) + self.extra(text)
        return x if scale is None else x * scale


class Scripted(nn.Module):
    """A TorchScript module: its class cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.script is deprecated, and still met
            self.frozen = torch.jit.script(nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x))


class Branching(nn.Module):
    """Asks for values on the way, so that it cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.abs().max().item() < 1e6 else self.conv(x.clamp(-1, 1))


class Joined(nn.Module):
    """Two weights and two biases concatenated before use."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q.weight, self.k.weight]), torch.cat([self.q.bias, self.k.bias]))


class Tables(nn.Module):
    """Every kind of parameter that is not a weight, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 8))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.randn(1, 8))
        self.bias_table = nn.Parameter(torch.randn(4, 2))
        self.norm = nn.LayerNorm([6, 8])
        self.unused = nn.Linear(8, 8)
        self.rel_pos = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 4)
        self.register_buffer("index", torch.zeros(6, 8, dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)  # batch, 5, 8
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(x) * self.scale + self.bias_table[self.index][..., 0]
        return self.head(x + x @ self.rel_pos)


class Buffered(nn.Module):
    """Reads a buffer beside its weights, in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.shift


class Mixed(nn.Module):
    """Under FSDP: one entry of each kind that cannot be shared out by itself, and those that can."""

    def __init__(self) -> None:
        super().__init__()
        common = nn.Linear(8, 8)
        self.shared = nn.ModuleList([nn.Sequential(common, nn.ReLU()), nn.Sequential(common)])  # a module in two entries
        self.tied = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.tied[0].weight = self.tied[1].weight
        self.read = nn.ModuleList([nn.Linear(8, 8)])  # its weight alone is used
        self.twice = nn.Sequential(nn.Linear(8, 8))
        self.recurrent = nn.ModuleList([nn.LSTM(8, 8, batch_first=True)])
        self.own = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        for part in (*self.shared, *self.tied, self.twice, self.twice, self.own):
            x = part(x) + x
        x = nn.functional.linear(x, self.read[0].weight)
        return self.head(self.recurrent[0](x[:, None])[0][:, 0])


def _dim_net(dim: int) -> nn.Module:
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dim]
    return nn.Sequential(convolution(4, 8, 3, padding=1), nn.ReLU(), convolution(8, 4, 1))


def _x(*shape: int) -> Example:
    return Example((torch.randn(*shape),))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example]]] = {
    "residual": (Residual, lambda: _x(2, 3, 6, 6)),
    "grouped": (Grouped, lambda: _x(2, 8, 6, 6)),
    "transposed": (Transposed, lambda: _x(2, 8, 3, 3)),
    "tied": (Tied, lambda: Example((torch.randint(12, (2, 5)),))),
    "twice": (Twice, lambda: _x(2, 8)),
    "functional": (Functional, lambda: _x(2, 8)),
    "attention": (Encoder, lambda: _x(2, 5, 8)),
    "transformer": (Transformer, lambda: _x(2, 5, 8)),
    "cross-attention": (CrossAttention, lambda: Example((torch.randn(2, 5, 8), torch.randn(2, 3, 4), torch.randn(2, 3, 12)))),
    "lstm": (Recurrent, lambda: _x(2, 5, 8)),
    "standardised": (Standardised, lambda: _x(2, 4, 6, 6)),
    "einsum": (EinsumParent, lambda: _x(2, 5, 8)),
    "products": (Products, lambda: _x(2, 5, 8)),
    "transposing": (Transposing, lambda: _x(2, 8)),
    "query": (Query, lambda: _x(2, 8)),
    "bilinear": (BilinearPair, lambda: Example((torch.randn(2, 4), torch.randn(2, 8)))),
    "experts": (Experts, lambda: _x(2, 4, 6, 6)),
    "auxiliary": (Auxiliary, lambda: _x(2, 8)),
    "listed": (Listed, lambda: _x(2, 8)),
    "conv1d": (lambda: _dim_net(1), lambda: _x(2, 4, 6)),
    "conv3d": (lambda: _dim_net(3), lambda: _x(2, 4, 3, 3, 3)),
    "keywords": (Keywords, lambda: Example((), {"image": torch.randn(2, 8), "text": torch.randn(2, 4)})),
    "scripted": (Scripted, lambda: _x(2, 8)),
    "branching": (Branching, lambda: _x(2, 8, 4, 4)),
    "joined": (Joined, lambda: _x(2, 8)),
    "buffered": (Buffered, lambda: _x(2, 8)),
    "tables": (Tables, lambda: Example((torch.randint(10, (2, 5)),))),
    "half": (lambda: Residual().bfloat16(), lambda: Example((torch.randn(2, 3, 6, 6).bfloat16(),))),
}


def build(name: str) -> tuple[nn.Module, Example]:
    """The model called `name` in train mode, and an example of its input with a batch of two."""
    make_model, make_example = MODELS[name]
    return make_model(), make_example()


def models(names: Iterable[str] = MODELS, *, xfail: Mapping[str, str] | None = None) -> pytest.MarkDecorator:
    """Parametrise `name` over the models; those in `xfail` must fail, for the reason given."""
    reasons = xfail or {}
    marks = {name: [pytest.mark.xfail(strict=True, reason=reasons[name])] if name in reasons else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, id=name, marks=mark) for name, mark in marks.items()])


def run(model: nn.Module, example: Example, *, train: bool = False) -> list[Tensor]:
    """The output tensors of one forward pass, with the same random numbers each time."""
    model.train(train)
    torch.manual_seed(7)
    return [leaf for leaf in tree_leaves(model(*example.args, **example.kwargs)) if isinstance(leaf, Tensor)]


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit (-0 equals 0)."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a function which promises to leave a model alone must leave alone."""

    def state(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        values = tensor.detach().flatten().view(torch.uint8).numpy().tobytes() if tensor.device.type == "cpu" else b""
        return id(tensor), tensor._version, tensor.requires_grad, tensor.is_leaf, tensor.device, id(tensor.grad), values

    return {
        path: (
            type(module),
            module.training,
            sorted(module.__dict__),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            {name: state(tensor) for name, tensor in (*module._parameters.items(), *module._buffers.items())},
            {name: id(child) for name, child in module._modules.items()},
        )
        for path, module in model.named_modules()
    } | {"random numbers": torch.get_rng_state().numpy().tobytes()}
