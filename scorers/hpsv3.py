"""HPSv3: Qwen2-VL-7B with a head that reads a special token (MizzenAI/HPSv3).

A folder holds it: `HPSv3.safetensors`, and of Qwen/Qwen2-VL-7B-Instruct `config.json` and the tokenizer's files, not
its weights.  The prompt is the published one, to the byte, in hpsv3-prompt.txt; a model is out of its depth with any
other.  Three habits of the published code, which its scores rest on:

    positions are counted 0, 1, 2 ... through the sequence, image included, not by Qwen2-VL's rows and columns
    all of the network is bf16, its rotary frequencies too, but the head is fp32
    the image is resized to about 448x448 pixels, sides multiples of 28, and is seen as a film of two frames

Legend: b images, n tokens, d the width of the network.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from scorers.common import Device, Scorer, build, file_in, freeze, normalize, read_tensors, resize

FILE = "HPSv3.safetensors"
PIXELS = 448 * 448  # of a resized image
MERGE, FRAMES = 2, 2  # patches a token spans each way; frames of the film
PROMPT = (Path(__file__).parent / "hpsv3-prompt.txt").read_text(encoding="utf-8")
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
TOKEN = "<|Reward|>"


def hpsv3(
    path: str | Path, device: Device = "cpu", recompute: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Scorer:
    """HPSv3 from its folder, or the file of weights in it.

    Score and report are the mean of its two outputs, 12 to 16 for FLUX.
    Raises ValueError naming the file that is missing, truncated or of another model.
    """
    file = file_in(path, FILE)
    folder = file.parent
    try:
        json.loads((folder / "config.json").read_text())  # where there is none, transformers 5 makes one up
        config = Qwen2VLConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot read {folder}: beside {file.name} it needs config.json and the tokenizer's files of "
            f"Qwen/Qwen2-VL-7B-Instruct ({type(error).__name__}: {error})"
        ) from error
    state = {current_name(k): v for k, v in read_tensors(file).items() if not k.startswith("lm_head.")}
    head, state = build_head(state, file)
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    reward_id, image_id = tokenizer.convert_tokens_to_ids([TOKEN, "<|image_pad|>"])
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    if len(tokenizer) != config.text_config.vocab_size or image_id != config.image_token_id:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens with {TOKEN}, the weights know "
            f"{config.text_config.vocab_size}: it must be that of Qwen/Qwen2-VL-7B-Instruct"
        )
    model = build(Qwen2VLModel, config, state, source=file, dtype=dtype)
    model, head = freeze(model, recompute).to(device, dtype), freeze(head).to(device)
    patch = config.vision_config.patch_size

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels, rows, columns = patches(images, patch)
        image = "<|image_pad|>" * (rows * columns // MERGE**2)
        plain = [p.replace("<|", "< |") for p in prompts]  # no token of the model's own
        texts = [CHAT.format(image=image, prompt=PROMPT.replace("{text_prompt}", p)) for p in plain]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids.to(images.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        # No mask: tokens look back only and padding is at the right, where the reward token does not see it.
        hidden = model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=pixels.to(dtype),
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(images), device=ids.device),
            use_cache=False,
        ).last_hidden_state  # (b, n, d)
        return head(hidden[ids == reward_id].to(head[0].weight.dtype))[:, 0]  # one per prompt

    return Scorer(score, model=model)


def current_name(name: str) -> str:
    """A tensor's name in today's Qwen2VLModel, from that of transformers 4.45, or of any version since."""
    name = re.sub(r"^model\.(visual|language_model)\.", r"\1.", name)
    return re.sub(r"^model\.", "language_model.", name)


def build_head(state: dict[str, Tensor], file: Path) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The head (d, 1024, 16, 2 published) in fp32, and the rest of the tensors."""
    inside = {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}
    try:
        linear = [nn.Linear(*reversed(inside[f"{i}.weight"].shape)) for i in (0, 3, 5)]
        head = nn.Sequential(linear[0], nn.ReLU(), nn.Identity(), linear[1], nn.ReLU(), linear[2])
        head.load_state_dict(inside)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{file} is not HPSv3: its head rm_head does not fit ({error})") from error
    return head, {k: v for k, v in state.items() if not k.startswith("rm_head.")}


def patches(images: Tensor, patch: int) -> tuple[Tensor, int, int]:
    """Qwen2-VL's preprocessing, differentiable: patches (b rows columns, 3 x frames x patch^2), rows, columns."""
    images = resize(images.float(), *fit(*images.shape[-2:], patch * MERGE))
    rows, columns = (side // patch for side in images.shape[-2:])
    pixels = repeat(
        normalize(images),
        "b c (rows mr pr) (columns mc pc) -> (b rows columns mr mc) (c frames pr pc)",
        mr=MERGE, mc=MERGE, pr=patch, pc=patch, frames=FRAMES,
    )  # fmt: skip
    return pixels, rows, columns


def fit(height: int, width: int, unit: int) -> tuple[int, int]:
    """Sides in multiples of `unit`, near the aspect given and near PIXELS in all: Qwen2-VL's smart_resize.

    448x448 for any square. It rounds down for images with more pixels and up for those with fewer.
    """
    rounded = tuple(round(side / unit) * unit for side in (height, width))
    if math.prod(rounded) > PIXELS:
        scale = math.sqrt(height * width / PIXELS)
        return tuple(max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    if math.prod(rounded) < PIXELS:
        scale = math.sqrt(PIXELS / (height * width))
        return tuple(math.ceil(side * scale / unit) * unit for side in (height, width))
    return rounded
