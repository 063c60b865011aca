"""From prompts and noise to pictures: encode, velocity, guidance, sample, decode; and the command.

    python sample.py --model runs/leapalign-seed0/final --prompt "a photo of two circles" --picture grid.png

What differs between FLUX.1 and FLUX.2, such as text encoders and noise levels, is in families/.

Legend: b images, h w pixels, n = (h/16)(w/16) image tokens of c channels, m text tokens.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from tyro.conf import DisallowNone

from config import sides
from families import Network, NetworkConfig, family_of
from families.common import Text
from formats.folders import Pipeline, load_pipeline
from formats.sampling import draw_as_trained
from infra.distributed import device_of
from infra.failures import is_out_of_memory
from infra.files import check_writable
from infra.flags import check_ranges, flags
from infra.pictures import contact_sheet
from infra.prompts import printable, read_prompts
from leaps import Velocity, rollout

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------- encode


@torch.no_grad()
def encode(pipe: Pipeline, prompts: Sequence[str]) -> Text:
    """What the network reads of prompts: tensors with a row per prompt."""
    return pipe.family.encode(pipe, prompts)


def token_grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens in an image. Raises ValueError for a size that is not whole tokens.

    `pipe` is a Pipeline or a Description: anything with a `cell`, the pixels that a token spans each way.
    """
    is_whole = height % pipe.cell == 0 and width % pipe.cell == 0
    if height <= 0 or width <= 0 or not is_whole:
        raise ValueError(f"image size {height}x{width} is not a positive multiple of {pipe.cell}")
    return height // pipe.cell, width // pipe.cell


# ----------------------------------------------------------------------------------------- velocity


def velocity_of(
    flux: Network,
    text: Text,
    rows: int,
    columns: int,
    guidance: float | None = None,
    dtype: torch.dtype | None = None,
) -> Velocity:
    """v_theta(x, sigma) for fixed prompts and image size; x is (b, n, c), sigma () or (b,).

    `guidance` is for a network that reads it. `dtype` is what the network computes in, by default that of its weights.
    With FSDP the two differ: a bf16 network has fp32 master weights.
    """
    device = flux.img_in.weight.device
    # What does not depend on x and sigma is made once, not at each of the steps.
    dtype = dtype or flux.img_in.weight.dtype
    txt, *pooled = (tensor.to(dtype) for tensor in text)  # FLUX.1 has a pooled vector, FLUX.2 has not
    # Rotary positions are integers because a cast of all inputs to bf16 would move positions above 256.
    img_ids, txt_ids = (ids.to(device) for ids in family_of(flux.config).position_ids(rows, columns, txt.shape[1]))
    if not flux.config.guidance_embed:
        guidance = None

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        # Time and guidance stay fp32: FLUX takes cosines of 1000 t, of which bf16 would lose whole turns.
        t = torch.as_tensor(sigma, dtype=torch.float32, device=device).expand(len(x))
        g = None
        if guidance is not None:
            g = torch.full_like(t, guidance)
        v = flux(x.to(dtype), img_ids, txt, txt_ids, t, *pooled, g)
        # Latents stay fp32 between calls: an Euler step adds a small change, most of which bf16 would round away.
        return v.to(x.dtype)

    return velocity


# ----------------------------------------------------------------------------------------- guidance


def choose_guidance(guidance: float | None, config: NetworkConfig) -> float | None:
    """--guidance, or the scale that a network was made for: None if it was made for none."""
    return family_of(config).GUIDANCE[config.guidance_embed] if guidance is None else guidance


def is_guided(config: NetworkConfig, guidance: float | None) -> bool:
    """Whether guidance takes a second evaluation. FLUX.1-dev's network reads the scale; a scale of 1 is no guidance."""
    return not config.guidance_embed and guidance not in (None, 1)


def weighted_texts(
    pipe: Pipeline, text: Text, guidance: float | None, negative_prompt: str
) -> list[tuple[float, Text]]:
    """The branches that a velocity is a sum of: each one's weight, and the text that the network reads there.

    Classifier-free guidance (arXiv 2207.12598) with scale g is v_neg + g (v_pos - v_neg) = g v_pos + (1 - g) v_neg.
    """
    if not is_guided(pipe.flux.config, guidance):
        return [(1.0, text)]
    b = len(text[0])
    negative = tuple(tensor.expand(b, *tensor.shape[1:]) for tensor in encode(pipe, [negative_prompt]))
    return [(guidance, text), (1 - guidance, negative)]


def weighted_sum(velocities: Sequence[tuple[float, Velocity]]) -> Velocity:
    """The velocity of all branches."""
    if len(velocities) == 1:
        return velocities[0][1]
    return lambda x, sigma: sum(weight * velocity(x, sigma) for weight, velocity in velocities)


# ------------------------------------------------------------------------------------------- sample


