"""From prompts and noise to pictures, as FLUX draws them: encode, schedule, velocity, sample, decode; and the command.

    python sample.py --model runs/leapalign-seed0/final --prompt "a photo of two circles" --picture grid.png

Legend: b images, h w pixels, n = (h/16)(w/16) image tokens of c channels, m text tokens.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import sides
from formats.folders import PATCH, Pipeline, load_pipeline
from formats.sampling import draw_as_trained
from infra.distributed import device_of
from infra.files import check_writable
from infra.flags import check_ranges, flags
from infra.pictures import contact_sheet
from infra.prompts import printable, read_prompts
from leaps import Velocity, rollout
from model import Flux

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------- encode


class Reader(NamedTuple):
    """Who reads prompts, and how much of them."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    limit: int  # tokens


class Text(NamedTuple):
    """A batch of encoded prompts."""

    txt: Tensor  # T5, (b, m, context_in_dim)
    vec: Tensor  # CLIP, pooled, (b, vec_in_dim)


@torch.no_grad()
def encode(pipe: Pipeline, prompts: Sequence[str]) -> Text:
    """Prompts to the two things that FLUX reads of them: T5's embedding of every token, CLIP's of the whole prompt."""
    t5_ids = padded_ids(pipe.t5_tokenizer, prompts, pipe.text_length)
    clip_ids = padded_ids(pipe.clip_tokenizer, prompts, clip_length(pipe))
    # Neither T5 nor FLUX gets a mask over the padding: FLUX was trained without one, so its image tokens attend to the
    # padding, too, and a mask would change every picture. For the same reason --text-length changes pictures.
    txt = pipe.t5(t5_ids.to(pipe.device))[0]  # (b, m, context_in_dim)
    vec = pipe.clip(clip_ids.to(pipe.device)).pooler_output  # (b, vec_in_dim)
    return Text(txt, vec)


def padded_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids of prompts, padded or truncated to (b, length)."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids


def clip_length(pipe: Pipeline) -> int:
    """Tokens that CLIP reads of a prompt: 77 for FLUX."""
    # The tokenizer's own limit may be 1e30, which stands for none.
    return min(pipe.clip_tokenizer.model_max_length, pipe.clip.config.max_position_embeddings)


# ----------------------------------------------------------------------------------------- schedule


