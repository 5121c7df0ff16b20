"""The rule engine: bitwise round trips, and one error that lists everything."""

import threading
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.weights import (
    CONV2D,
    PLUS_ONE,
    TRANSPOSE,
    Rule,
    Stack,
    Tensor,
    compose,
    copied,
    export_params,
    fused,
    fused_per_head,
    import_params,
    inverted,
    open_checkpoint,
    rule_tensor_names,
    stacked,
    write_checkpoint,
)

FLOAT32 = np.dtype(np.float32)


@dataclass
class Leaf:
    shape: tuple
    dtype: np.dtype = FLOAT32


def tensor(name, array):
    array = np.asarray(array)
    return Tensor(name, array.shape, array.dtype, lambda: array)


def tensors_of(arrays):
    return {name: tensor(name, array) for name, array in arrays.items()}


def keep(path, array):
    return array


def table(heads):
    """A made-up family that uses every kind of rule."""
    layer = "body.layer.{i}"
    return [
        Rule("params/embed/embedding", "body.words.weight", aliases=("head.decoder.weight",)),
        Rule("params/stem/kernel", "body.stem.weight", CONV2D),
        Rule(
            tuple(f"params/layers_{{i}}/attn/{part}/kernel" for part in ("query", "key", "value")),
            f"{layer}.qkv.weight",
            compose(fused_per_head(3, heads), TRANSPOSE),
        ),
        Rule(
            ("params/layers_{i}/attn/key/bias", "params/layers_{i}/attn/value/bias"),
            f"{layer}.kv.bias",
            fused(2),
        ),
        Rule(
            "params/layers_{i}/joined",
            (f"{layer}.one", f"{layer}.two"),
            inverted(fused((1, 2))),
        ),
        Rule("params/layers_{i}/norm/scale", f"{layer}.norm.weight", PLUS_ONE),
        Rule(
            "params/layers_{i}/moe/up/kernel",
            f"{layer}.experts.{{e}}.w1.weight",
            stacked(TRANSPOSE),
        ),
        Rule("batch_stats/stem/mean", "body.stem.running_mean"),
        Rule("params/head/bias", "head.bias", copies=("head.decoder.bias",)),
    ]


def tree(layers, heads, head_size, experts, seed=0, dtype=np.float32):
    """Random leaves for `table`, small integers so that PLUS_ONE is exact."""
    rng = np.random.default_rng(seed)
    width = 4
    shapes = {
        "params/embed/embedding": (7, width),
        "params/stem/kernel": (2, 3, 3, width),
        "batch_stats/stem/mean": (width,),
        "params/head/bias": (7,),
    }
    for i in range(layers):
        for part in ("query", "key", "value"):
            shapes[f"params/layers_{i}/attn/{part}/kernel"] = (width, heads * head_size)
        shapes[f"params/layers_{i}/attn/key/bias"] = (heads * head_size,)
        shapes[f"params/layers_{i}/attn/value/bias"] = (heads * head_size,)
        shapes[f"params/layers_{i}/joined"] = (3, 2)
        shapes[f"params/layers_{i}/norm/scale"] = (width,)
        shapes[f"params/layers_{i}/moe/up/kernel"] = (experts, width, 5)
    return {
        path: np.asarray(rng.integers(-50, 50, shape)).astype(dtype)
        for path, shape in shapes.items()
    }


def same(left, right):
    assert list(left) == list(right)
    for path, array in left.items():
        assert array.dtype == right[path].dtype
        assert array.shape == right[path].shape
        assert array.tobytes() == right[path].tobytes()


@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from([np.float32, np.float64]),
)
def test_import_undoes_export_bitwise(layers, heads, head_size, experts, seed, dtype):
    leaves = tree(layers, heads, head_size, experts, seed, dtype)
    rules = table(heads)
    exported = export_params(rules, leaves)
    read = import_params(rules, {t.name: t for t in exported}, leaves, place=keep)
    same(read, leaves)
    assert {t.name for t in exported} <= rule_tensor_names(rules, leaves)
    for t in exported:
        array = t.read()
        assert (array.shape, array.dtype) == (t.shape, t.dtype)


def test_import_undoes_export_through_a_file(tmp_path):
    leaves = tree(2, 2, 3, 2)
    write_checkpoint(tmp_path, export_params(table(2), leaves), max_shard_size=200)
    with open_checkpoint(tmp_path) as checkpoint:
        read = import_params(table(2), checkpoint.tensors, leaves, place=keep)
    same(read, leaves)


