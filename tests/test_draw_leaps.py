"""The README's picture of the method: the velocity is flow matching's, the arrows are the gradient of the leaps."""

import torch
from PIL import Image
from torch.testing import assert_close

from leaps import leap, rollout
from tools import draw_leaps
from tools.draw_leaps import ALPHA, CLOUDS, NOISE, PICKS, WIDTH, WISH, pulls, velocity


def sigmas() -> torch.Tensor:
    return torch.linspace(1, 0, 13, dtype=torch.float64)


def test_the_velocity_is_that_of_the_score_of_the_noised_clouds():
    """Tweedie: E[x_0 | x] is (x + sigma^2 grad log p(x)) / (1 - sigma), and v is (x - E[x_0 | x]) / sigma."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for sigma in (0.2, 0.5, 0.9):
        means, variance = (1 - sigma) * CLOUDS.double(), (1 - sigma) ** 2 * WIDTH**2 + sigma**2
        log_p = (-((x[:, None] - means) ** 2).sum(-1) / (2 * variance)).logsumexp(1)
        score = torch.autograd.grad(log_p.sum(), x)[0]
        clean = (x + sigma**2 * score) / (1 - sigma)
        assert_close(velocity(x, torch.tensor(sigma, dtype=torch.float64)), (x - clean) / sigma)


def test_the_arrows_are_what_autograd_through_the_leaps_gives_each_velocity():
    ro = rollout(velocity, NOISE.double(), sigmas())
    change = torch.zeros(2, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    at = {ro.sigmas[pick].item(): moved for pick, moved in zip(PICKS, change)}
    x0 = leap(lambda x, sigma: velocity(x, sigma) + at[sigma.item()], ro, PICKS, ALPHA)
    loss = (x0 - WISH.double()).norm()
    assert_close(torch.stack(pulls(ro)), torch.autograd.grad(loss, change)[0])


def test_the_picture_is_three_drawings_in_a_small_file(tmp_path):
    file = tmp_path / "leaps.png"
    draw_leaps.run(draw_leaps.Config(out=file))
    with Image.open(file) as picture:
        assert picture.width > 3 * picture.height and file.stat().st_size < 50_000
