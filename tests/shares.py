"""What the shares of a context that `cuda_decode.attend` leaves come to, for tests."""


def put_together(left):
    """(rows, heads, size) float64 of (rows, heads, shares, size + cuda.SUMMARY), as `cuda.Shares` has them."""
    size = left.shape[-1] - 8
    values, top, total = left.double().split([size, 1, 7], -1)
    weight = (top - top.amax(2, keepdim=True)).exp()
    return (weight * values).sum(2) / (weight * total[..., :1]).sum(2)
