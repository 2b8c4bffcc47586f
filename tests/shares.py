"""Combine the split-KV partials that `cuda_decode.attend` leaves, for tests."""

SUMMARY = 8  # float32 after the values of a partial: largest score, sum of weights, and six unused


def combine_partials(partials):
    """Combine (rows, heads, splits, size + SUMMARY) to (rows, heads, size) float64; see `cuda_gemv.SplitKvPartials`."""
    size = partials.shape[-1] - SUMMARY
    values, top, total = partials.double().split([size, 1, SUMMARY - 1], -1)
    weight = (top - top.amax(2, keepdim=True)).exp()
    return (weight * values).sum(2) / (weight * total[..., :1]).sum(2)
