"""Modules that are loaded at their first use, so that --help and a mistake in a flag do not wait for them."""

import importlib.util
import sys


def lazy_import(name):
    """Return the module `name`, which is loaded when one of its attributes is first used."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}: pip install -r requirements.txt", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
