"""LoRA: a frozen network, and low-rank changes of its linear layers that are trained instead (arXiv 2106.09685).

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero at the start

Flux fuses q, k, v, and the MLP of a single block, into one layer; published LoRAs have an A and a B for each.  So do
these: each part of a fused layer's rows has its own.  The file written is what diffusers' load_lora_weights reads;
lora_files.py reads it, and those of others.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.names import module_names
from model import Flux, FluxConfig

FILE, NOTE = "pytorch_lora_weights.safetensors", "lora.json"  # the second names the base
TARGETS = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2")  # all of a block's but its modulation


class Change(NamedTuple):
    """scale x up @ down, added to the rows of one weight from `start` on."""

    start: int
    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, in)
    scale: float


class LoRA(nn.Module):
    """A frozen linear layer and its trained change, `scale` x B A for each part of its rows."""

    def __init__(self, linear: nn.Linear, parts: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.off = False  # whether it is the frozen layer alone
        device, width = linear.weight.device, linear.in_features
        rows = [width] * (parts - 1)
        rows.append(linear.out_features - sum(rows))
        self.a = nn.ParameterList(torch.empty(rank, width, device=device) for _ in rows)
        self.b = nn.ParameterList(torch.zeros(n, rank, device=device) for n in rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.linear(x)
        change = [F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in zip(self.a, self.b)]
        return self.linear(x) + self.scale * torch.cat(change, dim=-1)


class Changed(nn.Module):
    """A linear layer and, apart, `strength` times what a LoRA adds to it."""

    def __init__(self, linear: nn.Linear, changes: list[Change], strength: float) -> None:
        super().__init__()
        self.linear, self.starts = linear, [change.start for change in changes]
        self.up = nn.ParameterList(strength * change.scale * change.up for change in changes).requires_grad_(False)
        self.down = nn.ParameterList(change.down for change in changes).requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight  # by which a Flux tells its precision and its device

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for start, up, down in zip(self.starts, self.up, self.down):
            y[..., start : start + len(up)] += F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return y


def lora_layers(config: FluxConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers that are changed: our name, and diffusers' for the parts of its rows."""
    for ours, theirs in module_names(config):
        if "blocks" in ours and ours.endswith(TARGETS):
            yield ours, theirs


def add_lora(flux: Flux, rank: int, alpha: float) -> None:
    """Freeze a Flux and put a LoRA around its layers, in place. Parameters `X.weight` become `X.linear.weight`."""
    flux.requires_grad_(False)
    for ours, theirs in lora_layers(flux.config):
        parent, _, leaf = ours.rpartition(".")
        linear = flux.get_submodule(ours)
        setattr(flux.get_submodule(parent), leaf, LoRA(linear, len(theirs), rank, alpha))


def first_values(flux: Flux, seed: int, changes: dict[str, list[Change]] | None = None) -> Iterator[tuple[str, Tensor]]:
    """What a LoRA starts from: A as torch draws linear layers, B zero. The same on every rank.

    With `changes` of another LoRA, by our names, it starts as that: in its first rows of A and columns of B.
    Raises ValueError if its rank is too low for them, or they are of other layers.
    """
    generator, left = torch.Generator().manual_seed(seed), dict(changes or {})
    for ours, _ in lora_layers(flux.config):
        layer, first = flux.get_submodule(ours), 0
        pieces = left.pop(f"{ours}.weight", [])
        for i, (a, b) in enumerate(zip(layer.a, layer.b, strict=True)):
            bound = 1 / math.sqrt(a.shape[1])
            down, up = torch.empty(a.shape).uniform_(-bound, bound, generator=generator), torch.zeros(b.shape)
            used = 0
            for piece in pieces:
                begin, end = max(first, piece.start), min(first + len(b), piece.start + len(piece.up))
                if begin >= end:
                    continue
                own = slice(used, used := used + len(piece.down))
                if used > len(a):
                    raise ValueError(f"rank {len(a)} is too low to go on with a LoRA of rank {used} ({ours})")
                down[own] = piece.down
                rows = piece.up[begin - piece.start : end - piece.start]
                up[begin - first : end - first, own] = piece.scale / layer.scale * rows
            yield f"{ours}.a.{i}", down
            yield f"{ours}.b.{i}", up
            first += len(b)
    if left:
        raise ValueError(
            f"it changes {min(left)} too, which a LoRA here does not: go on with all weights, without --lora"
        )


def wrapped_name(name: str, known: set[str]) -> str:
    """A parameter's name once its layer may be inside of a LoRA."""
    layer, _, leaf = name.rpartition(".")
    return name if name in known else f"{layer}.linear.{leaf}"


def save_lora(folder: Path, flux: Flux, tensors: Iterator[tuple[str, Tensor]], base: dict[str, str]) -> None:
    """Write FILE, with the scale in B, and NOTE, which names what it changes for `locations.find`.

    `tensors` are names and whole tensors of all trained parameters, which come from `flux`, cut or not; `base` is
    the model folder, and under "transformer" its file if that lies elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, trained = {}, dict(tensors)
    for ours, theirs in lora_layers(flux.config):
        scale = flux.get_submodule(ours).scale
        for i, name in enumerate(theirs):
            state[f"transformer.{name}.lora_A.weight"] = trained[f"{ours}.a.{i}"].contiguous()
            state[f"transformer.{name}.lora_B.weight"] = (scale * trained[f"{ours}.b.{i}"]).contiguous()
    save_file(state, folder / FILE, metadata={"format": "pt"})
    (folder / NOTE).write_text(json.dumps(base) + "\n")


from contextlib import contextmanager


@contextmanager
def without_lora(flux):
    layers = [layer for layer in flux.modules() if isinstance(layer, LoRA)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
