"""The report of a run: what a run folder holds, and the page written from it."""

from fmjax.report.page import write_report
from fmjax.report.run_folder import Predictions, Run, atomic_write, load_run, save_predictions
from fmjax.report.samples import save_samples

__all__ = [
    "Predictions",
    "Run",
    "atomic_write",
    "load_run",
    "save_predictions",
    "save_samples",
    "write_report",
]
