"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json

MAX_BYTES = 100_000_000


def parse_object(data: bytes, where: str) -> dict[str, object]:
    """A JSON object with distinct keys.

    Args:
        data: UTF-8 text.
        where: what it is, for the error.

    Raises:
        ValueError: not UTF-8, not JSON, no object, a key twice, nested too deeply, or over 100 MB.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where} has {len(data)} bytes; the most is {MAX_BYTES}")

    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})
            raise ValueError(f"the keys {twice[:10]} are there more than once")
        return result

    try:
        result = json.loads(data.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{where} is JSON, but no object")
    return result
