"""TensorBoard, Weights & Biases and Trackio, for those who ask for them: their packages are imported only here."""

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def open_trackers(kinds: Sequence[str], out: Path, config: dict, first: int) -> Callable[[int, dict, list[Path]], None]:
    """A function (update, entry, pictures) that logs to all of `kinds`.

    A run that goes on from the update `first` goes on in the trackers, too. TensorBoard replaces what was logged from
    `first` on; W&B and Trackio show both.
    """
    writer, wandb_run, trackio_run = None, None, None
    # As config.json has the flags: paths are strings.
    config = json.loads(json.dumps(config, default=str))
    options = dict(project="leapalign", name=out.name, config=config)
    if "tensorboard" in kinds:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=first, flush_secs=10)
    if "wandb" in kinds:
        import wandb

        id_file = out / "wandb-id"
        if first == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        # Without a key W&B asks for one, or raises and says what to do: nothing is foreseen here.
        wandb_run = wandb.init(**options, dir=str(out), id=id_file.read_text(), resume="allow")
        # W&B's own counter would refuse updates that are made again after --resume.
        wandb_run.define_metric("*", step_metric="step")
    if "trackio" in kinds:
        import trackio

        trackio_run = trackio.init(**options, resume="allow" if first else "never")

    def track(update: int, entry: dict, pictures: list[Path]) -> None:
        # Lists, such as the rewards of each image, stay in eval.jsonl.
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        numbers.pop("step", None)
        if writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, update)
            # A picture is called after its folder, so that viewers show a slider over the updates.
            for path in pictures:
                pixels = np.array(Image.open(path))
                writer.add_image(path.parent.name, pixels, update, dataformats="HWC")
        if wandb_run:
            images = {path.parent.name: wandb.Image(str(path)) for path in pictures}
            wandb_run.log({"step": update, **numbers, **images})
        if trackio_run:
            images = {path.parent.name: trackio.Image(str(path)) for path in pictures}
            trackio_run.log({**numbers, **images}, step=update)

    return track
