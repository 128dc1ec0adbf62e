"""Networks with random weights, quickly: shapes by tracing, values by NumPy."""

import jax
import numpy as np


def random_variables(module, *args, seed=0, gain=1.0, **kwargs):
    """Variables of `module`, kernels with `gain` / sqrt(fan in), scales near 1, variances near 1, the rest small."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name, n = path[-1].key, rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "kernel":
            return gain * n / np.float32(np.prod(leaf.shape[:-1])) ** 0.5
        if name in ("scale", "var"):
            return 1 + 0.1 * np.abs(n)
        return 0.1 * n

    return jax.tree_util.tree_map_with_path(value, shapes)
