"""A matcher module of hloc: any matcher of ours in hloc's own `match_dense`.

Either `gim_jax.tasks.hloc.register()` before hloc looks for it, or a copy of this file as hloc/matchers/gim_jax.py;
then

    conf = gim_jax.tasks.hloc.CONF | {"model": {"name": "gim_jax", "model": "gim_dkm", "weights": "dkm.safetensors"}}
    features, matches = hloc.match_dense.main(conf, pairs, images, export_dir=outputs)
"""

import importlib
from typing import Any

import numpy as np

from gim_jax import api

BaseModel: Any = importlib.import_module("..utils.base_model", __package__).BaseModel  # of the hloc this is a part of


class GimJax(BaseModel):
    """hloc's `BaseModel` around `gim_jax.load_matcher`; settings of the matcher go into `settings`."""

    default_conf = {"model": "rootsift", "weights": None, "settings": {}, "max_num_matches": None}  # noqa: RUF012
    required_inputs = ["image0", "image1"]  # noqa: RUF012

    def _init(self, conf):
        self.matcher = api.load_matcher(conf["model"], conf["weights"], **conf["settings"])

    def _forward(self, data):
        """Match tensors [1, C, H, W] in [0, 1]: keypoints0 and keypoints1 [M, 2] px, scores [M], best first."""
        images = [
            np.ascontiguousarray(np.rint(np.asarray(data[name][0].cpu()) * 255).astype(np.uint8).transpose(1, 2, 0))
            for name in ("image1", "image0")  # hloc wants the points refined that lie in image 0; LoFTR refines image 1
        ]
        found = self.matcher(*images)
        best = np.argsort(-found.conf, kind="stable")[: self.conf["max_num_matches"]]
        arrays = {"keypoints0": found.kpts1, "keypoints1": found.kpts0, "scores": found.conf}
        return {name: data["image0"].new_tensor(values[best]) for name, values in arrays.items()}
