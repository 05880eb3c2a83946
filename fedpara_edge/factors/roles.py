"""Which tensors stay on a device: the second factors of pFedPara, and whatever else is asked to.

With the last layers personal this is FedPer (Arivazhagan et al. 2019, arXiv 1912.00818).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import Layout, TensorSpec


def keep_personal(layout: Layout, patterns: Sequence[str]) -> Layout:
    """The layout with some of its shared tensors personal.

    Args:
        layout: of a model.
        patterns: of names of tensors, or of the layers that hold them, with `*` for any characters.

    Raises:
        InputError: a pattern matches no trained tensor, or nothing would travel any more.
    """
    for pattern in patterns:
        if not any(_matches(tensor, pattern) for tensor in layout.with_role("shared", "personal")):
            raise InputError(
                f"personal: expected patterns of layers or trained tensors, found {pattern!r}, which matches none"
            )
    tensors = tuple(
        replace(tensor, role="personal")
        if tensor.role == "shared" and any(_matches(tensor, pattern) for pattern in patterns)
        else tensor
        for tensor in layout.tensors
    )
    kept = Layout(layout.layers, tensors)
    if not kept.shared:
        raise InputError("personal: expected something left to travel, found all tensors personal; keep fewer")
    return kept


def _matches(tensor: TensorSpec, pattern: str) -> bool:
    return fnmatchcase(tensor.name, pattern) or fnmatchcase(tensor.layer, pattern)
