"""Signals, which save and stop a run on all ranks, and two runs that want one folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from config import Config
from infra import files
from infra.checkpoints import checkpoint_folders
from infra.files import lock_folder, lock_text, unlock_folder
from infra.jsonl import read_log
from start import open_folder
from tests.processes import spread
from tests.runs import completed, run, short_config, undisturbed_run
from tests.two_starts import fault_of_two_starts

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    return short_config(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Config:
    return undisturbed_run(base, tmp_path_factory.mktemp("runs") / "undisturbed")


# --------------------------------------------------------------------------------------------- signals


def signalled(cfg: Config, number: int) -> str:
    """Train; in the third update the last rank gets a signal."""
    signal.signal(number, signal.SIG_DFL)  # shells ignore Ctrl-C for what runs in the background, and runs heed that
    real = train.one_update

    def one_update(c, setup, state, process, update):
        if update == 2 and process.rank == process.world_size - 1:
            os.kill(os.getpid(), number)
        return real(c, setup, state, process, update)

    train.one_update = one_update
    return run(cfg)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_with_a_code_to_requeue_on(number, code, base, undisturbed, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    messages = spread(2, signalled, cfg, number)  # one rank hears it, all stop
    assert all(message.startswith(f"{code} stopped by signal {int(number)}") for message in messages)
    assert "step_000003" in messages[0]  # the other rank may look before the first one has put the folder in place
    assert [f.name for f in checkpoint_folders(cfg.out)] == ["step_000002", "step_000003"]
    assert len(read_log(cfg.out / "metrics.jsonl")) == 3
    if number == signal.SIGTERM:  # what is saved does not depend on the signal
        assert completed(1, cfg) == "" and len(read_log(cfg.out / "metrics.jsonl")) == 8


def test_torchrun_as_the_readme_has_it_passes_a_signal_on(base, tmp_path):
    # So many updates that the signal comes before the last one, however busy the machine is.
    cfg = replace(base, out=tmp_path / "run", updates=1000, decay=False, resume=True, reward_input="xhat_0")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "900"]
    flags = ["--batch", "4", "--rollout-steps", "2", "--steps", "1000", "--eval-every", "4", "--save-every", "2"]
    flags += ["--ema", "0.9", "--no-decay", "--eval-prompts", str(cfg.eval_prompts), "--out", str(cfg.out), "--resume"]
    process = subprocess.Popen([sys.executable, *launcher, "train.py", *flags], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (cfg.out / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 1 and "stopped by signal" in said and "--resume goes on" in said, said
    done = int(checkpoint_folders(cfg.out)[-1].name[-6:])
    assert len(read_log(cfg.out / "metrics.jsonl")) == done < 1000
    assert completed(1, replace(cfg, updates=done + 1)) == "" and len(read_log(cfg.out / "metrics.jsonl")) == done + 1


# ----------------------------------------------------------------------------------- two runs, one folder


def test_a_folder_in_which_a_run_trains_is_refused_until_that_run_ends(base, tmp_path):
    cfg = replace(base, out=tmp_path / "run", resume=True)
    lock_folder(cfg.out)  # as a run of this process would
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    words = f"--out {cfg.out}: {owner} trains there: wait for it, or choose another folder"
    assert completed(1, cfg) == f"2 error: {words}"
    assert not cfg.out.exists() or not list(cfg.out.iterdir())
    cfg.out.mkdir(exist_ok=True)
    assert completed(1, cfg) == f"2 {words}"  # now before weights are read
    unlock_folder(cfg.out)
    assert completed(1, cfg) == ""


def test_of_two_runs_that_start_at_once_one_trains_as_if_alone(base, undisturbed, tmp_path):
    """`python -m tests.two_starts` tries other delays, and runs that are resumed."""
    assert fault_of_two_starts(replace(base, out=tmp_path / "run"), 0, undisturbed) == ""


def test_a_lock_whose_file_the_last_run_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    lock_folder(folder)
    flock = files.fcntl.flock

    def flock_as_the_last_run_ends(file, operation):
        unlock_folder(folder)
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock_as_the_last_run_ends)
    lock_folder(folder)
    # Otherwise the file that is locked would be a removed one, and a third run could lock a new file.
    assert lock_text(folder) == f"process {os.getpid()} on {socket.gethostname()}"
    unlock_folder(folder)


def test_a_smoke_run_empties_no_folder_in_which_another_run_trains(base, tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    file.touch()
    cfg = replace(base, smoke=True)
    setup = SimpleNamespace(out=file.parent)
    lock_folder(setup.out)  # flock holds between two open files of one process, too
    with pytest.raises(ValueError, match="trains there"):
        open_folder(cfg, setup, 0)
    unlock_folder(setup.out)
    assert file.exists()
