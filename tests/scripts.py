"""Scripts of experiments/ as modules, whose `main` takes the ordinary arguments."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
sys.path.append(str(FOLDER))  # as when a script is run


def experiment(name):
    """A script of experiments/ as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
