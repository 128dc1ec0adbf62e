"""Training losses, in float32, pure functions of network outputs and labels. Labels: -1 unmatched, -2 ignore.

LoFTR's coarse loss never forms the matrix of all confidences: `log conf_ij = 2 a_i.b_j - row_i - column_j` needs the
log-sum-exp of rows and columns only, which are streamed, forward and backward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gim_jax.ops import assignment, sampling
from gim_jax.ops.precision import at_least_float32
from gim_jax.supervision import UNMATCHED

EPS = 1e-6  # LoFTR's confidences are kept in [EPS, 1 - EPS], as in the official code


def assignment_nll(log_assignment, matches0, matches1, balancing: float = 0.5, sum_counts: bool = True):
    """Negative log-likelihood of a partial assignment, matched and unmatched points averaged apart.

    Args:
      log_assignment: [B, M+1, N+1], with dustbins.
      matches0: [B, M] int, index of the match in image 1, -1 unmatched, -2 ignored (also for masked slots).
      matches1: [B, N] int.
      balancing: weight of the matched points.
      sum_counts: divide the unmatched part by max(count0 + count1, 1) (SuperGlue in glue-factory) or by
        max(count0, 1) + max(count1, 1) (LightGlue).

    Returns:
      dict of [B] arrays: nll, nll_pos, nll_neg, num_matchable, num_unmatchable.

    Source: SuperGlue eq. 10, balanced as in LightGlue eq. 11 and glue-factory.
    """
    inner = log_assignment[:, :-1, :-1]
    positive = matches0 >= 0
    at_match = jnp.take_along_axis(inner, jnp.maximum(matches0, 0)[..., None], axis=2)[..., 0]
    nll_pos = -jnp.where(positive, at_match, 0.0).sum(1)
    num_pos = jnp.maximum(positive.sum(1), 1).astype(jnp.float32)
    negative0, negative1 = matches0 == UNMATCHED, matches1 == UNMATCHED
    nll_neg = -jnp.where(negative0, log_assignment[:, :-1, -1], 0.0).sum(1)
    nll_neg -= jnp.where(negative1, log_assignment[:, -1, :-1], 0.0).sum(1)
    count0, count1 = negative0.sum(1), negative1.sum(1)
    if sum_counts:
        num_neg = jnp.maximum(count0 + count1, 1)
    else:
        num_neg = jnp.maximum(count0, 1) + jnp.maximum(count1, 1)
    num_neg = num_neg.astype(jnp.float32)
    nll_pos, nll_neg = nll_pos / num_pos, nll_neg / num_neg
    return {
        "nll": balancing * nll_pos + (1 - balancing) * nll_neg,
        "nll_pos": nll_pos,
        "nll_neg": nll_neg,
        "num_matchable": num_pos,
        "num_unmatchable": num_neg,
    }


def diagonal_nll(log_assignment, mask):
    """Loss of video pairs for keypoint matchers: keypoint i of image 0 belongs to keypoint i of image 1.

    Args:
      log_assignment: [B, M+1, N+1], of keypoints of which the first are the labels, in the same order.
      mask: [B, K] bool, K <= min(M, N): slots that hold a label.

    Returns:
      [B] mean of -log P[i, i]; 0 without labels. There are no negatives (GIM's training code).
    """
    diagonal = jnp.diagonal(log_assignment[:, :-1, :-1], axis1=1, axis2=2)[:, : mask.shape[1]]
    return -jnp.where(mask, diagonal, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def mix(posed, video, is_posed):
    """Mix the two kinds of pairs in a batch: each pair counts the same (GIM's training code).

    Args:
      posed, video: [B] losses of each pair, taken as one kind and as the other; is_posed: [B] bool, which it is.

    Returns:
      dict of scalars total = posed + video, and these two shares.
    """
    posed = jnp.where(is_posed, posed, 0.0).mean()
    video = jnp.where(is_posed, 0.0, video).mean()
    return {"total": posed + video, "posed": posed, "video": video}


def confidence_bce(logits, layer, final, mask):
    """Train a layer's confidence: does its best guess equal the last layer's (LightGlue eq. 12)?

    Args:
      logits: [B, M] of the confidence; layer, final: [B, M] int best column, dustbin included; mask: [B, M] bool.

    Returns:
      [B] mean binary cross-entropy over valid points.
    """
    target = (layer == final).astype(jnp.float32)
    bce = jnp.logaddexp(0.0, logits) - target * logits
    return jnp.where(mask, bce, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def lightglue_loss(layers, matches0, matches1, mask0, mask1, balancing: float = 0.5, gamma: float = 1.0):
    """Deep supervision of LightGlue on pairs with ground truth.

    Args:
      layers: list, first to last, of (log_assignment [B, M+1, N+1], logits0 [B, M], logits1 [B, N]); the
        confidence logits of the last layer are not used.
      matches0, matches1: labels, see `assignment_nll`.
      mask0: [B, M], mask1: [B, N] bool valid points.
      gamma: weight of layer i is gamma^(L - i - 1).

    Returns:
      dict of [B] arrays: total, last (nll of the last layer), confidence, row_norm and those of `assignment_nll`.

    Source: LightGlue section 3.4; weights and normalisation of glue-factory and GIM's training code.
    """
    final = layers[-1][0]
    last = assignment_nll(final, matches0, matches1, balancing, sum_counts=False)
    total, weights, confidence = last["nll"], 1.0, 0.0
    best0, best1 = final[:, :-1].argmax(2), final[:, :, :-1].argmax(1)
    for i, (log_p, logits0, logits1) in enumerate(layers[:-1]):
        weight = gamma ** (len(layers) - i - 1)
        total += weight * assignment_nll(log_p, matches0, matches1, balancing, sum_counts=False)["nll"]
        weights += weight
        bce0 = confidence_bce(logits0, log_p[:, :-1].argmax(2), best0, mask0)
        bce1 = confidence_bce(logits1, log_p[:, :, :-1].argmax(1), best1, mask1)
        confidence += (bce0 + bce1) / 2 / (len(layers) - 1)
    sums = jnp.where(mask0, jnp.exp(final[:, :-1]).sum(2), 0.0).sum(1) / jnp.maximum(mask0.sum(1), 1)
    return {
        **last,
        "total": total / weights + confidence,
        "last": last["nll"],
        "confidence": jnp.broadcast_to(confidence, total.shape),
        "row_norm": jax.lax.stop_gradient(sums),
    }


def focal(conf, positive: bool, kind: str = "focal", alpha: float = 0.25, gamma: float = 2.0):
    """Score confidences of true (or false) matches: "focal" loss or "cross_entropy" (LoFTR section 3.5)."""
    conf = jnp.clip(conf, EPS, 1 - EPS)
    right = conf if positive else 1 - conf
    loss = -jnp.log(right)
    return loss if kind == "cross_entropy" else alpha * (1 - right) ** gamma * loss


def masked_mean(values, mask, axis=None):
    """Average `values` where `mask`; 0 where nothing is valid."""
    return jnp.where(mask, values, 0).sum(axis) / jnp.maximum(mask.sum(axis), 1)


def coarse_loss(a, b, match1, mask0=None, mask1=None, *, kind="focal", negatives=True, chunk=256):
    """Train the coarse confidences with known matches (LoFTR section 3.5, `src/losses/loftr_loss.py`).

    Args:
      a: [B, L, C], b: [B, S, C] float32 tokens whose products are logits, see `gim_jax.models.loftr.logits`.
      match1: [B, L] int, the true column of each row, -1 = none; a column is true for one row at most.
      mask0: [B, L], mask1: [B, S] bool, valid cells.
      kind: "focal" or "cross_entropy". negatives: also push down all other pairs.
      chunk: rows at a time; the peak of memory is a few [B, chunk, S] arrays.

    Returns:
      (positive, negative) scalars: means over true and over all other pairs; pairs with a masked cell add
      nothing but count, as in the official code.
    """
    batch, num0, _ = a.shape
    num1 = b.shape[1]
    valid0 = jnp.ones((batch, num0), bool) if mask0 is None else mask0
    valid1 = jnp.ones((batch, num1), bool) if mask1 is None else mask1
    rows = assignment.row_logsumexp(a, b, mask1, chunk)
    columns = assignment.row_logsumexp(b, a, mask0, chunk)

    true = match1 >= 0
    column = jnp.maximum(match1, 0)
    at = lambda x: jnp.take_along_axis(x, column, axis=1)  # noqa: E731
    counted = true & valid0 & at(valid1)
    product = (a * jnp.take_along_axis(b, column[..., None], axis=1)).sum(-1)
    log_conf = jnp.where(counted, 2 * product - rows - at(columns), 0)
    positive = jnp.where(counted, focal(jnp.exp(log_conf), True, kind), 0).sum() / jnp.maximum(true.sum(), 1)
    if not negatives:
        return positive, jnp.zeros(())

    @jax.checkpoint
    def row_sums(piece):
        part, lse, match, valid = piece
        counted = valid[..., None] & valid1[:, None] & (match[..., None] != jnp.arange(num1))
        log_conf = 2 * jnp.einsum("bmc,bnc->bmn", part, b) - lse[..., None] - columns[:, None]
        conf = jnp.exp(jnp.where(counted, log_conf, 0))
        return jnp.where(counted, focal(conf, False, kind), 0).sum(-1)

    sums = assignment.map_rows(row_sums, (a, rows, match1, valid0), chunk)
    others = float(batch * num0 * num1) - true.sum()  # a batch of 64 at 840x840 has more pairs than an int32 counts
    negative = sums.sum() / jnp.maximum(others, 1)
    return positive, negative


def fine_loss(offset, target, mask, kind: str = "l2_with_std", correct_thr: float = 1.0):
    """Train the refined positions, certain ones more (LoFTR section 3.5).

    Args:
      offset: [..., 3] x, y and spread of the prediction, +-1 = border of the window. target: [..., 2].
      mask: [...] bool, matches that exist. kind: "l2_with_std" or "l2".
      correct_thr: targets as far from the centre belong to wrong coarse matches and are left out.
    """
    correct = mask & (jnp.abs(target).max(-1) < correct_thr)
    error = jnp.square(target - offset[..., :2]).sum(-1)
    if kind == "l2_with_std":
        certainty = 1 / jnp.maximum(offset[..., 2], 1e-10)
        error = error * jax.lax.stop_gradient(certainty / jnp.maximum(masked_mean(certainty, mask), 1e-10))
    return masked_mean(error, correct)


def zero_shot_log_conf(coarse0, coarse1, kpts0, kpts1, mask, mask0=None, mask1=None, temperature=0.1, chunk=512):
    """Compute the log-confidence of sparse correspondences against each other and against all cells.

    The features of a correspondence are interpolated between coarse cells. Beside the sampled points all
    cells of both grids compete, so that a point far from any correspondence still counts as wrong (GIM's
    training code, `zeroshot_coarse_matching`).

    Args:
      coarse0, coarse1: [B, h, w, C] coarse features after attention. kpts0, kpts1: [B, M, 2] px of the
      network's images.
      mask: [B, M] bool. mask0, mask1: [B, h, w] bool, valid cells.

    Returns:
      log_conf [B, M], and mask [B, M] without the points beyond the centres of the outer cells.
    """
    channels = coarse0.shape[-1]
    scale = 1 / (channels * temperature)
    sampled, tokens, valid = [], [], []
    for coarse, kpts, cells in ((coarse0, kpts0, mask0), (coarse1, kpts1, mask1)):
        coarse = at_least_float32(coarse)
        height, width = coarse.shape[1:3]
        points = kpts / 8
        mask &= ((points >= 0) & (points <= jnp.asarray([width - 1, height - 1]))).all(-1)
        sampled.append(sampling.bilinear(coarse, points))
        tokens.append(coarse.reshape(coarse.shape[0], -1, channels))
        valid.append(jnp.ones(tokens[-1].shape[:2], bool) if cells is None else cells.reshape(cells.shape[0], -1))

    def lse(side):
        other = 1 - side
        candidates = jnp.concatenate([sampled[other], tokens[other]], axis=1)
        keep = jnp.concatenate([mask, valid[other]], axis=1)
        return assignment.row_logsumexp(sampled[side] * scale, candidates, keep, chunk)

    log_conf = 2 * scale * (sampled[0] * sampled[1]).sum(-1) - lse(0) - lse(1)
    return jnp.where(mask, log_conf, 0), mask


def zero_shot_coarse_loss(log_conf, mask, floor: float = EPS, alpha: float = 0.25, gamma: float = 2.0):
    """Average the positive focal loss over the correspondences of each pair, then over pairs that have any.

    Args:
      log_conf, mask: [B, M], see `zero_shot_log_conf`.
      floor: confidences below it have no gradient, as in the official code; two softmaxes over a thousand cells
        start near 1e-6, so that a network learns faster from scratch with 0.
    """
    if floor:
        log_conf = jnp.log(jnp.clip(jnp.exp(log_conf), floor, 1 - floor))
    loss = -alpha * (1 - jnp.exp(log_conf)) ** gamma * log_conf
    return masked_mean(masked_mean(loss, mask, axis=-1), mask.any(-1))


def zero_shot_fine_cells(kpts, width: int):
    """Find the coarse cell nearest to points [..., 2] px and the place in its fine window.

    Returns:
      cells [...] int32 (y * width + x), place [..., 2] in fine cells (2 px) from the centre of the window.
    """
    cell = jnp.round(kpts / 8)
    index = (cell[..., 1] * width + cell[..., 0]).astype(jnp.int32)
    return index, kpts / 2 - cell * 4


def window_query(windows, place):
    """Interpolate windows [..., W * W, C] at `place` [..., 2] (x, y), cells from the centre; zero outside."""
    size = round(windows.shape[-2] ** 0.5)
    at = place[..., None, :] + size // 2
    hat = jnp.maximum(0, 1 - jnp.abs(at - jnp.arange(size)[:, None]))  # [..., size, 2]
    weights = hat[..., :, None, 1] * hat[..., None, :, 0]
    return jnp.einsum("...w,...wc->...c", weights.reshape(*place.shape[:-1], -1), at_least_float32(windows))
