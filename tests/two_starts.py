"""Start two runs in one folder: one must train as if alone, the other must be told which process does.

    python -m tests.two_starts --count 20

Delays between the starts go from 0 to 2 seconds. Every other pair resumes a run that had stopped.
"""

import io
import shutil
import socket
import time
from dataclasses import dataclass, replace

import torch
import tyro

from config import Config
from tests.kills import difference
from tests.processes import CONTEXT, spread, start
from tests.runs import folder_with_undisturbed_run, run, stopped_after

LONGEST_DELAY = 2.0  # seconds


@dataclass(frozen=True)
class StartFlags:
    """Start pairs of runs of the tiny model."""

    count: int = 20
    """Pairs."""


def main() -> None:
    cfg = tyro.cli(StartFlags)
    with folder_with_undisturbed_run() as (folder, base, undisturbed):
        stopped = replace(base, out=folder / "stopped")
        spread(1, stopped_after, stopped, 5)
        faults = []
        for i in range(cfg.count):
            delay = LONGEST_DELAY * (i // 2) / max(1, (cfg.count - 1) // 2)
            run_cfg = replace(base, out=folder / f"run_{i}", resume=i % 2 == 1)
            if run_cfg.resume:
                shutil.copytree(stopped.out, run_cfg.out)
            fault = fault_of_two_starts(run_cfg, delay, undisturbed)
            print(i, f"delay {delay:.2f} s", "resume" if run_cfg.resume else "fresh", fault or "held", flush=True)
            if fault:
                faults.append(fault)
    print(f"{cfg.count} pairs of starts, {cfg.count - len(faults)} held")


def fault_of_two_starts(cfg: Config, delay: float, undisturbed: Config) -> str:
    """Start two runs in one folder, the second after `delay` seconds: what went wrong, or nothing."""
    queue = CONTEXT.Queue()
    processes = start(1, run, cfg, queue=queue)
    time.sleep(delay)
    processes += start(1, run, cfg, queue=queue)
    messages = []
    for _ in processes:
        _, message = torch.load(io.BytesIO(queue.get(timeout=600)), weights_only=False)
        messages.append(message)
    for process in processes:
        process.join()
    names = [f"process {process.pid} on {socket.gethostname()} trains there" for process in processes]
    refused, ended = sorted(messages, reverse=True)
    if ended or not refused.startswith("2 ") or not any(name in refused for name in names):
        return str(messages)
    return difference(undisturbed, cfg)


if __name__ == "__main__":
    main()
