"""Mixtures of streams: the published rates, the law of the draws, exact resuming."""

import itertools
import json
import math

import numpy as np
import pytest

from fmjax.data import Columns
from fmjax.data.batches import batches
from fmjax.data.mixture import Mixture, mixing_rates


def streams(a=10, b=30, seed=0):
    return {
        name: batches(Columns((), {"x": np.arange(size, dtype=np.int32)}), batch_size=4, seed=seed)
        for name, size in (("a", a), ("b", b))
    }


def test_rates():
    """Raffel et al. 2020, section 3.5.2."""
    sizes = {"a": 100, "b": 300, "c": 10_000}
    assert mixing_rates(sizes) == {"a": 100 / 10_400, "b": 300 / 10_400, "c": 10_000 / 10_400}
    assert mixing_rates(sizes, limit=400) == {"a": 0.125, "b": 0.375, "c": 0.5}
    warm = mixing_rates(sizes, limit=400, temperature=2)
    total = 10 + math.sqrt(300) + 20
    np.testing.assert_allclose(
        list(warm.values()), [10 / total, math.sqrt(300) / total, 20 / total]
    )
    assert mixing_rates(sizes, temperature=math.inf) == dict.fromkeys(sizes, 1 / 3)
    with pytest.raises(ValueError, match=r"'b': 0.*limit=0 must be above 0; temperature=-1"):
        mixing_rates({"a": 1, "b": 0}, limit=0, temperature=-1)


def test_draws_follow_the_rates():
    mixture = Mixture(streams(), {"a": 0.2, "b": 0.8}, seed=3)
    drawn = [mixture.drawn(number) for number in range(5_000)]
    share = np.mean([names == ["a"] for names in drawn])
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 5_000)
    # Each draw by itself: what follows an "a" is an "a" as often.
    after = np.mean([right == ["a"] for left, right in itertools.pairwise(drawn) if left == ["a"]])
    assert abs(after - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1_000)
    other = Mixture(streams(), {"a": 0.2, "b": 0.8})
    assert drawn[:100] != [other.drawn(number) for number in range(100)]
    never = Mixture(streams(), {"a": 0.0, "b": 1.0})
    assert all(never.drawn(number) == ["b"] for number in range(50))
    assert mixture.batches_per_epoch == 3 + 8


@pytest.mark.parametrize("rates", [{"a": 0.4, "b": 0.6}, None])
def test_resumes_exactly(rates):
    whole = Mixture(streams(), rates)
    for _ in range(7):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    again = Mixture(streams(), rates)
    again.set_state(state)
    for _ in range(9):
        one, other = next(whole), next(again)
        assert one.keys() == other.keys()
        names = {name.split("/")[0] for name in one}
        assert len(names) == (1 if rates else 2)
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])
    whole.close()
    again.close()


def test_refusals():
    part = streams()["a"]
    with pytest.raises(ValueError, match=r"a/b.*1 in all; seed=-1"):
        Mixture({"a/b": part}, {"a/b": 0.5}, seed=-1)
    state = Mixture(streams(), {"a": 0.5, "b": 0.5}).get_state()
    for part, other in (
        ("rates", Mixture(streams(), {"a": 0.4, "b": 0.6})),
        ("data", Mixture(streams(b=31), {"a": 0.5, "b": 0.5})),
    ):
        with pytest.raises(ValueError, match=part):
            other.set_state(state)
