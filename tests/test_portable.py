"""What only the engine `onnxruntime` has; the rest is in `test_training_engines`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from small_net import OPTIMIZERS, SHAPE, SmallBundle, batches, small_net

from device_runtime import Adjustment
from device_runtime.engines.micro_batches import split_batch
from device_runtime.engines.portable import open_engine
from device_runtime.engines.vector import views
from fedpara_edge.errors import WrongBundleError
from fedpara_edge.formats.bundle import Bundle, open_bundle, write_initial_personal


@pytest.fixture
def bundle(small_bundle: SmallBundle, tmp_path: Path) -> Bundle:
    """A copy to spoil."""
    shutil.copytree(small_bundle().path, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def steps_out_of_place(
    bundle: Bundle, adjustment: Adjustment, micro_batches: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Ten steps through onnxruntime's plain interface: every input and every output has memory of its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(bundle.file("train_step.onnx")), options)
    trained = bundle.manifest.layout.with_role("shared", "personal")
    initial = dict(small_net().state_dict())
    weights = np.concatenate([initial[tensor.name].numpy().ravel() for tensor in trained])
    h = np.concatenate([(adjustment.h or {}).get(t.name, np.zeros(t.shape, np.float32)).ravel() for t in trained])
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    names = [name for name in ("momentum", "moment1", "moment2", "steps") if name in shapes]
    state = {"weights": weights, **{name: np.zeros(shapes[name], np.float32) for name in names}}
    losses = []
    for number, (x, y) in enumerate(batches(10)):
        gradient, loss = np.zeros(1, np.float32), 0.0
        for part in split_batch(
            {"x": x}, {"y": y}, heads=bundle.interface.heads, micro_batches=micro_batches, seed=number
        ):
            numbers = {"share": part.shares[0], "learning_rate": 0.01, "max_norm": adjustment.max_norm}
            feeds: dict[str, Any] = {name: np.array(value, np.float32) for name, value in numbers.items()}
            feeds |= {"last": np.array(part.last), "adjusted": np.array(True), "seed": np.array(part.seed)}
            feeds |= {
                **part.x,
                **part.y,
                "accumulated": gradient,
                "h": h,
                **state,
                "mu": np.full(1, adjustment.mu, np.float32),
            }
            found = session.run(["loss", "gradient", *(f"new_{name}" for name in state)], feeds)
            loss += part.shares[0] * float(found[0])
            gradient, state = found[1], dict(zip(state, found[2:], strict=True))
        losses.append(loss)
    return losses, views(state["weights"], trained)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updating_in_place_gives_the_same_bits(optimizer: str, micro_batches: int, small_bundle: SmallBundle) -> None:
    bundle = small_bundle(optimizer, 0.3)
    adjustment = Adjustment(max_norm=1.0, mu=0.1, h={"6.bias": np.full(5, 0.1, np.float32)})
    losses, trained = steps_out_of_place(bundle, adjustment, micro_batches)
    engine = open_engine(bundle, threads=1)
    settings = {"learning_rate": 0.01, "adjustment": adjustment, "micro_batches": micro_batches}
    assert [engine.step(x, y, seed=n, **settings) for n, (x, y) in enumerate(batches(10))] == losses
    for name, tensor in engine.read().items():
        np.testing.assert_array_equal(tensor, trained[name])


def test_each_graph_is_needed_for_its_own_purpose_only(bundle: Bundle) -> None:
    (x, y), *_ = batches(2)
    bundle.file("eval_step.onnx").write_bytes(b"not onnx")
    engine = open_engine(bundle)
    engine.step(x, y, learning_rate=0.1, seed=0)
    with pytest.raises(
        WrongBundleError,
        match=r"eval_step.onnx: expected a self-contained graph, found a field of type 6; copy the whole",
    ):
        engine.evaluate(x, y)


@pytest.mark.parametrize("content", [b"", b"not onnx"])
def test_a_damaged_graph_is_refused(content: bytes, bundle: Bundle) -> None:
    (x, y), *_ = batches(2)
    bundle.file("train_step.onnx").write_bytes(content)
    with pytest.raises(
        WrongBundleError,
        match=r"train_step.onnx: expected a self-contained graph, found [^\n]*; copy the whole bundle again",
    ):
        open_engine(bundle).step(x, y, learning_rate=0.1, seed=0)


def test_a_missing_graph_is_refused(bundle: Bundle) -> None:
    (x, y), *_ = batches(2)
    bundle.file("train_step.onnx").unlink()
    with pytest.raises(WrongBundleError, match=r"train_step.onnx: expected a graph, found No such file"):
        open_engine(bundle).step(x, y, learning_rate=0.1, seed=0)


def test_a_bundle_without_a_personal_tensor_is_refused(bundle: Bundle) -> None:
    tensors = bundle.read_initial_personal()
    write_initial_personal(bundle.path, {name: tensor for name, tensor in tensors.items() if name != "6.x2"})
    with pytest.raises(WrongBundleError, match=r"personal tensors of manifest.json \(2\), found others \(1\)"):
        open_engine(bundle)


def test_a_graph_of_another_release_is_refused(bundle: Bundle) -> None:
    (x, y), *_ = batches(2)
    path = bundle.file("train_step.onnx")
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("temperature", onnx.TensorProto.FLOAT, ()))
    onnx.save(model, path)
    with pytest.raises(WrongBundleError, match=r"that this release knows, found others \(temperature\); export again"):
        open_engine(bundle).step(x, y, learning_rate=0.1, seed=0)


def test_batches_of_any_size_in_any_order(small_bundle: SmallBundle) -> None:
    engine = open_engine(small_bundle(), threads=1)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((40, *SHAPE), np.float32), generator.integers(0, 5, 40)
    outputs = engine.evaluate(x, y).outputs["logits"]
    for rows in (1, 40, 3, 17):
        found = engine.evaluate(x[:rows], y[:rows])
        np.testing.assert_allclose(found.outputs["logits"], outputs[:rows], rtol=1e-5, atol=1e-6)
        assert engine.step(x[:rows], y[:rows], learning_rate=1e-30, seed=0) == pytest.approx(found.losses[0], rel=1e-6)
