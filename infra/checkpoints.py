"""Checkpoints that a run can be killed around: written beside, renamed when whole, the newest few kept.

    RUN/checkpoints/step_000060/     weights, averaged weights and optimizer, a file per rank (torch's own format)

Training waits while a checkpoint is copied to the host's memory, and goes on while the copy is written.
A run resumed on as many ranks is bitwise the undisturbed one; on another number, where pieces are cut anew, it is that
up to rounding.  All randomness is a function of (seed, step), so there is no random state in a checkpoint.
"""

import gc
import json
import shutil
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # which is no Exception
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from infra.distributed import all_gather_objects
from infra.files import PART, beside, part_of, put_in_place
from model import Flux

SUMS = "sums.json"
OPTIONS = StateDictOptions(ignore_frozen_params=True)


class State:
    """What training changes: the network's trained parameters, their averages and the optimizer.

    `lean` is for weights in bf16: they are rounded at random, so that updates smaller than their precision survive on
    average, the optimizer keeps a byte per moment, and the averages, in fp32, lie in the host's memory.
    """

    def __init__(self, flux: Flux, lr: float, weight_decay: float, lean: bool = False) -> None:
        self.flux = flux
        self.names, self.params = zip(*((n, p) for n, p in flux.named_parameters() if p.requires_grad))
        if lean:
            from infra.lean import LeanAdamW  # torchao is not needed otherwise

            self.optimizer = LeanAdamW(self.params, lr=lr, weight_decay=weight_decay, bf16_stochastic_round=True)
        else:
            self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=weight_decay, fused=True)
        # Cut as the network is.
        self.averaged = [p.detach().to("cpu" if lean else p.device, torch.float32, copy=True) for p in self.params]
        # A writer's messages must not mix with the training's; it waits for other ranks as long as train.py does.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[Path | None] | None = None

    def state(self, step: int) -> dict[str, Any]:
        """All that a resumed run needs. The tensors are the live ones: loading fills them in place."""
        fresh = not self.optimizer.state
        optimizer = get_optimizer_state_dict(self.flux, self.optimizer, options=OPTIONS)
        if fresh:  # torch has just made the moments, by a step of nothing that it counts
            for moments in self.optimizer.state.values():
                moments["step"].zero_()
        return {
            "flux": get_model_state_dict(self.flux, options=OPTIONS),
            "averaged": dict(zip(self.names, self.averaged, strict=True)),
            "optimizer": optimizer,
            "step": torch.tensor(step),
        }

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr  # torchao keeps a tensor

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averages towards the weights."""
        for average, p in zip(self.averaged, self.params, strict=True):
            average.lerp_(p.to(average.device, average.dtype), 1 - decay)

    def wait(self) -> Path | None:
        """Until the checkpoint that is being written is there; None if none is, or if it failed."""
        return self.written and self.written.result()


def checkpoint_folders(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step_??????"))


def sums(files: Iterable[Path]) -> dict[str, int]:
    """A checksum of each file: torch's format reads back flipped bits without a word."""
    result = {}
    for file in files:
        crc = 0
        with file.open("rb") as opened:
            while piece := opened.read(1 << 24):
                crc = zlib.crc32(piece, crc)
        result[file.name] = crc
    return result


def save_checkpoint(out: Path, run: State, step: int, keep: int) -> None:
    """Begin to write a checkpoint; `run.wait()` tells when it is there. One at a time: first waits for the last."""
    run.wait()
    state = tree_map_only(Tensor, copied, run.state(step))
    run.written = run.writer.submit(write, out, state, step, keep, run.group)


def copied(t: Tensor) -> Tensor:
    """A copy in the host's memory. torchao's tensors, made of others, would hand out their own parts."""
    if isinstance(t, DTensor) or not is_traceable_wrapper_subclass(t):
        return t.detach().to("cpu", copy=True)
    names, made_of = t.__tensor_flatten__()
    parts = {name: copied(getattr(t, name)) for name in names}
    return type(t).__tensor_unflatten__(parts, made_of, t.shape, t.stride())


def write(out: Path, state: dict[str, Any], step: int, keep: int, group: dist.ProcessGroup) -> Path | None:
    """Write a checkpoint and let go of all but the newest `keep`. None, and a warning, if it cannot be written."""
    folder = out / "checkpoints" / f"step_{step:06d}"
    rank = dist.get_rank()
    reason, own = None, {}
    part = beside(folder, PART)
    if rank == 0:
        with suppress(OSError):  # what is wrong will be told by the writing, on all ranks
            part_of(folder)
    try:
        dist.barrier(group)
        # Without copying ahead, which would use the GPU from this thread, and the first one on every rank.
        writer = dcp.FileSystemWriter(part, per_thread_copy_ahead=0)
        dcp.save(state, checkpoint_id=part, storage_writer=writer, process_group=group)
        own = sums([*part.glob(f"__{rank}_*"), *([part / ".metadata"] if rank == 0 else [])])
    except (Exception, CheckpointException) as error:  # whichever rank's disk is full, torch tells all of them
        reason = reason_of(error)
    everyone = all_gather_objects((reason, own), group)
    failed = next((reason for reason, _ in everyone if reason), None)
    if rank == 0 and not failed:
        try:
            (part / SUMS).write_text(json.dumps({k: v for _, own in everyone for k, v in own.items()}))
            put_in_place(part, folder)  # a step that is repeated after a fallback has one there
        except OSError as error:
            failed = reason_of(error)
    failed = all_gather_objects(failed, group)[0]
    if failed:
        gc.collect()  # torch's errors hold the whole copy, in a circle
    if rank == 0:
        for old in [part] if failed else checkpoint_folders(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if rank == 0 and failed:
        newest, free = (
            checkpoint_folders(out)[-1] if checkpoint_folders(out) else "none",
            shutil.disk_usage(out).free / 1e9,
        )
        print(
            f"warning: no checkpoint could be written ({failed}; {free:.1f} GB free); the newest is {newest}",
            file=sys.stderr,
        )
    return None if failed else folder


def check_sums(folder: Path) -> None:
    """Raise ValueError if a file is missing or is not what was written; each rank looks at its share of them."""
    written = json.loads((folder / SUMS).read_text())
    my_files = sorted(written)[dist.get_rank() :: dist.get_world_size()]
    for name, crc in sums(folder / name for name in my_files).items():
        if written[name] != crc:
            raise ValueError(f"{name} is not what was written")


def reason_of(error: BaseException) -> str:
    """The first cause of what torch wraps more than once, in a line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_checkpoint(out: Path, run: State, at: int | None = None) -> int:
    """Fill `run` from the newest checkpoint that can be read, and return its step; 0 if there is none.

    One that cannot be read is passed over with a warning, for the one before; `at` takes that of one step only.
    Raises ValueError if there are some and none can be read.
    """
    found = [f for f in checkpoint_folders(out) if at is None or f.name == f"step_{at:06d}"]
    for folder in reversed(found):
        state, reason = run.state(0), None
        try:
            check_sums(folder)
        except Exception as error:
            reason = reason_of(error)
        reasons = [r for r in all_gather_objects(reason) if r]
        if not reasons:
            dcp.load(state, checkpoint_id=folder)
            return int(state["step"])
        if dist.get_rank() == 0:
            print(f"warning: {folder} cannot be read ({reasons[0]}); trying an older one, if any", file=sys.stderr)
    if found:
        raise ValueError(f"none of {', '.join(f.name for f in found)} in {out / 'checkpoints'} can be read")
    return 0
