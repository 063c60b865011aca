"""HPSv3: Qwen2-VL-7B with a head that reads a special token (MizzenAI/HPSv3).

A folder holds it: `HPSv3.safetensors`, and of Qwen/Qwen2-VL-7B-Instruct `config.json` and the tokenizer's files, not
its weights.  The prompt is the published one, to the byte, in hpsv3-prompt.txt: the model saw no other in training.
Three habits of the published code, which its scores rest on:

    positions are counted 0, 1, 2 ... through the sequence, image included, not by Qwen2-VL's rows and columns
    all of the network is bf16, its rotary frequencies too, but the head is fp32
    the image is resized to about 448x448 pixels, sides multiples of 28, and is seen as a film of two frames

Legend: b images, n tokens, d the width of the network.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from scorers.common import (
    Device,
    Scorer,
    find_weights,
    freeze,
    linear_layer,
    load_network,
    normalize,
    read_tensors,
    require_file,
    resize,
)

PIXELS = 448 * 448  # of a resized image
MERGE = 2  # patches that a token spans each way
FRAMES = 2  # of the film: Qwen2-VL's kernels are three-dimensional, and an image is repeated to fill them
PROMPT = (Path(__file__).parent / "hpsv3-prompt.txt").read_text(encoding="utf-8")
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"


def hpsv3(
    path: str | Path, device: Device = "cpu", recompute: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Scorer:
    """HPSv3 from its folder, or the file of weights in it.

    The head gives the mean and the spread of a score; score and report are the mean, 12 to 16 for FLUX.
    Raises ValueError naming the file that is missing, truncated or of another model.
    """
    file = check_files(path)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
    # Special, so that the tokenizer keeps it whole; it gets the next free id, as it did in training.
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    model, head = load_hpsv3(file, tokenizer, dtype)
    # With a dtype, `to` converts buffers, too: the published scores have rotary frequencies in bf16.
    model = freeze(model, recompute).to(device, dtype)
    head = freeze(head).to(device)
    patch = model.config.vision_config.patch_size
    reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels, rows, columns = patches(images, patch)
        texts = [chat_text(prompt, rows * columns // MERGE**2) for prompt in prompts]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids = tokens.input_ids.to(images.device)  # (b, n)
        # Qwen2-VL has an axis of time, rows and columns each; the published code counts alike on all three.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        # No mask: tokens look back only, and padding is at the right, where the reward token does not see it.
        hidden = model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=pixels.to(dtype),
            # (b, 3): the film is one patch long, as a patch spans both of its frames
            image_grid_thw=torch.tensor([[1, rows, columns]] * len(images), device=ids.device),
            use_cache=False,  # of keys and values for the next token: there is none
        ).last_hidden_state  # (b, n, d)
        reward_states = hidden[ids == reward_id]  # (b, d): `chat_text` leaves one reward token in each text
        return head(reward_states.float())[:, 0]

    return Scorer(score, model=model)


def check_files(path: str | Path) -> Path:
    """The file of weights. Raises ValueError if a file of the folder is missing."""
    file = find_weights(path, "HPSv3.safetensors")
    # Without a config, transformers 5 makes up a config of its defaults.
    require_file(file.parent, "config.json")
    require_file(file.parent, "tokenizer.json", "vocab.json")
    return file


def load_hpsv3(
    file: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> tuple[Qwen2VLModel, nn.Sequential]:
    """The network and its head (d, 1024, 16, 2 published). Raises ValueError if file, config and tokenizer disagree."""
    state = read_tensors(file)
    network_state = {}
    for name, tensor in state.items():
        if not name.startswith(("lm_head.", "rm_head.")):  # the first predicts words, which nobody reads
            network_state[current_name(name)] = tensor
    try:
        head = nn.Sequential(
            linear_layer(state, "rm_head.0"),
            nn.ReLU(),  # rm_head.1; rm_head.2 is dropout
            linear_layer(state, "rm_head.3"),
            nn.ReLU(),
            linear_layer(state, "rm_head.5"),
        )
        embeddings = len(network_state["language_model.embed_tokens.weight"])
    except KeyError as error:
        raise ValueError(f"{file} is not HPSv3: it lacks {error}") from None
    # Sizes come from the file of Qwen2-VL: the tensors do not tell the number of heads.
    config = Qwen2VLConfig.from_pretrained(file.parent, local_files_only=True)
    # Qwen2-VL has more embeddings than tokens. HPSv3 keeps an embedding per token, and adds that of its reward token.
    config.text_config.vocab_size = embeddings
    if len(tokenizer) != embeddings:
        raise ValueError(
            f"the tokenizer in {file.parent} has {len(tokenizer)} tokens with {REWARD_TOKEN}, the weights know "
            f"{embeddings}: it must be that of Qwen/Qwen2-VL-7B-Instruct"
        )
    return load_network(Qwen2VLModel, config, network_state, file, dtype=dtype), head


def current_name(name: str) -> str:
    """A tensor's name in today's Qwen2VLModel, from the published one of transformers 4.45, or a later one."""
    name = name.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"


def chat_text(prompt: str, image_tokens: int) -> str:
    """The text that the model reads, with a place for each token of the image."""
    # A prompt may hold <|Reward|> or another of the model's tokens: broken up, it is read as words.
    prompt = prompt.replace("<|", "< |")
    # replace and not format: a prompt may hold braces.
    return CHAT.format(image=IMAGE_TOKEN * image_tokens, prompt=PROMPT.replace("{text_prompt}", prompt))


def patches(images: Tensor, patch: int) -> tuple[Tensor, int, int]:
    """Qwen2-VL's preprocessing: patches (b rows columns, 3 x frames x patch^2), and their rows and columns in an image.

    The patches of one token follow each other, and both frames of the film are the image.
    """
    height, width = resized_sides(*images.shape[-2:], unit=patch * MERGE)
    images = resize(images.float(), height, width)
    pixels = repeat(
        normalize(images),
        "b c (rows mr pr) (columns mc pc) -> (b rows columns mr mc) (c frames pr pc)",
        mr=MERGE,
        mc=MERGE,
        pr=patch,
        pc=patch,
        frames=FRAMES,
    )
    return pixels, height // patch, width // patch


def resized_sides(height: int, width: int, unit: int) -> tuple[int, int]:
    """Sides in multiples of `unit`, near the aspect of the image and near PIXELS in all: Qwen2-VL's smart_resize.

    Any square becomes 448x448. Sides are rounded down for an image with more pixels, up for one with fewer.
    """
    sides = [round(side / unit) * unit for side in (height, width)]
    if math.prod(sides) > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
    elif math.prod(sides) < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        sides = [math.ceil(side * grow / unit) * unit for side in (height, width)]
    return tuple(sides)
