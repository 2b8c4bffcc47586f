"""Compute a packed layer on a GPU: keep its tensors, and choose among the GEMV, the GEMM and cuBLAS.

`FusedProjections` launches layers that share their input together (q, k and v, or gate and up), for the decoder.
`CudaPackedLayer` is one layer, for any number of rows.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors
from . import cuda_driver, cuda_schedule
from .cpu_layer import group_paths
from .cuda_gemv import SplitKvPartials
from .cuda_launch import Norm, groups_of_eight, launch_gemm, launch_gemv, launch_plain, launch_unpack, shape_of
from .cuda_schedule import (
    DTYPE_NAMES,
    MAX_EXACT_ROWS,
    MAX_GEMV_ROWS,
    GemmConfig,
    GemmWorkspace,
    LaunchConfig,
    exclusive_sums,
    gemm_config,
    is_faster_unpacked,
    vectors_of,
    workspace_sizes,
)
from .unpacked import unpacked_linear


class FusedProjections:
    """Packed layers that share their input, launched together: q, k and v, or gate and up, or one layer alone.

    Parameters
    ----------
    layers : sequence of sequences of tensors
        For each layer the tensors of its one or two paths, one after the other, on one GPU, of fitting shapes and
        dtypes.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]]):
        self.kept = [[cuda_driver.kernel_layout(tensor) for tensor in tensors] for tensors in layers]
        self.layers = [
            [PackedFactors(*map(cuda_driver.array, path)) for path in group_paths(kept)] for kept in self.kept
        ]
        self.shape = shape_of(self.layers)
        self.index = self.kept[0][0].device.index
        self.device = cuda_driver.device_properties(self.index)
        self.capability = torch.cuda.get_device_capability(self.index)
        self.pdl = self.capability >= cuda_driver.PDL_CAPABILITY
        self.configs: dict[int, LaunchConfig | None] = {}

    def launch_config(self, rows: int) -> LaunchConfig | None:
        """Choose the configuration for `rows` rows of x; None if no block has enough shared memory."""
        vectors = vectors_of(rows)
        if vectors not in self.configs:
            self.configs[vectors] = cuda_schedule.launch_config(self.shape, rows, self.device)
        return self.configs[vectors]

    def latent_size(self, rows: int, config: LaunchConfig) -> int:
        """Count the elements of t, the latents in split-K partial sums, for `rows` rows of x."""
        return config.split_k * rows * self.shape.columns

    def launch(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        config: LaunchConfig | None = None,
        pdl: bool | None = None,
        norm: tuple[Tensor, Tensor, int, float] | None = None,
        activation: str | None = None,
        bias: Tensor | None = None,
        squares: Tensor | None = None,
        split_kv: SplitKvPartials | None = None,
    ) -> None:
        """Compute y from x by the GEMV, on torch's current stream; see `launch_gemv` for the arguments.

        Tensors are contiguous. x and y have a row for each vector and the same dtype, a key of DTYPE_NAMES. `norm` has
        the fields of `Norm`.
        """
        rows = len(y)
        config, pdl = config or self.launch_config(rows), self.pdl if pdl is None else pdl
        with torch.cuda.device(self.index):
            launch_gemv(
                cuda_driver.array(x),
                DTYPE_NAMES[x.dtype],
                rows,
                self.layers,
                cuda_driver.array(y),
                cuda_driver.array(t),
                config,  # type: ignore[arg-type]
                pdl,
                self.starter(pdl),
                Norm(cuda_driver.array(norm[0]), cuda_driver.array(norm[1]), *norm[2:]) if norm else None,
                activation,
                None if bias is None else cuda_driver.array(bias),
                None if squares is None else cuda_driver.array(squares),
                split_kv,
            )

    def starter(self, pdl: bool) -> Any:
        """Return the function that launches a kernel on torch's current stream of the current device."""
        return partial(cuda_driver.start, torch.cuda.current_stream().cuda_stream, pdl)


