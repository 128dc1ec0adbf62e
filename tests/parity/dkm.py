"""DKM, official and GIM's: matching, and the training losses with gradients."""

import dataclasses

import jax
import numpy as np
from jax import numpy as jnp

from gim_jax import losses_dense
from gim_jax.models import dkm
from gim_jax.models.dkm_network import COARSE, FINE
from gim_jax.ops.correlation import local_correlation
from gim_jax.ops.resize import resize
from gim_jax.weights.convert import from_torch, torch_key

RULES = [(r"^encoder\.net\.fc\.", None)]  # the official file keeps the ImageNet head
TAPS = {"gps_32", "gps_16", "proj_32", "proj_16", "conv_refiner_16", "conv_refiner_8", "embedding_decoder"}
# of encoder maps, by stride: every n-th channel, every n-th row and column (the cases' notes)
ENCODER_STEPS = {2: (16, 4), 4: (32, 2), 8: (64, 1), 16: (128, 1), 32: (256, 1)}
FLOW_STEPS = {"": {1: 5, 2: 3, 4: 2}, "up_": {1: 7, 2: 4, 4: 2}}


def run(case):
    if "pseudo_labels" in case.inputs:
        return gim_loss(case)
    if "flow_1" in case.inputs:
        return loss_of_flow(case)
    return loss_of_network(case) if "query" in case.inputs else match(case)


def build(case):
    """Make the module and its variables from the rule's weights."""
    settings = case.meta["config"]
    official = case.meta["model"] == "dkm"
    config = dataclasses.replace(
        dkm.CONFIGS["dkm_outdoor" if official else "gim_dkm"],
        size=(settings["w_resized"], settings["h_resized"]) if "w_resized" in settings else (64, 64),
        upsample_size=tuple(settings["upsample_res"][::-1]) if settings.get("upsample_preds") else None,
    )
    module = dkm.DKM(config)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), image, image)
    return module, from_torch(case.state_dict(), template, RULES)


def tensor(image):
    return jnp.asarray(image.reshape(-1, *image.shape[-3:]).astype(np.float32) / np.float32(255))


