"""Independent implementations in PyTorch to compare with, live; the extra `test` and the Makefile install them."""

import pytest

_operators = []  # they live as long as this list


def torch():
    """Import PyTorch, or skip the calling test file; a torchvision of another build does then not fail to import."""
    module = pytest.importorskip("torch", reason="the oracles need PyTorch")
    for schema in () if _operators else ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a) -> Tensor"):
        try:  # PyPI's torchvision expects its operators of every torch, which nothing here calls
            library = module.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _operators.append(library)
        except RuntimeError:
            pass  # a matching build, which has defined them
    return module
