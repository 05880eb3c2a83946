"""Roles of tensors: those that stay on the device, besides the second factors of pFedPara.

With the last layers personal, this is FedPer (Arivazhagan et al. 2019, arXiv 1912.00818).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fedpara_edge.errors import InputError
from fedpara_edge.factors.layout import UPDATE, Layout


def keep_personal(layout: Layout, patterns: Sequence[str]) -> Layout:
    """Layout with some of its shared tensors made personal.

    Args:
        layout: Layout of a model.
        patterns: Patterns of names of tensors, or of the modules that hold them, with `*` for any characters.

    Raises:
        InputError: A pattern matches no trained tensor, or no tensor would travel any more.
    """
    for pattern in patterns:
        if not any(is_named(tensor.name, pattern) for tensor in layout.with_role("shared", "personal")):
            frozen = any(is_named(tensor.name, pattern) for tensor in layout.with_role("frozen"))
            raise InputError(
                f"personal: expected patterns of layers or trained tensors, found {pattern!r}, which matches "
                + ("frozen ones only, which never travel; leave it out" if frozen else "none")
            )
    tensors = tuple(
        replace(tensor, role="personal")
        if tensor.role == "shared" and any(is_named(tensor.name, pattern) for pattern in patterns)
        else tensor
        for tensor in layout.tensors
    )
    kept = Layout(layout.layers, tensors)
    for layer in layout.layers:
        roles = {tensor.role for tensor in kept.parts(layer).values() if tensor.part in UPDATE}
        if len(roles) > 1:
            raise InputError(
                f"personal: expected both factors of the update {layer.name!r} or none, found one; name the layer"
            )
        if roles == {"personal"} and layer.base_momentum:
            raise InputError(
                f"personal: expected no momentum for the update {layer.name!r}, which stays on the device and is never "
                f"folded, found base_momentum {layer.base_momentum:g}; leave the momentum out, or have the layer travel"
            )
    if not kept.shared:
        raise InputError("personal: expected a tensor left to travel, found all personal; keep fewer of them personal")
    return kept


def is_named(tensor: str, pattern: str) -> bool:
    """Whether a pattern is that of a tensor, or of a module that holds it.

    >>> [is_named("body.0.conv.weight", pattern) for pattern in ("*.weight", "body.0.conv", "body", "bod")]
    [True, True, True, False]
    """
    parts = tensor.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))