def match(case):
    """Run both passes on a batch of both directions, tapped on the way."""
    module, variables = build(case)
    config = module.config
    given = [tensor(case.inputs[f"image_{i}"]) for i in "AB"]
    small = [tensor(case.inputs[f"image_{i}_lowres"]) if f"image_{i}_lowres" in case.inputs else None for i in "AB"]

    @jax.jit
    def forward(variables, given, small):
        def tapped(method, *args):
            keep = lambda m, name: name == "__call__" and m.name in TAPS  # noqa: E731
            out, state = module.apply(
                variables, *args, method=method, capture_intermediates=keep, mutable=["intermediates"]
            )
            return out, state["intermediates"]["decoder"]

        def maps_of(images, size):
            images = jnp.concatenate([dkm.prepare(config, i, None, size) for i in images])
            return module.apply(variables, images, method="encode")

        swap = lambda maps: {s: x[::-1] for s, x in maps.items()}  # noqa: E731
        maps = maps_of([g if s is None else s for g, s in zip(given, small)], config.size)
        passes, taps = tapped("decode", maps, swap(maps), maps)
        last, larger = passes[1], {}
        if config.upsample_size:
            large = maps_of(given, config.upsample_size)
            larger, _ = tapped("refine", large, swap(large), passes[1])
            last = larger[1]
        warp, certainty = dkm.assemble(passes[16]["certainty"], last["flow"], last["certainty"])
        if not config.official:
            dark = jnp.concatenate([dkm.black(i, None, last["flow"].shape[1:3]) for i in given], 2)
            certainty = jnp.where(dark, 0, certainty)
        corr = {}
        for scale, radius in zip(FINE, config.radii):
            if radius:
                feat = taps["proj_16"]["__call__"][0] if scale == 16 else maps[scale]
                start = taps["embedding_decoder"]["__call__"][1][0] if scale == 16 else passes[2 * scale]["flow"]
                start = start[..., 1:] if scale == 16 else resize(start, feat.shape[1:3])
                corr[scale] = local_correlation(feat, feat[::-1], start, radius)
        return maps, taps, corr, passes, larger, warp[0], certainty[0]

    out = {}
    maps, taps, corr, passes, larger, warp, certainty = jax.tree.map(np.asarray, forward(variables, given, small))
    nchw = lambda x: (x[..., None] if x.ndim == 3 else x).transpose(0, 3, 1, 2)  # noqa: E731
    for scale, (channel, space) in ENCODER_STEPS.items():
        out[f"enc_{scale}"] = nchw(maps[scale])[:, ::channel, ::space, ::space]
    for scale, channel in ((32, 8), (16, 16)):
        out[f"gp{scale}_sub"] = nchw(taps[f"gps_{scale}"]["__call__"][0])[:, ::channel]
        out[f"proj{scale}_q_sub"] = nchw(taps[f"proj_{scale}"]["__call__"][0])[:, ::32]
    for scale, (prediction, _) in zip(COARSE, taps["embedding_decoder"]["__call__"]):
        out[f"coarse_pred{scale}"] = nchw(prediction)
    for scale, channel in ((16, 25), (8, 7), (4, 5)):
        out[f"local_corr{scale}_sub"] = nchw(corr[scale])[:, ::channel, ::2, ::2]
    for scale in (16, 8):
        displacement, change = taps[f"conv_refiner_{scale}"]["__call__"][0]
        out[f"refiner_out{scale}"] = nchw(np.concatenate([change[..., None], displacement], -1))
    for prefix, predictions in (("", passes), ("up_", larger)):
        for scale, prediction in predictions.items():
            step = FLOW_STEPS[prefix].get(scale, 1)
            for name, value in prediction.items():
                out[f"{prefix}{name}_{scale}"] = nchw(value)[:, :, ::step, ::step]
    stride = case.meta["warp_stride"]
    out["warp_sub"], out["certainty_sub"] = warp[::stride, ::stride], certainty[::stride, ::stride]
    out["certainty_mean"] = certainty.mean(dtype=np.float64)
    return {name: value for name, value in out.items() if name in case.outputs}


def given_predictions(case):
    flows = {int(name[5:]): x for name, x in case.inputs.items() if name.startswith("flow_")}
    return {
        s: {"flow": jnp.moveaxis(jnp.asarray(x), 1, -1), "certainty": jnp.asarray(case.inputs[f"certainty_{s}"])[:, 0]}
        for s, x in flows.items()
    }


def settings_of(case, local_distance):
    c = case.meta["config"]
    names = {"certainty_weight": c["ce_weight"], "local_stride": c["local_largest_scale"]}
    return {**names, "local_distance": local_distance}


def official_targets(case, predictions):
    names = ("query_depth", "support_depth", "T_1to2", "K1", "K2")
    inputs = [jnp.asarray(case.inputs[name]) for name in names]
    return {s: losses_dense.depth_targets(p["certainty"].shape[1:], *inputs) for s, p in predictions.items()}


def parts_of(parts, prefix=""):
    names = (("n_prob", "num_valid"), ("ce_loss", "cross_entropy"), ("depth_loss", "distance"))
    return {f"{prefix}{new}_{s}": part[old] for s, part in parts.items() for new, old in names}


