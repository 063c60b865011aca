"""Model folders in the layout of their family's pipeline in diffusers: described, checked and loaded.

`describe` reads small files and headers, in a second, and finds whatever does not fit. `load_parts` reads the frozen
networks around a transformer that the caller made: train.py shards its own, `load_pipeline` makes one on one device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from families import Network, family_of
from families.common import PATCH, load_frozen
from formats.locations import Location, folder_family, locate
from formats.lora_files import read_lora
from formats.weights import Weights, build_flux, build_with_lora, interpolate, open_flux
from infra.prompts import print_on_first_rank
from infra.reading import parse_json

# What `sigmas` of a family reads of scheduler_config.json. All other entries must have their defaults.
SHIFTS = {"use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}


class Description(NamedTuple):
    """What a model says of itself in its small files, and in the headers of its transformer's files."""

    location: Location
    weights: Weights  # the transformer's, not read yet
    schedule: dict[str, Any]  # scheduler_config.json
    tokenizers: list[PreTrainedTokenizerBase]  # CLIP's and T5's, or Qwen3's
    cell: int  # pixels a token spans each way, 16 for FLUX

    @property
    def family(self) -> ModuleType:
        return family_of(self.weights.config)

    @property
    def clip_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.tokenizers[0] if self.family.HAS_CLIP else None


@dataclass
class Pipeline:
    """A loaded model. All but `flux` is frozen."""

    location: Location
    flux: Network
    vae: nn.Module
    encoders: Sequence[nn.Module]  # CLIP and T5, or Qwen3
    tokenizers: Sequence[PreTrainedTokenizerBase]  # of the encoders
    schedule: dict[str, Any]  # scheduler_config.json
    cell: int  # pixels a token spans each way
    text_length: int  # tokens of T5 or Qwen3 that a prompt is padded or truncated to
    compute: torch.dtype  # of the transformer, whatever its weights are kept in
    sampling: dict[str, Any] = field(default_factory=dict)  # how pictures are drawn during training, see sampling.py

    @property
    def family(self) -> ModuleType:
        return family_of(self.flux.config)

    @property
    def clip_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.tokenizers[0] if self.family.HAS_CLIP else None

    @property
    def device(self) -> torch.device:
        # The transformer's: with --offload-encoders an encoder's layers are on the CPU.
        return self.flux.img_in.weight.device


# ---------------------------------------------------------------------------------------- describing


def describe(name: str | Path, base: str | None = None) -> Description:
    """All of a model but its weights, so that the model and the flags are checked before a weight is read.

    Raises ValueError for a folder, file or tensor that is missing or does not fit.
    """
    location = locate(name, base)
    folder = location.folder
    weights = open_flux(location)
    schedule = parse_json(folder / "scheduler" / "scheduler_config.json", parse_schedule)
    latent_channels, cell = parse_json(folder / "vae" / "config.json", parse_vae_config)
    family = folder_family(folder)
    if family_of(weights.config) is not family:
        raise ValueError(f"{folder} is of {family.NAME}, and {location.transformer} is not: take a folder of its own")
    tokenizers, widths = family.describe_encoders(folder)

    # Folders may be put together by hand, with another VAE for instance. A misfit would fail in the first forward.
    widths["in_channels"] = latent_channels * PATCH**2
    for key, width in widths.items():
        expected = getattr(weights.config, key)
        if width != expected:
            raise ValueError(f"{folder} mixes models: {width} channels for the transformer's {key} of {expected}")
    return Description(location, weights, schedule, tokenizers, cell)


def parse_schedule(entries: dict[str, Any]) -> dict[str, Any]:
    """scheduler_config.json with its defaults. Raises ValueError for an entry that a family's `sigmas` would ignore."""
    # An entry that is absent has the default of the installed diffusers, as in FluxPipeline.
    defaults = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FlowMatchEulerDiscreteScheduler().config}
    schedule = defaults | {"_class_name": entries["_class_name"]} | entries
    is_switch = isinstance(schedule["use_dynamic_shifting"], bool)
    lengths = schedule["max_image_seq_len"] - schedule["base_image_seq_len"]
    if not is_switch or not lengths > 0 or not schedule["shift"] > 0 or not schedule["max_shift"] > 0:
        raise ValueError(f"these shifts have no meaning: { {name: schedule[name] for name in sorted(SHIFTS)} }")
    unknown = entries.keys() - defaults.keys() - {"_diffusers_version"}
    if unknown:
        raise ValueError(f"{min(unknown)} is no entry of FLUX's schedule")
    for name in defaults.keys() - SHIFTS:
        if schedule[name] != defaults[name]:
            raise ValueError(f"only FLUX's own schedule is implemented, not {name}={schedule[name]!r}")
    return schedule


def parse_vae_config(entries: dict[str, Any]) -> tuple[int, int]:
    """Channels of a latent, and pixels that a token spans each way."""
    # Each of the VAE's levels but the first halves height and width: 4 levels make a latent of 8x8 pixels.
    pixels = 2 ** (len(entries["block_out_channels"]) - 1)
    return int(entries["latent_channels"]), PATCH * pixels


# ------------------------------------------------------------------------------------------- loading


def load_pipeline(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_length: int | None = None,
    offload: bool = False,
    base: str | None = None,
    strength: float = 1.0,
) -> Pipeline:
    """Load a model, all of it, on one device. `dtype`, `text_length` and `offload` are those of `load_parts`.

    `text_length` is the tokenizer's own by default, 512 for FLUX.1-dev.
    `base` is the folder that a LoRA changes, or the folder of all other components for a transformer's file. `strength`
    multiplies the change that a LoRA makes; for any other model, its difference from the transformer of `base`.
    Raises ValueError as `describe`, and for damaged weights.
    """
    description = describe(name, base)
    location, weights, *_ = description
    # The network is made on the CPU, so that the device holds its weights once.
    if location.lora:
        flux = build_with_lora(weights, read_lora(location.lora, weights.config), strength, dtype)
    elif strength == 1:
        flux = build_flux(weights, dtype)
    elif base:
        flux = build_flux(interpolate(open_flux(locate(base)), weights, strength), dtype)
    else:
        raise ValueError(
            f"--strength {strength} needs --base FOLDER: {name} is no LoRA, and what it changed is unknown"
        )
    for note in weights.notes:
        print_on_first_rank(note)
    # A tokenizer without a limit has a model_max_length of 1e30.
    text_length = text_length or min(description.tokenizers[-1].model_max_length, 512)
    return load_parts(description, flux.to(device), device, dtype, text_length, offload)


def load_parts(
    description: Description,
    flux: Network,
    device: str | torch.device,
    dtype: torch.dtype,
    text_length: int,
    offload: bool = False,
) -> Pipeline:
    """Load the VAE and the text encoders around a network that the caller made, which stays as it is.

    `dtype` is that of the text encoders, and what the network computes in; the VAE stays fp32.
    `text_length` is the number of T5 or Qwen3 tokens of a prompt. `offload` keeps that encoder's layers on the CPU
    except while they compute.
    Raises ValueError naming the folder of weights that are damaged or incomplete.
    """
    logging.disable_progress_bar()  # transformers shows a bar for each tiny network
    location, _, schedule, tokenizers, cell = description
    folder = location.folder
    # Images and rewards are fp32, and rewards send gradients through the VAE.
    family = description.family
    vae = load_frozen(family.VAE, folder / "vae").float().to(device)
    encoders = family.load_encoders(folder, dtype, device, offload)
    return Pipeline(location, flux, vae, encoders, tokenizers, schedule, cell, text_length, dtype)
