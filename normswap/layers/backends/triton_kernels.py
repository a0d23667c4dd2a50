# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton accepts no type annotations except its own, and its constants are upper case.
# ruff: noqa: N803
"""The Triton kernels of Switchable Normalization.

Activations are contiguous or channels_last (`LAST`), of any rank. A tile has BLOCK_C channels and BLOCK_P positions of
one sample. The positions of a row can be divided among `splits` programs of `span` positions each; the next kernel
merges their results. Arithmetic is in float32, and results are rounded once.

Tables are in float32; variances are biased:

    in_mean, in_var   moments of every (n, c), (N, C), which the backward pass needs
    workspace         moments of LN (R, R) and BN (C, C). In the backward pass also: p and the slope of LN (R, R), p and
                      q of BN (C, C), p and q of every (n, c), sums of dy and of dy (x - centre) of every part, and
                      gradients of the importance weights from every program that pools

with p = dmu / M and q = 2 dvar / M as in `moment_algebra`; M, N and C are `positions`, `samples` and `channels`, and
R = N * GROUPS is the number of groups of channels that LN pools, each a row of C / GROUPS adjacent entries. `ln_shift`,
`ln_scale` and `in_scale` (C) are the constants of matched branches, or None. Dtypes are those of the pointers.

Every kernel computes the importance weights from the gate parameters, so that the host reads nothing. A weight of
exactly 0 ignores its statistic.
"""

import triton
import triton.language as tl

# --- statistics without cancellation and overflow ------------------------------------------------------------------


