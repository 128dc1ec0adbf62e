"""LoFTR trained on labelled video pairs with GIM's rule: the same losses, only where there are correspondences.

Paper       GIM (ICLR 2024), table 1, row GIM_LoFTR: mean AUC@5 on ZEB 39.1 (50 h of video); LoFTR outdoor 33.1.
Data        a packed folder of labelled pairs: `gim-jax label ... && gim-jax pack ... --out PAIRS`.

`tiny`      a small network that two CPU cores train in minutes; what `gim-jax quickstart` trains.
            gim-jax train --config=configs/loftr.py:tiny --config.data.records=PAIRS --workdir=RUN
`outdoor`   (default) the official network (11.6 M parameters, gray) at 840x840, gim's schedule. Chips and hours: the
            authors trained 10 epochs on 40 A100-80G with one pair each. Score: not run at full size.
            gim-jax train --config=configs/loftr.py:outdoor --config.data.records=PAIRS --workdir=RUN
`gim`       gim's form of it (ResNet-50 encoder on RGB, 16.2 M parameters), rest as `outdoor`. Not run at full size.

Sources: learning rates, decay, batch and epochs from gim's README and trainer/lightning.py; AdamW and clipping from
LoFTR's src/config/default.py.
"""

import dataclasses

from ml_collections import ConfigDict

from gim_jax.data.augment import Augment
from gim_jax.models import get_model

EPOCH = 938_240 // 64  # optimiser steps: gim's --maxlen of one data set at batch 64


def get_config(argument: str = "") -> ConfigDict:
    argument = argument or "outdoor"
    config = ConfigDict(
        dict(
            seed=0,
            num_steps=10 * EPOCH,
            batch_size=64,  # global
            log_every=50,
            checkpoint_every=1000,
            keep_checkpoints=2,
            eval_every=0,  # 0 = never
            init_weights="",  # safetensors file to start from
            model={"name": "loftr_outdoor"},
            data=dict(
                records="",  # packed folders, separated by commas
                weights=(),  # sampling weight per folder, () = equal
                split="train",
                size=(840, 840),
                channels=1,
                max_matches=2048,  # gim TRAIN_ZEROSHOT_NUM
                min_matches=64,  # gim datasets/walk/walk.py
                num_threads=16,
                num_prefetch=4,
                on_damage="skip",
                augment=dataclasses.asdict(Augment()),
            ),
            eval=dict(records="", split="val", num_batches=8),
            optim=dict(
                lr=1e-3,
                min_lr=5e-5,
                warmup_steps=EPOCH,
                warmup_ratio=0.1,
                decay="linear",
                weight_decay=0.1,
                b1=0.9,
                b2=0.999,
                clip_norm=0.5,
                lr_multipliers=(),  # pairs (regular expression of parameter paths, factor)
                ema_decay=0.0,  # 0 = off
            ),
            mesh=dict(fsdp=1, fsdp_min_size=2**18),
        )
    )
    changes = {}
    if argument == "outdoor":
        changes["temp_bug_fix"] = True  # the corrected position encoding: right for every training from scratch
    elif argument == "gim":
        config.model.name = "gim_loftr"
        config.data.channels = 3
        config.optim.lr_multipliers = (("encode", 0.1),)
        changes["temp_bug_fix"] = True
    elif argument == "tiny":
        _shrink(config)
    else:
        raise ValueError(f"configs/loftr.py: found argument {argument!r}, expected outdoor, gim or tiny")
    network = dataclasses.asdict(get_model(config.model.name).config) | changes
    config.model.update(network)
    return config


def _shrink(config: ConfigDict) -> None:
    """Make a run that two CPU cores finish in a few minutes: crops of 160x120 px out of frames about 320 px wide."""
    config.num_steps = 280
    config.batch_size = 8
    config.log_every = 1
    config.checkpoint_every = 70
    config.model.name = "loftr_tiny"
    config.data.update(size=(160, 120), max_matches=128, min_matches=16, num_threads=2)
    # A small network has no capacity for full rotation invariance, and in minutes none for hard examples.
    config.data.augment.update(rescale_prob=1.0, rescale0=(1.6, 2.4), rescale1=(1.6, 2.4), dark_prob=0.1)
    config.data.augment.update(perspective_prob=0.3, corner_jitter=0.1, rotation_deg=10.0)
    config.optim.update(lr=3e-3, min_lr=1e-5, warmup_steps=30, decay="cosine", weight_decay=0.01, clip_norm=1.0)
