"""Looking at checkpoints and converting them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import fmjax.hub as hub
from fmjax.config import read_config
from fmjax.generation_config import FILE as GENERATION_FILE
from fmjax.generation_config import GenerationConfig
from fmjax.recipes.ctranslate2 import is_ctranslate2, write_whisper
from fmjax.recipes.sentence_folders import module_folders
from fmjax.recipes.texts import model_source
from fmjax.tree import count_parameters
from fmjax.types import Variables
from fmjax.weights import open_checkpoint

# Parameters below which a variant is nothing that was published but one for tests.
SMALLEST = 1_000_000


def convert_checkpoint(
    source: str,
    target: Path,
    *,
    like: str | None = None,
    head: str | None = None,
    labels: str | None = None,
    max_shard_size: str = "5GB",
    dtype: str | None = None,
) -> list[str]:
    """Reads a checkpoint of any format and writes it as a Hugging Face folder.

    Args:
        source: a folder or hub id; with `like`, a file of weights alone.
        target: the new folder; config.json, safetensors with PyTorch names, the files of the
            tokenizer and the like, the modules of sentence-transformers, and
            generation_config.json, made of an older config.json's keys where there is none.
        like: "FAMILY/VARIANT" of a file of weights, such as torchvision's state dicts.
        head: which head the weights have; None is what config.json says, and with `like` "model".
        labels: how many labels the head has, a file with the name of one a line, or "imagenet";
            None is what config.json says.
        max_shard_size: see `fmjax.save`.
        dtype: cast the weights; None keeps them.

    Returns:
        What was done, a line each.

    Raises:
        ValueError: the target is the source, or the checkpoint is not what it says it is.
        OSError: a file cannot be read or written.
    """
    names = None if labels is None else label_names(labels)
    if like is not None:
        family, _, variant = like.partition("/")
        model, variables = hub.load_weights(
            source, family, variant, head=head or "model", num_labels=names, dtype=dtype
        )
        hub.save(target, model, variables, max_shard_size=max_shard_size)
        return _converted(Path(source), "weights alone", model, variables, target)
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file of weights alone: say what they are of with like=FAMILY/VARIANT, "
            f"one of the families {hub.families()}"
        )
    folder = hub.find_folder(model_source(source))
    if target.exists() and target.resolve() == folder.resolve():
        raise ValueError(f"{target} is the source itself; choose a new folder")
    if is_ctranslate2(folder):
        with tempfile.TemporaryDirectory() as scratch:
            write_whisper(folder, Path(scratch))
            lines = convert_checkpoint(
                scratch, target, head=head, labels=labels, max_shard_size=max_shard_size,
                dtype=dtype,
            )  # fmt: skip
        return [f"read {folder}: CTranslate2", *lines[1:]]
    with open_checkpoint(folder) as checkpoint:
        read = f"{checkpoint.format}, {len(checkpoint.files)} file(s)"
    model, variables = hub.load(folder, head=head, num_labels=names, dtype=dtype)
    modules = module_folders(folder)
    generation = None  # read before anything is written
    if not (folder / GENERATION_FILE).is_file():
        generation = GenerationConfig.read(folder)
    hub.save(target, model, variables, max_shard_size=max_shard_size)
    for file in {file for pattern in hub.OTHER_FILES for file in folder.glob(pattern)}:
        if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
            (target / file.name).write_bytes(file.read_bytes())
    for path in modules:  # of sentence-transformers: its pooling
        shutil.copytree(folder / path, target / path, dirs_exist_ok=True)
    if generation is not None and generation.to_dict():
        generation.write(target)
    return _converted(folder, read, model, variables, target)


def _converted(
    source: Path, kind: str, model: Any, variables: Variables, target: Path
) -> list[str]:
    """What was done, a line each."""
    return [
        f"read {source}: {kind}",
        f"{hub.family_for(model).MODEL_TYPE} with head {model.head}: "
        f"{count_parameters(variables):,} parameters",
        f"wrote {target}: {', '.join(sorted(path.name for path in target.iterdir()))}",
    ]


def label_names(labels: str) -> int | list[str]:
    """A number of labels, the lines of a file, or "imagenet"."""
    if labels == "imagenet":
        from fmjax.data.imagenet import imagenet_labels

        return imagenet_labels()
    if labels.isdigit():
        return int(labels)
    if not Path(labels).is_file():
        raise ValueError(
            f"labels={labels!r} is neither a number, nor 'imagenet', nor a file with a name a line"
        )
    return Path(labels).read_text(encoding="utf-8").splitlines()


def describe_checkpoint(model: str) -> dict[str, Any]:
    """Format, family, head, size and config of a checkpoint, without loading its weights."""
    folder = hub.find_folder(model_source(model))
    data = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        tensors = checkpoint.tensors.values()
        dtypes: dict[str, int] = {}
        for tensor in tensors:
            size = 1
            for axis in tensor.shape:
                size *= axis
            dtypes[str(tensor.dtype)] = dtypes.get(str(tensor.dtype), 0) + size
        facts = {
            "folder": str(folder),
            "format": checkpoint.format,
            "files": [file.name for file in checkpoint.files],
            "tensors": len(checkpoint.tensors),
            "parameters": {dtype: f"{size:,}" for dtype, size in dtypes.items()},
        }
    return facts | {"config": data, "supported": data.get("model_type") in _model_types()}


def _model_types() -> set[str]:
    return {name for family in hub.families() for name in (family, family.replace("_", "-"))}


def families_table() -> str:
    """Families with their heads and published sizes, as a Markdown table."""
    lines = ["| family | heads | published sizes (parameters) |", "|---|---|---|"]
    for name in hub.families():
        family = hub.family_of(name)
        sizes = []
        for variant, config in family.VARIANTS.items():
            size = count_parameters(hub.abstract_variables(family.Model(config, head="model")))
            if size >= SMALLEST:
                shown = f"{size / 1e6:.1f} M" if size < 1e9 else f"{size / 1e9:.1f} B"
                sizes.append(f"{variant} {shown}")
        lines.append(f"| {name} | {', '.join(family.HEADS)} | {', '.join(sizes)} |")
    return "\n".join(lines)
