"""Keyed randomness: the right law, no shared streams, and no dependence on what else was drawn."""

import numpy as np
import pytest
import torch

from flowalign.randomness import key_generator, key_noise


def test_numbers_are_pinned():
    # A change of stream (ours, or numpy's) would silently change every recorded run.
    torch.testing.assert_close(
        key_noise(7, "start_noise", 3, 1, shape=(4,)),
        torch.tensor([-0.893208325, -1.31159592, 1.22587132, -0.697861254]),
        rtol=0,
        atol=0,
        check_dtype=True,
    )


def test_noise_of_a_sample_does_not_depend_on_the_split():
    def draw(samples: list[int]) -> dict[int, torch.Tensor]:
        torch.manual_seed(len(samples))  # the global generators play no part
        np.random.seed(len(samples))
        return {i: key_noise(0, "step_noise", 5, i, shape=(3, 4)) for i in samples}

    together, apart = draw([0, 1, 2, 3]), draw([3]) | draw([2, 0])
    for i, noise in apart.items():
        assert torch.equal(noise, together[i])


def test_moments_and_independence():
    keys = [(epoch, member) for epoch in range(20) for member in range(20)]
    noise = torch.stack([key_noise(1, "start_noise", *key, shape=(1000,)) for key in keys]).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    correlations = torch.corrcoef(noise)[~torch.eye(len(keys), dtype=torch.bool)]
    assert correlations.abs().max() < 6 / 1000**0.5


@pytest.mark.parametrize(
    "other",
    [
        (8, "start_noise", 3, 1),
        (7 + 2**32, "start_noise", 3, 1),
        (7 + 2**64, "start_noise", 3, 1),
        (-7, "start_noise", 3, 1),
        (7, "step_noise", 3, 1),
        (7, "start_noise", 1, 3),
        (7, "start_noise", 31),
        (7, "start_noise", 3, 1, 0),
        (7, "start_noise", 3, 1 + 2**32),
    ],
)
def test_every_part_of_the_key_counts(other):
    one = key_noise(7, "start_noise", 3, 1, shape=(4096,))
    correlation = torch.corrcoef(torch.stack([one, key_noise(*other, shape=(4096,))]))[0, 1]
    assert abs(correlation) < 5 / 64


def test_generator_repeats_itself():
    orders = [key_generator(0, "order", 4).permutation(50).tolist() for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(50)) != orders[0]
    assert key_generator(0, "order", 5).permutation(50).tolist() != orders[0]
