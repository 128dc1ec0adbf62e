"""Every golden case of the folder, within its tolerances. `pytest -rP tests/test_parity.py` prints the
table."""

import jax
import pytest

from tests import parity


@pytest.mark.parametrize("path", parity.cases() or [None], ids=lambda p: p.stem if p else "no-golden-folder")
def test_equals_official(path):
    if path is None:
        pytest.skip(f"no golden cases at {parity.FOLDER} (set GIM_JAX_GOLDEN)")
    case = parity.Case(path)
    try:
        module = parity.adapter(case)
    except LookupError as error:
        pytest.fail(str(error))
    with jax.default_matmul_precision("highest"):
        for name, value in (module.run(case) or {}).items():
            case.check(name, value)
    assert not case.failures, "\n".join([f"{len(case.failures)} of {len(case.seen)} differ:", *case.failures])
    left = sorted(set(case.outputs) - case.seen)
    assert not left, f"not compared: {', '.join(left)}"