def draw_noise(pipe: Pipeline, seeds: Sequence[int], rows: int, columns: int) -> Tensor:
    """x_1 of images, (b, n, c), one per seed: the noise that diffusers draws from a CPU generator with that seed."""
    noise = []
    for seed in seeds:
        # One generator per image, so that a seed gives the same picture in a batch of any size, on any number of ranks.
        # On the CPU, because a GPU's generator draws other numbers.
        generator = torch.Generator().manual_seed(seed)
        noise.append(pipe.family.draw_noise(generator, pipe.flux.config.in_channels, rows, columns))
    return torch.stack(noise).to(pipe.device)


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
    negative_prompt: str = "",
) -> Tensor:
    """Images in [0, 1] on the CPU, (len(prompts), 3, height, width), one per prompt and seed."""
    rows, columns = token_grid(pipe, height, width)
    levels = pipe.family.sigmas(pipe.schedule, steps, rows * columns).to(pipe.device)
    # The VAE takes 3 kB of memory a pixel, so it decodes a million pixels at a time.
    decode_batch = max(1, 2**20 // (height * width))
    images = []
    for i in range(0, len(prompts), batch):
        text = encode(pipe, prompts[i : i + batch])
        velocities = []
        for weight, branch in weighted_texts(pipe, text, guidance, negative_prompt):
            velocities.append((weight, velocity_of(pipe.flux, branch, rows, columns, guidance, pipe.compute)))
        noise = draw_noise(pipe, seeds[i : i + batch], rows, columns)
        # The same Euler steps as in training. The last state is the clean latent.
        x_0 = rollout(weighted_sum(velocities), noise, levels).x[-1]
        for latents in x_0.split(decode_batch):
            images.append(decode(pipe, latents, height, width).cpu())
    return torch.cat(images)


# ------------------------------------------------------------------------------------------- decode


def decode(pipe: Pipeline, x: Tensor, height: int, width: int) -> Tensor:
    """Packed latents (b, n, c) to images in [0, 1], (b, 3, height, width); differentiable, in fp32."""
    z = pipe.family.vae_latents(pipe.vae, x.to(pipe.vae.dtype), height // pipe.cell, width // pipe.cell)
    images = pipe.vae.decode(z).sample.to(x.dtype)  # the VAE may be bf16; rewards see fp32
    # The VAE's range is [-1, 1], and it overshoots. The clamp stops the gradient of a reward there: no picture can be
    # whiter than white.
    return (images / 2 + 0.5).clamp(0, 1)


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
    """Guidance scale. Default: that of the model's training, or the model's own: 3.5 for FLUX.1-dev, 4 for FLUX.2
    [klein] base, else none."""
    negative_prompt: str | None = None
    """What guidance leads away from, in models whose network reads no guidance scale; others ignore it. Default: that
    of the model's training, or none."""
    text_length: int | None = None
    """Tokens of T5 or Qwen3 that a prompt is padded or truncated to. Default: those of the model's training, or the
    tokenizer's own, at most 512."""
    batch: int = 8
    """Images at a time: fewer need less memory, the pictures stay the same."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute: cpu, mps, cuda, or one of several GPUs, cuda:1."""
    bf16: DisallowNone[bool | None] = None
    """Run the transformer and the text encoders in bfloat16, as FLUX.1-dev was published. Default: as in the model's
    training, or not."""


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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit("error: out of memory: take a smaller --batch or --size, or --bf16") from error


def draw_picture(cfg: SampleFlags) -> None:
    """Write the grid: a row a prompt. Raises ValueError naming the flag at fault."""
    prompts = list(cfg.prompt)
    if cfg.prompts:
        prompts += read_prompts(cfg.prompts)
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "..." or --prompts FILE')
    cfg = draw_as_trained(cfg, (cfg.model,), dict(rollout_steps=25))
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
    guidance = choose_guidance(cfg.guidance, pipe.flux.config)
    images = sample(pipe, captions, seeds, cfg.rollout_steps, height, width, guidance, cfg.batch, cfg.negative_prompt)
    side = max(128, min(width, 512))  # at least the room for a caption
    contact_sheet(images, captions, cfg.picture, columns=cfg.num, side=side)
    print(f"wrote {cfg.picture}: {len(images)} images of {height}x{width}")


class Reader(NamedTuple):
    """A text encoder or a reward, and how much of a prompt it reads."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    limit: int  # tokens


def truncation_warning(pipe: Pipeline, prompts: Sequence[str], readers: Sequence[Reader] = ()) -> str | None:
    """A warning if some prompts are longer than an encoder or a reward of `readers` reads, with the numbers; else None.

    Of a list of more than 10,000 prompts some are looked at: to tokenize all takes minutes.
    """
    examples = list(prompts[:: math.ceil(len(prompts) / 10_000)])
    encoders = []
    for tokenizer, (name, limit) in zip(pipe.tokenizers, pipe.family.token_limits(pipe).items(), strict=True):
        encoders.append(Reader(name, tokenizer, limit))
    notes = []
    for reader in (*encoders, *readers):
        name, tokenizer, limit = reader
        # A language model reads more than the prompt: its chat template.
        texts = [pipe.family.prompt_text(tokenizer, prompt) for prompt in examples] if reader in encoders else examples
        lengths = list(map(len, tokenizer(texts, verbose=False).input_ids))
        too_long = sum(length > limit for length in lengths)
        if too_long:
            notes.append(f"{name} reads {limit} tokens, {too_long} of {len(examples)} have more, up to {max(lengths)}")
    if not notes:
        return None
    return f"warning: prompts are truncated: {'; '.join(notes)}"


if __name__ == "__main__":
    main()
