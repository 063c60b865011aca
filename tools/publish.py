"""A run's model with a model card, on the Hugging Face hub:

python -m tools.publish runs/flux-dev-lora                    # writes the card and its picture beside the weights
python -m tools.publish runs/flux-dev-lora --repo me/my-flux  # and uploads the folder; after `hf auth login`
"""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from formats import sampling
from formats.lora import NOTE
from infra.files import replacing, write_whole
from infra.flags import flags
from infra.jsonl import Entry, read_log
from infra.prompts import printable
from infra.reading import parse_json, reason_of

LICENSES = {  # by a word of the base's name: header lines of its model card
    "FLUX.1-dev": """\
license: other
license_name: flux-1-dev-non-commercial-license
license_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md
""",
    "FLUX.2-klein-base-4B": "license: apache-2.0\n",
    "FLUX.1-schnell": "license: apache-2.0\n",
    "tiny-flux": "license: apache-2.0\n",
}
PICTURE = "before_after.png"


@flags
class PublishFlags:
    """Write a model card beside a run's weights, and upload them."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    folder: Literal["best", "final"] = "best"
    """Which of its weights."""
    repo: str | None = None
    """Repository on the hub, NAME/MODEL, private until you change that. Without it nothing is sent."""


def main() -> None:
    cfg = tyro.cli(PublishFlags, description=__doc__)
    try:
        publish(cfg)
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        raise SystemExit(2) from None


def publish(cfg: PublishFlags) -> None:
    """Write the card, and upload the folder if there is a repository. Raises ValueError naming what is no run's."""
    weights, picture, log = cfg.run / cfg.folder, cfg.run / PICTURE, cfg.run / "eval.jsonl"
    evaluations = read_log(log, lambda entry: entry["step"] + 0)
    is_lora = (weights / NOTE).exists()
    if not evaluations or not (is_lora or (weights / "model_index.json").exists()):
        raise ValueError(f"{weights} is no model with an eval.jsonl beside it: give the folder of a finished run")
    # Whoever wrote a link chose the file that would be sent, or written over.
    for path in (weights, picture, *weights.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link: put the file itself there")
    # A log may have later evaluations than those of the weights: the run went on from there, or best/ was best.
    remedy = 'write "updates": N into it, the number of updates that these weights were trained for'
    updates = parse_json(weights / sampling.FILE, lambda entries: entries["updates"], remedy)
    evaluation_after = {entry["step"]: entry for entry in evaluations}
    for step in (0, updates):
        if step not in evaluation_after:
            raise ValueError(f"{log} has no evaluation after {step} updates, whose numbers the card of {weights} needs")
    first, last = evaluation_after[0], evaluation_after[updates]

    def write_card(run_flags: dict[str, Any]) -> str:
        return card(run_flags, first, last, cfg.repo or "NAME/MODEL", is_lora, picture.exists())

    text = parse_json(cfg.run / "config.json", write_card, "it is no run's")
    # A card shows pictures of its own repository, so it travels with the weights.
    if picture.exists():
        with replacing(weights / PICTURE) as draft:
            shutil.copy(picture, draft)
    write_whole(weights / "README.md", text)
    print(f"wrote {weights / 'README.md'}")
    if cfg.repo:
        try:
            print(f"uploaded to {upload(weights, cfg.repo)}")
        except Exception as error:  # huggingface_hub and its client have exceptions of their own
            raise ValueError(f"--repo {cfg.repo}: {reason_of(error)}; give the command again") from error


def upload(folder: Path, repo: str) -> str:
    """Send a folder to the hub; returns the address."""
    from huggingface_hub import HfApi  # not needed to look at a card

    hub = HfApi()
    # Private: a licence such as FLUX.1-dev's is for the user to read before others load the weights.
    hub.create_repo(repo, private=True, exist_ok=True)
    return hub.upload_folder(repo_id=repo, folder_path=folder)


def card(run_flags: dict[str, Any], first: Entry, last: Entry, repo: str, is_lora: bool, has_picture: bool) -> str:
    """The model card: licence and base, picture, means before and after, how to load, command."""
    base = run_flags["base"] or run_flags["model"]
    # The licence of the base is that of the weights. That of a base that is not listed is for the user to fill in.
    license_lines = next((LICENSES[word] for word in LICENSES if word in base), "license: unknown\n")
    # --model is a local folder in a run, and others need the name on the hub.
    base_name = Path(base).name
    hub_base = f"black-forest-labs/{base_name}" if base_name in ("FLUX.1-dev", "FLUX.2-klein-base-4B") else base
    rows = ["| mean on fixed prompts and noise | before | after |", "|---|--:|--:|"]
    for name, value in last.items():
        # Means of rewards are floats; by_prompt is a list, step an int.
        if isinstance(value, float) and isinstance(first.get(name), float) and name != "seconds":
            rows.append(f"| {name} | {first[name]:.3f} | {value:.3f} |")
    table = "\n".join(rows)
    if is_lora:
        load = f'pipe = DiffusionPipeline.from_pretrained("{hub_base}")\npipe.load_lora_weights("{repo}")'
    else:
        load = f'pipe = DiffusionPipeline.from_pretrained("{repo}")'
    return f"""\
---
{license_lines}base_model: {hub_base}
library_name: diffusers
pipeline_tag: text-to-image
---

# {repo.rpartition("/")[2]}

{hub_base}, tuned with {run_flags["method"]} for {last["step"]} updates to raise {", ".join(run_flags["reward"])}.
{f"![before and after]({PICTURE})" if has_picture else ""}

{table}

```python
from diffusers import DiffusionPipeline

{load}
```

Trained with

    {run_flags["command"]}
"""


if __name__ == "__main__":
    main()
