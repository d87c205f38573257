"""One token of the SSD recurrence, for decoding.

Δ = softplus(dt + dt_bias)      b, c = RoPE(B), RoPE(C)
S' = exp(Δ A) S + Δ x bᵀ        y = S' c  (+ D x)
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.checks import check_contiguous, check_rows, check_tables, check_tensor
from kernels.dispatch import choose
from kernels.ssd.naive import ssd_naive
from kernels.target import launch_on

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cos: Tensor | None,
    sin: Tensor | None,
    dt_bias: Tensor,
    D: Tensor | None = None,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one token: y [B, H, P] in x's dtype, and the state [B, H, P, N] after it.

    state:      [B, H, P, N] float32, bfloat16 or float16, contiguous; as `ssd` returns it
    x:          [B, H, P] float32, bfloat16 or float16, last dimension contiguous, as of B and C
    dt:         [B, H] before softplus, x's dtype or float32
    A:          [H] float32, negative
    B, C:       [B, G, N] before rotation, x's dtype; head h reads group h // (H/G)
    cos, sin:   [B, N/2] float32, of the token's position; both None: no rotation
    dt_bias, D: [H] float32 or x's dtype
    out_state:  where the new state goes, like `state`, which it may be; None: a new tensor

    Computed in float32 and rounded at the end, so y is that of the unrounded state. Not
    differentiable. Where x is float64, float32 reads float64 and the state is float64 too.

    Raises ValueError for a wrong shape, device or stride, TypeError for a wrong dtype.
    """
    _check(state, x, dt, A, B, C, cos, sin, dt_bias, D, out_state)
    unsupported = "Triton kernels compute in float32, not float64"
    choice = choose("ssd_step", x.device, unsupported if x.dtype == torch.float64 else None)
    new_state = torch.empty_like(state) if out_state is None else out_state
    if choice == "triton":
        from kernels.ssd.fused_step import step

        with launch_on(x):
            return step(state, x, dt, A, B, C, cos, sin, dt_bias, D, new_state), new_state
    run = _step_naive if choice == "naive" else _step
    y, after = run(state, x, dt, A, B, C, cos, sin, dt_bias, D)
    return y.to(x.dtype), new_state.copy_(after)


def _step_naive(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle's scan of one token; float64."""
    cos, sin = (None if t is None else t.unsqueeze(1) for t in (cos, sin))
    y, after = ssd_naive(
        x.unsqueeze(1), dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1),
        cos=cos, sin=sin, dt_bias=dt_bias, D=D, initial_state=state,
        cu_seqlens=torch.arange(len(x) + 1), output_final_state=True,
    )  # fmt: skip
    return y.squeeze(1), after


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the state after the token, in float32 (float64 for float64)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    grouped = (batch, groups, heads // groups * head_dim)  # rows of the state that share b and c
    delta = softplus(dt.to(exact) + dt_bias.to(exact))  # [B, H]
    b, c = _rotated(B.to(exact), cos, sin), _rotated(C.to(exact), cos, sin)  # [B, G, N]
    exact_x = x.to(exact)
    after = state.to(exact) * torch.exp(delta * A.to(exact))[..., None, None]
    after = after.view(*grouped, state_dim)
    after.addcmul_((delta[..., None] * exact_x).view(*grouped, 1), b.unsqueeze(2))
    y = torch.matmul(after, c.unsqueeze(-1)).view(x.shape)
    if D is not None:
        y.addcmul_(D.to(exact)[:, None], exact_x)
    return y, after.view(state.shape)


def _rotated(b: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """[B, G, N] by [B, N/2], in b's dtype."""
    if cos is None or sin is None:
        return b
    cos, sin = cos.to(b.dtype).unsqueeze(1), sin.to(b.dtype).unsqueeze(1)
    first, second = b.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _check(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cos: Tensor | None,
    sin: Tensor | None, dt_bias: Tensor, D: Tensor | None, out_state: Tensor | None,
) -> None:  # fmt: skip
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, P], none of them 0")
    check_tensor("x", x, x.shape, _DTYPES, x.device)
    batch, heads, head_dim = x.shape
    if B.ndim != 3 or 0 in B.shape or B.shape[0] != batch or heads % B.shape[1]:
        raise ValueError(
            f"B has shape {tuple(B.shape)}; expected [{batch}, G, N] with G dividing {heads} heads"
        )
    state_dim = B.shape[2]
    check_tables(cos, sin, state_dim)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    held = (exact,) if x.dtype == torch.float64 else _DTYPES[:3]
    whole, table = (batch, heads, head_dim, state_dim), (batch, state_dim // 2)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "state": (state, whole, held),
        "dt": (dt, (batch, heads), (x.dtype, exact)),
        "A": (A, (heads,), (exact,)),
        "B": (B, tuple(B.shape), (x.dtype,)),
        "C": (C, tuple(B.shape), (x.dtype,)),
        "cos": (cos, table, (torch.float32,)),
        "sin": (sin, table, (torch.float32,)),
        "dt_bias": (dt_bias, (heads,), (exact, x.dtype)),
        "D": (D, (heads,), (exact, x.dtype)),
        "out_state": (out_state, whole, (state.dtype,)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, x.device)
    for name, tensor in (("x", x), ("B", B), ("C", C)):
        check_rows(name, tensor)
    for name, held_state in (("state", state), ("out_state", out_state)):
        if held_state is not None:
            check_contiguous(name, held_state)