def test_leaves_are_contiguous_and_nobody_elses():
    leaves = tree(1, 2, 3, 2)
    sources = {t.name: t for t in export_params(table(2), leaves)}
    read = import_params(table(2), sources, leaves, place=keep)
    for path, array in read.items():
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not any(np.shares_memory(array, leaf) for leaf in leaves.values()), path
    for t in sources.values():
        assert not t.read().flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("shape", [(5, 3, 40), (1, 700, 90), (2, 0, 3), (40_000, 2, 3)])
def test_copies_of_any_layout_are_exact(shape, axes, dtype):
    base = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)
    view = base.transpose(axes)
    for source in (view, view[..., ::-1], view[::2]):
        copy = copied(source)
        assert copy.flags.c_contiguous
        assert not np.shares_memory(copy, base)
        np.testing.assert_array_equal(copy, source)
    stack = Stack([Stack([view, view]), Stack([view, view])])
    np.testing.assert_array_equal(
        copied(stack[:, 1:, ::2, :, 1:], np.dtype(np.float32)),
        np.stack([view[None, ::2, :, 1:]] * 2).astype(np.float32),
    )


def test_numbers_without_axes_are_stacked():
    stack = Stack([np.array(7), np.array(8)])
    np.testing.assert_array_equal(copied(stack), [7, 8])


def test_several_threads_place_what_one_does():
    leaves = tree(6, 2, 3, 2)
    sources = {t.name: t for t in export_params(table(2), leaves)}

    def place(path, leaf):
        return threading.get_ident(), copied(leaf)

    read = import_params(table(2), sources, leaves, place=place, views=True, threads=3)
    same({path: array for path, (_, array) in read.items()}, leaves)
    assert threading.get_ident() not in {thread for thread, _ in read.values()}
    with pytest.raises(OSError, match="no place"):
        import_params(table(2), sources, leaves, place=no_place, views=True, threads=3)


def no_place(path, leaf):
    raise OSError("no place")


def test_the_largest_tensor_is_placed_first_and_pages_released_after_each():
    events = []
    arrays = {"s": np.zeros(2, np.float32), "l": np.zeros(9, np.float32)}

    def source(name):
        array = arrays[name]
        return Tensor(
            name,
            array.shape,
            array.dtype,
            lambda: events.append(f"read {name}") or array,
            lambda: events.append(f"release {name}"),
        )

    read = import_params(
        [Rule("params/small", "s"), Rule("params/large", "l")],
        {name: source(name) for name in arrays},
        {"params/small": Leaf((2,)), "params/large": Leaf((9,))},
        place=lambda path, array: events.append(f"place {path}") or path,
    )
    assert events == [
        *("read l", "place params/large", "release l"),
        *("read s", "place params/small", "release s"),
    ]
    assert list(read.items()) == [("params/small",) * 2, ("params/large",) * 2]


def simple(layers=2, width=3, labels=2):
    rules = [
        Rule("params/layers_{i}/kernel", "bert.layer.{i}.weight", TRANSPOSE),
        Rule("params/layers_{i}/bias", "bert.layer.{i}.bias"),
        Rule("params/head/classifier/kernel", "classifier.weight", TRANSPOSE),
        Rule("params/head/classifier/bias", "classifier.bias"),
    ]
    arrays = {}
    abstract = {}
    for i in range(layers):
        arrays[f"bert.layer.{i}.weight"] = np.zeros((width, 4), np.float32)
        arrays[f"bert.layer.{i}.bias"] = np.zeros(width, np.float32)
        abstract[f"params/layers_{i}/kernel"] = Leaf((4, width))
        abstract[f"params/layers_{i}/bias"] = Leaf((width,))
    arrays["classifier.weight"] = np.zeros((labels, width), np.float32)
    arrays["classifier.bias"] = np.zeros(labels, np.float32)
    abstract["params/head/classifier/kernel"] = Leaf((width, labels))
    abstract["params/head/classifier/bias"] = Leaf((labels,))
    return rules, arrays, abstract


def never(path, array):
    raise AssertionError(f"{path} was placed although not everything fits")


def error_of(rules, arrays, abstract, **options):
    with pytest.raises(ValueError, match="do not fit") as caught:
        import_params(rules, tensors_of(arrays), abstract, place=never, **options)
    return str(caught.value)


