"""How a gradient passes an operand of fprop: as a mask, decided in the forward and applied in rotated space.

ste: everything passes. clip: what lies strictly inside clip_scale times the largest code (released Quartet: once, so
|x| / scale < 6).
trust: what rounding moved by at most half an interval (QuEST, arXiv 2502.05003). With u = x / scale in code units, the
threshold on |codes - u| is 1/2 for integer grids, the released 0.31857661 RMS for fp4_e2m1, and half the largest
interval for other minifloats. At one bit, as in the published runs, trust is a clip of |u| at s times the largest code,
s = 1.30 with a rotation and 1.25 without.
A row or block of zeros has u = 0 and codes within the threshold: it keeps its whole gradient under each of them.
"""

from __future__ import annotations

from qtrain_kernels.formats import Format
from qtrain_kernels.plans import Mask

ONE_BIT_CLIP = {True: 1.30, False: 1.25}  # by whether the operand is rotated


def gradient_mask(estimator: str, fmt: Format, rotated: bool, clip_scale: float = 1.0) -> Mask | None:
    """The mask of a named estimator for a format; None passes everything."""
    element = fmt.element
    if estimator == "clip":
        return Mask("inside", clip_scale * element.max)
    if estimator == "trust" and len(element.levels()) == 2:
        return Mask("within", ONE_BIT_CLIP[rotated] * element.max)
    if estimator == "trust":
        return Mask("error", element.trust if element.trust is not None else element.half_interval)
    return None
