"""Tables and pictures of results:  python -m experiments.draw experiments/results/*.json  (seconds)

Writes NAME.md and pictures beside each NAME.json.  Nothing is measured here, so what is shown can be changed without
running anything again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.command import main
from experiments.draw_compare import draw_compare
from experiments.draw_fidelity import draw_fidelity


@dataclass(frozen=True)
class Config:
    """Write the tables and pictures of results."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files that compare or fidelity wrote."""


def draw(path: Path) -> None:
    """Write what belongs beside a result, and print its tables. Raises ValueError for a file that is none."""
    try:
        result = json.loads(path.read_text())
        kind = result["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of compare or fidelity: {error!r}") from error
    draw_kind = draw_fidelity if kind == "fidelity" else draw_compare
    draw_kind(result, path)
    print(path.with_suffix(".md").read_text())


def run(cfg: Config) -> None:
    for path in cfg.results:
        draw(path)


if __name__ == "__main__":
    main(run, Config, __doc__)
