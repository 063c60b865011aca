"""FLUX: the rectified-flow transformer that black-forest-labs published, under their parameter names.

The prompt's tokens (`txt`) and the image's latent patches (`img`) are two streams of one width. Double blocks
give each stream its own weights and let them meet in attention; single blocks then treat [txt, img] as one
sequence. All a block knows of time, guidance and the prompt as a whole is one vector (`vec`), which shifts,
scales and gates it (adaLN); all it knows of position is one rotary table (`pe`).

`flux1-dev.safetensors` loads into `Flux(FLUX_DEV)` strictly; formats/names.py has diffusers' names of its tensors.

Precision: the network computes in the dtype of its weights. Exceptions: the features of time and guidance are
float32; rotary angles are float64, the table and the turn float32, or float64 in a float64 network.

Legend: b batch, n image tokens, m text tokens, l = m + n, h heads, d channels a head, c = h d channels.

Sources: github.com/black-forest-labs/flux; diffusers' FluxTransformer2DModel; DiT (arXiv 2212.09748).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

EMBED_CHANNELS = 256  # of the sinusoidal embeddings of time and guidance
EPS = 1e-6  # of every norm


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a Flux: black-forest-labs' FluxParams, the defaults those of FLUX.1-dev."""

    in_channels: int = 64  # 16 latent channels x a 2x2 patch
    out_channels: int = 64
    vec_in_dim: int = 768  # pooled CLIP
    context_in_dim: int = 4096  # T5
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # a head's channels that encode each position axis: (0, row, column)
    theta: int = 10_000  # base of the rotary frequencies
    qkv_bias: bool = True
    guidance_embed: bool = True  # guidance was distilled into the network and is an input

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} must be even and sum to a head's {self.head_dim} channels")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


FLUX_DEV = FluxConfig()


# ------------------------------------------------------------------------------------- functions


def sinusoid(t: Tensor, channels: int = EMBED_CHANNELS, period: float = 10_000.0) -> Tensor:
    """Features of a scalar, (b,) -> (b, channels): cosines, then sines, of 1000 t at falling frequencies.

    float32 in any network: at a guidance of 3.5 the fastest angle is 3500 radians, of which bf16 would lose whole
    turns.  Both sources agree where they compute in float32.  In bf16 they first round 1000 t, 3500 to 3504; this code
    does not.
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(period) * index / half)  # (channels / 2,)
    # 1000 t is rounded once, to float32.
    t = t if t.dtype == torch.float64 else t.float()
    angle = (1000 * t).float()[:, None] * frequency  # (b, channels / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float, dtype: torch.dtype) -> Tensor:
    """exp(i position frequency), a complex number per pair of channels: (..., l, axes) -> (..., l, d / 2).

    complex128 for a float64 network, else complex64. Raises ValueError for floating-point ids: wrappers that
    cast every floating input to bf16, which cannot hold 257, would make a wrong table silently.
    """
    if ids.is_floating_point():
        raise ValueError(f"position ids must be integers, got {ids.dtype}")
    device = "cpu" if ids.device.type == "mps" else ids.device  # Apple's GPUs have no float64
    positions = ids.to(device).unbind(-1)  # of each axis, (..., l)
    angles = []
    for position, dim in zip(positions, axes_dim, strict=True):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        frequency = theta**-exponent  # (dim / 2,)
        angles.append(position[..., None] * frequency)
    # Each axis turns channels of its own.
    angle = torch.cat(angles, dim=-1)
    table = torch.polar(torch.ones_like(angle), angle)
    if dtype == torch.float64:
        return table
    return table.to(torch.complex64).to(ids.device)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x (b, h, l, d), read as a complex number, by its angle.

    One complex product is about ten times faster on a CPU than the same turn spelled out in reals.
    """
    pairs = rearrange(x.to(pe.real.dtype), "b h l (f pair) -> b h l f pair", pair=2)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * pe)
    return rearrange(turned, "b h l f pair -> b h l (f pair)").to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Softmax attention with rotary positions, unmasked: (b, h, l, d) each -> (b, l, c)."""
    # Both turn by their positions, so a product of q and k depends on the distance of their tokens alone.
    q, k = rotate(q, pe), rotate(k, pe)
    x = F.scaled_dot_product_attention(q, k, v)
    return rearrange(x, "b h l d -> b l (h d)")


class Branch(NamedTuple):
    """adaLN of a residual branch: x + gate * f((1 + scale) * norm(x) + shift). Each (b, 1, c)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * norm(x) + shift. The norm has no weights of its own: adaLN supplies them."""
    norm = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return (1 + scale) * norm + shift


# ---------------------------------------------------------------------- memory of the backward


def run_block(recompute: str, block: nn.Module, *inputs: Tensor) -> Any:
    """block(*inputs), and how much of the block its backward computes again, in exchange for memory.

    none      nothing: all that autograd asks for is kept until then
    light     what is elementwise: the inputs and the results of products and attention are kept
    blocks    all of it: the inputs alone are kept
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    kept_by_light = partial(create_selective_checkpoint_contexts, keep_products)
    context_fn = kept_by_light if recompute == "light" else noop_context_fn
    # Nothing in a block is random.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


