"""The two published forms of a Flux's weights: black-forest-labs' names, which are ours, and diffusers'.

A diffusers `transformer/` folder holds the tensors of `flux1-dev.safetensors` under other names. Fused layers are
split by rows: one qkv there is to_q, to_k and to_v here. Both directions read one table, `module_names`; so does
lora.py, for the rows of a fused layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model import FLUX_DEV, Flux, FluxConfig

# Modules by black-forest-labs' name and by diffusers'. Several names share the rows of one tensor, in that
# order: hidden_size rows each, and the last has the remaining rows.
OUTER = {
    "img_in": ("x_embedder",),  # x is the noisy image
    "txt_in": ("context_embedder",),
    # Time, guidance and the pooled prompt are summed into one vector, `vec`, by one module of diffusers.
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    # FLUX.1-schnell has no guidance.
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),  # shift, scale and gate, of attention and of the MLP
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),  # to_out.1 is a dropout
    "img_mlp.0": ("ff.net.0.proj",),  # net.0 is linear and GELU in one
    "img_mlp.2": ("ff.net.2",),  # net.1 is a dropout
    # The text's weights have the names of attention to a context that is added to the image's.
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    # Attention and MLP run side by side: one product makes the inputs of both, and one joins their outputs.
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
    """Every module that holds parameters: our name, and diffusers' name or names for its rows."""
    for module, names in OUTER.items():
        # Only these modules depend on the configuration.
        if config.guidance_embed or not module.startswith("guidance_in."):
            yield module, names
    stacks = [
        ("double_blocks", "transformer_blocks", DOUBLE, config.depth),
        ("single_blocks", "single_transformer_blocks", SINGLE, config.depth_single_blocks),
    ]
    for stack, diffusers_stack, table, depth in stacks:
        for i in range(depth):
            for module, names in table.items():
                yield f"{stack}.{i}.{module}", tuple(f"{diffusers_stack}.{i}.{name}" for name in names)


def diffusers_keys(key: str, table: dict[str, tuple[str, ...]]) -> list[str]:
    """diffusers' name, or names in order of rows, for our parameter `key`: to_q.weight, to_k.weight, ..."""
    module, _, leaf = key.rpartition(".")
    if leaf == "scale":  # of a norm: black-forest-labs' name for what torch calls weight
        leaf = "weight"
    return [f"{name}.{leaf}" for name in table[module]]


def swap_halves(tensor: Tensor) -> Tensor:
    """Rows (shift, scale) from rows (scale, shift), and the reverse."""
    return torch.cat(tensor.chunk(2)[::-1])


def empty_state(config: FluxConfig) -> dict[str, Tensor]:
    """Our names, in the network's order, with tensors on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Flux(config).state_dict()


# ------------------------------------------------------------------------------------------ tensors


def to_diffusers(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """A state dict with our names, or any subset of one, in diffusers' form. Rows of a fused tensor are views.

    Raises KeyError for a tensor that is no parameter of this Flux.
    """
    table = dict(module_names(config))
    result = {}
    for key, tensor in state.items():
        keys = diffusers_keys(key, table)
        if key.startswith(SWAPPED):
            tensor = swap_halves(tensor)
        rows = [config.hidden_size] * (len(keys) - 1)
        rows.append(len(tensor) - sum(rows))  # all rows of a tensor that is not fused; of linear1 the MLP's
        result |= zip(keys, tensor.split(rows), strict=True)
    return result


def from_diffusers(
    state: dict[str, Tensor], config: FluxConfig, source: str = "the state dict"
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_diffusers`, for a whole state dict: names and tensors, each made as it is asked for.

    Raises ValueError as `check_state`, before the first tensor is read.
    """
    shapes = empty_state(config)
    check_state(state, to_diffusers(shapes, config), source)
    return fused_tensors(state, list(shapes), config)


def fused_tensors(state: dict[str, Tensor], keys: list[str], config: FluxConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time, of a state dict with diffusers' names."""
    table = dict(module_names(config))
    for key in keys:
        rows = [state[name] for name in diffusers_keys(key, table)]
        # A tensor of one name stays the view of its mapped file: a copy would be read, and held in memory, at once.
        tensor = torch.cat(rows) if len(rows) > 1 else rows[0]
        yield key, swap_halves(tensor) if key.startswith(SWAPPED) else tensor


def check_state(state: dict[str, Tensor], shapes: dict[str, Tensor], source: str) -> None:
    """Raise ValueError naming `source` and the first few tensors that differ from `shapes` in name or shape."""
    problems = [f"{key} is unexpected" for key in state if key not in shapes]
    for key, tensor in shapes.items():
        if key not in state:
            problems.append(f"{key} is missing")
        elif state[key].shape != tensor.shape:
            problems.append(f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}")
    if problems:
        # Many files that fail here are quantized: scales beside the weights, or weights packed in int8.
        examples = "; ".join(problems[:4])
        raise ValueError(f"{source} does not fit this Flux, or is quantized, in {len(problems)} tensors: {examples}")


# --------------------------------------------------------------------------------------- config.json


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """The config.json of a diffusers `transformer/` folder."""
    entries = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "attention_head_dim": config.head_dim}
    for field, name in CONFIG_NAMES.items():
        entries[name] = getattr(config, field)
    return entries


def config_from_diffusers(entries: dict[str, Any]) -> FluxConfig:
    """The inverse. Entries that are absent have diffusers' defaults: FLUX.1-dev's own file lacks axes_dims_rope.

    Raises ValueError naming an entry that this Flux does not have.
    """
    defaults = config_to_diffusers(FLUX_DEV) | {"out_channels": None, "guidance_embeds": False}
    values = defaults | entries
    for name, value in entries.items():
        # _diffusers_version and _name_or_path say nothing of the network.
        unknown = name not in defaults and not name.startswith("_")
        fixed = name in ("_class_name", "patch_size")
        # An entry that is unknown, a flag of a later diffusers for instance, could change what the network computes.
        if unknown or (fixed and value != defaults[name]):
            raise ValueError(f"this Flux has no {name}={value!r}, which the diffusers config asks for")
    fields = {field: values[name] for field, name in CONFIG_NAMES.items()}
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]  # null means: as many as in_channels
    fields["axes_dim"] = tuple(fields["axes_dim"])  # JSON has lists only
    return FluxConfig(**fields, hidden_size=values["attention_head_dim"] * values["num_attention_heads"])
