"""Checkpoints that survive a kill at any moment: written beside, renamed when whole, the newest few kept.

    RUN/checkpoints/step_000060/     weights, averages and optimizers, a file per rank (torch.distributed.checkpoint)

Training waits while a checkpoint is copied to the host's memory, and continues while the copy is written to disk.
Resumed on the same number of ranks, a run is bitwise the undisturbed one where kernels are deterministic, as on CPUs;
on another number of ranks, where tensors are sharded anew, it is the same up to rounding. A checkpoint holds no random
state: randomness is a function of (seed, update).
"""

import gc
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, not an Exception
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from infra.distributed import all_gather_objects, check_alike
from infra.files import PART, beside, lock_text, part_of, put_in_place
from model import Flux

CHECKSUMS = "sums.json"
NEWEST = "newest_checkpoint"  # a file in the run's folder, which stays if the checkpoints are removed
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)  # the frozen weights under a LoRA are not saved


class State:
    """What training changes, and so what a checkpoint holds: trained weights, their averages, and optimizers.

    `optimizers` may be any of torch's or yours, one or several, which together hold the trained parameters. The
    averages are fp32, sharded as the weights are, and lie on `averages_device` (None: where the weights are).
    """

    def __init__(self, flux: Flux, optimizers: Sequence[Optimizer], averages_device: str | None = None) -> None:
        self.flux = flux
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = float(group["lr"])  # torch's name for what a schedule multiplies
        # In the order of the network, by the names that a checkpoint has.
        self.params = {name: p for name, p in flux.named_parameters() if p.requires_grad}
        self.averages = {}
        for name, param in self.params.items():
            device = averages_device or param.device
            self.averages[name] = param.detach().to(device, torch.float32, copy=True)
        # The writer's messages must not mix with the training's, so it has a group of ranks of its own.
        self.writer_group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self.writer = ThreadPoolExecutor(1)
        self.pending_write: Future[Path | None] | None = None

    def tensors(self, update: int) -> dict[str, Any]:
        """All that a resumed run needs. The tensors are the live ones, so that loading fills them in place."""
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        # Where an optimizer has no state yet, torch makes it by a step with zero gradients and a learning rate of 0.
        optimizer_state = get_optimizer_state_dict(self.flux, self.optimizers, options=TRAINED_ONLY)
        for optimizer in fresh:
            for param_state in optimizer.state.values():
                if isinstance(param_state.get("step"), Tensor):
                    param_state["step"].zero_()  # that step does not count
        return {
            "flux": get_model_state_dict(self.flux, options=TRAINED_ONLY),
            "averages": self.averages,
            "optimizer": optimizer_state,
            "step": torch.tensor(update),
        }

    def wait(self) -> Path | None:
        """Wait for the checkpoint that is being written. Returns its folder; None if there is none or if it failed."""
        return self.pending_write and self.pending_write.result()


def check_shared(out: Path) -> None:
    """Raise ValueError on all ranks unless all see the same folder of the run: each looks for the lock in it."""
    check_alike({f"what lies in --out {out}, which all nodes must share,": lock_text(out)})


