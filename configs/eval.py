"""Evaluations by the published protocols: what is measured, on which data, with which network.

Arguments, `configs/eval.py:BENCHMARK[,MODEL]`; a model is a name of `gim-jax models`, networks need weights.

`zeb`           (default) paper section 4, table 1: twelve domains, 45 916 pairs, mean AUC@5. Expect RootSIFT 31.8,
                GIM_SuperGlue 34.3, GIM_LoFTR 39.1, GIM_LightGlue 38.3, GIM_DKM 51.2 (100 h of video).
`megadepth1500` table 8, AUC@5: GIM_DKM 60.7, GIM_LoFTR 51.3, GIM_SuperGlue 41.3.
`scannet1500`   table 8, AUC@5: GIM_DKM 27.6, GIM_LoFTR 19.5, GIM_SuperGlue 15.8.
`hpatches`      table 3, AUC@3 px: GIM_DKM 71.5, GIM_LoFTR 70.6, GIM_SuperGlue 54.4.
`pairs`         any lists of pairs, 38 tokens a line.

Not run on the published data, which is not to be had here.

Command: gim-jax eval --config=configs/eval.py:zeb,gim_dkm --config.data=ZEB --config.weights=W --json dkm.json
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    benchmark, _, model = argument.partition(",")
    return ml_collections.ConfigDict(
        dict(
            benchmark=benchmark or "zeb",
            data="",  # folder of the benchmark's data
            pairs=(),  # of `pairs`: files, a set each
            model=model or "rootsift",
            weights="",
            set=(),  # settings of the model, such as ("gp_solve=released",)
            batch_size=1,  # pairs per pass through a network
            long_side=placeholder(int),  # px, of `pairs`; None: the model's own
            protocol=placeholder(str),  # dkm, loftr or superglue; None: that of the model's family
            method="ransac",  # the published one; or magsac, poselib
            threshold=placeholder(float),  # px; None: the protocol's
            sets=(),  # of `zeb`: some of them, such as ("KIT", "NIG")
            overlap=placeholder(tuple),  # of `zeb`: pairs in (low, high]
            fraction=1.0,  # of `zeb`: this share of the pairs, chosen by hash
            released=False,  # of `zeb`: map points as the released code, without padding
        )
    )
