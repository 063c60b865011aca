"""tools/slurm.sh: bash reads it, train.py knows its flags, and a job whose time is over is queued again."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from config import parse
from tests.tree import ROOT

SCRIPT = ROOT / "tools" / "slurm.sh"
# What Slurm's srun does with the signals that matter here: it hands them to the tasks, and ends as they end.
SRUN = """\
trap 'exit 1' USR1
touch started
for i in $(seq 100); do if [ -e finished ]; then exit 0; fi; sleep 0.1; done
"""


@pytest.fixture
def job(tmp_path):
    """The script as a job: Slurm's commands are stand-ins, and what is queued again is noted in a file."""
    commands = {
        ".venv/bin/activate": "",
        "bin/srun": f"#!/bin/bash\n{SRUN}",
        "bin/scontrol": '#!/bin/bash\nif [ $1 = show ]; then echo node-1; else echo "$@" >> queued; fi\n',
    }
    for name, text in commands.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    variables = {"SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env={**os.environ, **variables, "PATH": path})
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield process, tmp_path
    process.kill()


def test_a_job_whose_time_is_over_saves_and_is_queued_again(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 1  # torchrun's
    assert (folder / "queued").read_text() == "requeue 123\n"


def test_a_job_that_ends_by_itself_is_not_queued_again(job):
    process, folder = job
    (folder / "finished").touch()
    assert process.wait(30) == 0
    assert not (folder / "queued").exists()


def test_its_command_is_one_of_train():
    text = SCRIPT.read_text().replace("\\\n", " ")
    (arguments,) = re.findall(r"train\.py (.*) &$", text, re.MULTILINE)
    cfg, _ = parse(shlex.split(arguments))
    assert (cfg.shard, cfg.resume) == (8, True)
    assert Path(cfg.model).name == "FLUX.1-dev"