def keep_products(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """torch calls this with each operation of a block: is its result kept for the backward?"""
    name = operation.__name__
    if "attention" in name:  # each kind of GPU has its own
        return CheckpointPolicy.MUST_SAVE
    if "mm" not in name:  # mm, addmm, bmm
        return CheckpointPolicy.PREFER_RECOMPUTE
    inner, outer = args[-1].shape[-2:]
    # The second product of a LoRA, from its rank to the layer's width, takes much memory and little time.
    return CheckpointPolicy.MUST_SAVE if 16 * inner > outer else CheckpointPolicy.PREFER_RECOMPUTE


# --------------------------------------------------------------------------------------- modules


class MLPEmbedder(nn.Module):
    """Two layers that lift time, guidance or the pooled prompt to the width of `vec`."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """torch's RMSNorm, float32 inside for bf16 inputs, with BFL's name for its weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, EPS)


class QKNorm(nn.Module):
    """Norms of queries and keys: attention logits stay bounded however the weights grow."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """One stream's side of attention: it hands out q, k, v; the block attends, over both streams at once."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return *self.norm(q, k), v


class Modulation(nn.Module):
    """`vec` (b, c) to shifts, scales and gates for `branches` residual branches."""

    def __init__(self, dim: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.lin = nn.Linear(dim, 3 * branches * dim)

    def forward(self, vec: Tensor) -> list[Branch]:
        out = self.lin(F.silu(vec))
        # The 1 is for the tokens: all of them are modulated alike.
        of_branches = rearrange(out, "b (f three c) -> f three b 1 c", f=self.branches, three=3)
        return [Branch(shift, scale, gate) for shift, scale, gate in of_branches]


class DoubleStreamBlock(nn.Module):
    """Attention over both streams at once, then an MLP each; no weight is shared between the streams."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, config.mlp_dim
        self.img_mod = Modulation(dim, branches=2)
        self.img_attn = SelfAttention(config)
        self.img_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU("tanh"), nn.Linear(mlp_dim, dim))
        self.txt_mod = Modulation(dim, branches=2)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU("tanh"), nn.Linear(mlp_dim, dim))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        # Attention over the tokens of both streams, text first.
        img_qkv = self.img_attn(modulate(img, img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn(modulate(txt, txt_mod1.shift, txt_mod1.scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        out = attention(q, k, v, pe)  # (b, l, c)
        txt_out, img_out = out.split([txt.shape[1], img.shape[1]], dim=1)

        # Each stream adds its share of the result, then its own MLP.
        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale))

        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on [txt, img]: one projection in, one out (as in ViT-22B)."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, config.mlp_dim
        self.heads, self.widths = config.num_heads, (3 * dim, mlp_dim)
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(dim, branches=1)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        (mod,) = self.modulation(vec)
        # One product makes q, k, v and the inside of the MLP, and one takes both results back to the width of x.
        qkv, mlp = self.linear1(modulate(x, mod.shift, mod.scale)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        q, k = self.norm(q, k)
        attn = attention(q, k, v, pe)
        mlp = F.gelu(mlp, approximate="tanh")
        out = self.linear2(torch.cat([attn, mlp], dim=-1))
        return x + mod.gate * out


class LastLayer(nn.Module):
    """adaLN without a gate, then tokens to velocities."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = rearrange(self.adaLN_modulation(vec), "b (two c) -> two b 1 c", two=2)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """v_theta(x_t, t, prompt): the velocity of a rectified flow, noise minus image."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.time_in = MLPEmbedder(EMBED_CHANNELS, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(EMBED_CHANNELS, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        singles = range(config.depth_single_blocks)
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in singles)
        self.final_layer = LastLayer(config)
        self.recompute: Literal["none", "light", "blocks"] = "none"  # see run_block

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at every image token, (b, n, out_channels).

        img (b, n, in_channels), txt (b, m, context_in_dim), y (b, vec_in_dim): in the network's dtype.
        img_ids (n, 3) or (b, n, 3), txt_ids (m, 3) or (b, m, 3): integers.
        timesteps (b,) in [0, 1], 1 being noise; guidance (b,), the plain scale as in 3.5: float32 or better.
        Raises ValueError for floating-point ids, and for guidance that is missing or cannot be used.
        """
        if self.config.guidance_embed and guidance is None:
            raise ValueError("guidance is missing: a network with guidance_embed=True needs it")
        if guidance is not None and not self.config.guidance_embed:
            raise ValueError("guidance was given: a network with guidance_embed=False cannot use it")
        # All that does not depend on a token: noise level, guidance and the pooled prompt.
        vec = self.time_in(sinusoid(timesteps).to(y.dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(y.dtype))
        vec = vec + self.vector_in(y)

        # Ids shared by the batch stay unbatched, so the table is computed once and broadcast.
        batch = torch.broadcast_shapes(txt_ids.shape[:-2], img_ids.shape[:-2])
        txt_ids = txt_ids.expand(*batch, -1, -1)
        img_ids = img_ids.expand(*batch, -1, -1)
        ids = torch.cat([txt_ids, img_ids], dim=-2)  # (l, 3) or (b, l, 3)
        pe = rotary_table(ids, self.config.axes_dim, self.config.theta, img.dtype)
        pe = rearrange(pe, "... l f -> ... 1 l f")  # the same turn for every head

        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = run_block(self.recompute, block, img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = run_block(self.recompute, block, x, vec, pe)
        img = x[:, txt.shape[1] :]  # the text has no velocity
        return self.final_layer(img, vec)


def init_weights(model: Flux) -> None:
    """Initialise for training from scratch, as DiT: every block is the identity, the velocity zero."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.scale)
        if not isinstance(module, nn.Linear):
            continue
        # A gate of zero shuts a block's branches, and a last layer of zero makes the velocity zero.
        if name.endswith(("_mod.lin", "modulation.lin")) or name.startswith("final_layer."):
            nn.init.zeros_(module.weight)
        elif name.startswith(("time_in.", "vector_in.", "guidance_in.")):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
