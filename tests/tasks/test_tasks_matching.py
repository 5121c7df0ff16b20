"""Matching on the device against scipy's, with and without padding."""

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fmjax.tasks.matching import match

BATCH, QUERIES = 30, 7
solve = jax.jit(match)


@pytest.mark.parametrize("targets", [1, 4, QUERIES])
def test_the_cheapest_is_found_and_padding_takes_no_query_from_others(targets):
    rng = np.random.default_rng(targets)
    costs = rng.normal(scale=5, size=(BATCH, QUERIES, targets)).astype(np.float32)
    mask = rng.random((BATCH, targets)) < 0.6
    mask[0], mask[1] = True, False
    # What stands in padding must not matter.
    costs = np.where(mask[:, None], costs, rng.choice([np.nan, -1e9, 1e9], costs.shape))
    query = np.asarray(solve(costs.astype(np.float32), mask))
    for row in range(BATCH):
        assert len({*query[row].tolist()}) == targets
        chosen, wanted = query[row, mask[row]], costs[row][:, mask[row]]
        best = wanted[linear_sum_assignment(wanted)].sum()
        np.testing.assert_allclose(wanted[chosen, np.arange(len(chosen))].sum(), best, rtol=1e-5)


def test_broken_predictions_are_matched_last():
    costs = np.array([[[np.nan, np.inf], [3.0, 9.0], [4.0, 1.0]]], np.float32)
    assert solve(costs, np.ones((1, 2), bool)).tolist() == [[1, 2]]
    two = np.array([[[np.nan, np.nan], [3.0, 9.0]]], np.float32)
    assert solve(two, np.ones((1, 2), bool)).tolist() in ([[1, 0]], [[0, 1]])


def test_more_targets_than_queries_are_refused():
    with pytest.raises(ValueError, match="room for 3 targets and only 2 queries"):
        match(np.zeros((1, 2, 3), np.float32), np.ones((1, 3), bool))
    assert match(np.zeros((2, 3, 0), np.float32), np.ones((2, 0), bool)).shape == (2, 0)
