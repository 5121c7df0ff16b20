"""Streams side by side: each member's own batches, and exact positions."""

import numpy as np
import pytest

from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.data.side_by_side import SideBySide


def stream(seed, batch_size=4):
    data = Columns((), {"features": np.arange(20, dtype=np.float32).reshape(10, 2)})
    return batches(data, batch_size=batch_size, seed=seed, prefetch=0)


def test_every_stream_gives_its_own_batches_and_goes_on_where_it_was():
    together, alone = SideBySide([stream(0), stream(1)]), [stream(0), stream(1)]
    assert together.batches_per_epoch == 3
    seen = [next(together) for _ in range(2)]
    for batch in seen:
        assert batch["features"].shape == (2, 4, 2)
        for number, one in enumerate(alone):
            own = next(one)
            for name, leaf in own.items():
                np.testing.assert_array_equal(batch[name][number], leaf)
    assert (seen[0]["index"][0] != seen[0]["index"][1]).any()
    again = SideBySide([stream(0), stream(1)])
    again.set_state(together.get_state())
    np.testing.assert_array_equal(next(again)["index"], next(together)["index"])
    with pytest.raises(ValueError, match="streams"):
        SideBySide([stream(0)]).set_state(together.get_state())


def test_streams_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one batch size"):
        next(SideBySide([stream(0), stream(0, batch_size=5)]))
    with pytest.raises(ValueError, match="at least one"):
        SideBySide([])
