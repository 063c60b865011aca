"""The files that the presets need and the repository does not ship: where each belongs, and what gets it."""

from pathlib import Path

from config import Config

MJHQ = "hf download playgroundai/MJHQ-30K meta_data.json --repo-type dataset --local-dir weights/MJHQ-30K"
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
QWEN = "Qwen/Qwen2-VL-7B-Instruct config.json tokenizer.json tokenizer_config.json"
# Path -> what it is, with the GB of its weights where they are known, and the commands of the READMEs.
DOWNLOADS = {
    "weights/FLUX.1-dev": (
        # In bf16: 23.8 GB the transformer, 9.8 T5 and CLIP, 0.2 the VAE.
        "34 GB; accept the licence on its hub page first, and `hf auth login`",
        "hf download black-forest-labs/FLUX.1-dev --local-dir weights/FLUX.1-dev --exclude flux1-dev.safetensors",
    ),
    "weights/FLUX.2-klein-base-4B": (
        # In bf16: 7.8 GB the transformer, 8.1 Qwen3, 0.2 the VAE.
        "16 GB",
        "hf download black-forest-labs/FLUX.2-klein-base-4B --local-dir weights/FLUX.2-klein-base-4B --exclude "
        "flux-2-klein-base-4b.safetensors",
    ),
    "weights/HPS_v2.1_compressed.pt": (
        "the reward hpsv2, or say hpsv2=PATH",
        "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir weights",
    ),
    "weights/PickScore_v1": (
        # 0.99 B parameters in fp32.
        "the reward pickscore, 4 GB of weights, or say pickscore=PATH",
        "hf download yuvalkirstain/PickScore_v1 --local-dir weights/PickScore_v1",
    ),
    "weights/HPSv3": (
        "the reward hpsv3, 17 GB, or say hpsv3=PATH",
        "hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir weights/HPSv3",
        # The weights are published without the small files beside them.
        f"hf download {QWEN} --local-dir weights/HPSv3",
    ),
    "weights/ImageReward": (
        "the reward imagereward, or say imagereward=PATH",
        "hf download THUDM/ImageReward ImageReward.pt --local-dir weights/ImageReward",
        "hf download google-bert/bert-base-uncased vocab.txt --local-dir weights/ImageReward",
    ),
    "weights/train-prompts.txt": (
        "50,000 prompts, none of GenEval's",
        # None of the prompts that GenEval evaluates on, so that file comes first.
        f"wget -P weights {GENEVAL}",
        "python -m tools.prompts --file weights/train-prompts.txt --without weights/evaluation_metadata.jsonl",
    ),
    "weights/mjhq-train-prompts.txt": ("prompts; the program in scorers/README.md then writes them", MJHQ),
}


def check_downloads(cfg: Config, reward_files: dict[str, str]) -> None:
    """Raise ValueError with all downloads of a run that are missing, and the commands that get them."""
    paths = [path for path in downloads_of(cfg, reward_files) if not Path(path).exists()]
    if paths:
        # All at once: a start takes seconds, and the next download hours.
        raise ValueError("files are missing; get them with\n" + "\n".join(map(how_to_get, paths)))


def list_downloads(cfg: Config, reward_files: dict[str, str]) -> None:
    """Print the downloads of a run, which of them are here, and the commands that get them."""
    for path in downloads_of(cfg, reward_files):
        print("here   " if Path(path).exists() else "missing", how_to_get(path))


def downloads_of(cfg: Config, reward_files: dict[str, str]) -> list[str]:
    """The downloads that a run reads. `reward_files` are rewards.WEIGHTS: reward -> its path."""
    paths = [cfg.model, cfg.base, cfg.prompts, cfg.eval_prompts]
    for spec in (*cfg.reward, *cfg.watch):
        name, _, _ = spec.partition(":")  # without its weight; NAME=PATH is a file of the user's
        paths.append(reward_files.get(name))
    # Other paths are the user's: the checks of prompts, models and rewards name what is wrong with those.
    return [str(path) for path in paths if str(path) in DOWNLOADS]


def how_to_get(path: str) -> str:
    """What a download is, and its commands, a line each."""
    note, *commands = DOWNLOADS[path]
    return "\n    ".join([f"{path}: {note}", *commands])
