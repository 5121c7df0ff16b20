"""Votes of neighbours, beside scikit-learn's classifier and by hand."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from fmjax.data.images import ImageExamples
from fmjax.recipes import nearest_neighbours
from fmjax.recipes.nearest_neighbours import measure_neighbours, neighbour_votes


def features(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return rng.normal(size=(count, 5)) + 1.5 * np.eye(3, 5)[labels], labels


@pytest.mark.parametrize(
    ("neighbours", "temperature"), [(1, 0.07), (6, 0.07), (6, 2.0), (99, 1e-3)]
)
def test_votes_are_scikit_learns(neighbours, temperature, monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "BLOCK", 4)  # several, and one that is not full
    known, labels = features(31, 0)
    asked, _ = features(10, 1)
    votes = neighbour_votes(known, labels, asked, 4, neighbours=neighbours, temperature=temperature)
    peer = KNeighborsClassifier(
        min(neighbours, 31),
        metric="cosine",
        algorithm="brute",
        # scikit-learn's distance is 1 less the similarity.
        weights=lambda distance: np.exp(
            (distance.min(axis=1, keepdims=True) - distance) / temperature
        ),
    ).fit(known, labels)
    np.testing.assert_allclose(votes[:, :3], peer.predict_proba(asked), atol=1e-5)
    assert (votes[:, 3] == 0).all()


def test_votes_by_hand():
    known = np.array([[2.0, 0], [0, 3], [-1, 0]])
    votes = neighbour_votes(
        known, np.array([0, 1, 0]), np.array([[4.0, 3], [0, 0]]), 2, neighbours=2, temperature=0.5
    )
    near, far = np.exp(0.8 / 0.5), np.exp(0.6 / 0.5)
    np.testing.assert_allclose(votes[0], [near / (near + far), far / (near + far)], rtol=1e-6)
    assert votes[1].sum() == pytest.approx(1)  # of zeros all are as near


def test_measured_on_held_out_examples():
    vectors, examples = {}, {}
    for seed, split in enumerate(("train", "val")):
        rows, labels = features(60, seed)
        vectors[split] = rows * np.linspace(1, 9, 60)[:, None]  # lengths say nothing
        images = np.zeros((60, 1, 1, 1), np.uint8)
        examples[split] = ImageExamples(images, labels.astype(np.int32), ("a", "b", "c"))
    results = measure_neighbours(vectors, examples)
    assert results.keys() == {"val"}
    assert results["val"]["accuracy"] > 0.6
    with pytest.raises(ValueError, match=r"neighbours=0 must.*temperature=0 must.*\(60, 5\) and"):
        neighbour_votes(
            vectors["train"], np.zeros(60, int), np.zeros((1, 4)), 3, neighbours=0, temperature=0
        )
