"""The images of a plan on a device, and the batches of all clients of many runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpara_edge.simulation.data.federation import DataPlan, load_federation


@dataclass(frozen=True, kw_only=True)
class Images:
    """What becomes of pixels.

    Args:
        mean: Mean that is subtracted, by channel.
        std: Standard deviation by which they are divided, by channel.
        padded: Whether they are padded to 32x32.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    padded: bool = False


class Data:
    """The examples of a plan on a device, and the batches of all clients for some seeds.

    Args:
        plan: The [data] table.
        seeds: Seeds of the federations.
        images: What becomes of pixels.
        device: The device.
        batch_size: Rows of a step.
        tests: Number of test examples that are used.
    """

    def __init__(
        self, plan: DataPlan, seeds: list[int], images: Images, device: torch.device, *, batch_size: int, tests: int
    ) -> None:
        arrays = np.load(plan.path)
        (x, y), (x_test, y_test) = ((arrays[n] for n in names) for names in (plan.train, plan.test or ()))
        self.device, self.batch_size, self.padded = device, batch_size, images.padded
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.images, self.labels = self._placed(x), torch.from_numpy(y.astype(np.int64)).to(device)
        self.test_images = self._placed(x_test[:tests])
        self.test_labels = torch.from_numpy(y_test[:tests].astype(np.int64)).to(device)
        self._mean, self._std = (torch.tensor(v, device=device).float() for v in (images.mean, images.std))
        row_of = {image.tobytes(): row for row, image in enumerate(x)}
        self.rows: dict[int, list[np.ndarray]] = {}
        for seed in seeds:
            clients = load_federation(plan, seed).clients
            self.rows[seed] = [np.array([row_of[image.tobytes()] for image in client.train.x]) for client in clients]
        self.clients = len(next(iter(self.rows.values())))
        self.steps = max(-(-len(rows) // batch_size) for of in self.rows.values() for rows in of)

    def _placed(self, images: Any) -> Tensor:
        images = images[:, None] if images.ndim == 3 else images
        if self.padded:
            short = 32 - images.shape[2]
            images = np.pad(
                images, ((0, 0), (0, 0), (short // 2, short - short // 2), (short // 2, short - short // 2))
            )
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 2, 3, 1))).to(self.device)

    def normalized(self, images: Tensor) -> Tensor:
        """Images in the dtype of the products."""
        return ((images.float() / 255 - self._mean) / self._std).to(self.dtype)

    def shares(self, seeds: list[int]) -> Tensor:
        """Shares of the clients by their examples, [M, K]."""
        counts = torch.tensor([[len(rows) for rows in self.rows[seed]] for seed in seeds], device=self.device)
        return counts / counts.sum(1, keepdim=True)

    def batches(self, seeds: list[int], round: int) -> tuple[Tensor, Tensor]:
        """Rows [G, S, B] of a round, and their weights in the mean of a step, 0 for what is filled up."""
        chosen = {seed: self._batches(seed, round) for seed in set(seeds)}
        rows = np.concatenate([chosen[seed][0] for seed in seeds])
        weights = np.concatenate([chosen[seed][1] for seed in seeds])
        return torch.from_numpy(rows).to(self.device), torch.from_numpy(weights).to(self.device)

    def _batches(self, seed: int, round: int) -> tuple[np.ndarray, np.ndarray]:
        total = self.steps * self.batch_size
        rows, weights = np.zeros((self.clients, total), np.int64), np.zeros((self.clients, total), np.float32)
        for client, mine in enumerate(self.rows[seed]):
            order = np.random.default_rng([seed, round, client]).permutation(mine)
            rows[client, : len(order)], weights[client, : len(order)] = order, 1
        shape = (self.clients, self.steps, self.batch_size)
        weights = weights.reshape(shape)
        return rows.reshape(shape), weights / np.maximum(weights.sum(2, keepdims=True), 1)
