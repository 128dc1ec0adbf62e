"""Every setting of a training run; the files of `configs/` change what their experiment has otherwise."""

from __future__ import annotations

import dataclasses

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
                num_threads=16,
                num_prefetch=4,
                on_damage="skip",
                depth=False,  # True: posed pairs are supervised by their depth, else by points drawn through it
                sampling=dataclasses.asdict(Sampling()),
                augment=dataclasses.asdict(Augment()),
                # gim rescales more of ScanNet's pairs and darkens none
                augment_of=dict(scannet=dict(rescale_prob=0.8, dark_prob=0.0)),
            ),
            eval=dict(records="", split="val", num_batches=8),
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


def use_model(config: ConfigDict, name: str, **changes) -> None:
    """Set the network: a named one with some of its settings changed."""
    network = replace(get_model(name).config, changes, name)
    config.model = ConfigDict({"name": name, **dataclasses.asdict(network)})
