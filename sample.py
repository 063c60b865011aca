"""From prompts and noise to pictures: encode, sample, decode; and the command that does it.

    python sample.py --model runs/leapalign-seed0/final --prompt "a photo of two circles" --out grid.png

Of a prompt the transformer sees CLIP's pooled vector, and T5's sequence of embeddings, padded, without a mask.

Legend: b images, h w pixels, n = (h/16)(w/16) image tokens of c channels, m text tokens.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import sides
from formats.folders import PATCH, Pipeline, load_pipeline
from infra.distributed import device_of
from infra.files import check_writable
from infra.pictures import contact_sheet
from infra.prompts import read_prompts
from leaps import Velocity, rollout
from model import Flux

HERE = Path(__file__).parent


class Text(NamedTuple):
    """A batch of encoded prompts."""

    txt: Tensor  # T5, (b, m, context_in_dim)
    vec: Tensor  # CLIP, pooled, (b, vec_in_dim)


# --------------------------------------------------------------------------------- text and images


@torch.no_grad()
def encode(pipe: Pipeline, prompts: Sequence[str]) -> Text:
    """Prompts to T5 and pooled CLIP embeddings, as FluxPipeline.encode_prompt: T5 padded and unmasked."""

    def tokens(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
        pad = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokenizer(list(prompts), **pad).input_ids.to(pipe.device)

    txt = pipe.t5(tokens(pipe.t5_tokenizer, pipe.text_length))[0]
    vec = pipe.clip(tokens(pipe.clip_tokenizer, clip_length(pipe))).pooler_output
    return Text(txt, vec)


def clip_length(pipe: Pipeline) -> int:
    """Tokens that CLIP reads of a prompt, 77 for FLUX."""
    return min(pipe.clip_tokenizer.model_max_length, pipe.clip.config.max_position_embeddings)


def truncation_warning(pipe: Pipeline, prompts: Sequence[str]) -> str | None:
    """A warning with the numbers if `encode` cuts some of the prompts, else None."""
    cut = []
    lengths = {
        "T5 (--text-length)": (pipe.t5_tokenizer, pipe.text_length),
        "CLIP": (pipe.clip_tokenizer, clip_length(pipe)),
    }
    for name, (tokenizer, most) in lengths.items():
        parts = (prompts[i : i + 4096] for i in range(0, len(prompts), 4096))  # a long list at once takes gigabytes
        found = [len(ids) for part in parts for ids in tokenizer(list(part), verbose=False).input_ids]
        if longer := sum(length > most for length in found):
            cut.append(f"{name} reads {most} tokens, {longer} of {len(prompts)} have more, up to {max(found)}")
    return f"warning: prompts are cut: {'; '.join(cut)}" if cut else None


def decode(pipe: Pipeline, x: Tensor, height: int, width: int) -> Tensor:
    """Packed latents (b, n, c) to images in [0, 1], (b, 3, height, width); differentiable, in fp32."""
    z = unpack(x, height // pipe.cell, width // pipe.cell).to(pipe.vae.dtype)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)  # no gradient past black and white


def pack(z: Tensor) -> Tensor:
    """Latents to tokens: one token a 2x2 patch, channel-major within it."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens to latents: the inverse of `pack`."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


# --------------------------------------------------------------------------------------- sampling


