"""How long the rows of features are, and powers of two that bring them near 1, where no square overflows.

Squares of float32 leave its range beyond 1e19 and below 1e-19. What measures or fits features therefore multiplies
them first by one power of two, the same for all of an encoder's files, which changes no digit. A row that is over 100
times as long as the median one (clipped float16, a broken image) is no sample of anything: left in, it alone would
decide means, variances and penalties. One of less than 1e-12 of the median length has no direction that counts.
"""

import math

import torch
from torch import Tensor

from tailscope.errors import UserError

FAR = 100.0
NOTHING = 2.0**-40
AT_EASE = 16  # powers of two about 1 within which features stay as they are
BLOCK_ELEMENTS = 1 << 22
"""Values that are looked at together."""


def row_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut a matrix [n, d] into blocks of rows that fit into the processor's caches."""
    return torch.split(rows, max(1, BLOCK_ELEMENTS // max(1, rows.shape[1])))


def log2_lengths(features: Tensor, what: str) -> Tensor:
    """Return the binary logarithms of the lengths of rows [n, d], float64 [n]; -inf for rows of zeros.

    >>> log2_lengths(torch.tensor([[3e30, 4e30], [0.0, 0.0], [0.5, 0.0]]), "x.npz").round().tolist()
    [102.0, -inf, -1.0]

    Raises:
        UserError: values are NaN or infinite, or so small that their type keeps few digits; `what` names them.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    found = [_log2_lengths(block.to(wide)) for block in row_blocks(features)]
    lengths = torch.cat(found) if found else features.new_empty(0, dtype=torch.float64)
    wrong = (~(lengths < math.inf)).nonzero().flatten()
    if len(wrong):
        raise UserError(f"{what}: {len(wrong)} rows are NaN or infinite, the first is row {int(wrong[0])}")
    smallest = torch.finfo(features.dtype).tiny
    middle = median(lengths)
    if middle is not None and middle - math.log2(features.shape[1]) / 2 < math.log2(smallest):
        kind = str(features.dtype).removeprefix("torch.")
        raise UserError(
            f"{what}: values are about {2 ** (middle - math.log2(features.shape[1]) / 2):.0e}; below {smallest:.0e} "
            f"{kind} keeps fewer digits (subnormal numbers). Multiply all features by one number before they are saved"
        )
    return lengths


def median(lengths: Tensor) -> float | None:
    """Return the median of the logarithms of lengths, rows of zeros left out; None where there are no others."""
    known = lengths[lengths > -math.inf]
    return known.median().item() if len(known) else None


def far(lengths: Tensor) -> Tensor:
    """Return which rows are over 100 times as long as the median one, bool [n], from the logarithms of lengths.

    The median is that of the rows that are left, so that none of these is far itself.

    >>> far(torch.tensor([0.0, 0.1, -0.1, 6.0, 7.0])).tolist()
    [False, False, False, False, True]
    """
    found = torch.zeros_like(lengths, dtype=torch.bool)
    while (middle := median(lengths[~found])) is not None:
        beyond = lengths > middle + math.log2(FAR)
        if bool((beyond == found).all()):
            break
        found = beyond
    return found


def without(lengths: Tensor) -> Tensor:
    """Return which rows are of length 0, or of less than 1e-12 of the median, bool [n], from logarithms of lengths."""
    middle = median(lengths)
    return lengths < (math.inf if middle is None else middle + math.log2(NOTHING))


def exponent(*lengths: Tensor) -> int:
    """Return by which power of two to multiply rows, so that the median length is near 1; 0 where it is near enough.

    Args:
        lengths: logarithms of the lengths of all files that are to stay comparable.

    >>> exponent(torch.tensor([100.5, 100.5])), exponent(torch.tensor([9.0]))
    (-100, 0)
    """
    middle = median(torch.cat([part.cpu() for part in lengths]))
    return 0 if middle is None or abs(middle) <= AT_EASE else -math.floor(middle)


def scaled(features: Tensor, power: int) -> Tensor:
    """Return features times 2 ** power, in float32 or float64; as they are for 0."""
    if not power:
        return features
    half = power // 2  # 2 ** power itself may lie outside the type's range
    rows: Tensor = features.to(torch.promote_types(features.dtype, torch.float32)) * math.ldexp(1.0, half)
    return torch.mul(rows, math.ldexp(1.0, power - half))


def _log2_lengths(rows: Tensor) -> Tensor:
    """Return the logarithms; where a square leaves the type's range, each row counts in its own largest value."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1).double().log2()
    outside = (~(lengths.abs() < -math.log2(torch.finfo(rows.dtype).tiny) / 4)).nonzero().flatten()
    if len(outside):
        part = rows[outside].double()
        largest = part.abs().amax(dim=1)
        unit = part / torch.where(largest > 0, largest, 1)[:, None]
        lengths[outside] = torch.linalg.vector_norm(unit, dim=1).log2() + largest.log2()
    return lengths
