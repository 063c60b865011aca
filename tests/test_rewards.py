"""scorers/clip.py and rewards.py against transformers' own CLIP, its PIL preprocessing and finite differences.

The folder is what a user would bring: save_pretrained of a tiny random CLIPModel and of its tokenizer, 32x32 pixels.
"""

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rewards import Reward, check_rewards, open_reward
from scorers.clip import clip, load_clip
from scorers.common import CLIP_MEAN, CLIP_STD, preprocess
from shapes.world import all_prompts, scenes
from start import check_gradient
from tests.tiny_folders import copy_tokenizers

try:  # transformers 5 has PIL under a name of its own, in 4.57 it is the only one that needs no torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

SIDE = 32
PROMPTS = [
    "a photo of a circle",
    "a photo of three crosses",
    "a photo of a red circle and a blue square",
    "a photo of a circle left of a square and of so much more that no model of twelve tokens reads it all",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    copy_tokenizers(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    narrow = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=12, **narrow, **ids)
    vision = dict(image_size=SIDE, patch_size=8, **narrow)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=3.0))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # larger than CLIP's own, so that images and prompts differ in score
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    model.save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return root / "clip"


@pytest.fixture
def network(monkeypatch) -> list[str]:
    """The hosts that were asked for; none answers."""
    hosts: list[str] = []

    def refuse(host, *_, **__):
        hosts.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


