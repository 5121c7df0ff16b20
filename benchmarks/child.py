"""A script in a process of its own, which answers with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any


def begin(
    script: str, arguments: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """Starts ``python benchmarks/SCRIPT ARGUMENTS...``.

    Args:
        environment: what it has beside ours.
    """
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process of `begin` printed in its last line, once it has ended.

    Raises:
        ValueError: it failed.
    """
    printed, errors = process.communicate()
    if process.returncode:
        arguments = process.args if isinstance(process.args, list) else [process.args]
        raise ValueError(
            f"{' '.join(map(str, arguments[1:]))} ended with {process.returncode}:\n{errors}"
        )
    return json.loads(printed.splitlines()[-1])
