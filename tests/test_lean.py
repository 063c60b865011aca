"""--lean: all weights in bf16 on one GPU, and what that costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import train
from config import Config
from infra.checkpoints import checkpoint_folders
from infra.checks import check_flags
from infra.distributed import full_tensor, join
from infra.meter import Meter
from tests.processes import spread
from tests.runs import completed, same_run
from tests.test_kills import slow_save


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("prompts")
    (root / "few.txt").write_text("a photo of a circle\na photo of a red square\n")
    return Config(out=root / "run", batch=4, rollout_steps=2, updates=6, eval_every=6, save_every=2, ema=0.9, bf16=True,
                  lean=True, eval_prompts=root / "few.txt")  # fmt: skip


# ----------------------------------------------------------------------------------------------- the optimizer


def bf16_layer(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    return layer


def drift(lean: bool) -> tuple[float, float]:
    """How far weights of 1 and their averages come in 100 updates of 1e-4, 80 of which make the next bf16 number."""
    torch.manual_seed(0)
    with join("cpu"):
        layer = bf16_layer(64)
        state = train.make_state(Config(lr=1e-4, weight_decay=0.0, lean=lean), layer)
        for _ in range(100):
            layer.weight.grad = torch.ones_like(layer.weight)
            state.optimizers[0].step()
            train.update_averages(state, 0.9)
        weight, average = state.params["weight"], state.averages["weight"]
        return 1 - weight.double().mean().item(), 1 - average.double().mean().item()


def test_updates_smaller_than_the_precision_of_a_weight_survive_on_average():
    assert spread(1, drift, False)[0][0] == 0  # rounded to the nearest number, a weight never moves
    weight_drift, average_drift = spread(1, drift, True)[0]
    assert weight_drift == pytest.approx(0.01, rel=0.05)
    assert average_drift == pytest.approx(0.01 - 9e-4, rel=0.05)  # 9 updates behind: sum_i i 0.1 0.9^i


def second_moment() -> float:
    """The second moment of a small tensor after gradients of 1, then of 0, 700 times each."""
    with join("cpu"):
        layer = bf16_layer(8)
        optimizer = train.make_state(Config(lr=1e-4, weight_decay=0.0, lean=True), layer).optimizers[0]
        for size in (1.0, 0.0):
            for _ in range(700):
                layer.weight.grad = torch.full_like(layer.weight, size)
                optimizer.step()
        return optimizer.state[layer.weight]["exp_avg_sq"].mean().item()


def test_moments_of_small_tensors_decay():
    assert spread(1, second_moment)[0] == pytest.approx((1 - 0.999**700) * 0.999**700, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- a run


def change_and_bytes(cfg: Config) -> tuple[Tensor, dict[str, float]]:
    """What 6 updates change of the averages; the bytes of weights, gradients and moments for each parameter."""
    with join("cpu") as process:
        setup = train.set_up(cfg, process)
        state = train.make_state(cfg, setup.pipe.flux)
        first_averages = [average.clone() for average in state.averages.values()]
        for update in range(cfg.updates):
            train.one_update(cfg, setup, state, process, update)
        changes = []
        for average, first_average in zip(state.averages.values(), first_averages):
            changes.append((full_tensor(average) - full_tensor(first_average)).flatten())

        train.accumulate_batch_gradient(cfg, setup, process, 0, Meter(process.device))
        params = list(state.params.values())
        moments = []
        for param_state in state.optimizers[0].state.values():
            for moment in (param_state["exp_avg"], param_state["exp_avg_sq"]):
                moments += [moment.codes, moment.scale] if hasattr(moment, "codes") else [moment]
        tensors = dict(weights=params, gradients=[p.grad for p in params], moments=moments)
        count = sum(p.numel() for p in params)
        return torch.cat(changes), {name: sum(t.nbytes for t in ts) / count for name, ts in tensors.items()}


def test_a_lean_run_goes_where_one_with_fp32_weights_goes_in_a_third_of_the_memory(base):
    change, bytes_per_parameter = spread(1, change_and_bytes, base)[0]
    fp32_change, _ = spread(1, change_and_bytes, replace(base, lean=False))[0]
    # fp32 weights, gradients and moments take 4, 4 and 8 bytes.
    assert bytes_per_parameter == dict(weights=2, gradients=2, moments=pytest.approx(2, rel=0.05))
    # The difference is the rounding's, which averages out in longer runs.
    assert torch.cosine_similarity(change, fp32_change, dim=0) > 0.4


def test_a_lean_run_resumes_bitwise_from_what_was_written_while_it_went_on(base, tmp_path):
    straight, resumed = replace(base, out=tmp_path / "a"), replace(base, out=tmp_path / "b", resume=True)
    assert completed(1, straight) == ""
    spread(1, slow_save, resumed)
    assert [f.name for f in checkpoint_folders(resumed.out)] == ["step_000002", "step_000004"]
    assert completed(1, resumed) == ""
    assert same_run(straight, resumed)


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("change", [dict(lora=4), dict(bf16=False)])
def test_lean_is_refused_where_it_means_nothing(change, base):
    with (
        pytest.raises(ValueError, match=r"--lean trains all weights|--lean means nothing without --bf16"),
        join("cpu") as process,
    ):
        check_flags(replace(base, **change), process)


def test_without_its_library_lean_is_an_error_before_anything_starts(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"), join("cpu") as process:
        check_flags(base, process)
