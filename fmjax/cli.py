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

from fmjax.recipes import transcription
from fmjax.recipes.drawing import Settings as Draw
from fmjax.recipes.drawing import save_drawings
from fmjax.recipes.generation import Writing
from fmjax.recipes.matching import Match, print_matches
from fmjax.recipes.plan import Settings as Plan
from fmjax.recipes.text_classification import Settings
from fmjax.recipes.texts import TextData

ModelArg = Annotated[str, tyro.conf.Positional]


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
class Predict:
    """Classify texts."""

    model: ModelArg
    """A folder or hub id of a classifier."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    max_length: int = 512
    """Tokens a text is cut to."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(TextData):
    """Measure a classifier on labelled texts."""

    model: ModelArg
    """A folder or hub id of a classifier."""
    split: str = "test"
    """Split of a named set; a file is read whole."""
    json: bool = False
    """Print the metrics as JSON."""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Write one vector a text to a .npy file."""

    model: ModelArg
    """A folder or hub id, or "minilm"."""
    file: Annotated[Path, tyro.conf.Positional]
    """A file with one text a line."""
    output: Annotated[Path, tyro.conf.Positional]
    """The .npy file: float32 [N, D]."""
    pooling: Literal["mean", "cls", "max", "pooler"] = "mean"
    """How tokens become one vector."""
    normalize: bool = False
    """Scale vectors to length 1."""
    max_length: int = 512
    """Tokens a text is cut to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Writing):
    """Continue texts (or, with an encoder-decoder, answer them)."""

    model: ModelArg
    """A folder or hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `prompts`."""
    num_return_sequences: int = 1
    """Texts for each prompt."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Writing):
    """Talk with a chat model, a line at a time; an empty line or Ctrl-D ends it."""

    model: ModelArg
    """A folder or hub id."""
    system: str | None = None
    """What the model is told first."""
    max_new_tokens: int = 256
    """Tokens of an answer."""


@dataclasses.dataclass(frozen=True)
class Tag:
    """Tag the words of texts: parts of speech, names, ..."""

    model: ModelArg
    """A folder or hub id of a token classifier."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    max_length: int = 512
    """Tokens a text is cut to."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer questions about a text by passages of it."""

    model: ModelArg
    """A folder or hub id of a question-answering model."""
    questions: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The questions."""
    context: str | None = None
    """The text."""
    file: Path | None = None
    """A file with the text, instead of `context`."""
    must_answer: bool = False
    """Never say that the text has no answer."""
    max_length: int = 384
    """Tokens of a window of the text."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate(Writing):
    """Translate texts with an encoder-decoder."""

    model: ModelArg
    """A folder or hub id."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    source_language: str | None = None
    """Code of the texts' language, of a multilingual model."""
    target_language: str | None = None
    """Code of the language to translate into, of a multilingual model."""
    prefix: str = ""
    """Put before each text, such as "translate English to German: "."""
    max_new_tokens: int = 128
    """Tokens of a translation."""


@dataclasses.dataclass(frozen=True)
class Classify:
    """Say what is in pictures."""

    model: ModelArg
    """A folder or hub id of an image classifier."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    top: int = 5
    """Classes that are named, the likeliest first."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True)
class Detect:
    """Find objects in pictures: class, score and box (left, top, right, bottom) in pixels."""

    model: ModelArg
    """A folder or hub id of a detector."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    threshold: float = 0.5
    """The least score of an object."""
    out: Path | None = None
    """A folder for the pictures with the boxes drawn, NAME.png each."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Writing):
    """Write what is on pictures."""

    model: ModelArg
    """A folder or hub id of a vision encoder-decoder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    json: bool = False
    """Print one JSON object a line."""


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


def predict(args: Predict) -> None:
    from fmjax.recipes.predict import predict_texts

    texts = _given(args.texts, args.file, "predict")
    names, rows = predict_texts(args.model, texts, max_length=args.max_length)
    for text, row in zip(texts, rows, strict=True):
        scores = {name: round(float(score), 6) for name, score in zip(names, row, strict=True)}
        if args.json:
            print(json.dumps({"text": text, "scores": scores}, ensure_ascii=False))
        else:
            best = max(scores, key=lambda name: scores[name])
            print(f"{best}\t{scores[best]:.4f}\t{text}")


def evaluate(args: Evaluate) -> None:
    from fmjax.recipes.predict import evaluate_texts

    metrics = evaluate_texts(args.model, args, args.split)
    if args.json:
        print(json.dumps(metrics, indent=2))
        return
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name}\t{value:.4f}")
    if "report_text" in metrics:
        print(metrics["report_text"])


def embed(args: Embed) -> None:
    import numpy as np

    from fmjax.recipes.predict import embed_texts, read_texts
    from fmjax.report.run_folder import atomic_write
    from fmjax.train.recording import writable_folder

    writable_folder(args.output.parent)
    vectors = embed_texts(
        args.model,
        read_texts(args.file),
        pooling=args.pooling,
        normalize=args.normalize,
        max_length=args.max_length,
    )
    with atomic_write(args.output) as file:
        np.save(file, vectors)
    print(f"{args.output}: float32 {list(vectors.shape)}")


def _given(texts: tuple[str, ...], file: Path | None, command: str) -> list[str]:
    """The texts of the command line and of the file, at least one."""
    from fmjax.recipes.predict import read_texts

    found = [*texts, *(read_texts(file) if file is not None else ())]
    if not found:
        raise ValueError(f'no texts; write them after the model: fmjax {command} MODEL "a text"')
    return found


def generate(args: Generate) -> None:
    from fmjax.recipes.generation import load_generator, stream_text, write_texts

    prompts = _given(args.prompts, args.file, "generate")
    generator = load_generator(args.model)
    options = args.options()
    if len(prompts) == args.num_return_sequences == 1 and not args.json and not args.num_beams:
        ids = generator.tokenizer(prompts[0])["input_ids"]
        if generator.is_decoder:
            print(prompts[0], end="", flush=True)
        for piece in stream_text(generator, ids, seed=args.seed, options=options):
            print(piece, end="", flush=True)
        print()
        return
    options["num_return_sequences"] = args.num_return_sequences
    written = write_texts(generator, prompts, seed=args.seed, options=options)
    for prompt, texts in zip(prompts, written, strict=True):
        if args.json:
            print(json.dumps({"prompt": prompt, "texts": texts}, ensure_ascii=False))
            continue
        for text in texts:
            print(prompt + text if generator.is_decoder else text)


def chat(args: Chat) -> None:
    from fmjax.recipes.generation import chat_prompt, load_generator, stream_text

    generator = load_generator(args.model)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    chat_prompt(generator, [*messages, {"role": "user", "content": "?"}])  # has it a template?
    turn = 0
    while line := _line():
        messages.append({"role": "user", "content": line})
        answer = ""
        ids = chat_prompt(generator, messages)
        for piece in stream_text(generator, ids, seed=args.seed + turn, options=args.options()):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer.strip()})
        turn += 1


def _line() -> str:
    """The user's next line; "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def tag(args: Tag) -> None:
    from fmjax.recipes.predict import tag_texts

    texts = _given(args.texts, args.file, "tag")
    found = tag_texts(args.model, texts, max_length=args.max_length)
    for text, pairs in zip(texts, found, strict=True):
        if args.json:
            print(json.dumps({"text": text, "tags": pairs}, ensure_ascii=False))
        else:
            print(" ".join(f"{word}/{'?' if name is None else name}" for word, name in pairs))


