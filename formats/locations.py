"""Where the parts of a model lie: a folder, a hub id, a LoRA over one of them, or a transformer in a file of its own.

    model_index.json  scheduler/  transformer/  vae/
    text_encoder/  tokenizer/        CLIP
    text_encoder_2/  tokenizer_2/    T5

A file with black-forest-labs' names, as flux1-dev.safetensors, may lie in place of transformer/, or anywhere, with a
folder of all else.
"""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from formats.lora import FILE, NOTE
from formats.lora_files import lora_file
from formats.reading import check_family, flux_file, kind_of_file, parse_file, tensor_names
from formats.weights import INDEX, WEIGHTS
from infra.files import put_back

PARTS = ("scheduler", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
SMALL = {  # files that a part needs beside its weights; of two after | one is enough
    "scheduler": ["scheduler_config.json"],
    "vae": ["config.json"],
    "text_encoder": ["config.json"],
    "tokenizer": ["tokenizer_config.json", "tokenizer.json|vocab.json"],
    "text_encoder_2": ["config.json"],
    "tokenizer_2": ["tokenizer_config.json", "tokenizer.json|spiece.model"],
}


class Location(NamedTuple):
    """Paths of a model on this disk."""

    folder: Path  # all parts but the transformer
    transformer: Path  # a folder, or a file with black-forest-labs' names
    lora: Path | None = None  # a LoRA's file, which lies over the transformer


def locate(name: str | Path, base: str | None = None) -> Location:
    """Where the model lies that `name` is: a folder or hub id, a LoRA, or a transformer's file.

    `base`, --base, is the folder or hub id that a LoRA lies over, if not the one that its NOTE names, and of the other
    parts of a transformer's file.  Raises ValueError naming what is missing, or what it is instead.
    """
    path = Path(name)
    put_back(path)
    if lora := lora_file(name):
        return find_base(path, lora, base)._replace(lora=lora)
    if flux_file(name):
        if not base:
            raise ValueError(f"{name} is a transformer alone: give --base FOLDER, which has a VAE and text encoders")
        if Path(base).is_file() or lora_file(base):
            raise ValueError(f"--base {base} must be a model folder, or a hub id: {name} is a transformer alone")
        return Location(find_folder(base, set(PARTS) - {"transformer"}), path)
    if path.is_file():
        kind = kind_of_file(tensor_names(path)) if path.suffix == ".safetensors" else "no .safetensors file"
        raise ValueError(f"{name} is {kind}: give a FLUX.1 model folder, a LoRA, or a transformer as published by BFL")
    folder = find_folder(name, set(PARTS))
    return Location(folder, transformer_in(folder))


def find_base(path: Path, lora: Path, base: str | None) -> Location:
    """Where the model lies that a LoRA changes: `base`, or what is beside it in its NOTE."""
    if base:
        if lora_file(base):
            raise ValueError(f"--base {base} is a LoRA too: give the whole model that {path} was trained on")
        if Path(base).is_file():
            raise ValueError(f"--base {base} is one file: give a folder that has it in place of its transformer/")
        return locate(base)
    home = lora.parent
    if not (home / NOTE).exists():
        raise ValueError(f"{path} is a LoRA that does not say what it changes: give --base FOLDER")
    note = parse_file(home / NOTE, lambda file: {k: home / v for k, v in json.loads(file.read_text()).items()})
    if "base" not in note:
        raise ValueError(f"cannot read {home / NOTE}: it names no base; give --base FOLDER")
    if not all(p.exists() for p in (lora, *note.values())):
        needs = " and ".join(f"its {what} at {where}" for what, where in note.items())
        raise ValueError(f"LoRA {path}: it needs its {FILE}, and {needs}, as {home / NOTE} says")
    return locate(note["transformer"], str(note["base"])) if "transformer" in note else locate(note["base"])


def find_folder(name: str | Path, parts: set[str]) -> Path:
    """The model folder at path `name` or of that hub id. Raises ValueError if it lacks some of `parts`."""
    folder = Path(name)
    if not folder.exists():
        # Where the parent exists, this is a path misspelt: only what can be nothing else goes to the network.
        is_file = folder.suffix == ".safetensors"
        if is_file or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")) or folder.parent.is_dir():
            kind = "file" if is_file else "model folder"
            raise ValueError(f"no {kind} at {str(name)!r}: give one that is there, or a hub id owner/name")
        remedy = "check name and network; for a gated model, accept its licence and `hf auth login`"
        # The first says what it is: nobody waits for the weights of another model.
        for files in (["model_index.json"], [*(f"{part}/*" for part in parts), "transformer/config.json"]):
            folder = Path(parse_file(str(name), partial(snapshot_download, allow_patterns=files), remedy))
            check_family(folder)
    check_family(folder)
    needs = {part: folder / part for part in ("model_index.json", *PARTS) if part in {"model_index.json", *parts}}
    if "transformer" in parts:
        needs["transformer"] = transformer_in(folder)
    if missing := [part for part, path in needs.items() if not path.exists()]:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise ValueError(f"{folder} is no whole FLUX folder: it lacks {', '.join(missing)}; it holds {found}")
    small = SMALL | ({"transformer": ["config.json"]} if needs.get("transformer") == folder / "transformer" else {})
    check_small_files(folder, small)
    return folder


def check_small_files(folder: Path, needs: dict[str, list[str]]) -> None:
    """Raise ValueError naming each small file that a model folder lacks: no reason to get all of it again."""
    absent = []
    for part, files in needs.items():
        for names in files:
            if not any((folder / part / name).exists() for name in names.split("|")):
                absent.append(str(folder / part / names.replace("|", " or ")))
    if absent:
        raise ValueError(f"missing: {', '.join(absent)}; copy or download {'it' if len(absent) == 1 else 'them'} alone")


def transformer_in(folder: Path) -> Path:
    """A model folder's transformer/, or the file in its place: beside it, or in it. Raises ValueError for several."""
    inside = folder / "transformer"
    if (inside / WEIGHTS).exists() or (inside / INDEX).exists():
        return inside
    files = [f for f in sorted([*folder.glob("*.safetensors"), *inside.glob("*.safetensors")]) if flux_file(f)]
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} transformers: give one, --model {files[0]} --base {folder}")
    return files[0] if files else inside
