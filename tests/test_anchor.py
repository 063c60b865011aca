"""--anchor: its gradient in closed form and by autograd through the whole objective, with a copy and with a LoRA."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from config import Config
from experiments.cells import cost, evaluations_of
from formats.folders import load_pipeline
from infra.anchor import anchored
from infra.checks import check_flags
from infra.distributed import Process, full_tensor, join, local_shard
from infra.meter import Meter
from leaps import Samples, leapalign, rollout, vjp_of
from sample import encode, token_grid, velocity_of
from start import Setup, batch_prompts
from tests.processes import spread

PROMPTS = ["a photo of a red circle", "a photo of three squares"]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return Config(out=Path("nonexistent"), batch=8, rollout_steps=4, eval_prompts=file, anchor=3.0)


# --------------------------------------------------------------------------------------- closed form


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def squared_distance(v: Tensor, near: Tensor) -> Tensor:
    return (v - near).square().mean((1, 2))


def hinge_of_norms(v: Tensor, near: Tensor) -> Tensor:
    """In root mean squares."""
    v, near = v.flatten(1), near.flatten(1)
    return torch.relu(v.norm(dim=1) - near.norm(dim=1)) / v[0].numel() ** 0.5


@pytest.mark.parametrize("anchor_on, distance_of", [("velocity", squared_distance), ("norm", hinge_of_norms)])
def test_the_gradient_is_the_methods_and_that_of_the_distance_at_a_fixed_state(anchor_on, distance_of):
    network, base = small_network(), small_network()
    with torch.no_grad():
        network[0].weight += 0.1  # longer for some samples, shorter for others
    x, u, sigma = torch.randn(5, 4, 3).double(), torch.randn(5, 4, 3).double(), torch.tensor(0.5).double()

    def velocity(of: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        return sigma * of(x)

    def method(s: Samples) -> dict[str, Tensor]:
        gradients.append(s.vjp(x, sigma, u, wrt_x=True))
        return {}

    def method_without_x(s: Samples) -> dict[str, Tensor]:
        gradients.append(s.vjp(x, sigma, u))
        return {}

    gradients: list[Tensor | None] = []
    samples = Samples(
        noise=None, sigmas=None, generator=None, reward=None, score=None, update=0,
        velocity=torch.no_grad()(partial(velocity, network)), base=torch.no_grad()(partial(velocity, base)),
        vjp=vjp_of(partial(velocity, network)), total=5,
    )  # fmt: skip
    logs, ours = [], []
    for case in (method, method_without_x):
        logs.append(anchored(case, 0.7, anchor_on)(samples))
        ours.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        network.zero_grad()
    into_x, nothing = gradients
    assert nothing is None

    leaf = x.clone().requires_grad_()
    v, near = velocity(network, leaf, sigma), velocity(base, x, sigma)
    distance = distance_of(v, near)
    (expected_x,) = torch.autograd.grad((u * v).sum(), leaf, retain_graph=True)
    expected = torch.autograd.grad((u * v).sum() + 0.7 * distance.mean(), list(network.parameters()))
    torch.testing.assert_close(into_x, expected_x, atol=1e-12, rtol=1e-10)
    for gradient in ours:
        torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]), atol=1e-12, rtol=1e-10)
    assert all(torch.allclose(log["anchor"], distance) for log in logs)
    if anchor_on == "norm":
        assert 0 < (distance > 0).sum() < 5


# ---------------------------------------------------------------------------------------- in a run


def move(flux: nn.Module, by: float) -> None:
    """Change the trained weights, the same way in every process."""
    with torch.no_grad():
        for p in flux.parameters():
            if p.requires_grad:
                local_shard(p).add_(by)


def gradient(cfg: Config, process: Process, by: float = 0.0, **changes) -> tuple[Tensor, dict[str, Tensor], Setup]:
    """A batch's gradient once the weights have moved, what was logged, and the inputs."""
    cfg = replace(cfg, **changes)
    setup = train.set_up(cfg, process)
    move(setup.pipe.flux, by)
    log = train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
    return gradient_in(setup), log, setup


def gradient_in(setup: Setup) -> Tensor:
    return torch.cat([full_tensor(p.grad).flatten() for p in setup.pipe.flux.parameters() if p.requires_grad])


