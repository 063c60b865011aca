"""experiments.compare: intervals against scipy, budgets against the meter, no run twice, and a real table."""

import itertools
import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import train
from config import PRESETS, parse
from experiments import cells, compare
from experiments.cells import Cell, cost, evaluations_of, load_method, updates_within
from experiments.compare import ABLATIONS, GRID_SEED, METHODS, RANGES, CompareFlags, climb
from experiments.draw import differences, draw_tables, final, report_tables
from infra.distributed import join
from infra.jsonl import append_line
from infra.meter import Meter
from infra.methods import method_keywords
from infra.summary import confidence_interval
from tests.test_methods import ROOT, blocks

SMALL = "--rollout-steps 5 --batch 8"
NUMBERS = {"judge": 0.4, "position": 0.1, "count": 0.3, "color": 0.5, "reward": 2.0, "tiny": 2.0, "vivid": 0.2}
SOURCE = dict(command="c", hardware="h", date="d", revision="r", rewards=["tiny"], select="judge", grid={})


def finished_run(seed: int, spec: str = "leapalign", diverged: bool = False, **numbers: float) -> dict:
    """A finished run from NUMBERS to `numbers`."""
    curve = [dict(step=0, evaluations=0, **NUMBERS), dict(step=9, evaluations=900, **NUMBERS | numbers)]
    took = dict(evaluations=900, seconds=12.0, memory=1.5, updates=9)
    source = dict(revision="r", hardware="h")
    return dict(spec=spec, seed=seed, lr=1e-4, diverged=diverged, curve=curve, **took, **source)


# --------------------------------------------------------------------------------------- arithmetic


def test_intervals_and_paired_differences_are_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    runs_a = [finished_run(seed, judge=value) for seed, value in enumerate(a)]
    runs_b = [finished_run(seed, judge=value) for seed, value in enumerate(b)]
    mean, half = confidence_interval(final(runs_a, "judge"))
    interval = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(interval))
    mean, half = confidence_interval(differences(runs_a, runs_b, "judge"))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(interval))


def test_ranges_have_each_step_of_the_preset_once_and_at_least_two_steps():
    levels = load_method("leapalign", "")[1].sigmas.tolist()[:-1]
    steps_of_ranges = []
    for spec in RANGES[1:]:
        low, high = map(float, spec.split()[2::2])
        steps_of_ranges.append([i for i, level in enumerate(levels) if low <= level <= high])
    assert list(itertools.chain(*steps_of_ranges)) == list(range(12))
    assert min(map(len, steps_of_ranges)) >= 2


# ---------------------------------------------------------------------------------------- budgets


@pytest.fixture(scope="module")
def metered_evaluations():
    """What the training loop's meter counts in an update: (row, update) -> evaluations."""
    cfg = cells.config_of("leapalign", SMALL)
    with join("cpu") as process:
        setup = train.set_up(replace(cfg, out=Path("nonexistent")), process)

        def count(spec: str, update: int = 0, **flags) -> int:
            meter = Meter(process.device)
            method = load_method(spec, SMALL).method
            group = method.keywords.get("group", method_keywords(method.func).get("group", 1))
            setup.method, setup.group = method, group
            train.accumulate_batch_gradient(replace(cfg, **flags), setup, process, update, meter)
            return cost(meter.without_gradient + meter.with_gradient, meter.with_gradient)

        yield count


RANDOM_COSTS = ("refl", "drtune", "flowbp_lagrange")  # how much they differentiate depends on a random step


@pytest.mark.parametrize("spec", [spec for spec in METHODS if spec not in RANDOM_COSTS])
def test_an_update_costs_what_the_meter_counts(spec, metered_evaluations):
    assert evaluations_of(spec, SMALL, 1) == metered_evaluations(spec)
    assert evaluations_of(spec, SMALL, 7) == 7 * metered_evaluations(spec)


@pytest.mark.parametrize("spec", RANDOM_COSTS)
def test_where_a_step_is_random_the_meter_counts_one_of_the_possible_costs(spec, metered_evaluations):
    totals = list(itertools.islice(cells.costs(spec, SMALL), 40))
    possible = set(np.diff(totals, prepend=0))
    assert len(possible) > 1
    assert {metered_evaluations(spec, update) for update in range(2)} <= possible


