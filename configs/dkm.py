"""DKM trained on posed pairs and labelled video pairs: the original loss, on video where there are labels.

Paper       GIM (ICLR 2024), table 1, row GIM_DKM: mean AUC@5 on ZEB 49.4 (50 h of video), 51.2 (100 h); row DKM (out):
            45.8.
Data        packed folders, separated by commas, see configs/loftr.py.
Start       in the originals the encoder begins with ImageNet weights of ResNet-50; `init_weights` takes a network.

`tiny`      0.1 M parameters at 160x128, for CPUs.
            gim-jax train --config=configs/dkm.py:tiny --config.data.records=PAIRS --workdir=RUN
`outdoor`   (default) DKMv3 (70.2 M parameters), the authors' recipe: 720x544 (theirs is 720x540), MegaDepth, 250 000
            steps of 32 pairs; 4 A100 for 5 days. Score to expect: 45.8. Not run at full size.
            Unlike theirs: images keep their shape, cut or with borders, where theirs are squeezed and shaken by 32 px;
            depths of a pair agree within 20 % at the nearest pixel (GIM's rule), theirs within 5 %, interpolated; pairs
            that overlap by more than 0.35 are drawn once, theirs are in two lists.
            gim-jax train --config=configs/dkm.py --config.data.records=MEGADEPTH --workdir=RUN
`gim`       gim's recipe at 896x672: MegaDepth, ScanNet and video with equal probabilities, 10 epochs of 3 x 938 240
            pairs, 128 at a step (theirs: 120) in 4 parts; the authors: 40 A100-80G, one pair each. Score to expect:
            51.2 (100 h of video). Not run at full size.
            gim-jax train --config=configs/dkm.py:gim --config.data.records=MEGADEPTH,SCANNET,PAIRS --workdir=RUN

Memory: bfloat16, blocks recomputed, 4 parts a step (`optim.accumulate`), for 16 chips of 16 GiB.
Chips and hours planned for `gim`, by the TPU compiler's estimate: 16 v5e, 7.5 of 16 GiB, 33 days (12 850 chip hours);
16 v6e, 12 days (4490); of any slice:
`gim-jax plan --config=configs/dkm.py:gim --topology=v5e:4x4 --pairs-per-chip=8`. See docs/pods.md.
Sources: gim's branch train-gim-dkm, train.py and trainer/*; DKM's experiments/dkm/train_DKMv3_outdoor.py.
"""

from gim_jax.train.defaults import defaults, shrink, use_model

GIM_EPOCH = 3 * 938_240 // 128  # optimiser steps


def get_config(argument: str = ""):
    argument = argument or "outdoor"
    config = defaults()
    config.data.update(depth=True)
    config.optim.update(weight_decay=0.01)
    if argument == "outdoor":
        use_model(config, "dkm_outdoor", remat="all", dtype="bfloat16")
        config.num_steps, config.batch_size = 250_000, 32
        config.data.update(size=(720, 544))
        config.data.sampling.update(epoch=938_240, power=0.75, min_overlap=0.01)
        config.data.augment.update(rescale_prob=0.0, dark_prob=0.0, perspective_prob=0.0)
        config.optim.update(lr=4e-4, decay="steps", decay_at=(166_666, 225_000), decay_rate=0.2, clip_norm=0.0)
        config.optim.lr_multipliers = (("^encoder/", 0.05),)
    elif argument == "gim":
        use_model(config, "gim_dkm", remat="all", dtype="bfloat16")
        config.num_steps, config.batch_size = 10 * GIM_EPOCH, 128
        config.optim.accumulate = 4
        config.data.update(size=(896, 672))
        config.data.sampling.update(epoch=938_240, power=0.75, max_overlap=0.7)
        config.optim.update(lr=8e-4, min_lr=1e-4, warmup_steps=GIM_EPOCH, lr_multipliers=(("^encoder/", 0.05),))
    elif argument == "tiny":
        use_model(config, "dkm_tiny")
        shrink(config, (160, 128), 300)
    else:
        raise ValueError(f"configs/dkm.py: found argument {argument!r}, expected outdoor, gim or tiny")
    return config
