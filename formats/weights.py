"""The transformer's weights, read: from a diffusers `transformer/` folder, or a file as flux1-dev.safetensors.

Names, shapes and precisions are in the files' headers, so what does not fit is found before anything is read; tensors
are read as they are placed.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.lora import Changes, add_change
from formats.lora_files import merge_lora
from formats.names import check_state, config_from_diffusers, from_diffusers, load_weights
from formats.reading import FP8, check_precision, parse_file, without_prefix
from model import FLUX_DEV, Flux, FluxConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a transformer in one piece; others have an index
INDEX = f"{WEIGHTS}.index.json"
Device = str | torch.device
Tensors = Iterator[tuple[str, Tensor]]


class Weights(NamedTuple):
    """A transformer on the disk."""

    path: Path
    config: FluxConfig
    tensors: Tensors  # by our names, read as they are asked for; once
    notes: list[str]  # what people should know of them


def open_flux(path: Path, beside: Path | None = None) -> Weights:
    """A transformer by its headers: a diffusers folder, sharded or not, or a file with black-forest-labs' names.

    `beside` is a diffusers config.json that says of a file what its tensors do not: how positions are encoded.
    Raises ValueError naming the folder or file and what is missing or does not fit.
    """
    if path.is_file():
        state, notes = without_prefix(parse_file(path, load_file), path)  # mapped, not read
        notes += check_precision(state, path)
        near = read_config(beside) if beside and beside.exists() else FLUX_DEV
        config = parse_file(path, lambda _: config_of(state, near.axes_dim))
        if other := differences(config, near):
            notes.append(
                f"note: {path} is not the network of {beside if near is not FLUX_DEV else 'FLUX.1-dev'}: {other}"
            )
        with torch.device("meta"):
            check_state(state, wanted := Flux(config).state_dict(), source=str(path))
        tensors: Tensors = ((name, state[name]) for name in wanted)
    else:
        config, shards, index = read_config(path / "config.json"), [WEIGHTS], path / INDEX
        if index.exists():
            shards = parse_file(index, lambda file: sorted(set(json.loads(file.read_text())["weight_map"].values())))
        if missing := [name for name in shards if not (path / name).exists()]:
            raise ValueError(f"{path} is incomplete: copy or download {', '.join(missing)}")
        state = {k: v for name in shards for k, v in parse_file(path / name, load_file).items()}
        notes = check_precision(state, path)
        tensors = from_diffusers(state, config, source=str(path))
    # Nothing after this need know fp8, which few operations do; bf16 holds all of its numbers.
    tensors = ((name, t.bfloat16() if t.dtype in FP8 else t) for name, t in tensors)
    return Weights(path, config, tensors, notes)


def read_config(file: Path) -> FluxConfig:
    """The configuration in a diffusers config.json. Raises ValueError naming the file."""
    return parse_file(
        file, lambda f: config_from_diffusers(json.loads(f.read_text())), "copy or download FLUX.1's own file"
    )


def config_of(state: dict[str, Tensor], axes_dim: tuple[int, ...]) -> FluxConfig:
    """The configuration of a transformer by the shapes of its tensors, which tell all but how positions are encoded.

    Raises ValueError naming a tensor that is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"tensor {name} is missing")
        return state[name].shape

    def depth(stack: str) -> int:
        return 1 + max((int(name.split(".")[1]) for name in state if name.startswith(f"{stack}.")), default=-1)

    hidden, in_channels = shape("img_in.weight")
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shape("final_layer.linear.weight")[0],
        vec_in_dim=shape("vector_in.in_layer.weight")[1],
        context_in_dim=shape("txt_in.weight")[1],
        hidden_size=hidden,
        mlp_ratio=shape("double_blocks.0.img_mlp.0.weight")[0] / hidden,
        num_heads=hidden // shape("double_blocks.0.img_attn.norm.query_norm.scale")[0],
        depth=depth("double_blocks"),
        depth_single_blocks=depth("single_blocks"),
        axes_dim=axes_dim,
        guidance_embed="guidance_in.in_layer.weight" in state,
    )


def differences(config: FluxConfig, other: FluxConfig) -> str:
    """In which fields two configurations differ, for people; empty if in none."""
    names = [f.name for f in fields(config) if getattr(config, f.name) != getattr(other, f.name)]
    return ", ".join(f"{name} {getattr(config, name)} instead of {getattr(other, name)}" for name in names)


def load_flux(
    weights: Weights,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    place: Callable[[Flux, Tensors], None] | None = None,
    lora: Changes | None = None,
    strength: float = 1.0,
    origin: Weights | None = None,
) -> Flux:
    """The network of these weights.

    `place(flux, tensors)` is for models that no rank holds whole: it gets a Flux without memory and an iterator over
    names and tensors, which are read from disk as they are asked for.
    `strength` times `lora` is added to them, or in bf16, where small changes would be rounded away, to what layers
    give, as diffusers does; with `origin`, the transformer that this one was tuned from, they are
    origin + strength (tuned - origin).
    Raises ValueError where origin is another network.
    """
    path, config, tensors, _ = weights
    apart = lora if lora and place is None and dtype != torch.float32 else {}
    if lora and not apart:
        tensors = merge_lora(tensors, lora, strength)
    if origin:
        if origin.config != config:
            raise ValueError(f"--strength between different networks: {path} was not tuned from {origin.path}")
        tensors = between(origin.tensors, tensors, strength)
    with torch.device("meta"):
        flux = Flux(config)
    if place is not None:
        place(flux, tensors)
        return flux
    load_weights(flux, {name: tensor.to(dtype) for name, tensor in tensors}, source=str(path))
    for name, change in apart.items():
        add_change(flux.get_submodule(name.removesuffix(".weight")), change, strength)
    return flux.to(device)  # names were converted on the CPU: a GPU holds the weights once


def between(first: Tensors, second: Tensors, strength: float) -> Tensors:
    """first + strength (second - first), in fp32, of two networks' tensors by our names, in the same order."""
    for (name, a), (other, b) in zip(first, second, strict=True):
        assert name == other
        yield name, torch.lerp(a.float(), b.float(), strength)
