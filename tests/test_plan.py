"""plan.py's counts against what the tiny model really keeps, holds and sends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

import train
from config import Config
from infra.distributed import join, local_shard
from infra.meter import Meter, network_flops
from model import FLUX_DEV, Flux
from recipe.models import TINY
from tests.processes import spread
from tools import plan
from tools.plan import ENCODERS, LENT, Plan, decode_bytes, flux_inputs, kept_bytes, leap_bytes, planned_flux, traffic

CONFIG = replace(
    FLUX_DEV, hidden_size=128, num_heads=4, axes_dim=(8, 12, 12), depth=2, depth_single_blocks=3, context_in_dim=96
)


@pytest.mark.parametrize("size, published", [(512, 21.5), (720, 37.0)])
def test_an_evaluation_of_flux_dev_costs_what_is_known(size, published):
    with torch.device("meta"):
        flux = Flux(FLUX_DEV)
    assert network_flops(flux, (size // 16) ** 2, 512).forward / 1e12 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("lora, recompute", [(None, False), (None, True), (8, False), (8, True)])
def test_floating_point_operations_are_those_that_torch_counts(lora, recompute):
    flux, image, text = planned_flux(CONFIG, lora, torch.float32), 64, 20
    flux.recompute = recompute
    img, *others = flux_inputs(CONFIG, 1, image, text, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):  # no other attention is counted on a CPU
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            flux(img, *others)
        with FlopCounterMode(display=False) as both:
            v = flux(img.requires_grad_(), *others)
            v.backward(torch.zeros_like(v))
    cost = network_flops(flux, image, text)
    assert cost.forward == forward.get_total_flops()
    assert cost.both == pytest.approx(both.get_total_flops(), rel=0.01)  # but for gradients in inputs that have none


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_counted_without_memory_are_those_that_a_real_leap_keeps(recompute):
    with FakeTensorMode():
        counted = leap_bytes(Flux(CONFIG), 2, 64, 20, torch.float32, recompute)
    real = leap_bytes(Flux(CONFIG), 2, 64, 20, torch.float32, recompute)
    assert counted == real
    assert counted > 2 * 64 * 128 * 4 * 5  # at least a tensor a block


def test_recomputing_keeps_less():
    with FakeTensorMode():
        flux, vae = planned_flux(FLUX_DEV, None, torch.bfloat16), plan.flux_vae()
        much, little = (leap_bytes(flux, 1, 2025, 512, torch.bfloat16, r) for r in (False, True))
        assert little < 0.2 * much
        much, little = (decode_bytes(vae, 1, 90, 90, r) for r in (False, True))
        assert little < 0.8 * much


def test_of_t5_all_layers_but_one_are_lent():
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    layers = [sum(p.numel() for p in layer.parameters()) for layer in t5.encoder.block]
    assert sum(layers[1:]) == LENT
    assert ENCODERS - sum(p.numel() for p in t5.parameters()) == 123_060_480


def test_kept_memory_is_counted_once_and_without_parameters():
    w, x = torch.nn.Parameter(torch.ones(50, 50)), torch.ones(10, 50, requires_grad=True)
    assert kept_bytes(lambda: (x @ w).exp().sum() + (x * x).sum(), [w]) == 10 * 50 * 4 * 2  # x, and exp's result


class Sent(TorchDispatchMode):
    """Adds up what collectives bring and reduce on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.reduced = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "allgather_base" in name:
            self.gathered += args[0].nbytes - args[1].nbytes
        if "reduce_scatter_base" in name:
            self.reduced += args[1].nbytes - args[0].nbytes
        return function(*args, **(kwargs or {}))


def sent(cfg: Config) -> tuple[int, int, int]:
    with join("cpu") as world:
        setup = train.set_up(cfg, world)
        run = train.make_state(cfg, setup.pipe.flux)
        train.one_update(cfg, setup, run, world, 0)
        with Sent() as seen:
            train.batch_gradient(cfg, setup, world, 1, Meter(world.device))
        held = sum(local_shard(t).nbytes for p in run.params for t in (p, p.grad))
        held += sum(local_shard(t).nbytes for t in (*run.averaged, *(setup.base.parameters() if setup.base else ())))
        moments = (v for s in run.optimizer.state.values() for k, v in s.items() if k != "step")
        return seen.gathered, seen.reduced, held + sum(local_shard(t).nbytes for t in moments)


