"""experiments.decided: rollouts that switch captions or networks, against closed forms and plain rollouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import decided
from experiments.decided import SIZE, THINGS, Config, captions, networks, pairs, switched
from experiments.draw_decided import captions_table, half_way, share
from infra.folders import Pipeline, load
from sample import decode, draw_noise, grid, sample, sigmas
from shapes.judge import judge
from shapes.world import TASKS, parse, scenes

T = 3


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load(Config().model)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    lines = (Path(decided.__file__).parent.parent / "shapes" / "eval-prompts.txt").read_text().splitlines()
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("\n".join(lines[::30]) + "\n")
    return file


def levels_of(pipe: Pipeline) -> torch.Tensor:
    return sigmas(pipe.schedule, T, int(np.prod(grid(pipe, *SIZE))))


@pytest.mark.parametrize("task", THINGS)
def test_captions_of_a_pair_differ_in_one_word_or_in_an_order_and_no_image_fits_both(task):
    known = pairs(task)
    assert len(known) == len(set(known)) >= 12
    for p, q in known[::7]:
        a, b = p.text.split(), q.text.split()
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1 or sorted(a) == sorted(b)
        images, *_ = scenes([p, q], np.random.default_rng(0))
        assert judge(images, [p, q]).all() and not judge(images, [q, p]).any()


def test_a_switched_rollout_of_constant_velocities_ends_where_it_must(pipe):
    levels = levels_of(pipe)
    noise = draw_noise(pipe, [0, 1], *grid(pipe, *SIZE))
    a, b = 0.3 * torch.randn(2, *noise.shape, generator=torch.Generator().manual_seed(0))
    found = list(switched(pipe, lambda x, sigma: a, lambda x, sigma: b, noise, levels))
    assert len(found) == T + 1
    for images, level in zip(found, levels):
        torch.testing.assert_close(images, decode(pipe, noise - (1 - level) * a - level * b, *SIZE), atol=1e-4, rtol=0)


def test_a_network_switched_with_itself_draws_what_sample_draws(pipe, few):
    texts = few.read_text().splitlines()
    prompts, cfg = [parse(text) for text in texts], Config(batch=5, seed=3)
    found = networks(cfg, pipe, pipe, levels_of(pipe), prompts)
    right = judge(sample(pipe, texts, range(3 * 10**6, 3 * 10**6 + len(texts)), T, *SIZE), prompts)
    for task in TASKS:
        accuracy = np.mean([r.item() for r, p in zip(right, prompts) if p.task == task])
        assert found[task] == pytest.approx([accuracy] * (T + 1))


def test_a_network_then_another_ends_with_each_alone_and_differs_between(pipe, few):
    texts = few.read_text().splitlines()
    prompts, other = [parse(text) for text in texts], load(Config().model)
    with torch.no_grad():
        for p in other.flux.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    found = networks(Config(batch=64), pipe, other, levels_of(pipe), prompts)
    for model, switch in ((other, 0), (pipe, T)):  # its first steps are `pipe`'s, of which there are none, or all
        right = judge(sample(model, texts, range(len(texts)), T, *SIZE), prompts)
        for task in TASKS:
            accuracy = np.mean([r.item() for r, p in zip(right, prompts) if p.task == task])
            assert found[task][switch] == pytest.approx(accuracy)
    assert any(row[0] != row[-1] for row in found.values())


def test_captions_at_the_ends_are_judged_as_plain_rollouts(pipe):
    cfg = Config(num=12, batch=5)
    found = captions(cfg, pipe, levels_of(pipe), "single")
    known = pairs("single")
    chosen = [known[i] for i in np.random.default_rng(cfg.seed).integers(len(known), size=cfg.num)]
    for i, (name, switch) in enumerate((("first", T), ("second", 0))):
        prompts = [pair[i] for pair in chosen]
        right = judge(sample(pipe, [p.text for p in prompts], range(12), T, *SIZE), prompts)
        assert found[name][switch] == pytest.approx(right.float().mean().item())
    assert found["second"][T] < found["second"][0] > 0.5  # a shape is not drawn that was never asked for


def test_what_never_occurs_has_no_share_and_a_dash_in_the_table():
    assert np.isnan(share(dict(second=[0.0, 0.0]))).all()


def test_a_share_is_of_what_wins_without_a_switch_and_its_interval_is_the_binomials():
    found = dict(first=[0.0, 0.1], second=[0.5, 0.6])
    assert share(found).tolist() == [1.0, 1.2]
    table = captions_table(dict(things=dict(count=found), num=100, levels=[1.0, 0.0]))
    assert "| count | 0.500 ±0.098 |" in table  # 1.96 sqrt(0.25 / 100)


def test_a_thing_is_decided_where_its_share_falls_to_a_half():
    shares = share(dict(second=[0.8, 0.6, 0.2, 0.1]))
    assert shares.tolist() == pytest.approx([1, 0.75, 0.25, 0.125])
    assert half_way([1.0, 0.9, 0.7, 0.0], shares) == pytest.approx(0.8)
    assert np.isnan(half_way([1.0, 0.0], np.array([1.0, 0.6])))


def test_the_command_measures_captions_and_networks_and_draws_them(few, tmp_path, capsys):
    flags = dict(num=6, rollout_steps=T, prompts=few, out=tmp_path / "found.json")
    decided.run(Config(tuned=(Config().model,), **flags))
    result = json.loads((tmp_path / "found.json").read_text())
    assert set(result["things"]) == set(THINGS.values()) and len(result["levels"]) == T + 1
    (model,) = result["tuned"]
    assert model["tuned_first"] == model["base_first"]  # it is the base
    for of_thing in result["things"].values():
        assert len(of_thing["first"]) == len(of_thing["second"]) == T + 1
    assert "| position |" in capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("found.png", "found-networks.png"))


def test_the_tuned_network_makes_the_first_steps_where_the_result_says_so(few, tmp_path, monkeypatch):
    loaded, load_one = [], decided.load
    monkeypatch.setattr(decided, "load", lambda *which: loaded.append(load_one(*which)) or loaded[-1])
    monkeypatch.setattr(decided, "captions", lambda *_: dict(first=[0.0] * (T + 1), second=[1.0] * (T + 1)))
    of_first = lambda cfg, first, *_: {task: [float(first is loaded[1])] * (T + 1) for task in TASKS}  # noqa: E731
    monkeypatch.setattr(decided, "networks", of_first)
    out = tmp_path / "found.json"
    decided.run(Config(tuned=(Config().model,), num=6, rollout_steps=T, prompts=few, out=out))
    (model,) = json.loads(out.read_text())["tuned"]
    assert (model["tuned_first"]["two"][0], model["base_first"]["two"][0]) == (1.0, 0.0)


def test_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="would all be called x"):
        decided.run(Config(tuned=("runs/x/final", "runs/x/best")))


def test_prompts_without_a_task_are_refused_by_name(tmp_path):
    (tmp_path / "few.txt").write_text("a photo of a circle\n")
    with pytest.raises(ValueError, match=r"few\.txt has none of the task two"):
        decided.run(Config(prompts=tmp_path / "few.txt"))
