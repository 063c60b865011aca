"""HPSv2.1, HPSv3 and ImageReward on small random models under the published names, against forward passes written
here from the definitions, transformers' own processors, PIL and finite differences.
"""

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from rewards import Reward, check_rewards, open_reward
from scorers import common, hpsv3
from scorers.common import CLIP_MEAN, CLIP_STD
from scorers.hpsv2 import clean, from_open_clip, hpsv2, letterbox
from scorers.imagereward import MEAN, STD, imagereward
from tests.tiny_folders import copy_tokenizers
from tests.tiny_rewards import HEADS, write_hpsv2, write_hpsv3, write_imagereward

try:  # transformers 5 has PIL under a name of its own, in 4.57 it is the only one that needs no torchvision
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
except ImportError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

PROMPTS = [
    "a photo of a circle",
    "a photo of three crosses",
    "a photo of a red circle and a blue square",
    "a photo of a circle left of a square and of so much more that no model of twelve tokens reads it all",
]
NAMES = ("hpsv2", "hpsv3", "imagereward")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    copy_tokenizers(root)
    write_hpsv2(root / "hpsv2.pt", words=len(AutoTokenizer.from_pretrained(root / "tokenizer")))
    write_hpsv3(root / "hpsv3")
    write_imagereward(root / "imagereward")
    return root


@pytest.fixture(scope="module")
def tokenizer(folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def opened(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Reward:
    if name == "hpsv2":
        return hpsv2(folder / "hpsv2.pt", AutoTokenizer.from_pretrained(folder / "tokenizer"), **options)
    if name == "hpsv3":
        return hpsv3.hpsv3(folder / "hpsv3", dtype=dtype, **options)
    return imagereward(folder / "imagereward", **options)


@pytest.fixture
def in_double(monkeypatch, folder):
    """fp32 becomes float64, in what is tested and inside transformers, which casts to it in norms and softmaxes."""
    tensors = load_file(folder / "hpsv3" / "HPSv3.safetensors")  # safetensors would be misled
    monkeypatch.setattr(hpsv3, "read_tensors", lambda file: tensors)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setitem(common.STRICT, "dtype", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.get_default_dtype())


def levels(seed: int, height: int, width: int) -> np.ndarray:
    return (255 * torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))).byte().numpy()


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


# ------------------------------------------------------------------------------------- what text is read

CURLY, ENTITY, SPACES = "a cat\u2019s \u201chat\u201d", "a cat &amp;amp; a dog", " a  CAT\n and\ta dog "
STRAIGHT, AND, PLAIN = 'a cat\'s "hat"', "a cat & a dog", "a cat and a dog"


def test_hpsv2_cleans_text_as_open_clip_before_its_tokenizer(folder):
    assert [clean(p) for p in (CURLY, ENTITY, SPACES)] == [STRAIGHT, AND, PLAIN]
    assert clean("caf\u00c3\u00a9 &lt;b&gt; &amp;lt;") == "caf\u00e9 <b> <"  # UTF-8 read as Latin-1; escaped twice
    images = uniform(16, 1, 3, 28, 28).expand(3, -1, -1, -1)
    score = opened("hpsv2", folder).score
    assert torch.equal(score(images, [CURLY, ENTITY, SPACES]), score(images, [STRAIGHT, AND, PLAIN]))


