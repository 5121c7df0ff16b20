"""Texts in, texts out: completing, chatting and translating with a saved model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import fmjax.hub as hub
from fmjax.data.files import raise_problems
from fmjax.generate import generate, stream
from fmjax.generation_config import GenerationConfig
from fmjax.recipes.texts import model_source
from fmjax.types import Variables, one_text

GENERATING = ("causal_lm", "seq2seq_lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """How text is written; what is not given is as the model's authors say."""

    max_new_tokens: int = 64
    """Tokens that may follow."""
    sample: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw tokens instead of taking the most probable."""
    greedy: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the most probable tokens, also where the model's authors say to draw."""
    temperature: float | None = None
    """Below 1 makes draws less random; says `sample`."""
    top_k: int | None = None
    """Draw among so many tokens only; says `sample`."""
    top_p: float | None = None
    """Draw among the most probable tokens of this probability together; says `sample`."""
    num_beams: int | None = None
    """Hypotheses of a beam search."""
    repetition_penalty: float | None = None
    """Above 1 makes what was written less probable."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size is written twice."""
    stop: tuple[str, ...] = ()
    """Texts after which writing ends."""
    seed: int = 0
    """Of the draws."""

    def options(self) -> dict[str, Any]:
        """The fields of a generation config that were given.

        Raises:
            ValueError: to draw, and not to.
        """
        names = (
            "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
            "no_repeat_ngram_size",
        )  # fmt: skip
        given = {name: value for name in names if (value := vars(self)[name]) is not None}
        given |= {"max_new_tokens": self.max_new_tokens, "max_length": None}
        draws = self.sample or given.keys() & {"temperature", "top_k", "top_p"}
        if draws and self.greedy:
            raise ValueError(
                "greedy takes no sample, temperature, top_k or top_p: they draw tokens"
            )
        if draws or self.greedy:
            given["do_sample"] = not self.greedy
        return given | ({"stop_strings": self.stop} if self.stop else {})


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model that writes, with its tokenizer and its authors' options."""

    model: Any
    variables: Variables
    tokenizer: Any
    config: GenerationConfig

    @property
    def is_decoder(self) -> bool:
        """Whether it continues its input; else it answers it (encoder-decoders)."""
        return self.model.head == "causal_lm"

    def encode(self, text: str, *, max_length: int | None = None) -> list[int]:
        """The tokens of one prompt or source.

        Args:
            text: the text.
            max_length: tokens an encoder-decoder's source is cut to; None cuts none.

        Raises:
            ValueError: a decoder's prompt is to be cut, of which it continues the end.
        """
        if max_length is None:
            return list(self.tokenizer(text)["input_ids"])
        if self.is_decoder:
            raise ValueError(
                f"max_length={max_length} cuts the ends of texts, which this decoder continues: "
                "shorten its prompts, or leave it out"
            )
        return list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])

    def text_of(
        self, tokens: Sequence[int], prompt: Sequence[int], *, clean_up: bool | None = None
    ) -> str:
        """What tokens say behind a prompt. Most tokenizers write no space before the first word of
        what they decode: a decoder's text is decoded from the prompt's beginning.

        Args:
            tokens: the new ones.
            prompt: those before them; an encoder-decoder's are another text's.
            clean_up: whether spaces before punctuation go, None as the tokenizer says; never a
                decoder's, where this could reach into the prompt.
        """
        if not self.is_decoder:
            prompt = ()
        decode = partial(
            self.tokenizer.decode,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False if self.is_decoder else clean_up,
        )
        return decode([*prompt, *tokens])[len(decode(prompt)) if prompt else 0 :]


def load_generator(source: str | Path) -> Generator:
    """Loads a folder or hub id.

    Raises:
        ValueError: its model does not write, or its tokenizer has tokens that the model lacks.
        OSError: no such folder, or the hub cannot be reached.
    """
    folder = hub.find_folder(model_source(str(source)))
    model, variables = hub.load(folder)
    if model.head not in GENERATING:
        raise ValueError(
            f"{source} has the head {model.head!r}; generating text needs one of {GENERATING}"
        )
    tokenizer = hub.load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, the model's vocabulary is "
            f"{model.config.vocab_size}; use the tokenizer of the model"
        )
    config = hub.load_generation_config(folder)
    if config.pad_token_id is None and tokenizer.pad_token_id is not None:
        config = config.replace(pad_token_id=tokenizer.pad_token_id)
    if config.eos_token_id is None and tokenizer.eos_token_id is not None:
        config = config.replace(eos_token_id=tokenizer.eos_token_id)
    return Generator(model, variables, tokenizer, config)


