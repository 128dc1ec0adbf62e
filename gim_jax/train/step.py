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
from gim_jax.train.state import TrainState, abstract_state, make_init, make_optimizer, shardings_of

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]


def build_step(
    config: Any, module: nn.Module, objective: Objective, mesh: Mesh
) -> tuple[Callable[[jax.Array], TrainState], TrainState, Any]:
    """Make of a configuration what makes the state, `key -> state`, the state's description, and the jitted step."""
    optim = config.optim
    tx, schedule = make_optimizer(optim, config.num_steps, config.batch_size)
    init = make_init(module, config.data.channels, tx, optim.ema_decay > 0)
    abstract = abstract_state(init, mesh, config.mesh.fsdp_min_size)
    args = tx, schedule, config.seed, optim.ema_decay, mesh, abstract, optim.accumulate
    return init, abstract, make_train_step(objective, module, *args)


def make_train_step(
    objective: Objective,
    module: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    ema_decay: float,
    mesh: Mesh,
    abstract: TrainState,
    accumulate: int = 1,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile one optimisation step: `(state, batch) -> (state, metrics)`. The state passed in is consumed.

    The random numbers of a step depend on `seed` and the step alone. Metrics are float32 scalars: those of the
    objective, `loss`, `lr`, and the global norms `grad_norm` (before clipping), `update_norm`, `param_norm`. With
    `accumulate` > 1 the batch is taken in so many parts, one after the other, each on all devices; gradients and
    metrics are averaged, and batch statistics pass through all parts.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params, batch_stats, batch, rng):
            variables = state.replace(params=params, batch_stats=batch_stats).variables()
            loss, metrics, batch_stats = objective(module, variables, batch, rng, train=True)
            return loss, (metrics | {"loss": loss}, batch_stats or {})

        def part(carry, piece):
            batch_stats, total = carry
            batch, index = piece
            rng_part = jax.random.fold_in(rng, index)
            grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params, batch_stats, batch, rng_part)
            return (batch_stats, jax.tree.map(jnp.add, total, grads)), metrics

        if accumulate == 1:
            grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params, state.batch_stats, batch, rng)
        else:
            start = state.batch_stats, jax.tree.map(jnp.zeros_like, state.params)
            pieces = split_batch(batch, accumulate, mesh), jnp.arange(accumulate)
            (batch_stats, grads), metrics = jax.lax.scan(part, start, pieces)
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = {name: values.mean() for name, values in metrics.items()}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        metrics = {
            **metrics,
            "lr": schedule(state.step),
            "grad_norm": optax.global_norm(grads),
            "update_norm": optax.global_norm(updates),
            "param_norm": optax.global_norm(params),
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics

    state_shardings = shardings_of(abstract)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def split_batch(batch: dict[str, jax.Array], parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Split [B, ...] into [parts, B / parts, ...] so that every device keeps its rows: part p gets rows p, p + parts,
    ..."""
    split = NamedSharding(mesh, PartitionSpec(None, *sharding.BATCH))

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, split)

    return jax.tree.map(one, batch)


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
