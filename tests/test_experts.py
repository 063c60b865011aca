"""experiments.experts: the network of a step is its level's, and what no gradient reaches is not changed."""

import json

import pytest
import torch

from experiments import cells, experts
from experiments.cells import config_of
from experiments.experts import Config
from experiments.two_networks import Experts
from infra.folders import load
from tests.processes import script

TINY = "--rollout-steps 5 --batch 4"
PROGRAM = cells.ROOT / "experiments" / "two_networks.py"
EVAL_PROMPTS = config_of("leapalign", "").eval_prompts


@pytest.fixture
def few(tmp_path):
    """An evaluation prompt of each task."""
    file = tmp_path / "few.txt"
    file.write_text("".join(EVAL_PROMPTS.read_text().splitlines(keepends=True)[::60]))
    return file


@pytest.fixture(scope="module")
def weights():
    return load(config_of("leapalign", "").model).flux.state_dict()


@pytest.mark.parametrize(
    ("method", "early", "late"),
    [("--method refl --last 1", True, False), ("--low 0.7", False, True), ("--high 0.7", True, False)],
)
def test_only_the_network_of_the_levels_that_gradients_come_through_is_changed(
    method, early, late, few, tmp_path, weights
):
    out = tmp_path / "run"
    flags = f"{TINY} --steps 2 --eval-prompts {few} --out {out} {method}"
    script(PROGRAM, "0.7", "shapes", *flags.split()).check_returncode()
    found = {name: load(out / "final" / name).flux.state_dict() for name in ("early", "late")}
    same = [all(torch.equal(value, weights[name]) for name, value in found[n].items()) for n in ("early", "late")]
    assert same == [early, late]


def test_a_run_in_which_one_network_gets_no_gradient_goes_on_as_if_undisturbed(few, tmp_path):
    def run(name: str, *flags: str) -> bytes:
        words = f"{TINY} --no-decay --method refl --last 1 --eval-prompts {few} --out {tmp_path / name}".split()
        script(PROGRAM, "0.7", "shapes", *words, *flags).check_returncode()
        return (tmp_path / name / "final/late/transformer/diffusion_pytorch_model.safetensors").read_bytes()

    run("stopped", "--steps", "1")
    assert run("stopped", "--steps", "2", "--resume") == run("whole", "--steps", "2")


def test_a_step_is_made_by_the_network_of_its_level():
    class Named(torch.nn.Module):
        config = None

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, *inputs) -> str:
            return self.name

    networks = Experts(Named("early"), Named("late"), 0.7)
    assert [networks(*[None] * 4, torch.full((3,), level)) for level in (1.0, 0.75, 0.7, 0.1)] == [
        "early", "early", "late", "late",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="this method mixes levels"):
        networks(*[None] * 4, torch.tensor([0.9, 0.2]))


def test_the_command_sets_runs_with_one_and_two_networks_side_by_side_and_runs_none_twice(
    few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cells, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(cells, "launch", lambda command, log: script(*command[1:]).returncode)
    (tmp_path / "cells").mkdir()
    flags = f"{TINY} --eval-prompts {few}"
    cfg = Config(
        methods=("leapalign", "refl"),
        lr=(1e-4, 2e-4),
        seeds=1,
        steps=1,
        flags=flags,
        work=tmp_path / "work",
        out=tmp_path / "experts.json",
    )
    experts.run(cfg)
    rows = json.loads(cfg.out.read_text())["tables"]["evaluations"]
    assert list(rows) == ["leapalign", "leapalign, two networks", "refl", "refl, two networks"]
    assert [run["lr"] for runs in rows.values() for run in runs] == [1e-4, 1e-4, 2e-4, 2e-4]
    base = [runs[0]["curve"][0]["reward"] for runs in rows.values()]
    assert base == pytest.approx([base[0]] * 4, abs=1e-4)
    monkeypatch.setattr(cells, "launch", None)
    experts.run(cfg)
    assert "two networks" in capsys.readouterr().out and (tmp_path / "experts-gains.png").exists()


def test_what_cannot_be_is_refused_before_anything_is_run():
    with pytest.raises(ValueError, match=r"--split 1\.5 is between 0 and 1"):
        experts.run(Config(split=1.5))
    with pytest.raises(ValueError, match="--seed in '--seed 5'"):
        experts.run(Config(flags="--seed 5"))
    with pytest.raises(ValueError, match="one is there twice"):
        experts.run(Config(methods=("refl", "refl"), lr=(0.1, 0.2)))
    with pytest.raises(ValueError, match="--alpha means nothing"):
        experts.run(Config(methods=("leapalign", "refl --alpha 1"), lr=(0.1, 0.1)))
    with pytest.raises(ValueError, match="--anchor in 'refl"):
        experts.run(Config(methods=("refl --anchor 0.1",), lr=(0.1,)))


def test_a_rate_is_needed_for_each_method():
    with pytest.raises(ValueError, match=r"--lr 0.1: give one for each of 3 methods"):
        experts.run(Config(lr=(0.1,)))
