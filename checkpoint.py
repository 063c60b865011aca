"""Checkpoints that a run can be killed around: written beside, renamed when whole, the newest few kept.

    RUN/checkpoints/step_000060/     weights, averaged weights and optimizer, a file a rank (torch's own format)

Training waits while a checkpoint is copied to the host's memory, and goes on while the copy is written.
A checkpoint resumes bitwise on as many ranks, and on any other number: pieces are cut anew.  All randomness is a
function of (seed, step), so there is no random state in it.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # which is no Exception
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map_only

from files import save
from lora import save_lora
from model import Flux
from parallel import World, gather, whole_tensors
from pipeline import Pipeline

SUMS = "sums.json"
OPTIONS = StateDictOptions(ignore_frozen_params=True)


class Run:
    """What training changes: the network's trained parameters, their averages and the optimizer.

    `lean` is for weights in bf16: they are rounded at random, so that updates smaller than their precision survive on
    average, the optimizer keeps 8 bits a moment, and the averages, in fp32, lie in the host's memory.
    """

    def __init__(self, flux: Flux, lr: float, weight_decay: float, lean: bool = False) -> None:
        self.flux = flux
        self.names, self.params = zip(*((n, p) for n, p in flux.named_parameters() if p.requires_grad))
        if lean:
            from torchao.optim import AdamW8bit

            self.optimizer = AdamW8bit(self.params, lr=lr, weight_decay=weight_decay, bf16_stochastic_round=True)
            eager = torch.compiler.set_stance("force_eager")  # it would compile a kernel for each shape
            self.optimizer.step = eager(self.optimizer.step)
        else:
            self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=weight_decay)
        # Cut as the network is.
        self.averaged = [p.detach().to("cpu" if lean else p.device, torch.float32, copy=True) for p in self.params]
        self.group = dist.new_group(backend="gloo")  # a writer's messages must not mix with the training's
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[Path | None] | None = None

    def state(self, step: int) -> dict[str, Any]:
        """All that a resumed run needs. Weights and averages are the live ones: loading fills them in place."""
        return {
            "flux": get_model_state_dict(self.flux, options=OPTIONS),
            "averaged": dict(zip(self.names, self.averaged, strict=True)),
            "optimizer": get_optimizer_state_dict(self.flux, self.optimizer, options=OPTIONS),
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


def folders(out: Path) -> list[Path]:
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


def save_checkpoint(out: Path, run: Run, step: int, keep: int) -> None:
    """Begin to write a checkpoint; `run.wait()` tells when it is there. One at a time: first waits for the last."""
    run.wait()
    state = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), run.state(step))
    run.written = run.writer.submit(write, out, state, step, keep, run.group)


def write(out: Path, state: dict[str, Any], step: int, keep: int, group: dist.ProcessGroup) -> Path | None:
    """Write a checkpoint and let go of all but the newest `keep`. None, and a warning, if it cannot be written."""
    folder = out / "checkpoints" / f"step_{step:06d}"
    part, rank = folder.with_suffix(".part"), dist.get_rank()
    reason, own = None, {}
    try:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        dist.barrier(group)
        dcp.save(state, checkpoint_id=part, process_group=group)
        own = sums([*part.glob(f"__{rank}_*"), *([part / ".metadata"] if rank == 0 else [])])
    except (Exception, CheckpointException) as error:  # whichever rank's disk is full, torch tells all of them
        reason = reason_of(error)
    everyone = gather((reason, own), group)
    failed = next((reason for reason, _ in everyone if reason), None)
    if rank == 0:
        if failed:
            shutil.rmtree(part, ignore_errors=True)
            newest, free = folders(out)[-1] if folders(out) else "none", shutil.disk_usage(out).free / 1e9
            print(
                f"warning: no checkpoint could be written ({failed}; {free:.1f} GB free); the newest is {newest}",
                file=sys.stderr,
            )
        else:
            (part / SUMS).write_text(json.dumps({k: v for _, own in everyone for k, v in own.items()}))
            shutil.rmtree(folder, ignore_errors=True)  # a step that is repeated after a fallback
            part.rename(folder)
            for old in folders(out)[:-keep]:
                shutil.rmtree(old)
    dist.barrier(group)
    return None if failed else folder


def check_sums(folder: Path) -> None:
    """Raise ValueError if a file is missing or is not what was written; each rank looks at its share of them."""
    written = json.loads((folder / SUMS).read_text())
    mine = sorted(written)[dist.get_rank() :: dist.get_world_size()]
    for name, crc in sums(folder / name for name in mine).items():
        if written[name] != crc:
            raise ValueError(f"{name} is not what was written")


def reason_of(error: BaseException) -> str:
    """The first cause of what torch wraps more than once, in a line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_newest(out: Path, run: Run, at: int | None = None) -> int:
    """Fill `run` from the newest checkpoint that can be read, and return its step; 0 if there is none.

    One that cannot be read is passed over with a warning, for the one before; `at` takes that of one step only.
    Raises ValueError if none can be read, or there is none at `at`.
    """
    found = [f for f in folders(out) if at is None or f.name == f"step_{at:06d}"]
    if at is not None and not found:
        raise ValueError(f"--at {at}: {out} has only {', '.join(f.name for f in folders(out)) or 'no checkpoint'}")
    for folder in reversed(found):
        state, reason = run.state(0), None
        try:
            check_sums(folder)
        except Exception as error:
            reason = reason_of(error)
        reasons = [r for r in gather(reason) if r]
        if not reasons:
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(run.flux, run.optimizer, state["optimizer"], options=OPTIONS)
            return int(state["step"])
        if dist.get_rank() == 0:
            print(f"warning: {folder} cannot be read ({reasons[0]}); trying the one before", file=sys.stderr)
    if found:
        raise ValueError(f"none of the checkpoints in {out / 'checkpoints'} can be read")
    return 0


# -------------------------------------------------------------------------------------- what a run is for


def write_model(folder: Path, pipe: Pipeline, world: World) -> str | None:
    """A folder of the current weights, as load reads, on rank 0, gathered a tensor at a time; renamed into place.

    Returns why it could not be written, and leaves what was there before.
    """
    part, old, flux = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old"), pipe.flux
    lora = not all(p.requires_grad for p in flux.parameters())  # all else is frozen then
    tensors, failed = whole_tensors(flux, torch.float32 if lora else pipe.compute, world.rank), None
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        try:
            if lora:
                save_lora(part, flux, tensors, str(pipe.folder.resolve()))
            else:
                save(part, pipe.folder, flux.config, tensors)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            failed = f"{folder} could not be written: {error}"
            shutil.rmtree(part, ignore_errors=True)
    for _ in tensors:  # the other ranks take part in the gathers
        pass
    return gather(failed)[0]
