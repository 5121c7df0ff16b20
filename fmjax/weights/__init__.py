"""Checkpoints: every format read without its framework, one table of rules in both directions."""

from fmjax.weights.checkpoint import Checkpoint, open_checkpoint, parse_size, write_checkpoint
from fmjax.weights.flax_file import to_torch_names
from fmjax.weights.keras_tables import (
    keras_batch_norm_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)
from fmjax.weights.names import fit_prefix, modern_names
from fmjax.weights.rules import (
    Rule,
    export_params,
    import_params,
    literal_rules,
    rule_tensor_names,
)
from fmjax.weights.safetensors_file import write_safetensors
from fmjax.weights.tables import (
    also_named,
    batch_norm_rules,
    conv_norm_rules,
    conv_rules,
    decoder_head_rules,
    dense_rules,
    joined_rules,
    nested_rules,
    norm_rules,
    renamed,
    vocabulary_rules,
)
from fmjax.weights.tensor import Sliceable, Stack, Tensor
from fmjax.weights.transforms import (
    CONV1D,
    CONV2D,
    IDENTITY,
    PLUS_ONE,
    TRANSPOSE,
    Transform,
    channels_first,
    compose,
    fused,
    fused_per_head,
    inverted,
    permute,
    stacked,
)

__all__ = [
    "CONV1D",
    "CONV2D",
    "IDENTITY",
    "PLUS_ONE",
    "TRANSPOSE",
    "Checkpoint",
    "Rule",
    "Sliceable",
    "Stack",
    "Tensor",
    "Transform",
    "also_named",
    "batch_norm_rules",
    "channels_first",
    "compose",
    "conv_norm_rules",
    "conv_rules",
    "decoder_head_rules",
    "dense_rules",
    "export_params",
    "fit_prefix",
    "fused",
    "fused_per_head",
    "import_params",
    "inverted",
    "joined_rules",
    "keras_batch_norm_rules",
    "keras_conv_norm_rules",
    "keras_dense_rules",
    "literal_rules",
    "modern_names",
    "nested_rules",
    "norm_rules",
    "open_checkpoint",
    "parse_size",
    "permute",
    "renamed",
    "rule_tensor_names",
    "stacked",
    "to_torch_names",
    "vocabulary_rules",
    "write_checkpoint",
    "write_safetensors",
]