def token_grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens in an image. Raises ValueError for a size that is not whole tokens.

    `pipe` is a Pipeline, or a Description of one: what has a `cell`.
    """
    if height <= 0 or width <= 0 or height % pipe.cell or width % pipe.cell:
        raise ValueError(f"image size {height}x{width} is not a positive multiple of {pipe.cell}")
    return height // pipe.cell, width // pipe.cell


def draw_noise(pipe: Pipeline, seeds: Sequence[int], rows: int, columns: int) -> Tensor:
    """x_1, a CPU generator an image: a seed means the same picture in any batch, on any device.

    It is what FluxPipeline in fp32 draws from a CPU generator of that seed, so that pictures can be compared.
    """
    shape = (pipe.flux.config.in_channels // PATCH**2, rows * PATCH, columns * PATCH)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return pack(torch.stack(noise)).to(pipe.device)


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
    flux: Flux,
    text: Text,
    rows: int,
    columns: int,
    guidance: float | None = None,
    dtype: torch.dtype | None = None,
) -> Velocity:
    """v_theta(x, sigma) for fixed prompts: latents in their own precision, the network in `dtype`.

    `dtype` is that of its weights unless they are kept in another, as FSDP's fp32 masters of a bf16 network.
    """
    dtype, device = dtype or flux.img_in.weight.dtype, flux.img_in.weight.device
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(device)
    txt_ids = torch.zeros(text.txt.shape[1], 3, dtype=torch.long, device=device)
    txt, vec = text.txt.to(dtype), text.vec.to(dtype)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(len(x))
        g = None if guidance is None or not flux.config.guidance_embed else torch.full_like(t, guidance)
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
    """Images in [0, 1] on the CPU, (len(prompts), 3, height, width), one per prompt and seed."""
    rows, columns = token_grid(pipe, height, width)
    levels = sigmas(pipe.schedule, steps, rows * columns).to(pipe.device)
    images = []
    for i in range(0, len(prompts), batch):
        text = encode(pipe, prompts[i : i + batch])
        velocity = velocity_of(pipe.flux, text, rows, columns, guidance, pipe.compute)
        x = rollout(velocity, draw_noise(pipe, seeds[i : i + batch], rows, columns), levels).x[-1]
        at_once = max(1, 2**20 // (height * width))  # the VAE takes 3 kB a pixel
        images += [decode(pipe, part, height, width).cpu() for part in x.split(at_once)]
    return torch.cat(images)


# ------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Config:
    """Write a captioned grid of images."""

    model: str = str(HERE / "shapes" / "tiny-flux")
    """Model folder in the diffusers layout of FLUX, or a hub id; or a LoRA, a folder or .safetensors file; or a file of
    the transformer alone, as flux1-dev.safetensors, ComfyUI's too."""
    base: str | None = None
    """Model folder or hub id that --model, a LoRA or tuned weights, was trained from; our LoRAs name their own. A
    transformer's file takes all else from it."""
    strength: float = 1.0
    """How much of the tuning to apply: 1 is all of it, 0 the base. Of a LoRA, or with --base of tuned weights."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """A file of prompts, one per line, or JSON, used beside --prompt."""
    out: Path = Path("grid.png")
    """The picture to write."""
    num: int = 4
    """Images per prompt."""
    steps: int = 25
    """Euler steps."""
    guidance: float = 3.5
    """Guidance scale, for models that were distilled with guidance; others ignore it."""
    size: str | None = None
    """Pixels: one number for a square, or HEIGHTxWIDTH; the default is the VAE's own."""
    text_length: int | None = None
    """T5 tokens a prompt is padded or cut to; the default is the tokenizer's own, 512 for FLUX.1-dev."""
    batch: int = 8
    """Images at a time: fewer need less memory, the pictures stay the same."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, mps, cuda, or one of several GPUs, cuda:1."""
    bf16: bool = False
    """Run the transformer and the text encoders in bfloat16, as FLUX.1-dev was published."""
    seed: int = 0
    """The n-th image of every prompt starts from the noise of seed + n, so rows can be compared."""


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    try:
        prompts = [*cfg.prompt, *(read_prompts(cfg.prompts) if cfg.prompts else [])]
        if not prompts:
            raise ValueError('nothing to draw: give --prompt "..." or --prompts FILE')
        if min(cfg.num, cfg.steps, cfg.batch) < 1:
            raise ValueError(f"--num {cfg.num}, --steps {cfg.steps} and --batch {cfg.batch} must be at least 1")
        if cfg.out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--out {cfg.out}: give a picture's name, such as {cfg.out.with_suffix('.png')}")
        check_writable(f"--out {cfg.out}", cfg.out.parent)
        size, device = cfg.size and sides(cfg.size), device_of(cfg.device)
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        pipe = load_pipeline(cfg.model, device, dtype, cfg.text_length, base=cfg.base, strength=cfg.strength)
        height, width = size or sides(str(pipe.vae.config.sample_size))
        token_grid(pipe, height, width)
        if warning := truncation_warning(pipe, prompts):
            print(warning, file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    repeated = [p for p in prompts for _ in range(cfg.num)]
    seeds = [cfg.seed + n for _ in prompts for n in range(cfg.num)]
    images = sample(pipe, repeated, seeds, cfg.steps, height, width, cfg.guidance, cfg.batch)
    contact_sheet(images, repeated, cfg.out, columns=cfg.num, side=max(128, min(width, 512)))
    print(f"wrote {cfg.out}: {len(images)} images of {height}x{width}")


if __name__ == "__main__":
    main()
