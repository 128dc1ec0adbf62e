"""Compare this project with the official implementations: a folder of golden cases (see its README).

To add a family: write `tests/parity/<module>.py` with `run(case) -> dict[name, array] | None` and name it in
ADAPTERS. Values that `run` returns are compared with `case.outputs[name]`; it may also call
`case.check(name, value)` itself, and `case.given(name)` for an output that it takes as an input (random draws
of the official code). Every output of a case has to be compared or given.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np

from tests.conftest import SHARED

FOLDER = Path(os.environ.get("GIM_JAX_GOLDEN", SHARED / "golden"))

# (pattern searched in "<meta model> | <meta origin>", module in this package); the first that is found counts
ADAPTERS = (
    (r"^(gim_)?loftr ", "loftr"),
    (r"^superpoint ", "superpoint"),
    (r"^(superpoint\+)?superglue ", "superglue"),
    (r"^(superpoint\+)?lightglue ", "lightglue"),
    (r"^(gim_)?dkm |^None .*DepthRegressionLoss", "dkm"),
    (r"^None .*metrics\.py", "metrics"),
)


def golden(name: str) -> ModuleType:
    """Load `golden_io` or `weights_rule` from the folder of golden cases."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """One golden case: `.inputs`, `.outputs`, `.meta`, and a record of what was compared."""

    def __init__(self, path: Path):
        self._case = golden("golden_io").load(str(path))
        self.name = path.stem
        self.inputs: dict[str, np.ndarray] = self._case.inputs
        self.outputs: dict[str, np.ndarray] = self._case.outputs
        self.meta: dict = self._case.meta
        self.seen: set[str] = set()
        self.failures: list[str] = []

    def check(self, name: str, value) -> None:
        """Compare with the golden output `name` within the folder's tolerance; failures are gathered."""
        ok, text = self._case.report(name, np.asarray(value))
        self.seen.add(name)
        print(f"{self.name}: {text}{'' if ok else '  <-- FAILS'}")
        if not ok:
            self.failures.append(text)

    def given(self, *names: str) -> dict[str, np.ndarray]:
        """Take outputs as inputs: choices that the official code drew at random."""
        self.seen.update(names)
        return {name: self.outputs[name] for name in names}

    def state_dict(self, model: str | None = None, extra: tuple = ()) -> dict[str, np.ndarray]:
        """Regenerate the weights of `model` (default: the case's); `extra` lists more (key, shape, dtype)."""
        model = model or self.meta["model"]
        with open(FOLDER / "keys" / f"{model}.json") as file:
            entries = json.load(file)["entries"]
        salt = self.meta.get("weights_salt", self.meta["salt"])
        return golden("weights_rule").state_dict(model, [*entries, *extra], salt)


def cases() -> list[Path]:
    return sorted(FOLDER.glob("*.npz"))


def adapter(case: Case) -> ModuleType:
    """Find the adapter of a case from its meta; an unknown one is an error."""
    text = f"{case.meta.get('model')} | {' '.join(case.meta.get('origin', []))}"
    for pattern, module in ADAPTERS:
        if re.search(pattern, text):
            return importlib.import_module(f"tests.parity.{module}")
    raise LookupError(f"no adapter in tests/parity for the case {case.name}: {text}")