def test_everything_wrong_is_in_one_error():
    rules, arrays, abstract = simple()
    arrays["bert.layer.1.weight"] = np.zeros((5, 4), np.float32)
    arrays["classifier.weight"] = np.zeros(3, np.float32)
    arrays["bert.layer.0.bias"] = np.zeros(3, np.int8)
    del arrays["classifier.bias"]
    arrays["bert.pooler.weight"] = np.zeros(3)
    abstract["params/extra/scale"] = Leaf((3,))
    rules.append(Rule("params/none/{i}", "none.{i}"))
    text = error_of(rules, arrays, abstract, new=("nothing/",))
    for part in [
        "params/layers_1/kernel: the model's (4, 3), the checkpoint's bert.layer.1.weight (5, 4), "
        "as a parameter (4, 5)",
        "params/head/classifier/kernel: the checkpoint's classifier.weight (3,): permute(1, 0)",
        "params/layers_0/bias: the model's float32, the checkpoint's bert.layer.0.bias int8",
        "params/head/classifier/bias needs classifier.bias",
        "bert.pooler.weight",
        "params/extra/scale",
        "params/none/{i}",
        "'nothing/'; the model has extra, head, layers_0, layers_1",
        'new=("head/",)',
        "num_labels=",
        "another head",
    ]:
        assert part in text, text


@pytest.mark.parametrize(("model", "file"), [(3, 6), (6, 3), (1, 12)])
def test_different_numbers_of_layers_read_well(model, file):
    rules, _, abstract = simple(layers=model)
    _, arrays, _ = simple(layers=file)
    text = error_of(rules, arrays, abstract)
    assert f"bert.layer.{{i}}: the model has {model}, the checkpoint {file}" in text
    numbers = ",".join(str(i) for i in range(min(model, file), max(model, file)))
    if file > model:
        assert f"bert.layer.{{{numbers}}}.weight" in text
    else:
        assert "params/layers_5/kernel needs bert.layer.5.weight" in text


def test_new_parameters_are_left_out():
    rules, arrays, abstract = simple(labels=2)
    abstract["params/head/classifier/kernel"] = Leaf((3, 5))
    abstract["params/head/classifier/bias"] = Leaf((5,))
    with pytest.raises(ValueError, match="wrong shapes"):
        import_params(rules, tensors_of(arrays), abstract, place=never)
    read = import_params(rules, tensors_of(arrays), abstract, place=keep, new=("head/",))
    assert set(read) == {path for path in abstract if "/head/" not in path}
    for name in ("classifier.weight", "classifier.bias"):
        del arrays[name]
    again = import_params(rules, tensors_of(arrays), abstract, place=keep, new=("head/",))
    assert set(again) == set(read)
    # Matched at the start of the path without its collection, as a regular expression.
    for pattern in ("classifier", "params/head"):
        assert f"'{pattern}'; the model has" in error_of(rules, arrays, abstract, new=(pattern,))
    one = import_params(rules, tensors_of(arrays), abstract, place=keep, new=("head/", r".*_1/b"))
    assert set(read) - set(one) == {"params/layers_1/bias"}
    with pytest.raises(ValueError, match="no regular expression"):
        import_params(rules, tensors_of(arrays), abstract, place=keep, new=("(",))


@pytest.mark.parametrize("in_file", [2, 3])
def test_a_layer_may_be_new(in_file):
    rules, _, abstract = simple(layers=3)
    _, arrays, _ = simple(layers=in_file)
    read = import_params(rules, tensors_of(arrays), abstract, place=keep, new=("layers_2/",))
    assert set(read) == {path for path in abstract if "layers_2" not in path}


def test_new_parameters_need_no_rule_and_may_be_part_of_a_tensor():
    rules = [Rule(("params/a", "params/b"), "ab", fused(2))]
    abstract = {"params/a": Leaf((2,)), "params/b": Leaf((9,)), "params/c": Leaf((1,))}
    arrays = {"ab": np.arange(4, dtype=np.float32)}
    read = import_params(rules, tensors_of(arrays), abstract, place=keep, new=("[bc]$",))
    assert set(read) == {"params/a"}
    np.testing.assert_array_equal(read["params/a"], [0, 1])


def test_unread_tensors_that_are_fine():
    rules, arrays, abstract = simple()
    arrays |= {"bert.position_ids": np.arange(3), "cls.bias": np.zeros(3), "odd": np.zeros(1)}
    fine = {"ignored": (r"position_ids$",), "known": {"cls.bias"}}
    text = error_of(rules, arrays, abstract, **fine)
    assert "odd" in text
    assert "position_ids" not in text
    assert "cls.bias" not in text
    del arrays["odd"]
    assert set(import_params(rules, tensors_of(arrays), abstract, place=keep, **fine)) == set(
        abstract
    )


@pytest.mark.parametrize(
    "present", [("a",), ("b",), ("c",), ("a", "b"), ("b", "c"), ("c", "b", "a")]
)
def test_aliases_and_copies(present):
    """The first name that is there is read; the others are tied copies."""
    rules = [Rule("params/w", "a", aliases=("b",), copies=("c",))]
    arrays = {name: np.float32([ord(name)]) for name in present}
    read = import_params(rules, tensors_of(arrays), {"params/w": Leaf((1,))}, place=keep)
    assert read["params/w"] == ord(min(present))
    exported = export_params(rules, read)
    assert [t.name for t in exported] == ["a", "c"]
    text = error_of(rules, {}, {"params/w": Leaf((1,))})
    assert "params/w needs a (or b, c)" in text


