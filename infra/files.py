"""Files and folders that are whole or not there, whenever the process is killed.

What is written is written beside its place, as NAME.part, and takes the place when it is whole.  A file replaces one
in one step; two folders are exchanged in one step where the system can do it (Linux).  Elsewhere the old folder steps
aside, as NAME.old, for the moment between two renames, and `recover` puts it back if a kill fell into that moment.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path to write a file or folder to, which takes the place of `target` if the block ends without an error."""
    part = part_of(target)
    try:
        yield part
        put_in_place(part, target)
    except BaseException:
        with suppress(OSError):
            recover(target)
            remove(part)
        raise


def part_of(target: Path) -> Path:
    """Where to write what will take the place of `target`; what an earlier kill has left there is removed."""
    recover(target)
    part = target.with_name(f"{target.name}.part")
    remove(part)
    part.parent.mkdir(parents=True, exist_ok=True)
    return part


def put_in_place(part: Path, target: Path) -> None:
    """Move a whole file or folder to `target`; what was there is removed."""
    if not part.is_dir() or not target.exists():
        part.replace(target)
    elif exchange(part, target):
        remove(part)
    else:
        old = target.with_name(f"{target.name}.old")
        target.replace(old)
        part.replace(target)
        remove(old)


def recover(target: Path) -> None:
    """Undo what a kill between the two renames of `put_in_place` has left."""
    old = target.with_name(f"{target.name}.old")
    if old.exists() and not target.exists():
        old.replace(target)
    remove(old)


def exchange(a: Path, b: Path) -> bool:
    """Give two paths each other's names in one step; False, and nothing done, where the system or disk cannot."""
    if sys.platform != "linux":
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux' renameat2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2018
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
