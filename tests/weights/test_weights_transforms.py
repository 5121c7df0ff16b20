"""Every transform undoes itself, agrees with its shape functions and means what it says."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.weights import (
    CONV1D,
    CONV2D,
    IDENTITY,
    PLUS_ONE,
    TRANSPOSE,
    compose,
    fused,
    fused_per_head,
    inverted,
    permute,
    stacked,
)

SIZE = st.integers(1, 5)


@st.composite
def cases(draw):
    """(transform, shapes of tensors it loads)."""
    sizes = draw(st.lists(SIZE, min_size=4, max_size=4))
    kind = draw(
        st.sampled_from(
            ["permute", "fused", "sizes", "heads", "groups", "joined", "experts", "both"]
        )
    )
    if kind == "permute":
        axes = draw(st.permutations(range(draw(st.integers(0, 4)))))
        return permute(*axes), [tuple(sizes[: len(axes)])] * draw(st.integers(1, 3))
    axis = draw(st.integers(0, 2))
    parts = draw(st.integers(1, 4))
    shape = list(sizes[:3])
    if kind == "fused":
        shape[axis] *= parts
        return fused(parts, axis), [tuple(shape)]
    if kind == "sizes":
        lengths = draw(st.lists(SIZE, min_size=1, max_size=4))
        shape[axis] = sum(lengths)
        return fused(tuple(lengths), axis=axis), [tuple(shape)]
    if kind == "heads":
        heads = draw(SIZE)
        shape[axis] *= parts * heads
        return fused_per_head(parts, heads, axis=axis), [tuple(shape)]
    if kind == "groups":
        groups, heads = draw(SIZE), draw(st.lists(SIZE, min_size=1, max_size=3))
        shape[axis] *= groups * sum(heads)
        return fused_per_head(tuple(heads), groups, axis=axis), [tuple(shape)]
    if kind == "joined":
        return inverted(fused(parts, axis)), [tuple(shape)] * parts
    if kind == "experts":
        each = draw(st.sampled_from([IDENTITY, CONV1D, permute(1, 2, 0)]))
        return stacked(each), [tuple(shape)] * parts
    heads = draw(SIZE)
    first = (2 * heads * sizes[0], sizes[1])
    return compose(fused_per_head(2, heads), TRANSPOSE, PLUS_ONE), [first]


@given(cases(), st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]))
def test_saving_undoes_loading(case, dtype):
    transform, shapes = case
    # Small integers: one more and one less are exact.
    arrays = [
        (np.arange(np.prod(shape)).reshape(shape) % 97 + index).astype(dtype)
        for index, shape in enumerate(shapes)
    ]
    loaded = transform.load(arrays)
    loaded_shapes = transform.load_shapes(shapes)
    assert [array.shape for array in loaded] == loaded_shapes
    assert transform.save_shapes(loaded_shapes) == shapes
    saved = transform.save(loaded)
    assert [array.shape for array in saved] == shapes
    for array, back in zip(arrays, saved, strict=True):
        np.testing.assert_array_equal(back, array)


def test_convolutions_and_dense_layers():
    dense = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(TRANSPOSE.load([dense])[0], np.einsum("oi->io", dense))
    conv1d = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(CONV1D.load([conv1d])[0], np.einsum("oix->xio", conv1d))
    conv2d = np.arange(120).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(CONV2D.load([conv2d])[0], np.einsum("oixy->xyio", conv2d))
    assert IDENTITY.load([dense])[0] is dense


def test_views_where_possible():
    array = np.zeros((6, 4))
    for transform in (TRANSPOSE, fused(3), compose(fused((1, 2, 3)), TRANSPOSE)):
        assert all(np.shares_memory(array, part) for part in transform.load([array]))


def test_fused_per_head_is_gpt_neox():
    """Its attention views the fused output as [H, 3 * K] and cuts each head in three."""
    heads, size, width = 2, 3, 4
    weight = np.arange(heads * 3 * size * width).reshape(-1, width)
    x = np.arange(width)
    split = (weight @ x).reshape(heads, 3 * size)
    parts = fused_per_head(3, heads).load([weight])
    for index, part in enumerate(parts):
        expected = split[:, index * size : (index + 1) * size]
        np.testing.assert_array_equal((part @ x).reshape(heads, size), expected)


def test_fused_per_head_in_groups_is_falcon_40b():
    """Its attention views the fused output as [G, H / G + 2, K]: queries, a key, a value."""
    groups, queries, size, width = 2, 3, 2, 4
    weight = np.arange(groups * (queries + 2) * size * width).reshape(-1, width)
    x = np.arange(width)
    split = (weight @ x).reshape(groups, queries + 2, size)
    parts = fused_per_head((queries, 1, 1), groups).load([weight])
    for part, at in zip(parts, (slice(queries), queries, queries + 1), strict=True):
        np.testing.assert_array_equal(part @ x, split[:, at].reshape(-1))


def test_plus_one_keeps_small_weights_of_half_precision():
    small = np.array([0.001], ml_dtypes.bfloat16)
    (scale,) = PLUS_ONE.load([small])
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale - 1, small.astype(np.float32), rtol=1e-4)
    assert PLUS_ONE.save([np.array([1.5], ml_dtypes.bfloat16)])[0].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(PLUS_ONE.save([np.float32([1.5])])[0], [0.5])


@pytest.mark.parametrize(
    ("transform", "shapes", "match"),
    [
        (TRANSPOSE, [(3,)], "needs 2 axes"),
        (fused(3), [(4, 2)], "does not divide an axis of 4"),
        (fused((1, 2)), [(4, 2)], "does not divide an axis of 4"),
        (fused(2, axis=2), [(4, 2)], "lacks"),
        (fused(2), [(4,), (4,)], "for 1 arrays, not 2"),
        (fused_per_head(3, 2), [(9,)], "does not divide axis 0"),
        (fused_per_head(3, 2), [()], "lacks"),
        (fused_per_head((3, 1, 1), 2), [(12,)], "does not divide axis 0"),
        (inverted(fused_per_head((2, 1), 2)), [(4,), (4,)], "have the shapes"),
        (stacked(), [(2,), (3,)], "of one shape"),
        (stacked(), [], "of one shape"),
        (stacked(fused(2)), [(2,), (2,)], "for 1 arrays, not 2"),
        (inverted(fused(2)), [(2, 3), (2, 4)], "have the shapes"),
        (inverted(fused(2)), [(2, 3), (1, 3)], "does not|have the shapes"),
        (inverted(fused(2)), [(2, 3)], "for 2 arrays"),
        (inverted(fused_per_head(2, 4)), [(6,), (6,)], "have the shapes"),
        (inverted(stacked()), [()], "lacks"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(transform, shapes, match):
    with pytest.raises(ValueError, match=match):
        transform.load_shapes(shapes)


def test_senseless_transforms_are_refused():
    with pytest.raises(ValueError, match="in some order"):
        permute(0, 2)
    with pytest.raises(ValueError, match="at least one"):
        fused(0)
    with pytest.raises(ValueError, match="one head"):
        fused_per_head(3, 0)