def token_grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens in an image. Raises ValueError for a size that is not whole tokens.

    `pipe` is a Pipeline or a Description: anything with a `cell`, the pixels that a token spans each way.
    """
    is_whole = height % pipe.cell == 0 and width % pipe.cell == 0
    if height <= 0 or width <= 0 or not is_whole:
        raise ValueError(f"image size {height}x{width} is not a positive multiple of {pipe.cell}")
    return height // pipe.cell, width // pipe.cell


def sigmas(schedule: dict, steps: int, tokens: int) -> Tensor:
    """Noise levels of an image of so many tokens, from 1 to 0, (steps + 1,).

    `schedule` is scheduler_config.json: with "use_dynamic_shifting", FLUX.1-dev's, the shift depends on the image's
    size; without it, FLUX.1-schnell's, the shift is fixed.
    """
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    # Neighbouring pixels show nearly the same, so at one level of noise a large image is more legible than a small one
    # (Stable Diffusion 3, section 5.3.2). The shift gives a larger image more of its steps at high levels.
    if schedule["use_dynamic_shifting"]:
        # mu is a straight line through (256 tokens, 0.5) and (4096 tokens, 1.15).
        low = schedule["base_image_seq_len"]
        high = schedule["max_image_seq_len"]
        slope = (schedule["max_shift"] - schedule["base_shift"]) / (high - low)
        mu = schedule["base_shift"] + slope * (tokens - low)
        shift = math.exp(mu)
    else:
        shift = schedule["shift"]
    # FLUX's e^mu / (e^mu + 1/sigma - 1), with numerator and denominator multiplied by sigma.
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    zero = sigma.new_zeros(1)
    return torch.cat([sigma, zero]).float()


# ----------------------------------------------------------------------------------------- velocity


def velocity_of(
    flux: Flux,
    text: Text,
    rows: int,
    columns: int,
    guidance: float | None = None,
    dtype: torch.dtype | None = None,
) -> Velocity:
    """v_theta(x, sigma) for fixed prompts and image size; x is (b, n, c), sigma () or (b,).

    `dtype` is what the network computes in, by default that of its weights. With FSDP the two differ: a bf16 network
    has fp32 master weights.
    """
    device = flux.img_in.weight.device
    # What does not depend on x and sigma is made once, not at each of the steps.
    dtype = dtype or flux.img_in.weight.dtype
    # Rotary positions: (0, row, column) of an image token, (0, 0, 0) of every text token. They are integers because
    # a cast of all inputs to bf16 would move positions above 256.
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    img_ids = rearrange(positions, "h w three -> (h w) three").to(device)
    txt_ids = torch.zeros(text.txt.shape[1], 3, dtype=torch.long, device=device)
    txt = text.txt.to(dtype)
    vec = text.vec.to(dtype)
    # FLUX.1-dev was distilled with guidance, a number that it reads. FLUX.1-schnell reads none.
    if not flux.config.guidance_embed:
        guidance = None

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        # Time and guidance stay fp32: FLUX takes cosines of 1000 t, of which bf16 would lose whole turns.
        t = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(len(x))
        g = None
        if guidance is not None:
            g = torch.full_like(t, guidance)
        v = flux(x.to(dtype), img_ids, txt, txt_ids, t, vec, g)
        # Latents stay fp32 between calls: an Euler step adds a small change, most of which bf16 would round away.
        return v.to(x.dtype)

    return velocity


# ------------------------------------------------------------------------------------------- sample


def draw_noise(pipe: Pipeline, seeds: Sequence[int], rows: int, columns: int) -> Tensor:
    """x_1 of images, (b, n, c), one per seed: the noise that FluxPipeline draws from a CPU generator with that seed."""
    channels = pipe.flux.config.in_channels // PATCH**2
    shape = (channels, rows * PATCH, columns * PATCH)
    noise = []
    for seed in seeds:
        # One generator per image, so that a seed gives the same picture in a batch of any size, on any number of ranks.
        # On the CPU, because a GPU's generator draws other numbers.
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(shape, generator=generator))
    # Packed after it was drawn, as in FluxPipeline: noise drawn as tokens would be in another order.
    return pack(torch.stack(noise)).to(pipe.device)


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
    # The VAE takes 3 kB of memory a pixel, so it decodes a million pixels at a time.
    decode_batch = max(1, 2**20 // (height * width))
    images = []
    for i in range(0, len(prompts), batch):
        text = encode(pipe, prompts[i : i + batch])
        velocity = velocity_of(pipe.flux, text, rows, columns, guidance, pipe.compute)
        noise = draw_noise(pipe, seeds[i : i + batch], rows, columns)
        # The same Euler steps as in training. The last state is the clean latent.
        x_0 = rollout(velocity, noise, levels).x[-1]
        for latents in x_0.split(decode_batch):
            images.append(decode(pipe, latents, height, width).cpu())
    return torch.cat(images)


# ------------------------------------------------------------------------------------------- decode


def decode(pipe: Pipeline, x: Tensor, height: int, width: int) -> Tensor:
    """Packed latents (b, n, c) to images in [0, 1], (b, 3, height, width); differentiable, in fp32."""
    z = unpack(x, height // pipe.cell, width // pipe.cell)
    z = z.to(pipe.vae.dtype)
    # FLUX's latents are the VAE's, shifted and scaled to about mean 0 and variance 1.
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = pipe.vae.decode(z).sample.to(x.dtype)  # the VAE may be bf16; rewards see fp32
    # The VAE's range is [-1, 1], and it overshoots. The clamp stops the gradient of a reward there: no picture can be
    # whiter than white.
    return (images / 2 + 0.5).clamp(0, 1)


def pack(z: Tensor) -> Tensor:
    """Latents to tokens: one token a 2x2 patch, channel-major within it."""
    return rearrange(z, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens to latents: the inverse of `pack`."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


# -------------------------------------------------------------------------------------- the command


@flags
class DrawFlags:
    """Flags that sample.py and evaluate.py share: the model, and how and where it draws."""

    model: str = str(HERE / "shapes" / "tiny-flux")
    """Model folder in the diffusers layout of FLUX, or a hub id; or a LoRA, a folder or .safetensors file; or a file of
    the transformer alone, as flux1-dev.safetensors, ComfyUI's too."""
    base: str | None = None
    """Model folder or hub id that a LoRA or tuned weights were trained from; our LoRAs name their own. A transformer's
    file takes all else from it."""
    strength: float = 1.0
    """How much of the tuning to apply: 1 is all of it, 0 the base. Of a LoRA, or with --base of tuned weights."""
    num: int = 4
    """Images per prompt."""
    guidance: float | None = None
    """Guidance scale, for models that were distilled with guidance; others ignore it. Default: that of the model's
    training, or 3.5."""
    text_length: int | None = None
    """T5 tokens a prompt is padded or truncated to. Default: those of the model's training, or the tokenizer's own, 512
    for FLUX.1-dev."""
    batch: int = 8
    """Images at a time: fewer need less memory, the pictures stay the same."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, mps, cuda, or one of several GPUs, cuda:1."""
    bf16: bool = False
    """Run the transformer and the text encoders in bfloat16, as FLUX.1-dev was published."""


