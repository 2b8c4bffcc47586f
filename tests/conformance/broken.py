"""Backends with one mistake each: every law catches its own.

Each is `littlebit.reference`, with the reader and writer of `checkpoint`, and one function replaced.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from littlebit import reference as ref
from littlebit.reference import Factors, Latents, PackedFactors, packing
from littlebit.reference.residual import best_step

from . import checkpoint, exact


class Mistake(NamedTuple):
    """Hold a mistake: what is wrong, and the functions that make it."""

    what: str
    functions: dict[str, Callable[..., Any]]


def correct() -> ModuleType:
    """Make a backend without a mistake, which has every function that a law needs."""
    module = ModuleType("correct")
    vars(module).update({name: value for name, value in vars(ref).items() if not name.startswith("_")})
    vars(module).update(read_layers=checkpoint.read_layers, write_layers=checkpoint.write_layers)
    return module


def backend(law: str) -> ModuleType:
    """Make the backend whose mistake a law is to catch."""
    module = correct()
    module.__name__ = f"broken_{law.replace('.', '_')}"
    vars(module).update(MISTAKES[law].functions)
    return module


def with_bytes(words: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Change the bytes of words."""
    return change(np.ascontiguousarray(words).reshape(-1).view(np.uint8)).view(words.dtype).reshape(words.shape)


def reversed_bits(signs: np.ndarray) -> np.ndarray:
    """Pack with the most significant bit of each byte first."""
    return with_bytes(
        ref.pack_signs(signs), lambda o: np.packbits(np.unpackbits(o, axis=-1)[..., ::-1], axis=-1)[..., ::-1]
    )


def in_wide_words(signs: np.ndarray) -> np.ndarray:
    """Pack every row in 32-bit words."""
    count = signs.shape[-1]
    padded = np.concatenate([signs, np.ones((*signs.shape[:-1], max(17 - count, 0)), signs.dtype)], axis=-1)
    return ref.pack_signs(padded)


def off_by_one_padding(signs: np.ndarray) -> np.ndarray:
    """Set the first pad bit."""
    words, count = ref.pack_signs(signs), signs.shape[-1]
    width = 8 * words.itemsize
    if count % width:
        words[..., -1] |= words.dtype.type(1 << count % width)
    return words


def pack_zero_as_negative(signs: np.ndarray) -> np.ndarray:
    """Take the sign of 0 for -1."""
    return ref.pack_signs(np.where(signs == 0, -1, signs))


def unpack_last_word_first(words: np.ndarray, count: int) -> np.ndarray:
    """Read the words of a row from the last to the first."""
    ref.unpack_signs(words, count)
    return exact.unpack(words[..., ::-1], count).astype(np.float32)


def unpack_one_late(words: np.ndarray, count: int) -> np.ndarray:
    """Read the last sign of a row as +1."""
    signs = ref.unpack_signs(words, count)
    signs[..., -1] = 1
    return signs


def unpack_unchecked(words: np.ndarray, count: int) -> np.ndarray:
    """Read signs, whatever the pad bits are."""
    packing.check_words(words, count)
    return exact.unpack(words, count).astype(np.float32)


def unpack_any_words(words: np.ndarray, count: int) -> np.ndarray:
    """Read signs from words of any number and width."""
    bits = packing.row_bits(words)[..., :count]
    if packing.row_bits(words)[..., count:].any():
        raise ValueError("a pad bit is set")
    return 1 - 2 * bits.astype(np.float32)


def pack_v_by_rows(path: Factors) -> PackedFactors:
    """Pack V along the rank, as U is."""
    return ref.pack_factors(path)._replace(v_words=ref.pack_signs(path.v))


