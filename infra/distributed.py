"""Processes of a run: how they join, what they exchange, and how tensors that FSDP2 shards are filled and read.

`python train.py` alone is a process group of one rank, by the same path as `torchrun` on several nodes. train.py calls
`fully_shard`; here is what a sharded tensor needs around that call. A parameter that FSDP2 shards is a DTensor: each
rank holds some of its rows.
"""

import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Flux

Item = TypeVar("Item")
FSDP_DEVICES = ("cpu", "cuda")  # kinds of devices on which FSDP2 shards; Apple's GPUs (mps) are not among them
STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")


class Process(NamedTuple):
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard") where groups of ranks hold replicas of each other


class Stop(Exception):
    """The run must end before it is done; the exit code says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)  # both, so that the exception can be pickled and raised on all ranks
        self.code = code
        self.message = message


# ----------------------------------------------------------------------------------------- joining


def device_of(name: str) -> torch.device:
    """The device of a --device flag, such as cpu or cuda:1. Raises ValueError if torch cannot compute on it."""
    try:
        torch.ones(1, device=name).sum().item()
    except Exception as error:  # each kind of device fails in its own way
        raise ValueError(f"--device {name}: torch has no such device here; cpu works everywhere") from error
    return torch.device(name)


@contextmanager
def join(device: str, shard: int | None = None, timeout: timedelta | None = None) -> Iterator[Process]:
    """The process group that torchrun started, or a group of this process alone, until the end of the `with` block.

    `shard` is the number of ranks that share one copy of the weights; None: all ranks. `timeout` is how long ranks
    wait for each other. Each rank takes cuda:LOCAL_RANK; a single process may name its GPU, such as cuda:1.
    Raises ValueError if `shard` does not divide the number of ranks, or if the device cannot be used.
    """
    # torchrun sets these variables; without torchrun there is one rank.
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    shard_ranks = world_size if shard is None else shard
    if shard_ranks < 1 or world_size % shard_ranks:
        raise ValueError(f"--shard {shard} does not divide the {world_size} ranks")
    device_kind, _, device_number = device.partition(":")
    if world_size > 1 and device not in FSDP_DEVICES:
        raise ValueError(f"--device {device}: {world_size} ranks take cpu or cuda, without a number, and one rank any")
    if device_kind == "cuda":
        # A rank touches no other rank's GPU: even a question to a GPU takes memory there for the process's lifetime.
        rank_device = device_of(f"cuda:{device_number or local_rank}")
        torch.cuda.set_device(rank_device)
    else:
        rank_device = device_of(device)

    # gloo carries tensors and objects of the CPU (checkpoints, logs), nccl those of GPUs.
    backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
    if world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh_device = device_kind if device_kind in FSDP_DEVICES else "cpu"
        if shard_ranks == world_size:
            mesh = init_device_mesh(mesh_device, (world_size,), mesh_dim_names=("shard",))
        else:
            # HSDP: the all-gathers of weights stay inside of a group, such as the 8 GPUs of a node.
            replicas = world_size // shard_ranks
            mesh = init_device_mesh(mesh_device, (replicas, shard_ranks), mesh_dim_names=("replicate", "shard"))
        yield Process(dist.get_rank(), world_size, rank_device, mesh)
    finally:
        dist.destroy_process_group()
        gc.collect()  # gloo threads that still hold work would abort the interpreter at exit


# ------------------------------------------------------------------------------ objects and signals


def all_gather_objects(item: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """The objects of all ranks, in the order of ranks, on every rank. Objects are pickled: use it for small ones."""
    items: list[Item] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group)
    return items


def attempt(run: Callable[[], Item]) -> tuple[Item | None, Exception | None]:
    """run(), and the exception that it raises: the other ranks wait for an answer, which must come in any case."""
    try:
        return run(), None
    except Exception as error:
        return None, error


def on_first_rank(run: Callable[[], Item], meanwhile: Callable[[], None] = lambda: None) -> Item:
    """run() on rank 0; its result, or the exception that it raises, on all ranks. The other ranks do `meanwhile`."""
    answer = attempt(run if dist.get_rank() == 0 else meanwhile)
    result, error = all_gather_objects(answer)[0]
    if error is not None:
        raise error
    return result


def on_every_rank(run: Callable[[], Item]) -> Item:
    """run() on each rank. If one rank raises, all raise: no rank waits for another that has ended.

    The message of a ValueError or OSError names the first rank that raised. Another error, which is a fault of the
    program, is raised as it is where it happened.
    """
    result, error = attempt(run)
    if error is not None and (dist.get_world_size() == 1 or not isinstance(error, ValueError | OSError)):
        all_gather_objects(f"{type(error).__name__}: {error}")
        raise error
    for rank, text in enumerate(all_gather_objects(error and str(error))):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")
    return result


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the signals that asked the process to stop within the block; old handlers return at its end."""
    # A handler only notes the signal. The loop looks at the list where it can save: between two updates.
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    old_handlers = {}
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)  # Windows lacks SIGUSR1 and SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            old_handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------- sharded tensors


