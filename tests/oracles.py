"""Independent implementations in PyTorch to compare with, live; the extra `test` and the Makefile install them."""

import importlib

import pytest

_operators = []  # they live as long as this list


def torch():
    """Import PyTorch, or skip the calling test file; a torchvision of another build does then not fail to import."""
    module = pytest.importorskip("torch", reason="the oracles need PyTorch")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:  # PyPI's expects its operators of every torch, which nothing here calls
        for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a) -> Tensor"):
            library = module.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _operators.append(library)
    return module