class CudaPackedLayer(FusedProjections):
    """A packed layer on a GPU, valid while its tensors stay as they are.

    Parameters
    ----------
    tensors : sequence of Tensor
        Of its one or two paths, one after the other, on a GPU, of fitting shapes and dtypes.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__([tensors])
        self.paths = group_paths(self.kept[0])
        self.d_out, self.d_in = self.shape.d_outs[0], self.shape.d_in
        self.ranks = self.shape.ranks[0]
        self.seen = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self.kept[0]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether `tensors` are the ones that the kernels read: same memory, dtypes and shapes, contiguous.

        Always False for tensors that had to be copied.
        """
        return self.seen == [
            (tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors if tensor.is_contiguous()
        ]

    def __call__(self, x: Tensor, version: str | None = None, config: LaunchConfig | None = None) -> Tensor:
        """Compute the layer's output on torch's current stream, without waiting for the device.

        Several threads and streams may call it at once.

        Parameters
        ----------
        x : (..., d_in) float tensor
            float64 is rounded to float32.
        version : str, optional
            Of the GEMV, one of cuda_driver.VERSIONS. By default the fastest of GEMV, GEMM and cuBLAS with unpacked
            signs.
        config : LaunchConfig, optional
            For the GEMV.

        Returns
        -------
        (..., d_out) tensor of x's dtype
        """
        if x.dtype not in DTYPE_NAMES:
            x = x.to(torch.float32)
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        rows = x.numel() // self.d_in
        y = torch.empty(*x.shape[:-1], self.d_out, dtype=x.dtype, device=x.device)
        if not rows:
            return y
        if version is None and config is None and rows > MAX_GEMV_ROWS and x.dtype != torch.float32:
            return self.unpacked(x) if is_faster_unpacked(self.shape, rows) else self.gemm(x, y, rows)
        config = config or self.launch_config(rows)
        if version is None and (config is None or rows > MAX_EXACT_ROWS):
            return self.unpacked(x)
        if version == "plain":
            return self.plain(x, y, rows)
        t = torch.empty(self.latent_size(rows, config), dtype=torch.float32, device=x.device)  # type: ignore[arg-type]
        self.launch(x, y.view(rows, self.d_out), t, config, self.pdl and version != "tensor")
        return y

    def plain(self, x: Tensor, y: Tensor, rows: int) -> Tensor:
        """Compute y by the naive GEMV."""
        t = torch.empty(rows * sum(self.ranks), dtype=torch.float32, device=x.device)
        arrays = cuda_driver.array(y), cuda_driver.array(t)
        with torch.cuda.device(self.index):
            start = self.starter(False)
            launch_plain(cuda_driver.array(x), DTYPE_NAMES[x.dtype], rows, self.layers[0], *arrays, start)
        return y

    def gemm_config(self, rows: int) -> GemmConfig:
        """Choose how to launch the GEMM for `rows` rows of x."""
        return gemm_config(self.shape, rows, self.device.multiprocessors, self.has_wgmma)

    @property
    def has_wgmma(self) -> bool:
        """Return whether the GPU has wgmma."""
        return self.capability == cuda_schedule.WGMMA_CAPABILITY

    def gemm(self, x: Tensor, y: Tensor, rows: int, config: GemmConfig | None = None) -> Tensor:
        """Compute y by the GEMM."""
        config = config or self.gemm_config(rows)
        counts = workspace_sizes(self.shape, rows, config)
        places, total = exclusive_sums(-(-count // 4) * 4 for count in counts)
        memory = torch.empty(total, dtype=torch.int32, device=x.device)
        arrays = (cuda_driver.Array(memory.data_ptr() + 4 * at, n) for at, n in zip(places, counts, strict=True))
        arguments = cuda_driver.array(x), DTYPE_NAMES[x.dtype], rows, self.layers[0], cuda_driver.array(y)
        with torch.cuda.device(self.index):
            start = self.starter(self.pdl)
            launch_gemm(*arguments, GemmWorkspace(*arrays), config, self.pdl, start, self.has_wgmma)
        return y

    def unpacked(self, x: Tensor) -> Tensor:
        """Compute y by unpacking the signs to x's dtype and two dense products."""
        if x.dtype == torch.float32:
            return unpacked_linear(x.reshape(-1, self.d_in), self.paths).reshape(*x.shape[:-1], self.d_out)
        a, b = self.factors(x.dtype)
        return functional.linear(functional.linear(x, a), b)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Unpack all paths to one pair of matrices in float16 or bfloat16; see cuda_unpack.py.

        Returns
        -------
        A (R, d_in) and B (d_out, R), R the sum of ranks, each rounded up to a multiple of eight. The rows of A and
        columns of B that this adds are zero.
        """
        rows, columns = 8 * sum(map(groups_of_eight, self.ranks)), 8 * groups_of_eight(self.d_in)
        memory = torch.empty(rows * (columns + self.d_out), dtype=dtype, device=self.kept[0][0].device)
        with torch.cuda.device(self.index):
            out, start = cuda_driver.array(memory), self.starter(self.pdl)
            launch_unpack(DTYPE_NAMES[dtype], self.layers[0], out, self.device.multiprocessors, self.pdl, start)
        a, b = memory[: rows * columns], memory[rows * columns :]
        return a.view(rows, columns)[:, : self.d_in], b.view(self.d_out, rows)


def output_blocks(d_out: int, config: LaunchConfig) -> int:
    """Count the sums of squares for each row of x: one for each block of a layer's second kernel."""
    return -(-d_out // config.output.rows)