def test_guidance_takes_a_second_evaluation_and_its_gradient_too_unless_it_is_detached(metered_evaluations):
    guided = evaluations_of("leapalign --guidance 2", SMALL, 1)
    detached = evaluations_of("leapalign --guidance 2 --detach-negative", SMALL, 1)
    assert guided == metered_evaluations("leapalign", guidance=2.0) == 2 * evaluations_of("leapalign", SMALL, 1)
    assert detached == metered_evaluations("leapalign", guidance=2.0, detach_negative=True) < guided


def test_a_budget_has_no_room_for_one_more_update():
    budget = evaluations_of("leapalign", SMALL, 50)
    assert updates_within("leapalign", SMALL, budget) == 50
    for spec in METHODS:
        updates = updates_within(spec, SMALL, budget)
        assert evaluations_of(spec, SMALL, updates) <= budget < evaluations_of(spec, SMALL, updates + 1)
    assert updates_within("full", SMALL, 3) == 1


@pytest.mark.parametrize("updates", [37, 100, 138])
def test_rows_of_any_number_of_updates_are_judged_with_as_much_of_the_base_in_their_weights(updates):
    cell = compare.make_cell(CompareFlags(flags="--ema 0.97"), "full", seed=0, lr=1e-4, updates=updates)
    assert cells.config_of(cell.spec, cell.flags).ema ** updates == pytest.approx(0.97**100, rel=0.01)


@pytest.mark.parametrize("spec", [*METHODS, *ABLATIONS, *RANGES])
def test_every_row_of_the_tables_can_be_run(spec):
    load_method(spec, "--rollout-steps 8" if spec not in RANGES else "")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("refll", "--method refll"),
        ("refl --alpha 1", "--alpha means nothing"),
        ("flow_grpo --group 7", "--group 7: a rank's 8"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_name(spec, words):
    with pytest.raises(ValueError, match=words) as error:
        load_method(spec, SMALL)
    assert str(error.value).startswith(spec)


# ------------------------------------------------------------------------------------------ cells


@pytest.fixture(autouse=True)
def new_cells(tmp_path, monkeypatch) -> Path:
    """A file of finished runs in place of the user's own, and no runs of the repository."""
    monkeypatch.setattr(cells, "CELLS", tmp_path / "none.jsonl")
    monkeypatch.setattr(cells, "NEW_CELLS", tmp_path / "cells.jsonl")
    return tmp_path / "cells.jsonl"


@pytest.fixture
def started(monkeypatch) -> list[dict[str, str]]:
    """The flags of the runs that were started. None trains: the judge is 1 - |lr - 1e-4|, whatever the method."""
    runs: list[dict[str, str]] = []

    def fake_launch(command: list[str], log: Path) -> int:
        flags = dict(itertools.pairwise(command))
        runs.append(flags)
        out, updates = Path(flags["--out"]), int(flags["--updates"])
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(dict(updates=updates, prompts_read=[])))
        for i in range(updates):
            append_line(out / "metrics.jsonl", dict(step=i, forwards=20, backwards=5, seconds=0.5, memory=1.0 + i / 10))
        judge = 1 - abs(float(flags["--lr"]) - 1e-4)
        for step in (0, updates):
            numbers = NUMBERS | dict(judge=judge)
            append_line(out / "eval.jsonl", dict(step=step, **numbers, by_prompt={}, seconds=1.0))
        return 0

    monkeypatch.setattr(cells, "launch", fake_launch)
    return runs


CELL = Cell("refl", SMALL, seed=0, lr=1e-4, updates=4, eval_every=2)


def test_a_finished_run_is_not_made_again(tmp_path, started):
    def run_cells(*items: Cell) -> dict:
        run = partial(cells.run_cell, work=tmp_path / "work", finished=cells.read_cells())
        return cells.run_parallel(run, items, jobs=2)

    first = run_cells(CELL, CELL)
    second = run_cells(CELL, replace(CELL, seed=1))
    assert [flags["--seed"] for flags in started] == ["0", "1"]
    assert first[CELL] == second[CELL]
    assert first[CELL]["evaluations"] == 4 * (20 + 2 * 5) and first[CELL]["memory"] == 1.3
    assert [point["evaluations"] for point in first[CELL]["curve"]] == [0, 120]


def test_the_runs_of_the_shipped_tables_are_found(monkeypatch):
    """Keys outlive changes of the code: where this fails, all 228 runs would have to be made again."""
    monkeypatch.undo()
    finished = cells.read_cells()
    for name in ("methods", "updates", "ablations", "ranges"):
        result = json.loads((cells.RESULTS / f"{name}.json").read_text())
        (rows,) = result["tables"].values()
        cfg = CompareFlags()
        for spec, runs in rows.items():
            run = runs[0]
            cell = compare.make_cell(cfg, spec, run["seed"], run["lr"], run["updates"])
            assert finished[cell.key]["curve"] == run["curve"]


