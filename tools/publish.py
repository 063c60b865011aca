"""A run's model with a model card, on the Hugging Face hub:

python -m tools.publish runs/flux-dev-lora                    # writes the card and its picture beside the weights
python -m tools.publish runs/flux-dev-lora --repo me/my-flux  # and uploads the folder; after `hf auth login`
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from infra.flags import flags
from infra.jsonl import Entry, read_log

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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def publish(cfg: PublishFlags) -> None:
    """Write the card, and upload the folder if there is a repository. Raises ValueError if there is no such run."""
    weights = cfg.run / cfg.folder
    evaluations = read_log(cfg.run / "eval.jsonl")
    if cfg.folder == "best":
        # The first one is the base's, whose numbers the card compares with.
        evaluations = evaluations[:1] + [entry for entry in evaluations[1:] if "saved_to" in entry]
    if not weights.is_dir() or not evaluations:
        raise ValueError(f"{weights} is no model with an eval.jsonl beside it: give the folder of a finished run")
    run_flags = json.loads((cfg.run / "config.json").read_text())
    picture = cfg.run / PICTURE
    # A card shows pictures of its own repository, so it travels with the weights.
    if picture.exists():
        shutil.copy(picture, weights)
    is_lora = (weights / "lora.json").exists()
    text = card(run_flags, evaluations[0], evaluations[-1], cfg.repo or "NAME/MODEL", is_lora, picture.exists())
    (weights / "README.md").write_text(text)
    print(f"wrote {weights / 'README.md'}")
    if cfg.repo:
        from huggingface_hub import HfApi  # not needed to look at a card

        hub = HfApi()
        # Private: a licence such as FLUX.1-dev's is for the user to read before others load the weights.
        hub.create_repo(cfg.repo, private=True, exist_ok=True)
        print(f"uploaded to {hub.upload_folder(repo_id=cfg.repo, folder_path=weights)}")


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
        if isinstance(value, float) and name != "seconds":
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
