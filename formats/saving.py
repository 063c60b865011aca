"""Model folders and files written: whole or not at all, a tensor at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.folders import Pipeline
from formats.locations import PARTS, Location
from formats.lora import save_lora
from formats.names import config_to_diffusers, to_diffusers
from formats.weights import INDEX, WEIGHTS
from infra.distributed import Process, gathered_tensors, on_first_rank
from infra.files import replacing
from model import Flux, FluxConfig

PIECE = 5e9  # bytes a file of a saved transformer, as published
Tensors = Iterator[tuple[str, Tensor]]


def write_model(folder: Path, pipe: Pipeline, process: Process) -> None:
    """A folder of the current weights, as `load` reads, from rank 0, gathered a tensor at a time.

    At a path that ends with .safetensors, a file of the transformer alone, with black-forest-labs' names.
    Raises OSError, on all ranks, if it cannot be written; what was there before stays.
    """
    one_file = folder.suffix == ".safetensors"
    lora = not all(p.requires_grad for p in pipe.flux.parameters())  # all else is frozen then
    tensors = gathered_tensors(pipe.flux, torch.float32 if lora else pipe.compute, process.rank)

    def write() -> None:
        try:
            with replacing(folder) as part:
                if lora:
                    save_lora(part, pipe.flux, tensors, base_of(pipe.location))
                elif one_file:
                    save_single_file(part, pipe.flux.config, pipe.compute, tensors)
                else:
                    save_pipeline(part, pipe.location.folder, pipe.flux.config, tensors)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            exhaust(tensors)

    on_first_rank(write, meanwhile=lambda: exhaust(tensors))


def exhaust(tensors: Tensors) -> None:
    """Take part in the gathers that are left."""
    for _ in tensors:
        pass


def base_of(location: Location) -> dict[str, str]:
    """What a LoRA's NOTE says of the model that it changes."""
    note, transformer = {"base": str(location.folder.resolve())}, location.transformer
    usual = transformer == location.folder / "transformer"
    return note if usual else note | {"transformer": str(transformer.resolve())}


def save_pipeline(folder: Path, source: Path, config: FluxConfig, state: Mapping[str, Tensor] | Tensors) -> None:
    """Write a model folder: frozen parts copied from `source`, a transformer from `state` (BFL names)."""
    if folder.resolve() != source.resolve():
        for part in set(PARTS) - {"transformer"}:
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True, copy_function=link_or_copy)
        shutil.copy(source / "model_index.json", folder)
    save_transformer(folder / "transformer", config, state)


def link_or_copy(source: str, target: str) -> None:
    """Large files, which nobody edits, are linked where the disk is the same: T5 need not be there twice."""
    real = Path(source).resolve()  # a hub's cache is made of symbolic links
    if real.stat().st_size > 100e6:
        with suppress(OSError):
            Path(target).unlink(missing_ok=True)
            return Path(target).hardlink_to(real)
    shutil.copy2(real, target)


def save_transformer(folder: Path, config: FluxConfig, state: Mapping[str, Tensor] | Tensors) -> None:
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


def save_single_file(file: Path, config: FluxConfig, dtype: torch.dtype, state: Tensors) -> None:
    """Write a transformer as flux1-dev.safetensors is, its names and tensors of one dtype, as they come.

    safetensors' own function wants all tensors at once, 24 GB of them.  Its format is the length of a header, 8 bytes;
    the header, JSON of each tensor's dtype, shape and place; then the tensors.
    """
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in Flux(config).named_parameters()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in wanted.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (found, tensor) in zip(wanted.items(), state, strict=True):
            assert (name, shape, dtype) == (found, tensor.shape, tensor.dtype), f"{found} instead of {name}"
            out.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
