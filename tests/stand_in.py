"""A network and objective of a few hundred parameters, so that the training loop is tested in seconds.

As a program it trains them in a folder and sends itself a signal after some step:
`python -m tests.stand_in WORKDIR RECORDS NUM_STEPS [SIGNAL STEP] [key=value ...]`.
"""

import os
import signal
import sys

import jax
import ml_collections
from flax import linen as nn
from jax import numpy as jnp

from gim_jax.train import loop
from gim_jax.train.defaults import defaults
from tests.pairs import data_config

META = {"model": "stand_in", "config": {"width": 8}}
TRACES = []  # one entry per trace of the objective: (train,)


class StandIn(nn.Module):
    """Guesses how far the correspondences of a pair move; with batch statistics, and noise while training."""

    width: int = 8

    @nn.compact
    def __call__(self, image0, image1, train: bool = False, noise=None):
        x = jnp.concatenate([image0, image1], axis=-1)
        init = nn.initializers.uniform(0.3)  # compiles faster than normal numbers
        x = nn.Conv(self.width, (5, 5), strides=4, kernel_init=init, name="encode")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x)).mean(axis=(1, 2))
        if noise is not None:
            x = x + 0.01 * jax.random.uniform(noise, x.shape)
        return nn.Dense(2, kernel_init=init, name="head")(x)


def objective(module, variables, batch, rng, train):
    TRACES.append(train)
    images = (batch[f"image{i}"].astype(jnp.float32) / 255 for i in "01")
    guess, new = module.apply(variables, *images, train, rng if train else None, mutable=["batch_stats"])
    moved = (batch["kpts1"] - batch["kpts0"]) / 64
    mask = batch["match_mask"].astype(jnp.float32)[..., None]
    target = (moved * mask).sum(1) / mask.sum(1)
    loss = jnp.square(guess - target).mean()
    stats = new["batch_stats"] if train else variables["batch_stats"]
    return loss, {"guess": jnp.abs(guess).mean()}, stats


def make_config(records, num_steps=12, **changes) -> ml_collections.ConfigDict:
    """Make a small configuration; `changes` are dotted names with `__` for the dot."""
    config = defaults()
    config.update(seed=3, num_steps=num_steps, batch_size=8, log_every=1, checkpoint_every=4)
    config.data = data_config(records, size=(32, 24), num_threads=1)
    config.eval.update(records=str(records), split="train", num_batches=2)
    config.optim.update(lr=0.02, min_lr=0.002, warmup_steps=2, weight_decay=0.1)
    config.mesh.update(fsdp_min_size=64)
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


def train(config, workdir, progress=None):
    return loop.run(config, workdir, StandIn(), objective, META, progress)


if __name__ == "__main__":
    folder, records_folder, steps, *rest = sys.argv[1:]
    if "HOSTS" in os.environ:  # "PORT,NUM,INDEX"
        port, num, index = map(int, os.environ["HOSTS"].split(","))
        jax.distributed.initialize(f"127.0.0.1:{port}", num, index)
    overrides = dict(a.split("=") for a in rest if "=" in a)
    signals = [a for a in rest if "=" not in a]

    def send(step, num_steps, metrics):
        if signals and step == int(signals[1]):
            os.kill(os.getpid(), getattr(signal, signals[0]))

    try:
        train(make_config(records_folder, int(steps), **{k: int(v) for k, v in overrides.items()}), folder, send)
    except KeyboardInterrupt:
        sys.exit(130)
