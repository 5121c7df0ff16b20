"""A family's table of rules, read in both directions: tensors to parameters and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from fmjax.weights.compare import Mismatch
from fmjax.weights.tensor import Shape, Sliceable, Stack, Tensor, copied
from fmjax.weights.transforms import IDENTITY, Transform

T = TypeVar("T")

PLACEHOLDER = re.compile(r"\{(\w+)\}")


class ShapeDtype(Protocol):
    """Anything with a shape and a dtype: an array, a jax.ShapeDtypeStruct."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> np.dtype: ...


@dataclass(frozen=True)
class Rule:
    """Which tensors some parameters come from, and how; every name is literal but for {i}.

    {i} stands for the layer (any word in braces for any number). One that only the tensor has, as
    in "experts.{e}.w1.weight", counts along the parameter's leading axis: see `stacked`.

    Attributes:
        param: path or paths, "params/layers_{i}/attn/query/kernel".
        tensor: PyTorch's name or names.
        transform: from the tensors to the parameters.
        aliases: other names of the one tensor. The first that is there is read; any further one
            is taken for a tied copy.
        copies: like aliases, but also written on export, for loaders that expect them.
        default: makes the parameter where the checkpoint has none of the names: a constant that
            some formats leave out.
    """

    param: str | tuple[str, ...]
    tensor: str | tuple[str, ...]
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    default: Callable[[], np.ndarray] | None = None

    def __post_init__(self) -> None:
        bound = {frozenset(PLACEHOLDER.findall(path)) for path in self.params}
        open_ones = set(PLACEHOLDER.findall("".join(self.tensors))) - set().union(*bound)
        if len(bound) != 1:
            raise ValueError(f"the parameters {self.param} of a rule must have the same braces")
        if (self.aliases or self.copies) and (len(self.tensors) != 1 or open_ones):
            raise ValueError(f"a rule for several tensors {self.tensor} has no aliases or copies")
        if self.default is not None and (len(self.params), len(self.tensors)) != (1, 1):
            raise ValueError(f"a rule with a default has one tensor and param, not {self.params}")
        if open_ones and (len(open_ones), len(self.params), len(self.tensors)) != (1, 1, 1):
            raise ValueError(f"{self.tensor} leaves {sorted(open_ones)} open: one tensor and param")

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters' paths, with braces."""
        return (self.param,) if isinstance(self.param, str) else self.param

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors' names, with braces."""
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    def tensor_names(self) -> tuple[str, ...]:
        """Every name the rule knows, with braces: tensors, aliases, copies."""
        return (*self.tensors, *self.aliases, *self.copies)


@dataclass(frozen=True)
class _Site:
    """A rule with its braces filled in: one layer's parameters and tensors."""

    rule: Rule
    params: tuple[str, ...]
    tensors: tuple[str, ...]
    aliases: tuple[str, ...]
    copies: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.tensors, *self.aliases, *self.copies)