@pytest.fixture
def in_double(monkeypatch):
    """fp32 becomes float64, in what is tested and in transformers' masks."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, change: Callable[[CLIPModel], object] = lambda model: None) -> tuple[Reward, CLIPModel]:
    """The reward, and the model inside it, which `change` may have altered before it was used."""
    model, tokenizer = load_clip(folder)
    change(model)
    with mock.patch("scorers.clip.load_clip", lambda name: (model, tokenizer)):
        return clip(folder), model


# ------------------------------------------------------------------------------------------- score


def test_score_is_the_cosine_whose_scaled_value_is_CLIPModels_own_logit(folder):
    reward, model = opened(folder)
    levels = (255 * uniform(1, 4, SIDE, SIDE, 3)).byte()
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)([Image.fromarray(a.numpy()) for a in levels])
    with torch.no_grad():
        logits = model(**tokens, pixel_values=torch.from_numpy(np.stack(pixels["pixel_values"]))).logits_per_image
    images = levels.permute(0, 3, 1, 2) / 255
    for shift in range(4):  # every image with every prompt
        prompts = PROMPTS[shift:] + PROMPTS[:shift]
        score = reward.score(images, prompts)
        expected = logits[range(4), [(i + shift) % 4 for i in range(4)]]
        torch.testing.assert_close(score, expected / model.logit_scale.exp(), atol=2e-6, rtol=0)
        torch.testing.assert_close(reward.scale * score, expected, atol=4e-5, rtol=0)
    assert reward.scale == pytest.approx(np.exp(3.0)) and logits.std() > 0.5


@pytest.mark.parametrize("size", [(SIDE, SIDE), (20, 27), (57, 44)], ids=["as it is", "enlarged", "reduced"])
def test_pixel_gradient_equals_finite_differences_in_float64(folder, size, in_double):
    reward, _ = opened(folder, change=lambda model: model.double())
    images = (0.25 + 0.5 * uniform(2, 2, 3, *size)).requires_grad_()  # bicubic overshoots stay in [0, 1]
    (grad,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    pixel = torch.zeros_like(grad)
    pixel[1, 2, size[0] // 2, size[1] // 2] = 1
    for direction in [grad, pixel, *(uniform(seed, *grad.shape) - 0.5 for seed in range(3))]:
        step = 1e-5 * direction / direction.norm()
        with torch.no_grad():
            difference = reward.score(images + step, PROMPTS[:2]) - reward.score(images - step, PROMPTS[:2])
        slope = 2 * (grad * step).sum().item()
        assert difference.sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-14)
    assert grad.flatten(1).norm(dim=1).min() > 1e-3


def test_the_score_of_an_image_does_not_depend_on_its_batch(folder):
    reward = clip(folder)
    images = uniform(3, 4, 3, 40, 50)
    scores = reward.score(images, PROMPTS)
    single_scores = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    flipped_scores = reward.score(images.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(scores, torch.cat(single_scores), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores, flipped_scores.flip(0), atol=1e-6, rtol=0)
    assert scores.shape == (4,) and scores.abs().max() <= 1 and scores.std() > 1e-2


def test_images_get_a_gradient_and_parameters_never(folder):
    reward, model = opened(folder)
    images = uniform(4, 2, 3, SIDE, SIDE).requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not model.training


def test_bf16_weights_and_images_are_scored_in_fp32(folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    model = CLIPModel.from_pretrained(folder).bfloat16()
    model.save_pretrained(half)
    images = uniform(5, 2, 3, SIDE, SIDE).bfloat16().requires_grad_()
    reward, fp32_model = opened(half)
    score = reward.score(images, PROMPTS[:2])
    assert score.dtype == torch.float32 and {p.dtype for p in fp32_model.parameters()} == {torch.float32}
    exact, _ = opened(folder, change=lambda m: m.load_state_dict(model.float().state_dict()))
    torch.testing.assert_close(score, exact.score(images.float(), PROMPTS[:2]), atol=0, rtol=0)
    score.sum().backward()
    assert images.grad.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------- preprocessing


def photo(kind: str, height: int, width: int) -> np.ndarray:
    """Images of 8 bit: white noise, a smooth one, or a black and white chessboard, where bicubic overshoots."""
    if kind == "smooth":
        levels = (255 * uniform(6, 5, 5, 3)).byte().numpy()
        return np.array(Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR))
    if kind == "board":
        board = np.add.outer(np.arange(height) // 5, np.arange(width) // 5) % 2
        return np.repeat(255 * board[..., None], 3, axis=2).astype(np.uint8)
    return (255 * uniform(7, height, width, 3)).byte().numpy()


@pytest.mark.parametrize("kind", ["noise", "smooth", "board"])
@pytest.mark.parametrize(
    "size",
    [(97, 150), (150, 97), (500, 301), (301, 500), (33, 50), (50, 33), (30, 101), (64, 101), (101, 64), (48, 48)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
@pytest.mark.parametrize("side", [64, 224])
def test_preprocessing_equals_PIL_within_1_2_of_256_grey_levels(kind, size, side):
    """PIL rounds to whole levels twice: half a level after the rows, and half a level, up to 1.25 times, before."""
    levels = photo(kind, *size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=Image.Resampling.BICUBIC
    )
    expected = torch.as_tensor(np.asarray(processor(Image.fromarray(levels))["pixel_values"][0]))
    image = torch.from_numpy(levels).permute(2, 0, 1) / 255
    pixels = preprocess(image[None], side)[0]
    assert pixels.shape == expected.shape == (3, side, side) and pixels.dtype == torch.float32
    difference = (pixels - expected) * torch.tensor(CLIP_STD)[:, None, None] * 255  # in grey levels
    assert difference.abs().max() < (1e-3 if min(size) == side else 1.2)


def test_preprocessing_an_image_of_the_models_own_size_only_normalises():
    """Pixels of augmented images may leave [0, 1]: nothing clips them."""
    images = 3 * uniform(8, 2, 3, SIDE, SIDE) - 1
    mean, std = (torch.tensor(s)[:, None, None] for s in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(preprocess(images, SIDE), (images - mean) / std, atol=0, rtol=0)


# ---------------------------------------------------------------------------- from the command line


def test_a_spec_names_a_reward_its_path_and_its_weight(folder):
    for spec, weight in ((f"clip={folder}", 1.0), (f"clip={folder}:0.5", 0.5), (f"pickscore={folder}:2", 2.0)):
        reward = open_reward(spec)
        assert (reward.name, reward.weight) == (spec.split("=")[0], weight)
        assert reward.scale == pytest.approx(np.exp(3.0))
    assert open_reward(f"clip={folder}").lam is None and open_reward(f"pickscore={folder}").lam == 0.4


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nothing", "no reward 'nothing': it is one of tiny, pickscore, hpsv2, hpsv3, imagereward, clip=PATH, judge"),
        ("clip", "no reward 'clip'"),
        ("judge=x", "no reward 'judge=x'"),
        ("tiny:1-2", "no reward 'tiny:1-2'"),
        ("hpsv3", "no weights of the reward 'hpsv3' at weights/HPSv3: put them there, or say hpsv3=PATH"),
    ],
)
def test_a_spec_that_means_nothing_is_an_error_that_says_what_does(spec, words):
    with pytest.raises(ValueError, match=words):
        open_reward(spec)


def test_two_rewards_of_one_name_are_an_error_as_they_are_logged_by_it(folder):
    with pytest.raises(ValueError, match="two are named 'clip'"):
        check_rewards([f"clip={folder}", f"clip={folder}:2"])


def test_a_relative_reward_is_the_score_with_the_good_word_less_that_with_the_bad_one(folder):
    plain, relative = open_reward(f"clip={folder}"), open_reward(f"clip={folder}~red~three crosses:0.5")
    images = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    good = plain.score(images, ["red. a circle", "red. a square"])
    bad = plain.score(images, ["three crosses. a circle", "three crosses. a square"])
    score = relative.score(images, ["a circle", "a square"])
    torch.testing.assert_close(score, good - bad)
    gradients = [torch.autograd.grad(x.sum(), images, retain_graph=True)[0] for x in (score, good - bad)]
    torch.testing.assert_close(*gradients)
    assert (relative.name, relative.weight, relative.lam) == ("clip_relative", 0.5, None)
    assert open_reward("tiny~red~blue").lam is None  # tiny's lambda is of scores, not of differences


def test_a_users_function_may_be_relative_and_a_rule_may_not(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def words(images, prompts): return images.new_tensor([float(len(p.split())) for p in prompts])"
    )
    reward = open_reward(f"{tmp_path / 'mine.py'}:words~one two three~one")
    torch.testing.assert_close(reward.score(torch.ones(1, 3, 8, 8), ["a circle"]), torch.tensor([2.0]))
    assert reward.name == "words_relative"
    with pytest.raises(ValueError, match="judge is a rule"):
        check_rewards(["judge~a~b"])


def test_the_judge_is_one_or_zero_an_image():
    prompts = list(all_prompts())[:12]
    images = scenes(prompts, np.random.default_rng(0))[0]
    score = open_reward("judge").score(images, [p.text for p in prompts[::-1]])
    assert score.dtype == torch.float32 and set(score.tolist()) == {0.0, 1.0}
    assert torch.equal(open_reward("judge").score(images, [p.text for p in prompts]), torch.ones(12))


def test_a_users_function_is_a_reward(tmp_path):
    file = tmp_path / "my_file.py"
    file.write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
    )
    reward = open_reward(f"{file}:redness:0.5")
    images = uniform(9, 3, 3, 8, 8).requires_grad_()
    reward.score(images, PROMPTS[:3]).sum().backward()
    assert (reward.name, reward.weight, reward.scale, reward.lam) == ("redness", 0.5, 1.0, None)
    assert images.grad[:, 0].unique().tolist() == pytest.approx([1 / 64]) and images.grad[:, 1].max() < 0


def test_a_users_function_is_tried_with_prompts_of_the_run(tmp_path):
    file = tmp_path / "looks_up.py"
    file.write_text(
        "def of_prompt(images, prompts):\n    return sum({'mine': images.mean((1, 2, 3))}[p] for p in prompts)\n"
    )
    open_reward(f"{file}:of_prompt", prompts=["mine"])
    with pytest.raises(ValueError, match="KeyError: 'a photo of a circle'"):
        open_reward(f"{file}:of_prompt")


def test_a_reward_that_computes_in_numpy_can_be_watched_but_not_trained_on(tmp_path):
    file = tmp_path / "in_numpy.py"
    file.write_text(
        "import torch\ndef mean(images, prompts): return torch.from_numpy(images.cpu().numpy().mean((1, 2, 3)))\n"
    )
    reward = open_reward(f"{file}:mean")
    with pytest.raises(ValueError, match=r"no gradient in the images .*Can't call numpy"):
        check_gradient(reward, ["a photo of a circle"], (64, 64), torch.device("cpu"))


@pytest.mark.parametrize(
    "score, words",
    [
        ("(images - images.mean(0)).square().mean((1, 2, 3))", "warning: .*beside another one and .* without.*eval"),
        ("images.mean((1, 2, 3)) * torch.rand(())", "note: .* draws random numbers"),
        ("images.mean((1, 2, 3))", "^$"),
    ],
)
def test_scores_that_depend_on_more_than_the_image_are_told(score, words, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"import torch\ndef f(images, prompts): return {score}\n")
    open_reward(f"{file}:f")
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    "code, words",
    [
        (None, "no file"),
        ("def f(images, prompts) return", "does not run: SyntaxError"),
        ("import no_such_module", "does not run: ModuleNotFoundError"),
        ("import sys\nsys.exit()", "does not run: SystemExit"),
        ("g = 1", "defines no function 'f'"),
        ("def f(images): return images", "fails on \\(2, 3, 64, 64\\): TypeError: .*takes 1 positional argument"),
        (
            "def f(images, prompts): return images.mean()",
            r"must return 2 scores for 2 images, floats of shape \(2,\), not torch.float32 of shape \(\)",
        ),
        ("def f(images, prompts): return [0.0, 1.0]", "not <class 'list'>"),
        ("from __future__ import annotations", "defines no function 'f'"),
    ],
)
def test_a_users_file_that_cannot_be_a_reward_is_an_error_before_anything_starts(code, words, tmp_path):
    file = tmp_path / "mine.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(ValueError, match=words):
        open_reward(f"{file}:f")


# ------------------------------------------------------------------------------------------ errors


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def save_another_model(folder: Path) -> None:
    """A SigLIP, which people take for a CLIP: two towers, too, but other tensors."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(image_size=SIDE, patch_size=8, **sizes)
    SiglipModel(SiglipConfig(text_config=sizes, vision_config=vision)).save_pretrained(folder)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def remove(*patterns: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind of model": (save_another_model, "lacks tensors.*save_pretrained"),
    "config missing": (remove("config.json"), "lacks config.json: see the README"),
    "config truncated": (
        lambda f: (f / "config.json").write_text('{"model_type": "cl'),
        "config.json.*not a valid JSON.*save_pretrained",
    ),
    "weights missing": (remove("*.safetensors"), "lacks .*.safetensors: see the README"),
    "weights truncated": (truncate, "header.*save_pretrained"),
    "weights a Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "header.*save_pretrained",
    ),
    "a tensor missing": (
        edit_weights(lambda s: s.pop("visual_projection.weight")),
        "lacks tensors.*1, e.g. visual_projection.weight.*save_pretrained",
    ),
    "a tensor of another shape": (
        edit_weights(lambda s: s.update({"text_projection.weight": torch.zeros(8, 15)})),
        "another shape: 1, e.g. .*text_projection.weight.*save_pretrained",
    ),
    "tokenizer missing": (remove(*TOKENIZER_FILES), "lacks tokenizer.json or vocab.json: see the README"),
    "vocabulary missing": (remove("tokenizer.json", "vocab.json", "merges.txt"), "lacks tokenizer.json or vocab.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_an_error_that_names_it_the_fault_and_what_to_do(name, folder, tmp_path, network):
    damage, words = DAMAGE[name]
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken)
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        clip(broken)
    assert str(broken) in str(error.value) and not network


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.vocab_size = 300
    CLIPModel(config).save_pretrained(copy)
    with pytest.raises(ValueError, match="the tokenizer has 581 tokens where the model knows 300"):
        clip(copy)


def test_a_pickle_is_never_opened(folder, tmp_path):
    trapped = shutil.copytree(folder, tmp_path / "trapped")
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (sprung,)

    # Another name than model.safetensors: transformers would now fall back to the pickle.
    (trapped / "model.safetensors").rename(trapped / "another.safetensors")
    torch.save({"logit_scale": Trap()}, trapped / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        clip(trapped)
    assert not sprung.exists()
    torch.load(trapped / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("name", ["runs/no/such/folder", "./reward", "/no/reward", "reward", "tests/test_rewards.py"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_an_error_without_network(name, network):
    with pytest.raises(ValueError, match=f"no reward folder at '{name}'"):
        clip(name)
    assert not network


def test_a_folder_is_read_without_network(folder, network):
    clip(folder)
    assert not network


def test_a_hub_id_that_cannot_be_had_is_an_error_that_names_it(network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's retries
    with pytest.raises(ValueError, match=r"(?s)cannot read nobody/no-such-reward .*hub id"):
        clip("nobody/no-such-reward")
    assert network  # so the tests that find it empty would have noticed
