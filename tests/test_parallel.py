"""One, two and four gloo processes: the same gradient, the same training, copies that agree."""

import os
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import start
import train
from config import Config
from formats.folders import load_pipeline
from infra import checkpoints
from infra.distributed import (
    Stop,
    check_alike,
    check_replicas,
    full_tensor,
    gathered_tensors,
    join,
    swapped,
)
from infra.meter import Meter
from leaps import rollout
from sample import encode, sample, token_grid, velocity_of
from tests.processes import spread
from tests.runs import run

ROOT = Path(train.__file__).parent
BASE = Config(
    out=Path("nonexistent"),
    batch=8,
    rollout_steps=3,
    updates=10,
    eval_every=100,
    eval_prompts=ROOT / "few.txt",
    ema=0.9,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("\n".join(lines[::60]) + "\n")
    return replace(BASE, eval_prompts=file)


def gradient_of(cfg: Config) -> Tensor:
    with join("cpu", cfg.shard) as process:
        setup = train.set_up(cfg, process)
        train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
        return torch.cat([full_tensor(p.grad).flatten() for p in setup.pipe.flux.parameters() if p.requires_grad])


def plain_gradient(cfg: Config) -> Tensor:
    """The gradient without any of this: a whole Flux, one batch."""
    pipe = load_pipeline(cfg.model)
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.accumulate_batch_gradient(cfg, replace(setup, pipe=pipe), process, 0, Meter(process.device))
    return torch.cat([p.grad.flatten() for p in pipe.flux.parameters()])


@pytest.fixture(scope="module")
def expected(base) -> Tensor:
    return spread(1, plain_gradient, base)[0]


@pytest.fixture(scope="module")
def in_fours(base) -> Tensor:
    """The same by four samples at a time, as each of two ranks computes them."""
    return spread(1, plain_gradient, replace(base, rollout_batch=4, micro_batch=4))[0]


SPLITS = {
    "one rank": (1, {}),
    "one rank, rollouts of 3, samples of 2": (1, dict(rollout_batch=3, micro_batch=2)),
    "two ranks": (2, {}),
    "two ranks, sample by sample": (2, dict(rollout_batch=2, micro_batch=1)),
    "two ranks, recomputing": (2, dict(recompute="blocks")),
    "two ranks that are copies": (2, dict(shard=1)),
    "two ranks, recomputing, in pairs": (2, dict(recompute="light", micro_batch=2)),
    "two ranks, encoders elsewhere": (2, dict(offload_encoders=True)),
    "four ranks": (4, {}),
    "two copies of two ranks": (4, dict(shard=2, micro_batch=1)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_gradient_is_the_mean_over_the_batch_however_it_is_split(name, base, expected, in_fours):
    world, changes = SPLITS[name]
    for gradient in spread(world, gradient_of, replace(base, **changes)):
        # Samples in smaller groups meet other kernels, which round otherwise; in float64 nothing is left of it.
        assert (gradient - expected).norm() < 5e-5 * expected.norm()
        if world == 2 and len(changes) < 2:
            assert (gradient - in_fours).norm() < 1e-6 * in_fours.norm()


def compiled_gradient(cfg: Config) -> tuple[Tensor, int]:
    """The gradient with --compile, all but the code generation, and how many graphs were captured."""
    graphs: list = []

    def capture(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=capture)
    return gradient_of(replace(cfg, compile=True)), len(graphs)


@pytest.mark.parametrize("world, changes", [(1, {}), (1, dict(recompute="light")), (2, dict(recompute="blocks"))])
def test_compiled_blocks_have_the_same_gradient(world, changes, base, expected):
    for gradient, graphs in spread(world, compiled_gradient, replace(base, **changes)):
        assert (gradient - expected).norm() < 5e-5 * expected.norm() and graphs >= 2, graphs


def gradients_in_double(cfg: Config, changes: list[dict]) -> list[Tensor]:
    Tensor.float = Tensor.double  # inside the reward; this process is of its own
    gradients = []
    for change in changes:
        now = replace(cfg, **change)
        with join("cpu") as process:
            setup = train.set_up(now, process)
        pipe = load_pipeline(now.model)
        pipe.compute, pipe.flux.recompute = torch.float64, now.recompute
        for model in (pipe.flux, pipe.vae, *pipe.encoders, setup.rewards[0].model):
            model.double()
        setup = replace(setup, pipe=pipe, sizes=[replace(s, sigmas=s.sigmas.double()) for s in setup.sizes])
        train.accumulate_batch_gradient(now, setup, process, 0, Meter(process.device))
        gradients.append(torch.cat([p.grad.flatten() for p in pipe.flux.parameters()]))
    return gradients


def test_in_float64_the_split_leaves_no_trace(base):
    changes = [
        dict(),
        dict(micro_batch=3),
        dict(micro_batch=1),
        dict(recompute="light"),
        dict(recompute="blocks"),
        dict(weight="none"),
    ]
    ((whole, *same, other),) = spread(1, gradients_in_double, base, changes)
    for gradient in same:
        assert (gradient - whole).norm() < 1e-12 * whole.norm()
    assert (other - whole).norm() > 0.1 * whole.norm()


def weights_after(cfg: Config) -> Tensor:
    with join("cpu", cfg.shard) as process:
        setup = train.set_up(cfg, process)
        run = train.make_state(cfg, setup.pipe.flux)
        for step in range(3):
            train.one_update(cfg, setup, run, process, step)
        return torch.cat([full_tensor(p).detach().flatten() for p in (*run.params.values(), *run.averages.values())])


def test_three_updates_of_training_are_the_same_on_one_two_and_four_ranks(base):
    # Sample by sample, on any number of ranks: larger groups meet other kernels, whose rounding AdamW enlarges.
    base = replace(base, batch=4, rollout_batch=1)
    one = spread(1, weights_after, base)[0]
    start = torch.cat([p.flatten() for p in load_pipeline(base.model).flux.parameters()])
    change = (one - torch.cat([start, start])).norm()  # of weights and averages
    assert change > 1e-3 * start.norm()  # it did learn
    for world, changes in ((2, {}), (4, dict(shard=2))):
        for weights in spread(world, weights_after, replace(base, **changes)):
            assert (weights - one).norm() < 5e-5 * change


# ------------------------------------------------------------------------------------------ collectives


class Gathers(TorchDispatchMode):
    """Counts the all-gathers that pass by."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def gathers_of_a_rollout(cfg: Config) -> int:
    """All-gathers of a rollout of 3 evaluations of the network."""
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        pipe = setup.pipe
        text = encode(pipe, ["a photo of a circle"] * 8)
        velocity = velocity_of(pipe.flux, text, *token_grid(pipe, 64, 64), None, pipe.compute)
        with Gathers() as gathers:
            rollout(velocity, torch.randn(8, 16, 32), setup.sizes[0].sigmas)
        return gathers.count


def test_each_evaluation_gathers_each_block_once(base):
    blocks, evaluations = 2 + 4 + 1, 3  # double blocks, single blocks, and the layers outside of them
    assert spread(2, gathers_of_a_rollout, base) == [evaluations * blocks] * 2


# ------------------------------------------------------------------------------------------- precision


def precisions(cfg: Config) -> dict[str, set]:
    with join("cpu") as process:
        setup = train.set_up(replace(cfg, bf16=True), process)
        seen = {"inside": set(), "times": set()}
        flux = setup.pipe.flux
        flux.double_blocks[0].img_mlp[0].register_forward_hook(
            lambda m, x, y: seen["inside"].add((x[0].dtype, m.weight.dtype))
        )
        flux.register_forward_pre_hook(lambda m, x: seen["times"].add((x[1].dtype, x[4].dtype)))
        measured = train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
        seen["gradients"] = {p.grad.dtype for p in flux.parameters()}
        seen["weights"] = {p.dtype for p in flux.parameters()}
        seen["finite"] = {measured["loss"].isfinite().all().item()}
        return seen


def test_bf16_is_inside_the_network_only(base):
    seen = spread(2, precisions, base)[0]
    assert seen["inside"] == {(torch.bfloat16, torch.bfloat16)}
    assert seen["times"] == {(torch.int64, torch.float32)}  # position ids, noise levels
    assert seen["gradients"] == seen["weights"] == {torch.float32} and seen["finite"] == {True}


# ------------------------------------------------------------------------------------------- agreement


def disagreements(cfg: Config) -> list[str]:
    with join("cpu", shard=1) as process:
        params = list(train.set_up(cfg, process).pipe.flux.parameters())
        check_alike({"--lr": 1.0})
        check_replicas(process, params)
        messages = []
        try:
            check_alike({"--lr": 1.0, "--seed": process.rank})
        except ValueError as error:
            messages.append(str(error))
        if process.rank == 1:
            with torch.no_grad():
                params[5].view(-1)[0] += 1e-4
        try:
            check_replicas(process, params)
        except Stop as stop:
            messages.append(stop.message)
        return messages


def test_ranks_that_differ_are_named(base):
    for flags, weights in spread(2, disagreements, base):
        assert flags == "--seed is 0 on rank 0, 1 on rank 1: start all with one command, code and files"
        assert "ranks 0 and 1, replicas, have different weights" in weights


def refusal_where_ranks_differ(cfg: Config, changes: list[dict]) -> str:
    with join("cpu") as process, pytest.raises(ValueError) as refusal:
        train.set_up(replace(cfg, **changes[process.rank]), process)
    return str(refusal.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lr=1.0), "--lr is 0.00014 on rank 0, 1.0 on rank 1"),
        (dict(model="no/such/model"), "rank 1: no model at 'no/such/model'"),
    ],
)
def test_what_is_wrong_on_one_rank_ends_all_before_weights_are_read(change, words, base):
    for message in spread(2, refusal_where_ranks_differ, base, [{}, change]):
        assert message.startswith(words)


def other_program(cfg: Config) -> str:
    with join("cpu") as process, pytest.raises(ValueError) as refusal:
        if process.rank == 1:
            start.HERE = ROOT / "shapes"
        train.set_up(cfg, process)
    return str(refusal.value)


def test_a_node_with_another_checkout_is_refused(base):
    assert all(message.startswith("this program is") for message in spread(2, other_program, base))


def unshared_folder(cfg: Config) -> str:
    """Rank 1 does not see what rank 0 writes, as on a node with a disk of its own."""
    if os.environ["RANK"] == "1":
        checkpoints.lock_text = lambda folder: ""
    return run(cfg)


def test_nodes_that_do_not_share_the_runs_folder_are_refused(base, tmp_path):
    for message in spread(2, unshared_folder, replace(base, out=tmp_path / "run")):
        assert "which all nodes must share, is 'process" in message and "'' on rank 1" in message


# --------------------------------------------------------------------------------------- loading, averages


def loaded(cfg: Config) -> dict[str, Tensor]:
    with join("cpu") as process:
        flux = train.set_up(cfg, process).pipe.flux
        assert all(p.to_local().numel() < p.numel() for p in flux.parameters() if p.shape[0] > 1)
        return dict(gathered_tensors(flux, torch.float32, process.rank))


def test_no_rank_holds_the_network_whole_and_together_they_hold_it_exactly(base):
    first, second = spread(2, loaded, base)
    theirs = load_pipeline(base.model).flux.state_dict()
    assert first.keys() == theirs.keys() and not second
    assert all(torch.equal(first[k], theirs[k]) for k in theirs)


def averages(cfg: Config) -> list[tuple[Tensor, Tensor]]:
    """The averaged weights after 4 updates, and sum_i (1 - ema) ema^(4 - i) theta_i + ema^4 theta_0."""
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        run = train.make_state(cfg, setup.pipe.flux)
        closed = [cfg.ema**4 * full_tensor(p).detach().double() for p in run.params.values()]
        for step in range(4):
            train.one_update(cfg, setup, run, process, step)
            for c, p in zip(closed, run.params.values()):
                c += (1 - cfg.ema) * cfg.ema ** (3 - step) * full_tensor(p).detach().double()
        with swapped(run.params.values(), run.averages.values()):
            inside = [full_tensor(p).detach().clone() for p in run.params.values()]
        return list(zip(inside, closed))


def test_the_average_is_its_closed_form(base):
    for average, closed in spread(2, averages, base)[0]:
        torch.testing.assert_close(average.double(), closed, atol=1e-7, rtol=1e-6)


def swaps(cfg: Config) -> bool:
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        run = train.make_state(cfg, setup.pipe.flux)
        train.one_update(cfg, setup, run, process, 0)
        assert not any(a.requires_grad for a in run.averages.values())
        draw = (setup.pipe, ["a photo of a circle"], [0], 2, 64, 64)
        first = sample(*draw)
        with torch.no_grad():
            next(iter(run.averages.values())).mul_(3)
        with swapped(run.params.values(), run.averages.values()):
            assert not torch.equal(sample(*draw), first)
        assert torch.equal(sample(*draw), first)  # nothing gathered before is used after
        before = [t.to_local().detach().clone() for t in (*run.params.values(), *run.averages.values())]
        with swapped(run.params.values(), run.averages.values()):
            moved = any(not torch.equal(t.to_local(), b) for t, b in zip(run.params.values(), before))
        return moved and all(
            torch.equal(t.to_local(), b) for t, b in zip((*run.params.values(), *run.averages.values()), before)
        )


def test_averages_are_swapped_in_and_back_bit_for_bit(base):
    assert all(spread(2, swaps, base))
    assert not dist.is_initialized()