@flags
class SampleFlags(DrawFlags):
    """Write a captioned grid of images."""

    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """A file of prompts, one per line, or JSON, used beside --prompt."""
    picture: Annotated[Path, tyro.conf.arg(aliases=("--out",))] = Path("grid.png")
    """The picture to write."""
    rollout_steps: Annotated[int | None, tyro.conf.arg(aliases=("--steps",))] = None
    """Euler steps. Default: those of the model's training, or 25."""
    size: str | None = None
    """Pixels: one number for a square, or HEIGHTxWIDTH. Default: that of the model's training, or the VAE's own."""
    seed: int = 0
    """The n-th image of every prompt starts from the noise of seed + n, so the images of a column can be compared."""


def main() -> None:
    cfg = tyro.cli(SampleFlags)
    try:
        draw_picture(cfg)
    except (ValueError, OSError) as error:
        # What a user can mend is one line, without a traceback.
        print(printable(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def draw_picture(cfg: SampleFlags) -> None:
    """Write the grid: a row a prompt. Raises ValueError naming the flag at fault."""
    prompts = list(cfg.prompt)
    if cfg.prompts:
        prompts += read_prompts(cfg.prompts)
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "..." or --prompts FILE')
    cfg = draw_as_trained(cfg, (cfg.model,), dict(rollout_steps=25, guidance=3.5))
    check_ranges(cfg)
    if cfg.picture.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--picture {cfg.picture}: give a picture's name, such as {cfg.picture.with_suffix('.png')}")
    check_writable(f"--picture {cfg.picture}", cfg.picture.parent)
    # A size that is misspelt is found now, not after minutes of reading weights.
    size = sides(cfg.size) if cfg.size else None
    device = device_of(cfg.device)
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    pipe = load_pipeline(cfg.model, device, dtype, cfg.text_length, base=cfg.base, strength=cfg.strength)
    height, width = size or sides(str(pipe.vae.config.sample_size))
    warning = truncation_warning(pipe, prompts)
    if warning:
        print(warning, file=sys.stderr)

    captions, seeds = [], []
    for prompt in prompts:
        captions += [prompt] * cfg.num
        # Seeds begin anew at each prompt.
        seeds += range(cfg.seed, cfg.seed + cfg.num)
    images = sample(pipe, captions, seeds, cfg.rollout_steps, height, width, cfg.guidance, cfg.batch)
    side = max(128, min(width, 512))  # at least the room for a caption
    contact_sheet(images, captions, cfg.picture, columns=cfg.num, side=side)
    print(f"wrote {cfg.picture}: {len(images)} images of {height}x{width}")


def truncation_warning(pipe: Pipeline, prompts: Sequence[str], readers: Sequence[Reader] = ()) -> str | None:
    """A warning if some prompts are longer than an encoder or a reward of `readers` reads, with the numbers; else None.

    Of a list of more than 10,000 prompts some are looked at: to tokenize all takes minutes.
    """
    encoders = [
        Reader("T5 (--text-length)", pipe.t5_tokenizer, pipe.text_length),
        Reader("CLIP", pipe.clip_tokenizer, clip_length(pipe)),
    ]
    examples = list(prompts[:: math.ceil(len(prompts) / 10_000)])
    notes = []
    for name, tokenizer, limit in (*encoders, *readers):
        lengths = list(map(len, tokenizer(examples, verbose=False).input_ids))
        too_long = sum(length > limit for length in lengths)
        if too_long:
            notes.append(f"{name} reads {limit} tokens, {too_long} of {len(examples)} have more, up to {max(lengths)}")
    if not notes:
        return None
    return f"warning: prompts are truncated: {'; '.join(notes)}"


if __name__ == "__main__":
    main()
