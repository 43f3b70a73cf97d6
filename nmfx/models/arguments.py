"""What a file may say to a builder of timm or torchvision: an allow-list, each argument with its type and its bounds.

Builders take far more: paths to pickles, configurations with addresses to fetch from, depths and widths without end. A person
may give them from Python; a checkpoint, a work directory or a recipe may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from nmfx import text
from nmfx.errors import ModelError, NmfxError
from nmfx.files import parsing
from nmfx.files.parsing import Share

Classes = Annotated[int, Meta(ge=0, le=1_000_000)]
Channels = Annotated[int, Meta(ge=1, le=1024)]
SmallCount = Annotated[int, Meta(ge=0, le=256)]
Pixels = Annotated[int, Meta(ge=1, le=8192)]
Patch = Annotated[int, Meta(ge=1, le=1024)]
Scale = Annotated[float, Meta(ge=0, le=16)]
PAIR = Meta(min_length=2, max_length=2)  # msgspec 0.22 crashes on bounded int | tuple[int, int]
TableName = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{0,32}\Z")]  # a name of timm's own tables, as avg or gelu

ARGUMENTS: dict[str, Any] = {
    # both, and the demos
    "num_classes": Classes,
    "in_chans": Channels,
    # timm: sizes
    "img_size": Pixels | Annotated[tuple[Pixels, ...], PAIR],
    "patch_size": Patch | Annotated[tuple[Patch, ...], PAIR],
    "window_size": Patch | Annotated[tuple[Patch, ...], PAIR],
    "window_ratio": Patch,
    "output_stride": Literal[8, 16, 32],
    "reg_tokens": SmallCount,
    # timm: parts by name
    "global_pool": TableName,
    "act_layer": TableName,
    "norm_layer": TableName,
    # timm: shares that are dropped, and factors
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate"), Share),
    **dict.fromkeys(("pos_drop_rate", "patch_drop_rate", "head_drop_rate"), Share),
    **dict.fromkeys(("init_values", "ls_init_value", "head_init_scale"), Scale | None),
    # timm: switches
    **dict.fromkeys(("class_token", "no_embed_class", "fc_norm", "pre_norm", "final_norm", "qkv_bias", "qk_norm"), bool),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "always_partition"), bool),
    **dict.fromkeys(("pool_include_prefix", "use_abs_pos_emb", "use_rel_pos_bias"), bool),
    # torchvision
    "image_size": Pixels,
    "min_size": Pixels,
    "max_size": Pixels,
    "num_keypoints": SmallCount,
    "trainable_backbone_layers": SmallCount,
    "width_mult": Scale,
    **dict.fromkeys(("dropout", "attention_dropout", "stochastic_depth_prob"), Share),
    **dict.fromkeys(("aux_logits", "aux_loss", "transform_input", "init_weights"), bool),
    **dict.fromkeys(("zero_init_residual", "memory_efficient"), bool),
    "replace_stride_with_dilation": tuple[bool, bool, bool],
}


def parse_kwargs(tree: Any, origin: str, error: type[NmfxError] = ModelError) -> dict[str, Any]:
    """Arguments that a file gives, by name, each within its bounds.

    Raises:
        NmfxError: of type `error`, naming `origin` and the argument: none that a file may give, or of another type or size.
    """
    if not isinstance(tree, Mapping):
        raise error(f"{origin}: kwargs: expected arguments with values, found {type(tree).__name__}")
    for name in tree:
        if name not in ARGUMENTS:
            said, near = parsing.printable(str(name), 60), text.nearest(str(name), ARGUMENTS)
            raise error(
                f"{origin}: kwargs: {said!r} may not come from a file{near}; build the model yourself, in Python. "
                f"Allowed: {', '.join(ARGUMENTS)}"
            )
    return {name: parsing.convert(value, ARGUMENTS[name], f"{origin}: kwargs.{name}", error) for name, value in tree.items()}