def answer(args: Answer) -> None:
    from fmjax.recipes.predict import answer_texts

    if not args.questions:
        raise ValueError('no question; write it after the model: fmjax answer MODEL "Who ...?"')
    if (args.context is None) == (args.file is None):
        raise ValueError("give the text by exactly one of --context TEXT and --file FILE")
    context = args.context if args.file is None else args.file.read_text(encoding="utf-8")
    assert context is not None
    predictions = answer_texts(
        args.model,
        args.questions,
        context,
        must_answer=args.must_answer,
        max_length=args.max_length,
    )
    for question, prediction in zip(args.questions, predictions, strict=True):
        best = prediction.candidates[0]
        if args.json:
            found = {"question": question, "answer": prediction.text}
            found |= {"probability": best.probability, "start": best.start, "end": best.end}
            print(json.dumps(found, ensure_ascii=False))
        else:
            print(prediction.text or "(no answer)")


def translate(args: Translate) -> None:
    from fmjax.recipes.generation import load_generator, translate_texts

    texts = _given(args.texts, args.file, "translate")
    for text in translate_texts(
        load_generator(args.model),
        texts,
        source_language=args.source_language,
        target_language=args.target_language,
        prefix=args.prefix,
        options=args.options(),
    ):
        print(text)


def classify(args: Classify) -> None:
    from fmjax.recipes.pictures import classify_images

    if not args.images:
        raise ValueError("no pictures; write them after the model: fmjax classify MODEL a.png")
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    names, rows = classify_images(args.model, args.images)
    for path, row in zip(args.images, rows, strict=True):
        scores = {names[i]: round(float(row[i]), 6) for i in (-row).argsort()[: args.top]}
        if args.json:
            print(json.dumps({"image": str(path), "scores": scores}, ensure_ascii=False))
            continue
        print(path)
        for name, score in scores.items():
            print(f"  {score:.4f}\t{name}")


def detect(args: Detect) -> None:
    from fmjax.recipes.pictures import detect_images, save_drawn

    if not args.images:
        raise ValueError("no pictures; write them after the model: fmjax detect MODEL a.png")
    names, rows = detect_images(args.model, args.images, threshold=args.threshold)
    for path, found in zip(args.images, rows, strict=True):
        objects = [
            {"label": names[label], "score": round(float(score), 6), "box": box.round(1).tolist()}
            for box, score, label in zip(*found, strict=True)
        ]
        if args.json:
            print(json.dumps({"image": str(path), "objects": objects}, ensure_ascii=False))
            continue
        print(path)
        for thing in objects:
            corners = " ".join(f"{end:.1f}" for end in thing["box"])
            print(f"  {thing['score']:.4f}\t{thing['label']}\t{corners}")
    if args.out is not None:
        save_drawn(args.out, args.images, rows, names)


def caption(args: Caption) -> None:
    from fmjax.recipes.captioning import caption_images

    if not args.images:
        raise ValueError("no pictures; write them after the model: fmjax caption MODEL a.png")
    texts = caption_images(args.model, args.images, seed=args.seed, options=args.options())
    for path, text in zip(args.images, texts, strict=True):
        if args.json:
            print(json.dumps({"image": str(path), "caption": text}, ensure_ascii=False))
        else:
            print(f"{path}\t{text}")


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


def _keep_what_is_compiled() -> None:
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
    _keep_what_is_compiled()
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
        | Annotated[transcription.Settings, sub("transcribe")]
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
            case transcription.Settings():
                transcription.print_transcripts(args)
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
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("FMJAX_DEBUG"):
            raise
        print(f"fmjax: {error}", file=sys.stderr)
        return 2
    return 0
