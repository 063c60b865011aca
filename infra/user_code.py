"""A function from a file of the user's, named FILE.py:FUNCTION: a reward, or a method.

What the file imports is the user's: their installed packages, and the files beside theirs, even those that are called
as one of ours is (config.py, model.py, ...).  None of it takes the place of our own modules.
"""

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def is_user_code(spec: str) -> bool:
    """Whether a name on the command line is one of a file's functions."""
    return ".py:" in spec


def file_hashes(specs: Iterable[str]) -> dict[str, str]:
    """A hash of each file that some of the names are functions of."""
    files = {re.match(r"(.*?\.py):", spec).group(1) for spec in specs if is_user_code(spec)}
    return {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:8] for f in sorted(files) if Path(f).is_file()}


def load_function(spec: str, kind: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names; `kind` (reward, method) is what errors call it.

    Raises ValueError if there is no such file or function, or the file does not run.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"no file {file!r} for the {kind} {spec!r}")
    folder, theirs = Path(file).resolve().parent, {}
    clash = top_names(folder) & top_names(ROOT) if folder != ROOT else set()
    module_spec = importlib.util.spec_from_file_location(f"{kind}_{Path(file).stem}", file)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        with beside(folder, clash, theirs):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the latter by a main() or parse_args() that nothing guards
        raise ValueError(f"{kind} file {file} does not run: {describe_error(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} defines no function {name!r}")
    if not clash:
        return function

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:  # with its modules, for what it imports only now
        with beside(folder, clash, theirs):
            return function(*args, **options)

    return called


@contextmanager
def beside(folder: Path, clash: set[str], theirs: dict[str, ModuleType]) -> Iterator[None]:
    """Within, imports look into `folder` first, and the names in `clash` are the user's modules, kept in `theirs`."""

    def clashing() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in clash}

    ours = clashing()
    for name in ours:
        del sys.modules[name]
    sys.modules.update(theirs)
    path = str(folder)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
        if path not in sys.path:
            sys.path.append(path)  # for what a function imports only when it is called
        theirs.update(clashing())
        for name in clashing():
            del sys.modules[name]
        sys.modules.update(ours)


def top_names(folder: Path) -> set[str]:
    """What can be imported from a folder: its files and packages."""
    return {f.stem for f in folder.glob("*.py")} | {f.parent.name for f in folder.glob("*/__init__.py")}


def describe_error(error: BaseException) -> str:
    """An error of the user's code, with the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
