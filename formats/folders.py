"""Model folders in the diffusers layout of FLUX.1-dev, which the tiny model's is too: read and checked.

locations.py finds the parts, weights.py reads the transformer, of which no rank need ever hold a large one whole.
Weights come from safetensors only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from formats.reading import parse_file
from formats.weights import Device, Tensors, Weights, load_flux, open_flux
from infra.prompts import print_once
from model import Flux, FluxConfig

PATCH = 2  # FLUX sees 2x2 patches of latents
SHIFTS = {"use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
ENDS = {"<|endoftext|>": "CLIP", "</s>": "T5"}  # the last token of a prompt tells their tokenizers apart
OWN = "copy or download FLUX.1's own"


@dataclass
class Pipeline:
    """The loaded parts of a model folder. Everything but `flux` is frozen."""

    location: Location
    flux: Flux
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: PreTrainedTokenizerBase
    t5_tokenizer: PreTrainedTokenizerBase
    schedule: dict[str, Any]  # scheduler_config.json
    text_length: int  # T5 tokens a prompt is padded or cut to
    compute: torch.dtype  # of the transformer, whatever its weights are kept in

    @property
    def cell(self) -> int:
        return cell_of(self.vae.config.block_out_channels)

    @property
    def device(self) -> torch.device:
        return self.flux.img_in.weight.device


def cell_of(blocks: Sequence[int]) -> int:
    """Pixels a token spans each way, 16 for FLUX, by the VAE's block_out_channels."""
    return PATCH * 2 ** (len(blocks) - 1)


# ----------------------------------------------------------------------------------------- reading


class Description(NamedTuple):
    """What a model says of itself in its small files, and in the headers of its transformer's."""

    location: Location
    weights: Weights  # the transformer's, not read yet
    schedule: dict[str, Any]  # scheduler_config.json
    tokenizers: list[PreTrainedTokenizerBase]  # CLIP's and T5's
    cell: int  # pixels a token spans each way


def describe(name: str | Path, base: str | None = None) -> Description:
    """All of a model but its weights, so that it and the flags are checked before those are read.

    Raises ValueError for a folder, file or tensor that is missing or does not fit.
    """
    location = locate(name, base)
    folder, weights = location.folder, open_transformer(location)
    schedule = parse_file(folder / "scheduler" / "scheduler_config.json", parse_schedule, f"{OWN} file")
    blocks = parse_file(folder / "vae" / "config.json", lambda file: json.loads(file.read_text())["block_out_channels"])
    tokenize = partial(AutoTokenizer.from_pretrained, local_files_only=True)
    tokenizers = [parse_file(folder / part, tokenize, f"{OWN} {part}/") for part in ("tokenizer", "tokenizer_2")]
    check_parts(folder, weights.config, *tokenizers)
    return Description(location, weights, schedule, tokenizers, cell_of(blocks))


def load_pipeline(
    name: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_length: int | None = None,
    offload: bool = False,
    place: Callable[[Flux, Tensors], None] | None = None,
    base: str | None = None,
    strength: float = 1.0,
) -> Pipeline:
    """Load a model folder. `dtype` is that of the transformer and the text encoders; the VAE stays fp32.

    `text_length`, the T5 tokens of a prompt, is the tokenizer's own by default: 512 for FLUX.1-dev. `offload` keeps
    T5's layers on the CPU but while they compute, and `place` says where the transformer goes: see `load_flux`.
    `base` is the folder that a LoRA lies over, or of the other parts of a transformer's file, and `strength`
    multiplies what a LoRA changes; of any other model, its difference to the base.
    Raises ValueError for a folder, file or tensor that is missing or does not fit, before any weights are read but for
    damage within them.
    """
    logging.disable_progress_bar()  # transformers shows one for each tiny part
    location, weights, schedule, tokenizers, _ = describe(name, base)
    if strength != 1 and not location.lora and not base:
        raise ValueError(
            f"--strength {strength} needs --base FOLDER: {name} is no LoRA, and what it changed is unknown"
        )
    lora = read_lora(location.lora, weights.config) if location.lora else None
    origin = open_transformer(locate(base)) if base and not lora and strength != 1 else None
    for note in weights.notes:
        print_once(note)

    folder = location.folder
    vae = parse_file(folder / "vae", partial(parse_model, AutoencoderKL)).float()
    clip = parse_file(folder / "text_encoder", partial(parse_model, CLIPTextModel, dtype=dtype))
    t5 = parse_file(folder / "text_encoder_2", partial(parse_model, T5EncoderModel, dtype=dtype))
    vae, clip, t5 = (part.eval().requires_grad_(False) for part in (vae, clip, t5))
    flux = load_flux(weights, device, dtype, place, lora, strength, origin)
    text_length = text_length or min(tokenizers[1].model_max_length, 512)  # of a T5 without limit, 1e30
    vae.to(device), clip.to(device)
    if offload:
        lend_layers(t5, device)
    else:
        t5.to(device)
    return Pipeline(location, flux, vae, clip, t5, *tokenizers, schedule, text_length, dtype)


