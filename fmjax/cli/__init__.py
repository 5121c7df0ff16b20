"""``fmjax ...``: parses, calls, prints."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fmjax.cli.arguments import ModelArg
from fmjax.cli.pictures import Caption, Classify, Detect, caption, classify, detect
from fmjax.cli.texts import (
    Answer,
    Embed,
    Evaluate,
    Predict,
    Tag,
    answer,
    embed,
    evaluate,
    predict,
    tag,
)
from fmjax.cli.writing import Chat, Generate, Translate, chat, generate, translate
from fmjax.recipes import transcribe_files
from fmjax.recipes.drawing import Settings as Draw
from fmjax.recipes.drawing import save_drawings
from fmjax.recipes.matching import Match, print_matches
from fmjax.recipes.plan import Settings as Plan
from fmjax.recipes.text_classification import Settings


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what a checkpoint holds, or, without one, this machine and the families."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A folder or hub id."""
    families: bool = False
    """The table of families, heads and published sizes, in Markdown."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn any readable checkpoint (Flax msgpack, PyTorch .bin, ...) into safetensors."""

    source: ModelArg
    """A folder or hub id, or, with --like, a file."""
    target: Annotated[Path, tyro.conf.Positional]
    """The new folder: PyTorch-named safetensors, config.json and tokenizer."""
    like: str | None = None
    """FAMILY/VARIANT, where the source is a file of weights alone (torchvision, timm)."""
    head: str | None = None
    """Which head the weights have; by default what config.json says."""
    labels: str | None = None
    """How many labels the head has, a file with a name a line, or "imagenet"."""
    max_shard_size: str = "5GB"
    """Above this the weights are sharded."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Cast the weights; by default they keep the dtype of the file."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html again."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


def info(args: Info) -> None:
    from rich.console import Console
    from rich.table import Table

    import fmjax.hub as hub
    from fmjax.perf.device import describe_machine
    from fmjax.recipes.checkpoints import describe_checkpoint, families_table

    if args.families:
        print(families_table())
        return
    rows: dict[str, Any]
    if args.model is None:
        rows = describe_machine() | {"families": ", ".join(hub.families())}
    else:
        rows = describe_checkpoint(args.model)
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(f"[bold]{name}[/bold]", text)
    Console(soft_wrap=True).print(table)


def convert(args: Convert) -> None:
    from fmjax.recipes.checkpoints import convert_checkpoint

    options = dataclasses.asdict(args)
    print(*convert_checkpoint(options.pop("source"), options.pop("target"), **options), sep="\n")


def plan(args: Plan) -> None:
    import jax

    from fmjax.recipes.plan import plan
    from fmjax.recipes.plan_output import print_plan

    # Nothing runs on an accelerator, and one that is here may be busy.
    jax.config.update("jax_platforms", "cpu")
    print_plan(plan(args))


def finetune(args: Settings) -> None:
    from fmjax.recipes.text_classification import finetune, results_table

    results = finetune(args)
    print(results_table(args.output, results))


def keep_what_is_compiled() -> None:
    """A second command of the kind need not compile again, unless JAX was told where to keep it.

    By model of processor: code made for one may not run on another that shares the folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    from fmjax.data.assets import home
    from fmjax.perf.device import cpu_name, slug

    jax.config.update("jax_compilation_cache_dir", str(home() / "compiled" / slug(cpu_name())))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # a command is short


def main(argv: list[str] | None = None) -> int:
    """The command line; bad input is printed without a traceback and ends with 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fmjax").setLevel(logging.INFO)
    keep_what_is_compiled()
    # Of these, the one that every user without PyTorch would see is that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sub = tyro.conf.subcommand
    args = tyro.cli(
        Annotated[Info, sub("info")]
        | Annotated[Convert, sub("convert")]
        | Annotated[Settings, sub("finetune")]
        | Annotated[Predict, sub("predict")]
        | Annotated[Evaluate, sub("evaluate")]
        | Annotated[Embed, sub("embed")]
        | Annotated[Generate, sub("generate")]
        | Annotated[Chat, sub("chat")]
        | Annotated[Tag, sub("tag")]
        | Annotated[Answer, sub("answer")]
        | Annotated[Translate, sub("translate")]
        | Annotated[Classify, sub("classify")]
        | Annotated[Detect, sub("detect")]
        | Annotated[transcribe_files.Settings, sub("transcribe")]
        | Annotated[Caption, sub("caption")]
        | Annotated[Draw, sub("draw")]
        | Annotated[Match, sub("match")]
        | Annotated[Report, sub("report")]
        | Annotated[Plan, sub("plan")],
        prog="fmjax",
        description="Foundation models as pure functions in JAX.",
        args=argv,
    )
    try:
        match args:
            case Info():
                info(args)
            case Convert():
                convert(args)
            case Settings():
                finetune(args)
            case Predict():
                predict(args)
            case Evaluate():
                evaluate(args)
            case Embed():
                embed(args)
            case Generate():
                generate(args)
            case Chat():
                chat(args)
            case Tag():
                tag(args)
            case Answer():
                answer(args)
            case Translate():
                translate(args)
            case Classify():
                classify(args)
            case Detect():
                detect(args)
            case transcribe_files.Settings():
                transcribe_files.print_transcripts(args)
            case Caption():
                caption(args)
            case Draw():
                print(*save_drawings(args), sep="\n")
            case Match():
                print_matches(args)
            case Report():
                from fmjax.report import write_report

                print(write_report(args.run))
            case Plan():
                plan(args)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("FMJAX_DEBUG"):
            raise
        print(f"fmjax: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # as XLA's are
        if os.environ.get("FMJAX_DEBUG") or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"fmjax: the device has no room for this ({str(error).splitlines()[0][:300]}); fewer "
            "or shorter inputs at a time, a smaller model, or one whose weights are bfloat16 "
            "(fmjax convert MODEL NEW_FOLDER --dtype bfloat16) need less",
            file=sys.stderr,
        )
        return 2
    return 0
