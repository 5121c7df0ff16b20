"""What a language model's log-likelihood is worth: perplexity and bits per byte."""

from __future__ import annotations

import math


def perplexity(total_nats: float, num_tokens: float) -> float:
    """``exp`` of the mean negative log-likelihood of a token.

    Args:
      total_nats: negative log-likelihood of all tokens, in nats.
      num_tokens: how many there are.

    Returns:
      At least 1; infinity where the exponential overflows. It compares models that share a
      tokenizer.

    Raises:
      ValueError: there are no tokens, or the log-likelihood is negative or NaN.
    """
    _check(total_nats, num_tokens, "num_tokens")
    mean = total_nats / num_tokens
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is beyond a float


def bits_per_byte(total_nats: float, num_bytes: float) -> float:
    """Negative log-likelihood of a text in bits, over its length in bytes of UTF-8.

    Unlike perplexity it compares models whatever their tokenizers are, and counts (byte n-grams).

    Args:
      total_nats: negative log-likelihood of all its tokens, in nats.
      num_bytes: of the text.

    Raises:
      ValueError: there are no bytes, or the log-likelihood is negative or NaN.
    """
    _check(total_nats, num_bytes, "num_bytes")
    return total_nats / math.log(2) / num_bytes


def _check(total_nats: float, count: float, name: str) -> None:
    problems = []
    if not total_nats >= 0:
        problems.append(f"total_nats is {total_nats}; it must be a number of at least 0")
    if not count > 0:
        problems.append(f"{name} is {count}; it must be more than 0")
    if problems:
        raise ValueError("; ".join(problems))