@dataclass
class _Binding:
    """What the rules say about a tree."""

    sites: list[_Site] = field(default_factory=list)
    without_rule: list[str] = field(default_factory=list)
    without_param: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def import_params(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    abstract: Mapping[str, ShapeDtype],
    *,
    place: Callable[[str, Any], T],
    new: Sequence[str] = (),
    ignored: Sequence[str] = (),
    known: Collection[str] = (),
    views: bool = False,
    threads: int = 1,
) -> dict[str, T]:
    """Reads a model's parameters from a checkpoint, the largest first.

    All names, shapes and kinds of number are checked before anything is read. Peak memory is that
    of what `place` keeps, plus one tensor a thread.

    Args:
        rules: the family's table.
        tensors: of the checkpoint, by name.
        abstract: the model's variables by path ("params/embed/word/embedding"), any values with
            shape and dtype.
        place: given a path and an array, which is C-contiguous, in the checkpoint's dtype, and
            nobody else's: what it returns is the result's leaf.
        new: regular expressions matched at the start of paths without their collection, as in
            ("head/",). Parameters they match are not read and not in the result.
        ignored: regular expressions searched for in the names of tensors that no rule reads.
        known: names of tensors that may be left unread, such as those of the family's other heads.
        views: `place` is given not an array of its own but a `Sliceable`: views of the files
            wherever layouts allow, so that what is read is what it copies, while they are open.
        threads: how many call `place`, each for tensors of its own.

    Returns:
        {path: what `place` returned} for every parameter that is not new.

    Raises:
        ValueError: anything that does not fit; the error lists all of it and says what to do.
    """
    mismatch = Mismatch()
    fresh = _matching(new, abstract, mismatch)
    binding = _bind(rules, {path: tuple(leaf.shape) for path, leaf in abstract.items()})
    mismatch.without_rule += [path for path in binding.without_rule if path not in fresh]
    mismatch.without_param += binding.without_param
    mismatch.twice += binding.twice
    accepted = set(known)
    plan: list[tuple[_Site, list[Tensor]]] = []
    for site in binding.sites:
        accepted.update(site.names)
        if not fresh.issuperset(site.params):
            sources = _sources(site, tensors, mismatch)
            if not sources and site.rule.default is not None:
                plan.append((site, []))
            elif sources and _fits(site, sources, abstract, fresh, mismatch):
                plan.append((site, sources))
    unread = [
        name
        for name in tensors
        if name not in accepted and not any(re.search(pattern, name) for pattern in ignored)
    ]
    mismatch.unread += unread
    if mismatch.unwritten or mismatch.unread:
        _compare_layers(rules, binding.sites, tensors, mismatch)
    mismatch.raise_if_any()
    result: dict[str, T] = {}
    # Largest first, while little else is held: a tensor is briefly there twice.
    plan.sort(key=lambda item: -sum(source.nbytes for source in item[1]))

    def read(item: tuple[_Site, list[Tensor]]) -> dict[str, T]:
        site, sources = item
        arrays = _loaded(site.rule, sources)
        read = {
            path: place(path, array if views else _own(array))
            for path, array in zip(site.params, arrays, strict=True)
            if path not in fresh
        }
        for source in sources:
            source.release()
        return read

    with ThreadPoolExecutor(threads) as pool:
        for read_together in pool.map(read, plan):
            result |= read_together
    return {path: result[path] for path in abstract if path in result}


def _loaded(rule: Rule, sources: Sequence[Tensor]) -> list[Any]:
    """The parameters that tensors are, as views where possible."""
    if not sources and rule.default is not None:
        return [rule.default()]
    arrays = [source.read() for source in sources]
    if rule.transform.each is not None:
        return [Stack([rule.transform.each.load([array])[0] for array in arrays])]
    return rule.transform.load(arrays)


def _own(array: Sliceable) -> np.ndarray:
    """A C-contiguous array that shares no memory with a file.

    Views of a mapped file are read-only, and a transform's own results are not.
    """
    if isinstance(array, Stack) or not array.flags.writeable:
        return copied(array)
    return np.ascontiguousarray(array).reshape(array.shape)


def _matching(
    new: Sequence[str], abstract: Mapping[str, ShapeDtype], mismatch: Mismatch
) -> set[str]:
    """The paths that `new` names."""
    inner = {path: path.partition("/")[2] for path in abstract}
    fresh: set[str] = set()
    for pattern in new:
        try:
            found = {path for path, name in inner.items() if re.match(pattern, name)}
        except re.error as error:
            raise ValueError(f"new={pattern!r} is no regular expression: {error}") from error
        if not found:
            groups = sorted({name.partition("/")[0] for name in inner.values()})
            mismatch.useless_new.append(f"{pattern!r}; the model has {', '.join(groups)}")
        fresh |= found
    return fresh


