"""SuperGlue trained on labelled video pairs with GIM's rule: labels are the keypoints, and match in order.

Paper       GIM (ICLR 2024), table 1, row GIM_SuperGlue: mean AUC@5 on ZEB 34.3 (50 h of video); official outdoor
            weights 31.2. Neither its code nor its weights were released; the loss is that of the released LightGlue.
Data        a packed folder of labelled pairs: `gim-jax label ... && gim-jax pack ... --out PAIRS`.

`open`      (default) on SuperPoint-open (MIT), whose weights have to be in `init_weights`.
            gim-jax train --config=configs/superglue.py --config.data.records=PAIRS --config.init_weights=START
`gim`       on the official SuperPoint (non-commercial), starting from the official outdoor weights. Not run at full
            size.
            gim-jax train --config=configs/superglue.py:gim --config.data.records=PAIRS --config.init_weights=START

Sources: settings of configs/lightglue.py; 100 Sinkhorn iterations in training from the SuperGlue paper.
"""

import dataclasses

from ml_collections import ConfigDict

from gim_jax.config import load_config
from gim_jax.models import get_model


def get_config(argument: str = "") -> ConfigDict:
    argument = argument or "open"
    if argument not in ("open", "gim"):
        raise ValueError(f"configs/superglue.py: found argument {argument!r}, expected open or gim")
    config = load_config("configs/lightglue.py:gim")
    name = "superglue_open" if argument == "open" else "gim_superglue"
    network = dataclasses.asdict(get_model(name).config) | {"remat": True, "sinkhorn_iters": 100}
    with config.unlocked():
        config.model = ConfigDict({"name": name, **network})
    return config
