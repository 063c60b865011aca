"""Files and folders that are whole or not there, whenever the process is killed.

What is written is written beside its place, as NAME.leapalign-part, and takes the place when it is whole.  A file
replaces one in one step; two folders are exchanged in one step where the system can do it (Linux).  Elsewhere the old
folder steps aside, as NAME.leapalign-old, for the moment between two renames, and `put_back` undoes it if a kill fell
into that moment.  Nobody else has files of such names: what is found there is ours to remove.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART, OLD = ".leapalign-part", ".leapalign-old"


def check_writable(flag: str, folder: Path) -> None:
    """Raise ValueError naming the flag if nothing can be written in a folder, there or to be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag}: nothing can be written in {existing}")


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
    part = beside(target, PART)
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
        old = beside(target, OLD)
        target.replace(old)
        part.replace(target)
        remove(old)


def put_back(target: Path) -> None:
    """Undo a kill between the two renames of `put_in_place`; nothing is removed, so who only reads may ask for it."""
    old = beside(target, OLD)
    if old.exists() and not target.exists():
        old.replace(target)


def recover(target: Path) -> None:
    """Undo what a kill within `put_in_place` has left."""
    put_back(target)
    remove(beside(target, OLD))


def beside(target: Path, mark: str) -> Path:
    """A path with a mark at the end of its name."""
    whole = Path(os.path.abspath(target))  # "." has no name
    return whole.with_name(whole.name + mark)


def set_aside(path: Path, mark: str) -> None:
    """Give a path's name a mark, in place of what has that name."""
    remove(beside(path, mark))
    path.replace(beside(path, mark))


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
