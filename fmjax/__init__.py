"""fmjax: foundation models as pure functions in JAX.

>>> import fmjax  # doctest: +SKIP
>>> model, variables = fmjax.load("google-bert/bert-base-uncased")  # doctest: +SKIP
>>> output = model.apply(variables, input_ids=input_ids)  # doctest: +SKIP
"""

from fmjax.generate import GenerationConfig, generate, stream
from fmjax.hub import (
    create,
    load,
    load_generation_config,
    load_tokenizer,
    load_weights,
    save,
)

__version__ = "0.1.0"
__all__ = [
    "GenerationConfig",
    "__version__",
    "create",
    "generate",
    "load",
    "load_generation_config",
    "load_tokenizer",
    "load_weights",
    "save",
    "stream",
]
