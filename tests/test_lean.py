"""--lean: all weights in bf16 on one GPU, and what that costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from config import Config
from infra.checks import check_flags
from infra.distributed import full_tensor, join
from infra.meter import Meter
from tests.processes import spread
from tests.test_checkpoint import completed, folders, same_run, slow_save

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("prompts")
    (root / "few.txt").write_text("a photo of a circle\na photo of a red square\n")
    return Config(out=root / "run", batch=4, rollout_steps=2, updates=6, eval_every=6, save_every=2, ema=0.9, bf16=True,
                  lean=True, eval_prompts=root / "few.txt")  # fmt: skip


def drift(lean: bool) -> tuple[float, float]:
    """How far weights of 1 and their averages come in 100 updates of 1e-4, 80 of which make the next bf16 number."""
    torch.manual_seed(0)
    with join("cpu"):
        model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
        nn.init.ones_(model.weight)
        run = train.Run(model, 1e-4, 0.0, lean)
        for _ in range(100):
            model.weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
            run.optimizer.step()
            run.average(0.9)
        return 1 - model.weight.double().mean().item(), 1 - run.averaged[0].double().mean().item()


def test_updates_smaller_than_the_precision_of_a_weight_survive_on_average():
    assert spread(1, drift, False)[0][0] == 0  # rounded to nearest, nothing would ever move
    weights, averages = spread(1, drift, True)[0]
    assert weights == pytest.approx(0.01, rel=0.05)
    assert averages == pytest.approx(0.01 - 9e-4, rel=0.05)  # 9 updates behind: sum_i i 0.1 0.9^i


def decayed() -> float:
    """The second moment of a small tensor after gradients of 1, then of 0, 700 times each."""
    with join("cpu"):
        model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
        run = train.Run(model, 1e-4, 0.0, lean=True)
        for size in (1.0, 0.0):
            for _ in range(700):
                model.weight.grad = torch.full((8, 8), size, dtype=torch.bfloat16)
                run.optimizer.step()
        return run.optimizer.state[model.weight]["exp_avg_sq"].mean().item()


def test_moments_of_small_tensors_fall_as_they_should():
    assert spread(1, decayed)[0] == pytest.approx((1 - 0.999**700) * 0.999**700, rel=1e-3)


def moved(cfg: Config) -> tuple[torch.Tensor, dict[str, float]]:
    """What 6 updates change of the averages, and the bytes a parameter that are held for it."""
    with join("cpu") as world:
        setup = train.set_up(cfg, world)
        run = train.make_state(cfg, setup.pipe.flux)
        before = [a.clone() for a in run.averaged]
        for step in range(cfg.updates):
            train.one_update(cfg, setup, run, world, step)
        changes = [full_tensor(a) - full_tensor(b) for a, b in zip(run.averaged, before)]
        train.batch_gradient(cfg, setup, world, 0, Meter(world.device))
        states = [v for s in run.optimizer.state.values() for k, v in s.items() if k != "step"]
        packed = [t for v in states for t in ([v.codes, v.scale] if hasattr(v, "codes") else [v])]
        held = dict(weights=run.params, gradients=[p.grad for p in run.params], optimizer=packed)
        n = sum(p.numel() for p in run.params)
        return torch.cat([c.flatten() for c in changes]), {k: sum(t.nbytes for t in v) / n for k, v in held.items()}


def test_a_lean_run_goes_where_one_with_fp32_weights_goes_in_a_third_of_the_memory(base):
    lean, held = spread(1, moved, base)[0]
    full, _ = spread(1, moved, replace(base, lean=False))[0]
    assert held["weights"] == held["gradients"] == 2 and held["optimizer"] == pytest.approx(2, rel=0.05)  # of 4, 4, 8
    assert torch.cosine_similarity(lean, full, dim=0) > 0.4  # the rest is the rounding's, and averages out in time


def test_a_lean_run_resumes_bitwise_from_what_was_written_while_it_went_on(base, tmp_path):
    straight, resumed = replace(base, out=tmp_path / "a"), replace(base, out=tmp_path / "b", resume=True)
    assert completed(1, straight) == ""
    spread(1, slow_save, resumed)
    assert [f.name for f in folders(resumed.out)] == ["step_000002", "step_000004"]
    assert completed(1, resumed) == "" and same_run(straight, resumed)


@pytest.mark.parametrize("change", [dict(lora=4), dict(bf16=False)])
def test_lean_is_refused_where_it_means_nothing(change, base):
    with pytest.raises(ValueError, match="--lean keeps all trained weights in bf16"), join("cpu") as world:
        check_flags(replace(base, **change), world)


def test_without_its_library_lean_is_an_error_before_anything_starts(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"), join("cpu") as world:
        check_flags(base, world)
