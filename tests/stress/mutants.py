"""Check that the tests notice small mistakes, which are applied to copies of the packages one at a time.

Run `make mutants`, or `python tests/stress/mutants.py [WORD ...]` for the mutants whose file or description contains a
word. Each mutant runs the tests that concern its module, with few Hypothesis examples, and stops at the first failure.
The command fails if the tests notice fewer than 95 % of the mutants. Mistakes that any implementation of the method
could make stand in tests/conformance/broken.py.
"""

import ast
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
REQUIRED = 0.95
WORKERS = 2
FEW = 3
TIMEOUT_S = 1800  # for the tests of one mutant; CUDA kernels take minutes in the simulator
TEST_FOLDERS = {"reference": "method", "fast": "method", "files": "checkpoints"}  # others share the folder's name
# Tests that need a GPU, or that check files rather than functions
UNUSED = {"test_gpu", "test_gpu_decode", "test_book", "test_notebooks", "test_numbers", "test_package"}


class Mutant(NamedTuple):
    """A mistake: replace the first occurrence of `old` in a file by `new`."""

    file: str
    old: str
    new: str
    what: str


MUTANTS = [
    Mutant(
        "reference/bits.py", "* factor) // 8 * 8", "* factor + 4) // 8 * 8", "official ranks rounded to the nearest"
    ),
    Mutant(
        "fast/checkpoints/official.py", "paths, factor),) * paths", "1, factor),) * paths", "official ranks of one path"
    ),
    Mutant("reference/signs.py", "np.where(x < 0, -1, 1)", "np.where(x <= 0, -1, 1)", "sign of zero is -1"),
    Mutant("fast/signs.py", "torch.where(x < 0, -one, one)", "torch.where(x <= 0, -one, one)", "sign of zero is -1"),
    Mutant("reference/signs.py", "(np.abs(x) < 1)", "(np.abs(x) < 2)", "straight-through window is wider"),
    Mutant("reference/factors.py", "left = self.h[..., :, None] * ", "left = ", "to_dense drops h"),
    Mutant("fast/factors.py", "right = self.g[..., :, None] * ", "right = ", "to_dense drops g"),
    Mutant("fast/factors.py", " * self.ell[..., None, :]", "", "to_dense drops ell"),
    Mutant("reference/dual_svid.py", "return left * root, right * root", "return left * s, right", "S on one side"),
    Mutant("fast/dual_svid.py", "return left * root, right * root", "return left * root, right", "root on one side"),
    Mutant("reference/dual_svid.py", "h, ell_u * ell_v, g", "h, ell_u, g", "ell of one side only"),
    Mutant("fast/dual_svid.py", "h, ell_u * ell_v, g", "h, ell_u + ell_v, g", "ells are added"),
    Mutant("reference/dual_svid.py", "_, g, ell_v = svid(v)", "_, g, ell_v = svid(-v.clip(0))", "half of v ignored"),
    Mutant(
        "reference/svd.py", "left = scaled @ right  # (m,)", "left = scaled.sum(axis=1)  # (m,)", "one-step left vector"
    ),
    Mutant("fast/svd.py", "return u[..., :rank], s", "return u[..., -rank:], s", "the trailing vectors"),
    Mutant("reference/svd.py", "e[k - 1] = r", "e[k - 1] = -r", "sign slip in the sweep"),
    Mutant("reference/svd.py", "yt[d < 0] *= -1", "xt[d < 0] *= 1", "negative singular values keep their sign in V"),
    Mutant("reference/svd.py", "d[0] = e[0] = 0", "d[0] = 0", "a zero diagonal entry does not split"),
    Mutant("fast/residual.py", "rest = rest - factors.to_dense()", "rest = rest", "no residual at all"),
    Mutant("reference/residual.py", "np.maximum(step, 0)", "step", "a negative step"),
    Mutant(
        "fast/residual.py", ".clamp(min=tiny)\n    return step", "\n    return step", "zero direction divides by zero"
    ),
    Mutant("reference/residual.py", "p.g / c)", "p.g)", "column weights not divided out"),
    Mutant("fast/residual.py", "row.sqrt(), column.sqrt()", "row, column", "weights instead of their roots"),
    Mutant("reference/packing.py", "bits[..., :count]", "bits[..., -count:]", "pad bits taken for signs"),
    Mutant("fast/packing.py", ">> place) & 1)", ">> place))", "bits above the one read are kept"),
    Mutant("fast/packing.py", "return -(-count // width), ", "return count // width + 1, ", "a word too many"),
    Mutant(
        "reference/bits.py",
        "signs + scale_bits * (d_out + d_in + rank)",
        "signs + scale_bits * (d_out + d_in)",
        "ell not counted",
    ),
    Mutant("reference/bits.py", "-(-count // width)", "(count // width)", "padding rounds down"),
    Mutant("reference/bits.py", "word_bits // 2 >= max(", "word_bits // 2 > max(", "narrow words are never filled"),
    Mutant("reference/bits.py", "max(count, NARROWEST_WORD_BITS)", "count", "words narrower than 8 bits"),
    Mutant(
        "reference/bits.py", "padded(smallest + 1, word_bits)", "padded(smallest, 32) + 1", "gains leave words open"
    ),
    Mutant("reference/bits.py", "math.floor(Fraction(bits)", "math.ceil(Fraction(bits)", "budget rounded up"),
    Mutant(
        "reference/bits.py",
        "if cost <= rest:",
        "if cost <= 2 * rest:",
        "overspends",
    ),
    Mutant("reference/bits.py", "low, high = 0, min(shape)", "low, high = 0, min(shape) - 1", "rank search biased"),
    Mutant("reference/bits.py", "rest -= cost\n            if made", "if made", "gains spend the same bits twice"),
    Mutant("reference/bits.py", "return -sum(gains", "return sum(gains", "the worst layer first"),
    Mutant("reference/memory.py", "1 if shape.tied else 2", "2", "a tied head counted twice"),
    Mutant(
        "reference/memory.py",
        "    shapes = linear_shapes(shape)\n    if bits",
        "    shapes = linear_shapes(shape._replace(fused=False))\n    if bits",
        "fused layers counted apart",
    ),
    Mutant("reference/memory.py", " + size // group * numbers * HALF_BYTES", "", "scales of an embedding not counted"),
    Mutant("reference/memory.py", '(2 if shape.biases == "all" else 1)', "1", "biases of norms not counted"),
    Mutant(
        "reference/memory.py",
        "max(attention, mlp, shape.hidden",
        "max(attention, mlp, 0 * shape.hidden",
        "the end without its norm",
    ),
    Mutant("reference/memory.py", '"v_proj", "qkv_proj")', '"qkv_proj")', "latents of values not counted"),
    Mutant("fast/kv_cache.py", "(x * path.g) @", "x @", "g not in the latents"),
    Mutant(
        "reference/kv_cache.py", "np.where(scale == 0, np.float32(1), scale)", "scale", "a zero token divides by zero"
    ),
    Mutant("fast/kv_cache.py", "sine, value=-1)", "sine)", "keys turn the wrong way"),
    Mutant("fast/kv_cache.py", "mean = mean * shrink + seen", "mean = mean + seen", "earlier blocks not scaled down"),
    Mutant("fast/kv_cache.py", "total = total * shrink +", "total = total +", "earlier blocks' total not scaled down"),
    Mutant("fast/kv_cache.py", "expanded += key_bias", "pass", "bias of keys dropped"),
    Mutant(
        "fast/kv_cache.py", "output = output + value_bias", "output = output + 0 * value_bias", "bias of values dropped"
    ),
    Mutant(
        "reference/kv_cache.py",
        "at = head // (heads // len(value_rows))",
        "at = head % len(value_rows)",
        "queries ask other keys",
    ),
    Mutant(
        "fast/kv_cache.py",
        "sine[..., part, None, :])",
        "sine[..., :1, None, :])",
        "every block turned as the first token",
    ),
    Mutant(
        "fast/decoding/latent_cache.py",
        "cosine[:, None, -queries:]",
        "cosine[:, None, :queries]",
        "queries at the first positions",
    ),
    Mutant("fast/decoding/latent_cache.py", ".tril(tokens - queries)", ".tril()", "later parts see too little"),
    Mutant(
        "fast/decoding/latent_cache.py", "        key.bias,\n", "        None,\n", "the layer's bias not handed over"
    ),
    Mutant(
        "fast/decoding/latent_cache.py",
        "if not isinstance(attention.forward, partial):",
        "if True:",
        "attention wrapped again and again",
    ),
    Mutant(
        "fast/_checks.py",
        "limit is not None and needed > limit:",
        "limit is not None and needed > limit + 1:",
        "a token too many",
    ),
    Mutant("fast/_checks.py", "above < number < below", "above <= number < below", "a setting at its limit"),
    Mutant("fast/_checks.py", "token >= rows)", "token > rows)", "a token behind the embedding"),
    Mutant("fast/_checks.py", "max(positions, int(factor * trained))", "positions", "scaled positions are not counted"),
    Mutant(
        "fast/models/generation_settings.py",
        "name in SUPPORTED | IGNORED or",
        "name not in NEUTRAL_VALUES or",
        "new settings are dropped",
    ),
    Mutant(
        "fast/models/generation_settings.py",
        "SAMPLING_DEFAULTS[name] if value is None else value",
        "value",
        "defaults of sampling",
    ),
    Mutant("fast/decoding/generate.py", "add_special_tokens=not chat", "add_special_tokens=True", "two BOS in a chat"),
    Mutant(
        "fast/checkpoints/checkpoint.py",
        "model.generation_config = generation_config(path)",
        "pass",
        "stop tokens are forgotten",
    ),
    Mutant(
        "fast/decoding/latent_cache_hf.py",
        "            self.cos_sin = None\n        new",
        "        new",
        "angles of the step before",
    ),
    Mutant(
        "fast/decoding/latent_cache_hf.py",
        "larger[:, : self.length] = self.filled()",
        "pass",
        "growing forgets the tokens",
    ),
    Mutant(
        "fast/decoding/latent_cache_hf.py",
        "[self.positions, *(part",
        "[*(part",
        "positions not cropped with the tokens",
    ),
    Mutant(
        "fast/decoding/latent_cache_hf.py",
        "if self.positions.length < length:",
        "if True:",
        "each layer appends positions",
    ),
    Mutant(
        "fast/decoding/latent_cache.py", '"latent-int8": torch.int8', '"latent-int8": torch.float16', "int8 not used"
    ),
    Mutant("reference/linear.py", "(x * path.g) @ path.v_sign", "x @ path.v_sign", "g dropped"),
    Mutant(
        "reference/linear.py", "(t * path.ell) @ path.u_sign.T * path.h", "t @ path.u_sign.T * path.h", "ell dropped"
    ),
    Mutant("reference/linear.py", "h=(dy * z).sum(axis=0)", "h=dz.sum(axis=0)", "wrong gradient of h"),
    Mutant(
        "reference/linear.py", "ell=(dt * s).sum(axis=0)", "ell=(ds * s).sum(axis=0)", "ell enters its own gradient"
    ),
    Mutant(
        "reference/linear.py",
        "return da * path.g, grad_path",
        "return da, grad_path",
        "g missing in the input's gradient",
    ),
    Mutant("reference/linear.py", "a.T @ ds", "x.T @ ds", "unscaled input in the gradient of v"),
    Mutant(
        "fast/linear.py",
        "if bias is not None:\n        y += bias",
        "if bias is None:\n        y += 0",
        "packed bias dropped",
    ),
    Mutant("reference/alignment.py", "rotation = q @ p.T", "rotation = p @ q.T", "Procrustes transposed"),
    Mutant(
        "fast/alignment.py",
        "return factors_from(u @ rotation, v @ rotation)",
        "return factors_from(u @ rotation, v)",
        "V not rotated",
    ),
    Mutant("reference/admm.py", "x.T @ target.T + rho * pull.T", "x.T @ target.T", "no pull in the right-hand side"),
    Mutant("fast/admm.py", "rho = (t / steps) ** 3", "rho = t / steps", "linear penalty schedule"),
    Mutant("reference/admm.py", "(u.T @ u) * (v.T @ v)", "(u.T @ u) + (v.T @ v)", "sum instead of Hadamard product"),
    Mutant("fast/admm.py", "ell=factors.ell + step", "ell=step", "refit forgets the present ell"),
    Mutant(
        "reference/admm.py",
        "(unscaled * unscaled).sum(axis=1), factors.h",
        "np.abs(unscaled).sum(axis=1), factors.h",
        "wrong norm for h",
    ),
    Mutant("fast/admm.py", "(1 - shrink) * unit / mean + shrink", "unit / mean + shrink", "shrinking changes the mean"),
    Mutant("fast/signs.py", "SHARPNESS = 100.0", "SHARPNESS = 90.0", "SmoothSign of another slope"),
    Mutant(
        "reference/signs.py", "4 * e / ((1 + e) * (1 + e))", "4 * e / (1 + e)", "SmoothSign denominator not squared"
    ),
    Mutant(
        "reference/distill.py",
        "(np.exp(log_p) * (log_p - log_q))",
        "(np.exp(log_q) * (log_q - log_p))",
        "KL the other way",
    ),
    Mutant("reference/distill.py", "gradient = 2 * error", "gradient = error", "hidden-state gradient without its 2"),
    Mutant(
        "fast/distill.py",
        "torch.stack(losses).sum() / len(logits)",
        "torch.stack(losses).sum()",
        "KL summed over positions",
    ),
    Mutant("reference/train.py", "/ (1 - betas[0] ** step)) / (root", ") / (root", "Adam without bias correction"),
    Mutant("fast/train.py", "+ (1 - betas[1]) * (grad * grad)", "+ grad * grad", "Adam's square not averaged"),
    Mutant(
        "reference/train.py", "grad = grad * (values[at] > 0)  # ReLU", "pass  # ReLU", "no ReLU in the backward pass"
    ),
    Mutant(
        "fast/models/calibrate.py",
        "inputs[0].detach().float().square()",
        "inputs[0].detach().float().abs()",
        "first moments",
    ),
    Mutant(
        "fast/models/calibrate.py",
        "outputs.sqrt()[:, None] * weight",
        "outputs[:, None] * weight",
        "gains without the root",
    ),
    Mutant("fast/residual.py", "target / scale * unit", "target / scale * unit.abs()", "step along absolute values"),
    Mutant(
        "fast/models/layers.py",
        "pack_factors(path, self.scale_bits) for path in self.factors()",
        "pack_factors(path, self.scale_bits) for path in self.factors()[:1]",
        "residual path not packed",
    ),
    Mutant("fast/models/selection.py", "and module is not head", "", "the head is quantised by identity"),
    Mutant("fast/models/quantize.py", "layer.bias, scale", "None, scale", "bias lost"),
    Mutant(
        "fast/integrations/hf_quantizer.py", "model._weight_conversions = []", "pass", "tensors of experts are renamed"
    ),
    Mutant("fast/models/experts.py", " if expert < len(self)]", "]", "an expert beyond the last is computed"),
    Mutant("fast/models/experts.py", "expert if of_all else place", "place", "weights of all experts are misread"),
    Mutant(
        "fast/models/experts.py", "distributed.is_initialized()", "False", "experts without a gradient in one process"
    ),
    Mutant(
        "fast/models/experts.py",
        "gated and alternates(bare._apply_gate)",
        "False",
        "gate and up that alternate are mixed",
    ),
    Mutant("fast/models/experts.py", "bare._parameters = {}", "pass", "the dense experts stay in memory"),
    Mutant(
        "fast/models/experts.py",
        "called or len(weight) in (1, count)",
        "called",
        "gates of shared experts are quantised",
    ),
    Mutant("fast/models/experts.py", "share <= MOST_LEFT_DENSE", "True", "experts stay dense without a word"),
    Mutant(
        "fast/models/experts.py",
        "linear_over if selected",
        "linear_over if True or selected",
        "excluded ones are renamed",
    ),
    Mutant("fast/models/experts.py", "if is_known(module):  #", "if False:  #", "excluded experts are refused"),
    Mutant("fast/checkpoints/loading.py", "if missing or unexpected:", "if missing:", "tensors left over pass"),
    Mutant(
        "fast/checkpoints/format.py",
        "if found != wanted",
        "if found.shape != wanted.shape",
        "dtype of packed tensors not checked",
    ),
    Mutant(
        "fast/evaluation/perplexity.py",
        "scored = len(parts) * (length - 1)",
        "scored = len(parts) * length",
        "the first token counts as scored",
    ),
    Mutant("fast/models/calibrate.py", ".split(length)", ".split(length - 1)", "windows are too short"),
    Mutant(
        "fast/evaluation/perplexity.py",
        "view(len(tokens), -1)",
        "view(-1, len(tokens)).T",
        "losses change hands",
    ),
    Mutant("fast/evaluation/zero_shot.py", "[rows[good]] > scores", "[rows[good]] >= scores", "ties count as right"),
    Mutant(
        "fast/evaluation/zero_shot.py", 'BEFORE_SENTENCE = " "', 'BEFORE_SENTENCE = ""', "no space before a sentence"
    ),
    Mutant(
        "fast/evaluation/zero_shot.py",
        "tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id",
        "tokenizer.eos_token_id",
        "EOS before every sentence",
    ),
    Mutant("fast/evaluation/archives.py", "lines[:items]", "lines[-(items or 0):]", "the last pairs of a paradigm"),
    Mutant("fast/evaluation/scoring.py", "<= scored[:, None]", "< scored[:, None]", "the first token is not scored"),
    Mutant(
        "fast/evaluation/tasks.py",
        "tuple(map(len, choices))",
        "tuple(len(each.encode()) for each in choices)",
        "acc_norm divides by bytes",
    ),
    Mutant("fast/evaluation/tasks.py", '"\\nAnswer:"', '"\\nAnswer: "', "a space after the word Answer"),
    Mutant("fast/evaluation/perplexity.py", "kl_loss(q, p)", "kl_loss(p, q)", "KL of the original from the model"),
    Mutant(
        "fast/evaluation/archives.py", "left -= len(data)", "left = LARGEST - len(data)", "archives of any size pass"
    ),
    Mutant(
        "fast/kernels/cpu.py", "np.float32(2) * horizontal_sum(a0)", "horizontal_sum(a0)", "set bits subtracted once"
    ),
    Mutant(
        "fast/kernels/cpu.py", "        if rest > 2:", "        if rest > 3:", "a third word left over is not added"
    ),
    Mutant("fast/kernels/cpu.py", "words[i * width + k]", "words[whole * width + k]", "the last rows are all the same"),
    Mutant(
        "fast/kernels/cpu_threads.py", "blocks * given // shares", "blocks * (given + 1) // shares", "nobody's rows"
    ),
    Mutant(
        "fast/kernels/cpu_simd.py",
        "-1.0 if entry >> bit & 1",
        "-1.0 if entry >> (3 - bit) & 1",
        "nibbles read backwards",
    ),
    Mutant("fast/kernels/cpu_decode.py", "high * cosine[j] + low", "high * cosine[j] - low", "keys turn the wrong way"),
    Mutant(
        "fast/kernels/cpu_threads.py",
        "head // (heads // job[KV_HEADS])",
        "head % job[KV_HEADS]",
        "queries ask other keys",
    ),
    Mutant(
        "fast/kernels/cpu_dense.py", "for last in range(i, stop):", "for last in range(i, i):", "last rows of the head"
    ),
    Mutant(
        "fast/decoding/sampling.py",
        "before < config.top_p",
        "before + probabilities < config.top_p",
        "the nucleus is one token short",
    ),
    Mutant(
        "fast/models/embeddings.py", "errors[:, j : j + 1] * feedback", "0 * feedback", "errors stay within a group"
    ),
    Mutant("fast/models/embeddings.py", "return total / len(tokens)", "return total", "moments are sums"),
    Mutant(
        "fast/models/embeddings.py",
        "texts = flat_tokens(tokens, model), random_tokens",
        "texts = flat_tokens(tokens, model), 0 * random_tokens",
        "one token",
    ),
    Mutant("fast/models/embeddings.py", "diagonal += RIDGE", "diagonal += 0", "equal codes have no scale"),
    Mutant(
        "fast/models/embeddings.py", "moved.sum(-1)\n", "0 * moved.sum(-1)\n", "scales refitted without their offsets"
    ),
    Mutant("fast/kernels/cpu_dense.py", "s1, s1 + offsets", "s1, s0 + offsets", "rows share an offset"),
    Mutant("fast/decoding/parity.py", "if a != b", "if a == b", "texts agree where they differ"),
    Mutant("fast/kernels/cpu_threads.py", "max(job[START] - offsets[order], 0)", "0", "threads repeat the first rows"),
    Mutant(
        "fast/kernels/cpu_threads.py", "if now == DONE:", "if now == RUNNING:", "parts are copied before they are done"
    ),
    Mutant("fast/kernels/cpu_threads.py", "waited > team[LATE]", "False", "the caller waits for a helper for ever"),
    Mutant(
        "fast/kernels/cpu_threads.py",
        "if not compare_and_swap(state, RUNNING, DONE):",
        "if not compare_and_swap(state, RECLAIMED, DONE):",
        "a part that was taken back is said to be done",
    ),
    Mutant("fast/models/embeddings.py", "pairs >> 4", "pairs >> 3", "high nibbles misread"),
    Mutant("fast/decoding/generate.py", ' or now.endswith("\\ufffd")', "", "half a character is written"),
    Mutant(
        "fast/kernels/cpu_layer.py",
        "(tensor.data_ptr(), tensor.dtype, tensor.shape) for",
        "tensor.dtype for",
        "plans by dtype",
    ),
    Mutant("fast/kernels/cpu_layer.py", " if tensor.is_contiguous()\n", "\n", "a plan for strided words"),
    Mutant(
        "fast/kernels/cpu_layer.py", "to_half(name, getattr(path, name))", "getattr(path, name)", "scales of any dtype"
    ),
    Mutant(
        "fast/kernels/cpu.py", "subtract(lanes, add(negative, negative))", "subtract(lanes, negative)", "zero for -1"
    ),
    Mutant("fast/kernels/cpu_layer.py", "if rows > LARGE_BATCH and", "if", "small batches are unpacked"),
    Mutant("fast/kernels/cpu.py", "kept == width else 0 :]", "kept == width else 128 :]", "tables out of place"),
    Mutant(
        "fast/kernels/dispatch.py",
        "current.fits(tensors):\n        return current",
        "True:\n        return current",
        "plans for ever",
    ),
    Mutant("fast/models/layers.py", '| {"plan": None}', "", "copies share a plan"),
    Mutant("fast/kernels/cpu_layer.py", " & (1 << 8 * words.itemsize) - 1", "", "the int16's sign is kept as pad bits"),
    Mutant("fast/kernels/unpacked.py", "(b / largest).to", "b.to", "a product of scales overflows float16"),
    Mutant("fast/kernels/unpacked.py", "[..., :count]", "[..., -count:]", "pad bits taken for signs"),
    Mutant("fast/kernels/dispatch.py", "            check_words(words, count)\n", "", "the kernel reads any words"),
    Mutant("fast/models/packed_shapes.py", "words(rank, d_in)", "words(rank, rank)", "V in words as wide as U's"),
    Mutant("fast/kernels/cpu.py", "order > 0,", "False,", "the last path alone"),
    Mutant(
        "fast/kernels/cpu.py",
        "range(whole, stop):\n            columns",
        "range(whole + 1, stop):\n            columns",
        "a column of x skipped",
    ),
    Mutant(
        "fast/training/student.py",
        "for path in paths) for paths in same)",
        "for path in paths[:1]) for paths in same)",
        "too little room for the residual path",
    ),
    Mutant(
        "fast/training/student.py", "(0, 0, 0, missing)", "(0, 0, missing, 0)", "A filled up before its rows, B after"
    ),
    Mutant(
        "fast/training/student.py", "torch.stack(grads)", "torch.stack(grads[::-1])", "gradients of layers in reverse"
    ),
    Mutant(
        "fast/training/student.py",
        "tensor.data = stacked[row]",
        "tensor.data = stacked[row].clone()",
        "layers do not follow",
    ),
    Mutant("fast/training/student.py", ".ndim == 1)", ".ndim <= 2)", "norms: all is trained"),
    Mutant(
        "fast/training/student.py", "group = latents if", "group = scales if", "groups of learning rates changed over"
    ),
    Mutant("fast/training/student.py", "            p.grad = None\n", "", "gradients stay after training"),
    Mutant("fast/training/processes.py", "parameter.grad /= world_size", "pass", "gradients summed over processes"),
    Mutant("fast/training/processes.py", "if parameter.grad is not None:", "if True:", "a norm without a gradient"),
    Mutant("fast/training/phases.py", "(1 + math.cos", "(1 - math.cos", "rates rise along the cosine"),
    Mutant(
        "fast/training/trainer.py",
        "part[:, rank::world_size]",
        "part[:, : part.shape[1] // world_size]",
        "all processes read the same",
    ),
    Mutant(
        "fast/training/windows.py",
        "first = sum(lengths[:text])",
        "first = sum(lengths[: text + 1]) - lengths[0]",
        "texts overlap",
    ),
    Mutant(
        "fast/training/windows.py",
        "offset + sequence * torch.randperm",
        "offset + (sequence - 1) * torch.randperm",
        "windows overlap",
    ),
    Mutant("fast/training/trainer.py", "* (len(part) / len(tokens))", "", "micro-batches are summed"),
    Mutant("fast/training/trainer.py", "config.max_grad_norm or math.inf", "math.inf", "no clipping"),
    Mutant(
        "fast/training/hidden_states.py",
        "self.teacher[before]",
        "self.student[before]",
        "blocks read the student's stream",
    ),
    Mutant("fast/training/trainer.py", "loss + trainer.hidden_weight *", "loss + 0 *", "no hidden-state loss"),
    Mutant("fast/training/trainer.py", "and math.isfinite(self.norm.item())", "", "a spoilt state is kept"),
    Mutant(
        "fast/training/trainer.py",
        "for key, tensor in optimizer.state.get(master, {}).items()",
        "for key, tensor in {}.items()",
        "going on forgets Adam's moments",
    ),
    Mutant(
        "fast/training/trainer.py",
        'list(tensors.pop("losses").to(self.device))',
        'list(tensors.pop("losses"))[:0]',
        "going on forgets losses",
    ),
    Mutant(
        "fast/training/trainer.py",
        "distributed.broadcast(parameter.data, 0)",
        "pass",
        "processes begin with models of their own",
    ),
    Mutant("fast/training/trainer.py", "if self.step == phase.begin:", "if False:", "moments of the part before stay"),
    Mutant("fast/training/trainer.py", "if self.phase.frozen and group.latents", "if False", "frozen signs move"),
    Mutant("fast/training/phases.py", "first >= freeze,", "first > freeze,", "a phase too late is frozen"),
    Mutant("fast/distill.py", "labels[:, None] < 0, p,", "labels[:, None] < -1, p,", "rows without a label have one"),
    Mutant(
        "fast/training/muon.py",
        "tall = matrix.shape[-2] > matrix.shape[-1]",
        "tall = False",
        "tall matrices as they are",
    ),
    Mutant("fast/training/muon.py", '1 - group["momentum"])', 'group["momentum"])', "momentum the wrong way"),
    Mutant("fast/models/calibrate.py", "[math.inf] * lowest + inside[lowest:]", "inside", "no lower bound of ranks"),
    Mutant(
        "fast/training/hidden_states.py",
        "        if teacher_forcing:",
        "        if not teacher_forcing:",
        "the wrong part is forced",
    ),
    Mutant(
        "fast/training/resume.py",
        "if read_description(path).get",
        "if True or read_description(path).get",
        "damaged states are taken",
    ),
    Mutant(
        "fast/training/resume.py",
        "return description if check == json_digest(description) else {}",
        "return description",
        "run.json is not checked",
    ),
    Mutant(
        "fast/training/resume.py", "self.states()[KEPT_STATES:]", "self.states()[KEPT_STATES + 1 :]", "a state too many"
    ),
    Mutant("fast/training/resume.py", 'entry["step"] <= step', "True", "log entries twice"),
    Mutant("fast/training/resume.py", "reverse=True", "reverse=False", "the oldest state first"),
    Mutant(
        "fast/training/resume.py",
        "if differing:",
        "if False:",
        "the state of another run is taken",
    ),
    Mutant("fast/training/resume.py", "60 * self.minutes", "0", "saves after every step"),
    Mutant(
        "fast/cli/train.py",
        "checkpointer.newest() is not None",
        "checkpointer.states()",
        "damaged states choose the initialisation",
    ),
    Mutant(
        "fast/integrations/plugin.py",
        "except Exception as error",
        "except ZeroDivisionError as error",
        "old libraries can no longer be imported",
    ),
    Mutant(
        "fast/integrations/peft_lora.py",
        "if isinstance(base, PackedLinear) else None",
        "if False else None",
        "adapters do not attach",
    ),
    Mutant(
        "fast/integrations/peft_lora.py",
        '"_check_merge_allowed", check_merge_first',
        '"_check_merge_allowed", lambda f: f',
        "merges",
    ),
    Mutant(
        "fast/integrations/peft_lora.py",
        "    check_initialiser(kwargs",
        "    print(kwargs",
        "initialisers change a copy that is lost",
    ),
    Mutant("fast/models/selection.py", "if isinstance(node, ast.If):", "if False:", "special cases keep layers dense"),
    Mutant("fast/models/selection.py", "if weight.numel() == 0:", "if False:", "layers without weights are quantised"),
    Mutant("fast/models/selection.py", 'name.startswith(f"{tower}.")', "False", "towers are quantised"),
    Mutant(
        "fast/models/selection.py", "if key in weights_read(type(parent)):", "if False:", "readers of weights break"
    ),
    Mutant("fast/models/wrappers.py", "if has_adapters(model):", "if False:", "adapters are quantised and saved"),
    Mutant("fast/models/wrappers.py", '"_orig_mod" in model._modules', "False", "compiled models are not unwrapped"),
    Mutant(
        "fast/integrations/plugin.py",
        "        self.check_imported()",
        "        pass",
        "a finder that comes first is not made up for",
    ),
    Mutant("fast/arrays.py", "if array.dtype in HALVES else array", "if False else array", "16 bits stay 16 bits"),
    Mutant("fast/models/layers.py", "made = memo[id(self)] = type", "made = type", "shared layers are copied twice"),
    Mutant(
        "fast/models/layers.py",
        "copy.deepcopy(self.__getstate__(), memo)",
        "self.__getstate__()",
        "deep copies share their tensors",
    ),
    Mutant("fast/models/layers.py", "def __reduce_ex__(", "def no_reduce(", "layers are pickled"),
    Mutant(
        "fast/checkpoints/gguf.py",
        'if architecture == "llama":',
        'if architecture == "none":',
        "heads are not interleaved",
    ),
    Mutant(
        "fast/checkpoints/gguf.py",
        '"k_proj": config.num_key_value_heads',
        '"k_proj": config.num_attention_heads',
        "keys have as many heads as queries",
    ),
    Mutant("fast/checkpoints/gguf.py", "if tensor.ndim < 2:", "if False:", "vectors are rounded"),
    Mutant("fast/checkpoints/gguf.py", "if module.table not in seen:", "if True:", "tied tables are written twice"),
    Mutant(
        "fast/checkpoints/gguf.py",
        'if rope(config).get("rope_type", "default") != "default" or',
        "if",
        "scaled positions are written as plain ones",
    ),
    Mutant(
        "fast/files/atomic.py",
        "os.replace(folder / place.name, place)",
        "pass",
        "a file that was written is not put in place",
    ),
    Mutant("fast/cli/estimate.py", "    model.tie_weights()", "    pass", "a tied head is counted twice"),
    Mutant(
        "fast/cli/quantization_cost.py",
        "stored // 8 + HALF_BYTES * sizes.tables",
        "stored // 8 + HALF_BYTES * (sizes.tables + sizes.weights)",
        "dense weights are counted as stored",
    ),
    Mutant("fast/cli/report.py", "<title>{html.escape(name)}", "<title>{name}", "names are not escaped"),
    Mutant(
        "fast/cli/report.py",
        "low, high = min(values), max(values)",
        "low, high = min(values), min(values)",
        "the largest rank is not shown",
    ),
    Mutant("fast/_progress.py", 'or "ipykernel" in sys.modules', "", "notebooks are logs"),
    Mutant("fast/_progress.py", "return library.tqdm.status_printer(file)", "pass", "terminals are logs"),
    Mutant(
        "fast/cli/main.py",
        'action.type is Path or action.dest == "model"',
        "action.type is Path",
        "files are not completed for a model",
    ),
    Mutant("fast/checkpoints/official.py", "words[:, -1] &= (1 << count % 32) - 1", "pass", "pad bits are kept"),
    Mutant("fast/checkpoints/official.py", "ell = u2.float() * v1.float()", "ell = v1.float()", "u2 is forgotten"),
    Mutant(
        "fast/checkpoints/official.py",
        'order_by_length(scales["v2"], scales["v1"], d_in)',
        '(scales["v2"], scales["v1"])',
        "scales are taken by name alone",
    ),
    Mutant(
        "fast/checkpoints/official.py",
        "words if words.itemsize == 4 else low",
        "words.to(torch.int32)",
        "sign bits of narrow words are spread",
    ),
    Mutant("fast/checkpoints/official.py", 'SUFFIXES = ("", "_R")', 'SUFFIXES = ("",)', "the residual path is dropped"),
    Mutant("fast/checkpoints/official.py", 'not key.endswith(".bias")]', "True]", "biases count as packed"),
    Mutant(
        "fast/checkpoints/dense_files.py",
        "if is_official(folder) or (isinstance",
        "if (isinstance",
        "the authors' format is taken for a dense model",
    ),
    Mutant("fast/checkpoints/dense.py", "    check_complete(folder, found)\n", "", "missing tensors are made up"),
    Mutant(
        "fast/checkpoints/completeness.py", '("is left over", left)', '("is left over", [])', "tensors left over pass"
    ),
    Mutant("fast/checkpoints/dense.py", "    settle_ties(model)\n", "", "a head of its own is said to be tied"),
    Mutant("fast/checkpoints/loading.py", "    untie_separate_head(model, tensors)\n", "", "a head of its own is tied"),
    Mutant("fast/checkpoints/loading.py", "    share(model, shared)\n", "", "shared parameters are not shared again"),
    Mutant("fast/models/shared.py", "if not one or one != other:", "if False:", "anything may be shared"),
    Mutant(
        "fast/integrations/hf_quantizer.py",
        "            check_complete(model.name_or_path, report)\n",
        "            pass\n",
        "random weights",
    ),
    Mutant("fast/checkpoints/convert.py", "{digest[:16]}", "{state.st_size}", "files of one size are one"),
    Mutant("fast/checkpoints/gguf_reader.py", "    complete_config(config, header)\n", "", "biases are not read"),
    Mutant(
        "fast/checkpoints/convert.py", "*ignored_tensors(header, model)", "", "tensors that no one reads are dropped"
    ),
    Mutant("fast/checkpoints/gguf_reader.py", "    if parts > 1:", "    if False:", "a part is taken for the whole"),
    Mutant(
        "fast/checkpoints/hub.py", '{"local_files_only": "/" not in name}', "{}", "the hub is asked for misspelt names"
    ),
    Mutant(
        "fast/checkpoints/fetch.py",
        "    return path.absolute()\n\n\ndef locate_packed",
        "    return path\n\n\ndef locate_packed",
        "paths are relative",
    ),
    Mutant("reference/bits.py", "bits_budget(level * share,", "bits_budget(level,", "shares are ignored"),
    Mutant("reference/bits.py", "(d_out * d_in * shares[name])", "(d_out * d_in)", "the rest is spent without shares"),
    Mutant(
        "fast/models/selection.py",
        "return weight.mT if is_conv1d(layer) else weight",
        "return weight",
        "Conv1D is taken as it lies",
    ),
    Mutant(
        "fast/models/quantize.py",
        "(queries, keys, keys) if count == 3",
        "(1, 1, 1) if count == 3",
        "queries, keys and values of equal size",
    ),
    Mutant(
        "fast/models/quantize.py",
        "        for name, module in before.items():",
        "        for name, module in ():",
        "refused models stay split",
    ),
    Mutant(
        "fast/models/allocation.py",
        "if keys >= queries or not found:",
        "if not found:",
        "a factor for models without grouped queries",
    ),
    Mutant(
        "fast/models/embeddings.py",
        "if type(embedding) is not nn.Embedding:",
        "if False:",
        "embeddings lose their scale",
    ),
    Mutant("fast/checkpoints/loading.py", "fits = is_linear(layer) and", "fits = True or", "parts of any size"),
    Mutant(
        "fast/checkpoints/saving.py",
        "embedding_section(model) | fused_section(model)",
        "embedding_section(model)",
        "split layers are not described",
    ),
    Mutant("fast/checkpoints/saving.py", "size + tensor.nbytes > shard_bytes", "False", "never sharded"),
    Mutant("fast/files/untrusted.py", "or Path(name).name != name", "", "an index may name files anywhere"),
    Mutant(
        "fast/checkpoints/storage.py",
        ' and not name.endswith(("table.scale", "table.offset"))',
        "",
        "scales and offsets are parameters",
    ),
    Mutant("fast/models/layers.py", "new.dtype != old.dtype", "False", "packed scales are cast with the model"),
    Mutant("fast/models/layers.py", "old.to(new.device)", "old", "packed scales stay behind on a device"),
    Mutant(
        "fast/models/embeddings.py",
        "QuantizedHead(head, tied=head is table)",
        "QuantizedHead(head)",
        "tied tables stored twice",
    ),
    Mutant("fast/models/embeddings.py", "model._tied_weights_keys = ", "", "transformers ties tables as weights"),
    Mutant("fast/integrations/hf_quantizer.py", "check_layers(layers, headers)", "pass", "missing tensors are made up"),
    Mutant("fast/files/untrusted.py", "for place in homes)", "for place in [real.parent])", "links lead anywhere"),
    Mutant("fast/files/untrusted.py", "if not ordinary:", "if False:", "pipes are opened"),
    Mutant("fast/checkpoints/format.py", "if claimed > JSON_BYTES:", "if False:", "headers of any size"),
    Mutant("fast/checkpoints/format.py", "> MOST_ENTRIES:", "< 0:", "shapes that overflow"),
    Mutant(
        "fast/checkpoints/format.py",
        "return used < width and bool",
        "return False and bool",
        "pad bits of files not checked",
    ),
    Mutant("fast/checkpoints/saving.py", "        order_metadata(folder / name)\n", "", "files differ from run to run"),
    Mutant("fast/checkpoints/checksums.py", "json_digest(config) != checksums.config", "False", "settings may change"),
    Mutant("fast/files/digests.py", "{dtype} {list(shape)}", "", "digests of contents alone"),
    Mutant(
        "fast/checkpoints/checksums.py",
        "if not {NO_CHECKSUMS: True,",
        "if not {version: True,",
        "checksums may be missing",
    ),
    Mutant("fast/checkpoints/loading.py", "if computed > BUFFER_BYTES:", "if False:", "buffers of any size"),
    Mutant("fast/models/build.py", "value > LARGEST_COUNT", "False", "counts of any size"),
    Mutant("fast/models/build.py", "if most is not None and count > most:", "if False:", "parameters without end"),
    Mutant(
        "fast/models/build.py", "threading.get_ident() == builder", "True", "other threads' models lose their memory"
    ),
    Mutant(
        "fast/files/atomic.py", "if not (overwrite and path.exists()):", "if not path.exists():", "overwrites unasked"
    ),
    Mutant(
        "fast/files/atomic.py",
        "if lock is not None:\n            shutil",
        "if True:\n            shutil",
        "others' work is removed",
    ),
    Mutant(
        "fast/integrations/hf_quantizer.py",
        "super().__init__(copy(quantization_config)",
        "super().__init__((quantization_config)",
        "the caller's configuration changes",
    ),
    Mutant(
        "fast/integrations/hf_quantizer.py",
        "self.update_config(model)\n        model._weight",
        "model._weight",
        "an old description is saved",
    ),
    Mutant(
        "fast/integrations/hf_quantizer.py",
        "if any(isinstance(module, LittleBitLinear)",
        "if False and any(isinstance(module, LittleBitLinear)",
        "latents are saved as a checkpoint",
    ),
    Mutant(
        "fast/integrations/hf_quantizer.py",
        "install_embeddings(model, self.quantization_config.embeddings",
        "install_embeddings(model, None",
        "no quantised embeddings in transformers",
    ),
    Mutant(
        "fast/integrations/plugin.py",
        "    HOOK.check_imported()",
        "    pass",
        "transformers that came first does not learn",
    ),
    Mutant(
        "fast/integrations/plugin.py",
        "        HOOK.module_imported(module.__name__)",
        "        pass",
        "transformers that comes later does not learn",
    ),
    Mutant(
        "fast/kernels/torch_op.py",
        "((grad.float() @ b) @ a)",
        "((grad.float() @ b) @ a * 1.001)",
        "gradient of the packed layer is off",
    ),
    Mutant("fast/cli/main.py", "return STOPPED", "return INTERRUPTED", "SIGTERM is reported as Ctrl-C"),
    Mutant(
        "fast/kernels/cuda_gemv.py",
        "- top)\n            total +=",
        ")\n            total +=",
        "shares keep their own scale",
    ),
    Mutant("fast/kernels/cuda_gemv.py", "scale8(sums, float32(1) / total)", "sums", "shares are not divided"),
    Mutant(
        "fast/kernels/cuda_gemv.py", "int32(vector * count) + at)]", "at)]", "all vectors have the first one's norm"
    ),
    Mutant(
        "fast/kernels/cuda_gemv.py", "total += y[place]", "total += float32(0)", "outputs take the place of the stream"
    ),
    Mutant("fast/kernels/cuda_gemv.py", "int32(-1) if of == 3", "int32(1) if of == 3", "the 24th plane counts as 2^22"),
    Mutant("fast/kernels/cuda_gemm.py", "place > first:", "place > 0:", "pieces of vectors are not read again"),
    Mutant(
        "fast/kernels/cuda_decode.py",
        "float32(LOWEST), float32(0)\n            item",
        "float32(9), float32(1)\n            item",
        "empty shares weigh",
    ),
    Mutant("fast/kernels/cuda_decode.py", "mine = split == 0 and", "mine =", "each block counts the new token"),
    Mutant(
        "fast/kernels/cuda_decode.py",
        "min(int32(begin + width), position)",
        "int32(begin + width)",
        "tokens beyond the last",
    ),
    Mutant(
        "fast/kernels/cuda_decode.py",
        "arrivals[uint32(block)] = 0",
        "arrivals[uint32(block)] = 1",
        "arrival counters are not reset",
    ),
    Mutant(
        "fast/kernels/cuda_unpack.py",
        "else uint32(0)\n        return",
        "else exponent\n        return",
        "NaN is everywhere",
    ),
    Mutant("fast/kernels/cuda_schedule.py", "if vectors == 1 else", "if vectors else", "one schedule for all batches"),
    Mutant(
        "fast/kernels/cuda_schedule.py", "cost(*UNPACKED_COST) <", "cost(*UNPACKED_COST) >", "unpacks small batches"
    ),
    Mutant(
        "fast/kernels/cuda_schedule.py", "tables.get(name, {}) | table", "table", "own schedules hide the shipped ones"
    ),
    Mutant(
        "fast/bench/tune.py",
        "config = min([config, *output",
        "config = max([config, *output",
        "the slowest is kept",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "low * c - high * s, high * c",
        "low * c + high * s, high * c",
        "turned back",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "2 * pair) < first_words",
        "2 * pair) <= first_words",
        "scales of a pair",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "weight * shared[uint32(held_scales + tokens",
        "weight * shared[uint32(held_scales",
        "scale",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "mean / total if combine else mean",
        "mean / total",
        "partials divided twice",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "first_tile, end = int32(split * each)",
        "first_tile, end = int32(0)",
        "tiles twice",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "signs[4:], scales[2:], signal",
        "signs[4:], scales[:2], signal",
        "upper half's scales",
    ),
    Mutant(
        "fast/kernels/cuda_mma.py", "(low * c - high * s) * query", "(low * c + high * s) * query", "keys turned back"
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py",
        "<= position else float32(LOWEST)",
        "< position else float32(LOWEST)",
        "seen",
    ),
    Mutant(
        "fast/kernels/cuda_latent_attention.py", "else float32(0)))\n", "else factor))\n", "a tile that is not there"
    ),
    Mutant("fast/decoding/ops.py", ".transpose(-1, -2).flatten(1)", ".flatten(1)", "signs of keys not in pairs"),
    Mutant("fast/bench/tune.py", "chosen = min(longer", "chosen = max(longer", "what is faster is not taken"),
    Mutant(
        "fast/decoding/torch_ops.py",
        ".float().chunk(2, -1)",
        ".float().chunk(2, -1)[::-1]",
        "gate and up are exchanged",
    ),
    Mutant("fast/decoding/fused_llama.py", "x.float(),", "x,", "16 bits are read as 32"),
    Mutant(
        "fast/decoding/fused_llama.py",
        "last[row] = x[row, length - 1 - start]",
        "last[row] = x[row, -1]",
        "the filling is the last token",
    ),
    Mutant(
        "fast/decoding/graph_decoder.py",
        "before < sampling.top_p",
        "before > sampling.top_p",
        "top_p leaves the unlikely",
    ),
    Mutant(
        "fast/decoding/graph_decoder.py", "end or token in stop", "token in stop", "sequences go on after their end"
    ),
    Mutant(
        "fast/decoding/graph_decoder.py",
        "self.length == self.engine.capacity",
        "self.length > self.engine.capacity",
        "a full cache does not grow",
    ),
]


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Find the modules of the packages that a source file imports, as paths such as fast/models/layers.py."""
    package = ("littlebit", *path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {tuple(each.name.split(".")) for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = (*parents, *(node.module.split(".") if node.module else ()))
            names |= {module, *((*module, each.name) for each in node.names)}
    paths = {"/".join(name[1:]) + ".py" for name in names if name[0] == "littlebit"}
    return frozenset(path for path in paths if (ROOT / path).is_file())


@cache
def used_modules(path: Path) -> frozenset[str]:
    """Find the modules whose functions a test calls through a package, such as `lb.save`."""
    tree = ast.parse(path.read_text())
    imports = [each for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
    packages = {each.asname: each.name.removeprefix("littlebit.") for each in imports}
    names = [
        (packages[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages
    ]
    return frozenset(exports(package)[name] for package, name in names if name in exports(package))


@cache
def exports(package: str) -> dict[str, str]:
    """Map each public name of a package to the path of the module that it comes from."""
    if package not in ("reference", "fast"):
        return {}
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    return {
        each.name: f"{package}/{node.module.replace('.', '/')}.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for each in node.names
    }


def tests_of(file: str) -> list[Path]:
    """Choose the tests of a module, the likeliest to notice a mistake first.

    First come the tests that import the module, then the tests that call its public functions, and the laws if it is a
    module of the method. If there are fewer than
    FEW, the tests follow that do so with a module that imports it. Last come the others in the module's test folder.
    """
    folder = ROOT / "tests" / TEST_FOLDERS.get(Path(file).parent.name, Path(file).parent.name)
    tests = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.stem not in UNUSED]
    chosen = [path for path in tests if file in imported_modules(path)]
    chosen += [path for path in tests if file in used_modules(path)]
    chosen += [path for path in tests if path.stem == "test_laws" and folder.name == "method"]
    if len(chosen) < FEW:
        sources = [path for package in ("reference", "fast") for path in (ROOT / package).rglob("*.py")]
        users = {str(path.relative_to(ROOT)) for path in sources if file in imported_modules(path)}
        chosen += [path for path in tests if users & (imported_modules(path) | used_modules(path))]
    chosen += [path for path in tests if path.parent == folder]
    return list(dict.fromkeys(chosen))


def run(mutant: Mutant, folder: Path) -> tuple[bool, float]:
    """Run the tests of one mutant; return whether they notice it, and the seconds that they took."""
    start = time.perf_counter()
    copy = folder / "littlebit"
    for package in ("reference", "fast"):
        shutil.copytree(
            ROOT / package, copy / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    path = copy / mutant.file
    text = path.read_text()
    if mutant.old not in text:
        raise SystemExit(
            f"{mutant.file} must contain {mutant.old!r} ({mutant.what}), but does not: update tests/stress/mutants.py"
        )
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    environment = os.environ | {"PYTHONPATH": str(folder), "HYPOTHESIS_PROFILE": "quick", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += map(str, tests_of(mutant.file))
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
        noticed = done.returncode == 1
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutant.what}: the tests could not run:\n{done.stdout.decode()}{done.stderr.decode()}")
    except subprocess.TimeoutExpired:
        noticed = False  # The tests may hang, or may just be slow: no test has failed.
    return noticed, time.perf_counter() - start


def main() -> int:
    """Run all mutants, or the ones that the arguments select; return 0 if the tests notice enough of them."""
    words = sys.argv[1:]
    mutants = [each for each in MUTANTS if not words or any(word in each.file + each.what for word in words)]
    if not mutants:
        raise SystemExit(f"no mutant's file or description contains {' or '.join(words)}")
    noticed = 0
    with tempfile.TemporaryDirectory() as base, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        free = [Path(base) / f"worker-{number}" for number in range(WORKERS)]

        def run_in_free_folder(mutant: Mutant) -> tuple[Mutant, bool, float]:
            folder = free.pop()  # A worker keeps its folder, so that Numba's cache serves its next mutant.
            try:
                return mutant, *run(mutant, folder)
            finally:
                free.append(folder)

        for mutant, found, seconds in pool.map(run_in_free_folder, mutants):
            noticed += found
            print(f"{'noticed ' if found else 'SURVIVED'} {seconds:5.0f} s  {mutant.file}: {mutant.what}", flush=True)
    share = noticed / len(mutants)
    print(f"{noticed} of {len(mutants)} mutants noticed ({share:.1%}); {REQUIRED:.0%} are required")
    return 0 if share >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
