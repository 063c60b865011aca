"""TensorBoard and Weights & Biases, for those who ask for them: their packages are imported only here."""

import importlib.util
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def check_trackers(kinds: Sequence[str]) -> None:
    """Raise ValueError if a package is missing. The network is not used."""
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise ValueError(f"--log {kind} needs that package: pip install {kind}, or leave the flag out")


def open_trackers(kinds: Sequence[str], out: Path, config: dict, first: int) -> Callable[[int, dict, list[Path]], None]:
    """A function (update, entry, pictures) that logs to all of `kinds`.

    A run that goes on from the update `first` goes on in the trackers, too. TensorBoard replaces what was logged from
    `first` on; W&B shows both.
    """
    writer, run = None, None
    if "tensorboard" in kinds:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=first, flush_secs=10)
    if "wandb" in kinds:
        import wandb

        id_file = out / "wandb-id"
        if first == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        options = dict(project="leapalign", name=out.name, dir=str(out), config=config)
        # Without a key W&B asks for one, or raises and says what to do: nothing is foreseen here.
        run = wandb.init(**options, id=id_file.read_text(), resume="allow")
        # W&B's own counter would refuse updates that are made again after --resume.
        run.define_metric("*", step_metric="step")

    def track(update: int, entry: dict, pictures: list[Path]) -> None:
        # Lists, such as the rewards of each image, stay in eval.jsonl.
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        numbers.pop("step", None)
        if writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, update)
            # A picture is called after its folder, so that viewers show a slider over the updates.
            for path in pictures:
                writer.add_image(path.parent.name, np.array(Image.open(path)), update, dataformats="HWC")
        if run:
            images = {path.parent.name: wandb.Image(str(path)) for path in pictures}
            run.log({"step": update, **numbers, **images})

    return track
