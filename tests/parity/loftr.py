"""LoFTR, official and GIM's: forward passes, single layers, losses with gradients."""

from dataclasses import replace

import jax
import numpy as np
from jax import numpy as jnp

from gim_jax import losses, supervision
from gim_jax.models import loftr
from gim_jax.ops import assignment, attention
from gim_jax.ops.pairing import part
from gim_jax.train.objectives import loftr_video
from gim_jax.weights.convert import from_torch, torch_key


def run(case):
    if "full_attention" in case.outputs:
        return layers(case)
    # In float64: the tolerance is ten times the noise of one float32 run, which here and there is far below the usual
    # (of a confidence near 1/2, of a gradient where the sign of a ReLU's input is within rounding error of zero).
    with jax.enable_x64(True):
        if "grad_names" not in case.meta:
            return forward(case)
        return official_loss(case) if "loss_configs" in case.meta else gim_loss(case)


def config_of(case) -> loftr.LoFTRConfig:
    """Translate the official configuration of a case."""
    c = case.meta["config"].get("loftr", case.meta["config"])
    gim = case.meta["model"] == "gim_loftr"
    kinds = lambda names: tuple(names) if isinstance(names, list) else ("self", "cross") * names  # noqa: E731
    dims = c["resnetfpn"]["block_dims"]
    coarse = c["match_coarse"]
    return loftr.LoFTRConfig(
        encoder="resnet50" if gim else "basic",
        in_channels=3 if gim else 1,
        initial_dim=c["resnetfpn"]["initial_dim"],
        block_dims=(128, 196, 256) if gim else tuple(dims),
        num_heads=c["coarse"]["nhead"],
        coarse_layers=kinds(c["coarse"]["layer_names"]),
        fine_layers=kinds(c["fine"]["layer_names"]),
        attention=c["coarse"]["attention"],
        # GIM's training code has the corrected encoding built in, its inference code the other one
        temp_bug_fix=c["coarse"].get("temp_bug_fix", "zs" in case.inputs),
        fine_concat_coarse_feat=c["fine_concat_coarse_feat"],
        fine_window_size=c["fine_window_size"],
        match_type=coarse["match_type"],
        temperature=coarse["dsmax_temperature"],
        skh_iters=coarse["skh_iters"],
        skh_prefilter=coarse["skh_prefilter"],
        thr=coarse["thr"],
        border_rm=coarse["border_rm"],
    )


def build(case, config):
    """Make the module and its variables from the rule's weights, in float64 where that is on."""
    dtype = jnp.zeros(()).dtype
    module = loftr.LoFTR(replace(config, dtype=str(dtype)))
    image = jax.ShapeDtypeStruct((1, 64, 64, config.in_channels), jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), image, image)
    extra = (("coarse_matching.bin_score", (), "float32"),) if config.match_type == "sinkhorn" else ()
    return module, jax.tree.map(lambda x: x.astype(dtype), from_torch(case.state_dict(extra=extra), template))


def images(case, config):
    pair = (case.inputs[k].astype(np.float32) / np.float32(255) for k in ("image0", "image1"))
    return tuple(x if config.in_channels == 3 else x[..., None] for x in pair)


