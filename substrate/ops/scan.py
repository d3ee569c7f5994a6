"""The scan of Mamba-2 as matrix products, with a backward pass of its own (arXiv:2405.21060, section 6, "SSD").

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t

Inside a chunk it is a masked, decayed attention of C against B; between chunks the recurrence over chunk states is itself
a small lower-triangular product. The backward pass is the same products transposed. The gradient of a decay needs no
product of its own: decays enter through exponentials, so with l = the log decay up to a token,

    dL/dl_t = dL/dy_t . y_t  -  dL/d(dt_t x_t) . dt_t x_t

and what the states carry adds to the last token of each chunk. So it keeps one tensor of L x L for each chunk and head
where automatic differentiation keeps four.

S sequence, B batch, H heads, G groups of heads, Q heads of a group (H = G x Q), P head dim, N state dim, C chunks, L
positions of a chunk, T source positions of a chunk (T = L). All sizes are this rank's.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_scan(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    chunk_size: int,
    document_SB: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence from a zero state over S tokens, in float32.

    dt is positive, or 0 where a token must not change the state; A is negative. Where `document_SB` changes from one
    token to the next, the state starts from zero again. Returns y_SBHP without the D term, and the state h_BHPN after
    the last token.
    """
    xbc_SBI = torch.cat([t.flatten(2) for t in (x_SBHP, B_SBGN, C_SBGN)], -1)
    (_, _, H, P), G = x_SBHP.shape, B_SBGN.shape[2]
    y_SBI, h_BHPN = _Scan.apply(xbc_SBI, dt_SBH, A_H, torch.zeros_like(A_H), (H, P, G), chunk_size, document_SB)
    return y_SBI.view(x_SBHP.shape), h_BHPN


def scan_of_channels(
    xbc_SBI: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    sizes: tuple[int, int, int],
    chunk_size: int,
    document_SB: Tensor | None = None,
) -> Tensor:
    """Returns what `chunked_scan` says with the term D x added, (S, B, H x P) in float32, for [x | B | C] in one tensor.

    Its gradient is one tensor too, so that nothing has to be put together. sizes: H, P and G.
    """
    y_SBI: Tensor = _Scan.apply(xbc_SBI, dt_SBH, A_H, D_H, sizes, chunk_size, document_SB)[0]
    return y_SBI


class _Chunks(NamedTuple):
    """How S tokens are cut: equally, so that 130 tokens at chunk_size 64 are 3 chunks of 44 and not 3 of 64."""

    num: int
    length: int
    total: int

    def split(self, t: Tensor, *heads: int) -> Tensor:
        """(S, B, heads..., d) -> (B, heads..., C, L, d) in float32; zeros fill the tail, where dt = 0 keeps the state."""
        surplus = self.num * self.length - self.total
        t = F.pad(t, (0, 0) * (t.dim() - 1) + (0, surplus)) if surplus else t
        t = t.reshape(self.num, self.length, t.shape[1], *heads, -1)
        t = t.permute(2, *range(3, 3 + len(heads)), 0, 1, t.dim() - 1)
        return t.float().contiguous()

    def join(self, t: Tensor, into_SBX: Tensor) -> None:
        """Writes (B, G, Q, C, L, d) to (S, B, G x Q x d)."""
        t = t.permute(3, 4, 0, 1, 2, 5)
        if self.num * self.length == self.total:
            into_SBX.unflatten(0, t.shape[:2]).unflatten(-1, t.shape[3:]).copy_(t)
        else:
            into_SBX.copy_(t.flatten(0, 1)[: self.total].flatten(2))


class _Decays(NamedTuple):
    """Decays between the tokens and states of one document, 0 between those of different documents."""

    within: Tensor  # (B, G, Q, C, L, T): from position t of a chunk to position l
    to_end: Tensor  # (B, G, Q, C, L, 1): from a position to the end of its chunk
    from_start: Tensor  # (B, G, Q, C, L, 1): from the start of the chunk to after a position
    carried: Tensor  # (B, G, Q, C + 1, C): from the end of a chunk to the start of each later one


