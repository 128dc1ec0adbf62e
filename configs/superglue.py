"""SuperGlue trained on posed pairs, homographies and labelled video pairs, where labels are the keypoints.

Paper       GIM (ICLR 2024), table 1, row GIM_SuperGlue: mean AUC@5 on ZEB 34.3 (50 h of video); official outdoor
            weights 31.2. Neither its code nor its weights were released; on video the loss is that of the released
            LightGlue, on posed pairs glue-factory's.
Data        packed folders, separated by commas, see configs/loftr.py.
Start       weights with a detector in them.

`tiny`      4 layers, 128 keypoints at 160x120, for CPUs; without `init_weights` the detector is random.
            gim-jax train --config=configs/superglue.py:tiny --config.data.records=PAIRS --workdir=RUN
`open`      (default) on SuperPoint-open (MIT), whose weights have to be in `init_weights`; schedule and data of `gim`.
            No score to expect: the paper has no such row. Not run at full size.
            gim-jax train --config=configs/superglue.py --config.data.records=PAIRS --config.init_weights=START
            --workdir=RUN
`homography`, `megadepth`: the two stages of glue-factory, see configs/lightglue.py, on SuperPoint-open. Not run at full
            size.
`gim`       on the official SuperPoint (non-commercial), starting from the official outdoor weights. Score to expect:
            34.3. Not run at full size.
            gim-jax train --config=configs/superglue.py:gim --config.data.records=MEGADEPTH,SCANNET,PAIRS
            --config.init_weights=START --workdir=RUN

Chips and hours planned for `gim`, 16 pairs at a step, by the TPU compiler's estimate: 16 v5e, 1.9 of 16 GiB, 34 days
(13 164 chip hours); 16 v6e, 16 days (6273); of any slice:
`gim-jax plan --config=configs/superglue.py:gim --topology=v5e:4x4`. See docs/pods.md.
Sources: settings of configs/lightglue.py; 100 Sinkhorn iterations in training from the SuperGlue paper.
"""

from gim_jax.config import load_config
from gim_jax.train.defaults import shrink, use_model


def get_config(argument: str = ""):
    argument = argument or "open"
    if argument not in ("tiny", "open", "homography", "megadepth", "gim"):
        raise ValueError(
            f"configs/superglue.py: found argument {argument!r}, expected tiny, open, homography, megadepth or gim"
        )
    config = load_config(f"configs/lightglue.py:{'gim' if argument in ('tiny', 'open') else argument}")
    with config.unlocked():
        name = "gim_superglue" if argument == "gim" else "superglue_open"
        use_model(config, name, remat="all", sinkhorn_iters=100, dtype="bfloat16")
        if argument == "tiny":
            use_model(config, name, num_layers=4, sinkhorn_iters=20)
            shrink(config, (160, 120), 300)
    return config
