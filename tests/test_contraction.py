"""Contracted linear layers compute what composed ones compute, and are chosen where they are cheaper."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from export import export_bundle
from export.comparison import TOLERANCE
from export.forward.contraction import contract_layers, step_cost
from fedpara_edge.factors.layout import LayerSpec
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.nn import Linear


@pytest.mark.parametrize("kind", ["fedpara", "pfedpara", "lowrank"])
def test_contracted_is_composed(kind: str) -> None:
    torch.manual_seed(0)
    layer = Linear(9, 7, kind=kind, rank=3).double()
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    results = []
    for contracted in (False, True):
        layer.contracted = contracted
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for composed, found in zip(*results, strict=True):
        torch.testing.assert_close(found, composed, rtol=1e-12, atol=1e-12)


def choice(shape: tuple[int, int], rank: int, kind: str, batch: int) -> bool:
    spec = LayerSpec(name="fc", operator="linear", kind=kind, form="matrix", shape=shape, rank=rank)
    return step_cost(spec, batch, contracted=True) < step_cost(spec, batch, contracted=False)


@pytest.mark.parametrize(
    ("shape", "rank", "kind", "batch", "expected"),
    [  # as measured, see benchmarks/contraction.py
        ((256, 784), 24, "fedpara", 32, False),
        ((256, 784), 16, "fedpara", 8, False),
        ((512, 512), 40, "fedpara", 1, False),
        ((512, 512), 8, "fedpara", 64, True),
        ((1024, 256), 8, "fedpara", 128, True),
        ((512, 512), 24, "pfedpara", 32, False),
        ((512, 512), 64, "lowrank", 1, True),
        ((256, 784), 40, "lowrank", 32, True),
    ],
)
def test_the_cheaper_is_chosen(shape: tuple[int, int], rank: int, kind: str, batch: int, expected: bool) -> None:
    assert choice(shape, rank, kind, batch) == expected


def test_layers_are_chosen_by_the_rows_they_see() -> None:
    model = nn.Sequential(
        Linear(1024, 256, kind="fedpara", rank=8), Linear(256, 256, tanh=True, rank=1), Linear(256, 9, kind="dense")
    )
    assert contract_layers(model, [torch.zeros(4, 1024)], batch_size=1) == []
    assert contract_layers(model, [torch.zeros(4, 1024)], batch_size=256) == ["0"]
    assert contract_layers(model, [torch.zeros(4, 64, 1024)], batch_size=4) == ["0"]  # 64 rows an example
    assert contract_layers(model, [torch.zeros(4, 1024)], batch_size=1) == []


@pytest.mark.slow
def test_the_batch_size_of_an_export_decides_and_both_engines_follow(tmp_path: Path) -> None:
    shapes = []
    for size in (1, 256):
        torch.manual_seed(0)
        model = nn.Sequential(Linear(512, 128, rank=6), nn.ReLU(), nn.Linear(128, 5))
        options = ExportConfig(name="fc", input_shape=(512,), input_dtype="float32", batch_size=size)
        bundle, verification = export_bundle(model, tmp_path / str(size), options)
        assert max(errors.worst for errors in verification.values()) <= TOLERANCE
        nodes = onnx.load(bundle.file("eval_step.onnx")).graph.node
        shapes.append(sum(node.op_type in ("Gemm", "MatMul") for node in nodes))
        assert not model[0].contracted
    assert shapes == [4, 3]  # X1 Y1ᵀ, X2 Y2ᵀ and two layers, against x L, Rᵀ and a layer
