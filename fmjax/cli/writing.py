"""Commands that write texts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fmjax.cli.arguments import ModelArg, given
from fmjax.recipes.generation import Writing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Writing):
    """Continue texts (or, with an encoder-decoder, answer them)."""

    model: ModelArg
    """A folder or hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `prompts`."""
    max_length: int | None = None
    """Tokens that a longer text is cut to, which an encoder-decoder reads."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate(Writing):
    """Translate texts with an encoder-decoder."""

    model: ModelArg
    """A folder or hub id."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    max_length: int | None = None
    """Tokens that a longer text is cut to, which an encoder-decoder reads."""
    source_language: str | None = None
    """Code of the texts' language, of a multilingual model."""
    target_language: str | None = None
    """Code of the language to translate into, of a multilingual model."""
    prefix: str = ""
    """Put before each text, such as "translate English to German: "."""
    max_new_tokens: int = 128
    """Tokens of a translation."""


def generate(args: Generate) -> None:
    from fmjax.recipes.generation import load_generator, stream_text, write_texts

    prompts = given(args.prompts, args.file, "generate")
    generator = load_generator(args.model)
    options = args.options()
    if len(prompts) == args.num_return_sequences == 1 and not args.json:
        ids = generator.encode(prompts[0], max_length=args.max_length)
        if generator.is_decoder:
            print(prompts[0], end="", flush=True)
        for piece in stream_text(generator, ids, seed=args.seed, options=options):
            print(piece, end="", flush=True)
        print()
        return
    options["num_return_sequences"] = args.num_return_sequences
    written = write_texts(
        generator, prompts, seed=args.seed, options=options, max_length=args.max_length
    )
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


def translate(args: Translate) -> None:
    from fmjax.recipes.generation import load_generator, translate_texts

    texts = given(args.texts, args.file, "translate")
    for text in translate_texts(
        load_generator(args.model),
        texts,
        source_language=args.source_language,
        target_language=args.target_language,
        prefix=args.prefix,
        options=args.options(),
        max_length=args.max_length,
    ):
        print(text)


def _line() -> str:
    """The user's next line; "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