@pytest.mark.parametrize("flags", [{}, dict(keep_gathered=True), dict(anchor=1.0)])
def test_bytes_held_and_sent_by_two_ranks_are_those_counted(flags):
    flags = dict(batch=8, rollout_steps=3, rollout_batch=2, micro_batch=1, **flags)
    flux = planned_flux(TINY, None, torch.float32)
    told = Plan(size="64", text_length=12, **flags)
    counted = traffic(told, 2, flux, torch.float32, network_flops(flux, 16, 12))
    parts = plan.memory(told, 2, flux, torch.float32)
    held = sum(parts[name] for name in ("weights", "gradients", "averages", "optimizer", "base"))
    assert held == (6 if told.anchor else 5) * plan.size_of(flux.parameters(), torch.float32) / 2
    cfg = Config(out=Path("nonexistent"), **flags)
    for gathered, reduced, real in spread(2, sent, cfg):
        assert (gathered, reduced) == (counted["gathered"], counted["reduced"])
        assert real == held


def test_every_part_of_a_plan_is_counted_in_bytes_a_weight():
    """With weights in fp32: 4 for themselves, 4 for gradients, 8 for moments, 4 for averages; all else by its shape."""
    told = Plan(size="64", text_length=12, rollout_steps=3, rollout_batch=2, reward=("hpsv2",), recompute=False)
    dtype, cost = torch.bfloat16, network_flops(planned_flux(CONFIG, None, torch.bfloat16), 16, 12)
    with FakeTensorMode():
        flux, lora = (planned_flux(CONFIG, rank, dtype) for rank in (None, 4))
        parts = plan.memory(told, 2, flux, dtype)
        lean = plan.memory(replace(told, lean=True), 1, flux, dtype)
        anchored = plan.memory(replace(told, anchor=1.0), 2, flux, dtype)["base"]
        anchored_lora = plan.memory(replace(told, anchor=1.0, lora=4), 2, lora, dtype)["base"]
        fp8 = plan.memory(replace(told, fp8=True, lora=4), 1, lora, dtype)
        leap = leap_bytes(flux, 1, 16, 12, dtype, False)
    p, largest = (sum(w.numel() for w in m.parameters()) for m in (flux, flux.double_blocks[0]))
    assert [parts[k] for k in ("weights", "gradients", "optimizer", "averages")] == [2 * p, 2 * p, 4 * p, 2 * p]
    assert (lean["weights"], lean["gradients"], lean["averages"]) == (2 * p, 2 * p, 0)
    assert (anchored, anchored_lora) == (p, 0)
    assert parts["states"] == (3 + 1 + 3) * 2 * 16 * 64 * 4  # states and velocities of two rollouts, fp32
    assert parts["rollout"] == 2 * 2 * largest and parts["leap"] == leap + parts["rollout"]
    assert parts["rewards"] == 986_109_441 * 4  # of ViT-H-14, published
    linear = max(w.numel() for w in flux.parameters() if w.ndim == 2)
    assert fp8["rollout"] == linear * (4 + 2)  # up-cast by way of fp32
    moments = 8 * (1 / 4 + 1 / 256)
    assert plan.disk(told, flux) == 16 * p and plan.host_memory(told, 2, flux) == (16 * p + 4 * p) / 2
    assert plan.disk(replace(told, lean=True), flux) == pytest.approx((2 + moments + 4) * p)
    assert plan.host_memory(replace(told, lean=True), 1, flux) == pytest.approx((2 + moments + 4 + 2 + 4) * p)
    # Two groups of two: each reduces within, and then all-reduces its half as a ring of two, which receives it once.
    apart, together = (traffic(replace(told, shard=shard), 4, flux, dtype, cost) for shard in (2, 4))
    reduces = 2 * 64 // 4  # two leaps of each sample, one at a time
    assert apart["reduced"] == reduces * (4 * p / 2 + 4 * p / 2) and together["reduced"] == reduces * 4 * p * 3 / 4


def test_a_cut_network_costs_a_share_and_a_lora_little():
    with FakeTensorMode():
        flux, lora = (planned_flux(FLUX_DEV, rank, torch.bfloat16) for rank in (None, 64))
        one, eight = (plan.memory(Plan(), n, flux, torch.bfloat16) for n in (1, 8))
        little = plan.memory(Plan(), 1, lora, torch.bfloat16)
    for what in ("weights", "gradients", "optimizer", "averages"):
        assert eight[what] == one[what] / 8
    assert one["weights"] == 11_901_408_320 * 4  # the published count
    assert plan.peak(little) < 80e9 < plan.peak(one)