def loss_of_flow(case):
    settings = settings_of(case, case.meta["config"]["local_dist"])

    def loss(predictions):
        return losses_dense.dense_loss(predictions, official_targets(case, predictions), **settings)

    (total, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(given_predictions(case))
    out = {"total_loss": total, **parts_of(parts)}
    for scale, grad in grads.items():
        step = 1 if scale >= 4 else 3
        out[f"grad_flow_{scale}"] = np.moveaxis(np.asarray(grad["flow"]), -1, 1)[:, :, ::step, ::step]
        out[f"grad_certainty_norm_{scale}"] = np.linalg.norm(grad["certainty"])
    return out


def loss_of_network(case):
    module, variables = build(case)
    images = [tensor(case.inputs[name]) for name in ("query", "support")]

    @jax.jit
    def run(params, rest, local_distance):
        def loss(params):
            inputs = [dkm.prepare(module.config, i, None, i.shape[2:0:-1]) for i in images]
            predictions = module.apply({"params": params, **rest}, *inputs)
            targets = official_targets(case, predictions)
            total, parts = losses_dense.dense_loss(predictions, targets, **settings_of(case, local_distance))
            return total, (parts, predictions)

        found, grads = jax.value_and_grad(loss, has_aux=True)(params)
        return found, jax.tree.map(lambda g: jnp.linalg.norm(g.ravel()), grads)

    rest = {name: value for name, value in variables.items() if name != "params"}
    out, predictions = {}, {}
    for prefix, distance in zip(("", "wide_"), case.meta["config"]["local_dist"]):  # the official one, a wide one
        found = jax.tree.map(np.asarray, run(variables["params"], rest, jnp.float32(distance)))
        (total, (parts, predictions)), norms = found
        leaves = jax.tree_util.tree_flatten_with_path(norms)[0]
        named = {torch_key(tuple(key.key for key in path)): value for path, value in leaves}
        out[f"{prefix}total_loss"] = total
        out[f"{prefix}grad_norms"] = np.array([named.get(name, 0.0) for name in case.meta["grad_names"]])
        out |= parts_of(parts, prefix)
    for scale, prediction in predictions.items():
        out[f"flow_{scale}"] = np.moveaxis(prediction["flow"], -1, 1)
        out[f"certainty_{scale}"] = prediction["certainty"][:, None]
    return {name: value for name, value in out.items() if name in case.outputs}


def gim_loss(case):
    """Element by element supervised by depth (gt) or by sparse labels (zs)."""
    batch = {name: jnp.asarray(x) for name, x in case.inputs.items()}
    posed, video = (np.nonzero(case.inputs[name])[0] for name in ("gt", "zs"))
    pick = lambda tree, index: jax.tree.map(lambda x: x[index], tree)  # noqa: E731
    settings = settings_of(case, case.meta["config"]["local_dist"])
    predictions = given_predictions(case)
    shape = predictions[1]["certainty"].shape[1:]
    labels = batch["pseudo_labels"][video]
    weight = settings["certainty_weight"]

    def loss(predictions):
        seen = pick(predictions, posed)
        targets = {
            s: losses_dense.gim_depth_targets(p["certainty"].shape[1:], pick(batch, posed), shape, released=True)
            for s, p in seen.items()
        }
        total, _ = losses_dense.dense_loss(seen, targets, **settings)
        local = {name: value for name, value in settings.items() if name != "certainty_weight"}
        dense = losses_dense.scale_losses(seen, targets, **local)
        mask = (labels != 0).any(-1)
        seen = pick(predictions, video)
        sparse, parts, _ = losses_dense.sparse_loss(seen, labels[..., :2], labels[..., 2:], mask, released=True)
        return (total + sparse) / 2, (dense, parts)

    (total, (dense, parts)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(predictions)
    out = {"loss": total, "Total_Loss": total}
    for scale, part in parts.items():
        out[f"GT_CE_Loss_{scale}"] = dense[scale]["cross_entropy"]
        out[f"GT_Depth_Loss_{scale}"] = losses_dense.masked_mean(dense[scale]["distance"], dense[scale]["valid"])
        out[f"ZS_Depth_Loss_{scale}"] = part["distance"]
        out[f"ZS_CE_Loss_{scale}"] = weight * part["cross_entropy"]
        for name, grad in grads[scale].items():
            out[f"grad_{name}_norm_{scale}"] = np.linalg.norm(np.asarray(grad).reshape(len(grad), -1), axis=1)
    return out
