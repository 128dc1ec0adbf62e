"""Every setting of a training run; the files of `configs/` change what their experiment has otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from gim_jax.config import replace
from gim_jax.data.augment import Augment
from gim_jax.data.scenes import Sampling
from gim_jax.models import get_model
from gim_jax.train.kinds import Settings


def defaults() -> ConfigDict:
    """Make the settings that all experiments start from."""
    return ConfigDict(
        dict(
            seed=0,
            num_steps=1,
            batch_size=8,  # global
            log_every=50,
            checkpoint_every=1000,
            keep_checkpoints=2,
            eval_every=0,  # 0 = never
            wandb="",  # project of Weights & Biases that gets the metrics, too (extra `wandb`)
            profile_steps=(),  # (from, to): steps that the profiler records
            init_weights="",  # safetensors file to start from
            model={"name": ""},
            data=dict(
                records="",  # packed folders, separated by commas
                weights=(),  # sampling weight per folder, () = equal
                split="train",
                size=(640, 480),
                channels=3,
                max_matches=2048,  # gim TRAIN_ZEROSHOT_NUM
                min_matches=64,  # gim datasets/walk/walk.py
                num_threads=8,  # on every host; each holds a batch of it
                num_prefetch=8,
                on_damage="skip",
                depth=False,  # True: posed pairs are supervised by their depth, else by points drawn through it
                sampling=dataclasses.asdict(Sampling()),
                augment=dataclasses.asdict(Augment()),
                augment_of=dict(scannet=dict(dark_prob=0.0)),  # gim darkens none of ScanNet's pairs
            ),
            eval=dict(
                records="",  # the objective without training, on the first batches
                split="val",
                num_batches=8,
                pairs="",  # list of pairs with poses: their AUC, and the weights with the best AUC@5 are kept
                num_pictures=2,  # of matches, for TensorBoard
            ),
            objective=dataclasses.asdict(Settings()),
            optim=dict(
                lr=1e-4,
                lr_scaling="none",  # "linear" or "sqrt" in batch_size / canonical_batch
                canonical_batch=64,
                min_lr=0.0,
                warmup_steps=0,
                warmup_ratio=0.1,
                decay="linear",  # or "cosine", "constant", "steps"
                decay_at=(),  # "steps": the learning rate is multiplied by decay_rate at each of these
                decay_rate=0.5,
                weight_decay=0.0,
                b1=0.9,
                b2=0.999,
                clip_norm=0.5,
                lr_multipliers=(),  # pairs (regular expression of parameter paths, factor)
                ema_decay=0.0,  # 0 = off
                accumulate=1,  # parts of a batch whose gradients are summed before the step
            ),
            mesh=dict(fsdp=1, fsdp_min_size=2**18),
        )
    )


def shrink(config: Any, size: tuple[int, int], num_steps: int) -> None:
    """Make a run on video pairs that two CPU cores finish in a few minutes: crops out of frames about 320 px wide."""
    config.num_steps, config.batch_size = num_steps, 8
    config.update(log_every=1, checkpoint_every=50)
    config.data.update(size=size, max_matches=128, min_matches=16, num_threads=2, depth=False)
    config.data.sampling = dataclasses.asdict(Sampling())
    # A small network has no capacity for full rotation invariance, and in minutes none for hard examples.
    config.data.augment.update(rescale_prob=1.0, rescale0=(1.6, 2.4), rescale1=(1.6, 2.4), dark_prob=0.1)
    config.data.augment.update(perspective_prob=0.3, corner_jitter=0.1, rotation_deg=10.0)
    config.optim.update(lr=1e-3, min_lr=1e-5, warmup_steps=30, decay="cosine", clip_norm=1.0)


def use_model(config: ConfigDict, name: str, **changes) -> None:
    """Set the network: a named one with some of its settings changed."""
    network = replace(get_model(name).config, changes, name)
    config.model = ConfigDict({"name": name, **dataclasses.asdict(network)})
