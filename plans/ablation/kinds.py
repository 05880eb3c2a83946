"""Parameterizations of the convolutions of many models at once, as `fedpara_edge.factors.compose` has them for one.

A weight is [G, O, 9 C], with the channels of the input last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.factors.rank import layer_spec
from fedpara_edge.nn.fit import fit_factors

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A convolution in some parameterization.

    Args:
        name: Name of the layer.
        kind: `dense`, `lowrank`, `fedpara`, `matrix` (FedPara's matrix form), `lowrank-matrix` or `update`.
        outputs: Number O of output channels.
        inputs: Number C of input channels.
        rank: Rank R; 0 for a dense layer.
    """

    name: str
    kind: str
    outputs: int
    inputs: int
    rank: int

    @property
    def shapes(self) -> Shapes:
        """Shapes of the trained tensors by part."""
        o, c, r, n = self.outputs, self.inputs, self.rank, 9 * self.inputs
        if self.kind == "dense":
            return {"w": (o, n)}
        if self.kind == "update":
            return {"u": (o, r), "v": (n, r)}
        branch = (
            {"x": (o, r), "t": (r, 9, r), "y": (c, r)}
            if self.kind in ("fedpara", "lowrank")
            else {"x": (o, r), "y": (n, r)}
        )
        return {f"{part}{index}": shape for index in self.branches for part, shape in branch.items()}

    @property
    def branches(self) -> tuple[int, ...]:
        """Numbers of the branches."""
        return (1, 2) if self.kind in ("fedpara", "matrix") else (1,)

    @property
    def std(self) -> float:
        """He's standard deviation of the weight."""
        return math.sqrt(2 / (9 * self.inputs))

    def branch(self, parts: Mapping[str, Tensor], index: int) -> Tensor:
        """One branch, X Yᵀ or T ×₁ X ×₂ Y."""
        x, y = parts[f"x{index}"], parts[f"y{index}"]
        if self.kind in ("matrix", "lowrank-matrix"):
            return torch.bmm(x, y.mT)
        core = parts[f"t{index}"]  # [G, R, 9, R]
        group = len(core)
        inner = torch.bmm(core.reshape(group, -1, self.rank), y.mT).view(group, self.rank, -1)
        return torch.bmm(x, inner)

    def compose(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Weight [G, O, 9 C] of trained and held parts."""
        if self.kind == "dense":
            return parts["w"]
        if self.kind == "update":
            runs, clients = len(parts["base"]), len(parts["u"]) // len(parts["base"])
            a, b = (parts[part].repeat_interleave(clients, 0) for part in "ab")
            product = torch.bmm(torch.cat((parts["u"], a), 2), torch.cat((b, parts["v"]), 2).mT)
            moved = parts["mask"][:, None] * product.view(runs, clients, *product.shape[1:])
            return (parts["base"][:, None] + moved).flatten(0, 1)
        branches = [self.branch(parts, index) for index in self.branches]
        return branches[0] if len(branches) == 1 else branches[0] * branches[1]

    @property
    def spec(self) -> LayerSpec:
        """Specification in the library."""
        form = "matrix" if self.kind in ("matrix", "lowrank-matrix") else "tensor"
        kind = {"matrix": "fedpara", "lowrank-matrix": "lowrank"}.get(self.kind, self.kind)
        return layer_spec((self.outputs, self.inputs, 3, 3), kind=kind, form=form, rank=self.rank, name=self.name)

    def fitted(self, weights: Tensor) -> dict[str, Tensor]:
        """Parts [M, …] whose weights are closest to some [M, O, 9 C] (`fedpara_edge.nn.fit`)."""
        if self.kind == "dense":
            return {"w": weights}
        kernels = weights.detach().cpu().unflatten(2, (3, 3, -1)).permute(0, 1, 4, 2, 3)
        each = [self.of_library(fit_factors(self.spec, kernel).factors) for kernel in kernels]
        return {part: torch.stack([parts[part] for parts in each]) for part in each[0]}

    def of_library(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of one model whose factors are those of the library."""
        found = dict(factors)
        for part, tensor in factors.items():
            if part[0] == "t":
                found[part] = tensor.permute(0, 2, 3, 1).flatten(1, 2)
            elif part[0] == "y" and self.spec.form == "matrix":
                found[part] = tensor.unflatten(0, (self.inputs, 9)).transpose(0, 1).flatten(0, 1)
        return found

    def start(self, seeds: list[int]) -> dict[str, Tensor]:
        """Initial trained parts [M, …], and the base of an update, with `fedpara_edge.nn.init`'s rms."""
        found: dict[str, list[Tensor]] = {}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed * 1000 + ord(self.name[-1]))
            if self.kind == "update":
                base = torch.randn(self.outputs, 9 * self.inputs, generator=generator) * self.std
                parts = {"base": base, **{part: torch.zeros(shape) for part, shape in self.shapes.items()}}
            else:
                parts = {part: torch.randn(shape, generator=generator) for part, shape in self.shapes.items()}
                composed = self.compose({part: tensor[None] for part, tensor in parts.items()})
                scale = self.std / composed.square().mean().sqrt().item()
                parts = {part: tensor * scale ** (1 / len(parts)) for part, tensor in parts.items()}
            for part, tensor in parts.items():
                found.setdefault(part, []).append(tensor)
        return {part: torch.stack(tensors) for part, tensors in found.items()}


def curvature(layer: Layer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diagonal of Jᵀ J for each factor, by which its gradient becomes one of the weight's own size."""
    found = {}
    for index in layer.branches:
        other = layer.branch(parts, 3 - index).square() if len(layer.branches) > 1 else None
        x, y = parts[f"x{index}"], parts[f"y{index}"]
        group, rank = len(x), layer.rank
        other = torch.ones(group, layer.outputs, 9 * layer.inputs, device=x.device) if other is None else other
        if "t1" not in parts:
            found[f"x{index}"] = torch.bmm(other, y.square())
            found[f"y{index}"] = torch.bmm(other.mT, x.square())
            continue
        core = parts[f"t{index}"]
        inner = torch.bmm(core.reshape(group, -1, rank), y.mT).view(group, rank, -1)
        found[f"x{index}"] = torch.bmm(other, inner.square().mT)
        outer = torch.bmm(x, core.reshape(group, rank, -1)).view(group, layer.outputs, 9, rank)
        windows = other.view(group, layer.outputs, 9, layer.inputs)
        found[f"y{index}"] = torch.einsum("gokc,gokr->gcr", windows, outer.square())
        found[f"t{index}"] = torch.einsum("goa,gokb->gakb", x.square(), windows @ y.square()[:, None])
    return found


def directions(how: str, size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Directions [size, rank] of an update with a mean square of 1 / 3, as uniform ones have."""
    if how == "normal":
        return torch.randn(size, rank, generator=generator) / math.sqrt(3)
    if how == "signs":
        return (torch.randint(0, 2, (size, rank), generator=generator) * 2.0 - 1) / math.sqrt(3)
    if how == "orthogonal":
        found, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator))
        return found * math.sqrt(size / 3)
    return torch.rand(size, rank, generator=generator) * 2 - 1