def forward(case):
    config = config_of(case)
    module, variables = build(case, config)
    image0, image1 = images(case, config)
    masks = [case.inputs.get("mask0"), case.inputs.get("mask1")]

    @jax.jit
    def run(variables, image0, image1, masks):
        taps = lambda m, method: method == "__call__" and m.name in ("layers_1", "backbone")  # noqa: E731
        features, state = module.apply(
            variables,
            image0,
            image1,
            *masks,
            method="encode",
            capture_intermediates=taps,
            mutable=["intermediates"],
        )
        bins = module.apply(variables, method="bin_score") if config.match_type == "sinkhorn" else None
        found = loftr.coarse_matches(config, features, *masks, bins)
        matches = found | module.apply(variables, features, *masks, method="match_features")
        matches["cut0"] = module.apply(variables, features, found["cells0"], 0, method="_windows")
        w0, w1 = module.apply(variables, features, found["cells0"], found["cells1"], method="refine")
        matches |= {"w0": w0, "w1": w1, "offset": loftr.fine_offset(w0[:, :, w0.shape[2] // 2], w1)}
        return features, state["intermediates"], bins, matches

    features, taps, bin_score, matches = run(variables, image0, image1, masks)
    matches = jax.tree.map(np.asarray, matches)
    out = {}
    want = case.outputs

    nchw = lambda x: np.asarray(x).transpose(0, 3, 1, 2)  # noqa: E731
    maps = taps["backbone"]["__call__"]
    if len(maps) == 1:  # both images of all pairs at once; in the official batch all first images come first
        maps = [tuple(np.concatenate(part(feature_map)) for feature_map in maps[0])]
    for i, (coarse, fine) in enumerate(maps):
        end = "" if len(maps) == 1 else f"_{i}"
        out["backbone_coarse_sub" + end] = nchw(coarse)[:, ::32]
        out["backbone_fine_sub" + end] = nchw(fine)[:, ::16, ::5, ::5]
    for i, tokens in enumerate(taps["loftr_coarse"]["layers_1"]["__call__"]):
        out[f"coarse_layer1_sub_{i}"] = tokens[:, ::48]
        out[f"coarse_out{i}"] = np.asarray(features[f"coarse{i}"]).reshape(len(image0), -1, tokens.shape[-1])[:, ::24]
    rows, columns = loftr.position_encoding(12, 12, config.block_dims[2], config.temp_bug_fix)
    out["pos_encoding_sub"] = (rows + columns).transpose(2, 0, 1)[:, :12:3, :12:3]

    a, b = loftr.logits(config, features)
    flat = [None if m is None else m.reshape(len(m), -1) for m in masks]
    if config.match_type == "sinkhorn":
        scores = jnp.einsum("blc,bsc->bls", a * config.temperature, b)
        conf = np.array(loftr.transport_confidence(config, scores, bin_score, *flat))
    else:
        conf = np.array(assignment.dual_softmax(jnp.einsum("blc,bsc->bls", a, b), *flat))
    for name, axis in (("row", 2), ("col", 1)):
        out[f"conf_{name}_max"], out[f"conf_{name}_sum"] = conf.max(axis), conf.sum(axis)
        out[f"conf_{name}_argmax"] = best(conf, axis, want[f"conf_{name}_argmax"])
    out["conf_rows"] = conf[:, case.meta["conf_rows_index"]]

    out |= match_list(case, config, features, matches)
    return {name: value for name, value in out.items() if name in want}


def best(conf, axis, expected):
    """Find the best column (row), -1 where even that is tiny; the expected one where it is as good but for noise."""
    top, index = conf.max(axis), conf.argmax(axis)
    there = np.take_along_axis(conf, np.expand_dims(np.maximum(expected, 0), axis), axis).squeeze(axis)
    noise = 5e-4  # relative; |float32 - float64| of the logits is about 1e-4
    tied = (expected >= 0) & (there >= top * (1 - noise))
    tiny = top <= np.where(expected < 0, 1e-3 * (1 + noise), 1e-3)
    return np.where(tied, expected, np.where(tiny, -1, index))


def match_list(case, config, features, matches):
    """Turn padded matches into the official list, ordered by image and cell, scaled to the original images."""
    b, k = np.nonzero(matches["mask"])
    order = np.lexsort((matches["cells0"][b, k], b))
    b, k = b[order], k[order]
    i, j, kpts0, kpts1, conf = (matches[name][b, k] for name in ("cells0", "cells1", "kpts0", "kpts1", "conf"))
    scale0, scale1 = (case.inputs.get(f"scale{s}", np.ones((len(b), 2), np.float32))[b] for s in (0, 1))
    corner0, corner1 = (loftr.cell_points(cells, features[f"coarse{s}"].shape[2]) for s, cells in ((0, i), (1, j)))
    return {
        "b_ids": b,
        "m_bids": b,
        "i_ids": i,
        "j_ids": j,
        "mconf": conf,
        "mkpts0_c": corner0 * scale0,
        "mkpts1_c": corner1 * scale1,
        "mkpts0_f": kpts0 * scale0,
        "mkpts1_f": kpts1 * scale1,
        "fine_windows0": matches["cut0"][b, k][:6, :, ::2],
        "fine_out0": matches["w0"][b, k][:6, :, ::2],
        "fine_out1": matches["w1"][b, k][:6, :, ::2],
        "expec_f": matches["offset"][b, k],
    }


def layers(case):
    """Apply single encoder layers and the two attentions."""
    full = case.state_dict()
    x, y = case.inputs["x"], case.inputs["y"]
    num_heads = case.meta["config"]["nhead"]

    def layer(prefix, x, source, *masks):
        module = loftr.EncoderLayer(x.shape[-1], num_heads, case.meta["config"]["attention"])
        template = jax.eval_shape(module.init, jax.random.key(0), x, source)
        state = {k.removeprefix(prefix): v for k, v in full.items() if k.startswith(prefix)}
        return module.apply(from_torch(state, template), x, source, *masks)

    masks = case.inputs["mask_x"], case.inputs["mask_y"]
    fine_x, fine_y = case.inputs["x_fine"], case.inputs["y_fine"]
    short = [30 * t[:, :10] for t in (x, y, y[::-1])]
    q, k, v = (t.reshape(*t.shape[:2], num_heads, -1) for t in short)
    return {
        "coarse0_self": layer("loftr_coarse.layers.0.", x, x),
        "coarse1_cross": layer("loftr_coarse.layers.1.", x, y),
        "coarse1_cross_masked": layer("loftr_coarse.layers.1.", x, y, *masks),
        "fine0_self": layer("loftr_fine.layers.0.", fine_x, fine_x),
        "fine1_cross": layer("loftr_fine.layers.1.", fine_x, fine_y),
        "linear_attention": attention.linear_attention(q, k, v),
        "full_attention": attention.full_attention(q, k, v),
    }


def torch_flat(path, value):
    """Flatten a gradient in PyTorch's order."""
    if path[-1].key == "kernel":
        value = np.asarray(value).transpose(*range(value.ndim - 1, value.ndim - 3, -1), *range(value.ndim - 2))
    return np.asarray(value).ravel()


def gradients(case, grads):
    """Name gradients as PyTorch does: norms in the case's order, and one by one."""
    leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
    flat = {torch_key(tuple(p.key for p in path)): torch_flat(path, g) for path, g in leaves}
    norms = [np.linalg.norm(flat[name].astype(np.float64)) for name in case.meta["grad_names"]]
    thinned = {name: g[:: max(1, g.size // 200)] for name, g in flat.items()}
    return np.array(norms), {f"grad_sub/{n}": g for n, g in thinned.items() if f"grad_sub/{n}" in case.outputs}


def picked(batch, ids):
    """Pad the list of (image, cell0, cell1) to [B, K] arrays; `place` finds the list's entries in them."""
    b, i, j = (np.asarray(x) for x in ids)
    place = np.zeros(len(b), int)
    for image in range(batch):
        place[b == image] = np.arange((b == image).sum())
    cells = np.zeros((2, batch, place.max() + 1), np.int32)
    cells[0, b, place], cells[1, b, place] = i, j
    return cells[0], cells[1], (b, place)


def targets_of(case, inputs, shape0, shape1, released=False):
    """Compute the supervision and its list form."""
    targets = supervision.coarse_targets(inputs, shape0, shape1, released)
    match1 = np.asarray(targets["match1"])
    b, i = np.nonzero(match1 >= 0)
    ids = {"spv_b_ids": b, "spv_i_ids": i, "spv_j_ids": match1[b, i]}
    return targets, match1, ids


def official_loss(case):
    """Compute the losses of all configurations with their gradients, batch norm in the case's mode."""
    config = config_of(case)
    module, variables = build(case, config)
    image0, image1 = images(case, config)
    masks = [case.inputs.get("mask0"), case.inputs.get("mask1")]
    flat = [None if m is None else m.reshape(len(m), -1) for m in masks]
    grid0, grid1 = ((x.shape[1] // 8, x.shape[2] // 8) for x in (image0, image1))
    targets, match1, out = targets_of(case, case.inputs, grid0, grid1)
    out["spv_w_pt0_i_sub"], out["spv_pt1_i_sub"] = targets["w_pt0"][:, ::4], targets["pt1"][:, ::4]
    given = case.given("b_ids", "i_ids", "j_ids", "gt_mask")
    cells0, cells1, place = picked(len(image0), [given[k] for k in ("b_ids", "i_ids", "j_ids")])
    fine_target = supervision.fine_targets(case.inputs, targets, *(given[k] for k in ("b_ids", "i_ids", "j_ids")))
    out["expec_f_gt"] = fine_target
    train = any(name.startswith("after/") for name in case.outputs)

    def network(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        features, new = module.apply(
            state, image0, image1, *masks, train, method="encode", mutable=["batch_stats"] if train else []
        )
        w0, w1 = module.apply(state, features, cells0, cells1, method="refine")
        offset = loftr.fine_offset(w0[:, :, w0.shape[2] // 2], w1)[place]
        return (*loftr.logits(config, features), offset), new

    def loss(outputs, kind, fine_kind, negatives):
        a, b, offset = outputs
        pos, neg = losses.coarse_loss(a, b, match1, *flat, kind=kind, negatives=negatives, chunk=128)
        fine = losses.fine_loss(offset, fine_target, np.ones(len(offset), bool), fine_kind)
        return pos + neg + fine, (pos + neg, fine)

    # the network and its pull-back are compiled once, the losses are small
    pull_back = jax.jit(lambda params, cotangent: jax.vjp(network, params, has_aux=True)[1](cotangent)[0])
    outputs, new = jax.jit(network)(variables["params"])
    loss_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2, 3))
    a, b, out["expec_f"] = outputs
    for name, official in case.meta["loss_configs"].items():
        official = official["loftr"]
        kind, fine_kind = official["loss"]["coarse_type"], official["loss"]["fine_type"]
        negatives = not official["match_coarse"]["sparse_spvs"]
        (total, (coarse, fine)), cotangent = loss_and_grad(outputs, kind, fine_kind, negatives)
        norms, thinned = gradients(case, pull_back(variables["params"], cotangent))
        out |= {f"{name}_loss": total, f"{name}_loss_c": coarse, f"{name}_loss_f": fine, f"{name}_grad_norms": norms}
        out |= thinned if name == "dense_focal" else {}
    conf = np.asarray(assignment.dual_softmax(jnp.einsum("blc,bsc->bls", a, b), *flat))
    out["conf_row_max"] = conf.max(2)
    out["conf_pos"] = conf[out["spv_b_ids"], out["spv_i_ids"], out["spv_j_ids"]]
    if train:
        stats = jax.tree_util.tree_flatten_with_path(new["batch_stats"])[0]
        after = {f"after/{torch_key(tuple(p.key for p in path))}": v for path, v in stats}
        out |= {k: v for k, v in after.items() if k in case.outputs}
        case.given(*(k for k in case.outputs if k.endswith("num_batches_tracked")))  # a counter nothing reads
    return out


def gim_loss(case):
    """Compute GIM's training loss: a pair with depth and a video pair in one batch."""
    config = config_of(case)
    module, variables = build(case, config)
    image0, image1 = images(case, config)
    grid0, grid1 = ((x.shape[1] // 8, x.shape[2] // 8) for x in (image0, image1))
    gt, zs = (np.nonzero(case.inputs[k])[0] for k in ("gt", "zs"))
    posed = {k: v[gt] for k, v in case.inputs.items()}
    targets, match1, out = targets_of(case, posed, grid0, grid1, released=True)
    given = case.given("b_ids", "i_ids", "j_ids")
    ids = [given[k] for k in ("b_ids", "i_ids", "j_ids")]
    cells0, cells1, place = picked(len(gt), ids)
    fine_target = supervision.fine_targets(posed, targets, *ids)
    labels = case.inputs["pseudo_labels"][zs]
    label_mask = labels.sum(-1) > 0
    kpts0, kpts1 = labels[..., :2], labels[..., 2:]
    masks = case.inputs["mask0"], case.inputs["mask1"]

    def loss(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        features = module.apply(state, image0, image1, *masks, method="encode")
        part = lambda index: {k: v[index] for k, v in features.items()}  # noqa: E731
        a, b = loftr.logits(config, part(gt))
        flat = [m[gt].reshape(len(gt), -1) for m in masks]
        pos, neg = losses.coarse_loss(a, b, match1, *flat, chunk=128)
        w0, w1 = module.apply(state, part(gt), cells0, cells1, method="refine")
        offset_gt = loftr.fine_offset(w0[:, :, w0.shape[2] // 2], w1)[place]
        fine = losses.fine_loss(offset_gt, fine_target, np.ones(len(offset_gt), bool))
        video = loftr_video(module, state, part(zs), kpts0, kpts1, label_mask, *(m[zs] for m in masks))
        total = (pos + video["coarse"]) / 2 + (fine + video["fine"]) / 2
        return total, (pos, neg, fine, offset_gt, video)

    (total, (pos, neg, fine, offset_gt, video)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    norms, thinned = gradients(case, grads)
    b, k = np.nonzero(label_mask)
    return (
        out
        | thinned
        | {
            "loss": total,
            "Total_Loss": total,
            "GroundTruth_Coarse_Positive_Loss": pos,
            "GroundTruth_Coarse_Negative_Loss": neg,
            "GroundTruth_Fine_Loss": fine,
            "Zeroshot_Coarse_Positive_Loss": video["coarse"],
            "Zeroshot_Fine_Loss": video["fine"],
            "grad_norms": norms,
            "expec_f": np.concatenate([offset_gt, video["offset"][b, k]]),
            "expec_f_gt": fine_target,
            "expec_f_zs": video["target"][b, k],
            "zs_b_ids": b,
            "zs_pt0_f_float": kpts0[b, k] / 2,
            "zs_pt1_f_float": kpts1[b, k] / 2,
            "zs_conf_diag": video["conf"][b, k],
        }
    )