def written_with(
    model: Any,
    *,
    max_new_tokens: int,
    num_beams: int,
    eos_token_id: Any,
    pad_token_id: int | None,
) -> GenerationConfig:
    """How a model that is going to be trained will write.

    Args:
        model: an encoder-decoder.
        max_new_tokens, num_beams, eos_token_id, pad_token_id: see `GenerationConfig`.

    Raises:
        ValueError: its config does not say with which token it starts.
    """
    start = model.config.decoder_start_token_id
    if start is None:
        raise ValueError(
            "the model's config has decoder_start_token_id=None, so that it could be trained but "
            "not write; set it before: of mBART to the token of the language to be written"
        )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        decoder_start_token_id=start,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def encode_prompts(
    generator: Generator, texts: Sequence[str], *, max_length: int | None = None
) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` [B, P], padded on the side where the model wants it.

    Args:
        generator: from `load_generator`.
        texts: B prompts.
        max_length: see `Generator.encode`.

    Raises:
        ValueError: an empty prompt, or one that cannot be cut.
    """
    rows = [generator.encode(text, max_length=max_length) for text in texts]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"prompts {empty} are empty: give each at least one word")
    width = max(map(len, rows))
    pad = generator.tokenizer.pad_token_id
    pad = generator.tokenizer.eos_token_id if pad is None else pad
    ids = np.full((len(rows), width), 0 if pad is None else pad, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if generator.is_decoder else slice(len(row))
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def write_texts(
    generator: Generator,
    texts: Sequence[str],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[list[str]]:
    """What the model writes after (or, an encoder-decoder, in answer to) each text.

    Args:
        generator: from `load_generator`.
        texts: N prompts or sources.
        seed: of the draws.
        options: fields of `GenerationConfig` in place of its authors' values.
        batch_size: texts at a time, of similar length.
        max_length: see `Generator.encode`.

    Returns:
        N lists of as many texts as ``num_return_sequences`` says.

    Raises:
        ValueError: one string in the place of many, an empty text, and all that `generate` refuses.
    """
    raise_problems("write_texts", one_text("texts", texts))
    config = generator.config.replace(**(options or {}))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    written: dict[int, list[str]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A short last batch is filled up, so that it compiles nothing of its own.
        filled = chosen + chosen[-1:] * (batch_size - len(chosen) if start else 0)
        rng = jax.random.fold_in(jax.random.key(seed), start) if config.do_sample else None
        prompts = encode_prompts(generator, [texts[i] for i in filled], max_length=max_length)
        out = generate(
            generator.model,
            generator.variables,
            **prompts,
            generation_config=config,
            tokenizer=generator.tokenizer,
            rng=rng,
        )
        several = config.num_return_sequences
        before = [
            ids[mask == 1].tolist()
            for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
            for _ in range(several)
        ]
        decoded = [
            generator.text_of(row[:length].tolist(), prompt)
            for row, length, prompt in zip(out.tokens, out.lengths, before, strict=True)
        ]
        for place, i in enumerate(chosen):
            written[i] = decoded[place * several : (place + 1) * several]
    return [written[i] for i in range(len(texts))]


def stream_text(
    generator: Generator,
    input_ids: Sequence[int],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Pieces of the text that follows a prompt, as soon as they are known; of a beam search, which
    knows its text only at the end, all of it.

    Args:
        generator: from `load_generator`.
        input_ids: tokens of one prompt.
        seed: of the draws.
        options: fields of `GenerationConfig` in place of its authors' values.

    Raises:
        ValueError: an empty prompt, and all that `generate` refuses.
    """
    if not len(input_ids):
        raise ValueError("the prompt is empty: give it at least one word")
    config = generator.config.replace(**(options or {}))
    rng = jax.random.key(seed) if config.do_sample else None
    decode = partial(
        generator.text_of,
        prompt=list(input_ids),
        clean_up=False,  # which would change what has been shown
    )
    prompt = {
        "input_ids": np.asarray([input_ids], np.int32),
        "attention_mask": np.ones((1, len(input_ids)), np.int32),
        "generation_config": config,
        "tokenizer": generator.tokenizer,
        "rng": rng,
    }
    if config.num_beams > 1:
        out = generate(generator.model, generator.variables, **prompt)
        yield decode(out.tokens[0, : out.lengths[0]].tolist())
        return
    tokens: list[int] = []
    shown = ""
    for new in stream(generator.model, generator.variables, **prompt):
        tokens += new[0].tolist()
        text = decode(tokens)
        # Bytes of a character that is not complete yet decode to U+FFFD.
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = decode(tokens)
    if len(text) > len(shown):
        yield text[len(shown) :]


def chat_prompt(generator: Generator, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A conversation as the model was trained to read it: by its tokenizer's chat template.

    Args:
        generator: from `load_generator`, a decoder.
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``.

    Raises:
        ValueError: the tokenizer has no chat template, or the conversation is too long.
    """
    if generator.tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so this is no chat model; use `fmjax generate`"
        )
    text = generator.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return list(generator.tokenizer(text, add_special_tokens=False)["input_ids"])


def translate_texts(
    generator: Generator,
    texts: Sequence[str],
    *,
    source_language: str | None = None,
    target_language: str | None = None,
    prefix: str = "",
    options: Mapping[str, Any] | None = None,
    max_length: int | None = None,
) -> list[str]:
    """Translations by an encoder-decoder.

    Args:
        generator: from `load_generator`, an encoder-decoder.
        texts: N sources.
        source_language, target_language: codes of a multilingual model, as its tokenizer has them
            ("en_XX", "de_DE" for mBART): the source's sets the tokenizer's ``src_lang``, the
            target's is the first token that is written.
        prefix: put before each text ("translate English to German: " for T5).
        options: see `write_texts`.
        max_length: see `Generator.encode`.

    Raises:
        ValueError: a decoder, or languages that the tokenizer does not know.
    """
    raise_problems("translate_texts", one_text("texts", texts))
    if generator.is_decoder:
        raise ValueError("translating needs an encoder-decoder; for a decoder use `fmjax generate`")
    options, tokenizer = dict(options or {}), generator.tokenizer
    unknown = [
        code
        for code in (source_language, target_language)
        if code is not None
        and tokenizer.convert_tokens_to_ids(code) in (None, tokenizer.unk_token_id)
    ]
    if unknown:
        raise ValueError(f"the tokenizer does not know the languages {unknown}")
    if source_language is not None:
        tokenizer.src_lang = source_language
    if target_language is not None:
        options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(target_language)
    written = write_texts(
        generator, [prefix + text for text in texts], options=options, max_length=max_length
    )
    return [several[0] for several in written]
