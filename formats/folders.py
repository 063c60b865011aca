"""Model folders in the layout of FLUX.1-dev, which the tiny model's is too: described, checked and loaded.

`describe` reads small files and headers, in a second, and finds whatever does not fit. `load_parts` reads the frozen
networks around a transformer that the caller made: train.py shards its own, `load_pipeline` makes one on one device.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging

from formats.locations import Location, locate
from formats.lora_files import read_lora
from formats.weights import Weights, build_flux, build_with_lora, interpolate, open_flux
from infra.prompts import print_on_first_rank
from infra.reading import check_finite, parse_file, parse_json
from model import Flux

PATCH = 2  # FLUX sees 2x2 patches of latents
# What `sample.sigmas` reads of scheduler_config.json. All other entries must have their defaults.
SHIFTS = {"use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}


class Description(NamedTuple):
    """What a model says of itself in its small files, and in the headers of its transformer's files."""

    location: Location
    weights: Weights  # the transformer's, not read yet
    schedule: dict[str, Any]  # scheduler_config.json
    tokenizers: list[PreTrainedTokenizerBase]  # CLIP's and T5's
    cell: int  # pixels a token spans each way, 16 for FLUX


@dataclass
class Pipeline:
    """A loaded model. All but `flux` is frozen."""

    location: Location
    flux: Flux
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: PreTrainedTokenizerBase
    t5_tokenizer: PreTrainedTokenizerBase
    schedule: dict[str, Any]  # scheduler_config.json
    cell: int  # pixels a token spans each way
    text_length: int  # T5 tokens that a prompt is padded or truncated to
    compute: torch.dtype  # of the transformer, whatever its weights are kept in
    sampling: dict[str, Any] = field(default_factory=dict)  # how it is drawn while it is trained, see sampling.py

    @property
    def device(self) -> torch.device:
        # The transformer's: with --offload-encoders T5's layers are on the CPU.
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
    clip = parse_json(folder / "text_encoder" / "config.json", CLIPTextConfig.from_dict)
    t5 = parse_json(folder / "text_encoder_2" / "config.json", T5Config.from_dict)

    # Folders may be put together by hand, with another VAE for instance. A misfit would fail in the first forward.
    outputs = latent_channels * PATCH**2, clip.hidden_size, t5.d_model
    inputs = weights.config.in_channels, weights.config.vec_in_dim, weights.config.context_in_dim
    if outputs != inputs:
        raise ValueError(f"{folder} mixes models: vae, CLIP and T5 give {outputs} channels, Flux takes {inputs}")
    tokenizers = [
        load_tokenizer(folder / "tokenizer", clip.vocab_size),
        load_tokenizer(folder / "tokenizer_2", t5.vocab_size),
    ]
    return Description(location, weights, schedule, tokenizers, cell)


def parse_schedule(entries: dict[str, Any]) -> dict[str, Any]:
    """scheduler_config.json with its defaults. Raises ValueError for an entry that `sample.sigmas` would ignore."""
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


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer for a text encoder of `vocab_size` embeddings. Raises ValueError naming the folder of any other."""
    remedy = f"copy or download FLUX.1's own {folder.name}/"
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False, local_files_only=True)
    tokenizer = parse_file(folder, load, remedy)
    # FLUX.1's CLIP has 49408 tokens for as many embeddings, its T5 32100 for 32128. Ids beyond the embeddings would
    # fail in the first forward; a tokenizer of few tokens is the other encoder's. Where files are missing, transformers
    # invents a tokenizer of few tokens, or one that cannot pad.
    size, padding = len(tokenizer), tokenizer.pad_token
    if not 0.9 * vocab_size <= size <= vocab_size or padding is None:
        raise ValueError(f"{folder} holds {size} tokens, padding {padding}, for an encoder of {vocab_size}: {remedy}")
    return tokenizer


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
    `base` is the folder that a LoRA changes, or of all but the transformer for a transformer's file. `strength`
    multiplies what a LoRA changes; of any other model, its difference to the transformer of `base`.
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
    text_length = text_length or min(description.tokenizers[1].model_max_length, 512)
    return load_parts(description, flux.to(device), device, dtype, text_length, offload)


def load_parts(
    description: Description,
    flux: Flux,
    device: str | torch.device,
    dtype: torch.dtype,
    text_length: int,
    offload: bool = False,
) -> Pipeline:
    """Load the VAE and the text encoders around a network that the caller made, which stays as it is.

    `dtype` is that of the text encoders, and what the network computes in; the VAE stays fp32.
    `text_length` is the T5 tokens of a prompt. `offload` keeps T5's layers on the CPU except while they compute.
    Raises ValueError naming the folder of weights that are damaged or incomplete.
    """
    logging.disable_progress_bar()  # transformers shows one for each tiny network
    location, _, schedule, tokenizers, cell = description
    folder = location.folder
    # Images and rewards are fp32, and rewards send gradients through the VAE.
    vae = load_frozen(AutoencoderKL, folder / "vae").float().to(device)
    clip = load_frozen(CLIPTextModel, folder / "text_encoder", dtype=dtype).to(device)
    t5 = load_frozen(T5EncoderModel, folder / "text_encoder_2", dtype=dtype)
    if offload:
        lend_layers(t5, device)
    else:
        t5.to(device)
    return Pipeline(location, flux, vae, clip, t5, *tokenizers, schedule, cell, text_length, dtype)


def load_frozen(network: type, folder: Path, **options: Any) -> Any:
    """A network of diffusers or transformers, frozen. Raises ValueError naming the folder."""
    # Folders come from strangers: no code in them is run, and no pickle, which may hold code, is read.
    options |= dict(use_safetensors=True, local_files_only=True, output_loading_info=True)

    def parse(folder: Path) -> nn.Module:
        loaded, info = network.from_pretrained(folder, trust_remote_code=False, **options)
        # Both libraries invent tensors that are missing, with a warning at most.
        missing_keys = sorted(info["missing_keys"])
        if missing_keys:
            raise ValueError(
                f"{len(missing_keys)} tensors of {network.__name__} are missing, such as {missing_keys[0]}"
            )
        check_finite(loaded.named_parameters())
        return loaded

    return parse_file(folder, parse).eval().requires_grad_(False)


def lend_layers(t5: T5EncoderModel, device: str | torch.device) -> None:
    """Have each layer of T5 on the device while it computes only: together they are 9.3 GB, which may not fit."""

    # Hooks of torch: these run before and after the forward of a layer.
    def to_device(layer: nn.Module, inputs: Any) -> None:
        layer.to(device)

    def to_host(layer: nn.Module, inputs: Any, output: Any) -> None:
        layer.to("cpu")

    # The embedding and the last norm are outside of the layers.
    t5.encoder.embed_tokens.to(device)
    t5.encoder.final_layer_norm.to(device)
    for layer in t5.encoder.block:
        layer.register_forward_pre_hook(to_device)
        layer.register_forward_hook(to_host)