def _sources(site: _Site, tensors: Mapping[str, Tensor], mismatch: Mismatch) -> list[Tensor]:
    """The tensors a site reads; [] if one is missing, which a rule with a default may."""
    others = (*site.aliases, *site.copies)
    found: list[Tensor] = []
    missing: list[str] = []
    for name in site.tensors:
        there = [candidate for candidate in (name, *others) if candidate in tensors]
        if there:
            found.append(tensors[there[0]])
        else:
            missing.append(name)
    if not missing or site.rule.default is not None:
        return found
    for path in site.params:
        mismatch.unwritten.append((path, missing, others))
    return []


def _fits(
    site: _Site,
    sources: Sequence[Tensor],
    abstract: Mapping[str, ShapeDtype],
    fresh: set[str],
    mismatch: Mismatch,
) -> bool:
    """Whether shapes and kinds of number agree."""
    given = ", ".join(f"{source.name} {source.shape}" for source in sources[:4])
    given += f" and {len(sources) - 4} more" if sources[4:] else ""
    try:
        shapes = site.rule.transform.load_shapes([source.shape for source in sources])
    except ValueError as error:
        mismatch.shapes.append(f"{', '.join(site.params)}: the checkpoint's {given}: {error}")
        return False
    if len(shapes) != len(site.params):
        raise ValueError(
            f"the rule for {site.rule.param} has {len(site.params)} parameters, but its transform "
            f"{site.rule.transform.name} gives {len(shapes)}"
        )
    fits = True
    for path, shape in zip(site.params, shapes, strict=True):
        wanted = tuple(abstract[path].shape)
        if path in fresh:
            continue
        if shape != wanted:
            fits = False
            as_read = "" if site.rule.transform is IDENTITY else f", as a parameter {shape}"
            mismatch.shapes.append(
                f"{path}: the model's {wanted}, the checkpoint's {given}{as_read}"
            )
        for source in sources:
            if _kind(source.dtype) != _kind(abstract[path].dtype):
                fits = False
                mismatch.kinds.append(
                    f"{path}: the model's {np.dtype(abstract[path].dtype)}, the checkpoint's "
                    f"{source.name} {source.dtype}"
                )
    return fits


def _kind(dtype: np.dtype) -> str:
    """Integers read as floats would be quantized weights without their scales."""
    kind = np.dtype(dtype).kind  # ml_dtypes' floats have kind "V" or "f"
    if kind in "iub":
        return "integer"
    return "complex" if kind == "c" else "float"


