"""What is frozen around the transformer: text encoders, VAE, packing, the sigma schedule, checkpoint folders.

A checkpoint is a folder in the diffusers layout of FLUX.1-dev:

    model_index.json  scheduler/  transformer/  vae/
    text_encoder/  tokenizer/        CLIP: one pooled vector a prompt
    text_encoder_2/  tokenizer_2/    T5: a sequence of embeddings a prompt, padded, without a mask

The tiny model in shapes/tiny-flux and the real FLUX.1-dev go through the same lines.

Legend: b images, h w pixels, n = (h/16)(w/16) image tokens of c = 64 channels (32 in the tiny model), m text tokens.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from leaps import rollout
from model import (
    Flux,
    FluxConfig,
    config_from_diffusers,
    config_to_diffusers,
    from_diffusers,
    load_weights,
    to_diffusers,
)

PARTS = ("scheduler", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PATCH = 2  # FLUX sees 2x2 patches of latents


class Text(NamedTuple):
    """A batch of encoded prompts."""

    txt: Tensor  # T5, (b, m, context_in_dim)
    vec: Tensor  # CLIP, pooled, (b, vec_in_dim)


@dataclass
class Pipeline:
    """The loaded parts of a checkpoint folder. Everything but `flux` is frozen."""

    folder: Path
    flux: Flux
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: Callable
    t5_tokenizer: Callable
    schedule: dict  # scheduler_config.json
    text_length: int  # T5 tokens a prompt is padded or cut to

    @property
    def cell(self) -> int:
        """Pixels a token spans each way: 16 for FLUX."""
        return PATCH * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        return self.flux.img_in.weight.device


# ---------------------------------------------------------------------------------------- folders


def find(name: str | Path) -> Path:
    """The checkpoint folder called `name`: a path, or else a hub id such as black-forest-labs/FLUX.1-dev.

    Raises ValueError naming what is missing.
    """
    folder = Path(name)
    if not folder.exists():
        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise ValueError(f"no checkpoint folder at {name!r} (and that is no hub id of the form owner/name)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["model_index.json", *(f"{p}/*" for p in PARTS)]))
        except Exception as error:
            raise ValueError(f"no checkpoint folder at {name!r}, and as a hub id it failed: {error}") from error
    if missing := [p for p in ("model_index.json", *PARTS) if not (folder / p).exists()]:
        raise ValueError(f"checkpoint folder {folder} is incomplete: no {', '.join(missing)}")
    return folder


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load a checkpoint folder. `dtype` is that of the transformer and the text encoders; the VAE stays fp32.

    Raises ValueError for a folder, file or tensor that is missing or does not fit.
    """
    folder = find(name)
    clip_tokenizer, t5_tokenizer = (AutoTokenizer.from_pretrained(folder / t) for t in ("tokenizer", "tokenizer_2"))
    frozen = [
        read_part(AutoencoderKL, folder / "vae", torch.float32),
        read_part(CLIPTextModel, folder / "text_encoder", dtype),
        read_part(T5EncoderModel, folder / "text_encoder_2", dtype),
    ]
    vae, clip, t5 = (part.eval().requires_grad_(False).to(device) for part in frozen)
    flux = load_flux(folder / "transformer", device, dtype)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return Pipeline(folder, flux, vae, clip, t5, clip_tokenizer, t5_tokenizer, schedule, t5_tokenizer.model_max_length)


def read_part(kind: type, folder: Path, dtype: torch.dtype):
    """`kind.from_pretrained(folder)` from safetensors only; a ValueError that names the folder if it cannot."""
    try:
        return kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read {kind.__name__} from {folder}: {error}") from error


def load_flux(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Flux:
    """The transformer from a diffusers `transformer/` folder, sharded or not."""
    config = config_from_diffusers(json.loads((path / "config.json").read_text()))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {path}")
    state = {}
    for file in files:
        try:
            state |= {k: v.to(dtype) for k, v in load_file(file, device=str(device)).items()}
        except Exception as error:  # safetensors raises its own type for a cut or foreign file
            raise ValueError(f"cannot read {file}: {error}") from error
    with torch.device("meta"):
        flux = Flux(config)
    load_weights(flux, from_diffusers(state, config), source=str(path))
    return flux


def save(folder: Path, source: Path, config: FluxConfig, state: dict[str, Tensor]) -> None:
    """Write a checkpoint folder: the frozen parts copied from `source`, the transformer from `state` (BFL names)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if part != "transformer":
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    save_flux(folder / "transformer", config, state)


def save_flux(folder: Path, config: FluxConfig, state: dict[str, Tensor]) -> None:
    """Write a diffusers `transformer/` folder from a state dict with BFL names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(config), indent=2) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in to_diffusers(state, config).items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------- text and images


