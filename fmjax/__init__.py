"""fmjax: foundation models as pure functions in JAX.

>>> import fmjax  # doctest: +SKIP
>>> model, variables = fmjax.load("google-bert/bert-base-uncased")  # doctest: +SKIP
>>> output = model.apply(variables, input_ids=input_ids)  # doctest: +SKIP
"""

from fmjax.hub import create, load, load_tokenizer, save

__version__ = "0.1.0"
__all__ = ["__version__", "create", "load", "load_tokenizer", "save"]
