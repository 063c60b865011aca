"""Processes of a test, ranks or commands: forked from a server that has imported everything and computed nothing."""

import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# A fork of pytest itself would inherit locks of threads that it does not have, and hang.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "evaluate", "diffusers", "pytest", "tests.frozen"])


def work(rank: int, world: int, port: int, queue: Any, function: Callable, args: tuple) -> None:
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in here.items()})
    torch.set_num_threads(1)
    try:
        result: Any = function(*args)
    except Exception:
        result = RuntimeError(f"rank {rank}: {traceback.format_exc()}")
    if queue is not None:
        torch.save((rank, result), buffer := io.BytesIO())
        queue.put(buffer.getvalue())


def start(world: int, function: Callable, *args: Any, queue: Any = None) -> list:
    """Processes that call function(*args) as the ranks of a world; results go to the queue."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [CONTEXT.Process(target=work, args=(rank, world, port, queue, function, args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def spread(world: int, function: Callable, *args: Any) -> list[Any]:
    """function(*args) on every rank of a world; the results in the order of ranks."""
    queue = CONTEXT.Queue()
    processes = start(world, function, *args, queue=queue)
    results = []
    try:
        while len(results) < world:
            try:
                results.append(torch.load(io.BytesIO(queue.get(timeout=5)), weights_only=False))
            except Empty:  # ranks are busy, however busy the machine is; or one has died without a word
                dead = [process.exitcode for process in processes if process.exitcode]
                assert not dead, f"a rank ended with {dead}"
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for _, result in results:
        if isinstance(result, RuntimeError):
            raise result
    return [result for _, result in sorted(results, key=lambda r: r[0])]


def run_script(words: list[str], files: list[Path]) -> None:
    """Be `python SCRIPT WORDS` in the repository's root, with one thread; what it prints goes to the files."""
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def script(*words: str | Path) -> subprocess.CompletedProcess:
    """`python SCRIPT WORDS`, without the seconds that imports take: its exit code, and what it printed."""
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = CONTEXT.Process(target=run_script, args=(words, files))
        process.start()
        process.join(400)
        process.kill()
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))
