"""Processes of their own: scripts that answer with a line of JSON, and whole commands."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


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
    return last_line(printed)


def last_line(printed: str) -> dict[str, Any]:
    """The JSON in the last line of what was printed."""
    return json.loads(printed.splitlines()[-1])


class Ran(NamedTuple):
    """A command that has run: seconds by the clock, seconds of processors, what it printed."""

    seconds: float
    cpu_seconds: float
    printed: str


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Runs a command to its end.

    Args:
        environment: all that it has.

    Raises:
        ValueError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(seconds, used, done.stdout)
