"""Model folders in the diffusers layout of FLUX.1-dev, which the tiny model's is too: read and checked.

    model_index.json  scheduler/  transformer/  vae/
    text_encoder/  tokenizer/        CLIP
    text_encoder_2/  tokenizer_2/    T5

Weights come from safetensors only.  No rank need ever hold a large transformer whole: its tensors are read as they are
placed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils import logging

from infra.files import recover
from infra.lora import FILE, NOTE
from infra.lora_files import Change, lora_file, merge_lora, read_lora
from infra.names import check_state, config_from_diffusers, from_diffusers, load_weights
from model import FLUX_DEV, Flux, FluxConfig

PATCH = 2  # FLUX sees 2x2 patches of latents
PARTS = ("scheduler", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a transformer in one piece; others have an index
INDEX = f"{WEIGHTS}.index.json"
SHIFTS = {"use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
Device = str | torch.device
Tensors = Iterator[tuple[str, Tensor]]
Name, Result = TypeVar("Name"), TypeVar("Result")


@dataclass
class Pipeline:
    """The loaded parts of a model folder. Everything but `flux` is frozen."""

    folder: Path
    flux: Flux
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: PreTrainedTokenizerBase
    t5_tokenizer: PreTrainedTokenizerBase
    schedule: dict[str, Any]  # scheduler_config.json
    text_length: int  # T5 tokens a prompt is padded or cut to
    compute: torch.dtype  # of the transformer, whatever its weights are kept in
    offload: bool = False  # text encoders on the CPU but while they encode

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
    """What a model folder says of itself in its small files."""

    config: FluxConfig
    schedule: dict[str, Any]  # scheduler_config.json
    cell: int  # pixels a token spans each way


def describe(name: str | Path, base: str | None = None) -> Description:
    """Read the small files of a model folder or hub id, so that flags can be checked before weights are read."""
    folder = find(name, base)
    blocks = read(folder / "vae" / "config.json", lambda file: json.loads(file.read_text())["block_out_channels"])
    return Description(
        read(folder / "transformer" / "config.json", parse_config),
        read(folder / "scheduler" / "scheduler_config.json", parse_schedule),
        cell_of(blocks),
    )


def find(name: str | Path, base: str | None = None) -> Path:
    """The model folder at path `name`, of that hub id, or under that LoRA. Raises ValueError naming what is missing.

    A LoRA lies over `base`, --base, or over the one that its NOTE names.
    """
    folder, files = Path(name), ["model_index.json", *(f"{part}/*" for part in PARTS)]
    recover(folder)
    if file := lora_file(name):
        if base:
            if lora_file(base):
                raise ValueError(f"--base {base} is a LoRA too: give the whole model that {name} was trained on")
            return find(base)
        if not (folder / NOTE).exists():
            raise ValueError(f"{name} is a LoRA that does not say what it changes: give --base FOLDER")
        noted = folder / read(folder / NOTE, lambda note: json.loads(note.read_text())["base"])  # perhaps absolute
        if not noted.exists() or not file.exists():
            raise ValueError(f"LoRA {folder}: it needs its {FILE}, and its base at {noted}, as {folder / NOTE} says")
        folder = noted
    if not folder.exists():
        # Where the parent exists, this is a path misspelt: only what can be nothing else goes to the network.
        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")) or folder.parent.is_dir():
            raise ValueError(f"no model folder at {str(name)!r}: give a folder, or a hub id owner/name")
        folder = Path(read(str(name), partial(snapshot_download, allow_patterns=files)))
    if missing := [part for part in ("model_index.json", *PARTS) if not (folder / part).exists()]:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise ValueError(f"{folder} is no whole FLUX folder: it lacks {', '.join(missing)}; it holds {found}")
    return folder


def load(
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
    the text encoders on the CPU, and `place` says where the transformer goes: see `load_flux`.
    `base` is the folder that a LoRA lies over, and `strength` multiplies what it changes; of a whole folder,
    its difference to the base.
    Raises ValueError for a folder, file or tensor that is missing or does not fit.
    """
    logging.disable_progress_bar()  # transformers shows one for each tiny part
    folder, file = find(name, base), lora_file(name)
    lora = read_lora_of(file, folder) if file else None
    if strength != 1 and not file and not base:
        raise ValueError(
            f"--strength {strength} needs --base FOLDER: {name} is no LoRA, and what it changed is unknown"
        )
    origin = find(base) / "transformer" if base and not file and strength != 1 else None
    schedule = read(folder / "scheduler" / "scheduler_config.json", parse_schedule)
    tokenize = partial(AutoTokenizer.from_pretrained, local_files_only=True)
    tokenizers = read(folder / "tokenizer", tokenize), read(folder / "tokenizer_2", tokenize)
    vae = read(folder / "vae", partial(parse_model, AutoencoderKL)).float()
    clip = read(folder / "text_encoder", partial(parse_model, CLIPTextModel, dtype=dtype))
    t5 = read(folder / "text_encoder_2", partial(parse_model, T5EncoderModel, dtype=dtype))
    vae, clip, t5 = (part.eval().requires_grad_(False) for part in (vae, clip, t5))
    flux = load_flux(folder / "transformer", device, dtype, place, lora, strength, origin)
    outputs = vae.config.latent_channels * PATCH**2, clip.config.hidden_size, t5.config.d_model
    inputs = flux.config.in_channels, flux.config.vec_in_dim, flux.config.context_in_dim
    if outputs != inputs:
        raise ValueError(f"{folder} mixes models: vae, CLIP and T5 give {outputs} channels, Flux takes {inputs}")
    text_length = text_length or min(tokenizers[1].model_max_length, 512)  # of a T5 without limit, 1e30
    vae.to(device)
    if not offload:
        clip.to(device), t5.to(device)
    return Pipeline(folder, flux, vae, clip, t5, *tokenizers, schedule, text_length, dtype, offload)


