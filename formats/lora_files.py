"""LoRA files of all trainers, read. Trainers differ in how they name tensors, and in where they keep alpha.

    transformer.X.lora_A.weight  lora_B          diffusers, ai-toolkit, SimpleTuner, ours; alpha in the file's metadata
    base_model.model.X.lora_A.weight  lora_B     PEFT; alpha in adapter_config.json beside adapter_model.safetensors
    lora_unet_X.lora_down.weight  lora_up        kohya, and OneTrainer with lora_transformer_; alpha is a tensor
    diffusion_model.X.lora_down.weight  lora_up  ComfyUI; alpha is a tensor
    double_blocks.0.processor.qkv_lora1.down.weight  up     x-flux

X is a layer by diffusers' name or by black-forest-labs'. kohya and OneTrainer write _ for each dot. Without an alpha,
alpha is the rank.

diffusers' converter (0.42) is used for x-flux only. Of kohya's layers it leaves out those outside of the blocks, of
OneTrainer's it reads attention alone, and it does not read PEFT's files at all.
"""

import json
import re
from functools import cache
from pathlib import Path

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from families import NetworkConfig, empty_network
from formats.lora import FILE, NOTE, Change, Changes, NamedTensors
from formats.names import to_diffusers
from formats.reading import tensor_names
from infra.prompts import print_on_first_rank
from infra.reading import check_finite, parse_file

PEFT = "adapter_model.safetensors"
SIGN = re.compile(r"lora_A|lora[_.]down|\.processor\..*\.down\.weight|lokr_|hada_")  # only LoRAs have such names
PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)+")
DOWN = re.compile(r"\.(lora_A|lora[_.]down)(\.\w+)?\.weight$")  # PEFT at times writes lora_A.default.weight
TEXT_ENCODERS = ("lora_te", "text_encoder")  # kohya's lora_te1_ and diffusers' text_encoder. for instance
# Relatives of LoRA: their change of a weight is no product of two factors, or not that alone.
UNREAD = {"lokr_": "a LoKr", "hada_": "a LoHa", "dora_scale": "a DoRA", "lora_magnitude": "a DoRA"}


def is_lora_file(file: Path) -> bool:
    """Whether a safetensors file holds a LoRA, by the names of its tensors. Raises ValueError if it cannot be read."""
    return any(map(SIGN.search, tensor_names(file)))


def lora_file(name: str | Path) -> Path | None:
    """The file of the LoRA at path `name`, a file or a folder; None if there is no LoRA.

    Raises ValueError for a file that cannot be read, and for a folder of several LoRAs.
    """
    path = Path(name)
    if (path / "model_index.json").exists():  # a model folder, whatever lies in it
        return None
    # With its note alone a LoRA is incomplete: `locations.locate` reports the missing file.
    if (path / FILE).exists() or (path / NOTE).exists():
        return path / FILE
    if (path / PEFT).exists():
        return path / PEFT
    is_file = path.is_file() and path.suffix == ".safetensors"
    # kohya and ai-toolkit leave a LoRA for each checkpoint in one folder.
    files = [path] if is_file else sorted(path.glob("*.safetensors"))
    if not files or not all(map(is_lora_file, files)):
        return None
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} LoRAs: give one of its files, such as {files[-1]}")
    return files[0]


def read_lora(file: Path, config: NetworkConfig) -> Changes:
    """What a LoRA file adds to each weight of a Flux, by our names of the weights.

    Changes of text encoders are left out, which a line on stderr reports.
    Raises ValueError naming the file and what is not understood.
    """
    state, settings = parse_file(file, read_lora_tensors)
    check_lora(state, file)
    table = layer_rows(config)
    changes = {}
    # Tensors that are understood are taken out of `state`: what remains at the end is an error.
    for down_name in list(filter(DOWN.search, state)):
        down = state.pop(down_name)  # (rank, in)
        up = state.pop(down_name.replace("lora_A", "lora_B").replace("down", "up"), None)  # (rows, rank)
        alpha = state.pop(DOWN.sub(".alpha", down_name), None)  # kohya's and OneTrainer's; a tensor of one number
        layer = PREFIX.sub("", DOWN.sub("", down_name))
        if kohya_name(layer) not in table:
            raise ValueError(f"{file}: {down_name} is of no layer of this Flux")
        weight, rows, (height, width) = table[kohya_name(layer)]
        rank = len(down)
        alpha_fits = alpha is None or alpha.numel() == 1
        shapes_fit = up is not None and up.shape == (len(rows), rank) and down.shape == (rank, width)
        if not rank or not alpha_fits or not shapes_fit:
            raise ValueError(f"{file} is no LoRA of this Flux, whose {layer} is {len(rows)} x {width}")

        # The rows of `up` get their places in the weight, with zeros in all other rows.
        scaled_up = torch.zeros(height, rank)
        scaled_up[rows] = up * scale_of(layer, rank, alpha, settings)
        if weight in changes:  # q, k and v are in one weight
            scaled_up = torch.cat([changes[weight].up, scaled_up], dim=1)
            down = torch.cat([changes[weight].down, down])
        changes[weight] = Change(scaled_up, down)
    if state:
        raise ValueError(f"{file}: {min(state)} is not understood")
    if not changes:
        raise ValueError(f"{file} changes no layer of the transformer")
    return changes


