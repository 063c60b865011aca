"""Write models: whole or not at all, with no more than one file's worth of tensors in memory."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from families import NetworkConfig, family_of
from formats import sampling
from formats.folders import Pipeline
from formats.locations import Location
from formats.lora import save_lora
from formats.names import config_to_diffusers, empty_state, to_diffusers
from formats.reading import is_models_file
from formats.weights import INDEX, WEIGHTS, Tensors
from infra.distributed import Process, gathered_tensors, on_first_rank
from infra.files import replacing

SHARD_BYTES = 5e9  # of a file of a saved transformer, and of memory to save it
LINK_BYTES = 100e6  # a larger frozen file is linked, not copied


def write_model(folder: Path, pipe: Pipeline, process: Process) -> None:
    """Write the current weights, from rank 0: a model folder, or the LoRA alone if that is what was trained.

    At a path that ends with .safetensors, a file of the transformer alone, with black-forest-labs' names.
    Raises OSError, on all ranks, if the model cannot be written; `folder` then stays as it was.
    """
    is_lora = not all(p.requires_grad for p in pipe.flux.parameters())  # a LoRA's network is frozen
    # A LoRA is small, and bf16 would round its updates away. All else is saved in the dtype that it computes in.
    dtype = torch.float32 if is_lora else pipe.compute
    tensors = gathered_tensors(pipe.flux, dtype, process.rank)

    # Saved with the weights, so that sample.py and evaluate.py draw pictures as training did.
    settings = json.dumps(pipe.sampling)
    metadata = {sampling.FILE: settings}

    def write() -> None:
        try:
            with replacing(folder) as path:
                if is_lora:
                    save_lora(path, pipe.flux, tensors, base_entries(pipe.location), metadata)
                elif folder.suffix == ".safetensors":
                    save_single_file(path, pipe.flux.config, dtype, tensors, metadata)
                else:
                    save_pipeline(path, pipe.location.folder, pipe.flux.config, tensors)
                # A single file has these settings in its header.
                if path.is_dir():
                    (path / sampling.FILE).write_text(settings + "\n")
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            exhaust(tensors)  # a full disk here must not leave the other ranks waiting in an all-gather

    on_first_rank(write, meanwhile=lambda: exhaust(tensors))


def exhaust(tensors: Tensors) -> None:
    """Take part in the remaining all-gathers."""
    for _ in tensors:
        pass


def base_entries(location: Location) -> dict[str, str]:
    """What a LoRA's NOTE says of the model that the LoRA changes: its folder, and its transformer if that is a file."""
    entries = {"base": str(location.folder.resolve())}
    # A LoRA that lies over a single file needs that file and, for all else, the folder.
    if location.transformer != location.folder / "transformer":
        entries["transformer"] = str(location.transformer.resolve())
    return entries


# ------------------------------------------------------------------------------------------ folders


def save_pipeline(folder: Path, source: Path, config: NetworkConfig, state: Tensors) -> None:
    """Write a model folder: frozen components copied from `source`, a transformer from `state` (our names)."""

    def other_files(component: str, names: list[str]) -> list[str]:
        return [name for name in names if not is_models_file(Path(component) / name, source)]

    for component in family_of(config).FROZEN:
        target = folder / component
        shutil.copytree(source / component, target, dirs_exist_ok=True, copy_function=link_or_copy, ignore=other_files)
    shutil.copy(source / "model_index.json", folder)
    save_transformer(folder / "transformer", config, state)


def link_or_copy(source: str, target: str) -> None:
    """Copy a file, or link a large one: T5's 9.5 GB, which nobody edits, need not be on the disk for each run."""
    file = Path(source).resolve()  # a hub's cache is made of symbolic links
    if file.stat().st_size > LINK_BYTES:
        with suppress(OSError):  # another disk, or one without links
            Path(target).hardlink_to(file)
            return
    shutil.copy2(file, target)


def save_transformer(folder: Path, config: NetworkConfig, state: Tensors) -> None:
    """Write a diffusers `transformer/` folder from our names and tensors, in files of SHARD_BYTES.

    `state` may be an iterator, so that no more than a file of it is in memory; and it may be mapped from the folder
    that is replaced, which stays until the new one is complete.
    """
    with replacing(folder) as path:  # a new folder, which takes the place of the old one at the end
        path.mkdir()
        shard_keys = []
        for shard in diffusers_shards(config, state):
            # A shard's final name contains the number of shards, which is known at the end.
            save_file(shard, path / str(len(shard_keys)), metadata={"format": "pt"})
            shard_keys.append(list(shard))
        count = len(shard_keys)
        weight_map = {}
        for i, keys in enumerate(shard_keys):
            name = WEIGHTS
            if count > 1:
                name = f"{Path(WEIGHTS).stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            (path / str(i)).rename(path / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            # Readers find a tensor's file by the index.
            index = {"metadata": {}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (path / "config.json").write_text(json.dumps(config_to_diffusers(config), indent=2) + "\n")


def diffusers_shards(config: NetworkConfig, state: Tensors) -> Iterator[dict[str, Tensor]]:
    """The tensors of a transformer with diffusers' names, a file's worth at a time."""
    shard = {}
    for name, tensor in state:
        for key, rows in to_diffusers({name: tensor}, config).items():
            shard[key] = rows.detach().cpu().contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard.clear()  # not a new dict: the caller still holds this one, and 5 GB with it
    if shard:
        yield shard


# ----------------------------------------------------------------------------------------- one file


def save_single_file(
    file: Path, config: NetworkConfig, dtype: torch.dtype, state: Tensors, metadata: dict[str, str] | None = None
) -> None:
    """Write a transformer with black-forest-labs' names, as flux1-dev.safetensors, each tensor as it comes.

    safetensors' own function wants all tensors at once, 24 GB of them. The format: 8 bytes, the length of the header;
    the header, JSON of each tensor's dtype, shape and offsets; then the tensors.
    """
    # `state` has the network's order, so every offset is known before a tensor comes.
    dtype_name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header = {}
    start = 0
    for name, tensor in empty_state(config).items():
        end = start + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for header_name, (name, tensor) in zip(header, state, strict=True):
            # The offsets are written already: a tensor out of order would be read as another one.
            assert name == header_name
            tensor = tensor.detach().cpu().contiguous()
            out.write(tensor.view(torch.uint8).numpy().data)  # as bytes: numpy has no bf16
