"""Pieces of the tables of rules that many families have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fmjax.weights.rules import Rule
from fmjax.weights.transforms import CONV1D, CONV2D, TRANSPOSE, Transform, compose, permute


def dense_rules(param: str, tensor: str, *, bias: bool = True) -> list[Rule]:
    """Kernel and bias of a PyTorch Linear; `param` is a path inside "params/"."""
    kernel = Rule(f"params/{param}/kernel", f"{tensor}.weight", TRANSPOSE)
    return [kernel, Rule(f"params/{param}/bias", f"{tensor}.bias")] if bias else [kernel]


def norm_rules(param: str, tensor: str, *, bias: bool = True) -> list[Rule]:
    """Scale and bias of a PyTorch LayerNorm; `param` is a path inside "params/"."""
    scale = Rule(f"params/{param}/scale", f"{tensor}.weight")
    return [scale, Rule(f"params/{param}/bias", f"{tensor}.bias")] if bias else [scale]


def conv1d_rules(param: str, tensor: str, *, bias: bool = True) -> list[Rule]:
    """Kernel and bias of a PyTorch Conv1d; `param` is a path inside "params/"."""
    kernel = Rule(f"params/{param}/kernel", f"{tensor}.weight", CONV1D)
    return [kernel, Rule(f"params/{param}/bias", f"{tensor}.bias")] if bias else [kernel]


def conv_rules(param: str, tensor: str, *, bias: bool = False) -> list[Rule]:
    """Kernel and bias of a PyTorch Conv2d; `param` is a path inside "params/"."""
    kernel = Rule(f"params/{param}/kernel", f"{tensor}.weight", CONV2D)
    return [kernel, Rule(f"params/{param}/bias", f"{tensor}.bias")] if bias else [kernel]


def conv_transpose_rules(param: str, tensor: str, *, bias: bool = False) -> list[Rule]:
    """Kernel and bias of a PyTorch ConvTranspose2d; `param` is a path inside "params/"."""
    kernel = Rule(f"params/{param}/kernel", f"{tensor}.weight", permute(2, 3, 0, 1))
    return [kernel, Rule(f"params/{param}/bias", f"{tensor}.bias")] if bias else [kernel]


def batch_norm_rules(param: str, tensor: str) -> list[Rule]:
    """A PyTorch BatchNorm; `param` is a path inside "params/" and "batch_stats/"."""
    return [
        *norm_rules(param, tensor),
        Rule(f"batch_stats/{param}/mean", f"{tensor}.running_mean"),
        Rule(f"batch_stats/{param}/variance", f"{tensor}.running_var"),
        Rule(
            f"batch_stats/{param}/count",
            f"{tensor}.num_batches_tracked",
            default=lambda: np.zeros((), np.int32),  # Flax's files have none
        ),
    ]


def also_named(table: Iterable[Rule], *modules: str) -> list[Rule]:
    """The rules of one module, which files of other libraries call `modules`."""

    def aliases(rule: Rule) -> tuple[str, ...]:
        leaf = rule.tensors[0].rpartition(".")[2]
        return tuple(f"{module}.{leaf}" for module in modules)

    return [replace(rule, aliases=aliases(rule)) for rule in table]


def conv_norm_rules(
    param: str, conv: str, norm: str, also: Sequence[tuple[str, str]] = ()
) -> list[Rule]:
    """A Conv2d "conv" without bias and its BatchNorm "norm"; `param` is a path inside "params/".

    Args:
        param: of both.
        conv, norm: PyTorch's names.
        also: names of the two in files of other libraries.
    """
    convs, norms = zip(*also, strict=True) if also else ((), ())
    return [
        *also_named(conv_rules(f"{param}/conv", conv), *convs),
        *also_named(batch_norm_rules(f"{param}/norm", norm), *norms),
    ]


def joined_rules(
    param: str, names: tuple[str, ...], tensor: str, transform: Transform, *, bias: bool = True
) -> list[Rule]:
    """Dense layers that PyTorch keeps as one, such as query, key and value.

    Args:
        param: path inside "params/" of what the layers are in.
        names: of the layers there.
        tensor: PyTorch's name of the one Linear.
        transform: from its weight [O, I] and bias [O] to theirs, [O_i, I] and [O_i].
        bias: whether it has a bias.
    """
    kernels = tuple(f"params/{param}/{name}/kernel" for name in names)
    biases = tuple(f"params/{param}/{name}/bias" for name in names)
    kernel = Rule(kernels, f"{tensor}.weight", compose(transform, TRANSPOSE))
    return [kernel, Rule(biases, f"{tensor}.bias", transform)] if bias else [kernel]


def recurrent_rules(
    param: str, tensor: str, *, layers: int, bidirectional: bool = False, bias: bool = True
) -> list[Rule]:
    """A PyTorch LSTM, GRU or RNN as `fmjax.nn.recurrent.Recurrent`.

    Args:
        param: path inside "params/".
        tensor: PyTorch's name of the module.
        layers: how many.
        bidirectional: whether it has both directions.
        bias: whether it has biases.
    """
    table = []
    for layer in range(layers):
        for direction, suffix in (("forward", ""), ("backward", "_reverse"))[: 1 + bidirectional]:
            for part, name in (("input", "ih"), ("hidden", "hh")):
                here = f"params/{param}/blocks_{layer}/{direction}_{part}"
                end = f"{name}_l{layer}{suffix}"
                table.append(Rule(f"{here}/kernel", f"{tensor}.weight_{end}", TRANSPOSE))
                if bias:
                    table.append(Rule(f"{here}/bias", f"{tensor}.bias_{end}"))
    return table


def decoder_head_rules(
    head: str, *, tied: bool, lm_bias: bool = False, token_classifier: str = "classifier"
) -> list[Rule]:
    """The heads of `fmjax.nn.decoder.Decoder`, under the names that PyTorch's families share.

    Args:
        head: which one; the bare model has none.
        tied: whether the word embedding is the output matrix, which then has no rule here.
        lm_bias: whether the vocabulary head has a bias.
        token_classifier: PyTorch's name of the token classifier.
    """
    match head:
        case "causal_lm":
            table = [] if tied else [Rule("params/head/kernel", "lm_head.weight", TRANSPOSE)]
            return [*table, Rule("params/head/bias", "lm_head.bias")] if lm_bias else table
        case "sequence_classification":
            return dense_rules("head", "score", bias=False)
        case "token_classification":
            return dense_rules("head", token_classifier)
        case "question_answering":
            return dense_rules("head", "qa_outputs")
    return []


def vocabulary_rules(
    *, tied: bool, dense: str, norm: str, decoder: str, bias: str, param: str = "head/predictions"
) -> list[Rule]:
    """A masked language model's head (`fmjax.nn.heads.VocabularyHead`) in PyTorch's names.

    Args:
        tied: whether the word embedding is the output matrix.
        dense: the Linear of the transform.
        norm: its LayerNorm.
        decoder: the Linear onto the vocabulary.
        bias: where the bias lies when tied. PyTorch has it a second time in `decoder`, which is
            the one in use when not tied.
        param: the head's path inside "params/".
    """
    table = dense_rules(f"{param}/transform", dense) + norm_rules(f"{param}/norm", norm)
    own = f"{decoder}.bias"
    if tied:
        aliases = () if bias == own else (own,)
        return [*table, Rule(f"params/{param}/bias", bias, aliases=aliases)]
    copies = () if bias == own else (bias,)
    return [
        *table,
        Rule(f"params/{param}/kernel", f"{decoder}.weight", TRANSPOSE),
        Rule(f"params/{param}/bias", own, copies=copies),
    ]


def renamed(table: Iterable[Rule], names: Mapping[str, str]) -> list[Rule]:
    """The table with pieces of its tensors' names replaced: a family whose modules differ in name.

    Args:
        table: rules.
        names: whole modules, as in {"attention.self.query": "attention.q_lin"}, each replaced
            where it first stands in a name, one after the other: longer ones come first.
    """
    patterns = [
        (re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])"), new) for old, new in names.items()
    ]

    def name(old: str) -> str:
        for pattern, new in patterns:
            old = pattern.sub(new, old, count=1)
        return old

    return [
        replace(
            rule,
            tensor=tuple(map(name, rule.tensors)),
            aliases=tuple(map(name, rule.aliases)),
            copies=tuple(map(name, rule.copies)),
        )
        for rule in table
    ]


def nested_rules(table: Iterable[Rule], place: str, tensors: str | None = None) -> list[Rule]:
    """The table of a model that is a part of another.

    Args:
        table: rules of the part.
        place: its name, "encoder": "params/embed/..." becomes "params/encoder/embed/..." and the
            tensor "embed..." becomes "encoder.embed...".
        tensors: its name in the tensors; None is `place`.
    """
    prefix = place if tensors is None else tensors

    def path(param: str) -> str:
        collection, _, rest = param.partition("/")
        return f"{collection}/{place}/{rest}"

    def name(tensor: str) -> str:
        return f"{prefix}.{tensor}"

    return [
        replace(
            rule,
            param=tuple(map(path, rule.params)),
            tensor=tuple(map(name, rule.tensors)),
            aliases=tuple(map(name, rule.aliases)),
            copies=tuple(map(name, rule.copies)),
        )
        for rule in table
    ]
