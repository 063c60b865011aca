"""The transformer's weights: opened, checked by the headers of their files, and made into a network.

`open_flux` reads headers alone, so what does not fit is reported before a weight is read. The tensors are an iterator:
whoever makes the network reads them one at a time, and need never hold a second copy of 24 GB.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from families import Network, NetworkConfig, empty_network, family_of
from formats.locations import Location
from formats.lora import Changes, add_change
from formats.lora_files import merge_lora
from formats.names import check_state, config_from_diffusers, empty_state, family_and_prefix, from_diffusers
from infra.reading import check_finite, parse_file, parse_json

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for the weights of a transformer/
INDEX = f"{WEIGHTS}.index.json"  # of weights that are sharded over several files: which tensor is in which
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Tensors = Iterable[tuple[str, Tensor]]


class Weights(NamedTuple):
    """A transformer on the disk."""

    config: NetworkConfig
    tensors: Tensors  # by our names, each read when it is asked for; they can be read once
    notes: list[str]  # lines that tell the user of fp8 weights, or of another guidance_embed


# ----------------------------------------------------------------------------------------- opening


def open_flux(location: Location) -> Weights:
    """A model's transformer by its headers: a diffusers folder, or a file with black-forest-labs' names.

    Raises ValueError naming the folder or file, and what is missing or does not fit.
    """
    path = location.transformer
    if path.is_file():
        return open_single_file(path, location.folder / "transformer" / "config.json")
    return open_subfolder(path)


def weight_files(location: Location) -> list[Path]:
    """The files of a model's transformer, and of the LoRA over it: scores depend on both."""
    files = []
    for path in filter(None, (location.transformer, location.lora)):
        # In a folder glob finds one or more files, in a single file it finds nothing.
        files += sorted(path.glob("*.safetensors")) or [path]
    return files


def open_single_file(path: Path, config_file: Path) -> Weights:
    """A transformer in a file of its own; or in a checkpoint of ComfyUI, whose VAE and text encoders are left unread.

    `config_file`, a diffusers config.json, may be absent: the network is FLUX.1-dev or FLUX.2 [klein] base 4B then.
    """
    # safetensors maps a file into memory: dtypes and shapes come from its header, and no value is read yet.
    mapped = parse_file(path, load_file)
    family, prefix = family_and_prefix(mapped)
    state = {name.removeprefix(prefix): tensor for name, tensor in mapped.items() if name.startswith(prefix)}
    notes = fp8_notes(state, path)

    # The tensors do not say how positions are encoded (axes_dim), so the file needs the configuration of a folder.
    config = read_config(config_file) if config_file.exists() else family.DEFAULT
    if family_of(config) is not family:
        raise ValueError(f"{path} is a transformer of {family.NAME}, and {config_file} of {family_of(config).NAME}")
    # The tensors do say whether guidance is an input: FLUX.1-schnell's file may lie over FLUX.1-dev's folder.
    guidance_embed = "guidance_in.in_layer.weight" in state
    if guidance_embed != config.guidance_embed:
        notes.append(f"note: {path} has guidance_embed {guidance_embed} instead of {config.guidance_embed}")
        config = replace(config, guidance_embed=guidance_embed)
    shapes = empty_state(config)
    check_state(state, shapes, str(path))
    tensors = ((name, state[name]) for name in shapes)  # in the network's order, which `interpolate` relies on
    return Weights(config, upcast(tensors, path), notes)


def open_subfolder(path: Path) -> Weights:
    """A diffusers transformer/, of one file or of shards with an index."""
    config = read_config(path / "config.json")
    files = [WEIGHTS]
    if (path / INDEX).exists():
        files = parse_json(path / INDEX, lambda entries: sorted(set(entries["weight_map"].values())))
    state = {}
    for name in files:
        state |= parse_file(path / name, load_file)  # mapped, too
    tensors = from_diffusers(state, config, str(path))
    return Weights(config, upcast(tensors, path), fp8_notes(state, path))


def read_config(file: Path) -> NetworkConfig:
    """The configuration in a diffusers config.json. Raises ValueError naming the file if no network fits it."""

    def parse(entries: dict[str, Any]) -> NetworkConfig:
        config = config_from_diffusers(entries)
        empty_state(config)
        return config

    return parse_json(file, parse, "copy or download the model's own file")


def fp8_notes(state: dict[str, Tensor], path: Path) -> list[str]:
    """A note if there are fp8 weights, which are often published in bf16, too. Raises ValueError for integers."""
    notes = []
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is of {tensor.dtype}, whose scale is unknown: give bf16, fp16 or fp32")
        if tensor.dtype in FP8:
            notes = [f"note: {path} holds {tensor.dtype} weights, read up-cast: what fp8 rounded off stays lost"]
    return notes


def upcast(tensors: Tensors, path: Path) -> Tensors:
    """fp8 tensors in bf16, which holds all fp8 numbers exactly; torch has few operations on fp8.

    Raises ValueError for a tensor that is not finite, when it is read.
    """
    for name, tensor in tensors:
        if tensor.dtype in FP8:
            tensor = tensor.bfloat16()
        parse_file(path, lambda _, named=(name, tensor): check_finite([named]))
        yield name, tensor


# ----------------------------------------------------------------------------------------- networks


def build_flux(weights: Weights, dtype: torch.dtype) -> Network:
    """The network of these weights, on the CPU."""
    # Without initial values: to draw 12B normal numbers takes minutes. assign=True makes parameters of the tensors
    # as they are, so that weights which have the dtype already stay in the mapped file, and memory holds them once.
    flux = empty_network(weights.config)
    state = {name: tensor.to(dtype) for name, tensor in weights.tensors}
    flux.load_state_dict(state, strict=True, assign=True)
    return flux


def build_with_lora(weights: Weights, changes: Changes, strength: float, dtype: torch.dtype) -> Network:
    """The network of W + strength (alpha / rank) B A, for each weight W that a LoRA changes."""
    if dtype == torch.float32:
        tensors = merge_lora(weights.tensors, changes, strength)
        return build_flux(weights._replace(tensors=tensors), dtype)
    # In bf16 the sum would round small changes away. They are added to the outputs of the layers instead, as in
    # diffusers.
    flux = build_flux(weights, dtype)
    for name, change in changes.items():
        layer = flux.get_submodule(name.removesuffix(".weight"))
        add_change(layer, change, strength)
    return flux


def interpolate(origin: Weights, tuned: Weights, strength: float) -> Weights:
    """Weights origin + strength (tuned - origin), in fp32. Raises ValueError if the two are different networks."""
    if origin.config != tuned.config:
        raise ValueError("--strength is for a model that was tuned from --base, and these are different networks")
    pairs = zip(origin.tensors, tuned.tensors, strict=True)  # both in the network's order, so the names are the same
    tensors = ((name, torch.lerp(start.float(), end.float(), strength)) for (name, start), (_, end) in pairs)
    return tuned._replace(tensors=tensors)
