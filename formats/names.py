"""The two published forms of a transformer's weights: black-forest-labs' names, which are ours, and diffusers'.

A diffusers `transformer/` folder holds the tensors of `flux1-dev.safetensors` under other names. Fused layers are
split by rows: one qkv of black-forest-labs is to_q, to_k and to_v of diffusers. Both directions read one table,
`module_names`, which a family makes; so does lora.py, for the rows of a fused layer.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from families import FAMILIES, NetworkConfig, empty_network, family_of
from formats.reading import tensor_names

SWAPPED = "final_layer.adaLN_modulation.1"  # rows (shift, scale); (scale, shift) in diffusers


def module_names(config: NetworkConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every module that holds parameters: our name, and diffusers' name or names for its rows."""
    family = family_of(config)
    for module, names in family.OUTER.items():
        # Only these modules depend on the configuration.
        if config.guidance_embed or not module.startswith("guidance_in."):
            yield module, names
    stacks = [
        ("double_blocks", "transformer_blocks", family.DOUBLE, config.depth),
        ("single_blocks", "single_transformer_blocks", family.SINGLE, config.depth_single_blocks),
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


def empty_state(config: NetworkConfig) -> dict[str, Tensor]:
    """Our names, in the network's order, with tensors on the meta device: shapes without memory."""
    return empty_network(config).state_dict()


def family_and_prefix(names: Iterable[str]) -> tuple[ModuleType, str] | None:
    """The family of a file with black-forest-labs' names, and the prefix of these names; None for any other file.

    The prefix is empty, or "model.diffusion_model." in ComfyUI's files.
    """
    # The end of a name decides: the prefix is unknown, and other tensors, of a VAE for instance, have other prefixes.
    for name in names:
        for family in FAMILIES:
            if name.endswith(family.SIGN):
                return family, name.removesuffix(family.SIGN)
    return None


def flux_file(name: str | Path) -> Path | None:
    """The path `name` if it is a file whose header has black-forest-labs' names of a transformer; else None."""
    path = Path(name)
    # LoRAs and VAEs have the same suffix, so the names of the tensors decide.
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    return path if family_and_prefix(tensor_names(path)) else None


# ------------------------------------------------------------------------------------------ tensors


def to_diffusers(state: dict[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """A state dict with our names, or any subset of one, in diffusers' form. Rows of a fused tensor are views.

    Raises KeyError for a tensor that is no parameter of this network.
    """
    table = dict(module_names(config))
    result = {}
    for key, tensor in state.items():
        # A fused tensor has several names in diffusers, each for rows of its own.
        keys = diffusers_keys(key, table)
        if key.startswith(SWAPPED):
            tensor = swap_halves(tensor)
        rows = [config.hidden_size] * (len(keys) - 1)
        rows.append(len(tensor) - sum(rows))  # all rows of a tensor that is not fused; of linear1 the MLP's
        result |= zip(keys, tensor.split(rows), strict=True)
    return result


def from_diffusers(
    state: dict[str, Tensor], config: NetworkConfig, source: str = "the state dict"
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_diffusers`, for a whole state dict: names and tensors, each made as it is asked for.

    Raises ValueError as `check_state`, before the first tensor is read.
    """
    # All names and shapes are compared before a byte of the weights is read.
    shapes = empty_state(config)
    check_state(state, to_diffusers(shapes, config), source)
    return fused_tensors(state, list(shapes), config)


def fused_tensors(state: dict[str, Tensor], keys: list[str], config: NetworkConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time, of a state dict with diffusers' names."""
    table = dict(module_names(config))
    for key in keys:
        rows = [state[name] for name in diffusers_keys(key, table)]
        # A tensor that is not fused stays a view of its mapped file: a copy would be read into memory at once.
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


def config_to_diffusers(config: NetworkConfig) -> dict[str, Any]:
    """The config.json of a diffusers `transformer/` folder."""
    family = family_of(config)
    entries = {"_class_name": family.TRANSFORMER, "patch_size": 1, "attention_head_dim": config.head_dim}
    for field, name in family.CONFIG_NAMES.items():
        entries[name] = getattr(config, field)
    return entries


def config_from_diffusers(entries: dict[str, Any]) -> NetworkConfig:
    """The inverse of `config_to_diffusers`. An absent entry has diffusers' default: FLUX.1-dev lacks axes_dims_rope.

    Raises ValueError naming an entry that the network does not have.
    """
    family = FAMILIES[0]
    for other_family in FAMILIES:
        if entries.get("_class_name") == other_family.TRANSFORMER:
            family = other_family
    defaults = config_to_diffusers(family.DEFAULT) | family.CONFIG_DEFAULTS
    values = defaults | entries
    free = {*family.CONFIG_NAMES.values(), "attention_head_dim"}
    for name, value in entries.items():
        # _diffusers_version and _name_or_path say nothing of the network.
        unknown = name not in defaults and not name.startswith("_")
        fixed = name in defaults and name not in free
        # An entry that is unknown, a flag of a later diffusers for instance, could change what the network computes.
        if unknown or (fixed and value != defaults[name]):
            raise ValueError(f"this Flux has no {name}={value!r}, which the diffusers config asks for")
    fields = {field: values[name] for field, name in family.CONFIG_NAMES.items()}
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]  # null means: as many as in_channels
    fields["axes_dim"] = tuple(fields["axes_dim"])  # JSON has lists only
    return family.Config(**fields, hidden_size=values["attention_head_dim"] * values["num_attention_heads"])
