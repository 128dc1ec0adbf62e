"""LoFTR trained on posed pairs and labelled video pairs: the original losses, on video where there are labels.

Paper       GIM (ICLR 2024), table 1, row GIM_LoFTR: mean AUC@5 on ZEB 39.1 (50 h of video); row LoFTR (out): 33.1.
Data        packed folders, separated by commas: `gim-jax label ... && gim-jax pack ... --out PAIRS` for video;
            `python -m data_prep.megadepth`, `data_prep.scannet`, `data_prep.homography` for the others.

`tiny`      a small network that two CPU cores train in minutes; what `gim-jax quickstart` trains.
            gim-jax train --config=configs/loftr.py:tiny --config.data.records=PAIRS --workdir=RUN
`outdoor`   (default) the official network (11.6 M parameters, gray) and recipe: 840x840, MegaDepth, 100 pairs of each
            of 368 scenes an epoch, 30 epochs. The authors: 64 GPUs for about a day. Score to expect: 33.1. Not run at
            full size.
            gim-jax train --config=configs/loftr.py --config.data.records=MEGADEPTH --workdir=RUN
`gim`       gim's form (ResNet-50 encoder on RGB, 16.2 M parameters) and recipe: MegaDepth, ScanNet and video with
            equal probabilities, 10 epochs of 3 x 938 240 pairs; the authors: 40 A100-80G, one pair each. Score to
            expect: 39.1 (50 h of video). Not run at full size.
            gim-jax train --config=configs/loftr.py:gim --config.data.records=MEGADEPTH,SCANNET,PAIRS --workdir=RUN

Memory: bfloat16, blocks recomputed: 64 pairs fit 16 chips of 16 GiB.
Chips and hours planned for `gim`, by the TPU compiler's estimate: 16 v5e, 12.7 of 16 GiB, 19 days (7410 chip hours);
16 v6e, 6.8 days (2609); of any slice:
`gim-jax plan --config=configs/loftr.py:gim --topology=v5e:4x4 --pairs-per-chip=4`. See docs/pods.md.
Sources: gim's README and trainer/lightning.py; LoFTR's src/config/default.py and configs/.
"""

from gim_jax.train.defaults import defaults, shrink, use_model

GIM_EPOCH = 3 * 938_240 // 64  # optimiser steps: gim's --maxlen of three data sets at batch 64
OUTDOOR_EPOCH = 100 * 368 // 64  # 100 pairs of each scene


def get_config(argument: str = ""):
    argument = argument or "outdoor"
    config = defaults()
    config.batch_size = 64
    config.data.update(size=(840, 840), channels=1, depth=True)
    config.optim.update(lr=1e-3, min_lr=5e-5, weight_decay=0.1)
    if argument == "outdoor":
        use_model(
            config, "loftr_outdoor", temp_bug_fix=True, remat="all", dtype="bfloat16"
        )  # the fix: right for training from scratch
        config.num_steps = 30 * OUTDOOR_EPOCH
        config.data.sampling.update(per_scene=100, min_overlap=0.1, max_overlap=0.7)
        config.data.augment.enabled = False  # the original has none: the longest side to 840, padded
        config.optim.update(lr=8e-3, lr_scaling="linear", min_lr=0.0, warmup_steps=1875, decay="steps")
        config.optim.decay_at = tuple(epoch * OUTDOOR_EPOCH for epoch in (8, 12, 16, 20, 24))
    elif argument == "gim":
        use_model(config, "gim_loftr", temp_bug_fix=True, remat="all", dtype="bfloat16")
        config.num_steps = 10 * GIM_EPOCH
        config.data.update(channels=3)
        config.data.augment_of.scannet = dict(rescale_prob=0.8, dark_prob=0.0)  # its LoFTR rescales more of these
        config.data.sampling.update(epoch=938_240, power=0.75, max_overlap=0.7)
        config.objective.negatives = False
        config.optim.update(warmup_steps=GIM_EPOCH, lr_multipliers=(("encode", 0.1),))
    elif argument == "tiny":
        use_model(config, "loftr_tiny")
        shrink(config, (160, 120), 280)
        config.checkpoint_every = 70
        config.optim.update(lr=3e-3, weight_decay=0.01)
    else:
        raise ValueError(f"configs/loftr.py: found argument {argument!r}, expected outdoor, gim or tiny")
    return config