def _decays(log_decay: Tensor, cut: _Chunks, document_SB: Tensor | None) -> _Decays:
    """log_decay: (B, G, Q, C, L), from the start of the chunk to after position l."""
    device = log_decay.device
    visible = torch.ones(cut.length, cut.length, dtype=torch.bool, device=device).tril()
    later = torch.ones(cut.num + 1, cut.num, dtype=torch.bool, device=device).tril(-1)
    at_end: Tensor | bool = True  # whether a token belongs to the document at its chunk's end
    at_start: Tensor | bool = True  # whether it belongs to the document at the end of the chunk before
    if document_SB is not None:
        # The tail of the last chunk has the last token's document.
        tail = document_SB[-1:].expand(cut.num * cut.length - cut.total, -1)
        documents = torch.cat([document_SB, tail]).T.unflatten(1, (cut.num, cut.length))[
            :, None, None
        ]  # (B, 1, 1, C, L)
        last = documents[..., -1:]
        visible = visible & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
        # The document of the state that each chunk starts from, and of the last state.
        before = F.pad(last, (0, 0, 1, 0), value=-1)  # (B, 1, 1, C + 1, 1)
        at_end, at_start = documents == last, documents == before[..., :-1, :]
        later = later & (before == last.transpose(-1, -2))
    within = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill_(~visible, -torch.inf).exp_()
    total = F.pad(log_decay[..., -1].cumsum(-1), (1, 0))  # (B, G, Q, C + 1)
    return _Decays(
        within,
        ((log_decay[..., -1:] - log_decay).exp_() * at_end).unsqueeze(-1),
        (log_decay.exp() * at_start).unsqueeze(-1),
        (total.unsqueeze(-1) - total[..., None, 1:]).masked_fill_(~later, -torch.inf).exp_(),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        xbc_SBI: Tensor,
        dt_SBH: Tensor,
        A_H: Tensor,
        D_H: Tensor,
        sizes: tuple[int, int, int],
        chunk_size: int,
        document_SB: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        S, num_rows, width = xbc_SBI.shape
        H, P, G = sizes
        widths = [H * P, *[(width - H * P) // 2] * 2]
        num_chunks = -(-S // chunk_size)
        cut, heads = _Chunks(num_chunks, -(-S // num_chunks), S), (G, H // G)
        of_x, of_b, of_c = xbc_SBI.split(widths, -1)
        x = cut.split(of_x, *heads)  # (B, G, Q, C, L, P)
        dt = cut.split(dt_SBH, *heads)  # (B, G, Q, C, L, 1)
        b, c = cut.split(of_b, G, 1), cut.split(of_c, G, 1)  # (B, G, 1, C, L, N)
        decays = _decays((dt.squeeze(-1) * A_H.float().view(*heads, 1, 1)).cumsum(-1), cut, document_SB)
        xdt = x * dt
        y = _product(_product(c, b.mT) * decays.within, xdt)
        # What each chunk adds to the state, and from it the state at the start of every chunk and after the last one.
        left = _product((xdt * decays.to_end).mT, _of_heads(b, x))  # (B, G, Q, C, P, N)
        entering = _carry(decays.carried[..., :-1, :], left)
        y.addcmul_(_product(_of_heads(c, x), entering.mT), decays.from_start)
        if any(ctx.needs_input_grad[:4]):
            ctx.save_for_backward(x, dt, A_H, D_H, b, c, *decays, left, entering, y)
            ctx.cut, ctx.widths, ctx.types = cut, widths, [t.dtype for t in (xbc_SBI, dt_SBH, A_H, D_H)]
        ctx.set_materialize_grads(False)
        y_SBI = torch.empty(S, num_rows, widths[0], device=y.device)
        cut.join(y, y_SBI)
        y_SBI.unflatten(-1, (H, P)).addcmul_(of_x.unflatten(-1, (H, P)), D_H.float().unsqueeze(-1))
        return y_SBI, _carry(decays.carried[..., -1:, :], left).flatten(1, 3)

    @staticmethod
    def backward(ctx: Any, gy_SBI: Tensor, gh_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A_H, D_H, b, c, within, to_end, from_start, carried, left, entering, y = ctx.saved_tensors
        cut, xdt, heads = ctx.cut, x * dt, x.shape[1:3]
        b_heads, c_heads = _of_heads(b, x), _of_heads(c, x)
        gy = cut.split(gy_SBI, *heads)

        # What the states give to the tokens, and the chunks to the states.
        gy_start = gy * from_start
        g_c = _product(gy_start, entering).sum(2, keepdim=True)
        g_entering = _product(gy_start.mT, c_heads)
        g_left = _carry(carried[..., :-1, :].mT, g_entering)
        of_states = (entering * g_entering).sum((-1, -2))  # (B, G, Q, C)
        if gh_BHPN is not None:
            g_last = gh_BHPN.float().unflatten(1, (*heads, 1))
            g_left += _carry(carried[..., -1:, :].mT, g_last)
            of_last = (_carry(carried[..., -1:, :], left) * g_last).sum((-1, -2))
        else:
            of_last = of_states.new_zeros(*of_states.shape[:3], 1)

        # What the tokens of a chunk give to one another.
        g_xdt = _product((_product(c, b.mT) * within).mT, gy)
        g_xdt.addcmul_(_product(b_heads, g_left.mT), to_end)
        g_products = _product(gy, xdt.mT).mul_(within).sum(2, keepdim=True)  # of c b^T
        g_c += _product(g_products, b)
        g_b = _product(g_products.mT, c)
        g_b += _product(xdt.mul_(to_end), g_left).sum(2, keepdim=True)

        along_x = torch.linalg.vecdot(x, g_xdt)  # (B, G, Q, C, L)
        g_log = torch.linalg.vecdot(gy, y) - along_x * dt.squeeze(-1)
        # A chunk's whole decay multiplies what it leaves and all states after it.
        of_left = (left * g_left).sum((-1, -2))
        of_later = torch.cat([of_states[..., 1:], of_last], -1)
        g_log[..., -1] += of_left + _from_here(of_later - of_left)
        g_steps = _from_here(g_log)  # of dt A
        g_dt = g_steps * A_H.float().view(*heads, 1, 1) + along_x
        g_A = (g_steps * dt.squeeze(-1)).sum((0, 3, 4)).flatten() if ctx.needs_input_grad[2] else None
        g_D = torch.linalg.vecdot(gy, x).sum((0, 3, 4)).flatten() if ctx.needs_input_grad[3] else None

        of_xbc, of_dt, of_A, of_D = ctx.types
        g_xbc_SBI = gy_SBI.new_empty(*gy_SBI.shape[:2], sum(ctx.widths), dtype=of_xbc)
        g_dt_SBH = gy_SBI.new_empty(*gy_SBI.shape[:2], len(A_H), dtype=of_dt)
        of_gy = D_H.float().view(*heads, 1, 1, 1)
        pieces = (g_xdt.mul_(dt).addcmul_(gy, of_gy), g_b, g_c)
        for piece, into in zip(pieces, g_xbc_SBI.split(ctx.widths, -1), strict=True):
            cut.join(piece, into)
        cut.join(g_dt.unsqueeze(-1), g_dt_SBH)
        return g_xbc_SBI, g_dt_SBH, _typed(g_A, of_A), _typed(g_D, of_D), None, None, None


def _typed(gradient: Tensor | None, kind: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(kind)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as one batched product: `@` would copy operands with so many dimensions whose last two are transposed."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def _of_heads(t: Tensor, x: Tensor) -> Tensor:
    """Repeats B or C for each head of its group: (B, G, 1, C, L, N) -> (B, G, Q, C, L, N)."""
    return t.expand(-1, -1, x.shape[2], -1, -1, -1)


def _carry(decays: Tensor, states: Tensor) -> Tensor:
    """Sums what several chunks carry: (B, G, Q, C', C) and (B, G, Q, C, P, N) -> (B, G, Q, C', P, N)."""
    return _product(decays, states.flatten(-2)).unflatten(-1, states.shape[-2:])


def _from_here(t: Tensor) -> Tensor:
    """Returns the sum of each element and all after it along the last dimension."""
    return t.flip(-1).cumsum(-1).flip(-1)
