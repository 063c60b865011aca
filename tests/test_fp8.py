"""--fp8: what a LoRA changes at a byte a weight, and what that costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from config import Config
from formats.folders import load_pipeline
from formats.lora import FILE
from infra.checks import check_flags
from infra.distributed import Process, full_tensor, join, local_shard
from infra.fp8 import Linear8, rounded, up_cast
from infra.meter import Meter
from sample import sample
from start import Setup
from tools.plan import Plan, kept_bytes, memory, planned_flux

ROOT = Path(train.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle", "a photo of three squares"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("prompts")
    (root / "few.txt").write_text("\n".join(PROMPTS) + "\n")
    return Config(out=root / "run", batch=8, rollout_steps=3, updates=2, eval_every=2, ema=0.5, lora=4, bf16=True,
                  fp8=True, eval_prompts=root / "few.txt")  # fmt: skip


def small_layer(dtype: torch.dtype = torch.float32) -> tuple[Linear8, nn.Linear]:
    """One in fp8, and a plain one of the same numbers."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 32).to(dtype).requires_grad_(False)
    small = Linear8(plain)
    weight, scale = rounded(plain.weight)
    small.weight.data, small.scale.data = weight, scale
    plain.weight.data = weight.to(dtype) * scale.to(dtype)
    return small, plain


def test_a_weight_is_off_by_a_sixteenth_at_most_or_by_what_is_nothing_in_its_row():
    torch.manual_seed(0)
    weight = torch.randn(64, 512) * torch.logspace(-4, 2, 64)[:, None]
    weight[3] = 0
    back = up_cast(*rounded(weight), torch.float32)
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) / 448 / 2**10)
    assert ((back - weight).abs() <= bound * 1.001).all()
    relative = ((back - weight).abs() / weight.abs())[weight.abs() > weight.abs().amax(1, keepdim=True) / 100]
    assert relative.mean() < 1 / 40


def test_a_layers_output_and_its_gradient_are_those_of_its_up_cast_weight():
    small, plain = small_layer()
    x = torch.randn(5, 7, 48, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    u = torch.randn(5, 7, 32)
    torch.testing.assert_close(small(x), plain(other))
    small(x).backward(u)
    plain(other).backward(u)
    torch.testing.assert_close(x.grad, other.grad)


def test_the_backward_keeps_no_up_cast_weight():
    small, plain = small_layer()
    x = torch.randn(2, 48, requires_grad=True)
    assert kept_bytes(lambda: small(x), small.parameters()) == 0
    assert kept_bytes(lambda: F.linear(x, plain.weight * 1.0, plain.bias), plain.parameters()) == 48 * 32 * 4


def network(setup: Setup) -> list[Tensor]:
    return list(setup.pipe.flux.parameters())


def gradient(cfg: Config, world: Process, round_weights: bool = False) -> Tensor:
    setup = train.set_up(cfg, world)
    with torch.no_grad():
        for name, p in setup.pipe.flux.named_parameters():
            if ".b." in name:
                p.fill_(0.01)  # with B = 0 there is no gradient in A
            if round_weights and "blocks" in name and p.ndim == 2 and not p.requires_grad:
                weight = local_shard(p)
                weight.copy_(up_cast(*rounded(weight), weight.dtype))
    train.batch_gradient(cfg, setup, world, 0, Meter(world.device))
    trained = [p.grad for p in network(setup) if p.requires_grad]
    return torch.cat([full_tensor(g).flatten().float() for g in trained])


def test_the_gradient_is_that_of_a_network_with_rounded_weights_and_near_that_of_bf16(base):
    with join("cpu") as world:
        exact = replace(base, bf16=False)
        small, rounded_ones = gradient(exact, world), gradient(replace(exact, fp8=False), world, round_weights=True)
        in_bf16 = gradient(replace(base, fp8=False), world)
    torch.testing.assert_close(small, rounded_ones, atol=1e-5, rtol=1e-3)
    assert F.cosine_similarity(small, in_bf16, dim=0) > 0.95


def test_frozen_layers_take_a_byte_a_weight(base):
    with join("cpu") as world:
        frozen = {fp8: [p for p in network(train.set_up(replace(base, fp8=fp8), world)) if not p.requires_grad]
                  for fp8 in (True, False)}  # fmt: skip
        held = {fp8: sum(p.numel() * p.dtype.itemsize for p in params) for fp8, params in frozen.items()}
        blocks = sum(p.numel() for p in frozen[True] if p.dtype == torch.float8_e4m3fn)
        scales = sum(p.numel() for p in frozen[True] if p.shape[-1:] == (1,))
    assert held[False] - held[True] == blocks - 4 * scales
    assert blocks > 0.9 * sum(p.numel() for p in frozen[False])


def test_the_plan_counts_what_is_held(base):
    with join("cpu") as world:
        pipe = train.set_up(base, world).pipe
    held = sum(p.numel() * p.dtype.itemsize for p in pipe.flux.parameters())
    with FakeTensorMode():
        flux = planned_flux(pipe.flux.config, base.lora, torch.bfloat16)
        parts = memory(Plan(size="64", text_length=12, lora=base.lora, fp8=True), 1, flux, torch.bfloat16)
    assert parts["weights"] == held


def test_a_run_draws_and_saves_a_lora_that_lies_over_the_base_as_it_was(base):
    with join("cpu") as world:
        setup = train.set_up(base, world)
        train.run(base, setup, world)
    assert (base.out / "final" / FILE).exists()
    before, after = (sample(load_pipeline(folder), PROMPTS, [0, 1], 4, 64, 64) for folder in (TINY, base.out / "final"))
    assert torch.isfinite(after).all() and 0 < (after - before).abs().mean() < 0.1


@pytest.mark.parametrize("flags", [dict(lora=None), dict(lean=True, lora=None)])
def test_without_a_lora_it_is_refused(base, flags):
    with pytest.raises(ValueError, match="--fp8 is for what a LoRA changes"), join("cpu") as world:
        check_flags(replace(base, **flags), world)
