"""bench.py in its smallest setting: what it compares is the same computation."""

import json

import pytest
import torch

from experiments.bench import BenchFlags, LiveBytes, bench


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench(
        BenchFlags(batch=2, rollout_steps=3, leaps=(1, 3), repeats=1, device="cpu", attention=("MATH",), results=path)
    )
    table = path.with_suffix(".md").read_text()
    assert "iteration, 3 leaps: leap by leap, light" in table and path.with_suffix(".png").exists()
    return json.loads(path.read_text())["tables"]


def test_both_sides_give_the_same_gradient_and_the_same_images(tables):
    assert tables["sampling"]["sample.py"]["difference"] < 2e-6
    for leaps in (1, 3):
        assert tables[f"iteration, {leaps} leaps"]["leap by leap, none"]["difference"] < 1e-6


def test_each_level_takes_less_memory_and_leap_by_leap_takes_no_more_for_more_leaps(tables):
    levels = tables["forward and backward"]
    memory = [levels[f"--recompute {level}"]["MB"] for level in ("none", "light", "blocks")]
    assert memory[0] > memory[1] > memory[2]
    one, three = tables["iteration, 1 leaps"], tables["iteration, 3 leaps"]
    assert three["leap by leap, none"]["MB"] < 1.05 * one["leap by leap, none"]["MB"]
    assert three["published, none"]["MB"] > 1.2 * one["published, none"]["MB"]


def test_bytes_of_tensors_count_while_they_live():
    x = torch.ones(100)
    with LiveBytes() as live:
        y = x + 1
        z = (y * 2).sum()
        y.view(10, 10).add_(1)
    assert live.now == 400 + 4
    assert live.peak == 800 + 4
    del y, z
    assert live.now == 0