def read_lora_of(file: Path, folder: Path) -> dict[str, list[Change]]:
    """What a LoRA file changes in the transformer of a model folder."""
    config = read(folder / "transformer" / "config.json", parse_config)
    return read(file, partial(read_lora, config=config))


def load_flux(
    path: Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    place: Callable[[Flux, Tensors], None] | None = None,
    lora: dict[str, list[Change]] | None = None,
    strength: float = 1.0,
    origin: Path | None = None,
) -> Flux:
    """The transformer from a diffusers `transformer/` folder, sharded or not, or from flux1-dev.safetensors.

    `place(flux, tensors)` is for models that no rank holds whole: it gets a Flux without memory and an iterator over
    names and tensors, which are read from disk as they are asked for.
    `strength` times `lora` is added to them; with `origin`, the transformer that this one was tuned from, they are
    origin + strength (tuned - origin).
    Raises ValueError naming the folder or file and what is missing or does not fit.
    """
    config, state, tensors = open_flux(path)
    if lora:
        tensors = merge_lora(tensors, lora, strength)
    if origin:
        before, _, tensors_before = open_flux(origin)
        if before != config:
            raise ValueError(f"--strength between different networks: {path} was not tuned from {origin}")
        tensors = between(tensors_before, tensors, strength)
    with torch.device("meta"):
        flux = Flux(config)
    if place is None:
        load_weights(flux, {name: tensor.to(dtype) for name, tensor in tensors}, source=str(path))
        return flux.to(device)  # names were converted on the CPU: a GPU holds the weights once
    if path.is_file():
        check_state(state, flux.state_dict(), source=str(path))
    place(flux, tensors)
    return flux


def between(first: Tensors, second: Tensors, strength: float) -> Tensors:
    """first + strength (second - first), in fp32, of two networks' tensors by our names, in the same order."""
    for (name, a), (other, b) in zip(first, second, strict=True):
        assert name == other
        yield name, torch.lerp(a.float(), b.float(), strength)


def open_flux(path: Path) -> tuple[FluxConfig, dict[str, Tensor], Tensors]:
    """A transformer's configuration, its tensors as its files name them, mapped, and an iterator by our names."""
    if path.is_file():
        state = read(path, load_file)
        config = replace(FLUX_DEV, guidance_embed="guidance_in.in_layer.weight" in state)
        tensors: Tensors = iter(state.items())
    else:
        config = read(path / "config.json", parse_config)
        shards, index = [WEIGHTS], path / INDEX
        if index.exists():
            shards = read(index, lambda file: sorted(set(json.loads(file.read_text())["weight_map"].values())))
        if missing := [name for name in shards if not (path / name).exists()]:
            raise ValueError(f"{path} is incomplete: copy or download {', '.join(missing)}")
        state = {k: v for name in shards for k, v in read(path / name, load_file).items()}  # mapped, not read
        tensors = from_diffusers(state, config, source=str(path))
    return config, state, tensors


def read(what: Name, parse: Callable[[Name], Result]) -> Result:
    """parse(what); all that can go wrong becomes a ValueError that names it, and libraries differ in what."""
    try:
        return parse(what)
    except Exception as error:
        raise ValueError(
            f"cannot read {what} ({type(error).__name__}: {error}); get a whole FLUX checkpoint"
        ) from error


def parse_config(file: Path) -> FluxConfig:
    return config_from_diffusers(json.loads(file.read_text()))


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
