"""Solutions of the cells that readers of the notebooks write, in the order of the notebooks."""

import littlebit.reference as ref
import numpy as np


def error_after_cut(s, rank):
    """01: relative error of the best approximation of this rank."""
    return np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())


def rank_in_16_bits(d_out, d_in, bits):
    """01: largest rank that a budget buys in 16-bit numbers."""
    return int(bits * d_out * d_in / (16 * (d_out + d_in)))


def best_scale(w):
    """02: the alpha that makes ||W - alpha sign(W)|| smallest."""
    return np.abs(w).mean()


def energy_of_signs(w):
    """02: share of the energy that signs and the best scale keep."""
    return np.abs(w).mean() ** 2 / (w**2).mean()


def dense_of_path(u, v, h, ell, g):
    """03: the matrix that a path stands for."""
    return (h[:, None] * np.where(u < 0, -1, 1) * ell) @ (g[:, None] * np.where(v < 0, -1, 1)).T


def law_of_two_signs(t):
    """03: error of Dual-SVID from the error t of the truncated SVD."""
    return np.sqrt(t**2 + (1 - t**2) * (1 - (2 / np.pi) ** 2))


def two_paths(weight, rank):
    """04: the sum of a path and of a path for what it misses."""
    first = ref.dual_svid(weight, rank).to_dense()
    return first + ref.dual_svid(weight - first, rank).to_dense()


def share_of_scales(d_out, d_in, bits):
    """04: share of a budget that the scales h and g of one path take."""
    return 16 * (d_out + d_in) / (bits * d_out * d_in)


def count_path_bits(d_out, d_in, rank):
    """05: bits of a path whose rows fill whole words."""
    return rank * (d_out + d_in) + 16 * (d_out + d_in + rank)


def rank_within(d_out, d_in, bits):
    """05: largest rank of one path within a budget, without padding."""
    return int((bits * d_out * d_in - 16 * (d_out + d_in)) // (d_out + d_in + 16))


def nearest_rotation(z, b):
    """06: the rotation R for which z R is nearest to the signs b."""
    p, _, qt = np.linalg.svd(b.T @ z)
    return qt.T @ p.T


def agreement(z, rotation):
    """06: <sign(Z R), Z R>, which Joint-ITQ makes larger."""
    return np.abs(z @ rotation).sum()


def slope_of_tanh(x):
    """07: derivative of tanh(100 x)."""
    return 100 * (1 - np.tanh(100 * x) ** 2)


def gradient_of_scale(x, path, dy):
    """07: gradient of the latent scale ell."""
    s = (x * path.g) @ path.v_sign
    return ((dy * path.h) @ path.u_sign * s).sum(axis=0)


def gradient_of_kl(student_logits, teacher_logits):
    """08: gradient of the mean KL divergence by the student's logits."""
    q, p = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True) for z in (student_logits, teacher_logits))
    return (q - p) / len(q)


def flipped_share(before, after):
    """08: share of signs that differ."""
    return np.mean((before < 0) != (after < 0))


def pack_byte(signs):
    """09: eight signs as one number, bit 1 for -1, the first sign in the lowest bit."""
    return sum(2**k for k, sign in enumerate(signs) if sign < 0)


def sum_with_signs(word, x):
    """09: the sum of x with the signs that a word holds."""
    negative = word >> np.arange(len(x)) & 1
    return x.sum() - 2 * x[negative == 1].sum()


def sixteen_sums(x):
    """10: the signed sums of four numbers, by the code of their signs."""
    return np.array([sum(-v if code >> k & 1 else v for k, v in enumerate(x)) for code in range(16)])


def look_up(codes, tables):
    """10: the sum of one entry of each group's table, for each row of codes."""
    return sum(tables[group][codes[:, group]] for group in range(len(tables)))


def butterfly(lanes):
    """11: every lane's sum after five exchanges."""
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[np.arange(32) ^ distance]
    return lanes


def bit_planes(q):
    """11: plane p holds bit p of q + 128."""
    return np.array([(q + 128) >> p & 1 for p in range(8)])


def mean_value(p, latents, up):
    """12: the mean of up @ latent over tokens, with one product by `up`."""
    return up @ (p @ latents)


def times_smaller(d_kv, rank):
    """12: how many times fewer numbers a cache of latents holds."""
    return d_kv / rank


def perplexity_of(log_p):
    """13: perplexity of a text from the log-likelihoods of its tokens."""
    return np.exp(-log_p.mean())


def bits_per_parameter(file_bytes, parameters):
    """13: stored bits for each parameter."""
    return 8 * file_bytes / parameters


def mirror_of(x):
    """14: the unit normal of the mirror that maps x to a multiple of the first axis."""
    w = x.copy()
    w[0] += np.copysign(np.linalg.norm(x), x[0])
    return w / np.linalg.norm(w)


def cosine_with_signs(u):
    """14: the cosine of the angle between a vector and its signs."""
    return np.abs(u).sum() / np.sqrt(len(u)) / np.linalg.norm(u)


def flips_per_latent(history):
    """15: how often the sign of each latent changed."""
    negative = history < 0
    return (negative[1:] != negative[:-1]).sum(0)


def first_move(grad, lr, eps):
    """15: the first step of Adam, in which both means are the gradient's own."""
    return -lr * grad / (np.abs(grad) + eps)


def past_only(scores):
    """16: softmax of each row over its columns up to the diagonal."""
    powers = np.tril(np.exp(scores))
    return powers / powers.sum(1, keepdims=True)


def recipe_loss(kl, mine, theirs):
    """16: the paper's loss from KL and the hidden states of the blocks, (blocks, n) each."""
    return kl + 10 * sum(np.mean((a - b) ** 2) for a, b in zip(mine, theirs, strict=True))


def absmax_codes(w, bits):
    """17: the whole numbers to which absmax rounds, with one step for each row."""
    step = np.abs(w).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(w / step)


def pass_on(rest, lost, row):
    """17: GPTQ's later columns after the error of one."""
    return rest - np.outer(lost / row[0], row[1:])
