"""Kill a run at every kind of write, resume it, and compare its end with an undisturbed run's, bit for bit.

    python -m tests.kills --count 60

What a kill leaves is what is on the disk, so moments are counted in writes, not in seconds. A run that is recorded
tells all writes: each kind of write is met just before its first time; where a file is opened, also with half of the
last one written. The lock that a killed run leaves is removed before every other resume.
"""

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro

from config import Config
from infra.files import LOCK, OLD, PART, beside
from tests.processes import spread, start
from tests.runs import completed, folder_with_undisturbed_run, run, same_run

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events of Python, beside those of opened files
SAME_BYTES = (".png", ".safetensors")


@dataclass(frozen=True)
class KillFlags:
    """Kill and resume runs of the tiny model."""

    count: int = 60
    """Kills, at least one of each kind; at most one more of each are made, before its last time."""


class Moment(NamedTuple):
    """When a run is killed: at the number-th write, from 1, whose kind begins with `kind`."""

    number: int
    kind: str = ""
    torn: bool = False  # half of the file is written


def main() -> None:
    cfg = tyro.cli(KillFlags)
    with folder_with_undisturbed_run() as (folder, base, undisturbed):
        (kinds,) = spread(1, recorded_writes, replace(base, out=folder / "recorded"))
        moments = choose_moments(kinds, cfg.count)
        failures = []
        for i, moment in enumerate(moments):
            run_cfg = replace(base, out=folder / f"run_{i}", resume=True)
            failure = fault_after_kill(run_cfg, moment, undisturbed, keeps_lock=i % 2 == 0)
            print(i, *moment, failure or "held", flush=True)
            if failure:
                failures.append((moment, failure))
    print(f"{len(set(kinds))} kinds of writes, {len(moments)} kills, {len(moments) - len(failures)} held", *failures)


# ------------------------------------------------------------------------------------------- writes


def watch_writes(out: Path, act: Callable[[str, Path, str | None], None]) -> None:
    """Call act(kind, file, mode) just before each write of this process in a run's folder, or to its lock."""

    def hook(event: str, args: tuple) -> None:
        mode = None
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = args[0]
            if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # shutil.rmtree names files by their folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        else:
            return
        file = os.fsdecode(path)
        if file.startswith(str(out)):
            place = re.sub(r"\d+", "N", file.removeprefix(str(out)))
            # All files of a model are written alike.
            place = re.sub(r"^/(best|final)([^/]*)/.*", r"/\1\2/*", place)
            act(f"{event} {place}", Path(file), mode)

    sys.addaudithook(hook)


def recorded_writes(cfg: Config) -> list[str]:
    """The kinds of all writes of a run, in their order."""
    kinds = []
    watch_writes(cfg.out, lambda kind, file, mode: kinds.append(kind))
    assert run(cfg) == ""
    return kinds


def choose_moments(kinds: list[str], count: int) -> list[Moment]:
    """The first write of each kind, half of the last file of each kind, then last writes up to `count`."""
    times = Counter(kinds)
    moments = [Moment(1, kind) for kind in times]
    moments += [Moment(times[kind], kind, torn=True) for kind in times if kind.startswith("open")]
    last = [Moment(times[kind], kind) for kind in times if times[kind] > 1]
    return moments + last[: max(0, count - len(moments))]


# -------------------------------------------------------------------------------------------- kills


def killed_at(cfg: Config, moment: Moment) -> None:
    """Train, and die by SIGKILL at a moment."""
    count = 0

    def act(kind: str, file: Path, mode: str | None) -> None:
        nonlocal count
        count += kind.startswith(moment.kind)
        if count == moment.number and kind.startswith(moment.kind):
            if moment.torn:
                with file.open("ab" if mode and "a" in mode else "wb") as half:  # counted too, and past the moment
                    half.write(b'{"step": ')
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(cfg.out, act)
    run(cfg)


def fault_after_kill(cfg: Config, moment: Moment, undisturbed: Config, keeps_lock: bool) -> str:
    """Kill a run and resume it: what differs from an undisturbed run, or nothing."""
    (process,) = start(1, killed_at, cfg, moment)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return f"not killed: exit code {process.exitcode}"
    if not keeps_lock:
        beside(cfg.out, LOCK).unlink(missing_ok=True)
    return completed(1, cfg) or difference(undisturbed, cfg)


def difference(a: Config, b: Config) -> str:
    """What differs between the folders of two runs, or nothing."""
    if not same_run(a, b):
        return "other weights or logs"
    files_of_a, files_of_b = files_of(a.out), files_of(b.out)
    names = files_of_a.keys() ^ files_of_b.keys()
    if names:
        return f"only one run has {sorted(names)}"
    for name, file in files_of_a.items():
        if file.suffix in SAME_BYTES and file.read_bytes() != files_of_b[name].read_bytes():
            return f"{name} has other bytes"
    left = [path.name for path in b.out.parent.glob(f"{b.out.name}.*") if path.name.endswith((PART, OLD, LOCK))]
    return f"left behind: {left}" if left else ""


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths within."""
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    main()
