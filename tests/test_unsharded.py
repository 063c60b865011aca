"""A device on which FSDP2 does not shard weights, such as Apple's GPUs: simulated, as there is none here.

The CPU stands in for such a device: its weights are not sharded, and no tensor may be float64.
"""

from dataclasses import replace
from functools import wraps
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import train
from config import Config
from formats.folders import load_pipeline
from infra.checks import check_flags
from infra.distributed import Process, full_tensor, join
from sample import sample
from start import Setup
from tests.processes import spread

PROMPTS = ["a photo of a red circle", "a photo of three squares"]


@pytest.fixture
def cfg(tmp_path) -> Config:
    (tmp_path / "few.txt").write_text("\n".join(PROMPTS) + "\n")
    return Config(out=tmp_path / "run", batch=4, rollout_steps=3, updates=4, eval_every=2, save_every=2, ema=0.5,
                  eval_prompts=tmp_path / "few.txt")  # fmt: skip


@pytest.fixture
def unsharded(monkeypatch) -> None:
    monkeypatch.setattr("infra.distributed.FSDP_DEVICES", ())


def trained(cfg: Config) -> tuple[Setup, list[Tensor]]:
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        train.run(cfg, setup, process)
        weights = [full_tensor(p) for p in setup.pipe.flux.parameters()]
    return setup, [w.detach().clone() for w in weights]


def weights_of(cfg: Config) -> list[Tensor]:
    setup, weights = trained(cfg)
    assert all(isinstance(p, DTensor) for p in setup.pipe.flux.parameters())
    return weights


# Half a batch rounds differently in bf16, in which one rank's weights are sharded, too.
@pytest.mark.parametrize(
    "ranks, flags", [(2, {}), (1, dict(lora=4, bf16=True)), (2, dict(anchor=1.0))], ids=["all", "LoRA", "anchor"]
)
def test_a_run_ends_where_that_of_sharded_weights_ends(cfg, ranks, flags, monkeypatch):
    cfg = replace(cfg, **flags)
    sharded = spread(ranks, weights_of, cfg)[0] if ranks > 1 else weights_of(cfg)
    monkeypatch.setattr("infra.distributed.FSDP_DEVICES", ())
    out = cfg.out.with_name("unsharded")
    setup, unsharded = trained(replace(cfg, out=out))
    assert not any(isinstance(p, DTensor) for p in setup.pipe.flux.parameters())
    for a, b in zip(sharded, unsharded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    base_images = sample(load_pipeline(cfg.model), PROMPTS, [0, 1], 3, 64, 64)
    images = sample(load_pipeline(out / "final"), PROMPTS, [0, 1], 3, 64, 64)
    assert 0 < (images - base_images).abs().mean() < 0.1


def test_it_resumes_bit_for_bit(cfg, unsharded):
    cfg = replace(cfg, decay=False)  # so that the number of updates may grow
    _, undisturbed = trained(cfg)
    interrupted = replace(cfg, out=cfg.out.with_name("interrupted"))
    trained(replace(interrupted, updates=2))
    _, resumed = trained(replace(interrupted, resume=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed, undisturbed, strict=True))


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor would be float64, which Apple's GPUs have not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float64, torch.complex128), function
        return result


@pytest.mark.parametrize("flags", [{}, dict(lora=4, bf16=True), dict(anchor=1.0)], ids=["all", "LoRA", "anchor"])
def test_an_update_and_an_evaluation_have_no_float64_but_on_the_cpu(cfg, unsharded, flags, monkeypatch):
    """Where the rotary table and the noise levels are made, before they are moved, and scores are averaged."""

    def on_the_cpu(function):
        @wraps(function)
        def call(*args):
            with _disable_current_modes():
                return function(*args)

        return call

    for name in ("model.rotary_table", "families.flux1.sigmas", "train.mean_scores"):
        monkeypatch.setattr(name, on_the_cpu(resolve_name(name)))
    cfg = replace(cfg, **flags)
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        state = train.make_state(cfg, setup.pipe.flux)
        with NoFloat64():
            train.one_update(cfg, setup, state, process, 0)
            train.evaluate(cfg, setup, process)
        with pytest.raises(AssertionError), NoFloat64():
            torch.ones(1).double()


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(bf16=True), "--bf16 with --device mps"),
        (dict(fp8=True, lora=4), "--fp8 with --device mps"),
    ],
)
def test_a_flag_that_needs_sharded_weights_is_refused(cfg, flags, words):
    with pytest.raises(ValueError, match=words):
        check_flags(replace(cfg, device="mps", **flags), Process(0, 1, torch.device("mps"), None))


def test_a_lora_may_be_over_a_network_in_bf16(cfg):
    check_flags(replace(cfg, device="mps", bf16=True, lora=4), Process(0, 1, torch.device("mps"), None))


def test_several_ranks_need_a_device_that_shards(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device mps: 2 ranks take cpu or cuda"), join("mps"):
        pass


def test_a_clock_waits_for_any_device_but_the_cpu(monkeypatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind in ("cpu", "mps", "cuda"):
        with train.Meter(torch.device(kind))("rollout"):
            pass
    assert [device.type for device in waited] == ["mps", "cuda"]
