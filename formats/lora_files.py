"""LoRA files of others, read: whichever names a trainer gives its layers, and wherever it keeps alpha.

    transformer.X.lora_A.weight  lora_B     diffusers, ai-toolkit, SimpleTuner, and ours; alpha in the file's metadata
    base_model.model.X.lora_A.weight        PEFT, alpha in adapter_config.json beside adapter_model.safetensors
    lora_unet_X.lora_down.weight  lora_up   kohya, the dots of X written as _; alpha as a tensor
    double_blocks.0.processor.qkv_lora1.down.weight  up     x-flux

X is a layer by diffusers' name or by black-forest-labs'.  Without alpha, it is the rank.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from formats.lora import FILE, NOTE, Change
from formats.names import SWAPPED, module_names, swap_halves
from formats.reading import parse_file, tensor_names
from model import Flux, FluxConfig

PEFT = "adapter_model.safetensors"
PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)+")
ROLE = re.compile(
    r"\.(?P<down>lora_A(\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight|down\.weight)$"
    r"|\.(?P<up>lora_B(\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight|up\.weight)$"
    r"|\.(?P<alpha>alpha)$"
)
XFLUX = {  # what x-flux calls the layers of a block
    "double_blocks": {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv",
                      "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"},
    "single_blocks": {"qkv_lora": "linear1", "proj_lora": "linear2"},
}  # fmt: skip


def is_lora_file(file: Path) -> bool:
    """Does a safetensors file hold a LoRA, by the names of its tensors? Raises ValueError if it cannot be read."""
    return any((role := ROLE.search(name)) and role["down"] for name in tensor_names(file))


def lora_file(name: str | Path) -> Path | None:
    """The file of the LoRA that `name` is, a file or a folder; None if it is no LoRA.

    Raises ValueError for a file that cannot be read, and a folder of several of which none has a known name.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".safetensors":
        return path if is_lora_file(path) else None
    if not path.is_dir() or (path / "model_index.json").exists():
        return None
    for known in (FILE, PEFT):
        if (path / known).exists():
            return path / known
    if (path / NOTE).exists():
        return path / FILE  # which is missing: `locations.find` says so
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1 and all(map(is_lora_file, files)):
        raise ValueError(f"{path} holds {len(files)} LoRAs: give one of its files, such as {files[-1]}")
    return files[0] if len(files) == 1 and is_lora_file(files[0]) else None


def read_lora(file: Path, config: FluxConfig) -> dict[str, list[Change]]:
    """What a LoRA file adds to each weight of a Flux. Raises ValueError naming the file and what is not understood."""

    def parse(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with safe_open(file, "pt") as tensors:
            packed = (tensors.metadata() or {}).get("lora_adapter_metadata", "{}")
        return load_file(file), {k.removeprefix("transformer."): v for k, v in json.loads(packed).items()}

    state, settings = parse_file(file, parse)
    if file.name == PEFT and (beside := file.with_name("adapter_config.json")).exists():
        settings = parse_file(beside, lambda file: dict(json.loads(file.read_text())))
    try:
        return changes_of(state, config, settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def changes_of(
    state: dict[str, Tensor], config: FluxConfig, settings: dict[str, Any] | None = None
) -> dict[str, list[Change]]:
    """What the tensors of a LoRA add to each weight of a Flux, by our names.

    `settings` are PEFT's: r, lora_alpha, alpha_pattern, rank_pattern, use_rslora.  Raises ValueError for tensors that
    do not fit.
    """
    settings = settings or {}
    if settings.get("use_dora") or any("magnitude" in name or "dora_scale" in name for name in state):
        raise ValueError("this is a DoRA, which scales the base's rows too: only plain LoRAs are read")
    if other := [n for n in state if n.startswith(("lora_te", "text_encoder"))]:
        raise ValueError(f"this LoRA changes text encoders too ({other[0]}), which stay as they are here")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not (role := ROLE.search(name)):
            raise ValueError(f"this LoRA has tensors that this code does not: {name}{kind_of(name)}")
        pairs.setdefault(name[: role.start()], {})[role.lastgroup or ""] = tensor.float()
    layers, changes = layer_rows(config), {}
    for theirs, pair in pairs.items():
        layer = PREFIX.sub("", theirs)
        if not (rows := layers.get(layer.replace(".", "_"))):
            raise ValueError(f"this LoRA changes layers that this code does not: {theirs}")
        ours, start, count, width = rows
        if not {"down", "up"} <= pair.keys():
            raise ValueError(f"this is no LoRA of this Flux: {theirs} has {' and '.join(pair)} only")
        up, down = pair["up"], pair["down"]
        if up.shape != (count, len(down)) or down.shape != (len(down), width):
            shapes = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise ValueError(f"this is no LoRA of this Flux: {theirs} is {shapes}, its layer {count} x {width}")
        if ours == f"{SWAPPED}.weight" and "norm_out" in theirs:
            up = swap_halves(up)
        changes.setdefault(ours, []).append(Change(start, up, down, scale_of(layer, pair, settings)))
    if not changes:
        raise ValueError("this LoRA is empty")
    return changes


def scale_of(layer: str, pair: dict[str, Tensor], settings: dict[str, Any]) -> float:
    """alpha / rank; alpha is the tensor beside the pair, else the settings' for this layer, else the rank."""
    rank = len(pair["down"])
    if "alpha" in pair:
        return pair["alpha"].item() / rank
    patterns = settings.get("alpha_pattern") or {}
    matching = [a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = matching[0] if matching else settings.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def kind_of(name: str) -> str:
    """What a file is whose tensors are called so, for an error; empty if that is not known."""
    kinds = {
        "lokr_": "a LoKr",
        "hada_": "a LoHa",
        "oft_": "an OFT",
        "lora_mid": "a LoCon of convolutions",
        "diff_b": "a change of biases",
    }
    found = next((kind for part, kind in kinds.items() if part in name), None)
    return f" ({found}, which is not read)" if found else ""


def layer_rows(config: FluxConfig) -> dict[str, tuple[str, int, int, int]]:
    """A layer by any of its names, dots as _: our weight, its first row and the number of rows, and its width."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Flux(config).named_parameters() if p.ndim == 2}
    table = {}
    for ours, theirs in module_names(config):
        weight = f"{ours}.weight"
        if weight not in shapes:
            continue
        total, width = shapes[weight]
        table[ours] = (weight, 0, total, width)
        for i, name in enumerate(theirs):
            start = i * config.hidden_size
            table[name] = (weight, start, config.hidden_size if i < len(theirs) - 1 else total - start, width)
        stack, _, rest = ours.partition(".")
        for theirs_x, layer in XFLUX.get(stack, {}).items():
            if rest.partition(".")[2] == layer:
                rows = 3 * config.hidden_size if theirs_x.startswith("qkv") else total
                table[f"{stack}.{rest.partition('.')[0]}.processor.{theirs_x}"] = (weight, 0, rows, width)
    return {name.replace(".", "_"): rows for name, rows in table.items()}


def merge_lora(
    tensors: Iterator[tuple[str, Tensor]], changes: dict[str, list[Change]], strength: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Flux with `strength` times what a LoRA changes added, in fp32."""
    for name, tensor in tensors:
        if name in changes:
            tensor = tensor.to(torch.float32, copy=True)
            for start, up, down, scale in changes[name]:
                tensor[start : start + len(up)] += strength * scale * (up @ down)
        yield name, tensor
