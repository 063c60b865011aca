"""FLUX.2: the transformer of FLUX.2 [klein] and FLUX.2 [dev], under black-forest-labs' parameter names.

The plan is model.py's, and so are all modules that are imported from there. What differs from FLUX.1:

* No layer has a bias. No pooled prompt enters `vec`. [klein] has no guidance input: sample.py guides it.
* Shifts, scales and gates are made once a forward, by three layers that all blocks share.
* The MLPs are SwiGLU (arXiv 2002.05202).
* Positions have four axes, (image, row, column, place in the prompt): text tokens have positions, too.

`flux-2-klein-base-4b.safetensors` loads into `Flux2(KLEIN_4B)` strictly; families/flux2.py has diffusers' names of its
tensors. Precision and legend are those of model.py.

Sources: github.com/black-forest-labs/flux2; diffusers' Flux2Transformer2DModel.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model import (
    EMBED_CHANNELS,
    Branch,
    LastLayer,
    MLPEmbedder,
    Modulation,
    QKNorm,
    SelfAttention,
    attention,
    modulate,
    rotary_table,
    run_block,
    sinusoid,
)


@dataclass(frozen=True)
class Flux2Config:
    """The shape of a Flux2; the defaults are those of FLUX.2 [klein] base 4B."""

    in_channels: int = 128  # 32 latent channels x a 2x2 patch
    out_channels: int = 128
    context_in_dim: int = 7680  # three layers of Qwen3-4B, 2560 channels each
    hidden_size: int = 3072
    mlp_ratio: float = 3.0
    num_heads: int = 24
    depth: int = 5  # double blocks
    depth_single_blocks: int = 20
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)  # a head's channels that encode each position axis
    theta: int = 2000  # base of the rotary frequencies
    qkv_bias: bool = False
    guidance_embed: bool = False  # [dev] was distilled with guidance, which is an input

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


KLEIN_4B = Flux2Config()


class SwiGLU(nn.Module):
    """The first half of the channels gates the second half."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class DoubleStreamBlock(nn.Module):
    """Attention over both streams at once, then an MLP each; no weight is shared between the streams."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, config.mlp_dim
        self.img_attn = SelfAttention(config)
        self.img_mlp = nn.Sequential(nn.Linear(dim, 2 * mlp_dim), SwiGLU(), nn.Linear(mlp_dim, dim))
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, 2 * mlp_dim), SwiGLU(), nn.Linear(mlp_dim, dim))

    def forward(self, img: Tensor, txt: Tensor, img_mods: list, txt_mods: list, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = img_mods  # of attention, and of the MLP
        txt_mod1, txt_mod2 = txt_mods

        img_qkv = self.img_attn(modulate(img, img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn(modulate(txt, txt_mod1.shift, txt_mod1.scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        txt_out, img_out = attention(q, k, v, pe).split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale))

        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on [txt, img]: one projection in, to [q, k, v, gate, value], and one out."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        dim, mlp_dim = config.hidden_size, config.mlp_dim
        self.heads, self.widths = config.num_heads, (3 * dim, 2 * mlp_dim)
        self.linear1 = nn.Linear(dim, 3 * dim + 2 * mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(config.head_dim)
        self.swiglu = SwiGLU()

    def forward(self, x: Tensor, mod: Branch, pe: Tensor) -> Tensor:
        qkv, mlp = self.linear1(modulate(x, mod.shift, mod.scale)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        attn = attention(*self.norm(q, k), v, pe)
        return x + mod.gate * self.linear2(torch.cat([attn, self.swiglu(mlp)], dim=-1))


class Flux2(nn.Module):
    """v_theta(x_t, t, prompt): the velocity of a rectified flow, noise minus image."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.time_in = MLPEmbedder(EMBED_CHANNELS, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(EMBED_CHANNELS, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.double_stream_modulation_img = Modulation(dim, branches=2)
        self.double_stream_modulation_txt = Modulation(dim, branches=2)
        self.single_stream_modulation = Modulation(dim, branches=1)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        singles = range(config.depth_single_blocks)
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in singles)
        self.final_layer = LastLayer(config)
        self.recompute: Literal["none", "light", "blocks"] = "none"  # see run_block
        # model.py's modules have biases, and no layer of FLUX.2 has.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.register_parameter("bias", None)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at every image token, (b, n, out_channels).

        img (b, n, in_channels), txt (b, m, context_in_dim): in the network's dtype.
        img_ids (n, 4), txt_ids (m, 4): integers.
        timesteps (b,) in [0, 1], 1 being noise; guidance (b,), for a network with guidance_embed alone.
        """
        vec = self.time_in(sinusoid(timesteps).to(txt.dtype))
        if self.config.guidance_embed:
            vec = vec + self.guidance_in(sinusoid(guidance).to(txt.dtype))
        img_mods = self.double_stream_modulation_img(vec)
        txt_mods = self.double_stream_modulation_txt(vec)
        (single_mod,) = self.single_stream_modulation(vec)

        ids = torch.cat([txt_ids, img_ids])
        pe = rotary_table(ids, self.config.axes_dim, self.config.theta, img.dtype)  # (l, d / 2)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = run_block(self.recompute, block, img, txt, img_mods, txt_mods, pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = run_block(self.recompute, block, x, single_mod, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)
