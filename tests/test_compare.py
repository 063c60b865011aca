"""experiments.compare: intervals and pairs against scipy, budgets against the meter; no cell twice; a real table."""

import fcntl
import itertools
import json
import math
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import train
from config import PRESETS, parse
from experiments import cells, compare, draw_compare
from experiments.cells import Cell, cost, opened, spent, updates_within
from experiments.compare import ABLATIONS, GRID_SEED, METHODS, Config, climb, windows
from experiments.draw import draw
from experiments.draw_compare import change_of, gain, last, mean_of, report
from experiments.record import RESULTS, file_of
from formats.lora import FILE, NOTE
from infra.distributed import join
from infra.meter import Meter
from infra.pictures import line_chart
from sample import sigmas
from tests.test_methods import ROOT, blocks

SMALL = "--rollout-steps 5 --batch 8"
NUMBERS = {"judge": 0.4, "position": 0.1, "count": 0.3, "color": 0.5, "reward": 2.0, "tiny": 2.0, "vivid": 0.2}


def run_of(seed: int, spec: str = "leapalign", diverged: bool = False, **final: float) -> dict:
    """A finished run that went from NUMBERS to `final`."""
    curve = [dict(step=0, evaluations=0, **NUMBERS), dict(step=9, evaluations=900, **NUMBERS | final)]
    took = dict(
        evaluations=900, seconds=12.0, memory=1.5, steps=9, lr=1e-4, diverged=diverged, revision="r", hardware="h"
    )
    return dict(spec=spec, seed=seed, curve=curve, **took)


# --------------------------------------------------------------------------------------- arithmetic


def test_intervals_and_paired_differences_are_scipys():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 6))
    rows = [[run_of(seed, judge=x) for seed, x in enumerate(values)] for values in (ours, theirs)]
    mean, half = mean_of(rows[0], last("judge"))
    low, high = stats.ttest_1samp(ours, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    mean, half = change_of(rows[0], rows[1], last("judge"))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    log = tmp_path / "run.log"
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ChildProcessError, match="another command's run still writes"):
            cells.launch(["true"], log)
    take = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert cells.launch([sys.executable, "-c", take, str(log)], log) == 1  # a run holds it as long as it lives
    assert "BlockingIOError" in log.read_text() and cells.launch(["true"], log) == 0


def test_runs_of_other_seeds_are_no_pairs():
    with pytest.raises(ValueError, match="other seeds"):
        change_of([run_of(0), run_of(1)], [run_of(1), run_of(0)], last("judge"))


def test_a_gain_is_the_mean_over_tasks_less_the_bases():
    assert gain("position", "count")(run_of(0, position=0.3, count=0.4)) == pytest.approx((0.2 + 0.1) / 2)


