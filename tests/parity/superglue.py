"""SuperGlue cases: the matcher alone, its loss, and the pipeline with SuperPoint."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from gim_jax import losses
from gim_jax.models.superglue import SuperGlueConfig, SuperGlueMatcher
from gim_jax.weights.convert import from_torch, torch_key
from tests.parity import superpoint


def config_of(meta: dict) -> SuperGlueConfig:
    return SuperGlueConfig(
        extractor=None,
        dim=meta.get("descriptor_dim", 256),
        keypoint_encoder=tuple(meta.get("keypoint_encoder", (32, 64, 128, 256))),
        num_layers=len(meta.get("GNN_layers", [None] * 18)),
        sinkhorn_iters=meta.get("sinkhorn_iterations", meta.get("num_sinkhorn_iterations", 100)),
        threshold=meta.get("match_threshold", 0.2),
    )


def features(case, i: int) -> tuple[dict, jnp.ndarray]:
    x = {k: jnp.asarray(case.inputs[f"{name}{i}"]) for k, name in NAMES.items() if f"{name}{i}" in case.inputs}
    size = jnp.tile(jnp.asarray(case.inputs[f"hw{i}"][::-1].astype(np.int32)), (len(x["kpts"]), 1))
    return {**x, "mask": None}, size


NAMES = {"kpts": "keypoints", "scores": "scores", "desc": "descriptors"}


def load(case, config: SuperGlueConfig):
    module = SuperGlueMatcher(config)
    x = {"kpts": jnp.zeros((1, 2, 2)), "scores": jnp.zeros((1, 2)), "desc": jnp.zeros((1, 2, config.dim))}
    x["mask"], size = None, jnp.ones((1, 2), jnp.int32)
    template = jax.eval_shape(module.init, jax.random.key(0), x, x, size, size)
    return module, from_torch(case.state_dict("superglue"), template)


def run(case):
    if "image0" in case.inputs:
        return pipeline(case)
    if "loss_total" in case.outputs:
        return loss(case)
    config = config_of(case.meta["config"])
    module, variables = load(case, config)
    (x0, size0), (x1, size1) = features(case, 0), features(case, 1)

    @jax.jit
    def forward(variables):
        scores = module.apply(variables, x0, x1, size0, size1, method="scores")
        out, state = module.apply(variables, x0, x1, size0, size1, capture_intermediates=lambda m, _: m.name in TAPS)
        return scores, out, state["intermediates"]

    scores, out, taps = forward(variables)
    for name in case.outputs:
        tapped = re.fullmatch(r"(kenc|delta_layer|attn_message_layer|mdesc)(\d*)_set([01])", name)
        if not tapped:
            continue
        kind, layer, i = tapped[1], tapped[2], int(tapped[3])
        if kind == "kenc":
            value = taps["kenc"]["__call__"][i]
        elif kind == "mdesc":
            value = taps["final_proj"]["__call__"][i]
        else:
            of_layer = taps["gnn"][f"layers_{layer}"]
            value = (of_layer if kind == "delta_layer" else of_layer["attn"])["__call__"][i]
        stride = 3 if kind == "mdesc" else 8
        want = case.outputs[name].shape[:2]
        case.check(name, superpoint.subsample(np.asarray(value), want, (1, stride)))
    for name, value in results(out).items():
        if name in case.outputs:
            case.check(name, value)
    if "sim" in case.outputs:
        case.check("sim", scores)
    for suffix in {m[1] for name in case.outputs if (m := re.fullmatch(r"matches0_iter(\d+)", name))}:
        other = SuperGlueMatcher(dataclasses.replace(config, sinkhorn_iters=int(suffix)))
        for name, value in results(jax.jit(other.apply)(variables, x0, x1, size0, size1)).items():
            if f"{name}_iter{suffix}" in case.outputs:
                case.check(f"{name}_iter{suffix}", value)


TAPS = {"kenc", "final_proj", "attn", *(f"layers_{i}" for i in range(64))}


def results(out: dict) -> dict:
    """Official names."""
    return {
        "log_assignment": out["log_assignment"],
        "matches0": out["matches0"],
        "matches1": out["matches1"],
        "matching_scores0": out["scores0"],
        "matching_scores1": out["scores1"],
    }


def pipeline(case):
    meta = case.meta["config"]
    config = superpoint.config_of(meta["superpoint"])
    extractor, weights = superpoint.load(case, config)
    found = []
    for i in "01":
        image = superpoint.tensor(case.inputs[f"image{i}"])
        x = superpoint.in_order_of(jax.jit(extractor.apply)(weights, image), case.outputs[f"keypoints{i}"], 0.0)
        case.check(f"keypoints{i}", x["kpts"])
        case.check(f"scores{i}", x["scores"])
        want = case.outputs[f"descriptors{i}_sub"].shape[:1]
        case.check(f"descriptors{i}_sub", superpoint.subsample(x["desc"], want, (4,)))
        size = jnp.array([[image.shape[2], image.shape[1]]])
        found.append(({k: jnp.asarray(v)[None] for k, v in x.items()} | {"mask": None}, size))
    module, variables = load(case, config_of(meta["superglue"]))
    (x0, size0), (x1, size1) = found
    return results(jax.jit(module.apply)(variables, x0, x1, size0, size1))


def loss(case):
    """Balanced negative log-likelihood, BatchNorm with running statistics, gradients of its mean."""
    config = config_of(case.meta["config"])
    module, variables = load(case, config)
    (x0, size0), (x1, size1) = features(case, 0), features(case, 1)
    gt0, gt1 = (jnp.asarray(case.inputs[f"gt_matches{i}"]) for i in "01")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(params):
        out = module.apply({**variables, "params": params}, x0, x1, size0, size1)
        terms = losses.assignment_nll(out["log_assignment"], gt0, gt1, case.meta["config"]["nll_balancing"])
        return terms["nll"].mean(), (terms, out["log_assignment"])

    (_, (terms, log_assignment)), grads = objective(variables["params"])
    case.check("loss_total", terms["nll"])
    case.check("loss_assignment_nll", terms["nll"])
    case.check("loss_nll_pos", terms["nll_pos"])
    case.check("loss_nll_neg", terms["nll_neg"])
    case.check("loss_num_matchable", terms["num_matchable"])
    case.check("loss_num_unmatchable", terms["num_unmatchable"])
    case.check("loss_bin_score", np.reshape(variables["params"]["bin_score"], 1))
    case.check("log_assignment", log_assignment)
    norms = gradient_norms(grads)
    case.check("grad_norms", np.array([norms[name] for name in case.meta["grad_names"]]))
    case.check("grad_bin_score", grads["bin_score"])


def gradient_norms(grads) -> dict[str, float]:
    """Length of each parameter's gradient, under its torch name."""
    leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
    return {torch_key(tuple(p.key for p in path)): float(jnp.linalg.norm(g)) for path, g in leaves}
