"""Rotary positions."""

from __future__ import annotations

import torch

from megadlcm.ops.rotary import rotate, rotation


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    """The property that rotary positions are made for."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        rotated = [
            rotate(state, rotation(torch.tensor([position]), 8, 10000.0, torch.float64))
            for state, position in ((query, query_position), (key, key_position))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert abs(score(7, 3) - score(104, 100)) < 1e-12
    assert abs(score(7, 3) - score(3, 7)) > 1e-3


def test_rotation_keeps_lengths_and_position_zero_changes_nothing() -> None:
    """A rotation, by the angles position * theta^(-2i/H)."""
    states = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = rotation(torch.tensor([0, 1, 2, 500, 9000]), 6, 100.0, torch.float64)
    rotated = rotate(states, turned)
    torch.testing.assert_close(rotated.norm(dim=-1), states.norm(dim=-1))
    assert torch.equal(rotated[0], states[0])
    angle = 2 * 100.0 ** (-2 / 6)
    expected = states[2, 0, 1] * torch.tensor(angle).double().cos()
    expected = expected - states[2, 0, 4] * torch.tensor(angle).double().sin()
    torch.testing.assert_close(rotated[2, 0, 1], expected, rtol=1e-6, atol=1e-7)


def test_angles_of_bf16_states_are_computed_in_fp32() -> None:
    """Position 4001 is not a bf16 number; its angle must be exact all the same."""
    coarse = rotation(torch.tensor([4001]), 4, 10000.0, torch.bfloat16)
    exact = rotation(torch.tensor([4001]), 4, 10000.0, torch.float64)
    assert coarse.cosine.dtype == torch.bfloat16
    assert (coarse.cosine.double() - exact.cosine).abs().max() < 4e-3