def read_lora_tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    """The transformer's tensors in a LoRA file, in fp32, and PEFT's settings: lora_alpha, alpha_pattern, use_rslora."""
    state = {}
    for name, tensor in load_file(file).items():
        if name.startswith(TEXT_ENCODERS):
            note_text_encoders(file)
        else:
            state[name] = tensor.float()
    if any(".processor." in name for name in state):  # x-flux
        state = FluxLoraLoaderMixin.lora_state_dict(state)

    # diffusers' training scripts write PEFT's settings into the file's metadata, as "transformer.lora_alpha".
    with safe_open(file, "pt") as header:
        metadata = header.metadata() or {}
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    config_file = file.with_name("adapter_config.json")
    # People rename the file, which is then known by the names of its tensors.
    is_peft = file.name == PEFT or any(name.startswith("base_model.") for name in state)
    if is_peft and config_file.exists():
        settings = json.loads(config_file.read_text())
    check_finite(state.items())
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    # A setting that is no number or no pattern fails here, where `parse_file` names the file.
    if "lora_alpha" in settings:
        settings["lora_alpha"] = float(settings["lora_alpha"])
    patterns = settings.get("alpha_pattern", {})
    for pattern in patterns:
        re.compile(pattern)
        patterns[pattern] = float(patterns[pattern])
    return state, settings


@cache  # once a file: it has many such tensors, and is read twice, to check it and to use it
def note_text_encoders(file: Path) -> None:
    print_on_first_rank(f"note: {file} changes text encoders too: only what it changes of the transformer is used")


def check_lora(state: dict[str, Tensor], file: Path) -> None:
    """Raise ValueError if a file holds a relative of LoRA."""
    for name in state:
        for sign, kind in UNREAD.items():
            if sign in name:
                raise ValueError(f"{file} is {kind}, which is not read: give a plain LoRA")


def scale_of(layer: str, rank: int, alpha: Tensor | None, settings: dict) -> float:
    """alpha / rank. alpha is the layer's own tensor, or the settings' for this layer, or the rank."""
    if alpha is not None:
        return alpha.item() / rank
    layer_alpha = settings.get("lora_alpha", rank)
    for pattern, value in settings.get("alpha_pattern", {}).items():
        # As in PEFT: a pattern is the end of a layer's name, from a dot on, and the first that fits counts.
        if re.match(rf"(.*\.)?({pattern})$", layer):
            layer_alpha = value
            break
    # rsLoRA divides by the root of the rank, so that a higher rank does not learn more slowly.
    return layer_alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def kohya_name(layer: str) -> str:
    return layer.replace(".", "_")  # which no two layers share


def layer_rows(config: NetworkConfig) -> dict[str, tuple[str, Tensor, torch.Size]]:
    """By each published name of a layer, as kohya writes it: our weight, the layer's rows in it, the weight's shape."""
    parameters = dict(empty_network(config).named_parameters())
    table = {}
    for weight, parameter in parameters.items():
        if parameter.ndim == 2:
            # Numbers of rows go where diffusers puts the rows: into several layers, or in another order.
            numbers = {weight: torch.arange(len(parameter))}
            for name, rows in (numbers | to_diffusers(numbers, config)).items():
                table[kohya_name(name.removesuffix(".weight"))] = weight, rows, parameter.shape
    return table


def merge_lora(tensors: NamedTensors, changes: Changes, strength: float = 1.0) -> NamedTensors:
    """The tensors of a Flux with `strength` x a LoRA's changes added, those in fp32."""
    for name, tensor in tensors:
        if name in changes:
            up, down = changes[name]
            # A new tensor: the old one may be a view of a mapped file.
            tensor = tensor.float() + strength * (up @ down)
        yield name, tensor
