"""What a file or folder is, told by its names before any weights are read; and errors that say what to do.

A .safetensors file is a LoRA, FLUX.1's transformer under black-forest-labs' names, or neither.  ComfyUI's checkpoints
hold the second under a prefix, at times beside a VAE and text encoders under other ones.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

Name, Result = TypeVar("Name"), TypeVar("Result")

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
FLUX = ("img_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.qkv.weight")  # together in FLUX.1 only
SIGNS = {  # tensors, and what a file is that has one of that name
    "double_stream_modulation_img.lin.weight": "a FLUX.2 transformer",
    "double_stream_modulation_img.linear.weight": "a FLUX.2 transformer",
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": "a Stable Diffusion 3 or 3.5 transformer",
    "pos_embed.proj.weight": "a Stable Diffusion 3 or 3.5 transformer",
    "distilled_guidance_layer.in_proj.bias": "a Chroma transformer",
    "input_blocks.0.0.weight": "a UNet of Stable Diffusion 1, 2 or XL",
    "decoder.conv_in.weight": "a VAE",
    "single_transformer_blocks.0.proj_mlp.weight": "a FLUX.1 transformer under diffusers' names, a part of a folder",
}
FAMILIES = {  # how diffusers' classes begin, and what they are of
    "Flux2": "FLUX.2",
    "StableDiffusion3": "Stable Diffusion 3 or 3.5",
    "SD3": "Stable Diffusion 3 or 3.5",
    "StableDiffusionXL": "Stable Diffusion XL",
    "Chroma": "Chroma",
    "QwenImage": "Qwen-Image",
}
SCALES = (
    "scaled_fp8",
    "scale_weight",
    "weight_scale",
    "scale_input",
    "input_scale",
    "comfy_quant",
    "absmax",
    "qweight",
)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def parse_file(what: Name, parse: Callable[[Name], Result], remedy: str = "copy or download it again") -> Result:
    """parse(what); all that can go wrong becomes a ValueError that names it, and libraries differ in what."""
    try:
        return parse(what)
    except Exception as error:
        text = str(error).rstrip(".")
        raise ValueError(f"cannot read {what} ({type(error).__name__}: {text}): {remedy}") from error


def tensor_names(file: Path) -> list[str]:
    """The names of a safetensors file's tensors, from its header. Raises ValueError if it cannot be read."""

    def keys(file: Path) -> list[str]:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())

    return parse_file(file, keys)


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before black-forest-labs' names in a file that holds FLUX.1's transformer; None if it holds none."""
    names = set(names)
    return next((prefix for prefix in PREFIXES if all(prefix + name in names for name in FLUX)), None)


def flux_file(name: str | Path) -> Path | None:
    """The path of a file that is FLUX.1's transformer under black-forest-labs' names, by its header; else None."""
    path = Path(name)
    is_file = path.is_file() and path.suffix == ".safetensors"
    return path if is_file and prefix_of(tensor_names(path)) is not None else None


def without_prefix(state: dict[str, Tensor], source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The transformer's tensors, by our names, of a file that may hold more, and what to say of that.

    Raises ValueError naming what it is that holds none.
    """
    prefix = prefix_of(state)
    if prefix is None:
        raise ValueError(f"{source} is {kind_of_file(state)}: give FLUX.1's transformer under black-forest-labs' names")
    others = sorted({name.split(".")[0] for name in state if not name.startswith(prefix)})
    notes = [f"note: of {source} only the transformer is read, not {', '.join(others[:4])}"] if others else []
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}, notes


def kind_of_file(names: Iterable[str]) -> str:
    """What a safetensors file is, by the names of its tensors, for an error."""
    names = list(names)
    bare = {name.removeprefix(prefix) for prefix in PREFIXES for name in names}
    some = ", ".join(names[:3]) or "none"
    return next((kind for sign, kind in SIGNS.items() if sign in bare), f"of an unknown kind, its tensors {some}")


def check_family(folder: Path) -> None:
    """Raise ValueError naming the model that a folder is of, if its small files say that it is none of FLUX.1's."""
    for file in (folder / "model_index.json", folder / "transformer" / "config.json", folder / "config.json"):
        if not file.exists():
            continue
        name = parse_file(file, lambda file: json.loads(file.read_text()).get("_class_name")) or "Flux"
        if not name.startswith("Flux") or name[4:5].isdigit():
            family = next((family for start, family in FAMILIES.items() if name.startswith(start)), "no FLUX.1")
            raise ValueError(f"{folder} is {family} ({file.name} says {name}): only FLUX.1 is read, give such a folder")


def check_precision(state: dict[str, Tensor], source: Path) -> list[str]:
    """What to say of fp8 weights, which are read up-cast. Raises ValueError for weights with scales beside them."""
    if scales := [name for name in state if name.split(".")[-1] in SCALES]:
        raise ValueError(
            f"{source} holds quantized weights with scales ({scales[0]}), which are not read: give bf16 weights, "
            "or fp8 ones without scales"
        )
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.dtype in FP8})
    return [f"note: {source} holds {kinds[0]} weights, read up-cast: what fp8 rounded off stays lost"] if kinds else []
