"""LightGlue cases: GIM's form, the official form with early stop and pruning, the loss, and the pipeline."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from gim_jax import losses
from gim_jax.models.lightglue import LightGlueConfig, LightGlueMatcher
from gim_jax.weights.convert import from_torch
from tests.parity import superpoint
from tests.parity.superglue import gradient_norms


def config_of(meta: dict) -> LightGlueConfig:
    """Keypoints of the cases are what the network sees: no offset."""
    return LightGlueConfig(
        threshold=meta.get("filter_threshold", 0.1),
        depth_confidence=meta.get("depth_confidence", -1),
        width_confidence=meta.get("width_confidence", -1),
        num_layers=meta.get("n_layers", 9),
        num_heads=meta.get("num_heads", 4),
    )


def sizes(case) -> list[jnp.ndarray]:
    """(width, height) that normalises the keypoints of both images.

    GIM's module takes (height, width) and swaps it; its demo hands over (width, height), which is swapped, too.
    """
    if case.meta["origin"][0].startswith("cvg/"):
        return [jnp.asarray(case.inputs[f"image_size{i}"], jnp.int32) for i in "01"]
    given = "image_size" if any("demo.py" in o for o in case.meta["origin"]) else "resize"
    return [jnp.asarray(case.inputs[f"{given}{i}"][:, ::-1], jnp.int32) for i in "01"]


def features(case, i: int) -> dict:
    inputs = case.inputs
    return {
        "kpts": jnp.asarray(inputs[f"keypoints{i}"]),
        "desc": jnp.asarray(inputs[f"descriptors{i}"]),
        "mask": None,
    }


@functools.cache
def forward(config: LightGlueConfig):
    """Compiled once for all cases with these settings and shapes."""
    module = LightGlueMatcher(config)

    adaptive = config.depth_confidence > 0 or config.width_confidence > 0

    def wanted(child, _):  # layers that may be skipped cannot hand out values
        return not adaptive or (child.name or "").startswith(("token", "posenc"))

    def apply(variables, *inputs):
        out, state = module.apply(variables, *inputs, capture_intermediates=wanted)
        return out, state["intermediates"]

    return jax.jit(apply)


def load(case, config: LightGlueConfig):
    module = LightGlueMatcher(config)
    x = {"kpts": jnp.zeros((1, 2, 2)), "desc": jnp.zeros((1, 2, config.input_dim)), "mask": None}
    size = jnp.ones((1, 2), jnp.int32)
    template = jax.eval_shape(module.init, jax.random.key(0), x, x, size, size)
    return module, from_torch(case.state_dict("lightglue"), template)


def run(case):
    if "image0" in case.inputs:
        return pipeline(case)
    if "trainer_loss" in case.outputs:
        return loss(case)
    module, variables = load(case, config_of(case.meta["config"]))
    inputs = features(case, 0), features(case, 1), *sizes(case)
    out, taps = forward(module.config)(variables, *inputs)
    check_taps(case, taps, out, f"log_assignment_{module.config.num_layers - 1}")
    return results(case, out)


def check_taps(case, taps, out, last: str):
    for name, want in case.outputs.items():
        if found := re.fullmatch(r"posenc([01])", name):
            value = np.stack(taps["posenc"]["__call__"][int(found[1])])[:, :, None]
            case.check(name, superpoint.subsample(value, want.shape, (1, 1, 1, 3, 1)))
        elif found := re.fullmatch(r"self_attn_layer(\d+)([01])", name):
            value = taps[f"transformers_{found[1]}"]["self_attn"]["__call__"][int(found[2])]
            case.check(name, superpoint.subsample(np.asarray(value), want.shape, (1, 8, 1)))
        elif found := re.fullmatch(r"layer(\d+)_desc([01])", name):
            value = taps[f"transformers_{found[1]}"]["__call__"][0][int(found[2])]
            case.check(name, superpoint.subsample(np.asarray(value), want.shape, (1, 8, 1)))
        elif found := re.fullmatch(r"matchability_logit([01])", name):
            case.check(name, taps[last]["matchability"]["__call__"][int(found[1])])
        elif name == "sim":
            x0, x1 = (np.asarray(x) / x.shape[-1] ** 0.25 for x in taps[last]["final_proj"]["__call__"])
            case.check(name, np.einsum("bmd,bnd->bmn", x0, x1))
        elif found := re.fullmatch(r"token_conf_layer(\d+)_([01])", name):
            layer, i = int(found[1]), int(found[2])
            logits = np.asarray(taps[f"token_confidence_{layer}"]["__call__"][i])
            there = np.asarray(out[f"depth{i}"][0]) > layer  # points that reached this layer
            case.check(name, 1 / (1 + np.exp(-logits[:, there])))


def results(case, out: dict) -> dict:
    """Official names; rows of dropped points are left out of the official log-assignment."""
    kept = [np.append(np.asarray(out[f"kept{i}"][0]), True) for i in "01"]
    log_assignment = np.asarray(out["log_assignment"])
    if len(log_assignment) == 1:
        log_assignment = log_assignment[:, kept[0]][:, :, kept[1]]
    matches0 = np.asarray(out["matches0"])
    rows = np.flatnonzero(matches0[0] >= 0)
    values = {
        "log_assignment": log_assignment,
        "matches0": matches0,
        "matches1": out["matches1"],
        "matching_scores0": out["scores0"],
        "matching_scores1": out["scores1"],
        "prune0": out["depth0"],
        "prune1": out["depth1"],
        "stop": np.asarray(out["stop"]).max(),
        "matches": np.stack([rows, matches0[0][rows]], -1),
        "scores": np.asarray(out["scores0"])[0][rows],
    }
    return {name: value for name, value in values.items() if name in case.outputs}


def pipeline(case):
    meta = case.meta["config"]
    config = superpoint.config_of(meta["detector"])
    extractor, weights = superpoint.load(case, config)
    found, size = [], []
    for i in "01":
        image = superpoint.tensor(case.inputs[f"image{i}"])
        features = jax.jit(extractor.apply)(weights, image)
        x = superpoint.in_order_of(features, case.outputs[f"keypoints{i}"], 0.5)
        case.check(f"keypoints{i}", x["kpts"])
        size.append(jnp.array([[image.shape[2], image.shape[1]]]))
        found.append({k: jnp.asarray(v)[None] for k, v in x.items()} | {"mask": None})
    module, variables = load(case, config_of(meta["matcher"]))
    return results(case, jax.jit(module.apply)(variables, *found, *size))


def loss(case):
    """GIM's training loss: deep supervision for posed pairs, the labels' diagonal for video pairs."""
    module, variables = load(case, config_of(case.meta["config"]))
    inputs = features(case, 0), features(case, 1), *sizes(case)
    gt0, gt1 = (jnp.asarray(case.inputs[f"gt_matches{i}"]) for i in "01")
    posed = jnp.asarray(case.inputs["gt"])
    labels = jnp.asarray(case.inputs["pseudo_labels"].sum(-1) > 0)
    balancing, gamma = case.meta["config"]["nll_balancing"], case.meta["config"]["gamma"]

    def objective(params):
        answers, state = module.apply(
            {"params": params},
            *inputs,
            method="supervised",
            capture_intermediates=lambda m, _: m.name and m.name.startswith("transformers"),
        )
        masks = [jnp.ones(gt.shape, bool) for gt in (gt0, gt1)]
        terms = losses.lightglue_loss(answers, gt0, gt1, *masks, balancing, gamma)
        final = answers[-1][0]
        size = min(final.shape[1:]) - 1
        video = losses.diagonal_nll(final, labels[:, :size])
        mixed = losses.mix(terms["total"], video, posed)
        of_posed = jnp.where(posed, terms["total"], 0).sum() / posed.sum()
        taps = state["intermediates"]
        layers = [taps[f"transformers_{i}"]["__call__"][0][0] for i in range(len(taps))]
        return (of_posed, mixed["total"]), (terms, mixed, final, jnp.stack(layers, 1))

    @jax.jit
    def gradients(params):
        _, back, aux = jax.vjp(objective, params, has_aux=True)
        return [back(seed)[0] for seed in ((1.0, 0.0), (0.0, 1.0))], aux

    (of_posed, of_mixed), (terms, mixed, final, layers) = gradients(variables["params"])
    for name in case.outputs:
        if name.startswith("gtloss_"):
            value = np.asarray(terms[OFFICIAL.get(name[7:], name[7:])])[np.asarray(posed)]
            case.check(name, value / 2 if name == "gtloss_num_unmatchable" else value)  # theirs is of one image
    case.check("trainer_loss", mixed["total"])
    case.check("trainer_groundtruth_loss", mixed["posed"])
    case.check("trainer_pseudo_loss", mixed["video"])
    for name, grads in [("grad_norms_gtloss_total", of_posed), ("grad_norms_trainer_loss", of_mixed)]:
        norms = gradient_norms(grads)
        case.check(name, np.array([norms[k] for k in case.meta["grad_names"]]))
    case.check("log_assignment", final)
    want = case.outputs["ref_descriptors0_sub"].shape
    case.check("ref_descriptors0_sub", superpoint.subsample(np.asarray(layers), want, (1, 1, 10, 4)))
    case.check("n_ref_layers", np.int32(layers.shape[1]))


OFFICIAL = {"assignment_nll": "nll"}
