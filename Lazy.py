"""Modules that are loaded at their first use, so that --help and a mistake in a flag do not wait for them."""

import importlib


class LazyModule:
    """Stands for a module: the first use of one of its names imports it."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)
