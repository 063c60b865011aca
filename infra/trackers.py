"""TensorBoard and Weights & Biases, for those who ask for them: their packages are imported only here."""

import importlib.util
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from PIL import Image

OFFLINE = ("offline", "disabled", "dryrun")  # modes in which W&B asks nobody


def check_trackers(kinds: Sequence[str]) -> None:
    """Raise ValueError if a package is missing, or W&B would ask for a key where nobody can answer. No network."""
    if missing := [kind for kind in kinds if importlib.util.find_spec(kind) is None]:
        raise ValueError(f"--log {missing[0]} needs that package: pip install {missing[0]}, or leave the flag out")
    if "wandb" in kinds and not (is_offline(os.environ) or has_key(os.environ) or sys.stdin.isatty()):
        raise ValueError(
            "--log wandb finds no key, and there is no terminal to ask for one: run `wandb login` once, set "
            "WANDB_API_KEY, or log to the disk with WANDB_MODE=offline"
        )


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether W&B is told not to use the network, by a variable or by the settings that `wandb offline` writes."""
    settings = [Path("wandb") / "settings", Path.home() / ".config" / "wandb" / "settings"]
    written = [line.partition("=") for file in settings if file.is_file() for line in file.read_text().splitlines()]
    modes = [value.strip() for key, _, value in written if key.strip() == "mode"]
    mode = environment.get("WANDB_MODE") or (modes[0] if modes else "")
    return mode in OFFLINE or environment.get("WANDB_DISABLED", "").lower() in ("1", "true")


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B finds a key by itself: in a variable, or where `wandb login` has left it."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    places = [environment.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in [Path(place) for place in places if place]:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def open_trackers(
    kinds: Sequence[str], out: Path, config: dict[str, Any], first: int
) -> Callable[[int, dict, list[Path]], None]:
    """A function (step, numbers, pictures) that logs to all of `kinds`, whose packages are imported only here.

    `first` is the step that a run starts or goes on from: what was logged of later ones is overwritten; W&B, which
    only adds, shows both.
    """
    trackers: list[Callable[[int, dict, list[Path]], None]] = []
    if "tensorboard" in kinds:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=first, flush_secs=10)

        def to_tensorboard(step: int, numbers: dict, pictures: list[Path]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            for path in pictures:
                writer.add_image(path.parent.name, np.array(Image.open(path)), step, dataformats="HWC")

        trackers.append(to_tensorboard)
    if "wandb" in kinds:
        import wandb

        known = out / "wandb-id"
        if not first or not known.exists():  # else the run goes on there, too
            known.write_text(uuid.uuid4().hex[:8])
        run = wandb.init(
            project="leapalign", dir=str(out), config=config, name=out.name, id=known.read_text(), resume="allow"
        )
        run.define_metric("*", step_metric="step")  # W&B's own counter would refuse steps that are made again

        def to_wandb(step: int, numbers: dict, pictures: list[Path]) -> None:
            run.log({"step": step, **numbers, **{p.parent.name: wandb.Image(str(p)) for p in pictures}})

        trackers.append(to_wandb)

    def track(step: int, numbers: dict[str, Any], pictures: list[Path]) -> None:
        plain = {k: v for k, v in numbers.items() if isinstance(v, int | float) and k != "step"}
        for tracker in trackers:
            tracker(step, plain, pictures)

    return track
