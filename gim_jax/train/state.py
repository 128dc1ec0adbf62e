"""The training state and the optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import Mesh

from gim_jax.train import sharding

INIT_SIZE = 64  # px of the images that shape the parameters, which do not depend on it


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, steps taken.
      params, batch_stats: the network's variables.
      opt_state: of the optax transformation.
      ema: exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    def variables(self, averaged: bool = False) -> dict[str, Any]:
        """Return the network's variables, with the averaged parameters where there are some and they are asked for."""
        params = self.ema if averaged and self.ema is not None else self.params
        return {"params": params, "batch_stats": self.batch_stats} if self.batch_stats else {"params": params}


def make_schedule(optim: Any, num_steps: int, batch_size: int) -> optax.Schedule:
    """Make the learning rate: linear warm-up from `warmup_ratio * lr`, then decay to `min_lr` at `num_steps`.

    Step s < warm-up: lr (r + (1 - r) s / warm-up), then linear in s, as in gim's trainer, half a cosine, or times
    `decay_rate` at every step of `decay_at`. With `lr_scaling` all of it is times (batch_size / canonical_batch) or its
    square root; with the former, LoFTR's rule, the warm-up is as many times shorter.
    """
    if not optim.lr > 0:
        raise ValueError(f"optim.lr: found {optim.lr}, expected above 0")
    if optim.canonical_batch < 1:
        raise ValueError(f"optim.canonical_batch: found {optim.canonical_batch}, expected 1 or more")
    scalings = {"none": 1.0, "linear": batch_size / optim.canonical_batch}
    scalings["sqrt"] = scalings["linear"] ** 0.5
    if optim.lr_scaling not in scalings:
        raise ValueError(f"optim.lr_scaling: found {optim.lr_scaling!r}, expected one of {', '.join(scalings)}")
    lr, min_lr = (value * scalings[optim.lr_scaling] for value in (optim.lr, optim.min_lr))
    warmup = int(optim.warmup_steps / (scalings["linear"] if optim.lr_scaling == "linear" else 1))
    if not 0 <= warmup < num_steps:
        raise ValueError(f"optim.warmup_steps: found {warmup}, expected 0 to {num_steps - 1} (num_steps - 1)")
    at = {max(step - warmup, 0): optim.decay_rate for step in optim.decay_at}
    decays = {
        "linear": optax.linear_schedule(lr, min_lr, num_steps - warmup),
        "cosine": optax.cosine_decay_schedule(lr, num_steps - warmup, min_lr / lr),
        "constant": optax.constant_schedule(lr),
        "steps": optax.piecewise_constant_schedule(lr, at),
    }
    if optim.decay not in decays:
        raise ValueError(f"optim.decay: found {optim.decay!r}, expected one of {', '.join(decays)}")
    rise = optax.linear_schedule(optim.warmup_ratio * lr, lr, max(warmup, 1))
    return optax.join_schedules([rise, decays[optim.decay]], [warmup])


def make_optimizer(optim: Any, num_steps: int, batch_size: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Make the optimiser and its learning rate.

    Args:
      optim: `config.optim` with what `make_schedule` reads, weight_decay (decoupled, on all
        parameters, as torch's AdamW has it), b1, b2, clip_norm (of the global gradient, 0 = off), lr_multipliers
        (pairs of a regular expression for parameter paths such as "^backbone/" and a factor; the first that
        matches counts) and ema_decay (0 = off).
      num_steps: length of the schedule. batch_size: global.
    """
    schedule = make_schedule(optim, num_steps, batch_size)
    parts = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    parts.append(optax.adamw(schedule, b1=optim.b1, b2=optim.b2, eps=1e-8, weight_decay=optim.weight_decay))
    if optim.lr_multipliers:
        parts.append(_scale_by_path(tuple(optim.lr_multipliers)))
    return optax.chain(*parts), schedule


def _scale_by_path(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Scale each parameter's update, which is the same as scaling its learning rate."""

    def factors(params):
        paths = traverse_util.flatten_dict(params, sep="/")
        unused = [p for p, _ in multipliers if not any(re.search(p, path) for path in paths)]
        if unused:
            raise ValueError(f"optim.lr_multipliers: {unused[0]!r} matches no parameter, such as {next(iter(paths))}")
        scale = {path: next((f for p, f in multipliers if re.search(p, path)), 1.0) for path in paths}
        return traverse_util.unflatten_dict(scale, sep="/")

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, f: u * f, updates, factors(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_init(module: nn.Module, channels: int, tx: optax.GradientTransformation, ema: bool) -> Callable:
    """Return the function `key -> TrainState` of a fresh network."""

    def init(key: jax.Array) -> TrainState:
        image = jnp.zeros((1, INIT_SIZE, INIT_SIZE, channels))
        variables = module.init(key, image, image)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    return init


def abstract_state(init: Callable, mesh: Mesh, min_size: int) -> TrainState:
    """Describe the state that `init` makes: shapes, types, and where each array lies on the mesh."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(mesh, shapes, min_size)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def shardings_of(state: TrainState) -> TrainState:
    """Return the tree of shardings of a state or of its description."""
    return jax.tree.map(lambda a: a.sharding, state)
