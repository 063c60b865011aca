"""One code path from `python train.py` to several nodes: who is who, and how the network is cut between them.

Every parameter is cut along its first axis into a piece per rank (FSDP2).  A block's pieces are gathered just before it
runs and let go after; its gradients are averaged over the ranks as they appear.  Weights, gradients and optimizer are
fp32; what is gathered and computed is `dtype`; latents, step sizes, connectors and rewards never pass through here.

    whole world       one group: the least memory per rank
    --shard 8         groups of 8 ranks (a node), which hold copies of each other: gathers stay inside of a node (HSDP)

`python train.py` is a world of one. Its weights are cut, into one piece, where they compute in another dtype than fp32:
that is FSDP2's work, too. In fp32 there is none to do, and its hooks made forwards of the tiny Flux 6 to 14% longer and
backwards 12 to 24% (64 samples, one CPU thread). Nor are weights cut on a device that FSDP2 does not know, such as
Apple's GPUs (mps), where they compute in the dtype they have.
"""

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Flux

Item = TypeVar("Item")
CUT = ("cpu", "cuda")  # kinds of devices whose weights FSDP2 cuts


class Process(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # (shard,), or (replicate, shard) where groups hold copies of each other


# --------------------------------------------------------------------------------------- coming and going


def device_of(name: str) -> torch.device:
    """The device of a --device flag, such as cpu or cuda:1. Raises ValueError if it cannot compute here."""
    try:
        torch.ones(1, device=name).sum().item()
    except Exception as error:  # each kind of device fails in a way of its own
        raise ValueError(f"--device {name}: torch has no such device here; cpu works everywhere") from error
    return torch.device(name)


@contextmanager
def join(device: str, shard: int | None = None, patience: timedelta | None = None) -> Iterator[Process]:
    """The processes that torchrun started, or this one alone, until the end of the `with`.

    `shard` is the number of ranks that share a copy of the weights; None: all.  `patience` is how long ranks wait
    for each other.  Raises ValueError if `shard` does not divide the number of ranks, if there is no such device, or if
    several share one that is neither cpu nor cuda; a rank's own is cuda:LOCAL_RANK, or for one process cuda:N as given.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    group = size if shard is None else shard
    if group < 1 or size % group:
        raise ValueError(f"--shard {shard} does not divide the {size} ranks")
    kind, _, number = device.partition(":")
    if kind not in CUT and size > 1:
        raise ValueError(f"--device {device}: {size} ranks are joined on cpu or cuda; one alone takes any device")
    if kind == "cuda" and number and size > 1:
        raise ValueError(f"--device {device}: with {size} ranks each takes its own, write --device cuda")
    where = device_of(f"cuda:{number or local}" if kind == "cuda" else device)  # of GPUs this rank's own is touched
    if kind == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    alone = {} if size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=patience, **alone)
    try:
        shape, names = ((size,), ("shard",)) if group == size else ((size // group, group), ("replicate", "shard"))
        mesh = init_device_mesh(kind if kind in CUT else "cpu", shape, mesh_dim_names=names)
        yield Process(dist.get_rank(), size, where, mesh)
    finally:
        dist.destroy_process_group()
        gc.collect()  # gloo threads still holding work would abort the interpreter at exit


def all_gather_objects(item: Item, group: dist.ProcessGroup | None = None) -> list[Item]:
    """What each rank holds, in the order of ranks, on every rank: any object that pickles."""
    items: list[Item] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group)
    return items


def on_first_rank(run: Callable[[], Item], meanwhile: Callable[[], None] = lambda: None) -> Item:
    """run() on rank 0, its result on all ranks; what it raises is raised on all ranks. The others do `meanwhile`."""
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = run()
        except Exception as raised:
            error = raised
    else:
        meanwhile()
    result, error = all_gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result


class Stop(Exception):
    """The run must end before it is done; the exit code says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)  # both, so that it pickles
        self.code, self.message = code, message


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the signals that asked to stop within the `with`; handlers are undone at its end."""
    numbers: list[int] = []
    watched = [getattr(signal, name, None) for name in ("SIGTERM", "SIGUSR1", "SIGINT")]  # Windows lacks SIGUSR1
    before = {n: signal.signal(n, lambda number, _: numbers.append(number)) for n in watched if n is not None}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- the network


def shard_flux(flux: Flux, process: Process, dtype: torch.dtype) -> None:
    """Cut a Flux, block by block: weights and reductions in fp32, gathers and compute in `dtype`; or leave it as it is.

    Inputs are not cast: `velocity_of` gives each its precision, and integer ids and fp32 times must stay so.
    """
    if process.device.type not in CUT or (process.world_size == 1 and dtype == torch.float32):
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing here is in place
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*flux.double_blocks, *flux.single_blocks, flux]:
        # The root too lets go of its weights: what it kept would be stale once `swapped` has changed the pieces.
        fully_shard(block, mesh=process.mesh, mp_policy=policy, reshard_after_forward=True)


@torch.no_grad()
def fill(flux: Flux, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give a Flux without memory its weights: each rank keeps its piece of a tensor, then reads the next."""
    flux.to_empty(device=device)
    params = dict(flux.named_parameters())
    for name, tensor in tensors:
        p = params[name]
        if isinstance(p, DTensor):
            tensor = distribute_tensor(tensor.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(tensor)


def local_shard(p: Tensor) -> Tensor:
    """This rank's piece of a tensor that may be cut."""
    return p.to_local() if isinstance(p, DTensor) else p


def full_tensor(t: Tensor) -> Tensor:
    """A tensor that may be cut, gathered; all ranks must ask for it together."""
    return t.full_tensor() if isinstance(t, DTensor) else t


@contextmanager
def swapped(params: Sequence[Tensor], averaged: Sequence[Tensor]) -> Iterator[None]:
    """Within, the parameters hold the averages, rounded if need be; their own values wait in the host's memory."""
    held = [p.detach().to("cpu", copy=True) for p in params]
    try:
        copy_values(averaged, params)
        yield
    finally:
        copy_values(held, params)


@torch.no_grad()
def copy_values(values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def gathered_tensors(flux: Flux, dtype: torch.dtype, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Names and trained tensors, each gathered in turn, on rank 0; the others must exhaust it too, and get nothing."""
    for name, p in flux.named_parameters():
        if not p.requires_grad:  # what a LoRA changes is in the base's folder
            continue
        tensor = full_tensor(p.detach())
        if rank == 0:
            yield name, tensor.to("cpu", dtype)


# ----------------------------------------------------------------------------------------------- agreement


@torch.no_grad()
def weights_hash(parameters: Iterable[Tensor]) -> int:
    """A number that differs if any weight does; of cut ones, of the pieces that this rank holds."""
    pieces = [local_shard(p) for p in parameters]
    wide = (x if x.device.type == "mps" else x.double() for x in pieces if x.numel())  # Apple's GPUs have no float64
    sums = [torch.stack([x.sum(), (x * x).sum()]).cpu() for x in wide]
    return hash(tuple(torch.stack(sums).flatten().tolist())) if sums else 0


def check_agreement(process: Process, everywhere: dict[str, Any], params: Iterable[Tensor]) -> None:
    """Raise Stop where ranks differ in what must be the same: `everywhere`, or copies of the same pieces of weights."""
    piece = process.mesh.get_local_rank("shard")
    everyone = all_gather_objects((piece, everywhere, weights_hash(params)))
    for rank, (its_piece, its_values, its_weights) in enumerate(everyone):
        if differing := [key for key in everywhere if its_values[key] != everyone[0][1][key]]:
            raise Stop(1, f"rank {rank} has gone its own way: its {differing[0]} are not rank 0's; --resume goes on")
        first = next(i for i, (p, *_) in enumerate(everyone) if p == its_piece)  # that holds the same piece
        if its_weights != everyone[first][2]:
            raise Stop(1, f"rank {rank} has gone its own way: its weights are not rank {first}'s; --resume goes on")
