"""--fp8: the frozen network under a LoRA at a byte a weight, and what that costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from config import Config
from formats.folders import load_pipeline
from formats.lora import FILE
from infra.checks import check_flags
from infra.distributed import Process, full_tensor, join, local_shard
from infra.fp8 import E4M3, Fp8Linear, quantize, up_cast
from infra.meter import Meter
from model import Flux
from sample import sample
from start import empty_flux
from tests.activations import kept_bytes
from tools.plan import memory

ROOT = Path(train.__file__).parent
TINY = ROOT / "shapes" / "tiny-flux"
PROMPTS = ["a photo of a red circle", "a photo of three squares"]


# ----------------------------------------------------------------------------------------------------- a layer


def fp8_and_fp32_layer() -> tuple[Fp8Linear, nn.Linear]:
    """A layer in fp8, and an fp32 one with the same rounded weights."""
    torch.manual_seed(0)
    fp32_layer = nn.Linear(48, 32).requires_grad_(False)
    layer = Fp8Linear(fp32_layer)
    layer.weight.data, layer.scale.data = quantize(fp32_layer.weight)
    fp32_layer.weight.data = layer.weight.float() * layer.scale
    return layer, fp32_layer


def test_the_error_of_a_weight_is_a_sixteenth_at_most_or_nothing_beside_its_row():
    torch.manual_seed(0)
    weight = torch.randn(64, 512) * torch.logspace(-4, 2, 64)[:, None]
    weight[3] = 0
    row_max = weight.abs().amax(1, keepdim=True)
    error = (up_cast(*quantize(weight), torch.float32) - weight).abs()
    bound = torch.maximum(weight.abs() / 16, row_max / 448 / 2**10)
    assert (error <= bound * 1.001).all()
    relative_error = (error / weight.abs())[weight.abs() > row_max / 100]
    assert relative_error.mean() < 1 / 40


def test_a_layers_output_and_its_gradient_are_those_of_its_up_cast_weight():
    layer, fp32_layer = fp8_and_fp32_layer()
    x = torch.randn(5, 7, 48, requires_grad=True)
    fp32_x = x.detach().clone().requires_grad_()
    u = torch.randn(5, 7, 32)
    y, fp32_y = layer(x), fp32_layer(fp32_x)
    torch.testing.assert_close(y, fp32_y)
    y.backward(u)
    fp32_y.backward(u)
    torch.testing.assert_close(x.grad, fp32_x.grad)


def test_no_up_cast_weight_is_kept_for_the_backward():
    layer, fp32_layer = fp8_and_fp32_layer()
    x = torch.randn(2, 48, requires_grad=True)
    assert kept_bytes(lambda: layer(x)) == 0
    weight = fp32_layer.weight  # times 1.0 it is a new tensor, as an up-cast weight is
    assert kept_bytes(lambda: F.linear(x, weight * 1.0, fp32_layer.bias)) == 48 * 32 * 4


# ------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("prompts")
    (root / "few.txt").write_text("\n".join(PROMPTS) + "\n")
    return Config(out=root / "run", batch=8, rollout_steps=3, updates=2, eval_every=2, ema=0.5, lora=4, bf16=True,
                  fp8=True, eval_prompts=root / "few.txt")  # fmt: skip


def network(cfg: Config, process: Process) -> Flux:
    return train.set_up(cfg, process).pipe.flux


def gradient(cfg: Config, process: Process, round_weights: bool = False) -> Tensor:
    """The gradient of all factors of a LoRA. `round_weights` rounds the frozen weights as --fp8 does."""
    setup = train.set_up(cfg, process)
    parameters = dict(setup.pipe.flux.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            if ".b." in name:
                p.fill_(0.01)  # with B = 0 there is no gradient in A
            if round_weights and "blocks" in name and p.ndim == 2 and not p.requires_grad:
                weight = local_shard(p)
                weight.copy_(up_cast(*quantize(weight), weight.dtype))
    train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
    return torch.cat([full_tensor(p.grad).flatten().float() for p in parameters.values() if p.requires_grad])


def test_the_gradient_is_that_of_a_network_with_rounded_weights_and_near_that_of_bf16(base):
    in_fp32 = replace(base, bf16=False)
    with join("cpu") as process:
        fp8 = gradient(in_fp32, process)
        rounded = gradient(replace(in_fp32, fp8=False), process, round_weights=True)
        bf16 = gradient(replace(base, fp8=False), process)
    torch.testing.assert_close(fp8, rounded, atol=1e-5, rtol=1e-3)
    assert F.cosine_similarity(fp8, bf16, dim=0) > 0.95


def count_bytes(params: list[Tensor]) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in params)


def test_frozen_layers_take_a_byte_a_weight(base):
    with join("cpu") as process:
        frozen = [p for p in network(base, process).parameters() if not p.requires_grad]
        bf16_frozen = [p for p in network(replace(base, fp8=False), process).parameters() if not p.requires_grad]
    e4m3_weights = sum(p.numel() for p in frozen if p.dtype == E4M3)
    scales = sum(p.numel() for p in frozen if p.shape[-1:] == (1,))
    assert count_bytes(bf16_frozen) - count_bytes(frozen) == e4m3_weights - 4 * scales
    assert e4m3_weights > 0.9 * sum(p.numel() for p in bf16_frozen)


def test_the_plan_counts_what_is_held(base):
    with join("cpu") as process:
        flux = network(base, process)
    weights = sum(p.numel() * p.dtype.itemsize for p in flux.parameters())
    planned = empty_flux(base, flux.config).to(torch.bfloat16)
    assert memory(replace(base, rollout_batch=1, micro_batch=1), 1, planned)["weights"] == weights


def test_a_run_draws_and_saves_a_lora_that_lies_over_the_base_as_it_was(base):
    with join("cpu") as process:
        train.run(base, train.set_up(base, process), process)
    final = base.out / "final"
    assert (final / FILE).exists()
    untuned, tuned = (sample(load_pipeline(folder), PROMPTS, [0, 1], 4, 64, 64) for folder in (TINY, final))
    assert torch.isfinite(tuned).all()
    assert 0 < (tuned - untuned).abs().mean() < 0.1


@pytest.mark.parametrize("flags", [dict(lora=None), dict(lean=True, lora=None)])
def test_without_a_lora_it_is_refused(base, flags):
    with pytest.raises(ValueError, match="--fp8"), join("cpu") as process:
        check_flags(replace(base, **flags), process)