def cut_scales(path: Factors) -> PackedFactors:
    """Round scales towards zero."""
    packed = ref.pack_factors(path)

    def cut(half: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.where(np.abs(half) > np.abs(scale), np.nextafter(half, np.float16(0)), half)

    return packed._replace(**{name: cut(getattr(packed, name), getattr(path, name)) for name in ("h", "ell", "g")})


def pack_infinite_scales(path: Factors) -> PackedFactors:
    """Store infinity where a scale does not fit."""
    with np.errstate(over="ignore"):
        halves = (scale.astype(np.float16) for scale in (path.h, path.ell, path.g))
        return PackedFactors(ref.pack_signs(path.u), ref.pack_signs(path.v.T), *halves)


def unpack_v_by_rank(packed: PackedFactors) -> Factors:
    """Return V with one row for each latent."""
    factors = ref.unpack_factors(packed)
    return factors._replace(v=factors.v.T)


def computed(x: np.ndarray, paths: list[Factors], bias: np.ndarray | None, change: Callable) -> np.ndarray:
    """Compute a layer whose steps `change` may replace: change(step, value) for x, each path and each sum."""
    y: Any = 0
    for path in (change("path", each) for each in paths):
        t = change("sum", (change("x", x) * path.g) @ exact.signs_of(path.v).astype(path.g.dtype))
        y = y + change("sum", (t * path.ell) @ exact.signs_of(path.u).T.astype(path.g.dtype)) * path.h
    return change("y", y if bias is None else y + bias)


def layer(**changes: Callable) -> dict[str, Callable]:
    """Make `linear` and `packed_linear` with changed steps."""

    def change(step: str, value: Any) -> Any:
        return changes[step](value) if step in changes else value

    def linear(x: np.ndarray, paths: list[Factors], bias: np.ndarray | None = None) -> np.ndarray:
        check_width(x, paths)
        return computed(x, paths, bias, change)

    def packed_linear(x: np.ndarray, paths: list[PackedFactors], bias: np.ndarray | None = None) -> np.ndarray:
        check_width(x, paths)
        return computed(x.astype(np.float32), [ref.unpack_factors(path) for path in paths], bias, change)

    return {"linear": linear, "packed_linear": packed_linear}


def check_width(x: np.ndarray, paths: list) -> None:
    """Raise ValueError unless the last axis of x is d_in."""
    if x.shape[-1] != paths[0].g.shape[-1]:
        raise ValueError(f"the input's last axis must be {paths[0].g.shape[-1]}, got {x.shape}")


def one_wrong_sign(path: Factors) -> Factors:
    """Flip the last sign of U."""
    u = exact.signs_of(path.u).astype(path.u.dtype)
    u[-1, -1] *= -1
    return path._replace(u=u)


def last_sign_lost(path: Factors) -> Factors:
    """Read the last sign of each row of V as +1, as an off-by-one in the last word does."""
    v = path.v.copy()
    v[-1] = 1
    return path._replace(v=v)


def without(name: str) -> Callable[[Factors], Factors]:
    """Make a change that forgets a scale vector."""
    return lambda path: path._replace(**{name: np.ones_like(getattr(path, name))})


def first_path_only(function: str) -> Callable[..., np.ndarray]:
    """Make a layer that computes its first path only."""

    def call(x: np.ndarray, paths: list, bias: np.ndarray | None = None) -> np.ndarray:
        return getattr(ref, function)(x, paths[:1], bias)

    return call


def bias_in_every_path(function: str) -> Callable[..., np.ndarray]:
    """Make a layer that adds the bias to each path."""

    def call(x: np.ndarray, paths: list, bias: np.ndarray | None = None) -> np.ndarray:
        return np.sum([getattr(ref, function)(x, [path], bias) for path in paths], axis=0)

    return call


def flat_batch(function: str) -> Callable[..., np.ndarray]:
    """Make a layer that returns all batch axes as one."""

    def call(x: np.ndarray, paths: list, bias: np.ndarray | None = None) -> np.ndarray:
        y = getattr(ref, function)(x, paths, bias)
        return y.reshape(-1, y.shape[-1])

    return call


def cut_input(function: str) -> Callable[..., np.ndarray]:
    """Make a layer that ignores what is beyond d_in."""

    def call(x: np.ndarray, paths: list, bias: np.ndarray | None = None) -> np.ndarray:
        return getattr(ref, function)(x[..., : paths[0].g.shape[-1]], paths, bias)

    return call


def in_place(function: str) -> Callable[..., np.ndarray]:
    """Make a layer that doubles its input."""

    def call(x: np.ndarray, paths: list, bias: np.ndarray | None = None) -> np.ndarray:
        y = getattr(ref, function)(x, paths, bias)
        x *= 2
        return y

    return call


def shared_scale(x: np.ndarray) -> np.ndarray:
    """Divide by the largest entry of all rows and multiply again, as a quantized input might be."""
    largest = np.abs(x).max(initial=1.0)
    return x / largest * largest


def in_bfloat16(y: np.ndarray) -> np.ndarray:
    """Cut a float32 output to bfloat16's 8 bits."""
    return (np.asarray(y, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def half_sum(total: np.ndarray) -> np.ndarray:
    """Round a sum to float16."""
    with np.errstate(over="ignore"):
        return total.astype(np.float16).astype(total.dtype)


def gradient(**changes: Callable) -> dict[str, Callable]:
    """Make a `linear_vjp` of which one gradient is changed."""

    def linear_vjp(x: np.ndarray, paths: list[Factors], grad: np.ndarray, rule: str = "smooth_sign") -> tuple:
        grad_x, grad_paths, grad_bias = ref.linear_vjp(x, paths, grad, rule)
        for name, change in changes.items():
            if name == "x":
                grad_x = change(grad_x)
            elif name == "bias":
                grad_bias = change(grad_bias)
            else:
                grad_paths = [path._replace(**{name: change(getattr(path, name))}) for path in grad_paths]
        return grad_x, grad_paths, grad_bias

    return {"linear_vjp": linear_vjp}


def saturating_smooth_sign(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Compute 1 - tanh^2, which is 0 or eps where it should be small."""
    t = np.tanh(np.clip(x, -10, 10) * x.dtype.type(100))
    return (grad * x.dtype.type(100) * (1 - t * t)).astype(x.dtype)


def svid(change: Callable[[Factors], Factors]) -> dict[str, Callable]:
    """Make a `dual_svid` whose result is changed."""
    return {"dual_svid": lambda weight, rank: change(ref.dual_svid(weight, rank))}


def no_second_iteration(weight: np.ndarray, rank: int) -> Factors:
    """Take the mean magnitude of rows and columns for their scales: a rank-one approximation, but not the best."""
    factors = ref.dual_svid(weight, rank)
    u, v = np.abs(factors.u), np.abs(factors.v)
    ell = u.mean(axis=0) * v.mean(axis=0) / max(u.mean() * v.mean(), np.finfo(u.dtype).tiny)
    return factors._replace(h=u.mean(axis=1), ell=ell, g=v.mean(axis=1))


def any_rank(weight: np.ndarray, rank: int) -> Factors:
    """Clip the rank to what is possible."""
    return ref.dual_svid(np.nan_to_num(weight), int(np.clip(rank, 1, min(weight.shape))))


def fixed_step(weight: np.ndarray, ranks: list[int]) -> list[Factors]:
    """Multiply the second and later paths by 3."""
    paths = ref.compensate(weight, ranks)
    return [path if at == 0 else path._replace(ell=3 * path.ell) for at, path in enumerate(paths)]


def residual_of_the_weight(weight: np.ndarray, ranks: list[int]) -> list[Factors]:
    """Fit every path to the weight itself, at half its size."""
    paths = [ref.dual_svid(weight, rank) for rank in ranks]
    return [path._replace(ell=path.ell * best_step(weight, path.to_dense()) / len(ranks)) for path in paths]


def refit(change: Callable[[np.ndarray, Factors, Factors], Factors]) -> dict[str, Callable]:
    """Make a `refit_scales` whose result is changed: change(weight, before, after)."""

    def refit_scales(weight: np.ndarray, factors: Factors, sweeps: int = 3) -> Factors:
        return change(weight, factors, ref.refit_scales(weight, factors, sweeps))

    return {"refit_scales": refit_scales}


def rounded(change: Callable[[np.ndarray, Latents, str], Latents]) -> dict[str, Callable]:
    """Make a `round_latents` whose result is changed: change(latent, stored, dtype)."""

    def round_latents(latent: np.ndarray, dtype: str) -> Latents:
        return change(latent, ref.round_latents(latent, dtype), str(np.dtype(dtype)))

    return {"round_latents": round_latents}


def half_range(latent: np.ndarray, stored: Latents, dtype: str) -> Latents:
    """Use half of the range of codes."""
    if dtype == "float32":
        return stored
    codes = stored.codes.astype(np.float32) / 2
    return Latents((np.rint(codes) if dtype == "int8" else codes).astype(dtype), 2 * stored.scale)


def cut_codes(latent: np.ndarray, stored: Latents, dtype: str) -> Latents:
    """Cut int8 codes towards zero."""
    return stored._replace(codes=np.trunc(latent / stored.scale).astype(np.int8)) if dtype == "int8" else stored


def scale_of_zero(latent: np.ndarray, stored: Latents, dtype: str) -> Latents:
    """Store 0 for the scale of a token of zeros."""
    return stored._replace(scale=np.where((latent == 0).all(axis=-1, keepdims=True), 0, stored.scale))


def rope_of_neighbours(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Pair entries 2 i and 2 i + 1, as the original RoPE code does."""
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1).reshape(x.shape)


def unmasked(query: np.ndarray, *others: Any) -> np.ndarray:
    """Let every query see every token."""
    arguments = list(others)
    arguments[6] = np.ones_like(arguments[6])
    return ref.latent_attention(query, *arguments)


def read_words_as_signed(folder: Path) -> checkpoint.Layers:
    """Swap the halves of 32-bit words."""
    layers = checkpoint.read_layers(folder)

    def swap(words: np.ndarray) -> np.ndarray:
        return words >> np.uint32(16) | words << np.uint32(16) if words.itemsize == 4 else words

    return {
        name: ([path._replace(v_words=swap(path.v_words)) for path in paths], bias)
        for name, (paths, bias) in layers.items()
    }


def read_first_path(folder: Path) -> checkpoint.Layers:
    """Read the first path of each layer only."""
    return {name: (paths[:1], bias) for name, (paths, bias) in checkpoint.read_layers(folder).items()}


def write_without_checksums(folder: Path, layers: checkpoint.Layers) -> None:
    """Call a checkpoint of version 1 one of version 3."""
    checkpoint.write_layers(folder, layers, 1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def write_without_bias(folder: Path, layers: checkpoint.Layers) -> None:
    """Drop the biases."""
    checkpoint.write_layers(folder, {name: (paths, None) for name, (paths, _) in layers.items()})


def read_unchecked(folder: Path) -> checkpoint.Layers:
    """Believe a checkpoint, whatever its checksums are."""
    check, checkpoint.check_sums = checkpoint.check_sums, lambda *_: None
    try:
        return checkpoint.read_layers(folder)
    finally:
        checkpoint.check_sums = check


def one_rank_less(shapes: dict, bits: float, paths: int) -> dict:
    """Leave one rank of the first layer unused."""
    ranks = ref.allocate_ranks(shapes, bits, paths)
    first = next(iter(shapes))
    return ranks | {first: (max(1, ranks[first][0] - 1), *ranks[first][1:])}


def latents_without_ell(x: np.ndarray, paths: list[PackedFactors]) -> np.ndarray:
    """Compute V_sign^T (g * x)."""
    return ref.latents(x, [path._replace(ell=np.ones_like(path.ell)) for path in paths])


def both(name: str, what: str, functions: dict[str, Callable]) -> dict[str, Mistake]:
    """Make the mistakes of the laws of a name of `linear` and `packed_linear`."""
    return {f"{each}.{name}": Mistake(what, {each: functions[each]}) for each in ("linear", "packed_linear")}


def made(make: Callable[[str], Callable]) -> dict[str, Callable]:
    """Make a changed `linear` and `packed_linear`."""
    return {name: make(name) for name in ("linear", "packed_linear")}


#: Law -> the mistake that it catches.
MISTAKES: dict[str, Mistake] = {
    "packing.sign_j_is_bit_j": Mistake("the most significant bit first", {"pack_signs": reversed_bits}),
    "packing.words_are_the_narrowest": Mistake("always 32-bit words", {"pack_signs": in_wide_words}),
    "packing.pad_bits_are_zero": Mistake("an off-by-one in padding", {"pack_signs": off_by_one_padding}),
    "packing.zero_is_positive": Mistake("zero is negative", {"pack_signs": pack_zero_as_negative}),
    "packing.nan_is_not_packed": Mistake("NaN becomes +1", {"pack_signs": exact.pack}),
    "packing.unpacking_reads_every_sign": Mistake("words read backwards", {"unpack_signs": unpack_last_word_first}),
    "packing.unpacking_is_the_inverse_of_packing": Mistake("the last sign lost", {"unpack_signs": unpack_one_late}),
    "packing.damaged_words_are_refused": Mistake("pad bits not checked", {"unpack_signs": unpack_unchecked}),
    "packing.other_words_are_refused": Mistake("words not checked", {"unpack_signs": unpack_any_words}),
    "packing.u_is_packed_along_the_rank_and_v_along_d_in": Mistake("V by rows", {"pack_factors": pack_v_by_rows}),
    "packing.scales_are_rounded_to_float16": Mistake("scales cut towards zero", {"pack_factors": cut_scales}),
    "packing.scales_beyond_float16_are_refused": Mistake("infinite scales", {"pack_factors": pack_infinite_scales}),
    "packing.unpacked_paths_are_what_is_stored": Mistake("V transposed", {"unpack_factors": unpack_v_by_rank}),
    **both("every_sign_counts", "one wrong sign", layer(path=one_wrong_sign)),
    **both("h_scales_the_outputs", "h is missing", layer(path=without("h"))),
    **both("ell_scales_the_latents", "ell is missing", layer(path=without("ell"))),
    **both("g_scales_the_inputs", "g is missing", layer(path=without("g"))),
    **both("paths_add_up", "the second path is missing", made(first_path_only)),
    **both("bias_is_added_once", "the bias is added to every path", made(bias_in_every_path)),
    **both("padding_takes_no_part", "an off-by-one in the last word", layer(path=last_sign_lost)),
    **both("sums_are_of_float32", "a float16 accumulator", layer(sum=half_sum)),
    **both("rows_are_independent", "one scale for all rows of x", layer(x=shared_scale)),
    **both("batch_axes_are_kept", "batch axes are lost", made(flat_batch)),
    **both("error_is_within_the_bound", "the output is cut to bfloat16", layer(y=in_bfloat16)),
    **both("wrong_inputs_are_refused", "a wider input is cut", made(cut_input)),
    **both("inputs_are_not_changed", "the input is doubled", made(in_place)),
    "gradients.straight_through_passes_between_one_and_minus_one": Mistake(
        "the window includes 1", {"straight_through_vjp": lambda x, grad: grad * (np.abs(x) <= 1)}
    ),
    "gradients.smooth_sign_has_the_slope_of_tanh": Mistake(
        "1 - tanh^2 cancels", {"smooth_sign_vjp": saturating_smooth_sign}
    ),
    "gradients.gradient_of_x": Mistake("a wrong sign", gradient(x=np.negative)),
    "gradients.gradient_of_bias": Mistake("a wrong sign", gradient(bias=np.negative)),
    "gradients.gradient_of_u": Mistake("a wrong sign", gradient(u=np.negative)),
    "gradients.gradient_of_v": Mistake("a wrong sign", gradient(v=np.negative)),
    "gradients.gradient_of_h": Mistake("a wrong sign", gradient(h=np.negative)),
    "gradients.gradient_of_ell": Mistake("twice as large", gradient(ell=lambda each: 2 * each)),
    "gradients.gradient_of_g": Mistake("a mean in place of a sum", gradient(g=lambda each: each / 2)),
    "gradients.gradients_are_the_derivatives_of_linear": Mistake(
        "linear forgets h, its gradients do not", {"linear": layer(path=without("h"))["linear"]}
    ),
    "factorization.factors_have_the_shapes_of_the_rank": Mistake(
        "always rank 1",
        svid(lambda f: Factors(f.u[:, :1], f.v[:, :1], f.h, f.ell[:1], f.g)),
    ),
    "factorization.scales_are_not_negative": Mistake(
        "two minus signs that cancel", svid(lambda f: f._replace(h=-f.h, ell=-f.ell))
    ),
    "factorization.rank_one_is_recovered": Mistake(
        "singular values in U alone", svid(lambda f: f._replace(ell=np.sqrt(f.ell)))
    ),
    "factorization.signs_are_of_the_singular_vectors": Mistake("V negated", svid(lambda f: f._replace(v=-f.v))),
    "factorization.h_is_read_off_the_magnitudes": Mistake("means for scales", {"dual_svid": no_second_iteration}),
    "factorization.ell_is_read_off_the_magnitudes": Mistake("ell doubled", svid(lambda f: f._replace(ell=2 * f.ell))),
    "factorization.g_is_read_off_the_magnitudes": Mistake("g reversed", svid(lambda f: f._replace(g=f.g[::-1]))),
    "factorization.error_is_not_above_the_definitions": Mistake(
        "h and g a tenth too large", svid(lambda f: f._replace(h=1.1 * f.h, g=1.1 * f.g))
    ),
    "factorization.impossible_ranks_and_weights_are_refused": Mistake("ranks are clipped", {"dual_svid": any_rank}),
    "factorization.every_path_lowers_the_error": Mistake("steps of 3", {"compensate": fixed_step}),
    "factorization.second_path_factorizes_the_residual": Mistake(
        "the second path repeats the first", {"compensate": residual_of_the_weight}
    ),
    "scales.refitting_never_increases_the_error": Mistake(
        "h overshoots", refit(lambda _, before, after: after._replace(h=after.h + 3 * (after.h - before.h)))
    ),
    "scales.signs_are_kept": Mistake(
        "latents become signs", refit(lambda _, before, after: after._replace(u=after.u_sign))
    ),
    "scales.rank_one_scales_are_solved_for": Mistake("nothing is refitted", refit(lambda _, before, after: before)),
    "scales.g_is_fitted_last_and_stationary": Mistake(
        "g moves half of the way", refit(lambda _, before, after: after._replace(g=(before.g + after.g) / 2))
    ),
    "latent_cache.latents_are_the_down_projection": Mistake(
        "ell is missing",
        {"latents": latents_without_ell},
    ),
    "latent_cache.up_projection_is_h_times_u": Mistake(
        "h is missing", {"up_projection": lambda paths: np.sign(ref.up_projection(paths))}
    ),
    "latent_cache.stored_latents_are_within_their_bound": Mistake("codes are cut", rounded(cut_codes)),
    "latent_cache.largest_latent_uses_the_whole_range": Mistake("half of the range", rounded(half_range)),
    "latent_cache.zero_tokens_stay_zero": Mistake("a scale of 0", rounded(scale_of_zero)),
    "latent_cache.rope_multiplies_complex_numbers": Mistake("pairs of neighbours", {"apply_rope": rope_of_neighbours}),
    "latent_cache.attention_over_latents_is_attention": Mistake("no mask", {"latent_attention": unmasked}),
    "checkpoints.golden_checkpoints_are_read": Mistake("half words swapped", {"read_layers": read_words_as_signed}),
    "checkpoints.any_layers_are_read": Mistake("the second path is lost", {"read_layers": read_first_path}),
    "checkpoints.written_layers_are_in_the_format": Mistake("no checksums", {"write_layers": write_without_checksums}),
    "checkpoints.layers_survive_a_round_trip": Mistake("no biases", {"write_layers": write_without_bias}),
    "checkpoints.damaged_checkpoints_are_refused": Mistake("checksums not compared", {"read_layers": read_unchecked}),
    "bits.path_bits_are_what_packing_stores": Mistake(
        "padding not counted", {"path_bits": lambda d_out, d_in, rank: ref.path_bits(d_out, d_in, rank, word_bits=1)}
    ),
    "bits.rank_is_the_largest_within_the_bits": Mistake(
        "one rank less where it can be", {"rank_for_bits": lambda *of: max(1, ref.rank_for_bits(*of) - 1)}
    ),
    "bits.ranks_are_what_trying_every_level_gives": Mistake(
        "one rank less where it can be",
        {"allocate_ranks": one_rank_less},
    ),
    "bits.ranks_never_exceed_the_budget": Mistake(
        "padding not counted",
        {"allocate_ranks": lambda shapes, bits, paths: ref.allocate_ranks(shapes, bits, paths, word_bits=1)},
    ),
    "bits.cache_bytes_count_every_number": Mistake(
        "scales not counted", {"kv_cache_bytes": lambda tokens, widths, element, scale: tokens * sum(widths) * element}
    ),
}
