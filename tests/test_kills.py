"""A run can be killed at any moment, and continues as if nothing had been."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train
from config import Config
from infra import checkpoints
from infra.checkpoints import checkpoint_folders
from infra.files import PART
from infra.jsonl import read_log
from tests.kills import Moment, killed_at
from tests.processes import spread, start
from tests.runs import completed, run, same_run, short_config, stopped_after, undisturbed_run

ROOT = Path(train.__file__).parent
SEED = 7  # of the moments of the kills


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    return short_config(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Config:
    return undisturbed_run(base, tmp_path_factory.mktemp("runs") / "undisturbed")


# ---------------------------------------------------------------------------------------------- killed


def test_ten_kills_at_any_moment_leave_no_trace(base, undisturbed, tmp_path):
    """While it starts, trains, evaluates, saves, and, once done, while it writes its end again.

    `python -m tests.kills` kills at each kind of write.
    """
    cfg, chance, kept = replace(base, out=tmp_path / "run", resume=True), random.Random(SEED), []
    while len(kept) < 10:
        (process,) = start(1, killed_at, cfg, Moment(chance.randint(1, 219)))  # as many writes as a whole run makes
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kept.append(len(checkpoint_folders(cfg.out)))
        else:  # the run had ended before that moment came: from then on its end is written again
            assert process.exitcode == 0
    assert len(set(kept)) > 1, kept
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg)


def interrupted_save(cfg: Config, when: str) -> None:
    """Die by SIGKILL within the save of step 4."""

    real = checkpoints.dcp.save

    def save(state, checkpoint_id, **options):
        if int(state["step"]) == 4 and when == "before":
            checkpoint_id.mkdir(parents=True)
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        real(state, checkpoint_id=checkpoint_id, **options)
        if int(state["step"]) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.dcp.save = save
    run(cfg)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_within_a_save_leaves_the_checkpoint_before(when, base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    (process,) = start(1, interrupted_save, cfg, when)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000002"] and list(
        cfg.out.glob(f"checkpoints/*{PART}")
    )
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg) and not list(cfg.out.glob(f"checkpoints/*{PART}"))


def slow_save(cfg: Config) -> None:
    """Each checkpoint is written only once training has made another update; the run ends after five."""

    real = checkpoints.dcp.save

    def save(state, **options):
        while len(read_log(cfg.out / "metrics.jsonl")) <= int(state["step"]):
            time.sleep(0.01)
        real(state, **options)

    checkpoints.dcp.save = save
    stopped_after(cfg, 5)


def test_training_goes_on_while_a_checkpoint_is_written_of_what_was_there_before(base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    spread(1, slow_save, cfg)
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000002", "step_000004"]
    assert completed(1, cfg) == "" and same_run(undisturbed, cfg)
