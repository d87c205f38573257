"""The two sequence mixers, heads split over the tensor-parallel group (paper, section 3).

Attention:  q, k = RoPE(W_q u), RoPE(W_k u);  out = W_o softmax(q kᵀ / √head_dim, causal) W_v u
SSD:        x = W_x u;  b, c = RoPE(W_b u), RoPE(W_c u);  Δ = softplus(W_dt u + dt_bias)
            S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t b_tᵀ,  y_t = S_t c_t (+ D x_t),  out = W_o y

Both take the same cos/sin at the same positions: the Unified RoPE.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from kernels.attention import attention
from kernels.rope.rope import rotate_qkv
from kernels.ssd.ssd import ssd_from_log
from kernels.ssd.tables import ScanTables
from parallel.config import ModelConfig
from parallel.context import add_earlier_ranks, context_attention
from parallel.layers import (
    column_linear,
    head_parameter,
    recomputed,
    row_linear,
)
from parallel.projections import project


@dataclass(frozen=True)
class Positions:
    """What the mixers know of the micro-batch: its shape, document borders and rotations.

    With context parallelism this rank has seq_len = L / context tokens of each row. cu_seqlens:
    int32 [num_segments + 1] borders of whole rows, local_cu_seqlens of what this rank has;
    position_ids [B, seq_len]. attention_rope, ssd_rope: (cos, sin), each float32
    [B, seq_len, dim/2], or None where nothing is rotated. scan_tables: what Triton's scan makes of
    local_cu_seqlens and ssd_rope, None where it does not run. ages: int64 [T], of every token since
    its document began; None without a convolution.
    """

    batch_size: int
    seq_len: int
    cu_seqlens: Tensor
    local_cu_seqlens: Tensor
    position_ids: Tensor
    attention_rope: tuple[Tensor, Tensor] | None
    ssd_rope: tuple[Tensor, Tensor] | None
    scan_tables: ScanTables | None
    ages: Tensor | None


def document_ages(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Tokens since the document began, int64 [tokens], of packed documents."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    return token - cu_seqlens.long()[document]


class AttentionMixer(nn.Module):
    """Causal grouped-query attention within documents."""

    def __init__(self, model: ModelConfig, config: ModelParallelConfig, recompute: bool) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.head_dim = model.head_dim
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.q_proj = column_linear(model.hidden_size, width, config)
        self.k_proj = column_linear(model.hidden_size, kv_width, config)
        self.v_proj = column_linear(model.hidden_size, kv_width, config)
        self.o_proj = row_linear(width, model.hidden_size, config)

    def forward(self, h: Tensor, positions: Positions) -> Tensor:
        """[T or T/tp, 1, hidden] → the same."""
        q, k, v = project(h, (self.q_proj, self.k_proj, self.v_proj), self.config)
        out = (
            recomputed(self.attend, q, k, v, positions)
            if self.recompute
            else self.attend(q, k, v, positions)
        )
        return self.o_proj(out)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """What is between the projections: [T, 1, heads or kv_heads / tp · head_dim] → of heads."""
        rows, dim = (positions.batch_size, positions.seq_len), self.head_dim
        # [B, L, heads / tp, head_dim]; unsafe: for autograd no views, so they may be overwritten
        q, k, v = (
            torch.ops.aten._unsafe_view(t, (*rows, t.shape[-1] // dim, dim)) for t in (q, k, v)
        )
        if positions.attention_rope is not None:
            # in place, so that what remains of the projections' buffer is what attention keeps
            inplace = not self.recompute  # else they are read again
            q, k, v = rotate_qkv(q, k, v, *positions.attention_rope, inplace=inplace)
        if self.config.context_parallel_size > 1:
            out = context_attention(q, k, v, positions.cu_seqlens, positions.position_ids)
        else:
            out = attention(q, k, v, positions.cu_seqlens)  # [B, L, heads / tp, head_dim]
        return out.flatten(2).view(-1, 1, q.shape[2] * self.head_dim)


class CausalConv(nn.Module):
    """silu of a depthwise causal convolution within documents, as the rivals' mixers have.

    weight [channels, 1, width]: the channels of x, b and c in this order; each kind is split over
    ranks, so a rank's channels are three ranges of the whole.
    """

    def __init__(
        self, channels: int, width: int, config: ModelParallelConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(channels, 1, width, dtype=config.params_dtype, device=device)
        )

    def forward(self, xbc: Tensor, ages: Tensor) -> Tensor:
        """[T, channels] → the same; taps that would reach into an earlier document read zero.

        ages: int64 [T], tokens since the document began.
        """
        total, width = xbc.shape[0], self.weight.shape[-1]
        out = xbc * self.weight[:, 0, -1]
        for back in range(1, min(width, total)):
            shifted = F.pad(xbc, (0, 0, back, 0))[:total]
            inside = (ages >= back)[:, None]
            out = out + torch.where(inside, shifted, 0) * self.weight[:, 0, -1 - back]
        return F.silu(out)


class SSDMixer(nn.Module):
    """State-space-duality scan with rotated B and C."""

    def __init__(
        self,
        model: ModelConfig,
        config: ModelParallelConfig,
        device: torch.device,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.head_dim, self.state_dim = model.head_dim, model.state_dim
        self.observe: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """Told Δ before its bias, the bias, and A (parallel.vitals)."""
        self.chunk_size = model.chunk_size
        tensor = config.tensor_model_parallel_size
        width, bc_width = model.num_heads * model.head_dim, model.ssd_groups * model.state_dim
        heads = model.num_heads // tensor
        self.x_proj = column_linear(model.hidden_size, width, config)
        self.b_proj = column_linear(model.hidden_size, bc_width, config)
        self.c_proj = column_linear(model.hidden_size, bc_width, config)
        self.dt_proj = column_linear(model.hidden_size, model.num_heads, config)
        self.out_proj = row_linear(width, model.hidden_size, config)
        # used in float32; stored like the other weights, with a float32 master
        self.A_log = head_parameter(heads, config.params_dtype, device)
        self.dt_bias = head_parameter(heads, config.params_dtype, device)
        self.D = head_parameter(heads, config.params_dtype, device) if model.ssd_skip else None
        self.conv = (
            CausalConv((width + 2 * bc_width) // tensor, model.ssd_conv_width, config, device)
            if model.ssd_conv_width
            else None
        )

    def forward(self, h: Tensor, positions: Positions) -> Tensor:
        """[T or T/tp, 1, hidden] → the same."""
        linears = (self.x_proj, self.b_proj, self.c_proj, self.dt_proj)
        x, b, c, dt = project(h, linears, self.config)  # [T, 1, channels or heads / tp]
        y = (
            recomputed(self.scan, x, b, c, dt, positions)
            if self.recompute
            else self.scan(x, b, c, dt, positions)
        )
        return self.out_proj(y)[0]

    def scan(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, positions: Positions) -> Tensor:
        """What is between the projections: [T, 1, channels / tp] each → [T, 1, x's]."""
        if self.conv is not None:
            assert positions.ages is not None
            xbc = self.conv(torch.cat((x, b, c), dim=-1).squeeze(1), positions.ages)
            widths = [x.shape[-1], b.shape[-1], c.shape[-1]]
            x, b, c = (t.contiguous().unsqueeze(1) for t in xbc.split(widths, dim=-1))
            dt = dt.clone(memory_format=torch.contiguous_format)  # else it keeps all their buffer
        rows = (positions.batch_size, positions.seq_len)
        cos, sin = positions.ssd_rope or (None, None)
        dt = dt.view(*rows, -1)
        if self.observe is not None:
            self.observe(dt, self.dt_bias, self.A())
        c = c.reshape(*rows, -1, self.state_dim)  # [B, L, groups / tp, N]
        y, final_state = ssd_from_log(
            x.reshape(*rows, -1, self.head_dim),  # [B, L, heads / tp, P]
            dt,
            self.A_log,
            b.reshape(*rows, -1, self.state_dim),
            c,
            cos=cos,
            sin=sin,
            dt_bias=self.dt_bias,
            cu_seqlens=positions.local_cu_seqlens,
            chunk_size=self.chunk_size,
            D=self.D,
            tables=positions.scan_tables,
        )
        if self.config.context_parallel_size > 1:
            y = add_earlier_ranks(
                y, final_state, dt, self.A(), c, cos, sin, self.dt_bias, positions.position_ids
            )
        return y.view(x.shape[0], 1, -1)

    def A(self) -> Tensor:
        """[heads / tp] float32, negative; the scan's kernels compute their own."""
        return -torch.exp(self.A_log.float())
