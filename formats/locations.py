"""Where the components of a model lie on this disk.

A model is a folder, or a hub id that is downloaded to one, in the layout of diffusers:

    model_index.json  scheduler/  transformer/  vae/
    text_encoder/  tokenizer/        CLIP; Qwen3 of FLUX.2
    text_encoder_2/  tokenizer_2/    T5; FLUX.2 has none

Or it is one file, with a folder of all else: a LoRA, or the transformer as black-forest-labs publish it
(flux1-dev.safetensors).
"""

import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from families import FAMILIES
from formats.lora import FILE, NOTE
from formats.lora_files import lora_file
from formats.names import flux_file
from formats.reading import tensor_names
from infra.downloads import DOWNLOADS, how_to_get
from infra.files import put_back
from infra.reading import parse_file, parse_json

# Models that cannot be trained here, by their pipeline or by how the name of their published file starts.
REFUSED = {
    "Flux2Pipeline|flux2-dev": "FLUX.2 [dev] needs a text encoder of 24 B parameters: take FLUX.2 [klein] base",
    "FluxKontextPipeline|flux1-kontext": "Kontext edits pictures, which no reward here judges: take FLUX.1-dev",
    "Flux3": "FLUX.3 has another transformer and text encoder: take FLUX.2 [klein] base",
    "distilled|flux-2-klein-[49]b": "it draws in a few steps, which rewards soon blur: take FLUX.2 [klein] base",
}
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
        check_name(path, path.name)
        if not base or Path(base).is_file():
            raise ValueError(f"{name} is a transformer alone: give --base FOLDER, which has a VAE and text encoders")
        return Location(find_folder(base), path)
    if path.is_file():
        remedy = "give a FLUX folder, a LoRA, or a transformer with black-forest-labs' names, all of .safetensors"
        first_names = ", ".join(tensor_names(path, remedy)[:3])
        raise ValueError(f"{name} is no FLUX model, its tensors are {first_names} ...: {remedy}")
    if base:
        locate(base)  # --strength needs it; a misspelt base is reported even where nothing uses it
    folder = find_folder(name, "transformer")
    return Location(folder, folder / "transformer")


# ------------------------------------------------------------------------------------ a LoRA's base


def locate_base(lora: Path, base: str | None) -> Location:
    """The location of the model that a LoRA changes: `base`, or what the NOTE beside the LoRA names."""
    if base:
        if lora_file(base):
            raise ValueError(f"--base {base} is a LoRA too: give the whole model that {lora} was trained on")
        return locate(base)
    note = lora.parent / NOTE  # our own LoRAs have it; those of other trainers need --base
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


def find_folder(name: str | Path, *components: str) -> Path:
    """The model folder `name`, a path or a hub id.

    Raises ValueError if the folder lacks a component that its family has, or one of `components`.
    """
    folder = Path(name)
    if not folder.exists():
        folder = download_folder(str(name), components)
    # The class is checked first: for another kind of model a list of missing components is no help.
    components = *folder_family(folder).FROZEN, *components
    contents = sorted(path.name for path in folder.iterdir())
    absences = [component for component in components if component not in contents]
    if absences:
        raise ValueError(f"{folder} is incomplete: it lacks {', '.join(absences)}; it holds {', '.join(contents)}")
    return folder


def download_folder(name: str, components: tuple[str, ...]) -> Path:
    """The folder that huggingface_hub keeps of a hub id. ValueError if `name` is no hub id, or the download fails."""
    if name in DOWNLOADS:
        raise ValueError(f"no model at {name!r}; get it with\n{how_to_get(name)}")
    # A misspelt path must not go to the network: a path in a folder that exists, in weights/ or in runs/ is no hub id.
    parent = Path(name).parent
    is_path = Path(name).suffix == ".safetensors" or parent.is_dir() or parent.name in ("weights", "runs")
    if is_path or not HUB_ID.fullmatch(name):
        reason = "" if parent.is_dir() else f"there is no folder {parent}, "
        raise ValueError(f"no model at {name!r}: {reason}give a folder or file that exists, or a hub id owner/name")
    remedy = (
        f"no folder {name} is here: check name and network; for a gated model, accept its licence and `hf auth login`"
    )
    # The index is fetched and checked alone: nobody should wait for the weights of a model that cannot be used.
    download = partial(snapshot_download, allow_patterns=["model_index.json"])
    family = folder_family(Path(parse_file(name, download, remedy)))
    # The transformer's config.json describes the file that takes the place of its weights.
    patterns = [*(f"{component}/*" for component in (*family.FROZEN, *components)), "transformer/config.json"]
    download = partial(snapshot_download, allow_patterns=patterns)
    return Path(parse_file(name, download, remedy))


def folder_family(folder: Path) -> ModuleType:
    """The family of a folder, by its model_index.json. Raises ValueError naming the pipeline of any other model."""
    remedy = "give a folder of FluxPipeline or Flux2KleinPipeline"

    def pipeline_of(entries: dict[str, Any]) -> str:
        return "distilled" if entries.get("is_distilled") else entries["_class_name"]

    pipeline = parse_json(folder / "model_index.json", pipeline_of, remedy)
    check_name(folder, pipeline)
    for family in FAMILIES:
        if pipeline == family.PIPELINE:
            return family
    raise ValueError(f"{folder} is no FLUX model, its model_index.json says {pipeline}: {remedy}")


def check_name(source: Path, name: str) -> None:
    """Raise ValueError if a pipeline or a file has the name of a model that cannot be trained here."""
    for pattern, reason in REFUSED.items():
        if re.match(pattern, name):
            raise ValueError(f"{source} cannot be used ({name}): {reason}")
