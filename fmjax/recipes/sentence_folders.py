"""Folders of the library sentence-transformers: how their models make one vector of a text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fmjax.config import read_config

FILE = "modules.json"
POOLINGS = ("mean", "cls", "max")
# How older folders say the same.
SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooling:
    """From a text to its vector.

    Args:
        pooling, normalize: see `fmjax.tasks.feature_extraction.embed`.
        max_length: tokens a text is cut to; None is what the tokenizer says.
        lowercase: whether texts are read in lower case.
        prompt: put before each text.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompt: str = ""


def read_pooling(folder: Path) -> Pooling | None:
    """What a folder's modules.json and the files that it names say; None where it has none.

    Raises:
        ValueError: modules or settings that are not computed here, without which vectors would be
            others; all are listed. Or a file that is no JSON of its kind.
    """
    if not (folder / FILE).is_file():
        return None
    problems: list[str] = []
    found: dict[str, Any] = {}
    for module in _modules(folder / FILE):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Pooling":
            found["pooling"] = _pooling(read_config(_inside(folder, path)), path, problems)
        elif kind == "Normalize":
            found["normalize"] = True
        elif kind != "Transformer" or path:
            problems.append(f"the module {kind} ({path!r}) is not read")
    settings = _settings(folder, "sentence_bert_config.json")
    found |= {
        "max_length": settings.get("max_seq_length"),
        "lowercase": bool(settings.get("do_lower_case")),
    }
    about = _settings(folder, "config_sentence_transformers.json")
    if (name := about.get("default_prompt_name")) is not None:
        found["prompt"] = (about.get("prompts") or {}).get(name, "")
    if problems:
        raise ValueError(
            f"{folder} is of sentence-transformers and makes vectors by more than is computed here:"
            "\n  " + "\n  ".join(problems) + "\nFor those of the encoder alone name a pooling."
        )
    return Pooling(**found)


def module_folders(folder: Path) -> list[str]:
    """The folders inside a folder, by their paths, that its modules.json names; none without one.

    Raises:
        ValueError: a file that is no JSON of its kind, or paths that leave the folder.
    """
    if not (folder / FILE).is_file():
        return []
    paths = [module["path"] for module in _modules(folder / FILE) if module["path"]]
    return [path for path in paths if _inside(folder, path).is_dir()]


def _modules(file: Path) -> list[dict[str, str]]:
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not UTF-8 JSON: {error}") from error
    if not isinstance(modules, list) or not all(
        isinstance(module, dict)
        and isinstance(module.get("type"), str)
        and isinstance(module.get("path"), str)
        for module in modules
    ):
        raise ValueError(f"{file} must be a list of modules, each with its type and path")
    return modules


def _inside(folder: Path, path: str) -> Path:
    place = folder / path
    if folder.resolve() not in place.resolve().parents:
        raise ValueError(f"{folder / FILE} has the path {path!r}, which is not inside the folder")
    return place


def _pooling(config: dict[str, Any], path: str, problems: list[str]) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in SWITCHES.items() if config.get(switch)]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        problems.append(f"the pooling of {path!r} is {modes}; one of {POOLINGS} is computed")
        return "mean"
    if config.get("include_prompt") is False:
        problems.append(f"{path!r} has include_prompt=False: prompts are pooled here too")
    return modes[0]


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return read_config(folder, name) if (folder / name).is_file() else {}
