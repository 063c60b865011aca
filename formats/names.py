"""The two published forms of a Flux's weights: black-forest-labs' names, which are ours, and diffusers'.

A diffusers `transformer/` folder holds the tensors of `flux1-dev.safetensors`, cut and named differently.  Both
directions read one table, `module_names`; so does lora.py, for the parts of a fused layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model import FLUX_DEV, Flux, FluxConfig

# Modules by black-forest-labs' name and by diffusers'. Several names share the rows of one tensor, in that
# order: hidden_size rows each, and the last takes the rest.
OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "modulation.lin": ("norm.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # rows (shift, scale); (scale, shift) in diffusers
# Config entries by both names. Fields that are not here have one value in diffusers, which is FLUX_DEV's.
CONFIG_NAMES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "vec_in_dim": "pooled_projection_dim",
    "context_in_dim": "joint_attention_dim",
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "axes_dim": "axes_dims_rope",
    "guidance_embed": "guidance_embeds",
}


def module_names(config: FluxConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every module that holds parameters: our name and diffusers' name or names for its rows."""
    for ours, theirs in OUTER.items():
        if config.guidance_embed or not ours.startswith("guidance_in."):
            yield ours, theirs
    for stack, table, depth in (("", DOUBLE, config.depth), ("single_", SINGLE, config.depth_single_blocks)):
        for i in range(depth):
            for ours, theirs in table.items():
                names = tuple(f"{stack}transformer_blocks.{i}.{name}" for name in theirs)
                yield f"{stack or 'double_'}blocks.{i}.{ours}", names


def diffusers_keys(key: str, table: dict[str, tuple[str, ...]]) -> list[str]:
    """diffusers' name, or names in order of rows, for our parameter `key`: to_q.weight, to_k.weight, ..."""
    module, _, leaf = key.rpartition(".")
    return [f"{name}.{'weight' if leaf == 'scale' else leaf}" for name in table.get(module, ())]


def swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def to_diffusers(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """A state dict with our names, or any part of one, in diffusers' form; cut tensors are views.

    Raises ValueError naming a tensor that is no parameter of this Flux.
    """
    table, result = dict(module_names(config)), {}
    for key, tensor in state.items():
        if not (keys := diffusers_keys(key, table)):
            raise ValueError(f"{key} is no parameter of this Flux")
        if key.startswith(SWAPPED):
            tensor = swap_halves(tensor)
        rows = [config.hidden_size] * (len(keys) - 1)
        result |= zip(keys, tensor.split([*rows, len(tensor) - sum(rows)]), strict=True)
    return result


def from_diffusers(
    state: dict[str, Tensor], config: FluxConfig, source: str = "the state dict"
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_diffusers`, for a whole state dict: names and tensors, one at a time as they are asked for.

    Raises ValueError, before the first is read, naming `source` and the tensors, by diffusers' names, that are
    missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        ours = Flux(config).state_dict()
    check_state(state, to_diffusers(ours, config), source)
    table = dict(module_names(config))

    def whole(key: str) -> Tensor:
        parts = [state[name] for name in diffusers_keys(key, table)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return swap_halves(tensor) if key.startswith(SWAPPED) else tensor

    return ((key, whole(key)) for key in ours)


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """The config.json of a diffusers `transformer/` folder. Raises ValueError naming what it cannot say."""
    for name in ("mlp_ratio", "theta", "qkv_bias"):
        if getattr(config, name) != getattr(FLUX_DEV, name):
            raise ValueError(f"diffusers cannot express {name}={getattr(config, name)}")
    fixed = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "attention_head_dim": config.head_dim}
    return fixed | {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()}


def config_from_diffusers(entries: dict[str, Any]) -> FluxConfig:
    """The inverse; entries left out have diffusers' defaults (FLUX.1-dev's own file names no axes_dims_rope).

    Raises ValueError naming an entry that this Flux does not have.
    """
    defaults = config_to_diffusers(FLUX_DEV) | {"out_channels": None, "guidance_embeds": False}
    full = defaults | {k: v for k, v in entries.items() if k == "_class_name" or not k.startswith("_")}
    for name, value in full.items():
        if name not in defaults or (name in ("_class_name", "patch_size") and value != defaults[name]):
            raise ValueError(f"this Flux has no {name}={value!r}, which the diffusers config asks for")
    fields = {ours: full[theirs] for ours, theirs in CONFIG_NAMES.items()}
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    fields["axes_dim"] = tuple(fields["axes_dim"])
    return FluxConfig(**fields, hidden_size=full["attention_head_dim"] * full["num_attention_heads"])


def check_state(state: dict[str, Tensor], want: dict[str, Tensor], source: str) -> None:
    """Raise ValueError naming `source` and the first few tensors that differ from `want` in name or shape."""
    wrong = {
        "missing": [k for k in want if k not in state],
        "unexpected": [k for k in state if k not in want],
        "misshapen": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(want[k].shape)}"
            for k in want
            if k in state and state[k].shape != want[k].shape
        ],
    }
    short = {what: ", ".join(names[:4] + ["..."] * (len(names) > 4)) for what, names in wrong.items()}
    if problems := [f"{len(wrong[what])} {what} ({names})" for what, names in short.items() if names]:
        raise ValueError(f"{source} does not fit this Flux: tensors {', '.join(problems)}")


def load_weights(model: Flux, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict with black-forest-labs' names, strictly; `source`, a file or folder, is for errors.

    A model built on the meta device takes the tensors themselves, dtype and device with them: 12B weights are
    in memory once. Any other model copies them.
    Raises ValueError naming what is missing, unexpected or misshapen.
    """
    check_state(state, model.state_dict(), source)
    # dict(): torch notes assign=True in the metadata that a state_dict() carries, and the next model to load
    # the same one would share its tensors instead of copying them.
    model.load_state_dict(dict(state), strict=True, assign=any(p.is_meta for p in model.parameters()))
