"""Losses of keypoint matchers against loops and closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax import losses


def random_case(seed=0, m=6, n=5):
    rng = np.random.default_rng(seed)
    log_p = np.log(rng.dirichlet(np.ones(n + 1), (2, m + 1)).astype(np.float32))
    matches0 = np.array([[2, -1, -2, 0, -1, -2], [-2] * 6])
    matches1 = np.array([[3, -2, 0, -1, -1], [-1, -2, -2, -2, -2]])
    return log_p, matches0, matches1


@pytest.mark.parametrize("sum_counts", [True, False])
def test_balanced_nll_equals_loops(sum_counts):
    log_p, matches0, matches1 = random_case()
    found = losses.assignment_nll(log_p, matches0, matches1, 0.3, sum_counts)
    for b in range(2):
        pos = [log_p[b, i, j] for i, j in enumerate(matches0[b]) if j >= 0]
        neg0 = [log_p[b, i, 5] for i, j in enumerate(matches0[b]) if j == -1]
        neg1 = [log_p[b, 6, j] for j, i in enumerate(matches1[b]) if i == -1]
        counts = [len(neg0), len(neg1)]
        divisor = max(sum(counts), 1) if sum_counts else max(counts[0], 1) + max(counts[1], 1)
        nll_pos, nll_neg = -sum(pos) / max(len(pos), 1), -(sum(neg0) + sum(neg1)) / divisor
        np.testing.assert_allclose(found["nll_pos"][b], nll_pos, rtol=1e-5)
        np.testing.assert_allclose(found["nll_neg"][b], nll_neg, rtol=1e-5)
        np.testing.assert_allclose(found["nll"][b], 0.3 * nll_pos + 0.7 * nll_neg, rtol=1e-5)


def test_video_loss_reads_the_diagonal_of_labelled_slots():
    log_p, _, _ = random_case()
    mask = jnp.array([[True, False, True], [False, False, False]])
    want = -(log_p[0, 0, 0] + log_p[0, 2, 2]) / 2
    np.testing.assert_allclose(losses.diagonal_nll(log_p, mask), [want, 0], rtol=1e-6)


def test_pairs_of_both_kinds_count_the_same():
    posed, video = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([10.0, 20.0, 40.0, 80.0])
    mixed = losses.mix(posed, video, jnp.array([True, False, False, True]))
    assert (mixed["posed"], mixed["video"], mixed["total"]) == (9 / 4, 60 / 4, 69 / 4)


def test_confidence_is_cross_entropy_with_agreement():
    logits = jnp.array([[2.0, -1.0, 0.5, 30.0]])
    final, layer = jnp.array([[0, 1, 2, 3]]), jnp.array([[0, 1, 0, 0]])
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5])))
    want = -(np.log(p[0]) + np.log(p[1]) + np.log(1 - p[2])) / 3
    found = losses.confidence_bce(logits, layer, final, jnp.array([[True, True, True, False]]))
    np.testing.assert_allclose(found, [want], rtol=1e-5)
    wrong = final[:, :2] + 5
    extreme = losses.confidence_bce(jnp.array([[200.0, -200.0]]), layer[:, :2], wrong, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(extreme, [100.0])


def test_deep_supervision_averages_the_layers():
    """gamma 0.5 of three layers: weights 0.25, 0.5, 1; confidences of the first two."""
    cases = [random_case(seed) for seed in (1, 2, 3)]
    _, matches0, matches1 = cases[0]
    logits = [(np.full((2, 6), 0.3), np.full((2, 5), -0.2))] * 3
    masks = np.ones((2, 6), bool), np.ones((2, 5), bool)
    layers = [(log_p, *zs) for (log_p, _, _), zs in zip(cases, logits)]
    found = losses.lightglue_loss(layers, matches0, matches1, *masks, gamma=0.5)
    nll = [losses.assignment_nll(c[0], matches0, matches1, sum_counts=False)["nll"] for c in cases]
    want = (0.25 * nll[0] + 0.5 * nll[1] + nll[2]) / 1.75
    confidence = 0
    for log_p, z0, z1 in layers[:2]:
        for z, axis in ((z0, 2), (z1, 1)):
            best = [p[:, :-1].argmax(2) if axis == 2 else p[:, :, :-1].argmax(1) for p in (log_p, cases[-1][0])]
            agree = (best[0] == best[1]).astype(float)
            confidence += (np.log1p(np.exp(z)) - agree * z).mean(1) / 4
    np.testing.assert_allclose(found["confidence"], confidence, rtol=1e-5)
    np.testing.assert_allclose(found["total"], want + confidence, rtol=1e-5)
    np.testing.assert_allclose(found["last"], nll[2], rtol=1e-6)
