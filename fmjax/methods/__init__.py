"""Ways to train: one file each, and each a function on one arrow of loss -> gradient -> step.

A file's ``ATTACHES``, a tuple, says which:

- ``variables``: what trains, and what the model reads besides (a collection of its own);
- ``loss``: a LossFn, made of a model or of other LossFns;
- ``gradient``: LossFn or GradFn -> GradFn;
- ``update``: an Optax transformation, or part of a chain of them;
- ``program``: a loop around steps.

Methods on different arrows compose without knowing each other.
"""
