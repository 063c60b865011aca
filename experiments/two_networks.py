"""train.py, with early and late steps made by networks of their own:  two_networks.py 0.7 shapes --method refl ...

Steps from noise levels above the first number are made by one copy of --model, and all others by a second one.  What
follows are train.py's flags, and all else is train.py itself; best/ and final/ hold a model folder for each network.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as for train.py, which stands there

import infra.saving  # noqa: E402
import start  # noqa: E402
from config import Config  # noqa: E402
from infra.checkpoints import Run  # noqa: E402
from infra.distributed import World  # noqa: E402
from infra.folders import Pipeline  # noqa: E402
from model import Flux  # noqa: E402


class Experts(nn.Module):
    """Two networks as one: `early` at noise levels above `split`, `late` below. Called as a Flux is."""

    def __init__(self, early: Flux, late: Flux, split: float) -> None:
        super().__init__()
        self.early, self.late, self.split = early, late, split
        self.config = early.config

    @property
    def img_in(self) -> nn.Linear:
        return self.early.img_in  # by which a Flux tells its precision and its device

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, *rest: Any) -> Any:
        early = timesteps > self.split
        if early.any() != early.all():
            raise ValueError("two networks take samples of one call on one side of the split: this method mixes levels")
        network = self.early if early.all() else self.late
        return network(img, img_ids, txt, txt_ids, timesteps, *rest)


def main(split: float) -> None:
    """Run train.py, where a model is loaded twice and written twice."""
    load, write, begin = start.load_pipeline, infra.saving.write_model, Run.__init__

    def load_two(cfg: Config, world: World) -> Pipeline:
        pipe = load(cfg, world)
        return replace(pipe, flux=Experts(pipe.flux, load(cfg, world).flux, split))

    def write_two(folder: Path, pipe: Pipeline, world: World) -> None:
        for name in ("early", "late"):
            write(folder / name, replace(pipe, flux=getattr(pipe.flux, name)), world)

    def begin_whole(run: Run, *args: Any) -> None:
        begin(run, *args)
        run.state(0)  # makes moments for all weights: a checkpoint needs those of a network without gradient, too

    Run.__init__ = begin_whole
    start.load_pipeline, infra.saving.write_model = load_two, write_two
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    try:
        level = float(sys.argv.pop(1))
    except (IndexError, ValueError):
        raise SystemExit("error: give a noise level between 0 and 1, and then train.py's flags") from None
    main(level)
