"""LoRA: a frozen network, and low-rank changes of its linear layers, which are trained instead (arXiv 2106.09685).

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero at the start

Flux fuses q, k, v, and the MLP of a single block, into one layer, and diffusers does not. Published LoRAs have an A and
a B for each of diffusers' layers. So does `LoRA`: each of diffusers' layers is a block of rows of the fused layer.

diffusers' load_lora_weights reads the file that `save_lora` writes. lora_files.py reads that file and other trainers'.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from families import Network, NetworkConfig
from formats.names import module_names

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
NOTE = "lora.json"  # names the model that the LoRA lies over
TARGETS = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2")  # a block's layers, but not its modulation


class Change(NamedTuple):
    """What a LoRA adds to a weight: weight += up @ down."""

    up: Tensor  # (out, rank), times alpha / rank
    down: Tensor  # (rank, in)


NamedTensors = Iterator[tuple[str, Tensor]]
Changes = dict[str, Change]  # by the names of the weights


# ------------------------------------------------------------------------------------------- a network with a LoRA


class LoRA(nn.Module):
    """A frozen linear layer plus `scale` x B A, with one A and one B for each of its `block_count` blocks of rows."""

    def __init__(self, linear: nn.Linear, block_count: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.off = False  # set by without_lora
        device = linear.weight.device  # often meta, as of all parameters: the values come later
        width = linear.in_features
        # q, k and v are square. The last block is the rest: all rows of a layer that is not fused, or the MLP's.
        row_counts = [width] * (block_count - 1)
        row_counts.append(linear.out_features - sum(row_counts))
        self.a = nn.ParameterList(torch.empty(rank, width, device=device) for _ in row_counts)
        self.b = nn.ParameterList(torch.zeros(rows, rank, device=device) for rows in row_counts)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.off:
            return self.linear(x)
        # A and B are kept in fp32 for the optimizer, and used in the network's precision.
        blocks = []
        for a, b in zip(self.a, self.b):
            low_rank_x = F.linear(x, a.to(x.dtype))
            blocks.append(F.linear(low_rank_x, b.to(x.dtype)))
        return self.linear(x) + self.scale * torch.cat(blocks, dim=-1)


def lora_layers(config: NetworkConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers that a LoRA changes: our name, and diffusers' names for its blocks of rows."""
    for name, diffusers_names in module_names(config):
        if "blocks" in name and name.endswith(TARGETS):
            yield name, diffusers_names


def add_lora(flux: Network, rank: int, alpha: float) -> None:
    """Freeze a Flux and put a LoRA around its layers, in place. Parameters `X.weight` become `X.linear.weight`."""
    flux.requires_grad_(False)
    for name, diffusers_names in lora_layers(flux.config):
        linear = flux.get_submodule(name)
        flux.set_submodule(name, LoRA(linear, len(diffusers_names), rank, alpha))


def wrapped_name(name: str, parameter_names: set[str]) -> str:
    """The name of a Flux's parameter after `add_lora`, which puts some layers into a LoRA."""
    layer, _, leaf = name.rpartition(".")
    return name if name in parameter_names else f"{layer}.linear.{leaf}"


def first_values(flux: Network, seed: int, changes: Changes | None = None) -> NamedTensors:
    """Names and values that a LoRA starts from: A as torch draws linear layers, B zero. The same on every rank.

    The `changes` of an earlier LoRA fill the first rows of A and columns of B, so that training continues that LoRA.
    Raises ValueError if the rank is too low for the changes, or if they change other layers.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = dict(changes or {})
    for name, _ in lora_layers(flux.config):
        layer = flux.get_submodule(name)
        change = changes.pop(f"{name}.weight", None)
        start = 0
        for i in range(len(layer.a)):
            a = torch.empty(layer.a[i].shape)  # (rank, in)
            b = torch.zeros(layer.b[i].shape)  # (rows, rank)
            bound = 1 / math.sqrt(a.shape[1])
            # All of A is drawn, even if `changes` replace most of it, so that later layers draw the same numbers.
            a.uniform_(-bound, bound, generator=generator)
            if change:
                # q, k and v often have columns of their own in `up`, which are zero in the rows of the two others.
                up = change.up[start : start + len(b)]
                columns = up.any(dim=0)
                rank = int(columns.sum())
                if rank > len(a):
                    raise ValueError(f"--lora {len(a)} is too low to go on with a LoRA of rank {rank} ({name})")
                a[:rank] = change.down[columns]
                b[:, :rank] = up[:, columns] / layer.scale
            yield f"{name}.a.{i}", a
            yield f"{name}.b.{i}", b
            start += len(b)
    if changes:
        raise ValueError(
            f"--model changes {min(changes)} too, which a LoRA here does not: go on with all weights, without --lora"
        )


@contextmanager
def without_lora(flux: nn.Module) -> Iterator[None]:
    """Within the `with` block a network's LoRA layers are off, so that it is the untuned network.

    For use under no_grad: a backward pass that recomputes a layer after the block would find it on.
    """
    layers = [module for module in flux.modules() if isinstance(module, LoRA)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


# ------------------------------------------------------------------------------------- a finished LoRA: used, saved


def add_change(linear: nn.Linear, change: Change, strength: float) -> None:
    """Make a linear layer add `strength` x a LoRA's change to its output, in place.

    Its weight stays as it is: in bf16 the sum of both would be rounded, and a small change lost.
    """
    dtype = linear.weight.dtype
    # Parameters, so that they move to a GPU with the layer.
    linear.up = nn.Parameter((strength * change.up).to(dtype), requires_grad=False)
    linear.down = nn.Parameter(change.down.to(dtype), requires_grad=False)
    linear.register_forward_hook(lambda layer, args, y: y + F.linear(F.linear(args[0], layer.down), layer.up))


def save_lora(
    folder: Path, flux: Network, tensors: NamedTensors, base: dict[str, str], metadata: dict[str, str] | None = None
) -> None:
    """Write FILE, with the scale in B, and NOTE, which is `base`: where `locations.locate` finds the base.

    `tensors` are all trained parameters of `flux`, whole; `flux` itself may be sharded. `base` holds the model folder
    under "base", and under "transformer" its file if that lies elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(tensors)  # by our names, which end in .a.0, .b.0, .a.1 and so on
    state = {}
    for name, diffusers_names in lora_layers(flux.config):
        scale = flux.get_submodule(name).scale
        for i, diffusers_name in enumerate(diffusers_names):
            prefix = f"transformer.{diffusers_name}"
            a = values[f"{name}.a.{i}"]
            b = scale * values[f"{name}.b.{i}"]
            state[f"{prefix}.lora_A.weight"] = a.contiguous()
            state[f"{prefix}.lora_B.weight"] = b.contiguous()
    save_file(state, folder / FILE, metadata={"format": "pt", **(metadata or {})})
    (folder / NOTE).write_text(json.dumps(base) + "\n")
