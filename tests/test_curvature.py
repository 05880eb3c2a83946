"""The curvature that is found without a matrix is that of the matrix Jᵀ H J, for every loss."""

from collections.abc import Callable, Sequence

import pytest
import torch
from heads import deployed, head
from torch import Tensor, nn
from torch.nn import functional as F

from export.batches import Batches
from export.curvature import largest_curvature
from export.forward.ownloss import LoadedLoss
from export.forward.preprocess import Deployed
from export.reference import loss_in_torch
from export.stability import stable_rate
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.nn import convert

torch.set_num_threads(1)  # the tensors are too small for threads to pay

ROWS = 6


class LogCosh(nn.Module):
    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).cosh().log().mean()


class Focal(nn.Module):
    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        misses = F.cross_entropy(outputs, y, reduction="none")
        return ((1 - (-misses).exp()) ** 2 * misses).mean()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.level = nn.Linear(8, 24), nn.Linear(24, 4), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"kind": self.kind(hidden), "level": self.level(hidden)}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 20))


def at_positions() -> nn.Module:
    return nn.Sequential(plain(), nn.Unflatten(1, (4, 5)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Head, ...]]] = {
    "cross-entropy": (plain, (head("cross_entropy", 20),)),
    "smoothed": (plain, (head("cross_entropy:label_smoothing=0.2", 20),)),
    "at positions": (at_positions, (head("cross_entropy", 4, 5),)),
    "weighted": (at_positions, (head("cross_entropy:class_weights=1,2,5,0.1", 4, 5),)),
    "ignoring": (at_positions, (head("cross_entropy:ignore_index=3", 4, 5),)),
    "binary": (plain, (head("bce", 20),)),
    "binary, yes weighted": (plain, (head("bce:pos_weight=7", 20),)),
    "squared": (plain, (head("mse", 20),)),
    "own, of classes": (plain, (head(LoadedLoss(function="Focal", kind="classes", module=Focal()), 20),)),
    "own, of numbers": (plain, (head(LoadedLoss(function="LogCosh", module=LogCosh()), 20),)),
    "two heads": (
        TwoHeads,
        (head("cross_entropy:weight=3", 4, output="kind"), head("mse:weight=0.2", 2, output="level")),
    ),
    "two heads, one without curvature": (
        TwoHeads,
        (head("cross_entropy", 4, output="kind"), head("l1", 2, output="level")),
    ),
}


def made(make: Callable[[], nn.Module], heads: tuple[Head, ...]) -> tuple[Deployed, Batches]:
    torch.manual_seed(0)
    model = deployed(convert(make(), Factorization(gamma=0))[0], 8, outputs=tuple(each.output.name for each in heads))
    return model, batches(model, heads)


def batches(model: Deployed, heads: tuple[Head, ...]) -> Batches:
    preprocessing = [argument.preprocessing for argument in model.arguments]
    return Batches(inputs=[ArraySpec("x", (8,), "float32")], preprocessings=preprocessing, heads=heads, seed=0)


def formed(outputs: list[Tensor], loss: Callable[[list[Tensor]], Tensor], parameters: list[Tensor]) -> float:
    """Largest eigenvalue of the matrix Jᵀ H J, which is formed."""
    entries = torch.cat([output.reshape(-1) for output in outputs])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True) for entry in entries]
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros(each.numel()) if part is None else part.reshape(-1)
                    for each, part in zip(parameters, row, strict=True)
                ]
            )
            for row in rows
        ]
    )

    def of_entries(flat: Tensor) -> Tensor:
        parts = flat.split([output.numel() for output in outputs])
        return loss([part.reshape(output.shape) for part, output in zip(parts, outputs, strict=True)])

    hessian = torch.autograd.functional.hessian(of_entries, entries.detach())
    return float(torch.linalg.eigvalsh(jacobian.T @ hessian @ jacobian)[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_curvature_is_that_of_the_formed_matrix(case: str) -> None:
    make, heads = CASES[case]
    model, source = made(make, heads)
    batch = source.draw(ROWS)
    labels = {name: torch.from_numpy(array) for name, array in batch.labels.items()}
    outputs = model.by_name(torch.from_numpy(batch.inputs["x"]))

    def loss(values: list[Tensor]) -> Tensor:
        return loss_in_torch(heads, dict(zip(outputs, values, strict=True)), labels)

    expected = formed([*outputs.values()], loss, list(model.parameters()))
    found = largest_curvature([*outputs.values()], loss, list(model.parameters()))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=0.02)
    assert stable_rate(model, heads, batch) == pytest.approx(2 / expected, rel=0.02)


def test_a_huber_loss_counts_as_if_all_differences_were_small() -> None:
    """Half of a squared error, as which it ends, whatever the labels are at the start."""
    (squared,), (huber,) = CASES["squared"][1], (head("huber:delta=0.001", 20),)
    model, source = made(plain, (squared,))
    rate = stable_rate(model, [squared], source.draw(ROWS))
    assert rate is not None
    assert stable_rate(model, [huber], batches(model, (huber,)).draw(ROWS)) == pytest.approx(2 * rate, rel=0.02)


def test_a_loss_that_grows_linearly_has_no_curvature() -> None:
    heads = (head("l1", 20),)
    model, source = made(plain, heads)
    assert stable_rate(model, heads, source.draw(ROWS)) is None


def test_the_largest_eigenvalue_is_not_the_one_of_largest_magnitude() -> None:
    weight = torch.ones(3, requires_grad=True)
    scales = torch.tensor([1.0, -9.0, 4.0])
    assert largest_curvature([weight], lambda outputs: (scales * outputs[0].square()).sum(), [weight]) == pytest.approx(
        8, rel=0.02
    )
    assert largest_curvature([weight], lambda outputs: -outputs[0].square().sum(), [weight]) is None


def test_an_eigenvalue_that_is_not_found_is_not_guessed() -> None:
    weight = torch.ones(30, requires_grad=True)
    scales = torch.arange(30.0)

    def loss(outputs: Sequence[Tensor]) -> Tensor:
        return (scales * outputs[0].square()).sum()

    assert largest_curvature([weight], loss, [weight], products=3) is None
    assert largest_curvature([weight], loss, [weight], products=30) == pytest.approx(58, rel=0.02)