@triton.jit
def _merge_lanes(mean, squares, size, lanes, LANES: tl.constexpr):
    """Mean and biased variance (R,) of `size` values, from those of the lanes (R, LANES) that took them in turn."""
    counts = ((size - lanes + LANES - 1) // LANES).to(tl.float32)[None, :]
    total = tl.sum(mean * counts, axis=1) / size
    deviation = mean - total[:, None]
    # A lane without values adds nothing, even if its square is infinite.
    return total, tl.sum(squares + tl.where(counts > 0, deviation * deviation * counts, 0.0), axis=1) / size


@triton.jit
def _merge_parts(mean, var, offsets, mask, table, span, positions, SPLITS: tl.constexpr):
    """Moments (R, S) of the table's entries at `offsets`, merged from their parts around the first (Chan et al.)."""
    first = tl.load(mean + offsets, mask=mask, other=0.0)
    if SPLITS == 1:
        return first, tl.load(var + offsets, mask=mask, other=0.0)
    part = tl.arange(0, SPLITS)[None, None, :]
    size = tl.minimum(tl.maximum(positions - part * span, 0), span)
    seen = mask[:, :, None] & (size > 0)
    entry_indices = offsets[:, :, None] + part * tl.cast(table, tl.int64)
    size = size.to(tl.float32) / positions
    deviation = tl.where(seen, tl.load(mean + entry_indices, mask=seen, other=0.0) - first[:, :, None], 0.0)
    centre = tl.sum(deviation * size, axis=2)
    deviation = tl.where(seen, deviation - centre[:, :, None], 0.0)
    within = tl.load(var + entry_indices, mask=seen, other=0.0)
    return first + centre, tl.sum((within + deviation * deviation) * size, axis=2)


@triton.jit
def _total(sums, offsets, mask, table, splits, SPLITS: tl.constexpr):
    """The sums (R, S) of the table's entries at `offsets`, over their parts."""
    if SPLITS == 1:
        return tl.load(sums + offsets, mask=mask, other=0.0)
    part = tl.arange(0, SPLITS)[None, None, :]
    seen = mask[:, :, None] & (part < splits)
    entry_indices = offsets[:, :, None] + part * (2 * tl.cast(table, tl.int64))
    return tl.sum(tl.load(sums + entry_indices, mask=seen, other=0.0), axis=2)


# --- gates ---------------------------------------------------------------------------------------------------------


@triton.jit
def _point(point, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    """The entries of a gate parameter for `in`, `ln` and `bn`; minus infinity for a branch that is not mixed."""
    negative_infinity = tl.full((), float("-inf"), tl.float32)
    a = tl.load(point).to(tl.float32) if IN else negative_infinity
    b = tl.load(point + IN).to(tl.float32) if LN else negative_infinity
    c = tl.load(point + (IN + LN)).to(tl.float32) if BN else negative_infinity
    return a, b, c


@triton.jit
def _branch_weights(point, SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    """Importance weights of `in`, `ln` and `bn`; 0 for a branch that is not mixed."""
    a, b, c = _point(point, IN, LN, BN)
    entry_sum, top = a + b + c, tl.maximum(tl.maximum(a, b), c)
    # Adding a constant changes nothing. With the largest entry at 0, no 1 is lost to rounding and nothing overflows.
    a, b, c = a - top, b - top, c - top
    if SIMPLEX:
        second = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
        # The threshold is the largest of those for 1, 2 and 3 entries.
        threshold = tl.maximum(tl.maximum((second - 1.0) / 2.0, tl.div_rn(a + b + c - 1.0, 3.0)), -1.0)
        # A point that is not finite has no projection.
        threshold = tl.where((entry_sum != entry_sum) | (top == float("inf")), float("nan"), threshold)
        unknown = tl.where(threshold != threshold, threshold, 0.0)
        return (
            tl.maximum(a - threshold, 0.0) + unknown,
            tl.maximum(b - threshold, 0.0) + unknown,
            tl.maximum(c - threshold, 0.0) + unknown,
        )
    a, b, c = tl.exp(a), tl.exp(b), tl.exp(c)
    entry_sum = a + b + c
    return tl.div_rn(a, entry_sum), tl.div_rn(b, entry_sum), tl.div_rn(c, entry_sum)


@triton.jit
def _write_gate_gradient(
    out, point, a, b, c, SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr
):
    """Write the gradient of a gate parameter, from that of the importance weights, which may contain an added constant.

    A weight of 0 ignores statistics that are not finite, so they do not reach its gradient either.
    """
    in_, ln, bn = _branch_weights(point, SIMPLEX, IN, LN, BN)
    a = tl.where((in_ != 0) | (tl.abs(a) < float("inf")), a, 0.0) if IN else 0.0
    b = tl.where((ln != 0) | (tl.abs(b) < float("inf")), b, 0.0) if LN else 0.0
    c = tl.where((bn != 0) | (tl.abs(c) < float("inf")), c, 0.0) if BN else 0.0
    if SIMPLEX:
        centre = (a + b + c) / (IN + LN + BN)
        in_, ln, bn = 1.0, 1.0, 1.0
    else:
        centre = in_ * a + ln * b + bn * c
    if IN:
        tl.store(out, in_ * (a - centre))
    if LN:
        tl.store(out + IN, ln * (b - centre))
    if BN:
        tl.store(out + (IN + LN), bn * (c - centre))


@triton.jit
def _project(point, EPS: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    a, b, c = _point(point, IN, LN, BN)
    a = a if IN else 0.0
    b = b if LN else 0.0
    c = c if BN else 0.0
    entry_sum, lowest = a + b + c, tl.minimum(tl.minimum(a, b), c)
    deviation = (lowest < 0) | (tl.abs(entry_sum - 1.0) > EPS) | (entry_sum != entry_sum)
    a, b, c = _branch_weights(point, True, IN, LN, BN)
    if IN:
        tl.store(point, a, mask=deviation)
    if LN:
        tl.store(point + IN, b, mask=deviation)
    if BN:
        tl.store(point + (IN + LN), c, mask=deviation)


@triton.jit
def project_kernel(first, second, EPS: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr):
    """Project points in place; a point on the simplex, up to EPS, the rounding of its dtype, is not written."""
    _project(first, EPS, IN, LN, BN)
    if second is not None:
        _project(second, EPS, IN, LN, BN)


# --- the statistics of the branches and their mix --------------------------------------------------------------------


@triton.jit
def _mix(in_, ln, bn, a, b, c):
    """The sum of weights times statistics; a weight of 0 ignores infinities."""
    total = tl.where(in_ == 0, 0.0, in_ * a) + tl.where(ln == 0, 0.0, ln * b)
    return total + tl.where(bn == 0, 0.0, bn * c)


@triton.jit
def _row(n, c, samples, channels, GROUPS: tl.constexpr):
    """The row of LN that sample n and channel c belong to, and whether it exists."""
    row, mask = n, n < samples
    if GROUPS > 1:
        row, mask = n * GROUPS + c // (channels // GROUPS), mask & (c < channels)
    return row, mask


@triton.jit
def _match(c, channels, eps, var, ln_mean, ln_var, bn_var, ln_shift, ln_scale, in_scale):
    """The statistics of matched branches, with eps in every variance, and what is left of eps: 0.

    Without constants nothing changes.
    """
    if ln_shift is not None or in_scale is not None:
        var, ln_var, bn_var = var + eps, ln_var + eps, bn_var + eps
        if ln_shift is not None:
            shift = tl.load(ln_shift + c, mask=c < channels, other=0.0)
            # A shift of 0 ignores an infinite deviation.
            ln_mean += tl.where(shift == 0, 0.0, shift * tl.sqrt_rn(ln_var))
            ln_var *= tl.load(ln_scale + c, mask=c < channels, other=1.0)
        if in_scale is not None:
            var *= tl.load(in_scale + c, mask=c < channels, other=1.0)
        eps *= 0.0
    return var, ln_mean, ln_var, bn_var, eps


@triton.jit
def _branches(
    n, c, mask, in_mean, in_var, workspace, constant_mean, constant_var, samples, channels,
    LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of `in`, `ln` and `bn` for samples n and channels c, which broadcast against each other."""
    rows = samples * GROUPS
    entry_index = n.to(tl.int64) * channels + c
    mean = tl.load(in_mean + entry_index, mask=mask, other=0.0)
    var = tl.load(in_var + entry_index, mask=mask, other=0.0)
    ln_mean, ln_var, bn_mean, bn_var = 0.0, 0.0, 0.0, 0.0
    if LN:
        row, row_mask = _row(n, c, samples, channels, GROUPS)
        ln_mean = tl.load(workspace + row, mask=row_mask, other=0.0)
        ln_var = tl.load(workspace + rows + row, mask=row_mask, other=0.0)
    if BN:
        if CONSTANT:
            bn_mean = tl.load(constant_mean + c, mask=c < channels, other=0.0)
            bn_var = tl.load(constant_var + c, mask=c < channels, other=0.0)
        else:
            bn_mean = tl.load(workspace + 2 * rows + c, mask=c < channels, other=0.0)
            bn_var = tl.load(workspace + 2 * rows + channels + c, mask=c < channels, other=0.0)
    return mean, var, ln_mean, ln_var, bn_mean, bn_var


@triton.jit
def _centre(mean):
    """The mean of the values, or 0 if it is not finite. Mixed means are relative to it, since weights sum to 1."""
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


# --- tiles of an activation ------------------------------------------------------------------------------------------


@triton.jit
def _tile(pid, channels, positions, span, splits, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The tile of a program: sample, channels (BLOCK_C,), part, first and last position, address, offsets."""
    part, row = pid % splits, pid // splits
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    n, first = row // blocks, (row % blocks) * BLOCK_C
    rows, lanes = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    begin = part * span
    end = tl.minimum(begin + span, positions)
    sample = n.to(tl.int64)
    if LAST:
        base = (sample * positions + begin) * channels + first
        offsets = rows[:, None] + lanes[None, :] * channels
    else:
        base = (sample * channels + first) * positions + begin
        offsets = rows[:, None] * positions + lanes[None, :]
    return n, first + rows, part, begin, end, base, offsets


@triton.jit(do_not_specialize=["table"])
def moments_kernel(
    x, mean, var, channels, units, span, splits, table,
    UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Moments of every (n, c) over the positions of each part, by Welford's recurrence in every lane.

    The number of positions is `units` * UNIT, so that the compiler knows the alignment of rows.
    """
    positions = units * UNIT
    n, c, part, begin, end, base, offsets = _tile(
        tl.program_id(0), channels, positions, span, splits, LAST, BLOCK_C, BLOCK_P
    )
    lanes, channel_mask = tl.arange(0, BLOCK_P), c < channels
    # Relative to the first value: a mean much larger than the deviation costs no digits.
    rows = tl.arange(0, BLOCK_C) * (1 if LAST else positions)
    shift = tl.load(x + base + rows, mask=channel_mask, other=0.0)
    shift = shift.to(tl.float32)
    lane_mean = tl.full((BLOCK_C, BLOCK_P), 0.0, tl.float32)
    squares = tl.full((BLOCK_C, BLOCK_P), 0.0, tl.float32)
    count = 0.0
    for start in range(begin, end, BLOCK_P):
        mask = channel_mask[:, None] & (start + lanes < end)[None, :]
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        count += 1.0
        delta = tl.where(mask, values - shift[:, None] - lane_mean, 0.0)
        squares += delta * (delta * ((count - 1.0) / count))
        lane_mean += delta * (1.0 / count)
        base += BLOCK_P * (channels if LAST else 1)
    centre, within = _merge_lanes(lane_mean, squares, end - begin, lanes, BLOCK_P)
    entry_index = part * tl.cast(table, tl.int64) + n.to(tl.int64) * channels + c
    tl.store(mean + entry_index, shift + centre, mask=channel_mask)
    tl.store(var + entry_index, within, mask=channel_mask)


@triton.jit
def _pool(
    block, mean, var, out_mean, out_var, size, count, stride, step, in_mean, in_var, table, span, positions,
    STORE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Pool a table along one axis: `size` rows with distance `stride`, of `count` entries with distance `step`.

    The result is mean of variances + variance of means. STORE: write the merged entries to `in_mean` and `in_var`.
    """
    rows, lanes = block * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    channel_mask = rows < size
    ahead = rows.to(tl.int64) * stride
    shift = tl.load(mean + ahead, mask=channel_mask, other=0.0)
    lane_mean = tl.full((ROWS, LANES), 0.0, tl.float32)
    squares = tl.full((ROWS, LANES), 0.0, tl.float32)
    seen = 0.0
    for start in range(0, count, LANES):
        along = start + lanes
        mask = channel_mask[:, None] & (along < count)[None, :]
        offsets = ahead[:, None] + along.to(tl.int64)[None, :] * step
        entry, within = _merge_parts(mean, var, offsets, mask, table, span, positions, SPLITS)
        if STORE:
            tl.store(in_mean + offsets, entry, mask=mask)
            tl.store(in_var + offsets, within, mask=mask)
        seen += 1.0
        delta = tl.where(mask, entry - shift[:, None] - lane_mean, 0.0)
        squares += within + delta * (delta * ((seen - 1.0) / seen))
        lane_mean += delta * (1.0 / seen)
    centre, pooled = _merge_lanes(lane_mean, squares, count, lanes, LANES)
    tl.store(out_mean + rows, shift + centre, mask=channel_mask)
    tl.store(out_var + rows, pooled, mask=channel_mask)


@triton.jit
def _pool_table(
    pid, mean, var, in_mean, in_var, workspace, samples, channels, table, span, positions, by_sample,
    STORE: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    LN_ROWS: tl.constexpr, LN_LANES: tl.constexpr, BN_ROWS: tl.constexpr, BN_LANES: tl.constexpr,
):  # fmt: skip
    """The first `by_sample` programs pool the moments of LN, the others those of BN."""
    rows = samples * GROUPS
    if pid < by_sample:
        _pool(
            pid, mean, var, workspace, workspace + rows, rows, channels // GROUPS, channels // GROUPS, 1,
            in_mean, in_var, table, span, positions, STORE, SPLITS, LN_ROWS, LN_LANES,
        )  # fmt: skip
    else:
        out = workspace + 2 * rows
        _pool(
            pid - by_sample, mean, var, out, out + channels, channels, samples, 1, channels,
            in_mean, in_var, table, span, positions, False, SPLITS, BN_ROWS, BN_LANES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "table", "by_sample"])
def pool_kernel(
    mean, var, in_mean, in_var, workspace, samples, channels, table, span, positions, by_sample,
    STORE: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    LN_ROWS: tl.constexpr, LN_LANES: tl.constexpr, BN_ROWS: tl.constexpr, BN_LANES: tl.constexpr,
):  # fmt: skip
    """Pool the moments of every (n, c) to those of LN and BN; if rows are split, merge and write the former too."""
    _pool_table(
        tl.program_id(0), mean, var, in_mean, in_var, workspace, samples, channels, table, span, positions, by_sample,
        STORE, SPLITS, GROUPS, LN_ROWS, LN_LANES, BN_ROWS, BN_LANES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def affine_kernel(
    x, y, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, bias, samples, channels, units, span, splits, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    GROUPS: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mix the moments, and write y = weight (x - mean) / sqrt(var + eps) + bias."""
    positions = units * UNIT
    n, c, _, begin, end, base, offsets = _tile(
        tl.program_id(0), channels, positions, span, splits, LAST, BLOCK_C, BLOCK_P
    )
    channel_mask, lanes = c < channels, tl.arange(0, BLOCK_P)
    mean, var, ln_mean, ln_var, bn_mean, bn_var = _branches(
        n, c, channel_mask, in_mean, in_var, workspace, constant_mean, constant_var, samples, channels,
        LN, BN, CONSTANT, GROUPS,
    )  # fmt: skip
    var, ln_mean, ln_var, bn_var, eps = _match(
        c, channels, eps, var, ln_mean, ln_var, bn_var, ln_shift, ln_scale, in_scale
    )
    centre = _centre(mean)
    in_, ln, bn = _branch_weights(mean_gate, SIMPLEX, IN, LN, BN)
    deviation = _mix(in_, ln, bn, mean - centre, ln_mean - centre, bn_mean - centre)
    in_, ln, bn = _branch_weights(var_gate, SIMPLEX, IN, LN, BN)
    scale = tl.div_rn(1.0, tl.sqrt_rn(_mix(in_, ln, bn, var, ln_var, bn_var) + eps))
    if weight is not None:
        scale *= tl.load(weight + c, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.full((BLOCK_C,), 0.0, tl.float32)
    if bias is not None:
        shift += tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    for start in range(begin, end, BLOCK_P):
        mask = channel_mask[:, None] & (start + lanes < end)[None, :]
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        values = ((values - centre[:, None]) - deviation[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y + base + offsets, values.to(y.dtype.element_ty), mask=mask)
        base += BLOCK_P * (channels if LAST else 1)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["samples", "table", "by_sample", "pools"])
def sums_kernel(
    dy, x, in_mean, in_var, workspace, samples, channels, units, span, splits, table, by_sample, pools,
    GROUPS: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    LN_ROWS: tl.constexpr, LN_LANES: tl.constexpr, BN_ROWS: tl.constexpr, BN_LANES: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy (x - centre) over the positions of each part; the first `pools` programs pool moments."""
    positions = units * UNIT
    pid = tl.program_id(0)
    if pid < pools:
        _pool_table(
            pid, in_mean, in_var, in_mean, in_var, workspace, samples, channels, table, span, positions, by_sample,
            False, 1, GROUPS, LN_ROWS, LN_LANES, BN_ROWS, BN_LANES,
        )  # fmt: skip
    else:
        n, c, part, begin, end, base, offsets = _tile(
            pid - pools, channels, positions, span, splits, LAST, BLOCK_C, BLOCK_P
        )
        channel_mask, lanes = c < channels, tl.arange(0, BLOCK_P)
        entry_index = n.to(tl.int64) * channels + c
        centre = _centre(tl.load(in_mean + entry_index, mask=channel_mask, other=0.0))
        dy_sum = tl.full((BLOCK_C, BLOCK_P), 0.0, tl.float32)
        dy_xhat_sum = tl.full((BLOCK_C, BLOCK_P), 0.0, tl.float32)
        for start in range(begin, end, BLOCK_P):
            mask = channel_mask[:, None] & (start + lanes < end)[None, :]
            gradient = tl.load(dy + base + offsets, mask=mask, other=0.0).to(tl.float32)
            values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
            dy_sum += gradient
            dy_xhat_sum += gradient * (values - centre[:, None])
            base += BLOCK_P * (channels if LAST else 1)
        wide = tl.cast(table, tl.int64)
        sums = workspace + 4 * (samples * GROUPS + channels) + 2 * wide + part * (2 * wide) + entry_index
        tl.store(sums, tl.sum(dy_sum, axis=1), mask=channel_mask)
        tl.store(sums + wide, tl.sum(dy_xhat_sum, axis=1), mask=channel_mask)


@triton.jit
def _branch_terms(
    n, c, mask, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """For samples n and channels c: p, q, sums of dy and of dy xhat, centre, variance of `in`, moments of ln and bn.

    The statistics are those of matched branches.
    """
    mean, var, ln_mean, ln_var, bn_mean, bn_var = _branches(
        n, c, mask, in_mean, in_var, workspace, constant_mean, constant_var, samples, channels, LN, BN, CONSTANT, GROUPS
    )
    var, ln_mean, ln_var, bn_var, eps = _match(
        c, channels, eps, var, ln_mean, ln_var, bn_var, ln_shift, ln_scale, in_scale
    )
    centre = _centre(mean)
    in_, ln, bn = _branch_weights(mean_gate, SIMPLEX, IN, LN, BN)
    deviation = _mix(in_, ln, bn, mean - centre, ln_mean - centre, bn_mean - centre)
    in_, ln, bn = _branch_weights(var_gate, SIMPLEX, IN, LN, BN)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mix(in_, ln, bn, var, ln_var, bn_var) + eps))
    wide = tl.cast(table, tl.int64)
    sums = workspace + 4 * (samples * GROUPS + channels) + 2 * wide
    entry_index = n.to(tl.int64) * channels + c
    dy_sum = _total(sums, entry_index, mask, table, splits, SPLITS)
    dy_xhat_sum = (_total(sums + wide, entry_index, mask, table, splits, SPLITS) - deviation * dy_sum) * rstd
    factor = rstd * (-1.0 / positions)
    if weight is not None:
        factor *= tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    p, q = tl.where(mask, factor * dy_sum, 0.0), tl.where(mask, factor * rstd * dy_xhat_sum, 0.0)
    return p, q, dy_sum, dy_xhat_sum, centre, var, ln_mean, ln_var, bn_mean, bn_var


@triton.jit
def _product(pooled_terms, statistic):
    """The term of a statistic in the gradient of its weight; a gradient of 0 times an infinite statistic is 0."""
    return tl.where(pooled_terms == 0, 0.0, pooled_terms * statistic)


@triton.jit
def _terms_along_channels(
    pid, pooled_terms, terms, parts,
    in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write p and q of every (n, c), p and the slope of LN, and the part of these rows in the weights' gradients."""
    rows, lanes = pid * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    p_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    q_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    by_mean_ln = tl.full((ROWS, LANES), 0.0, tl.float32)
    by_var_in = tl.full((ROWS, LANES), 0.0, tl.float32)
    by_var_ln = tl.full((ROWS, LANES), 0.0, tl.float32)
    shifted_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    count, width = samples * GROUPS, channels // GROUPS
    n = (rows // GROUPS)[:, None]
    for start in range(0, width, LANES):
        c = (start + lanes)[None, :]
        mask = (n < samples) & (c < width)
        if GROUPS > 1:
            c = tl.where(c < width, (rows % GROUPS)[:, None] * width + c, channels)
        p, q, _, _, centre, var, ln_mean, ln_var, _, _ = _branch_terms(
            n, c, mask, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
            ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
            SIMPLEX, IN, LN, BN, CONSTANT, SPLITS, GROUPS,
        )  # fmt: skip
        entry_index = n.to(tl.int64) * channels + c
        tl.store(terms + entry_index, p, mask=mask)
        p_sum += p
        if ln_shift is not None:
            shifted_sum += p * tl.load(ln_shift + c, mask=c < channels, other=0.0)
            q_sum += q * tl.load(ln_scale + c, mask=c < channels, other=1.0)
        else:
            q_sum += q
        if in_scale is not None:
            tl.store(
                terms + tl.cast(table, tl.int64) + entry_index,
                q * tl.load(in_scale + c, mask=c < channels, other=1.0),
                mask=mask,
            )
        else:
            tl.store(terms + tl.cast(table, tl.int64) + entry_index, q, mask=mask)
        by_mean_ln += _product(p, centre - ln_mean)
        by_var_in += _product(q, var)
        by_var_ln += _product(q, ln_var)
    _, mean_ln, _ = _branch_weights(mean_gate, SIMPLEX, IN, LN, BN)
    _, var_ln, _ = _branch_weights(var_gate, SIMPLEX, IN, LN, BN)
    slope = tl.where(var_ln == 0, 0.0, var_ln * (tl.sum(q_sum, axis=1) / width))
    if ln_shift is not None:
        ln_var = tl.load(workspace + count + rows, mask=rows < count, other=0.0)
        shifted = tl.sum(shifted_sum, axis=1) / width
        shifted = tl.where(shifted == 0, 0.0, tl.div_rn(shifted, tl.sqrt_rn(ln_var + eps)))
        slope += tl.where(mean_ln == 0, 0.0, mean_ln * shifted)
    tl.store(pooled_terms + rows, tl.sum(p_sum, axis=1) / width, mask=rows < count)
    tl.store(pooled_terms + count + rows, slope, mask=rows < count)
    tl.store(parts + 3 * pid, tl.sum(by_mean_ln))
    tl.store(parts + 3 * pid + 1, tl.sum(by_var_in))
    tl.store(parts + 3 * pid + 2, tl.sum(by_var_ln))


@triton.jit
def _terms_along_samples(
    pid, pooled_terms, parts, weight_gradient, bias_gradient,
    in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write p and q of BN, the gradients of weight and bias, and the part of these channels in those of the weights."""
    rows, lanes = pid * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    p_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    q_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    plain_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    scaled_sum = tl.full((ROWS, LANES), 0.0, tl.float32)
    by_mean_bn = tl.full((ROWS, LANES), 0.0, tl.float32)
    by_var_bn = tl.full((ROWS, LANES), 0.0, tl.float32)
    c = rows[:, None]
    for start in range(0, samples, LANES):
        n = (start + lanes)[None, :]
        mask = (n < samples) & (c < channels)
        p, q, dy_sum, dy_xhat_sum, centre, _, _, _, bn_mean, bn_var = _branch_terms(
            n, c, mask, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
            ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
            SIMPLEX, IN, LN, BN, CONSTANT, SPLITS, GROUPS,
        )  # fmt: skip
        p_sum += p
        q_sum += q
        plain_sum += dy_sum
        scaled_sum += tl.where(mask, dy_xhat_sum, 0.0)
        by_mean_bn += _product(p, centre - bn_mean)
        by_var_bn += _product(q, bn_var)
    channel_mask = rows < channels
    tl.store(pooled_terms + rows, tl.sum(p_sum, axis=1) / samples, mask=channel_mask)
    tl.store(pooled_terms + channels + rows, tl.sum(q_sum, axis=1) / samples, mask=channel_mask)
    if weight_gradient is not None:
        tl.store(
            weight_gradient + rows, tl.sum(scaled_sum, axis=1).to(weight_gradient.dtype.element_ty), mask=channel_mask
        )
    if bias_gradient is not None:
        tl.store(bias_gradient + rows, tl.sum(plain_sum, axis=1), mask=channel_mask)
    tl.store(parts + 2 * pid, tl.sum(by_mean_bn))
    tl.store(parts + 2 * pid + 1, tl.sum(by_var_bn))


@triton.jit(do_not_specialize=["samples", "table", "by_sample"])
def terms_kernel(
    in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, weight_gradient, bias_gradient,
    samples, channels, positions, splits, table, by_sample, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr,
    LN_ROWS: tl.constexpr, LN_LANES: tl.constexpr, BN_ROWS: tl.constexpr, BN_LANES: tl.constexpr,
):  # fmt: skip
    """The algebra of the backward pass: the first `by_sample` programs sum over channels, the others over samples."""
    pid = tl.program_id(0)
    wide = tl.cast(table, tl.int64)
    rows = samples * GROUPS
    pooled_terms = workspace + 2 * (rows + channels)
    terms = pooled_terms + 2 * (rows + channels)
    parts = terms + 2 * wide + 2 * wide * splits
    if pid < by_sample:
        _terms_along_channels(
            pid, pooled_terms, terms, parts,
            in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
            ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
            SIMPLEX, IN, LN, BN, CONSTANT, SPLITS, GROUPS, LN_ROWS, LN_LANES,
        )  # fmt: skip
    else:
        _terms_along_samples(
            pid - by_sample, pooled_terms + 2 * rows, parts + 3 * by_sample, weight_gradient, bias_gradient,
            in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
            ln_shift, ln_scale, in_scale, samples, channels, table, splits, positions, eps,
            SIMPLEX, IN, LN, BN, CONSTANT, SPLITS, GROUPS, BN_ROWS, BN_LANES,
        )  # fmt: skip


@triton.jit
def _sum_of(parts, count, step, LANES: tl.constexpr):
    """The sum of `count` values with distance `step`."""
    lanes = tl.arange(0, LANES)
    total = tl.full((LANES,), 0.0, tl.float32)
    for start in range(0, count, LANES):
        total += tl.load(parts + (start + lanes) * step, mask=start + lanes < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _write_gate_gradients(
    parts, mean_gradient, var_gradient, mean_gate, var_gate, positions, by_sample, by_channel,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the parts of all programs and write the gradients of both gate parameters, unless None."""
    channel_parts = parts + 3 * by_sample
    if mean_gradient is not None:
        ln = _sum_of(parts, by_sample, 3, 256) * -positions
        bn = _sum_of(channel_parts, by_channel, 2, 256) * -positions
        _write_gate_gradient(mean_gradient, mean_gate, ln * 0.0, ln, bn, SIMPLEX, IN, LN, BN)
    if var_gradient is not None:
        half = positions * 0.5
        in_ = _sum_of(parts + 1, by_sample, 3, 256) * half
        ln = _sum_of(parts + 2, by_sample, 3, 256) * half
        bn = _sum_of(channel_parts + 1, by_channel, 2, 256) * half
        _write_gate_gradient(var_gradient, var_gate, in_, ln, bn, SIMPLEX, IN, LN, BN)


@triton.jit
def _input_gradient_coefficients(
    n, c, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, samples, channels, table, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Scale, slope, shift and centre of dx for sample n and channels c, and whether dx depends on x."""
    channel_mask, wide = c < channels, tl.cast(table, tl.int64)
    rows = samples * GROUPS
    pooled_terms = workspace + 2 * (rows + channels)
    terms = pooled_terms + 2 * (rows + channels)
    mean, var, ln_mean, ln_var, bn_mean, bn_var = _branches(
        n, c, channel_mask, in_mean, in_var, workspace, constant_mean, constant_var, samples, channels,
        LN, BN, CONSTANT, GROUPS,
    )  # fmt: skip
    used_var, _, used_ln_var, used_bn_var, used_eps = _match(
        c, channels, eps, var, ln_mean, ln_var, bn_var, ln_shift, ln_scale, in_scale
    )
    centre = _centre(mean)
    mean_in, mean_ln, mean_bn = _branch_weights(mean_gate, SIMPLEX, IN, LN, BN)
    var_in, var_ln, var_bn = _branch_weights(var_gate, SIMPLEX, IN, LN, BN)
    mixed_var = _mix(var_in, var_ln, var_bn, used_var, used_ln_var, used_bn_var) + used_eps
    scale = tl.div_rn(1.0, tl.sqrt_rn(mixed_var))
    if weight is not None:
        scale *= tl.load(weight + c, mask=channel_mask, other=0.0).to(tl.float32)
    entry_index = n.to(tl.int64) * channels + c
    p = tl.load(terms + entry_index, mask=channel_mask, other=0.0)
    q = tl.load(terms + wide + entry_index, mask=channel_mask, other=0.0)
    p_ln, slope_ln, p_bn, q_bn = 0.0, 0.0, 0.0, 0.0
    if LN:
        row, row_mask = _row(n, c, samples, channels, GROUPS)
        p_ln = tl.load(pooled_terms + row, mask=row_mask, other=0.0)
        slope_ln = tl.load(pooled_terms + rows + row, mask=row_mask, other=0.0)
    if CONSTANT:
        mean_bn, var_bn = mean_bn * 0.0, var_bn * 0.0  # constants do not depend on x
    elif BN:
        out = pooled_terms + 2 * rows + c
        p_bn = tl.load(out, mask=channel_mask, other=0.0)
        q_bn = tl.load(out + channels, mask=channel_mask, other=0.0)
    # The slope of LN contains its weights; if they are 0, it is 0.
    has_slope = tl.where(var_ln == 0, 0.0, 1.0)
    if ln_shift is not None:
        has_slope = tl.where((var_ln == 0) & (mean_ln == 0), 0.0, 1.0)
    slope = _mix(var_in, has_slope, var_bn, q, slope_ln, q_bn)
    shift = _mix(mean_in, mean_ln, mean_bn, p, p_ln, p_bn)
    shift += _mix(var_in, has_slope, var_bn, 0.0, slope_ln * (centre - ln_mean), q_bn * (centre - bn_mean))
    depends_on_x = (mean_in + mean_ln + mean_bn + var_in + var_ln + var_bn) != 0
    return scale, slope, shift, centre, depends_on_x


@triton.jit(do_not_specialize=["samples", "table", "by_sample", "by_channel"])
def gradient_kernel(
    dy, x, dx, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
    ln_shift, ln_scale, in_scale, mean_gradient, var_gradient,
    samples, channels, units, span, splits, table, by_sample, by_channel, eps,
    SIMPLEX: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, CONSTANT: tl.constexpr,
    GROUPS: tl.constexpr, GATES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = scale dy + slope (x - centre) + shift. If GATES, the first program writes the gradients of the gates."""
    positions = units * UNIT
    pid = tl.program_id(0)
    if GATES and pid == 0:
        wide = tl.cast(table, tl.int64)
        parts = workspace + 4 * (samples * GROUPS + channels) + 2 * wide + 2 * wide * splits
        _write_gate_gradients(
            parts, mean_gradient, var_gradient, mean_gate, var_gate, positions, by_sample, by_channel,
            SIMPLEX, IN, LN, BN,
        )  # fmt: skip
    else:
        n, c, _, begin, end, base, offsets = _tile(
            pid - GATES, channels, positions, span, splits, LAST, BLOCK_C, BLOCK_P
        )
        channel_mask, lanes = c < channels, tl.arange(0, BLOCK_P)
        scale, slope, shift, centre, depends_on_x = _input_gradient_coefficients(
            n, c, in_mean, in_var, workspace, constant_mean, constant_var, mean_gate, var_gate, weight,
            ln_shift, ln_scale, in_scale, samples, channels, table, eps, SIMPLEX, IN, LN, BN, CONSTANT, GROUPS,
        )  # fmt: skip
        # If no statistic with a weight depends on x, it is not read.
        read_end = tl.where(depends_on_x, end, begin)
        for start in range(begin, end, BLOCK_P):
            mask = channel_mask[:, None] & (start + lanes < end)[None, :]
            gradient = tl.load(dy + base + offsets, mask=mask, other=0.0).to(tl.float32)
            read = channel_mask[:, None] & (start + lanes < read_end)[None, :]
            values = tl.load(x + base + offsets, mask=read, other=0.0).to(tl.float32)
            gradient = scale[:, None] * gradient + slope[:, None] * (values - centre[:, None]) + shift[:, None]
            tl.store(dx + base + offsets, gradient.to(dx.dtype.element_ty), mask=mask)
            base += BLOCK_P * (channels if LAST else 1)


# Whether Triton was imported with TRITON_INTERPRET=1: then kernels run on CPU tensors, for tests.
INTERPRETED = not isinstance(moments_kernel, triton.JITFunction)
