"""Pieces of tables that families share, and rules with a default."""

import numpy as np
import pytest

from fmjax.weights import (
    Rule,
    Tensor,
    dense_rules,
    export_params,
    import_params,
    renamed,
    vocabulary_rules,
)


def tensor(name, array):
    array.flags.writeable = False  # as those of a mapped file are
    return Tensor(name, array.shape, array.dtype, lambda: array)


def read(rules, arrays, abstract):
    tensors = {name: tensor(name, array) for name, array in arrays.items()}
    return import_params(rules, tensors, abstract, place=lambda path, array: array)


def test_renamed_replaces_whole_modules_in_order():
    table = [
        *dense_rules("layers_{i}/attn/out", "bert.layer.{i}.attention.output.dense"),
        *dense_rules("layers_{i}/mlp/down", "bert.layer.{i}.output.dense"),
        *dense_rules("pooler", "bert.pooler.dense", bias=False),
        Rule("params/word", "bert.word.weight", aliases=("cls.bert.weight",), copies=("x.bert",)),
    ]
    names = {"bert": "mpnet", "attention.output.dense": "o", "output.dense": "ffn.2", "cls": "lm"}
    got = [rule.tensor_names() for rule in renamed(table, names)]
    assert got == [
        ("mpnet.layer.{i}.o.weight",),
        ("mpnet.layer.{i}.o.bias",),
        ("mpnet.layer.{i}.ffn.2.weight",),
        ("mpnet.layer.{i}.ffn.2.bias",),
        ("mpnet.pooler.dense.weight",),
        ("mpnet.word.weight", "lm.mpnet.weight", "x.mpnet"),
    ]
    # No piece of a longer name: "roberta" is not "bert" with something around it.
    (same,) = renamed([Rule("params/x", "roberta.bertie.weight")], {"bert": "mpnet"})
    assert same.tensors == ("roberta.bertie.weight",)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_vocabulary_lies_in_two_places(tied):
    table = vocabulary_rules(
        tied=tied, dense="head.dense", norm="head.norm", decoder="head.decoder", bias="head.bias"
    )
    bias = next(rule for rule in table if rule.params == ("params/head/predictions/bias",))
    if tied:
        assert (bias.tensors, bias.aliases, bias.copies) == (
            ("head.bias",), ("head.decoder.bias",), ()
        )  # fmt: skip
    else:
        assert (bias.tensors, bias.aliases, bias.copies) == (
            ("head.decoder.bias",), (), ("head.bias",)
        )  # fmt: skip
    assert tied != any("head.decoder.weight" in rule.tensors for rule in table)


def test_a_default_stands_in_for_a_missing_tensor():
    constant = np.arange(6, dtype=np.float32).reshape(2, 3)
    rules = [Rule("buffers/x", "x", aliases=("old_x",), default=lambda: constant)]
    abstract = {"buffers/x": constant}
    np.testing.assert_array_equal(read(rules, {}, abstract)["buffers/x"], constant)
    for name in ("x", "old_x"):
        there = read(rules, {name: constant + 1}, abstract)["buffers/x"]
        np.testing.assert_array_equal(there, constant + 1)
    with pytest.raises(ValueError, match="wrong shapes"):
        read(rules, {"x": constant.T}, abstract)
    (written,) = export_params(rules, {"buffers/x": constant})
    assert written.name == "x"
    with pytest.raises(ValueError, match="one tensor and param"):
        Rule(("params/a", "params/b"), "x", default=lambda: constant)