def lend_layers(t5: T5EncoderModel, device: Device) -> None:
    """Have each of T5's layers on the device while it computes only: all of them, 9.3 GB, may not fit there at once."""

    def there(layer: nn.Module, inputs: Any) -> None:
        layer.to(device)

    def back(layer: nn.Module, inputs: Any, output: Any) -> None:
        layer.to("cpu")

    t5.encoder.embed_tokens.to(device), t5.encoder.final_layer_norm.to(device)
    for layer in t5.encoder.block:
        layer.register_forward_pre_hook(there)
        layer.register_forward_hook(back)


def open_transformer(location: Location) -> Weights:
    """A model's transformer, by its headers."""
    return open_flux(location.transformer, location.folder / "transformer" / "config.json")


def check_parts(
    folder: Path, flux: FluxConfig, clip_tokenizer: PreTrainedTokenizerBase, t5_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError if the parts of a folder are not of one model, by their configurations and vocabularies."""
    latents = parse_file(folder / "vae", lambda part: AutoencoderKL.load_config(part)["latent_channels"])
    clip = parse_file(folder / "text_encoder", CLIPTextConfig.from_pretrained)
    t5 = parse_file(folder / "text_encoder_2", T5Config.from_pretrained)
    outputs = latents * PATCH**2, clip.hidden_size, t5.d_model
    inputs = flux.in_channels, flux.vec_in_dim, flux.context_in_dim
    if outputs != inputs:
        raise ValueError(f"{folder} mixes models: vae, CLIP and T5 give {outputs} channels, Flux takes {inputs}")
    check_tokenizer(folder / "tokenizer", clip_tokenizer, "CLIP", clip.vocab_size)
    check_tokenizer(folder / "tokenizer_2", t5_tokenizer, "T5", t5.vocab_size)


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str, known: int) -> None:
    """Raise ValueError for a tokenizer other than CLIP's or T5's, as `kind` says, or with more tokens than are known.

    Of another's ids some are beyond the encoder's table, an error once all weights are read, or all mean other words.
    """
    found, size = ENDS.get(str(tokenizer.eos_token), type(tokenizer).__name__), len(tokenizer)
    if found != kind:
        raise ValueError(
            f"{folder} holds a tokenizer of {found}, with {size} tokens, where {kind}'s belongs: {OWN} {folder.name}/"
        )
    if not len(set(tokenizer.all_special_ids)) < size <= known:  # transformers makes an empty one up where it has none
        raise ValueError(f"{folder} holds {size} tokens, and its text encoder knows {known}: {OWN} {folder.name}/")


def parse_schedule(file: Path) -> dict[str, Any]:
    """scheduler_config.json with its defaults. Raises ValueError for an entry that `sigmas` would ignore."""
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FlowMatchEulerDiscreteScheduler().config}
    schedule = plain | json.loads(file.read_text())
    if other := {k: schedule[k] for k in plain if k not in SHIFTS and schedule[k] != plain[k]}:
        raise ValueError(f"only FLUX's own schedule is implemented, not {other}")
    return schedule


def parse_model(kind: type, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of safetensors only; where the libraries invent missing tensors, a ValueError."""
    options |= dict(use_safetensors=True, local_files_only=True, output_loading_info=True)
    model, info = kind.from_pretrained(folder, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors of {kind.__name__} are missing, such as {missing[0]}")
    return model


def load_parts(model, flux, device, dtype, text_length, offload=False):
    folder = model.location.folder
    vae = parse_file(folder / "vae", partial(parse_model, AutoencoderKL)).float()
    clip = parse_file(folder / "text_encoder", partial(parse_model, CLIPTextModel, dtype=dtype))
    t5 = parse_file(folder / "text_encoder_2", partial(parse_model, T5EncoderModel, dtype=dtype))
    vae, clip, t5 = (part.eval().requires_grad_(False) for part in (vae, clip, t5))
    vae.to(device), clip.to(device)
    if offload:
        lend_layers(t5, device)
    else:
        t5.to(device)
    return Pipeline(model.location, flux, vae, clip, t5, *model.tokenizers, model.schedule, text_length, dtype)