def published_ids(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of text as the published code gives it to the tokenizer: as it is."""
    if name == "hpsv3":
        tokenizer = AutoTokenizer.from_pretrained(folder / "hpsv3")
    if name == "imagereward":
        tokenizer = BertTokenizerFast.from_pretrained(folder / "imagereward")
    return tokenizer(prompts).input_ids


@pytest.mark.parametrize("name", ["hpsv3", "imagereward", "pickscore"])
def test_the_others_give_text_to_their_tokenizer_as_it_is(name, folder, tokenizer, monkeypatch):
    """HPSv3 sees double spaces, and all of them &amp;; BERT's and CLIP's tokenizers do not see white space."""
    texts: list[str] = []
    call = PreTrainedTokenizerBase.__call__

    def spy(self, text, *args, **kwargs):
        texts.extend(text)
        return call(self, text, *args, **kwargs)

    reward = open_reward("tiny") if name == "pickscore" else opened(name, folder)
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    reward.score(uniform(17, 3, 3, 64, 64), [CURLY, ENTITY, SPACES])
    assert len(texts) == 3
    for prompt, text in zip([CURLY, ENTITY, SPACES], texts):
        assert prompt in text
    ids_with_spaces, ids = published_ids(name, folder, tokenizer, [SPACES.replace("CAT", "cat"), PLAIN])
    assert (ids_with_spaces == ids) == (name != "hpsv3")


# -------------------------------------------------------------------------------- what all of them share


@pytest.mark.parametrize("name", NAMES)
def test_pixel_gradient_equals_finite_differences_in_float64(name, folder, in_double):
    reward = opened(name, folder, dtype=torch.float64)
    images = (0.25 + 0.5 * uniform(2, 2, 3, 40, 52)).requires_grad_()  # bicubic overshoots stay in [0, 1]
    score = reward.score(images, PROMPTS[:2])
    (grad,) = torch.autograd.grad(score.sum(), images)
    assert score.dtype == torch.float64 and grad.flatten(1).norm(dim=1).min() > 1e-3
    pixel = torch.zeros_like(grad)
    pixel[1, 2, 20, 26] = 1
    for direction in [grad, pixel, uniform(3, *grad.shape) - 0.5]:
        step = 1e-4 * direction / direction.norm()
        with torch.no_grad():
            difference = reward.score(images + step, PROMPTS[:2]) - reward.score(images - step, PROMPTS[:2])
        slope = 2 * (grad * step).sum().item()
        assert difference.sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_of_an_image_does_not_depend_on_its_batch(name, folder):
    reward = opened(name, folder)
    images = uniform(4, 4, 3, 40, 52)
    scores = reward.score(images, PROMPTS)
    single_scores = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    flipped_scores = reward.score(images.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(scores, torch.cat(single_scores), atol=2e-6, rtol=0)
    torch.testing.assert_close(scores, flipped_scores.flip(0), atol=2e-6, rtol=0)
    assert scores.shape == (4,) and scores.std() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_give_the_same_gradient(name, folder):
    def gradient_and_memory(**options) -> tuple[Tensor, int]:
        images = uniform(5, 2, 3, 40, 52).requires_grad_()
        saved_numbers = 0

        def save(tensor: Tensor) -> Tensor:
            nonlocal saved_numbers
            saved_numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            score = opened(name, folder, **options).score(images, PROMPTS[:2])
        score.sum().backward()
        return images.grad, saved_numbers

    expected, memory = gradient_and_memory()
    gradient, recompute_memory = gradient_and_memory(recompute=True)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)
    assert expected.abs().sum() > 0 and recompute_memory < 0.8 * memory


@pytest.mark.parametrize("name, lam", [("hpsv2", 0.55), ("hpsv3", 13.5), ("imagereward", None)])
def test_a_spec_opens_it_with_its_lambda(name, lam, folder, tokenizer):
    path = folder / ("hpsv2.pt" if name == "hpsv2" else name)
    reward = open_reward(f"{name}={path}:0.5", "cpu", tokenizer, True)
    images = uniform(13, 2, 3, 40, 52)
    exact = opened(name, folder, dtype=torch.bfloat16).score(images, PROMPTS[:2])
    assert (reward.name, reward.weight, reward.lam) == (name, 0.5, lam)
    torch.testing.assert_close(reward.score(images, PROMPTS[:2]), exact, atol=1e-6, rtol=0)


def test_hpsv3_reads_a_prompt_with_tokens_of_its_own_as_words(folder):
    score = opened("hpsv3", folder).score(uniform(14, 2, 3, 64, 64), ["a <|Reward|> of <|image_pad|>", "{a} %s {0}"])
    assert score.shape == (2,) and score.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_matters(name, folder):
    score = opened(name, folder).score(uniform(6, 1, 3, 32, 32).expand(3, -1, -1, -1), PROMPTS[:3])
    assert len(set(score.tolist())) == 3


# ----------------------------------------------------------------------------------------------- HPSv2.1


def block(x: Tensor, state: dict[str, Tensor], name: str, mask: Tensor | None = None) -> Tensor:
    """open_clip's residual attention block by its definition: x (b, n, width)."""
    b, n, width = x.shape
    y = F.layer_norm(x, (width,), state[f"{name}.ln_1.weight"], state[f"{name}.ln_1.bias"], 1e-5)
    qkv = y @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]
    q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in qkv.split(width, -1))
    logits = q @ k.transpose(-1, -2) / math.sqrt(width / HEADS)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(b, n, width)
    x = x + y @ state[f"{name}.attn.out_proj.weight"].T + state[f"{name}.attn.out_proj.bias"]
    y = F.layer_norm(x, (width,), state[f"{name}.ln_2.weight"], state[f"{name}.ln_2.bias"], 1e-5)
    y = y @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))  # GELU, exact
    return x + y @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def open_clip_image(pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Image features of open_clip's VisionTransformer: (b, 3, side, side) normalised pixels to (b, c)."""
    kernel = state["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"], 1e-5)
    for i in range(2):
        x = block(x, state, f"visual.transformer.resblocks.{i}")
    x = F.layer_norm(x[:, 0], x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"], 1e-5)
    return x @ state["visual.proj"]


def open_clip_text(ids: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Text features of open_clip's CLIP: tokens (b, n), pooled where the highest is, to (b, c)."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    for i in range(2):
        x = block(x, state, f"transformer.resblocks.{i}", mask)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"], 1e-5)
    return x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]


def open_clip_tokens(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int = 12) -> Tensor:
    """As open_clip pads: zeros after the end of the text, which stays last if the text is cut."""
    rows = [tokenizer(p).input_ids for p in prompts]
    rows = [r[: length - 1] + r[-1:] if len(r) > length else r for r in rows]
    return torch.tensor([r + [0] * (length - len(r)) for r in rows])


def test_hpsv2_equals_open_clips_definition_in_float64(folder, tokenizer, in_double):
    state = {k: v.double() for k, v in torch.load(folder / "hpsv2.pt")["state_dict"].items()}
    images = uniform(7, 4, 3, 40, 52)
    image = F.normalize(open_clip_image(letterbox(images, 28), state), dim=-1)
    text = F.normalize(open_clip_text(open_clip_tokens(tokenizer, PROMPTS), state), dim=-1)
    reward = opened("hpsv2", folder)
    for shift in range(4):  # every image with every prompt
        expected = (image * text.roll(-shift, 0)).sum(-1)
        got = reward.score(images, PROMPTS[shift:] + PROMPTS[:shift])
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert (image @ text.T).std() > 0.05 and reward.scale == 1


def test_every_tensor_of_an_open_clip_state_dict_has_a_place(folder):
    """Changing any one of them changes the features: none is dropped, none is used for another."""
    state = torch.load(folder / "hpsv2.pt")["state_dict"]
    renamed = from_open_clip(state)
    assert sum(v.numel() for v in renamed.values()) == sum(v.numel() for v in state.values())
    for name in state:
        shifted = from_open_clip(state | {name: state[name] + 1})
        shifted_names = [k for k in renamed if not torch.equal(renamed[k], shifted[k])]
        assert len(shifted_names) == (3 if "in_proj" in name else 1), name  # q, k and v


@pytest.mark.parametrize("size", [(97, 150), (150, 97), (301, 500), (33, 20), (64, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("side", [28, 224])
def test_letterbox_equals_PIL_on_float_images(size, side):
    """PIL resizes images of floats without rounding or clipping, as HPSv2's own code resizes tensors."""
    image = levels(8, *size)
    scale = side / max(size)
    rows, columns = (round(s * scale) for s in size)
    expected = np.zeros((side, side, 3), np.float32)
    row, column = (side - rows) // 2, (side - columns) // 2
    for c in range(3):
        plane = Image.fromarray((image[..., c] / 255).astype(np.float32))
        resized = np.asarray(plane.resize((columns, rows), Image.Resampling.BICUBIC))
        expected[row : row + rows, column : column + columns, c] = resized
    expected = (torch.from_numpy(expected) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(letterbox(tensor(image), side)[0].permute(1, 2, 0), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- HPSv3


def test_hpsv3_equals_the_published_procedure(folder):
    """Qwen2-VL with its language head, transformers' PIL processor, a padding mask, positions counted by attention."""
    source = folder / "hpsv3"
    state = load_file(source / "HPSv3.safetensors")
    head = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.05), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))
    head.load_state_dict({k.removeprefix("rm_head."): state.pop(k) for k in list(state) if k.startswith("rm_head.")})
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(source)
    config.text_config.vocab_size = len(tokenizer)
    names = {k: "model." + hpsv3.current_name(k) for k in state if not k.startswith("lm_head")}
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.load_state_dict({names.get(k, k): v for k, v in state.items()})

    pictures = [levels(seed, 97, 150) for seed in range(3)]
    side = {"min_pixels": 256 * 28 * 28, "max_pixels": 256 * 28 * 28}
    inputs = Qwen2VLImageProcessorPil(**side)([Image.fromarray(p) for p in pictures], return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    texts = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (rows * columns // 4)
        + "<|vision_end|>"
        + hpsv3.PROMPT.format(text_prompt=prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
        for prompt in PROMPTS[1:]
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch.input_ids)
        output = model.model.get_image_features(torch.as_tensor(inputs["pixel_values"]), inputs["image_grid_thw"])
        # transformers 5 has an object around the features of each image
        features = output if isinstance(output, tuple | list) else output.pooler_output
        embedded[batch.input_ids == config.image_token_id] = torch.cat(tuple(features))
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=batch.attention_mask)[0]
        expected = head.eval()(hidden[batch.input_ids == tokenizer.convert_tokens_to_ids("<|Reward|>")])[:, 0]
        got = opened("hpsv3", folder).score(torch.cat([tensor(p) for p in pictures]), PROMPTS[1:])
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)  # PIL's whole grey levels
    assert len(set(batch.attention_mask.sum(1).tolist())) == 3 and expected.std() > 2e-3


@pytest.mark.parametrize("size", [(97, 150), (500, 301), (720, 720), (64, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_hpsv3_patches_equal_transformers_PIL_processor_within_1_2_of_256_grey_levels(size):
    """PIL rounds to whole levels twice: half a level after the rows, and half a level, up to 1.25 times, before."""
    image = levels(9, *size)
    side = {"min_pixels": 448 * 448, "max_pixels": 448 * 448}
    expected = Qwen2VLImageProcessorPil(**side)([Image.fromarray(image)], return_tensors="pt")
    pixels, rows, columns = hpsv3.patches(tensor(image), patch=14)
    assert [1, rows, columns] == expected["image_grid_thw"][0].tolist()
    std = torch.tensor(CLIP_STD).repeat_interleave(2 * 14 * 14)
    difference = (pixels - torch.as_tensor(expected["pixel_values"])) * std * 255  # in grey levels
    assert pixels.shape == difference.shape and difference.abs().max() < 1.2


def test_hpsv3_sizes_equal_transformers_smart_resize():
    for height in range(16, 2000, 80):
        for width in (height, 2 * height, 720, 1024):
            if round(height / 28) and round(width / 28):  # the reference divides nothing by zero
                pixels = dict(min_pixels=448 * 448, max_pixels=448 * 448)
                assert hpsv3.resized_sides(height, width, 28) == smart_resize(height, width, 28, **pixels), (
                    height,
                    width,
                )
    assert (
        hpsv3.resized_sides(720, 720, 28)
        == hpsv3.resized_sides(512, 512, 28)
        == hpsv3.resized_sides(1024, 1024, 28)
        == (448, 448)
    )


def test_hpsv3_reads_the_published_names_and_those_of_today(folder, tmp_path):
    today = write_hpsv3(tmp_path / "today", published_names=False)
    images = uniform(10, 2, 3, 64, 64)
    scores = [hpsv3.hpsv3(f, dtype=torch.float32).score(images, PROMPTS[:2]) for f in (folder / "hpsv3", today)]
    assert torch.equal(*scores)
    published = {k.split(".")[0] for k in load_file(folder / "hpsv3" / "HPSv3.safetensors")}
    assert published == {"model", "visual", "lm_head", "rm_head"}


def test_hpsv3_runs_in_bf16_with_its_head_in_fp32(folder):
    images = uniform(11, 2, 3, 64, 64).requires_grad_()
    score = hpsv3.hpsv3(folder / "hpsv3").score(images, PROMPTS[:2])
    exact = opened("hpsv3", folder).score(images, PROMPTS[:2])
    assert score.dtype == torch.float32
    assert 0 < (score - exact).abs().max() < 0.05
    score.sum().backward()
    assert images.grad.abs().sum() > 0


def test_the_hpsv3_prompt_is_the_published_one_to_the_byte():
    text = (Path(hpsv3.__file__).parent / "hpsv3-prompt.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


# ------------------------------------------------------------------------------------------- ImageReward


def imagereward_score(pixels: Tensor, ids: Tensor, mask: Tensor, state: dict[str, Tensor]) -> Tensor:
    """ImageReward from its definition: timm's ViT, BERT with cross-attention in every layer, a linear head."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(-1, -2) / 8
        weights = (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, state[f"{eye}.patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{eye}.pos_embed"]
    for i in range(2):
        name = f"{eye}.blocks.{i}"
        q, k, v = linear(layer_norm(x, f"{name}.norm1", 1e-6), f"{name}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(layer_norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    image = layer_norm(x, f"{eye}.norm", 1e-6)

    h = state[f"{bert}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = layer_norm(h, f"{bert}.embeddings.LayerNorm", 1e-12)
    hidden = ~mask.bool()[:, None, None]
    for i in range(2):
        for kind, source, blind in (("attention", None, hidden), ("crossattention", image, None)):
            name = f"{bert}.encoder.layer.{i}.{kind}"
            keys = h if source is None else source
            q, k, v = linear(h, f"{name}.self.query"), *(linear(keys, f"{name}.self.{n}") for n in ("key", "value"))
            out = linear(attention(q, k, v, blind), f"{name}.output.dense")
            h = layer_norm(out + h, f"{name}.output.LayerNorm", 1e-12)
        name = f"{bert}.encoder.layer.{i}"
        out = linear(F.gelu(linear(h, f"{name}.intermediate.dense")), f"{name}.output.dense")
        h = layer_norm(out + h, f"{name}.output.LayerNorm", 1e-12)
    r = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        r = linear(r, f"mlp.layers.{i}")
    return (r[:, 0] - MEAN) / STD


def test_a_crop_begins_where_torchvisions_or_where_transformers_does():
    images = uniform(3, 1, 3, 32, 35)  # 1.5 pixels are cut away on the left
    for rounded, column in ((True, 2), (False, 1)):
        expected = common.normalize(images[..., column : column + 32])
        torch.testing.assert_close(common.preprocess(images, 32, rounded), expected, rtol=0, atol=1e-6)


def test_imagereward_equals_its_definition_in_float64(folder, in_double):
    state = {
        k: v.double() if v.is_floating_point() else v
        for k, v in torch.load(folder / "imagereward" / "ImageReward.pt").items()
    }
    images = uniform(12, 4, 3, 40, 54)  # 43 wide when resized: the crop begins at 5.5, which is rounded to 6
    prompts = [*PROMPTS[:3], " ".join(PROMPTS * 9)]  # cut at 35 tokens
    tokenizer = AutoTokenizer.from_pretrained(folder / "imagereward", tokenizer_type="bert")
    tokens = tokenizer(prompts, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    expected = imagereward_score(
        common.preprocess(images, 32, rounded=True), tokens.input_ids, tokens.attention_mask, state
    )
    got = opened("imagereward", folder).score(images, prompts)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    assert expected.std() > 0.05 and len(tokenizer(prompts[-1]).input_ids) > 36


# ------------------------------------------------------------------------------------------------ errors


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def without(*names: str) -> Callable[[Path], None]:
    """Remove tensors from a .pt or a .safetensors file; a name may be the start of several."""

    def remove(state: dict[str, Tensor]) -> None:
        for key in list(state):
            if key.startswith(names):
                del state[key]

    return lambda file: edit_file(file, remove)


def reshaped(name: str) -> Callable[[Path], None]:
    """Give a tensor another shape."""
    return lambda file: edit_file(file, lambda state: state.update({name: torch.zeros(5)}))


def edit_file(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write a file anew with a state dict that `change` has altered."""
    content = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    change(content.get("state_dict", content))
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)


FILES = {"hpsv2": "hpsv2.pt", "hpsv3": "hpsv3/HPSv3.safetensors", "imagereward": "imagereward/ImageReward.pt"}
DAMAGE: list[tuple[str, str, Callable[[Path], object], str]] = [
    *((name, "missing", lambda f: f.unlink(), "no reward file at .*NAME=PATH") for name in NAMES),
    *((name, "truncated", truncate, "truncated.*download it again") for name in NAMES),
    *((name, "a web page", lambda f: f.write_text("<html>"), "truncated, or no file of tensors") for name in NAMES),
    *((name, "empty", lambda f: f.write_bytes(b""), "truncated, or no file of tensors") for name in NAMES),
    ("hpsv2", "no such model", without("visual.proj"), "lacks 'visual.proj'"),
    ("hpsv2", "a tensor less", without("visual.transformer.resblocks.1.ln_1.bias"), "layers.1.layer_norm1.bias"),
    ("hpsv2", "another shape", reshaped("ln_final.weight"), "in another shape.*final_layer_norm"),
    ("hpsv3", "no head", without("rm_head.3"), "lacks 'rm_head.3.weight'"),
    ("hpsv3", "a tensor less", without("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    ("hpsv3", "no config", lambda f: (f.parent / "config.json").unlink(), "lacks config.json"),
    ("hpsv3", "no tokenizer", lambda f: (f.parent / "tokenizer.json").unlink(), "lacks tokenizer.json or vocab.json"),
    ("imagereward", "no head", without("mlp.layers.7"), "lacks 'mlp.layers.7.weight'"),
    ("imagereward", "no ViT", without("blip.visual_encoder"), "lacks 'blip.visual_encoder.patch_embed"),
    ("imagereward", "a tensor less", without("blip.text_encoder.encoder.layer.1.output"), "layer.1.output"),
    ("imagereward", "no vocabulary", lambda f: (f.parent / "vocab.txt").unlink(), "lacks vocab.txt or tokenizer.json"),
]


@pytest.mark.parametrize("name, kind, damage, words", DAMAGE, ids=[f"{n}: {k}" for n, k, *_ in DAMAGE])
def test_a_damaged_file_is_an_error_that_names_it_before_the_device_is_touched(
    name, kind, damage, words, folder, tmp_path
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / FILES[name])
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        opened(name, copy, device="cuda:77")  # no machine has it: to touch it is another error
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    "name, kind, damage, words",
    [row for row in DAMAGE if row[1] in ("missing", "no config", "no tokenizer", "no vocabulary")],
)
def test_a_missing_file_is_an_error_before_weights_are_read(name, kind, damage, words, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / FILES[name])
    monkeypatch.delattr(f"scorers.{name}.read_tensors")
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        check_rewards([f"{name}={copy / FILES[name]}"])
    assert str(copy) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_may_be_named_by_its_folder_or_by_the_file_in_it(name, folder, tokenizer, tmp_path):
    if name == "hpsv2":
        file = tmp_path / "HPS_v2.1_compressed.pt"
        shutil.copy(folder / "hpsv2.pt", file)
    else:
        file = folder / FILES[name]
    images = uniform(15, 2, 3, 40, 52)
    from_folder = open_reward(f"{name}={file.parent}", "cpu", tokenizer)
    from_file = open_reward(f"{name}={file}", "cpu", tokenizer)
    assert torch.equal(from_folder.score(images, PROMPTS[:2]), from_file.score(images, PROMPTS[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_does_go_to_the_device(name, folder):
    with pytest.raises((RuntimeError, AssertionError)):
        opened(name, folder, device="cuda:77")


def test_hpsv2_with_another_models_tokenizer_is_an_error(folder, tokenizer, tmp_path):
    write_hpsv2(tmp_path / "large.pt", words=49408)
    with pytest.raises(ValueError, match=f"knows 49408 tokens, the CLIP tokenizer of --model {len(tokenizer)}"):
        hpsv2(tmp_path / "large.pt", tokenizer)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_a_pickle_is_never_run(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": Trap()}, copy / FILES[name])
    with pytest.raises(ValueError, match="no file of tensors"):
        opened(name, copy)
    assert not (tmp_path / "sprung").exists()
