"""Files and folders that a kill cannot break: a reader finds the old or the new, never a mixture.

Both are written beside their target, as NAME.leapalign-part, and renamed when they are whole.  A file replaces the old
file in one step.  A folder cannot: the old folder becomes NAME.leapalign-old, the new one takes its name, and the old
one is removed.  After a kill between these two renames, `put_back` restores the old folder.

Nobody else makes such names, so what has them may be removed.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows has no such locks, and goes without
    fcntl = None

PART, OLD, LOCK = ".leapalign-part", ".leapalign-old", ".leapalign-lock"
LOCKS: dict[Path, TextIO] = {}  # open files of the folders that this process has locked


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path to write a file or a folder to.  It replaces `target` when the block ends without an error."""
    draft = part_of(target)
    try:
        yield draft
        put_in_place(draft, target)
    except BaseException:
        # Restore what was there.  If the disk is gone this fails too; the first error is the one to report.
        with suppress(OSError):
            part_of(target)
        raise


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a kill leaves all of it or nothing."""
    with replacing(file) as draft:
        draft.write_text(text)


def part_of(target: Path) -> Path:
    """The path to write the next `target` to, after what a kill or an error has left there is removed."""
    # Now rather than after the next write, which may fail: the disk may be full of what a kill has left.
    recover(target)
    draft = beside(target, PART)
    remove(draft)
    draft.parent.mkdir(parents=True, exist_ok=True)
    return draft


def put_in_place(path: Path, target: Path) -> None:
    """Move a whole file or folder to `target`.  What was there is removed."""
    # Python can neither exchange two folders in one step nor replace a folder that is not empty.
    if path.is_dir() and target.exists():
        target.replace(beside(target, OLD))
    path.replace(target)
    recover(target)


def recover(target: Path) -> None:
    """Undo a kill between the two renames of a folder, or remove the old folder after both."""
    put_back(target)
    remove(beside(target, OLD))


def put_back(target: Path) -> None:
    """Undo a kill between the two renames of a folder.  It removes nothing, so a reader may call it."""
    old = beside(target, OLD)
    # Between the renames there is an old folder and no target; after them there are both.
    if old.exists() and not target.exists():
        old.replace(target)


def beside(path: Path, suffix: str) -> Path:
    """The path in the same folder, with a suffix at the end of its name."""
    absolute = Path(os.path.abspath(path))  # "." has no name
    return absolute.with_name(absolute.name + suffix)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    # Of a link to a folder, the link alone.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(flag: str, folder: Path) -> None:
    """Raise ValueError, naming the flag, if a folder cannot be written, or cannot be made."""
    parent = first_parent(folder)
    try:
        beside(folder, LOCK).exists()  # raises OSError for a name that is too long
        # A file in the way, a link to nothing, a full disk, /proc: to write there tells.
        with TemporaryFile(dir=parent):
            pass
    except OSError:
        raise ValueError(f"{flag}: nothing can be written in {parent}") from None


def check_room(flag: str, folder: Path, needs: dict[str, float]) -> None:
    """Raise ValueError, naming the flag, if the disk has no room for all of `needs`, bytes by what takes them."""
    free = shutil.disk_usage(first_parent(folder)).free
    if sum(needs.values()) > free:
        sizes = ", ".join(f"{name} of {size / 1e9:.1f} GB" for name, size in needs.items())
        raise ValueError(f"{flag}: {free / 1e9:.1f} GB are free there, which is too little for {sizes}")


def first_parent(folder: Path) -> Path:
    """A folder, or the first of its parents that exists: what does not is made there."""
    parent = folder.absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent


def content_hash(files: Iterable[Path]) -> str:
    """A hash of the last 64 kB of each file: of weights that is enough, because training changes every tensor."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 2**16))  # FLUX.1-dev has 24 GB, a minute to read
            digest.update(stream.read())
    return digest.hexdigest()


def lock_folder(folder: Path) -> None:
    """Keep other processes from training in a folder. Raises ValueError naming the process that does.

    The system releases the lock when the process ends, however it ends.
    """
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "another process"
        file.close()
        raise ValueError(f"--out {folder}: {owner} trains there: wait for it, or choose another folder") from None
    # A run that ended between the two calls has removed this very file: another process may lock a new one.
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()
        return lock_folder(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    LOCKS[path] = file


def lock_file(folder: Path) -> Path:
    """The lock of a folder, also of one that is reached through a link."""
    return beside(folder.resolve(), LOCK)


def lock_text(folder: Path) -> str:
    """What this machine reads in the lock of a folder: which process trains there; nothing if there is no lock."""
    path = lock_file(folder)
    return path.read_text() if path.exists() else ""


def unlock_folder(folder: Path) -> None:
    """Release the lock, if this process has it."""
    path = lock_file(folder)
    if path in LOCKS:
        path.unlink(missing_ok=True)
        LOCKS.pop(path).close()
