"""Tables and pictures of results:  python -m experiments.draw experiments/results/methods.json ...  (seconds)

Writes NAME.md and pictures beside each NAME.json. Nothing is measured here, so tables and pictures can be changed
without a new run.
"""

import json
from pathlib import Path

import tyro

from experiments.draw_compare import draw_compare
from experiments.draw_fidelity import draw_fidelity
from experiments.record import run_command
from infra.flags import flags

# Other kinds are results of finished studies, whose code is at revision d28ef77.
KINDS = dict(methods=draw_compare, ablations=draw_compare, ranges=draw_compare, fidelity=draw_fidelity)


@flags
class ResultFlags:
    """Write the tables and pictures of results."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files that compare or fidelity wrote."""


def draw_all(cfg: ResultFlags) -> None:
    for path in cfg.results:
        draw_result(path)


def draw_result(path: Path) -> None:
    """Write the tables and pictures of a result, and print its tables. Raises ValueError if the file is no result."""
    try:
        result = json.loads(path.read_text())
        draw = KINDS[result["kind"]]
    # Any JSON file may be named here.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of compare or fidelity: {error!r}") from error
    draw(result, path)
    # People who wait for a command want its numbers on the screen.
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_command(draw_all, ResultFlags, __doc__)
