"""What a file of tensors is, by its header, before a weight is read."""

import re
from pathlib import Path

from safetensors import safe_open

from infra.reading import AGAIN, parse_file

# Configurations, weights and tokenizers, by the names that diffusers and transformers give them.
MODELS_FILE = re.compile(
    r"\w*config\.json|[\w-]+\.safetensors(\.index\.json)?|vocab\.(json|txt)|merges\.txt|tokenizer\.json|spiece\.model"
    r"|\w*tokens(_map)?\.json|chat_template\.jinja"
)


def tensor_names(file: Path, remedy: str = AGAIN) -> list[str]:
    """The names of a safetensors file's tensors, from its header. Raises ValueError if the header cannot be read."""
    # The header is JSON at the start of the file: of 24 GB, 100 kB are read.
    return parse_file(file, lambda path: list(safe_open(path, "pt").keys()), remedy)


def check_links(folders: list[Path], model: Path) -> None:
    """Raise ValueError if a file of these folders is a link that leaves the model, and would not be copied."""
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if MODELS_FILE.fullmatch(file.name) and file.is_file() and not is_models_file(file, model):
                raise ValueError(
                    f"{file} is a link out of {model}, which best/ and final/ copy: put the file itself there"
                )


def is_models_file(file: Path, model: Path) -> bool:
    """Whether a file has the name of a model's configuration, weights or tokenizer, and lies in the model's folder.

    Only such files are copied: saved models are published. Code, pickles, notes, devices, and links out of the folder
    are not; a hub's cache links from snapshots/ to blobs/.
    """
    # By the real path: a link may lead to any file of the machine, and saved models are shared.
    root = model.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    return bool(MODELS_FILE.fullmatch(file.name)) and file.is_file() and file.resolve().is_relative_to(root)
