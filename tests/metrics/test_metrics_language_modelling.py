import math

import pytest

from fmjax.metrics.language_modelling import bits_per_byte, perplexity


def test_uniform_guesses():
    # 10 tokens out of 256 equally likely ones: 8 bits each.
    nats = 10 * math.log(256)
    assert perplexity(nats, 10) == pytest.approx(256)
    assert bits_per_byte(nats, 10) == pytest.approx(8)
    assert bits_per_byte(nats, 40) == pytest.approx(2)
    assert perplexity(1e6, 10) == math.inf
    assert perplexity(0, 10) == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"total_nats is nan.*num_tokens is 0"):
        perplexity(math.nan, 0)
    with pytest.raises(ValueError, match=r"total_nats is -1.*num_bytes is 0"):
        bits_per_byte(-1, 0)
