"""Guidance by a second evaluation, v = v_neg + g (v_pos - v_neg), and its gradient, against autograd in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formats.folders import Pipeline, load_pipeline
from infra.meter import Meter
from leaps import Rollout, leap, leap_terms, rollout, sweep
from sample import encode, sample, velocity_of
from samples import Size, branch_counts, build_samples, metered
from tools import tiny_klein

PROMPTS = ["a photo of a circle", "two words"]
NEGATIVE = "blurry"
SCALE = 4.0
ROWS, COLUMNS, LENGTH = 2, 3, 40
SIGMAS = torch.tensor([1.0, 0.8, 0.55, 0.2, 0.0], dtype=torch.float64)
PICKS = (1, 3)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("klein") / "klein"
    tiny_klein.main(folder)
    pipe = load_pipeline(folder, text_length=LENGTH)
    for network in (pipe.flux, *pipe.encoders):
        network.double()
    pipe.compute = torch.float64
    return pipe


def guided_samples(pipe: Pipeline, guidance: float, detach_negative: bool = False, micro_batch: int | None = None):
    noise = torch.randn(2, ROWS * COLUMNS, 128, generator=torch.Generator().manual_seed(0)).double()
    samples, _ = build_samples(
        pipe,
        PROMPTS,
        Size(32, 48, ROWS, COLUMNS, SIGMAS),
        [],
        noise=lambda i: noise,
        generator=torch.Generator(),
        guidance=guidance,
        negative_prompt=NEGATIVE,
        detach_negative=detach_negative,
        micro_batch=micro_batch,
    )
    return samples


def written_out(pipe: Pipeline, detach: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided velocity as the paper on guidance writes it, by autograd."""
    texts = encode(pipe, PROMPTS), encode(pipe, [NEGATIVE] * 2)
    positive, negative = (velocity_of(pipe.flux, text, ROWS, COLUMNS, dtype=torch.float64) for text in texts)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v_neg = negative(x, sigma)
        if detach:
            v_neg = v_neg.detach()
        return v_neg + SCALE * (positive(x, sigma) - v_neg)

    return velocity


def flat_gradient(pipe: Pipeline, backward: Callable[[], None]) -> Tensor:
    pipe.flux.zero_grad()
    backward()
    return torch.cat([p.grad.flatten() for p in pipe.flux.parameters()])


def sweep_gradient(pipe: Pipeline, ro: Rollout, grad: Tensor, **options) -> Tensor:
    samples = guided_samples(pipe, SCALE, **options)
    return flat_gradient(pipe, lambda: sweep(samples.vjp, ro, leap_terms(ro, PICKS, 0.3), grad))


def test_the_velocity_is_the_guided_one(pipe):
    samples = guided_samples(pipe, SCALE)
    x, sigma = samples.noise(0), torch.tensor(0.7)
    with torch.no_grad():
        expected = written_out(pipe, detach=False)(x, sigma)
    torch.testing.assert_close(samples.velocity(x, sigma), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_gradient_of_two_leaps_is_autograds_of_the_guided_leaps(pipe, detach, micro_batch):
    """Through both branches, and their inputs; or with v_neg a constant."""
    ro = rollout(guided_samples(pipe, SCALE).velocity, guided_samples(pipe, SCALE).noise(0), SIGMAS)
    grad = torch.randn(ro.x[-1].shape, generator=torch.Generator().manual_seed(1)).double()
    got = sweep_gradient(pipe, ro, grad, detach_negative=detach, micro_batch=micro_batch)
    velocity = written_out(pipe, detach)
    expected = flat_gradient(pipe, lambda: leap(velocity, ro, PICKS, 0.3).backward(grad))
    assert (got - expected).norm() < 1e-12 * expected.norm()


def test_the_negative_branchs_gradient_matters(pipe):
    ro = rollout(guided_samples(pipe, SCALE).velocity, guided_samples(pipe, SCALE).noise(0), SIGMAS)
    grad = torch.randn(ro.x[-1].shape, generator=torch.Generator().manual_seed(1)).double()
    whole = sweep_gradient(pipe, ro, grad)
    assert (sweep_gradient(pipe, ro, grad, detach_negative=True) - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("guidance, detach, order", [(SCALE, False, "fbfb"), (SCALE, True, "fb"), (1.0, False, "fb")])
def test_one_branchs_activations_are_there_at_a_time(pipe, guidance, detach, order):
    samples = guided_samples(pipe, guidance, detach)
    events = []

    def note(network: torch.nn.Module, inputs: tuple, out: Tensor) -> None:
        events.append("f")
        out.register_hook(lambda grad: events.append("b"))

    hook = pipe.flux.register_forward_hook(note)
    samples.vjp(samples.noise(0), torch.tensor(0.7), samples.noise(0), wrt_x=True)
    hook.remove()
    assert "".join(events) == order


@pytest.mark.parametrize(
    "guidance, detach, counts", [(SCALE, False, (2, 2)), (SCALE, True, (2, 1)), (1, False, (1, 1))]
)
def test_both_evaluations_are_counted_and_a_scale_of_1_needs_one(pipe, guidance, detach, counts):
    config = pipe.flux.config
    assert branch_counts(config, guidance, detach) == counts
    meter = Meter(torch.device("cpu"))
    samples = metered(guided_samples(pipe, guidance, detach), meter, 2, *counts)
    calls = []
    hook = pipe.flux.register_forward_hook(lambda network, inputs, out: calls.append(len(out)))
    samples.velocity(samples.noise(0), torch.tensor(0.7))
    assert meter.without_gradient == sum(calls)
    samples.vjp(samples.noise(0), torch.tensor(0.7), samples.noise(0))
    hook.remove()
    assert meter.without_gradient + meter.with_gradient == sum(calls)


def test_flux_1_without_a_guidance_input_is_guided_too():
    """The negative prompt of FLUX.1 has a pooled vector as well."""
    pipe = load_pipeline(Path(__file__).parent.parent / "shapes" / "tiny-flux")
    plain, one, guided = (sample(pipe, PROMPTS, [0, 1], 2, 64, 64, guidance) for guidance in (None, 1, 3.0))
    assert torch.equal(plain, one) and (guided - plain).abs().mean() > 0.01
