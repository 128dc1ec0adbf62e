"""The jitted training and evaluation steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gim_jax.train import sharding
from gim_jax.train.state import TrainState, shardings_of

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]


def make_train_step(
    objective: Objective,
    module: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    ema_decay: float,
    mesh: Mesh,
    abstract: TrainState,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile one optimisation step: `(state, batch) -> (state, metrics)`. The state passed in is consumed.

    The random numbers of a step depend on `seed` and the step alone. Metrics are float32 scalars: those of the
    objective, `loss`, `lr`, and the global norms `grad_norm` (before clipping), `update_norm`, `param_norm`.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params):
            variables = state.replace(params=params).variables()
            loss, metrics, batch_stats = objective(module, variables, batch, rng, train=True)
            return loss, (metrics, batch_stats)

        (loss, (metrics, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        metrics = {
            **metrics,
            "loss": loss,
            "lr": schedule(state.step),
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
            "param_norm": optax.global_norm(params),
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, batch_stats or {}, opt_state, ema), metrics

    state_shardings = shardings_of(abstract)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def make_eval_step(
    objective: Objective, module: nn.Module, seed: int, mesh: Mesh, abstract: TrainState
) -> Callable[[TrainState, dict[str, jax.Array], int], dict[str, jax.Array]]:
    """Compile the objective without training: `(state, batch, index) -> metrics`, with averaged parameters if any."""

    def eval_step(state: TrainState, batch: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
        rng = jax.random.fold_in(jax.random.key(seed), index)
        loss, metrics, _ = objective(module, state.variables(averaged=True), batch, rng, train=False)
        return {name: jnp.asarray(value, jnp.float32) for name, value in (metrics | {"loss": loss}).items()}

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        eval_step,
        in_shardings=(shardings_of(abstract), NamedSharding(mesh, sharding.BATCH), replicated),
        out_shardings=replicated,
    )