def export_params(rules: Sequence[Rule], leaves: Mapping[str, ShapeDtype]) -> list[Tensor]:
    """The tensors that a model's parameters are, the inverse of `import_params`.

    Args:
        rules: the family's table.
        leaves: by path, anything that `numpy.asarray` takes and that has shape and dtype.

    Returns:
        Tensors whose `read` fetches only what it needs: hand them to `write_checkpoint`.

    Raises:
        ValueError: leaves without a rule, rules without a leaf, or shapes that a rule cannot undo.
    """
    mismatch = Mismatch()
    binding = _bind(rules, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    mismatch.without_rule += binding.without_rule
    mismatch.without_param += binding.without_param
    mismatch.twice += binding.twice
    result: dict[str, Tensor] = {}
    for site in binding.sites:
        given = [leaves[path] for path in site.params]
        dtypes = {np.dtype(leaf.dtype) for leaf in given}
        if len(dtypes) != 1:
            mismatch.kinds.append(f"{', '.join(site.params)} are one tensor, of dtypes {dtypes}")
            continue
        try:
            shapes = site.rule.transform.save_shapes([tuple(leaf.shape) for leaf in given])
        except ValueError as error:
            mismatch.shapes.append(f"{', '.join(site.params)}: {error}")
            continue
        dtype = dtypes.pop()
        for index, (name, shape) in enumerate(zip(site.tensors, shapes, strict=True)):
            read = partial(_saved, site.rule.transform, given, index)
            for written in (name, *site.copies):
                if written in result:
                    mismatch.twice.append(f"the tensor {written}")
                result[written] = Tensor(written, shape, dtype, read)
    mismatch.raise_if_any()
    return list(result.values())


def _saved(transform: Transform, leaves: Sequence[ShapeDtype], index: int) -> np.ndarray:
    array = transform.save([np.asarray(leaf) for leaf in leaves])[index].view()
    array.flags.writeable = False  # it may be the model's own memory
    return array


def rule_tensor_names(rules: Sequence[Rule], abstract: Mapping[str, ShapeDtype]) -> set[str]:
    """Every tensor name that the rules know for this tree: tensors, aliases and copies."""
    sites = _bind(rules, {path: tuple(leaf.shape) for path, leaf in abstract.items()}).sites
    return {name for site in sites for name in site.names}


def literal_rules(rules: Sequence[Rule], abstract: Mapping[str, ShapeDtype]) -> list[Rule]:
    """The rules that apply to a tree, each layer's for itself: names without braces."""
    sites = _bind(rules, {path: tuple(leaf.shape) for path, leaf in abstract.items()}).sites
    return [
        replace(
            site.rule,
            param=site.params,
            tensor=site.tensors,
            aliases=site.aliases,
            copies=site.copies,
        )
        for site in sites
    ]


def _bind(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> _Binding:
    """The rules' braces filled in from the paths that a tree has."""
    binding = _Binding()
    covered: set[str] = set()
    for rule in rules:
        patterns = [_pattern(template) for template in rule.params]
        found = [match for path in shapes for pattern in patterns if (match := pattern.match(path))]
        if not found:
            binding.without_param.append(", ".join(rule.params))
        bindings = {tuple(sorted(match.groupdict().items())): None for match in found}
        for items in bindings:
            values = dict(items)
            params = tuple(_fill(template, values) for template in rule.params)
            if missing := [path for path in params if path not in shapes]:
                binding.without_param += missing
                continue
            binding.twice += [path for path in params if path in covered]
            covered.update(params)
            binding.sites.append(
                _Site(
                    rule,
                    params,
                    _expand(rule, values, shapes[params[0]]),
                    tuple(_fill(template, values) for template in rule.aliases),
                    tuple(_fill(template, values) for template in rule.copies),
                )
            )
    binding.without_rule = [path for path in shapes if path not in covered]
    return binding


def _expand(rule: Rule, values: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
    """A site's tensor names; braces that the parameter lacks count its leading axis."""
    names = [_fill(template, values) for template in rule.tensors]
    if not (left := PLACEHOLDER.search(names[0])):
        return tuple(names)
    count = shape[0] if shape else 0
    return tuple(_fill(names[0], {left[1]: str(index)}) for index in range(count))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression; each name in braces is one number throughout."""
    seen: set[str] = set()
    parts: list[str] = []
    for index, part in enumerate(PLACEHOLDER.split(template)):
        if index % 2 == 0:
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            seen.add(part)
            parts.append(rf"(?P<{part}>0|[1-9]\d*)")
    return re.compile("".join(parts) + r"\Z", re.ASCII)


def _compare_layers(
    rules: Sequence[Rule], sites: Iterable[_Site], tensors: Mapping[str, Tensor], mismatch: Mismatch
) -> None:
    """Says it in one line where the checkpoint has more or fewer layers than the model."""
    model: dict[str, set[int]] = {}
    file: dict[str, set[int]] = {}
    for site in sites:
        for template, name in zip(site.rule.tensors, site.tensors, strict=False):
            if (match := _pattern(template).match(name)) and "{" in template:
                stem, _, rest = template.partition("{")
                model.setdefault(stem, set()).add(int(match[rest.partition("}")[0]]))
    for rule in rules:
        for template in rule.tensors:
            stem, _, rest = template.partition("{")
            if stem in model:
                pattern = _pattern(template)
                found = {
                    int(match[rest.partition("}")[0]])
                    for name in tensors
                    if name.startswith(stem) and (match := pattern.match(name))
                }
                file.setdefault(stem, set()).update(found)
    for stem, indices in model.items():
        if (there := file.get(stem, set())) != indices:
            mismatch.layers.append(
                f"{stem}{{i}}: the model has {len(indices)}, the checkpoint {len(there)}"
            )
