"""What the commands of this folder share."""

import sys
from collections.abc import Callable
from typing import Any

import tyro


def main(run: Callable[[Any], None], flags: type, about: str | None) -> None:
    """Read a command's flags and run it: ends with 2 where they are wrong, with 1 where a process of its own failed."""
    try:
        run(tyro.cli(flags, description=about))
    except (ValueError, ChildProcessError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