def checkpoint_folders(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    # Unfinished and damaged ones have a suffix, so their names end without a number.
    folders = [f for f in (out / "checkpoints").glob("step_*") if f.name.removeprefix("step_").isdecimal()]
    return sorted(folders, key=update_of)


def what_is_saved(out: Path) -> str:
    """The end of a message that a run has stopped."""
    folders = checkpoint_folders(out)
    if folders:
        return f"{folders[-1]} is saved, --resume goes on from there"
    return "no checkpoint is saved, --resume starts again"


def checkpoint_name(update: int) -> str:
    return f"step_{update:06d}"


def update_of(folder: Path) -> int:
    """The number of updates that a checkpoint was saved after."""
    return int(folder.name.removeprefix("step_"))


# ----------------------------------------------------------------------------------------- writing


def save_checkpoint(out: Path, state: State, update: int, keep: int) -> None:
    """Copy the state, and write the copy in the background; `state.wait()` waits for it. One write at a time."""
    state.wait()  # two copies at once could fill the host's memory
    copy = tree_map_only(Tensor, copy_to_host, state.tensors(update))
    folder = out / "checkpoints" / checkpoint_name(update)
    state.pending_write = state.writer.submit(write, folder, copy, keep, state.writer_group)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory. A tensor subclass that wraps others (torchao's) is copied tensor by tensor."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().to("cpu", copy=True)
    names, context = tensor.__tensor_flatten__()
    inner = {name: copy_to_host(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def write(folder: Path, tensors: dict[str, Any], keep: int, group: dist.ProcessGroup) -> Path | None:
    """Write a checkpoint on all ranks, and remove all but the newest `keep`.

    Returns its folder. If it cannot be written, a full disk for instance, training goes on: None, and a warning.
    """
    rank = dist.get_rank()
    draft = beside(folder, PART)
    failure, checksums = write_files(draft, folder, tensors, group)
    ranks = all_gather_objects((failure, checksums), group)
    failures = [failure for failure, _ in ranks if failure]
    failure = failures[0] if failures else None
    if rank == 0 and not failure:
        failure = publish(draft, folder, [checksums for _, checksums in ranks])
    # Rank 0 alone renames the folder, so it alone knows whether that worked.
    failure = all_gather_objects(failure, group)[0]
    if failure:
        gc.collect()  # torch's exceptions hold the whole copy, in a reference cycle
    if rank == 0:
        out = folder.parent.parent
        if not failure:
            remove_old_checkpoints(out, keep)
        else:
            shutil.rmtree(draft, ignore_errors=True)
            free = shutil.disk_usage(out).free / 1e9
            text = f"warning: no checkpoint could be written ({failure}; {free:.1f} GB free): {what_is_saved(out)}"
            print(text, file=sys.stderr)
    return None if failure else folder


def remove_old_checkpoints(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run."""
    for folder in checkpoint_folders(out)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def write_files(
    draft: Path, folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup
) -> tuple[str | None, dict[str, int]]:
    """This rank's files of a checkpoint: why they could not be written, or None, and their checksums."""
    rank = dist.get_rank()
    try:
        if rank == 0:
            part_of(folder)  # removes what a killed run left
    except OSError:
        pass  # every rank meets the same error in dcp.save, where all of them can report it
    try:
        dist.barrier(group)
        # Copying ahead would use the GPU from this thread, and on every rank the first GPU.
        writer = dcp.FileSystemWriter(draft, per_thread_copy_ahead=0)
        dcp.save(tensors, checkpoint_id=draft, storage_writer=writer, process_group=group)
        files = list(draft.glob(f"__{rank}_*"))
        if rank == 0:
            files.append(draft / ".metadata")
        return None, checksums_of(files)
    except (Exception, CheckpointException) as error:  # torch raises on all ranks when one rank's disk is full
        return first_cause(error), {}


def publish(draft: Path, folder: Path, checksums_of_ranks: list[dict[str, int]]) -> str | None:
    """Give the whole checkpoint its name. Returns why it could not be done, or None."""
    merged: dict[str, int] = {}
    for checksums in checksums_of_ranks:
        merged |= checksums
    try:
        (draft / CHECKSUMS).write_text(json.dumps(merged))
        put_in_place(draft, folder)  # a resumed run whose first update is not finite saves its checkpoint again
        (folder.parent.parent / NEWEST).write_text(folder.name)
        return None
    except OSError as error:
        return first_cause(error)


def checksums_of(files: Iterable[Path]) -> dict[str, int]:
    """The CRC of each file by its name: torch's format reads flipped bits back without an error."""
    checksums = {}
    for file in files:
        checksum = 0
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                checksum = zlib.crc32(block, checksum)
        checksums[file.name] = checksum
    return checksums


def first_cause(error: BaseException) -> str:
    """The first cause of an exception that torch has wrapped several times, in a line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ----------------------------------------------------------------------------------------- reading


def load_checkpoint(out: Path, state: State, at: int | None = None) -> int:
    """Fill `state` from the newest checkpoint that can be read; returns its number of updates, 0 without any.

    A damaged checkpoint is passed over with a warning, for the one before it. `at` reads that update's only.
    Raises ValueError if there are checkpoints and none can be read.
    """
    folders = [f for f in checkpoint_folders(out) if at is None or update_of(f) == at]
    for folder in reversed(folders):
        # All ranks must take the same checkpoint, so one rank's damage counts for all.
        reasons = [reason for reason in all_gather_objects(damage_of(folder)) if reason]
        if not reasons:
            return read_into(state, folder)
        if dist.get_rank() == 0:
            text = f"warning: {folder} cannot be read ({reasons[0]}); trying an older one, if any"
            print(text, file=sys.stderr)
    if folders:
        names = ", ".join(folder.name for folder in folders)
        raise ValueError(f"none of {names} in {out / 'checkpoints'} can be read")
    return 0


def damage_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be read, or None. Each rank checks its share of the files."""
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text())
        names = sorted({".metadata", *recorded})[dist.get_rank() :: dist.get_world_size()]
        for name, checksum in checksums_of(folder / name for name in names).items():
            if recorded[name] != checksum:
                return f"{name} is not what was written"
    except Exception as error:
        return first_cause(error)
    return None


def read_into(state: State, folder: Path) -> int:
    """Fill weights, averages and optimizers in place; returns the number of updates."""
    # Each rank reads its own rows, from the files of whichever ranks wrote them.
    tensors = state.tensors(0)
    dcp.load(tensors, checkpoint_id=folder)
    # Tensors were filled in place. An optimizer that counts in Python numbers needs those put back.
    for name, param in state.params.items():
        loaded = tensors["optimizer"]["state"].get(name, {})
        numbers = {key: value for key, value in loaded.items() if not isinstance(value, Tensor)}
        for optimizer in state.optimizers:
            if param in optimizer.state:
                optimizer.state[param].update(numbers)
    return int(tensors["step"])
