"""The files of the repository, without those that a user has put beside them."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sources(pattern: str) -> list[Path]:
    """The tracked files that match a pattern of the root, such as *.py or infra/*.py; all that match without git."""
    names = tracked_names()
    return [file for file in sorted(ROOT.glob(pattern)) if not names or str(file.relative_to(ROOT)) in names]


@cache
def tracked_names() -> set[str]:
    """What git tracks, by paths from the root; empty where there is no git, as in a downloaded archive."""
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return set()
    return set(listing.stdout.splitlines())
