"""Word n-gram language models: counted here, or read from ARPA files."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fmjax.types import one_text

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
NEVER = -100 * math.log(10)  # nats, of an unknown word where the model has no number for it

Gram = tuple[str, ...]
T = TypeVar("T", int, float)


@dataclasses.dataclass(frozen=True)
class WordNgram:
    """A back-off model (Katz 1987; Jurafsky & Martin, "Speech and Language Processing", ch. 3).

    Where an n-gram is known it has its own probability; where not, that of the shorter one times
    the back-off weight of its context.

    Attributes:
        order: words of the longest n-grams.
        logs: ln of each n-gram's last word's probability after the others.
        back_offs: ln of each context's weight; 0 where there is none.
    """

    order: int
    logs: Mapping[Gram, float]
    back_offs: Mapping[Gram, float]

    def log_probability(self, before: Sequence[str], word: str) -> float:
        """ln of the probability of a word after others, "<s>" first of these where a text begins.

        Args:
            before: the words before it, any number.
            word: "</s>" for the end of the text.
        """
        first = max(0, len(before) - self.order + 1)  # fewer words stand at the start of a text
        context = tuple(map(self._known, before[first:]))
        gram, total = (*context, self._known(word)), 0.0
        while gram not in self.logs:
            if len(gram) == 1:
                return total + NEVER
            total += self.back_offs.get(gram[:-1], 0.0)
            gram = gram[1:]
        return total + self.logs[gram]

    def _known(self, word: str) -> str:
        return word if (word,) in self.logs else UNKNOWN

    def nats(self, text: str) -> float:
        """-ln of the probability of a text of words with spaces between them, its end included."""
        words = [START, *text.split(), END]
        return -sum(
            self.log_probability(words[:place], words[place]) for place in range(1, len(words))
        )

    def scorer(
        self, *, weight: float = 0.5, bonus: float = 1.0, delimiter: str = " "
    ) -> Callable[[str, str], float]:
        """What a search over prefixes asks for each character (Hannun et al. 2014,
        arXiv:1408.2873, eq. 5): where a word ends, its log-probability and a bonus.

        Args:
            weight: of the log-probability, the paper's alpha.
            bonus: of each word, the paper's beta, against too short transcripts.
            delimiter: the character between words.
        """

        def score(text: str, piece: str) -> float:
            if piece not in (delimiter, ""):
                return 0.0
            words = [word for word in text.split(delimiter) if word]
            total = 0.0
            if text and not text.endswith(delimiter):  # a word has ended
                before = [START, *words[:-1]]
                total += weight * self.log_probability(before, words[-1]) + bonus
            if piece == "":
                total += weight * self.log_probability([START, *words], END)
            return total

        return score


def fit_word_ngram(texts: Iterable[str], order: int = 3) -> WordNgram:
    """Counts all n-grams of texts, smoothed as `fmjax.metrics.byte_ngram` is (Witten & Bell 1991).

    Args:
        texts: words with spaces between them; they are read once.
        order: words of the longest n-grams.

    Raises:
        ValueError: one string in the place of texts, no words, or an order below 1.
    """
    if wrong := one_text("texts", texts):
        raise ValueError(wrong[0])
    counts: list[dict[Gram, Counter[str]]] = [defaultdict(Counter) for _ in range(order)]
    words: set[str] = set()
    for text in texts:
        line = [START, *text.split(), END]
        words.update(line[1:-1])
        for place, k in itertools.product(range(1, len(line)), range(order)):
            if k <= place:
                counts[k][tuple(line[place - k : place])][line[place]] += 1
    if order < 1 or not words:
        raise ValueError(f"order={order} must be positive, and texts must have words")
    even = 1 / (len(words) + 2)  # words, the end, and the unknown one
    probabilities: dict[Gram, float] = {}
    back_offs: dict[Gram, float] = {}
    for table in counts:
        for context, following in table.items():
            total, kinds = sum(following.values()), len(following)
            for word, count in following.items():
                shorter = probabilities[(*context[1:], word)] if context else even
                share = (count + kinds * shorter) / (total + kinds)
                probabilities[(*context, word)] = share
            if context:
                back_offs[context] = math.log(kinds / (total + kinds))
            else:
                probabilities[(UNKNOWN,)] = kinds * even / (total + kinds)
    logs = {gram: math.log(value) for gram, value in probabilities.items()}
    return WordNgram(order, logs | {(START,): NEVER}, back_offs)


def read_arpa(path: str | Path) -> WordNgram:
    """A model from an ARPA file, as KenLM and SRILM write them, plain or gzipped.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or other than its header says; the line is named.
    """
    path = Path(path).expanduser()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        try:
            return _parse(path, enumerate((line.strip() for line in file), 1))
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is no ARPA file: {error}") from error


def _parse(path: Path, lines: Iterator[tuple[int, str]]) -> WordNgram:
    promised: dict[int, int] = {}
    logs: dict[Gram, float] = {}
    back_offs: dict[Gram, float] = {}
    order, found, ended = 0, Counter(), False
    for number, line in lines:
        if not line:
            continue
        if line == "\\end\\":
            ended = True
            break
        if line.startswith("ngram "):
            size, _, count = line.removeprefix("ngram ").partition("=")
            promised[_number(path, number, size, int)] = _number(path, number, count, int)
        elif line.startswith("\\") and line.endswith("-grams:"):
            order = _number(path, number, line[1 : -len("-grams:")], int)
        elif order:
            parts = line.split()
            if len(parts) not in (order + 1, order + 2):
                raise ValueError(f"{path}, line {number}: {line[:80]!r} is no {order}-gram")
            gram = tuple(parts[1 : order + 1])
            logs[gram] = _number(path, number, parts[0], float) * math.log(10)
            if len(parts) == order + 2:
                back_offs[gram] = _number(path, number, parts[-1], float) * math.log(10)
            found[order] += 1
        elif line != "\\data\\" and promised:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} belongs to no list of n-grams")
    if not ended or not promised or dict(found) != promised:
        raise ValueError(
            f"{path}: its header promises {promised} n-grams by their length, and it has "
            f"{dict(found)}{'' if ended else ', and no end'}: is it a whole ARPA file?"
        )
    return WordNgram(max(promised), logs, back_offs)


def _number(path: Path, line: int, text: str, kind: Callable[[str], T]) -> T:
    try:
        value = kind(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {text[:40]!r} is no number") from error
    if value != value:  # nan
        raise ValueError(f"{path}, line {line}: {text!r} is no number")
    return value
