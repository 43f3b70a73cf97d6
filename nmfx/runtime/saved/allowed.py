"""The operators that a compiled file may name: those that compute, and do nothing else.

Of PyTorch those of `ATEN` that this version has. None writes to what it reads, touches a file, gives memory that nobody has
written (`empty`) or that lies beside its tensors (`as_strided`), or draws random numbers; PyTorch checks their arguments,
shapes and indices, but for those of `CHECKED`, which are checked here. The list is what the graphs of 120 networks of timm and
torchvision have, one or more of a family, but for recurrent ones (`lstm` reads beyond weights of other sizes), and their kin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmfx.errors import NmfxError
from nmfx.runtime.checks import expect
from nmfx.runtime.operators import OPERATORS

LARGEST = 1 << 62  # of a size that is computed
_ATEN = """
_assert_tensor_metadata.default _log_softmax.default _native_batch_norm_legit_no_training.default _prelu_kernel.default
_softmax.default _to_copy.default _unsafe_view.default abs.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_avg_pool3d.default adaptive_max_pool1d.default adaptive_max_pool2d.default add.Scalar add.Tensor addcmul.default
addmm.default alias.default all.dim amax.default amin.default any.dim arange.default arange.start arange.start_step
argmax.default argmin.default argsort.default atan.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
baddbmm.default bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bmm.default cat.default ceil.default celu.default
chunk.default clamp.default clamp_max.default clamp_min.default clone.default col2im.default constant_pad_nd.default
contiguous.default conv1d.default conv2d.default conv3d.default conv_transpose2d.input copy.default cos.default cosh.default
cumsum.default detach.default diagonal.default div.Scalar div.Tensor div.Tensor_mode dot.default einsum.default elu.default
embedding.default eq.Scalar eq.Tensor erf.default exp.default expand.default expm1.default eye.m fill.Tensor
flatten.using_ints flip.default floor.default floor_divide.Scalar floor_divide.default full.default full_like.default
gather.default ge.Scalar ge.Tensor gelu.default glu.default group_norm.default gt.Scalar gt.Tensor hardshrink.default
hardsigmoid.default hardswish.default hardtanh.default im2col.default index.Tensor index_select.default layer_norm.default
le.Scalar le.Tensor leaky_relu.default lift_fresh_copy.default linalg_vector_norm.default linear.default log.default
log1p.default log2.default log_sigmoid.default log_softmax.int logical_and.default logical_not.default logical_or.default
logit.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim
max_pool1d.default max_pool2d.default max_pool3d.default maximum.default mean.default mean.dim min.default min.dim
minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor mv.default native_layer_norm.default ne.Scalar
ne.Tensor neg.default new_full.default new_ones.default new_zeros.default ones.default ones_like.default outer.default
pad.default permute.default pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
prelu.default prod.dim_int reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor repeat.default
repeat_interleave.self_int reshape.default rms_norm.default roll.default round.default rsqrt.default rsub.Scalar rsub.Tensor
scalar_tensor.default scaled_dot_product_attention.default select.int select_scatter.default selu.default sigmoid.default
sign.default silu.default sin.default sinh.default slice.Tensor slice_scatter.default softmax.int softplus.default
softshrink.default sort.default split.Tensor split_with_sizes.default sqrt.default square.default squeeze.default
squeeze.dim squeeze.dims stack.default std.correction sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int
tan.default tanh.default threshold.default tile.default topk.default transpose.int tril.default triu.default trunc.default
type_as.default unbind.int unfold.default unsqueeze.default upsample_bicubic2d.vec upsample_bilinear2d.vec
upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec upsample_trilinear3d.vec var.correction
var_mean.correction view.default where.Scalar where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""
ATEN = frozenset(_ATEN.split())


def _sizes(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Arithmetic of sizes that stays within 64 bits, so that no graph can make numbers without end."""

    def checked(one: Any, other: Any) -> Any:
        expect(all(isinstance(each, int | torch.SymInt) for each in (one, other)), "two sizes")
        found = function(one, other)
        expect(not isinstance(found, int) or abs(found) <= LARGEST, "sizes within 64 bits")
        return found

    checked.__name__ = checked.__qualname__ = function.__name__
    return checked


ARITHMETIC = {
    name: (getattr(operator, name), _sizes(getattr(operator, name))) for name in ("add", "sub", "mul", "floordiv", "mod")
}


def batch_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    """PyTorch's, which reads beyond statistics that are shorter than there are channels."""
    shape = tuple(x.shape[1:2])
    fits = [tuple(one.shape) == shape and one.dtype == x.dtype for one in (weight, bias, mean, var) if one is not None]
    expect(x.dim() > 1 and all(fits), f"statistics of {shape[0] if shape else 0} channels, of the type of the pictures")
    return torch.ops.aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)


CHECKED: dict[str, Callable[..., Any]] = {"aten._native_batch_norm_legit_no_training.default": batch_norm}


def is_functional(target: torch._ops.OpOverload) -> bool:
    """Whether an operator gives something new, or a view, and changes nothing."""
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def name_of(target: Any) -> str | None:
    """The name by which a file calls what a node calls; None if it may not."""
    if target is operator.getitem:
        return "getitem"
    for name, both in ARITHMETIC.items():
        if target in both:
            return name
    for name, function in CHECKED.items():
        if target is function:
            return name
    name = str(target)
    return name if isinstance(target, torch._ops.OpOverload) and _is_allowed(name) else None


def operator_named(name: str) -> tuple[Callable[..., Any], torch._ops.OpOverload | None]:
    """What a file calls by this name, and the operator that says what its arguments are; None where they are two sizes, or
    something and a place in it.

    Raises:
        NmfxError: it may not be called, or this PyTorch does not have it.
    """
    if name == "getitem":
        return operator.getitem, None
    if name in ARITHMETIC:
        return ARITHMETIC[name][1], None
    if not _is_allowed(name):
        raise NmfxError(f"{name} is no operator that a compiled file may call")
    space, packet, overload = name.split(".")
    try:
        found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, space), packet), overload)
    except AttributeError:
        raise NmfxError(f"PyTorch {torch.__version__} has no operator {name}; upgrade it") from None
    return CHECKED.get(name, found), found


def _is_allowed(name: str) -> bool:
    space, _, rest = name.partition(".")
    if space == "nmfx":
        one = OPERATORS.get(rest.removesuffix(".default"))
        takes = (
            [] if one is None or one.sizes is None else [kind for kind in one.arguments.values() if kind.startswith("Tensor")]
        )
        return len(takes) == 1 and rest.endswith(".default")  # with weights they are layers
    return space == "aten" and rest in ATEN