@pytest.mark.parametrize("steps, shift", list(itertools.product(range(2, 17), (1, 3))))
def test_ranges_hold_each_step_once_and_two_at_least(steps, shift):
    levels = sigmas(dict(use_dynamic_shifting=False, shift=shift), steps, 16).tolist()[:-1]
    numbers = [[float(w) for w in spec.split()[2::2]] for spec in windows(levels)]
    inside = [[i for i, level in enumerate(levels) if low <= level <= high] for low, high in numbers]
    assert list(itertools.chain(*inside)) == list(range(steps))
    assert min(map(len, inside)) >= 2 or steps < 4
    assert len(inside) == max(1, min(4, steps // 2))


# ---------------------------------------------------------------------------------------- budgets


@pytest.fixture(scope="module")
def counted():
    """What the training loop's meter counts in one update: method -> evaluations."""
    cfg = cells.config_of("leapalign", SMALL)
    with join("cpu") as world:
        setup = train.set_up(replace(cfg, out=Path("nonexistent")), world)

        def count(spec: str, step: int = 0) -> int:
            meter = Meter(world.device)
            one = replace(setup, method=opened(spec, SMALL)[0], group=8 if "grpo" in spec else 1)
            train.batch_gradient(cfg, one, world, step, meter)
            return cost(meter.counts["forwards"], meter.counts["backwards"])

        yield count


@pytest.mark.parametrize("spec", [m for m in METHODS if m not in ("refl", "drtune", "flowbp_lagrange")])
def test_an_update_costs_what_the_meter_counts(spec, counted):
    assert spent(spec, SMALL, 1) == counted(spec)
    assert spent(spec, SMALL, 7) == 7 * counted(spec)


@pytest.mark.parametrize("spec", ["refl", "drtune", "flowbp_lagrange"])
def test_where_a_step_is_drawn_the_meter_counts_one_of_the_possible_costs(spec, counted):
    assert len({spent(spec, SMALL, n + 1) - spent(spec, SMALL, n) for n in range(1, 9)}) > 1
    each = {spent(spec, SMALL, n + 1) - (spent(spec, SMALL, n) if n else 0) for n in range(40)}
    assert {counted(spec, step) for step in range(3)} <= each


def test_a_budget_is_spent_but_for_less_than_one_update():
    budget = spent("leapalign", SMALL, 50)
    assert updates_within("leapalign", SMALL, budget) == 50
    for spec in METHODS:
        n = updates_within(spec, SMALL, budget)
        assert spent(spec, SMALL, n) <= budget < spent(spec, SMALL, n + 1)
    assert updates_within("full", SMALL, 3) == 1


@pytest.mark.parametrize("updates", [37, 100, 138])
def test_rows_of_any_number_of_updates_are_judged_with_as_much_of_the_base_in_their_weights(updates):
    run = compare.cell("full", "--ema 0.97", 0, 1e-4, updates, of=100)
    assert cells.config_of(run.spec, run.flags).ema ** updates == pytest.approx(0.97**100, rel=0.01)


@pytest.mark.parametrize("spec", [*METHODS, *ABLATIONS])
def test_every_row_of_the_tables_can_be_run(spec):
    opened(spec, "--rollout-steps 8")


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
        opened(spec, SMALL)
    assert str(error.value).startswith(spec)


# ------------------------------------------------------------------------------------------ cells


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A folder for the cells' files in place of the repository's own."""
    monkeypatch.setattr(cells, "CELLS", tmp_path / "cells")
    return tmp_path / "cells"


@pytest.fixture
def started(monkeypatch, results) -> list[list[str]]:
    """The runs that were started. None trains: the judge is 1 - |lr - 1e-4|, whatever the method."""
    commands: list[list[str]] = []

    def fake(command: list[str], log: Path) -> int:
        commands.append(command)
        flags = dict(itertools.pairwise(command))
        out, steps = Path(flags["--out"]), int(flags["--steps"])
        out.mkdir(parents=True, exist_ok=True)
        updates = [dict(step=i, forwards=20, backwards=5, seconds=0.5, memory=1.0 + i / 10) for i in range(steps)]
        judge = 1 - abs(float(flags["--lr"]) - 1e-4)
        evals = [dict(step=i, **NUMBERS | dict(judge=judge), by_prompt={}, seconds=1.0) for i in (0, steps)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(u) + "\n" for u in updates))
        (out / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evals))
        return 0

    monkeypatch.setattr(cells, "launch", fake)
    return commands


CELL = Cell("refl", SMALL, seed=0, lr=1e-4, steps=4, eval_every=2)


def test_a_finished_cell_is_not_run_again(tmp_path, started):
    run = partial(cells.run_cell, work=tmp_path)
    once = cells.at_once(run, [CELL, CELL], jobs=2)
    again = cells.at_once(run, [CELL, replace(CELL, seed=1)], jobs=2)
    assert [dict(itertools.pairwise(c))["--seed"] for c in started] == ["0", "1"]
    assert once[CELL] == again[CELL]
    assert once[CELL]["evaluations"] == 4 * (20 + 2 * 5) and once[CELL]["memory"] == 1.3
    assert [e["evaluations"] for e in once[CELL]["curve"]] == [0, 120]


def test_a_cell_is_another_one_where_a_flag_or_what_it_reads_is_other(tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a red circle\n")
    (tmp_path / "m.py").write_text("from baselines import full\n")
    changed = [CELL, replace(CELL, seed=1), replace(CELL, lr=2e-4), replace(CELL, steps=5), replace(CELL, spec="full")]
    changed += [replace(CELL, flags=f"{SMALL} --prompts {tmp_path / 'p.txt'}")]
    changed[:0] = [replace(CELL, flags=f"{SMALL} --model hub/{name}") for name in "ab"]
    changed += [replace(CELL, spec=f"{tmp_path / 'm.py'}:full")]
    names = [cell.name for cell in changed]
    assert len(set(names)) == len(names)
    (tmp_path / "p.txt").write_text("a photo of a blue circle\n")
    (tmp_path / "m.py").write_text("from baselines import full  # now better\n")
    cells.digest.cache_clear()
    after = [cell.name for cell in changed]
    assert after[:-2] == names[:-2] and after[-2] != names[-2] and after[-1] != names[-1]


def test_a_cell_of_a_lora_is_another_one_where_the_model_under_it_is(broken, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / FILE).write_bytes(b"any")
    (lora / NOTE).write_text(json.dumps({"base": str(broken)}))
    cell = replace(CELL, flags=f"--model {lora}")
    name = cell.name
    (broken / "vae" / "config.json").write_text("{}")
    cells.digest.cache_clear()
    assert cell.name != name


def test_a_cell_is_another_one_where_the_preset_is_but_for_what_its_own_flags_say(monkeypatch):
    name = CELL.name
    for changed, same in (
        (dict(ema=0.5), False), (dict(size=("64", "32x96")), False), (dict(reward=("tiny:0.5",)), False),
        (dict(batch=32), True), (dict(lr=1e-3, steps=7, keep=9, device="cuda"), True),
    ):  # fmt: skip
        monkeypatch.setitem(PRESETS, "shapes", ("", replace(PRESETS["shapes"][1], **changed)))
        cells.config_of.cache_clear()
        assert (CELL.name == name) == same
        monkeypatch.undo()
    cells.config_of.cache_clear()


def test_a_row_has_its_methods_own_keywords_and_not_the_presets():
    preset = PRESETS["shapes"][1]
    assert preset.reward_input == "xhat_0" and cells.config_of("leapalign", "").reward_input is None
    assert opened("leapalign", "")[0].keywords == {} and opened("refl", "")[0].keywords == {}
    assert opened("leapalign --reward-input xhat_0", "")[0].keywords == dict(reward_input="xhat_0")
    assert opened("leapalign", "--reward-input xhat_0")[0].keywords == dict(reward_input="xhat_0")  # of all rows
    row = Cell("leapalign", SMALL, seed=0, lr=1e-4, steps=4, eval_every=2)
    assert parse(row.arguments)[0].reward_input is None  # the run itself is what is counted


def test_a_rows_own_flags_win_over_those_of_all_rows():
    assert cells.config_of("leapalign --batch 16", "--batch 8 --alpha 0.1").batch == 16
    assert cells.config_of("leapalign", "--batch 8 --alpha 0.1").alpha == 0.1


@pytest.mark.parametrize(
    "changes, words",
    [(dict(also=("refl --lr 1e-5",)), "--lr in 'refl --lr 1e-5'"), (dict(flags="--seed=3"), "--seed in '--seed=3'"),
     (dict(flags="--stop-early"), "--stop-early in"), (dict(also=("refl --skip_nonfinite 5",)), "--skip-nonfinite in"),
     (dict(select="jugde"), "--select jugde is not evaluated; there are attr"), (dict(equal=()), "--equal: give"),
     (dict(watch=("tiny",), flags="--reward judge", methods=("flow_grpo",), select="vivid"), "--select vivid"),
     (dict(also=("flow_grpo --reward judge",)), "two are named 'judge'"), (dict(also=("leapalign --tau 0",)), "--tau"),
     (dict(also=("leapalign --lam 0.4 0.3",)), "--lam has 2 values"), (dict(also=("refl --size 96",)), "--size 96"),
     (dict(also=("flow_grpo --lam 0.4",)), "--lam means nothing"), (dict(also=("flow_grpo --group 3",)), "--group 3"),
     (dict(also=("refl --reward shapes/vivid.py:vivid",), watch=("judge",)), "rows are compared by what they all")],
)  # fmt: skip
def test_what_would_fail_after_hours_is_refused_before_any_run(changes, words, tmp_path, started):
    with pytest.raises(ValueError, match=words):
        compare.run(replace(Config(methods=("leapalign",), flags=SMALL, work=tmp_path), **changes))
    assert not started


def test_a_run_that_was_not_finite_at_once_or_left_updates_out_is_summed_up(tmp_path):
    entries = [dict(step=i, **NUMBERS) for i in (0, 4)]
    (tmp_path / "eval.jsonl").write_text(json.dumps(entries[0]) + "\n")
    empty = cells.summary(tmp_path)
    assert empty["evaluations"] == empty["memory"] == 0 and empty["curve"][0]["evaluations"] == 0
    update = dict(forwards=20, backwards=5, seconds=0.5, memory=1.0)
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(dict(step=i, **update)) + "\n" for i in (0, 1, 3)))
    assert [e["evaluations"] for e in cells.summary(tmp_path)["curve"]] == [0, 90]


@pytest.mark.parametrize("code, diverged", [(3, True), (2, None)])
def test_a_run_that_ends_early_is_a_result_only_if_its_numbers_were_not_finite(
    tmp_path, started, monkeypatch, code, diverged
):
    inner = cells.launch

    def failing(command: list[str], log: Path) -> int:
        log.write_text("error: --lr is wrong\n")
        inner(command, log)
        return code

    monkeypatch.setattr(cells, "launch", failing)
    if diverged:
        assert cells.run_cell(CELL, tmp_path)["diverged"]
    else:
        with pytest.raises(ChildProcessError, match=r"(?s)ended with 2.*--lr is wrong"):
            cells.run_cell(CELL, tmp_path)
        assert not CELL.file.exists()


# ------------------------------------------------------------------------------------------ tables


def seeds_and_rates(started: list[list[str]]) -> set[tuple[int, float]]:
    return {(int(f["--seed"]), float(f["--lr"])) for f in (dict(itertools.pairwise(c)) for c in started)}


def test_rates_are_chosen_on_a_seed_of_their_own_and_used_at_all_others(tmp_path, started, capsys):
    grid = (0.2e-4, 0.4e-4, 0.5e-4, 0.7e-4, 1e-4, 2e-4, 4e-4)
    table = Config(methods=("leapalign", "refl"), seeds=2, steps=6, grid=grid, flags=SMALL, work=tmp_path / "work")
    compare.run(replace(table, out=tmp_path / "methods.json"))
    tried = seeds_and_rates(started)
    assert tried == {(GRID_SEED, rate) for rate in (0.7e-4, 1e-4, 2e-4)} | {(0, 1e-4), (1, 1e-4)}
    result = json.loads((tmp_path / "methods.json").read_text())
    assert list(result["tables"]) == ["evaluations", "updates"] and set(result["grid"]) == {"leapalign", "refl"}
    assert [r["steps"] for r in result["tables"]["updates"]["refl"]] == [6, 6]
    assert {"command", "hardware", "date", "revision"} <= set(result)

    count = len(started)  # a row more: only its own runs are made
    compare.run(replace(table, also=("full",), out=tmp_path / "methods.json"))
    assert {dict(itertools.pairwise(c))["--method"] for c in started[count:]} == {"full"}
    assert "| full |" in capsys.readouterr().out


def test_a_table_with_flags_of_ones_own_does_not_replace_what_the_repository_shows(tmp_path):
    assert file_of(Config(jobs=2), "methods") == RESULTS / "methods.json"
    for own in (Config(also=("refl",)), Config(seeds=1), Config(flags="--batch 32")):
        assert file_of(own, "methods") == Path("runs/methods.json")
        assert file_of(replace(own, out=tmp_path / "mine.json"), "methods") == tmp_path / "mine.json"


def test_ablations_and_ranges_have_one_low_rate_and_choose_none(tmp_path, started):
    for name in ("ablations", "ranges"):
        table = Config(table=name, seeds=1, steps=2, flags="--batch 8", work=tmp_path)
        compare.run(replace(table, out=tmp_path / f"{name}.json"))
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert {r["lr"] for row in result["tables"]["updates"].values() for r in row} == {7e-5}
        assert not result["grid"] and (tmp_path / f"{name}.png").stat().st_size > 1000
    compare.run(replace(table, methods=("leapalign",), grid=(1e-3,), out=tmp_path / "high.json"))
    assert seeds_and_rates(started[-1:]) == {(0, 1e-3)}
    with pytest.raises(ValueError, match=r"--grid 0\.1 0\.2: the table of ranges takes one learning rate"):
        compare.run(replace(table, grid=(0.1, 0.2)))


@pytest.mark.parametrize("peak, tried", [(2, 3), (1, 4), (4, 3), (8, 3), (0.25, 5), (0.0625, 5)])
def test_a_climb_ends_at_the_peak_or_at_the_grids_edge(peak, tried):
    asked = []

    def score(rate: float) -> tuple[float]:
        asked.append(rate)
        return (-abs(math.log(rate / peak)),)

    assert climb(score, (0.25, 0.5, 1, 2, 4, 8)) == min(max(peak, 0.25), 8)
    assert len(asked) == len(set(asked)) == tried


def test_of_rates_that_score_alike_the_lowest_within_reach_is_taken():
    assert climb(lambda rate: (0,), (0.25, 0.5, 1, 2, 4)) == 0.25
    assert climb(lambda rate: (rate < 3, rate), (1, 2, 4)) == 2  # the highest of those that did not diverge


def test_a_plan_runs_nothing(tmp_path, started, capsys):
    compare.run(Config(methods=("leapalign", "refl"), seeds=2, steps=6, flags=SMALL, work=tmp_path, plan=True))
    told = capsys.readouterr().out
    assert not started and not list(tmp_path.iterdir())
    assert "12 runs of 12 are to do" in told  # 6 of the grid; leapalign has as many updates in both tables
    table = Config(methods=("leapalign",), seeds=1, steps=6, grid=(1e-4,), flags=SMALL, work=tmp_path / "work")
    compare.run(replace(table, equal=("updates",), out=tmp_path / "m.json"))
    compare.run(replace(table, equal=("updates",), seeds=2, plan=True))
    assert "1 runs of 2 are to do" in capsys.readouterr().out


def test_the_rate_is_chosen_by_what_is_asked_for_among_runs_that_did_not_diverge(tmp_path, monkeypatch):
    ends = {1e-4: dict(judge=0.9, tiny=1.0), 2e-4: dict(judge=0.5, tiny=2.0), 4e-4: dict(judge=0.6, tiny=3.0)}

    def ran(cell: Cell, work: Path) -> dict:
        return run_of(GRID_SEED, diverged=cell.lr > 3e-4, **ends[cell.lr])

    monkeypatch.setattr(compare, "run_cell", ran)
    for select, lr in (("judge", 1e-4), ("tiny", 2e-4)):  # 4e-4 is higher by the latter, but ended early
        table = Config(grid=tuple(ends), select=select)
        chosen, _ = compare.choose(table, lambda spec, lr: compare.cell(spec, SMALL, 0, lr, 6, 6), "leapalign")
        assert chosen == lr


@pytest.mark.parametrize("equal", [("updates",), ("updates", "evaluations")])
def test_rates_are_chosen_at_equal_evaluations_whatever_the_table(equal, tmp_path, started):
    table = Config(methods=("leapalign", "full"), seeds=1, steps=8, equal=equal, grid=(7e-5, 1e-4), flags=SMALL)
    compare.run(replace(table, work=tmp_path / "work", out=tmp_path / "m.json"))
    runs = [dict(itertools.pairwise(c)) for c in started]
    within = updates_within("full", SMALL, spent("leapalign", SMALL, 8))
    assert within < 8
    trials = [int(r["--steps"]) for r in runs if r["--seed"] == str(GRID_SEED) and r["--method"] == "full"]
    assert set(trials) == {within}
    assert 8 in {int(r["--steps"]) for r in runs if r["--seed"] == "0" and r["--method"] == "full"}


@pytest.mark.parametrize("kind", ["methods", "ranges"])  # of rows that one names, perhaps none has a range
def test_a_table_shows_what_ended_early_and_a_rate_at_the_edge(tmp_path, kind):
    rows = {
        "leapalign": [run_of(0, judge=0.3), run_of(1, judge=0.3)],
        "full": [run_of(0, "full", True), run_of(1, "full", judge=0.6)],
    }
    grid = {"full": [dict(lr=lr, steps=9, score=0.5) for lr in (1e-4, 2e-4)]}
    origin = dict(command="c", hardware="h", date="d", revision="r", kind=kind, rewards=["tiny"], select="judge")
    (tmp_path / "m.json").write_text(json.dumps(origin | dict(grid=grid, tables=dict(updates=rows))))
    draw(tmp_path / "m.json")
    text = (tmp_path / "m.md").read_text()
    assert "| full (1 of 2 diverged) | 0.500 ±1.271 |" in text and "0.0001* |" in text and "| base | 0.400 |" in text
    assert "| full (1 of 2 diverged) | +0.200 ±1.271 |" in text


def test_differences_are_to_the_first_row_and_to_the_one_that_ends_highest():
    rows = {spec: [run_of(seed, spec, judge=x) for seed in (0, 1)] for spec, x in dict(a=0.5, b=0.3, c=0.6).items()}
    origin = dict(command="c", hardware="h", date="d", revision="r", kind="methods", rewards=["tiny"], select="judge")
    text = report(origin | dict(grid={}, tables=dict(updates=rows)))
    to_first, to_best = (text.split(f"| minus {name} |")[1] for name in "ac")
    assert "| b | -0.200 ±0.000 |" in to_first and "| c | +0.100 ±0.000 |" in to_first
    assert "| a | -0.100 ±0.000 |" in to_best and "| b | -0.300 ±0.000 |" in to_best and "| c |" not in to_best
    assert "minus" not in report(origin | dict(grid={}, tables=dict(updates=dict(a=rows["a"]))))


def test_a_row_with_a_range_in_a_table_of_methods_leaves_its_curves(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(draw_compare, "save_row", lambda charts, path, **_: titles.append([c.func for c in charts]))
    rows = {spec: [run_of(0, spec)] for spec in ("leapalign", "leapalign --low 0.2 --high 0.7")}
    origin = dict(command="c", hardware="h", date="d", revision="r", rewards=["tiny"], select="judge", grid={})
    for kind in ("methods", "ranges"):
        draw_compare.draw_compare(origin | dict(kind=kind, tables=dict(updates=rows)), tmp_path / "m.json")
    assert titles[0] == [line_chart, line_chart] and titles[2] == [draw_compare.ranges_chart]


def test_what_is_no_result_is_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json is no result"):
        draw(tmp_path / "x.json")


def test_a_method_of_a_file_enters_a_real_table(tmp_path, monkeypatch, results):
    """With train.py itself: a table of LeapAlign and of the README's method, and what it says of them."""
    (tmp_path / "my_method.py").write_text(blocks("python", "def noisy_steps"))
    lines = (ROOT / "shapes" / "eval-prompts.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join(lines[::30]) + "\n")

    monkeypatch.chdir(tmp_path)
    mine = "my_method.py:noisy_steps --option count=2"
    flags = f"--rollout-steps 3 --batch 8 --eval-prompts {shlex.quote(str(tmp_path / 'few.txt'))}"
    table = Config(methods=("leapalign", mine), seeds=1, steps=1, grid=(1e-4,), flags=flags, watch=("judge",))
    compare.run(replace(table, table="ablations", out=tmp_path / "table.json"))  # at equal updates alone
    rows = json.loads((tmp_path / "table.json").read_text())["tables"]["updates"]
    (ours,), (theirs,) = rows["leapalign"], rows[mine]
    assert (ours["evaluations"], theirs["evaluations"]) == (8 * (3 + 6), 8 * (3 + 6)) == (spent(mine, flags, 1),) * 2
    assert ours["curve"][0] == theirs["curve"][0] and ours["curve"][1] != theirs["curve"][1]
    assert f"| {mine} | {theirs['curve'][1]['judge']:.3f} |" in (tmp_path / "table.md").read_text()