def test_missing_experts_are_listed():
    rules = [Rule("params/w", "experts.{e}.w", stacked())]
    arrays = {f"experts.{e}.w": np.zeros(2, np.float32) for e in (0, 2, 5)}
    text = error_of(rules, arrays, {"params/w": Leaf((4, 2))})
    assert "params/w needs experts.{1,3}.w" in text
    assert "experts.5.w" in text


def test_half_precision_and_kinds():
    rules = [Rule("params/w", "w")]
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64):
        arrays = {"w": np.ones(2, dtype)}
        read = import_params(rules, tensors_of(arrays), {"params/w": Leaf((2,))}, place=keep)
        assert read["params/w"].dtype == dtype
    bf16 = {"params/w": Leaf((2,), np.dtype(ml_dtypes.bfloat16))}
    for dtype in (np.int8, np.uint8, np.bool_, np.complex64):
        assert "wrong kinds" in error_of(rules, {"w": np.ones(2, dtype)}, bf16)
    counts = {"params/w": Leaf((2,), np.dtype(np.int32))}
    assert "wrong kinds" in error_of(rules, {"w": np.ones(2, np.float32)}, counts)
    read = import_params(rules, tensors_of({"w": np.ones(2, np.int64)}), counts, place=keep)
    assert read["params/w"].dtype == np.int64


def test_numbers_of_layers_are_matched_whole():
    rules = [Rule("params/layers_{i}/w", "l.{i}.w")]
    leaves = {f"params/layers_{i}/w": np.float32([i]) for i in range(12)}
    exported = {t.name: t for t in export_params(rules, leaves)}
    assert set(exported) == {f"l.{i}.w" for i in range(12)}
    read = import_params(rules, exported, leaves, place=keep)
    same(read, leaves)
    for path in ("params/layers_01/w", "params/layers_x/w", "params/layers_1/w/v"):
        assert path in error_of(rules, {}, {path: Leaf((1,)), "params/layers_0/w": Leaf((1,))})


def test_export_refuses_what_it_cannot_undo():
    rules = [Rule(("params/a", "params/b"), "ab", fused(2)), Rule("params/c", "c", TRANSPOSE)]
    leaves = {"params/a": np.ones(2), "params/b": np.ones(3), "params/c": np.ones(2)}
    leaves["params/d"] = np.ones(1)
    with pytest.raises(ValueError, match="do not fit") as caught:
        export_params(rules, leaves)
    for part in ("params/a, params/b", "params/c", "params/d"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"params/b\n|params/b$"):
        export_params(rules[:1], {"params/a": np.ones(2)})
    mixed = {"params/a": np.ones(2), "params/b": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="of dtypes"):
        export_params(rules[:1], mixed)


def test_tables_that_contradict_themselves():
    leaf = {"params/a": Leaf((1,)), "params/b": Leaf((1,))}
    two = [Rule("params/a", "x"), Rule("params/a", "y"), Rule("params/b", "x")]
    assert "claimed by two rules" in error_of(two, {}, leaf)
    with pytest.raises(ValueError, match="the tensor x"):
        export_params(
            [Rule("params/a", "x"), Rule("params/b", "x")],
            {"params/a": np.ones(1), "params/b": np.ones(1)},
        )
    with pytest.raises(ValueError, match="has 1 parameters, but its transform fused"):
        import_params(
            [Rule("params/a", "x", fused(2))],
            tensors_of({"x": np.ones(2)}),
            {"params/a": Leaf((1,))},
            place=keep,
        )
    with pytest.raises(ValueError, match="same braces"):
        Rule(("params/a_{i}", "params/b"), "x")
    with pytest.raises(ValueError, match="no aliases"):
        Rule("params/a", ("x", "y"), aliases=("z",))
    with pytest.raises(ValueError, match="open"):
        Rule(("params/a", "params/b"), "x.{e}")


def test_names_a_rule_knows():
    rule = Rule("params/a_{i}", "x.{i}", aliases=("y.{i}",), copies=("z.{i}",))
    assert rule.tensor_names() == ("x.{i}", "y.{i}", "z.{i}")
    leaves = {"params/a_0": Leaf((1,)), "params/a_3": Leaf((1,))}
    assert rule_tensor_names([rule], leaves) == {f"{n}.{i}" for n in "xyz" for i in (0, 3)}
