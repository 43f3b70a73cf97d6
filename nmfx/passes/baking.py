"""bake(model): masks leave the model, and the zeros they made stay in its weights."""

from __future__ import annotations

from torch import nn

from nmfx.masking.copies import deep_copy
from nmfx.masking.owner import unmask_model
from nmfx.masking.sites import check_fused, recheck_weights


def bake(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a converted model in plain modules of the original classes, with real zeros and no masks.

    A module that makes another weight of its parameter (weight standardisation) becomes the plain convolution or linear that
    reads the result.

    Raises:
        NmfxError: such a module does more than that.
        VerificationError: the masks are gone, as the model was fused since `transform`.
    """
    check_fused(model)
    result = model if inplace else deep_copy(model)
    recheck_weights(result)
    unmask_model(result, keep_masked=True)
    return result
