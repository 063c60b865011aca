"""Where the components of a model lie on this disk.

A model is a folder, or a hub id that is downloaded to one, in the layout of diffusers:

    model_index.json  scheduler/  transformer/  vae/
    text_encoder/  tokenizer/        CLIP
    text_encoder_2/  tokenizer_2/    T5

Or it is one file, with a folder of all else: a LoRA, or the transformer as black-forest-labs publish it
(flux1-dev.safetensors).
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from formats.lora import FILE, NOTE
from formats.lora_files import lora_file
from formats.reading import flux_file, tensor_names
from infra.downloads import DOWNLOADS, how_to_get
from infra.files import put_back
from infra.reading import parse_file, parse_json

# All but the transformer stays as it is in training, and is copied or linked to the folder of a tuned model.
FROZEN = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
COMPONENTS = (*FROZEN, "transformer")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name


class Location(NamedTuple):
    """Paths of a model on this disk."""

    folder: Path  # all components but the transformer
    transformer: Path  # a folder, or a file with black-forest-labs' names
    lora: Path | None = None  # the file of a LoRA, which changes the transformer


def locate(name: str | Path, base: str | None = None) -> Location:
    """The location of a model folder, a hub id, a LoRA or a transformer's file.

    `base`, --base, is the folder or hub id that a LoRA changes, if the LoRA's NOTE does not name one; or the folder
    that a transformer's file lacks.
    Raises ValueError naming what is missing, or what `name` is instead.
    """
    path = Path(name)
    put_back(path)  # a kill while the folder was replaced may have left it under another name
    # Headers decide, not file names: a LoRA and a whole transformer are .safetensors both.
    if lora := lora_file(name):
        return locate_base(lora, base)._replace(lora=lora)
    if flux_file(name):
        if not base or Path(base).is_file():
            raise ValueError(f"{name} is a transformer alone: give --base FOLDER, which has a VAE and text encoders")
        return Location(find_folder(base, FROZEN), path)
    if path.is_file():
        remedy = "give a FLUX.1 folder, a LoRA, or a transformer with black-forest-labs' names, all of .safetensors"
        first_names = ", ".join(tensor_names(path, remedy)[:3])
        raise ValueError(f"{name} is no FLUX.1 model, its tensors are {first_names} ...: {remedy}")
    if base:
        locate(base)  # which --strength needs; a misspelt one is found also where it is not used
    folder = find_folder(name, COMPONENTS)
    return Location(folder, folder / "transformer")


# ------------------------------------------------------------------------------------ a LoRA's base


def locate_base(lora: Path, base: str | None) -> Location:
    """The location of the model that a LoRA changes: `base`, or what the NOTE beside the LoRA names."""
    if base:
        if lora_file(base):
            raise ValueError(f"--base {base} is a LoRA too: give the whole model that {lora} was trained on")
        return locate(base)
    note = lora.parent / NOTE  # which our own LoRAs have; those of other trainers need --base
    if not note.exists():
        raise ValueError(f"{lora} is a LoRA that does not say what it changes: give --base FOLDER")

    def base_paths(entries: dict[str, str]) -> tuple[Path, Path]:
        # Relative paths start at the LoRA, so that both can be moved together.
        return lora.parent / entries["base"], lora.parent / entries.get("transformer", entries["base"])

    folder, transformer = parse_json(note, base_paths, "it must name a base, or give --base FOLDER")
    needs = {FILE: lora, f"base at {folder}": folder, f"transformer at {transformer}": transformer}
    for component, path in needs.items():
        if not path.exists():
            raise ValueError(f"LoRA {lora.parent} needs its {component}, as {note} says")
    return locate(folder) if transformer == folder else locate(transformer, str(folder))


# ------------------------------------------------------------------------------------------ folders


def find_folder(name: str | Path, components: tuple[str, ...]) -> Path:
    """The model folder at path `name` or of that hub id. Raises ValueError if it lacks some of `components`."""
    folder = Path(name)
    if not folder.exists():
        folder = download_folder(str(name), components)
    # The class comes first: of another family's model it is no help to list the components that it lacks.
    check_class(folder)
    contents = sorted(path.name for path in folder.iterdir())
    lacks = [component for component in components if component not in contents]
    if lacks:
        raise ValueError(f"{folder} is incomplete: it lacks {', '.join(lacks)}; it holds {', '.join(contents)}")
    return folder


def download_folder(name: str, components: tuple[str, ...]) -> Path:
    """The folder that huggingface_hub keeps of a hub id. Raises ValueError if the download fails, or if it is no id."""
    if name in DOWNLOADS:
        raise ValueError(f"no model at {name!r}; get it with\n{how_to_get(name)}")
    # A misspelt path must not go to the network. A path whose parent exists is no hub id, nor is one into our folders.
    parent = Path(name).parent
    is_path = Path(name).suffix == ".safetensors" or parent.is_dir() or parent.name in ("weights", "runs")
    if is_path or not HUB_ID.fullmatch(name):
        reason = "" if parent.is_dir() else f"there is no folder {parent}, "
        raise ValueError(f"no model at {name!r}: {reason}give a folder or file that exists, or a hub id owner/name")
    remedy = (
        f"no folder {name} is here: check name and network; for a gated model, accept its licence and `hf auth login`"
    )
    # The transformer's config.json describes the file that takes the place of its weights.
    patterns = [*(f"{component}/*" for component in components), "transformer/config.json"]
    # The index is fetched and checked alone: nobody should wait for the weights of a model that cannot be used.
    for allow_patterns in (["model_index.json"], patterns):
        download = partial(snapshot_download, allow_patterns=allow_patterns)
        folder = Path(parse_file(name, download, remedy))
        check_class(folder)
    return folder


def check_class(folder: Path) -> None:
    """Raise ValueError naming the pipeline that a folder's model_index.json names, if it is not FLUX.1's."""
    remedy = "give a folder of FluxPipeline"
    pipeline = parse_json(folder / "model_index.json", lambda entries: str(entries["_class_name"]), remedy)
    if not re.match(r"Flux[A-Z]", pipeline):  # FluxPipeline, FluxFillPipeline, but not Flux2Pipeline
        raise ValueError(f"{folder} is no FLUX.1 model, its model_index.json says {pipeline}: {remedy}")
