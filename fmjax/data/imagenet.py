"""The names of ImageNet's 1,000 classes, in the order of every published classifier's outputs.

The order is that of the classes' WordNet numbers, which tensorflow_datasets lists; their words are
in WordNet 3.0.
"""

from __future__ import annotations

import importlib.resources

from fmjax.data import assets
from fmjax.data.wordnet import read_synsets


def imagenet_labels() -> list[str]:
    """1,000 different names, such as "Egyptian cat"; the first call fetches WordNet.

    A word that names two classes ("crane", a bird and a machine) is followed by the class's next
    word, or by its WordNet number.

    Raises:
      OSError: WordNet cannot be downloaded.
    """
    place = importlib.resources.files("tensorflow_datasets") / "datasets/imagenet2012/labels.txt"
    numbers = place.read_text(encoding="utf-8").split()
    nouns = {
        synset.id: synset.lemmas for synset in read_synsets(assets.fetch("wordnet") / "data.noun")
    }
    names: list[str] = []
    for number in numbers:
        lemmas = nouns[number]
        choices = [lemmas[0], *(f"{lemmas[0]}, {other}" for other in lemmas[1:])]
        choices.append(f"{lemmas[0]}, {number}")
        names.append(next(name for name in choices if name not in names))
    return names