@pytest.mark.parametrize("lora, anchor_on", [(None, "velocity"), (4, "velocity"), (None, "norm")])
def test_at_the_base_it_changes_nothing(cfg, lora, anchor_on):
    with join("cpu") as process:
        ours, log, _ = gradient(cfg, process, lora=lora, anchor_on=anchor_on)
        plain, _, _ = gradient(cfg, process, lora=lora, anchor=0.0)
    assert (log["anchor"] == 0).all()
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, 4])
def test_in_a_run_it_adds_the_gradient_of_the_distance_at_the_leap_states(cfg, lora):
    """By autograd through the distance, written out, with a network of its own for the base."""
    states: list[tuple[Tensor, Tensor]] = []
    by = 0.02 if lora else 1e-3  # of a LoRA it is the product of two such matrices that moves the network

    def recording(s: Samples) -> dict[str, Tensor]:
        def vjp(x: Tensor, sigma: Tensor, u: Tensor, wrt_x: bool = False) -> Tensor | None:
            states.append((x, sigma))
            return s.vjp(x, sigma, u, wrt_x)

        return leapalign(s._replace(vjp=vjp))

    with join("cpu") as process:
        ours, log, _ = gradient(cfg, process, by, lora=lora)
        plain, _, _ = gradient(cfg, process, by, lora=lora, anchor=0.0)
        setup = train.set_up(replace(cfg, lora=lora, anchor=0.0), process)
        move(setup.pipe.flux, by)
        train.accumulate_batch_gradient(cfg, replace(setup, method=recording), process, 0, Meter(process.device))
        prompts = batch_prompts(cfg, setup, 0)
        setup.pipe.flux.zero_grad()
        text, base = encode(setup.pipe, prompts), load_pipeline(cfg.model)
        size = token_grid(setup.pipe, 64, 64)
        distances = [
            (velocity_of(setup.pipe.flux, text, *size)(x, s) - velocity_of(base.flux, text, *size)(x, s).detach())
            .square()
            .mean((1, 2))
            for x, s in states
        ]
        for distance in distances:  # one after the other, as FSDP lets go of weights
            (cfg.anchor * distance.mean()).backward()
        added = gradient_in(setup)
    assert added.norm() > 0.01 * plain.norm()
    assert (ours - plain - added).norm() < 1e-3 * added.norm()
    torch.testing.assert_close(log["anchor"], torch.stack(distances).mean(0).detach(), atol=1e-6, rtol=1e-4)


def moved_gradient(cfg: Config) -> Tensor:
    with join("cpu") as process:
        return gradient(cfg, process, 1e-3)[0]


def test_it_is_the_same_on_two_ranks_and_in_parts(cfg):
    one = moved_gradient(cfg)
    for two in spread(2, moved_gradient, replace(cfg, rollout_batch=2, micro_batch=1)):
        assert (two - one).norm() < 5e-5 * one.norm()


def test_an_update_costs_what_is_counted(cfg):
    flags = "--rollout-steps 4 --batch 8 --anchor 3"
    with join("cpu") as process:
        setup, meter = train.set_up(cfg, process), Meter(process.device)
        train.accumulate_batch_gradient(cfg, setup, process, 0, meter)
    evaluations = meter.without_gradient + meter.with_gradient
    assert cost(evaluations, meter.with_gradient) == evaluations_of("leapalign", flags, 1)
    # Network and base at both leaps, and the second leap's gradient once more.
    assert evaluations_of("leapalign", flags, 1) == 8 * (4 + 2 * 3 + 2 * 2 + 3)


@pytest.mark.parametrize("flags", [dict(lora=4, lr=3e-3), dict(bf16=True, lean=True)])
def test_a_run_with_one_stays_nearer_to_the_base(cfg, flags):
    if "lean" in flags:
        pytest.importorskip("torchao")
    near, far = (apart_after(replace(cfg, anchor=anchor, **flags)) for anchor in (100.0, 0.0))
    assert 0 < near < 0.7 * far


def apart_after(cfg: Config, updates: int = 4) -> float:
    """Mean squared distance of the velocity from the base's, at the states of the base's rollout."""
    cfg = replace(cfg, decay=False)
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        run = train.make_state(cfg, setup.pipe.flux)
        for step in range(updates):
            train.one_update(cfg, setup, run, process, step)
        base, levels = load_pipeline(cfg.model), setup.sizes[0].sigmas
        text, size = encode(base, PROMPTS), token_grid(base, 64, 64)
        noise = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ro = rollout(velocity_of(base.flux, text, *size), noise, levels)
            ours = velocity_of(setup.pipe.flux, text, *size, None, setup.pipe.compute)
            apart = [(ours(x, sigma) - v).square().mean() for x, v, sigma in zip(ro.x, ro.v, ro.sigmas)]
    return torch.stack(apart).mean().item()


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(anchor=-1.0), "--anchor -1.0 is out of range"),
        (dict(anchor=0.0, anchor_on="norm"), "--anchor-on means nothing"),
    ],
)
def test_a_negative_one_and_a_form_without_one_are_refused(cfg, flags, words):
    with pytest.raises(ValueError, match=words), join("cpu") as process:
        check_flags(replace(cfg, **flags), process)
