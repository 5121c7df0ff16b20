"""What commands share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

ModelArg = Annotated[str, tyro.conf.Positional]


def given(texts: tuple[str, ...], file: Path | None, command: str) -> list[str]:
    """The texts of the command line and of the file, at least one."""
    from fmjax.recipes.predict import read_texts

    found = [*texts, *(read_texts(file) if file is not None else ())]
    if not found:
        raise ValueError(f'no texts; write them after the model: fmjax {command} MODEL "a text"')
    return found


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of classes, with the class's number where several have the name: ImageNet has two
    called "crane"."""
    often = Counter(names)
    return [f"{name} ({i})" if often[name] > 1 else name for i, name in enumerate(names)]


def some_pictures(images: tuple[Path, ...], command: str) -> tuple[Path, ...]:
    """The pictures of the command line, at least one."""
    if not images:
        raise ValueError(f"no pictures; write them after the model: fmjax {command} MODEL a.png")
    return images
