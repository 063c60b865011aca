"""Model folders written: whole or not at all, a tensor at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from infra.distributed import World, on_first_rank, whole_tensors
from infra.files import replacing
from infra.folders import INDEX, PARTS, WEIGHTS, Pipeline
from infra.lora import save_lora
from infra.names import config_to_diffusers, to_diffusers
from model import FluxConfig

PIECE = 5e9  # bytes a file of a saved transformer, as published
Tensors = Iterator[tuple[str, Tensor]]


def write_model(folder: Path, pipe: Pipeline, world: World) -> None:
    """A folder of the current weights, as `load` reads, from rank 0, gathered a tensor at a time.

    Raises OSError, on all ranks, if it cannot be written; what was there before stays.
    """
    lora = not all(p.requires_grad for p in pipe.flux.parameters())  # all else is frozen then
    tensors = whole_tensors(pipe.flux, torch.float32 if lora else pipe.compute, world.rank)

    def write() -> None:
        try:
            with replacing(folder) as part:
                if lora:
                    save_lora(part, pipe.flux, tensors, str(pipe.folder.resolve()))
                else:
                    save(part, pipe.folder, pipe.flux.config, tensors)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            exhaust(tensors)

    on_first_rank(write, meanwhile=lambda: exhaust(tensors))


def exhaust(tensors: Tensors) -> None:
    """Take part in the gathers that are left."""
    for _ in tensors:
        pass


def save(folder: Path, source: Path, config: FluxConfig, state: Mapping[str, Tensor] | Tensors) -> None:
    """Write a model folder: frozen parts copied from `source`, a transformer from `state` (BFL names)."""
    if folder.resolve() != source.resolve():
        for part in set(PARTS) - {"transformer"}:
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True, copy_function=link_or_copy)
        shutil.copy(source / "model_index.json", folder)
    save_flux(folder / "transformer", config, state)


def link_or_copy(source: str, target: str) -> None:
    """Large files, which nobody edits, are linked where the disk is the same: T5 need not be there twice."""
    real = Path(source).resolve()  # a hub's cache is made of symbolic links
    if real.stat().st_size > 100e6:
        with suppress(OSError):
            Path(target).unlink(missing_ok=True)
            return Path(target).hardlink_to(real)
    shutil.copy2(real, target)


def save_flux(folder: Path, config: FluxConfig, state: Mapping[str, Tensor] | Tensors) -> None:
    """Write a diffusers `transformer/` folder from names (BFL's) and tensors, in files of PIECE bytes.

    `state` may be an iterator, so that no more than a file of it is in memory, and mapped from the folder that is
    replaced: what was there before stays until the new one is whole.
    """
    held: dict[str, Tensor] = {}
    pieces: list[list[str]] = []

    def flush(part: Path) -> None:
        pieces.append(list(held))
        save_file(held, part / f"{len(pieces)}", metadata={"format": "pt"})
        held.clear()

    with replacing(folder) as part:
        part.mkdir()
        for name, tensor in state.items() if isinstance(state, Mapping) else state:
            held |= {k: v.detach().cpu().contiguous() for k, v in to_diffusers({name: tensor}, config).items()}
            if sum(t.nbytes for t in held.values()) > PIECE:
                flush(part)
        if held:
            flush(part)
        total = len(pieces)
        names = [f"{Path(WEIGHTS).stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        names = names if total > 1 else [WEIGHTS]
        for i, name in enumerate(names):
            (part / f"{i + 1}").rename(part / name)
        if total > 1:
            index = {"metadata": {}, "weight_map": {key: name for name, keys in zip(names, pieces) for key in keys}}
            (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (part / "config.json").write_text(json.dumps(config_to_diffusers(config), indent=2) + "\n")