@torch.no_grad()
def fill(flux: Flux, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give a network on the meta device its memory and its weights, read one tensor at a time.

    Every rank reads every tensor and keeps its own rows, so no rank ever holds the whole network.
    """
    flux.to_empty(device=device)
    params = dict(flux.named_parameters())
    for name, tensor in tensors:
        param = params[name]
        if isinstance(param, DTensor):
            tensor = tensor.to(param.dtype)
            # src_data_rank=None: every rank has the data, nothing is sent.
            tensor = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(tensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A whole tensor on every rank: shards are all-gathered, partial sums reduced. All ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_tensors(flux: Flux, dtype: torch.dtype, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Names and trained tensors, all-gathered one at a time, in the host's memory of rank 0.

    The other ranks must exhaust the iterator too: they take part in each all-gather and get nothing.
    """
    for name, param in flux.named_parameters():
        if not param.requires_grad:  # the frozen weights under a LoRA are in the base model's folder
            continue
        tensor = full_tensor(param.detach())
        if rank == 0:
            yield name, tensor.to("cpu", dtype)


@contextmanager
def swapped(params: Sequence[Tensor], averages: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, the parameters hold the averages; their own values wait in the host's memory."""
    saved = [param.detach().to("cpu", copy=True) for param in params]  # a GPU may have no room for them
    try:
        copy_values(averages, params)
        yield
    finally:
        copy_values(saved, params)


@torch.no_grad()
def copy_values(values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


# --------------------------------------------------------------------------------------- agreement


@torch.no_grad()
def weights_hash(params: Iterable[Tensor]) -> int:
    """A checksum of this rank's shards: the sum and the sum of squares of each tensor."""
    sums = []
    for param in params:
        shard = local_shard(param)  # no all-gather: each rank looks at its own rows
        if not shard.numel():
            continue
        if shard.device.type != "mps":  # Apple's GPUs have no float64
            shard = shard.double()
        sums.append(torch.stack([shard.sum(), (shard * shard).sum()]).cpu())
    return hash(tuple(torch.stack(sums).flatten().tolist())) if sums else 0


def check_alike(shared: dict[str, Any]) -> None:
    """Raise ValueError on all ranks, naming the first of the values that is not the same on all."""
    ranks = all_gather_objects(shared)
    for rank, values in enumerate(ranks):
        for name, value in values.items():
            if value != ranks[0][name]:
                difference = f"{name} is {ranks[0][name]!r} on rank 0, {value!r} on rank {rank}"
                raise ValueError(f"{difference}: start all with one command, code and files")


def check_replicas(process: Process, params: Iterable[Tensor]) -> None:
    """Raise Stop on all ranks if ranks that hold the same rows of the weights hold different values."""
    shard_index = process.mesh.get_local_rank("shard")
    first_with_shard: dict[int, int] = {}
    hashes = all_gather_objects((shard_index, weights_hash(params)))
    for rank, (index, weights) in enumerate(hashes):
        replica = first_with_shard.setdefault(index, rank)
        if weights != hashes[replica][1]:
            raise Stop(1, f"ranks {replica} and {rank}, replicas, have different weights: --resume restarts them alike")