@torch.no_grad()
def encode(pipe: Pipeline, prompts: Sequence[str]) -> Text:
    """Prompts to T5 and pooled CLIP embeddings, as FluxPipeline.encode_prompt: T5 padded and unmasked."""

    def tokens(tokenizer, length):
        return tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(pipe.device)

    txt = pipe.t5(tokens(pipe.t5_tokenizer, pipe.text_length))[0]
    vec = pipe.clip(tokens(pipe.clip_tokenizer, pipe.clip_tokenizer.model_max_length)).pooler_output
    return Text(txt, vec)


def decode(pipe: Pipeline, x: Tensor, height: int, width: int) -> Tensor:
    """Packed latents (b, n, c) to images in [0, 1], (b, 3, height, width); differentiable, in fp32.

    The clamp cuts the gradient where a pixel is already as bright or dark as a picture can show.
    """
    z = unpack(x, height // pipe.cell, width // pipe.cell).to(pipe.vae.dtype)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)


def pack(z: Tensor) -> Tensor:
    """Latents to tokens: one token a 2x2 patch, channel-major within it."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens to latents: the inverse of `pack`."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


# --------------------------------------------------------------------------------------- sampling


def grid(pipe: Pipeline, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens in an image. Raises ValueError for a size that is not whole tokens."""
    if height <= 0 or width <= 0 or height % pipe.cell or width % pipe.cell:
        raise ValueError(f"image size {height}x{width} is not a positive multiple of {pipe.cell}")
    return height // pipe.cell, width // pipe.cell


def draw_noise(pipe: Pipeline, seeds: Sequence[int], rows: int, columns: int) -> Tensor:
    """x_1, one generator an image, always on the CPU: a seed means the same picture in any batch, on any device."""
    channels = pipe.flux.config.in_channels
    noise = [torch.randn(rows * columns, channels, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise).to(pipe.device)


def sigmas(schedule: dict, steps: int, tokens: int) -> Tensor:
    """Noise levels from 1 to 0, (steps + 1,): FLUX's schedule, shifted towards noise as images grow.

    sigma' = e^mu / (e^mu + 1/sigma - 1), mu linear in the number of image tokens; a fixed shift where the
    scheduler's config says so.
    """
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if schedule["use_dynamic_shifting"]:
        low, high = schedule["base_image_seq_len"], schedule["max_image_seq_len"]
        slope = (schedule["max_shift"] - schedule["base_shift"]) / (high - low)
        shift = math.exp(schedule["base_shift"] + slope * (tokens - low))
    else:
        shift = schedule["shift"]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)  # the formula above, multiplied through by sigma
    return torch.cat([sigma, sigma.new_zeros(1)]).float()


def velocity_of(
    flux: Flux, text: Text, rows: int, columns: int, guidance: float | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """v_theta(x, sigma) for fixed prompts: the network in its own precision, latents in theirs."""
    dtype, device = flux.img_in.weight.dtype, flux.img_in.weight.device
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(device)
    txt_ids = torch.zeros(text.txt.shape[1], 3, dtype=torch.long, device=device)
    txt, vec = text.txt.to(dtype), text.vec.to(dtype)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(len(x))
        g = torch.full_like(t, guidance) if flux.config.guidance_embed else None
        return flux(x.to(dtype), img_ids, txt, txt_ids, t, vec, g).to(x.dtype)

    return velocity


@torch.no_grad()
def sample(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    height: int,
    width: int,
    guidance: float | None = None,
    batch: int = 64,
) -> Tensor:
    """Images in [0, 1] on the CPU, (len(prompts), 3, height, width), one a prompt and seed."""
    rows, columns = grid(pipe, height, width)
    levels = sigmas(pipe.schedule, steps, rows * columns).to(pipe.device)
    images = []
    for i in range(0, len(prompts), batch):
        velocity = velocity_of(pipe.flux, encode(pipe, prompts[i : i + batch]), rows, columns, guidance)
        x = rollout(velocity, draw_noise(pipe, seeds[i : i + batch], rows, columns), levels).x[-1]
        images.append(decode(pipe, x, height, width).cpu())
    return torch.cat(images)
