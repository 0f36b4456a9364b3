"""PAA against a loop written from algorithm 1 of the paper, with scikit-learn's mixture."""

import pytest
import torch

from co_detr.modeling.auxiliary import PAAAssigner
from co_detr.modeling.auxiliary.assigners import fit_mixtures
from tests.modeling.dense_cases import grid_anchors, make_gts

LEVELS = grid_anchors()
SIZES = [len(level) for level in LEVELS]


def sklearn_mixture(losses):
    mixture = pytest.importorskip("sklearn.mixture").GaussianMixture(
        2,
        covariance_type="diag",
        weights_init=[0.5, 0.5],
        means_init=[[min(losses)], [max(losses)]],
        precisions_init=[[1.0], [1.0]],
    )
    return mixture.fit([[loss] for loss in losses])


def naive_select(truths, levels, losses, topk):
    """Which candidates are positives, and the ground truths whose choice hangs on rounding."""
    positive, uncertain = [False] * len(truths), set()
    for truth in sorted(set(truths)):
        kept = []
        for level in sorted(set(levels)):
            mine = [i for i in range(len(truths)) if (truths[i], levels[i]) == (truth, level)]
            kept += sorted(mine, key=lambda i: losses[i])[:topk]
        kept.sort(key=lambda i: losses[i])
        if len(kept) == 1:
            positive[kept[0]] = True
            continue
        values = [[losses[i]] for i in kept]
        mixture = sklearn_mixture([losses[i] for i in kept])
        shares, density = mixture.predict_proba(values)[:, 0], mixture.score_samples(values)
        first = [n for n in range(len(kept)) if shares[n] >= 0.5]
        last = max(first, key=lambda n: density[n]) if first else len(kept) - 1
        near = [n for n in first if n != last and abs(density[n] - density[last]) < 1e-6]
        if near or any(abs(share - 0.5) < 1e-6 for share in shares):
            uncertain.add(truth)
        for i in kept[: last + 1]:
            positive[i] = True
    return positive, uncertain


def make_losses(number, seed):
    """Losses as a head has them: a few low ones, most high."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(number, generator=generator) < 0.3
    spread = torch.rand(number, generator=generator)
    return torch.where(low, 0.4 + spread, 2.0 + 2 * spread)


@pytest.mark.parametrize("kind", ["random", "none", "tiny", "overlapping", "duplicates", "outside"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(kind, seed):
    pytest.importorskip("sklearn.mixture")
    assigner = PAAAssigner(topk=5)
    assigned = assigner(LEVELS, make_gts(kind, seed))
    level_of = torch.cat([torch.full((size,), i) for i, size in enumerate(SIZES)])
    candidate = assigned >= 0
    truths, levels = assigned[candidate], level_of[candidate]
    losses = make_losses(len(truths), seed)
    chosen = assigner.select(truths, levels, losses)
    expected, uncertain = naive_select(truths.tolist(), levels.tolist(), losses.tolist(), topk=5)
    certain = torch.tensor([truth not in uncertain for truth in truths.tolist()], dtype=torch.bool)
    assert torch.equal(chosen[certain], torch.tensor(expected, dtype=torch.bool)[certain])
    if kind == "none":
        assert len(chosen) == 0
    else:
        assert certain.float().mean() > (0.5 if kind == "tiny" else 0.8)
        # Every ground truth with candidates keeps one.
        assert set(truths[chosen].tolist()) == set(truths.tolist())
        assert kind == "tiny" or not chosen.all()


def test_a_single_candidate_is_positive():
    one = torch.tensor([0])
    assert PAAAssigner().select(one, one, torch.tensor([3.0])).tolist() == [True]


def test_equal_losses_are_all_positive():
    zeros = torch.zeros(4, dtype=torch.long)
    assert PAAAssigner().select(zeros, zeros, torch.full((4,), 2.0)).sum() >= 1


def test_two_heaps_are_told_apart():
    losses = torch.tensor([0.9, 5.0, 1.0, 5.2, 1.1, 5.1, 0.95, 4.9])
    zeros = torch.zeros(8, dtype=torch.long)
    chosen = PAAAssigner().select(zeros, zeros, losses)
    assert chosen[[0, 6]].all() and not chosen[losses > 4].any()


@pytest.mark.parametrize("count", [2, 3, 9, 45])
def test_mixtures_are_those_of_scikit_learn(count):
    pytest.importorskip("sklearn.mixture")
    rows = torch.stack([make_losses(count, seed) for seed in range(20)]).double()
    padded = torch.cat([rows, torch.full((20, 3), 7.0)], dim=1)
    valid = torch.arange(count + 3).expand_as(padded) < count
    fitted = fit_mixtures(padded, valid)
    log_densities = fitted.log_densities(rows).logsumexp(-1)
    for row, values in enumerate(rows.tolist()):
        expected = sklearn_mixture(values)
        for ours, theirs in (
            (fitted.weights, expected.weights_),
            (fitted.means, expected.means_[:, 0]),
            (fitted.variances, expected.covariances_[:, 0]),
            (log_densities, expected.score_samples([[value] for value in values])),
        ):
            torch.testing.assert_close(ours[row], torch.as_tensor(theirs), rtol=1e-6, atol=1e-8)