SHIPPED = ("methods", "all", "updates", "ablations", "ranges", "preset", "x_0", "by-level", "by-level-alpha",
           "flux2-schedule", "twice", "twice-xhat_0", "twice-lam", "x_0-rewarded")  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_tables_are_those_of_the_shipped_runs(name):
    result = json.loads((cells.RESULTS / f"{name}.json").read_text())
    ((equal, rows),) = result["tables"].items()
    assert report_tables(result, rows, equal) == (cells.RESULTS / f"{name}.md").read_text()


def test_a_warning_counts_runs_that_other_code_made(capsys):
    today = dict(code=cells.code_hash())
    cells.warn_of_other_code([today])
    assert not capsys.readouterr().out
    cells.warn_of_other_code([dict(code="0"), today])
    assert "warning: other code of sample.py, leaps.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, same",
    [('"""Steps."""\ndef f(x):\n    """Half."""\n    return x / 2\n', True),
     ("def f(x):\n    # a comment\n    return (\n        x / 2\n    )\n", False),  # without a docstring
     ('"""Steps."""\ndef f(x):\n    "Half of x."\n\n    return (x / 2)  # as said\n', True),
     ('"""Steps."""\ndef f(x):\n    """Half."""\n    return x / 3\n', False)],
)  # fmt: skip
def test_code_is_other_code_only_if_it_computes_something_else(text, same, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(cells, "CODE", ("steps.py",))
    hashes = []
    for source in ('"""Steps."""\ndef f(x):\n    """Half."""\n    return x / 2\n', text):
        (tmp_path / "steps.py").write_text(source)
        cells.code_hash.cache_clear()
        hashes.append(cells.code_hash())
    cells.code_hash.cache_clear()
    assert (hashes[0] == hashes[1]) == same


def test_a_key_changes_with_each_flag_and_with_what_the_run_reads(tmp_path):
    prompts, method = tmp_path / "p.txt", tmp_path / "m.py"
    prompts.write_text("a photo of a red circle\n")
    method.write_text("from baselines.direct import full\n")
    runs = [CELL, replace(CELL, seed=1), replace(CELL, lr=2e-4), replace(CELL, updates=5), replace(CELL, spec="full")]
    runs += [replace(CELL, flags=f"{SMALL} --model hub/{name}") for name in "ab"]
    runs += [replace(CELL, flags=f"{SMALL} --prompts {prompts}"), replace(CELL, spec=f"{method}:full")]
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    prompts.write_text("a photo of a blue circle\n")
    method.write_text("from baselines.direct import full  # now better\n")
    cells.digest.cache_clear()
    new_keys = [run.key for run in runs]
    assert new_keys[:-2] == keys[:-2] and new_keys[-2] != keys[-2] and new_keys[-1] != keys[-1]


@pytest.mark.parametrize(
    "changes, same",
    [(dict(ema=0.5), False), (dict(size=("64", "32x96")), False), (dict(reward=("tiny:0.5",)), False),
     (dict(batch=32), True), (dict(lr=1e-3, updates=7, keep=9, device="cuda"), True)],
)  # fmt: skip
def test_a_key_changes_with_the_preset_but_for_what_the_runs_own_flags_set(changes, same, monkeypatch):
    key = CELL.key
    monkeypatch.setitem(PRESETS, "shapes", ("", replace(PRESETS["shapes"][1], **changes)))
    cells.config_of.cache_clear()
    assert (CELL.key == key) == same
    monkeypatch.undo()
    cells.config_of.cache_clear()


def test_a_row_has_its_methods_own_keywords_and_not_the_presets():
    preset = PRESETS["shapes"][1]
    assert preset.reward_input == "xhat_0" and cells.config_of("leapalign", "").reward_input is None
    assert load_method("leapalign", "")[0].keywords == {} and load_method("refl", "")[0].keywords == {}
    assert load_method("leapalign --reward-input xhat_0", "")[0].keywords == dict(reward_input="xhat_0")
    assert load_method("leapalign", "--reward-input xhat_0")[0].keywords == dict(reward_input="xhat_0")  # of all rows
    assert parse(replace(CELL, spec="leapalign").arguments)[0].reward_input is None  # in the run as in the counting


def test_a_rows_own_flags_win_over_those_of_all_rows():
    assert cells.config_of("leapalign --batch 16", "--batch 8 --alpha 0.1").batch == 16
    assert cells.config_of("leapalign", "--batch 8 --alpha 0.1").alpha == 0.1


@pytest.mark.parametrize(
    "changes, words",
    [(dict(also=("refl --lr 1e-5",)), "--lr in 'refl --lr 1e-5'"), (dict(flags="--seed=3"), "--seed in '--seed=3'"),
     (dict(flags="--stop-early"), "--stop-early in"), (dict(also=("refl --skip_nonfinite 5",)), "--skip_nonfinite in"),
     (dict(also=("refl --steps 5",)), "--steps in"), (dict(seeds=0), "--seeds, --updates, --jobs and --grid"),
     (dict(select="jugde"), "--select jugde is not evaluated; there are attr"), (dict(grid=(0.0,)), "--grid must be"),
     (dict(watch=("tiny",), flags="--reward judge", methods=("flow_grpo",), select="vivid"), "--select vivid"),
     (dict(also=("flow_grpo --reward judge",)), "two are named 'judge'"), (dict(also=("leapalign --tau 0",)), "--tau"),
     (dict(also=("leapalign --lam 0.4 0.3",)), "--lam has 2 values"), (dict(also=("refl --size 96",)), "--size 96"),
     (dict(also=("refl --method drtune",)), "--method in"), (dict(grid=(float("nan"),)), "--grid must be"),
     (dict(also=("flow_grpo --lam 0.4",)), "--lam means nothing"), (dict(also=("flow_grpo --group 3",)), "--group 3"),
     (dict(also=("refl --reward shapes/vivid.py:vivid",), watch=("judge",)), "all rows must raise the same rewards")],
)  # fmt: skip
def test_what_would_fail_after_hours_is_refused_before_any_run(changes, words, tmp_path, started):
    with pytest.raises(ValueError, match=words):
        compare.compare_methods(replace(CompareFlags(methods=("leapalign",), flags=SMALL, work=tmp_path), **changes))
    assert not started


def test_a_run_that_was_not_finite_at_once_or_left_updates_out_is_summed_up(tmp_path):
    append_line(tmp_path / "eval.jsonl", dict(step=0, seconds=1.0, **NUMBERS))
    empty = cells.summarize_run(tmp_path)
    assert empty["evaluations"] == empty["memory"] == 0 and empty["curve"][0]["evaluations"] == 0
    append_line(tmp_path / "eval.jsonl", dict(step=4, seconds=1.0, **NUMBERS))
    for step in (0, 1, 3):
        update = dict(step=step, forwards=20, backwards=5, seconds=0.5, memory=1.0)
        append_line(tmp_path / "metrics.jsonl", update)
    assert [point["evaluations"] for point in cells.summarize_run(tmp_path)["curve"]] == [0, 90]


@pytest.mark.parametrize("code", [3, 2])
def test_a_run_that_ends_early_is_a_result_only_if_its_numbers_were_not_finite(tmp_path, started, monkeypatch, code):
    fake_launch = cells.launch

    def failing_launch(command: list[str], log: Path) -> int:
        log.write_text("error: --lr is wrong\n")
        fake_launch(command, log)
        return code

    monkeypatch.setattr(cells, "launch", failing_launch)
    if code == cells.NONFINITE:
        assert cells.run_cell(CELL, tmp_path, {})["diverged"]
    else:
        with pytest.raises(ChildProcessError, match=r"(?s)ended with 2.*--lr is wrong"):
            cells.run_cell(CELL, tmp_path, {})
        assert not cells.read_cells()


# ------------------------------------------------------------------------------------------ tables


def seeds_and_rates(runs: list[dict[str, str]]) -> set[tuple[int, float]]:
    return {(int(flags["--seed"]), float(flags["--lr"])) for flags in runs}


def test_rates_are_chosen_on_a_seed_of_their_own_and_used_at_the_tables_seeds(tmp_path, started, capsys):
    grid = (0.2e-4, 0.4e-4, 0.5e-4, 0.7e-4, 1e-4, 2e-4, 4e-4)
    cfg = CompareFlags(methods=("leapalign", "refl"), seeds=2, updates=6, grid=grid, flags=SMALL, equal="updates")
    cfg = replace(cfg, work=tmp_path / "work", results=tmp_path / "methods.json")
    compare.compare_methods(cfg)
    trials = {(GRID_SEED, rate) for rate in (0.7e-4, 1e-4, 2e-4)}
    assert seeds_and_rates(started) == trials | {(0, 1e-4), (1, 1e-4)}
    result = json.loads((tmp_path / "methods.json").read_text())
    assert list(result["tables"]) == ["updates"] and set(result["grid"]) == {"leapalign", "refl"}
    assert [run["updates"] for run in result["tables"]["updates"]["refl"]] == [6, 6]
    assert {"command", "hardware", "date", "revision"} <= set(result)

    count = len(started)
    compare.compare_methods(replace(cfg, also=("full",)))
    assert {flags["--method"] for flags in started[count:]} == {"full"}  # a new row needs only its own runs
    assert "| full |" in capsys.readouterr().out


def test_ablations_and_ranges_have_one_low_rate_unless_others_are_given(tmp_path, started, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ablations", "ranges"):
        cfg = CompareFlags(table=name, seeds=1, updates=2, flags="--batch 8", work=tmp_path / "work", watch=("judge",))
        compare.compare_methods(cfg)
        result = json.loads(Path(f"runs/{name}.json").read_text())
        assert seeds_and_rates(started) == {(0, 7e-5)} and not any(result["grid"].values())
        assert Path(f"runs/{name}.png").stat().st_size > 1000
        assert "leapalign" in Path(f"runs/{name}.html").read_text()
    compare.compare_methods(replace(cfg, methods=("leapalign",), grid=(1e-3,), results=tmp_path / "high.json"))
    assert seeds_and_rates(started[-1:]) == {(0, 1e-3)}


@pytest.mark.parametrize("peak, tried", [(2, 3), (1, 4), (4, 3), (8, 3), (0.25, 5), (0.0625, 5)])
def test_a_climb_ends_at_the_peak_or_at_the_grids_edge(peak, tried):
    scored = []

    def score(rate: float) -> tuple[float]:
        scored.append(rate)
        return (-abs(math.log(rate / peak)),)

    assert climb(score, (0.25, 0.5, 1, 2, 4, 8)) == min(max(peak, 0.25), 8)
    assert len(scored) == len(set(scored)) == tried


def test_a_climb_ends_below_a_rate_that_diverged():
    assert climb(lambda rate: (rate < 3, rate), (1, 2, 4)) == 2


def test_a_single_rate_is_taken_without_a_trial():
    assert climb(lambda rate: pytest.fail(), (7e-5,)) == 7e-5


def test_a_plan_runs_nothing(tmp_path, started, capsys):
    cfg = CompareFlags(methods=("leapalign", "refl"), seeds=2, updates=6, flags=SMALL, work=tmp_path / "work")
    compare.compare_methods(replace(cfg, plan=True))
    assert not started and not cfg.work.exists()
    printed = capsys.readouterr().out
    assert printed.count("0 of 2 runs are there") == 2 and "three trials or more of each row" in printed
    assert "528 evaluations a run" in printed  # 6 updates of 8 samples, of 5 + 6 evaluations each
    cfg = replace(cfg, methods=("leapalign",), grid=(1e-4,), results=tmp_path / "m.json")
    compare.compare_methods(replace(cfg, seeds=1))
    compare.compare_methods(replace(cfg, plan=True))
    assert "1 of 2 runs are there" in capsys.readouterr().out


@pytest.mark.parametrize("select, lr", [("judge", 1e-4), ("tiny", 2e-4)])
def test_the_rate_is_chosen_by_the_selected_number_among_runs_that_did_not_diverge(select, lr, monkeypatch):
    ends = {1e-4: dict(judge=0.9, tiny=1.0), 2e-4: dict(judge=0.5, tiny=2.0), 4e-4: dict(judge=0.6, tiny=3.0)}

    def fake_run(cell: Cell, work: Path, finished: dict) -> dict:
        return finished_run(GRID_SEED, diverged=cell.lr > 3e-4, **ends[cell.lr])  # 4e-4 has the highest tiny

    monkeypatch.setattr(compare, "run_cell", fake_run)
    rates, _ = compare.choose_rates(CompareFlags(grid=tuple(ends), select=select, flags=SMALL), ["leapalign"], {})
    assert rates == {"leapalign": lr}


def test_of_rates_that_score_alike_the_lowest_within_reach_is_taken(monkeypatch):
    monkeypatch.setattr(compare, "run_cell", lambda *_: finished_run(GRID_SEED))
    rates, _ = compare.choose_rates(CompareFlags(grid=(1e-5, 2e-5, 4e-5, 8e-5), flags=SMALL), ["leapalign"], {})
    assert rates == {"leapalign": 1e-5}


@pytest.mark.parametrize("equal, updates", [("updates", 8), ("evaluations", 4)])
def test_rates_are_chosen_at_equal_evaluations_whatever_the_table(equal, updates, tmp_path, started):
    cfg = CompareFlags(methods=("leapalign", "full"), seeds=1, updates=8, equal=equal, grid=(7e-5, 1e-4), flags=SMALL)
    compare.compare_methods(replace(cfg, work=tmp_path / "work", results=tmp_path / "m.json"))
    updates_of_full = {"0": set(), str(GRID_SEED): set()}
    for flags in started:
        if flags["--method"] == "full":
            updates_of_full[flags["--seed"]].add(int(flags["--updates"]))
    assert updates_within("full", SMALL, evaluations_of("leapalign", SMALL, 8)) == 4
    assert updates_of_full == {"0": {updates}, str(GRID_SEED): {4}}


def test_a_table_shows_what_diverged_and_a_rate_at_the_edge(tmp_path):
    rows = {
        "leapalign": [finished_run(0, judge=0.3), finished_run(1, judge=0.3)],
        "full": [finished_run(0, "full", diverged=True), finished_run(1, "full", judge=0.6)],
    }
    grid = {"full": [dict(lr=lr, updates=9, score=0.5) for lr in (1e-4, 2e-4)]}
    draw_tables(SOURCE | dict(grid=grid, tables=dict(updates=rows)), tmp_path / "m.json")
    assert (tmp_path / "m.png").stat().st_size > 1000
    text = (tmp_path / "m.md").read_text()
    assert "| full (1 of 2 diverged) | 0.500 ±1.271 |" in text and "0.0001* |" in text and "| base | 0.400 |" in text
    assert "| full (1 of 2 diverged) | +0.200 ±1.271 |" in text


def test_differences_are_to_the_first_row_and_to_the_one_that_ends_highest():
    rows = {}
    for spec, judge in dict(a=0.5, b=0.3, c=0.6).items():
        rows[spec] = [finished_run(seed, spec, judge=judge) for seed in (0, 1)]
    text = report_tables(SOURCE, rows, "updates")
    to_first, to_best = (text.split(f"| minus {name} |")[1] for name in "ac")
    assert "| b | -0.200 ±0.000 |" in to_first and "| c | +0.100 ±0.000 |" in to_first
    assert "| a | -0.100 ±0.000 |" in to_best and "| b | -0.300 ±0.000 |" in to_best and "| c |" not in to_best
    assert "minus" not in report_tables(SOURCE, dict(a=rows["a"]), "updates")


def test_a_method_of_a_file_enters_a_real_table(tmp_path, monkeypatch, new_cells):
    """With train.py itself: the README's method below a finished run of LeapAlign, and what the table says of both."""
    (tmp_path / "my_method.py").write_text(blocks("python", "def noisy_steps"))
    prompts = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    few_prompts = tmp_path / "few.txt"
    few_prompts.write_text("\n".join(prompts[::30]) + "\n")

    monkeypatch.chdir(tmp_path)
    spec = "my_method.py:noisy_steps --option count=2"
    flags = f"--rollout-steps 3 --batch 8 --eval-prompts {shlex.quote(str(few_prompts))}"
    watch = ("judge", f"{ROOT}/shapes/vivid.py:vivid")
    cfg = CompareFlags(methods=("leapalign", spec), seeds=1, updates=1, grid=(1e-4,), flags=flags, watch=watch)
    leapalign_cell = compare.make_cell(cfg, "leapalign", seed=0, lr=1e-4, updates=1)
    append_line(new_cells, finished_run(0) | dict(key=leapalign_cell.key, code="0"))
    compare.compare_methods(replace(cfg, table="ablations"))
    rows = json.loads(Path("runs/ablations.json").read_text())["tables"]["updates"]
    run = rows[spec][0]
    assert run["evaluations"] == evaluations_of(spec, flags, 1) == 8 * (3 + 6)
    before, after = run["curve"]
    assert before["judge"] != NUMBERS["judge"] and before["reward"] != after["reward"]
    assert f"| {spec} | {after['judge']:.3f} |" in Path("runs/ablations.md").read_text()
