"""What greedy picks reach, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vzip.runtime.agreement.objective import Objective, picks_of

SIMILAR = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 1.0]])
WEIGHTS = np.array([1.0, 2.0, 4.0])


def test_covering_picks_gain_what_they_add() -> None:
    objective = Objective(SIMILAR, WEIGHTS)
    assert objective.reached(np.array([0])) == pytest.approx(1.5)
    # Patch 1 adds half of itself; then patch 2 all of itself.
    assert objective.reached(np.array([0, 1, 2])) == pytest.approx(1.5 + 2 * 0.5 + 4 * 1.0)
    assert objective.reached(np.array([2, 1])) == pytest.approx(4 * 1.0 + 2 * 1.5)


def test_picks_that_are_far_apart_gain_the_distance_to_the_nearest() -> None:
    objective = Objective(SIMILAR)
    assert objective.reached(np.array([2])) == pytest.approx(1.0)
    assert objective.reached(np.array([2, 1, 0])) == pytest.approx(1.0 + 1.2 + 0.5)


def test_the_share_is_of_what_the_reference_reaches() -> None:
    objective = Objective(SIMILAR, WEIGHTS)
    right = np.array([2, 1])
    assert objective.share(right, right) == 1.0
    assert objective.share(np.array([2, 0]), right) == pytest.approx(5.5 / 7)
    nothing = Objective(np.zeros((3, 3)), WEIGHTS)
    assert nothing.share(np.array([0, 1]), right) == 1.0


@pytest.mark.parametrize("picks", [[1, 1], [0, 3], [-1, 0]])
def test_what_is_no_selection_reaches_nothing(picks: list[int]) -> None:
    for weights in (None, WEIGHTS):
        objective = Objective(SIMILAR, weights)
        assert np.isnan(objective.reached(np.array(picks)))
        assert objective.share(np.array(picks), np.array([0, 1])) == 0.0


def test_picks_come_in_the_order_of_their_ranks() -> None:
    kept, rank = np.array([3, 7, 9]), np.array([2, 0, 1])
    assert picks_of(kept, rank, 1).tolist() == [6, 8, 2]
