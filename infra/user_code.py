"""A function from a user's file, named FILE.py:FUNCTION on the command line: a reward or a method.

The file may import our modules, installed packages, and the modules beside it.  Python looks for them in this order, so
nothing of the user's replaces a module of ours, whatever its name.
"""

import ast
import hashlib
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaps import Samples


def is_user_code(spec: str) -> bool:
    """Whether a name on the command line means a function of a user's file."""
    return ".py:" in spec


def file_hashes(specs: Iterable[str]) -> dict[str, str]:
    """A hash of every file that the user's functions among `specs` come from; a run records them."""
    hashes = {}
    for spec in filter(is_user_code, specs):
        # A reward's spec may end with a weight, FILE.py:FUNCTION:0.5.
        file = Path(spec.partition(".py:")[0] + ".py")
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes())
            hashes[str(file)] = digest.hexdigest()[:8]
    return hashes


class UserCodeError(ValueError):
    """What a user's code raised, whatever that was, with the file and the line."""


def load_function(spec: str, kind: str) -> Callable:
    """The function that FILE.py:FUNCTION names, called as `run_guest` does; `kind`, reward or method, is for errors.

    Raises ValueError if there is no such file or function, if the file does not run, or if a module beside it is hidden
    by another of the same name.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"no file {file!r} for the {kind} {spec!r}")

    # Behind our own folder, which stays first.  It is never removed: the function may import when it is called.
    sys.path.append(str(path.parent))
    with suppress(SyntaxError):  # raised again below, with its line
        check_neighbours(path)

    # No import statement can mean a name with a space, so the file may be called clip.py or logs.py.
    module_spec = spec_from_file_location(f"{kind} {path.stem}", path)
    module = module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look up their module
    run_guest(f"{kind} file {file} does not run", path, module_spec.loader.exec_module, module)

    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} defines no function {name!r}")

    @wraps(function)  # with the signature, which names a method's keywords
    def guest(*inputs: Any, **options: Any) -> Any:
        shapes = [f" on {tuple(value.shape)}" for value in inputs if isinstance(value, Tensor)]
        failure = f"{kind} {spec} fails{''.join(shapes)}"
        return run_guest(failure, path, function, *map(copy_of, inputs), **options)

    return guest


def run_guest(failure: str, file: Path, function: Callable, *inputs: Any, **options: Any) -> Any:
    """function(*inputs, **options), after which torch and the process are as before, whatever the function did to them.

    Random numbers of torch, numpy and Python are a function of torch's state before the call, so that a resumed run
    draws the same.  Raises UserCodeError that begins with `failure`, for SystemExit and KeyboardInterrupt as well.
    """
    seed = int(torch.randint(2**32, ()))  # drawn, so that the next call has other random numbers
    folder, threads, dtype = os.getcwd(), torch.get_num_threads(), torch.get_default_dtype()
    device = torch.get_default_device()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        # On exit this sets back what the function may have set: torch's generators, and whether gradients are made.
        with torch.random.fork_rng(gpus), torch.set_grad_enabled(torch.is_grad_enabled()):
            for seed_generator in (torch.manual_seed, np.random.seed, random.seed):
                seed_generator(seed)
            return function(*inputs, **options)
    except (torch.OutOfMemoryError, UserCodeError):  # of the network, or of a reward that a method calls
        raise
    except BaseException as error:
        raise UserCodeError(f"{failure}: {describe_error(error, file)}") from error
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(None)


def copy_of(value: Any) -> Any:
    """What a user's function is given in place of a value: it may write into its inputs."""
    if isinstance(value, Samples):
        return value._replace(sigmas=value.sigmas.clone(), noise=lambda i: value.noise(i).clone())
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, Sequence) else value  # prompts


def check_neighbours(path: Path) -> None:
    """Raise ValueError if a file imports a module beside it by a name for which Python finds another module."""
    # All imports of the file, also those within functions.
    modules = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:  # a relative import fails in a file on its own
            modules.append(node.module)

    folder = path.parent
    for module in modules:
        name = module.partition(".")[0]
        for neighbour in (folder / f"{name}.py", folder / name / "__init__.py"):
            if neighbour.is_file() and neighbour != path:
                origin = find_spec(name).origin
                if Path(origin).resolve() != neighbour:
                    raise ValueError(f"{path} imports {name}: Python finds {origin}, not {neighbour}. Rename yours")


def describe_error(error: BaseException, file: Path | None = None) -> str:
    """An error of a user's code, with the file and the line that raised it; the last line of `file` if it was there."""
    frames = traceback.extract_tb(error.__traceback__)
    frames_of_file = [frame for frame in frames if frame.filename == str(file)]
    frame = (frames_of_file or frames)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def revision() -> str:
    """The commit of this repository, with a + if tracked files differ from it; unknown where there is no git."""
    # --exclude: the hash, not the name of a tag before it.
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is an archive without .git
        return "unknown"
