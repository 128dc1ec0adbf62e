"""PyTorch state dicts -> Flax variables, by one mechanical rule.

The modules of `gim_jax.models` carry the official attribute names, so a Flax path is a torch key in other
letters: `params/a/layers_0/mlp_3/kernel` is `a.layers.0.mlp.3.weight`. What differs from file to file
(prefixes, old names, entries nobody needs) is a list of regular-expression rules, given by the named model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
IGNORED = "num_batches_tracked"  # a counter of BatchNorm that nothing reads

Rule = tuple[str, str | None]


def torch_key(path: tuple[str, ...]) -> str:
    """Name the torch entry of a Flax path (without its collection).

    `("a", "layers_0", "kernel")` is `a.layers.0.weight`: trailing `_N` groups of a module's name are list
    indices or dict keys in Flax, path components in torch.
    """
    *modules, leaf = path
    parts = [re.sub(r"(?:_\d+)+$", lambda m: m[0].replace("_", "."), name) for name in modules]
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


def flax_layout(value: np.ndarray, leaf: str, ndim: int) -> np.ndarray:
    """Transpose a torch array: `[O, I/g, H, W] -> [H, W, I/g, O]`, `[O, I] -> [I, O]`; a window of one may go."""
    if leaf != "kernel":
        return value
    if value.ndim > ndim == 2 and set(value.shape[2:]) == {1}:
        value = value.reshape(value.shape[:2])
    return value.transpose(*range(2, value.ndim), 1, 0) if value.ndim >= 2 else value


def rename(keys: Iterable[str], rules: Iterable[Rule]) -> dict[str, str]:
    """Apply `(pattern, replacement)` rules in order, `re.sub` each; a replacement of None drops the entry.

    Returns:
      {new key: key}; two keys that become one are a ValueError.
    """
    rules = tuple(rules)
    renamed: dict[str, str] = {}
    for key in keys:
        new: str | None = key
        for pattern, replacement in rules:
            if replacement is None:
                new = None if re.search(pattern, new) else new
            else:
                new = re.sub(pattern, replacement, new)
            if new is None:
                break
        if new is None:
            continue
        if new in renamed:
            raise ValueError(f"state dict: {renamed[new]} and {key} both become {new}")
        renamed[new] = key
    return renamed


def from_torch(state_dict: Mapping[str, np.ndarray], template, rules: Iterable[Rule] = ()) -> dict:
    """Map a PyTorch state dict onto Flax variables.

    Args:
      state_dict: torch key -> array, torch layouts.
      template: variables (`params`, `batch_stats`) as nested dicts of arrays or `jax.ShapeDtypeStruct`, for
        example from `jax.eval_shape(module.init, ...)`.
      rules: `(pattern, replacement)` regular expressions that turn the file's keys into the module's, see
        `rename`.

    Returns:
      Nested dicts of NumPy arrays, shapes and dtypes of the template.

    Raises:
      ValueError: entries missing, extra or misshapen, all of them listed.
    """
    renamed = rename((k for k in state_dict if not k.endswith(IGNORED)), rules)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    values, missing, misshapen, used = [], [], [], set()
    for path, want in leaves:
        names = tuple(str(p.key) for p in path)
        key = torch_key(names[1:])  # without the collection
        used.add(key)
        if key not in renamed:
            missing.append(key)
            continue
        found = np.asarray(state_dict[renamed[key]])
        value = flax_layout(found, names[-1], len(want.shape))
        if value.shape != tuple(want.shape):
            misshapen.append(f"{key} {found.shape}, expected {_torch_shape(names[-1], want.shape)}")
        values.append(np.array(value, dtype=want.dtype, order="C"))
    extra = sorted(set(renamed) - used)
    problems = [("missing", missing), ("extra", extra), ("misshapen", misshapen)]
    if any(keys for _, keys in problems):
        found = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems if keys)
        raise ValueError(f"state dict does not fit this model: {found}")
    return jax.tree_util.tree_unflatten(treedef, values)


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Turn a template's shape into torch's order, for messages."""
    return tuple(shape) if leaf != "kernel" else (shape[-1], shape[-2], *shape[:-2])
