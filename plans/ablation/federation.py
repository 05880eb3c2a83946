"""Federated averaging of many runs at once on one device: M runs of K clients are G = M K models of one step."""

from __future__ import annotations

import math
from typing import Any

import torch
from images import Data
from kinds import Layer, curvature, directions
from network import CHANNELS, CONVOLUTIONS, FAST, outputs
from torch import Tensor
from torch.nn import functional
from variations import Setting, Structure

from fedpara_edge.factors.rank import even_scale

BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
AVERAGES = (0.5, 0.8)
"""Decays of the averages of the rounds' weights that are evaluated beside the last weights."""
EVALUATED = 250


class Batch:
    """Runs that are trained side by side.

    Args:
        structure: What they have in common.
        runs: Setting and seed of each.
        data: The examples.
        rounds: Number of rounds.
    """

    def __init__(self, structure: Structure, runs: list[tuple[Setting, int]], data: Data, rounds: int) -> None:
        self.structure, self.data, self.rounds = structure, data, rounds
        self.settings, self.seeds = [setting for setting, _ in runs], [seed for _, seed in runs]
        self.device, self.clients = data.device, data.clients
        self.layers = self._layers(structure.warm if structure.warm_up else structure)
        self._start()
        self._draw(0)

    def _layers(self, structure: Structure) -> list[Layer]:
        channels = (self.data.images.shape[3], *(structure.width * count for count in CHANNELS))
        kinds = ["dense", *(structure.kind if rank else "dense" for rank in structure.ranks)]
        return [
            Layer(name, kind, channels[i + 1], channels[i], rank)
            for i, (name, kind, rank) in enumerate(zip(CONVOLUTIONS, kinds, (0, *structure.ranks), strict=True))
        ]

    def _start(self) -> None:
        """Initial values."""
        tensors: dict[str, Tensor] = {}
        m, size = len(self.seeds), self.data.images.shape[1] // 16
        for layer in self.layers:
            tensors |= {f"{layer.name}.{part}": values for part, values in layer.start(self.seeds).items()}
            for part, value in (("bias", 0.0), ("scale", 1.0), ("shift", 0.0)):
                tensors[f"{layer.name}.{part}"] = torch.full((m, layer.outputs), value)
        features = self.layers[-1].outputs * size * size
        heads = [torch.randn(10, features, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        tensors["head"] = torch.stack(heads) * math.sqrt(2 / features)
        tensors["head.bias"] = torch.zeros(m, 10)
        self._place(tensors)

    def factorize(self) -> None:
        """Fit factors to the weights at the end of the warm-up."""
        tensors: dict[str, Tensor] = {}
        found = self.views(self.theta)
        self.layers = self._layers(self.structure)
        for layer in self.layers:
            fitted = layer.fitted(found.pop(f"{layer.name}.w"))
            tensors |= {f"{layer.name}.{part}": values for part, values in fitted.items()}
        self._place(tensors | found)

    def _place(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors by name where the rounds find them, with nothing of earlier rounds."""
        self.updates = [layer for layer in self.layers if layer.kind == "update"]
        bases = [f"{layer.name}.base" for layer in self.updates]
        self.held = {name: tensors.pop(name).to(self.device) for name in bases}
        self.shapes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.theta = torch.cat([tensor.flatten(1) for tensor in tensors.values()], 1).to(self.device)
        self.numbers = sum(self.sizes)
        self.movement = {name: torch.zeros_like(base) for name, base in self.held.items()}
        self.server_momentum = torch.zeros_like(self.theta)
        self.averages = [(self.theta.clone(), {n: t.clone() for n, t in self.held.items()}) for _ in AVERAGES]

    def column(self, name: str, *, clients: bool = True) -> Tensor:
        """Value of a setting for each model, [G, 1], or for each run, [M, 1]."""
        values = torch.tensor([float(getattr(setting, name)) for setting in self.settings], device=self.device)
        return values.repeat_interleave(self.clients if clients else 1)[:, None]

    def _draw(self, round: int) -> None:
        """New directions and signs for the runs whose period begins."""
        begins = [round % setting.reset_every == 0 for setting in self.settings]
        chosen = torch.tensor(begins, device=self.device)[:, None, None]
        for layer in self.updates:
            new: dict[str, list[Tensor]] = {"a": [], "b": []}
            sizes = {"a": layer.outputs, "b": 9 * layer.inputs}
            for setting, seed in zip(self.settings, self.seeds, strict=True):
                generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * round + ord(layer.name[-1]))
                for part, size in sizes.items():
                    new[part].append(directions(setting.how, size, layer.rank, generator))
            generator = torch.Generator(self.device).manual_seed(1009 * round + ord(layer.name[-1]))
            shape = (len(self.seeds), layer.outputs, 9 * layer.inputs)
            signs = torch.randint(0, 2, shape, generator=generator, device=self.device) * 2.0 - 1
            unmasked = self.column("masked", clients=False)[:, :, None] == 0
            scale = self.column("scale", clients=False)[:, :, None] * even_scale(layer.rank)
            drawn = {part: torch.stack(tensors).to(self.device) for part, tensors in new.items()}
            drawn["mask"] = torch.where(unmasked, 1.0, signs) * scale
            for part, values in drawn.items():
                name = f"{layer.name}.{part}"
                self.held[name] = torch.where(chosen, values, self.held[name]) if round else values
            if round and any(setting.known for setting in self.settings):
                self._know(layer)

    def _know(self, layer: Layer) -> None:
        """Replace a share of the directions by those in which the base moved most."""
        moved = self.movement[f"{layer.name}.base"]
        a, b = self.held[f"{layer.name}.a"], self.held[f"{layer.name}.b"]
        left = torch.linalg.qr(moved @ b)[0]
        right = torch.linalg.qr(moved.mT @ left)[0]
        left = torch.linalg.qr(moved @ right)[0]
        for number, setting in enumerate(self.settings):
            count = round_half(setting.known * layer.rank)
            a[number, :, :count] = left[number, :, :count] * math.sqrt(layer.outputs / 3)
            b[number, :, :count] = right[number, :, :count] * math.sqrt(9 * layer.inputs / 3)

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """Trained tensors by name as views of a vector of them."""
        pieces = theta.split(self.sizes, 1)
        return {name: p.view(-1, *shape) for (name, shape), p in zip(self.shapes.items(), pieces, strict=True)}

    def weights(self, theta: Tensor, held: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Tensors of the network by name, and the parts of each factored layer."""
        found, parts = self.views(theta), {}
        for layer in self.layers:
            mine = {part: found[f"{layer.name}.{part}"] for part in layer.shapes}
            if layer.kind == "update":
                mine |= {part: held[f"{layer.name}.{part}"] for part in ("base", "a", "b", "mask")}
            found[layer.name] = layer.compose(mine)
            parts[layer.name] = mine
        return found, parts

    def train(self, round: int) -> Tensor:
        """Vectors [G, P] of all clients after a round of their own."""
        theta = self.theta.repeat_interleave(self.clients, 0)
        rows, share = self.data.batches(self.seeds, round)
        rate = self.column("lr") * self.column("decay") ** round
        decay, frobenius, momentum = (self.column(n) for n in ("weight_decay", "frobenius", "momentum"))
        first, second = torch.zeros_like(theta), torch.zeros_like(theta)
        trains = self._trained(round)
        losses = torch.zeros(len(theta), device=self.device)
        for step in range(self.data.steps):
            leaf = theta.detach().requires_grad_()
            weights, parts = self.weights(leaf, self.held)
            logits = outputs(weights, self.data.normalized(self.data.images[rows[:, step]]))
            labels = self.data.labels[rows[:, step]]
            each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            loss = (each * share[:, step]).sum(1)
            total = loss.sum()
            if any(setting.frobenius for setting in self.settings):
                norms = sum(weights[layer.name].square().sum((1, 2)) for layer in self.layers if layer.kind != "dense")
                total = total + (norms * frobenius[:, 0]).sum() / 2
            (gradient,) = torch.autograd.grad(total, leaf)
            losses += loss.detach()
            if self.structure.preconditioned:
                gradient = self._preconditioned(gradient, parts)
            active = rate * (share[:, step].sum(1, keepdim=True) > 0)
            if trains is not None:
                active = active * trains
            theta = theta.detach()
            if self.structure.optimizer == "adamw":
                count = torch.tensor(step + 1.0, device=self.device)
                FAST["adamw"](theta, gradient, first, second, active, decay, count)
            else:
                first.mul_(momentum).add_(gradient)
                theta.addcmul_(active, first, value=-1)
        self.train_loss = losses.view(-1, self.clients).mean(1) / self.data.steps
        return theta

    def _trained(self, round: int) -> Tensor | None:
        """1 for the entries that are trained in a round and 0 for others, [P]; None if all are."""
        if not self.structure.cyclic:
            return None
        factors = [name for layer in self.layers if layer.kind != "dense" for name in layer.shapes]
        turns = sorted(set(factors))
        turn = turns[round % len(turns)]
        names = {f"{layer.name}.{part}" for layer in self.layers if layer.kind != "dense" for part in layer.shapes}
        return torch.cat(
            [
                torch.full((size,), float(name not in names or name.endswith(f".{turn}")))
                for name, size in zip(self.shapes, self.sizes, strict=True)
            ]
        ).to(self.device)

    def _preconditioned(self, gradient: Tensor, parts: dict[str, dict[str, Tensor]]) -> Tensor:
        views = self.views(gradient.clone())
        with torch.no_grad():
            for layer in self.layers:
                if layer.kind not in ("dense", "update"):
                    for part, values in curvature(layer, parts[layer.name]).items():
                        floor = 0.1 * values.mean((1, 2) if values.dim() == 3 else (1, 2, 3), keepdim=True)
                        views[f"{layer.name}.{part}"] /= values + floor
        return torch.cat([view.flatten(1) for view in views.values()], 1)

    def aggregate(self, theirs: Tensor, round: int) -> None:
        """The server's step, by all options of the settings."""
        share = self.data.shares(self.seeds)
        changes = theirs.view(len(self.theta), self.clients, -1) - self.theta[:, None]
        mean = torch.einsum("mk,mkp->mp", share, changes)
        beta, eta = self.column("beta", clients=False), self.column("eta", clients=False)
        if any(setting.fedexp for setting in self.settings):
            norms = (share * changes.square().sum(2)).sum(1, keepdim=True)
            rate = (norms / (2 * (mean.square().sum(1, keepdim=True) + 1e-12))).clamp(min=1)
            eta = torch.where(self.column("fedexp", clients=False) > 0, rate, eta)
        self.server_momentum = beta * self.server_momentum + mean
        moved = self.server_momentum if not self.updates else self._without_updates(mean)
        self.theta = self.theta + eta * moved
        self._fold(round + 1)
        for decay, average in zip(AVERAGES, self.averages, strict=True):
            average[0].lerp_(self.theta, 1 - decay)
            for name, values in average[1].items():
                values.lerp_(self.held[name], 1 - decay)

    def _without_updates(self, mean: Tensor) -> Tensor:
        """Movement with momentum for all but the factors of updates."""
        found, plain = self.views(self.server_momentum.clone()), self.views(mean)
        for layer in self.updates:
            for part in layer.shapes:
                found[f"{layer.name}.{part}"] = plain[f"{layer.name}.{part}"]
        return torch.cat([found[name].flatten(1) for name in self.shapes], 1)

    def _fold(self, round: int) -> None:
        """Fold the updates whose period ends, with the server's momentum on the base."""
        if not self.updates:
            return
        ends = torch.tensor([round % setting.reset_every == 0 for setting in self.settings], device=self.device)
        keeps = (~ends).float()[:, None, None]
        views, beta = self.views(self.theta), self.column("base_beta", clients=False)[:, :, None]
        known = 0.7 * self.column("known", clients=False)[:, :, None].sign()
        for layer in self.updates:
            names = {part: f"{layer.name}.{part}" for part in ("base", "a", "b", "mask", "u", "v")}
            parts = {part: views[n] if part in "uv" else self.held[n] for part, n in names.items()}
            step = layer.compose(parts) - parts["base"]
            kept = torch.maximum(beta, known)
            moved = torch.where(
                ends[:, None, None], kept * self.movement[names["base"]] + step, self.movement[names["base"]]
            )
            self.movement[names["base"]] = moved
            folded = torch.where(beta > 0, moved, step) * (1 - keeps)
            self.held[names["base"]] = self.held[names["base"]] + folded
            for part in "uv":
                views[names[part]].mul_(keeps)
        if bool(ends.any()):
            self._draw(round)

    @torch.no_grad()
    def accuracy(self, average: int | None = None) -> list[float]:
        """Accuracy of each run on the test examples, of an average of the rounds' weights if its number is given."""
        theta, held = (self.theta, self.held) if average is None else self.averages[average]
        weights, _ = self.weights(theta, {**self.held, **held})
        right = torch.zeros(len(theta), device=self.device)
        for start in range(0, len(self.data.test_labels), EVALUATED):
            images = self.data.normalized(self.data.test_images[start : start + EVALUATED])
            labels = self.data.test_labels[start : start + EVALUATED]
            logits = outputs(weights, images[None].expand(len(theta), *images.shape), fused=False)
            right += (logits.argmax(2) == labels).sum(1)
        return (right / len(self.data.test_labels)).tolist()

    def run(self, evaluated: tuple[int, ...]) -> list[dict[str, Any]]:
        """All rounds; the measures of each run."""
        found: list[dict[str, Any]] = [{"accuracy": {}, "train_loss": {}} for _ in self.seeds]
        for round in range(self.rounds):
            if round and round == self.structure.warm_up:
                self.factorize()
            self.aggregate(self.train(round), round)
            if round + 1 in evaluated or round == 0:
                for each, loss in zip(found, self.train_loss.tolist(), strict=True):
                    each["train_loss"][round + 1] = loss
            if round + 1 in evaluated:
                for each, accuracy in zip(found, self.accuracy(), strict=True):
                    each["accuracy"][round + 1] = accuracy
        for number, decay in enumerate(AVERAGES):
            for each, accuracy in zip(found, self.accuracy(number), strict=True):
                each[f"average {decay}"] = accuracy
        return found


def adamw(
    theta: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: Tensor, decay: Tensor, count: Tensor
) -> None:
    """Step number `count` of AdamW, in place."""
    theta.mul_(1 - rate * decay)
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    denominator = (second / (1 - BETAS[1] ** count)).sqrt() + ADAM_EPS
    theta.sub_(rate * first / (1 - BETAS[0] ** count) / denominator)


FAST["adamw"] = adamw


def round_half(value: float) -> int:
    """Nearest integer."""
    return math.floor(value + 0.5)
