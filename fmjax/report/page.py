"""The HTML report of a run: one file that opens from disk and asks for nothing else."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmjax.report.curves import broken_loss, curves_section
from fmjax.report.evaluation import evaluated_split, evaluation_sections, measured
from fmjax.report.markup import Markup, Section, escape, join, paragraph, table
from fmjax.report.run_folder import Run, atomic_write, load_run
from fmjax.report.samples import samples_section
from fmjax.report.style import STYLE
from fmjax.report.summary import headline_key, metric_name, scalars, summary_section

# The page may use its own styles and pictures and nothing else: no scripts, no requests.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_folder: str | os.PathLike) -> Path:
    """Write `report.html` into a run folder, replacing an earlier one.

    Args:
      run_folder: a folder with run.json and whatever else the run has written so far.

    Returns:
      The path of the page.

    Raises:
      ValueError: not a run folder, or a malformed file in it; names file, line and rule.
      OSError: the folder cannot be read or written.
    """
    run = load_run(run_folder)
    page = report_page(run)
    path = run.folder / "report.html"
    with atomic_write(path) as file:
        # Texts of a data set may hold lone surrogates, which UTF-8 cannot express.
        file.write(page.encode("utf-8", "replace"))
    return path


def report_page(run: Run) -> str:
    """The whole page of a run as HTML text."""
    split = evaluated_split(run)
    scores = measured(run, split) if split is not None else {}
    sections = [summary_section(run, _notices(run, split, scores)), curves_section(run)]
    samples = samples_section(run)
    if split is not None:
        sections += evaluation_sections(run, split, scores)
    elif run.data["problem_type"] is not None:
        sections.append(_no_predictions())
    if samples is not None:
        sections.append(samples)
    sections += [_settings(run), _environment(run)]
    links = "".join(f'<li><a href="#{part.identifier}">{part.link}</a></li>' for part in sections)
    name = escape(run.name)
    lead = f"{run.model['source']} on {run.data['source']}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{name} - run report</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{name}</h1>
<p class="lead">{escape(lead)}</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main">
{join(part.markup() for part in sections)}
</main>
<footer><p>Written by fmjax from the files of this run.</p></footer>
</body>
</html>
"""


def _notices(run: Run, split: str | None, scores: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers below."""
    notices = []
    if run.results is None:
        notices.append(
            "This run has no results.json: it is still running, or was interrupted before its "
            "final evaluation."
        )
    if split is None and run.data["problem_type"] is not None:
        notices.append("This run has no saved predictions.")
    step = broken_loss(run)
    if step is not None:
        notices.append(f"The training loss stopped being finite at step {step:,}.")
    if run.results is not None and split is not None:
        reported = scalars(run.results.get(split, {}))
        key = headline_key(run, reported.keys() & scores.keys())
        # Loose enough for float32 scores of the same predictions.
        if key is not None and not math.isclose(reported[key], scores[key], abs_tol=1e-5):
            notices.append(
                f"results.json gives {split} {metric_name(key).lower()} {reported[key]:.4f}, the "
                f"saved predictions give {scores[key]:.4f}: these files are from different "
                "evaluations."
            )
    return notices


def _no_predictions() -> Section:
    text = (
        "There are no predictions in this folder yet, so there is nothing to say about single "
        "classes, calibration or mistakes."
    )
    return Section("predictions", "Predictions", "Predictions", [paragraph(text)])


def _settings(run: Run) -> Section:
    rows = [(key, _plain(value)) for key, value in _flat(run.settings)]
    command = Markup(f"<pre><code>{escape(run.command)}</code></pre>")
    if not rows:
        return Section(
            "settings", "Settings", "Settings", [command, paragraph("No settings were recorded.")]
        )
    settings = table(("setting", "value"), rows, caption="Every setting of the run", kind="facts")
    return Section("settings", "Settings", "Settings", [command, settings])


def _environment(run: Run) -> Section:
    environment = run.environment
    memory = environment.get("memory_bytes")
    hardware = table(
        ("part", "value"),
        [
            ("Python", environment["python"]),
            ("Platform", environment["platform"]),
            ("Processor", environment["cpu"]),
            ("Cores", _plain(environment["cores"])),
            *([("Memory", _gibibytes(memory))] if isinstance(memory, int) else []),
            ("Devices", ", ".join(_device(device) for device in environment["devices"])),
        ],
        caption="Machine",
        kind="facts",
    )
    versions = table(
        ("package", "version"),
        sorted(environment["versions"].items()),
        caption="Package versions",
        kind="facts",
    )
    body = Markup(f'<div class="columns"><div>{hardware}</div><div>{versions}</div></div>')
    return Section("environment", "Environment", "Environment", [body])


def _device(device: Any) -> str:
    """A kind of device: 2 x NVIDIA H200 (gpu, 139.8 GiB)."""
    if not isinstance(device, dict) or not {"platform", "kind", "count"} <= device.keys():
        return str(device)
    details = [device["platform"]]
    if isinstance(device.get("memory_bytes"), int):
        details.append(_gibibytes(device["memory_bytes"]))
    return f"{device['count']} \N{MULTIPLICATION SIGN} {device['kind']} ({', '.join(details)})"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted keys."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
