"""The README's picture of the method: the velocity is flow matching's, the arrows are the gradient of the leaps."""

import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from leaps import leap, prediction, rollout
from tools.draw_leaps import (
    ALPHA,
    CLOUDS,
    NOISE,
    PICKS,
    WIDTH,
    WISH,
    cloud_velocity,
    leap_points,
    main,
    velocity_gradients,
)


def test_the_velocity_is_that_of_the_score_of_the_noised_clouds():
    """Tweedie: E[x_0 | x] is (x + sigma^2 grad log p(x)) / (1 - sigma), and v is (x - E[x_0 | x]) / sigma."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator).requires_grad_()
    for sigma in (0.2, 0.5, 0.9):
        means = (1 - sigma) * CLOUDS.double()
        variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2
        squared_distance = ((x[:, None] - means) ** 2).sum(-1)
        log_p = (-squared_distance / (2 * variance)).logsumexp(1)
        (score,) = torch.autograd.grad(log_p.sum(), x)
        clean = (x + sigma**2 * score) / (1 - sigma)
        velocity = cloud_velocity(x, torch.tensor(sigma, dtype=torch.float64))
        assert_close(velocity, (x - clean) / sigma)


def test_the_arrows_are_what_autograd_through_the_leaps_gives_each_velocity():
    sigmas = torch.linspace(1, 0, 13, dtype=torch.float64)
    ro = rollout(cloud_velocity, NOISE.double(), sigmas)
    change = torch.zeros(2, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    change_at_level = {ro.sigmas[pick].item(): change[i] for i, pick in enumerate(PICKS)}

    def changed_velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return cloud_velocity(x, sigma) + change_at_level[sigma.item()]

    x_0 = leap(changed_velocity, ro, PICKS, ALPHA)
    loss = (x_0 - WISH.double()).norm()
    (gradient,) = torch.autograd.grad(loss, change)
    assert_close(velocity_gradients(ro), gradient)


def test_a_connector_goes_from_where_a_leap_lands_to_the_rollout_and_is_long_enough_to_see():
    ro = rollout(cloud_velocity, NOISE, torch.linspace(1, 0, 13))
    starts, ends, landings = leap_points(ro)
    k, j = PICKS
    assert_close(starts, ro.x[[k, j]].flatten(1))
    assert_close(ends, ro.x[[j, -1]].flatten(1))
    assert_close(landings[1], prediction(ro, j).flatten())
    assert (landings - ends).norm(dim=1).min() > 0.1 * (starts - ends).norm(dim=1).max()


def test_the_picture_is_two_drawings_in_a_small_file(tmp_path):
    file = tmp_path / "leaps.png"
    main(file)
    with Image.open(file) as picture:
        assert picture.width > 1.5 * picture.height
    assert file.stat().st_size < 50_000
