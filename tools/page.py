"""Several runs on one page, running ones too:  python -m tools.page runs/a runs/b  (writes runs/compared.html)

Their curves lie over each other; a table has the flags in which they differ. A run's own page is its index.html.
"""

import sys
from pathlib import Path

import tyro

from infra.flags import flags
from infra.page import runs_page


@flags
class PageFlags:
    """Write one page of one run or several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    # Not index.html: that name is taken in the folder of each run.
    out: Path = Path("runs/compared.html")
    """File of the page."""


def main() -> None:
    cfg = tyro.cli(PageFlags, description=__doc__)
    try:
        runs_page(cfg.runs, cfg.out)
    # A folder without logs, a log with a damaged line, a disk that is full.
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    main()
