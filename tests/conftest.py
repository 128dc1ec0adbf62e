"""Shared fixtures. Eight fake CPU devices, so that sharded code is tested on any machine."""

# ruff: noqa: E402

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
CACHE = tempfile.mkdtemp(prefix="gim-jax-tests-")  # compiled programs of this run alone
os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain reads absl flags
REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GIM_JAX_SHARED", REPO.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, videos and golden files; tests that need it skip where it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of real data at {SHARED} (set GIM_JAX_SHARED)")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Free the programs of a file's tests: kept, those of all files take many gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def quick_compile():
    """Compile with little optimisation: twice as fast, for programs that hardly run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
