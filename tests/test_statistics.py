"""Running statistics: trained like torch's on the device, sent, averaged as a mixture, or kept there."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
import torch
from norms import relative_error
from onnxruntime import InferenceSession
from small_net import OPTIONS, SmallBundle, torch_optimizer, without_verification
from torch import nn

from device_runtime import Adjustment, TrainConfig, open_data, open_engine, train
from device_runtime.engines.registry import ENGINES
from export import export_bundle
from export.folding.fold import fold
from export.forward.preprocess import Deployed
from export.reference import Reference
from export.trials import Results
from fedpara_edge.aggregation import aggregate
from fedpara_edge.algorithms import SERVER, find_server
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.codecs import ENCODERS, find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.errors import FedparaError, InputError, WrongBundleError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import MANIFEST, WEIGHTS, Bundle, open_bundle
from fedpara_edge.formats.recipe import ExportConfig
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.nn import batchnorm, convert
from fedpara_edge.storage.tensorfile import TensorFile

SHAPE, CLASSES = (3, 6, 6), 5
TOLERANCE = 1e-4  # after 20 steps in float32, of which AdamW magnifies the rounding
STATISTICS = [f"{layer}.running_{part}" for layer in (1, 4, 8) for part in ("mean", "var")]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def net() -> nn.Sequential:
    """BatchNorms of images and of rows, with and without an affine map, and a momentum of its own."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False)),
        *(nn.BatchNorm2d(4, affine=False, momentum=0.3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(16, 7, bias=False), nn.BatchNorm1d(7, eps=1e-3), nn.Tanh(), nn.Linear(7, CLASSES)),
    )


def export(folder: Path, choice: str = "train", optimizer: str = "sgd") -> Bundle:
    converted, _ = convert(net(), Factorization(kind="dense", batchnorm=choice))
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32", **OPTIONS[optimizer])
    with without_verification():
        return export_bundle(converted, folder, config)[0]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    made: dict[tuple[str, ...], Bundle] = {}

    def bundle(*key: str) -> Bundle:
        if key not in made:
            made[key] = export(tmp_path_factory.mktemp("bundle") / "bundle", *key)
        return made[key]

    return bundle


def batches(count: int, rows: int = 9) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        x = 3 + 2 * generator.standard_normal((rows, *SHAPE), dtype=np.float32)
        yield x, generator.integers(0, CLASSES, rows)


def torch_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: np.ndarray, y: np.ndarray, micro_batches: int
) -> None:
    optimizer.zero_grad()
    for rows in np.array_split(np.arange(len(x)), micro_batches):
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x[rows]).double()), torch.from_numpy(y[rows]))
        (loss * len(rows) / len(x)).backward()
    optimizer.step()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIONS)
@every_engine
def test_weights_and_statistics_follow_torchs_batchnorm(
    engine: str, optimizer: str, micro_batches: int, bundles: Callable[..., Bundle]
) -> None:
    model = net().double()
    reference = torch_optimizer(optimizer, model, 0.01)
    found = open_engine(bundles("train", optimizer), engine, threads=1)
    for x, y in batches(20):
        torch_step(model, reference, x, y, micro_batches)
        found.step(x, y, learning_rate=0.01, seed=0, micro_batches=micro_batches)
    expected = model.state_dict()
    tensors = found.read()
    assert set(tensors) == {name for name in expected if not name.endswith("num_batches_tracked")}
    for name, tensor in tensors.items():
        assert relative_error(tensor, expected[name].numpy()) < TOLERANCE, name
    outcome = found.evaluate(x, y)
    in_torch = model.eval()(torch.from_numpy(x).double())
    assert relative_error(outcome.outputs["logits"], in_torch.detach().numpy()) < TOLERANCE
    assert outcome.loss == pytest.approx(
        nn.functional.cross_entropy(in_torch, torch.from_numpy(y)).item(), rel=TOLERANCE
    )


@every_engine
def test_a_row_alone_leaves_variances_finite_and_evaluates(engine: str, bundles: Callable[..., Bundle]) -> None:
    found = open_engine(bundles("train"), engine)
    (x, y), *_ = batches(1, rows=1)
    found.step(x, y, learning_rate=0.01, seed=0)
    tensors = found.read()
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    np.testing.assert_allclose(tensors["8.running_var"], 0.9, rtol=1e-6)  # one value has no variance to add


@every_engine
def test_a_variance_below_zero_counts_as_zero(engine: str, bundles: Callable[..., Bundle]) -> None:
    found = open_engine(bundles("train"), engine)
    (x, y), *_ = batches(1)
    results = []
    for variance in (-0.5, 0.0):
        found.load({"8.running_var": np.full(7, variance, np.float32)})
        results.append(found.evaluate(x, y).outputs["logits"])
    np.testing.assert_array_equal(*results)
    found.load({"8.running_var": np.full(7, -0.5, np.float32)})
    found.step(x, y, learning_rate=0.01, seed=0)
    assert found.read()["8.running_var"].min() > 0


@every_engine
def test_a_restored_engine_goes_on_with_its_statistics(engine: str, bundles: Callable[..., Bundle]) -> None:
    one, other = (open_engine(bundles("train", "momentum"), engine, threads=1) for _ in range(2))
    steps = list(batches(4))
    for x, y in steps[:2]:
        one.step(x, y, learning_rate=0.01, seed=0)
    other.restore(one.state())
    for x, y in steps[2:]:
        for each in (one, other):
            each.step(x, y, learning_rate=0.01, seed=0)
    for name, tensor in one.read().items():
        np.testing.assert_array_equal(tensor, other.read()[name])


@every_engine
def test_adjustments_leave_statistics_alone(engine: str, bundles: Callable[..., Bundle]) -> None:
    results = []
    (x, y), *_ = batches(1)
    for adjustment in (Adjustment(), Adjustment(mu=0.5, max_norm=0.1)):
        found = open_engine(bundles("train"), engine, threads=1)
        found.step(x, y, learning_rate=0.01, seed=0, adjustment=adjustment)
        results.append({name: tensor for name, tensor in found.read().items() if name in STATISTICS})
    for name in STATISTICS:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def write_data(path: Path, seed: int = 0, shift: float = 0.0) -> Path:
    generator = np.random.default_rng(seed)
    x = shift + generator.standard_normal((24, *SHAPE), dtype=np.float32)
    np.savez(path, x=x, y=generator.integers(0, CLASSES, 24))
    return path


def local_round(
    bundle: Bundle, folder: Path, client: str, *, seed: int = 0, shift: float = 0.0, codec: str = "float32", **more: Any
) -> Path:
    """An update of a device, whose state is in `folder`."""
    engine = open_engine(bundle, "onnxruntime", threads=1)
    data = open_data(write_data(folder / f"{client}.npz", seed, shift), bundle.manifest)
    output = folder / f"{client}.safetensors"
    weights = more.pop("weights", bundle.file(WEIGHTS))
    config = TrainConfig(batch_size=8, lr=0.05, **more)
    train(
        engine, data, weights, config, output=output, encoder=find_encoder(codec), state=folder / client, client=client
    )
    return output


def change_of(update: Path, weights: Weights) -> dict[str, np.ndarray]:
    opened = open_update(update, weights)
    flat = np.empty(weights.layout.shared_parameters, np.float32)
    opened.decoder.decode(0, flat)
    opened.close()
    tensors = in_order(weights.layout.shared)
    ends = np.cumsum([tensor.size for tensor in tensors])
    return {t.name: part.reshape(t.shape) for t, part in zip(tensors, np.split(flat, ends[:-1]), strict=True)}


def test_statistics_of_clients_are_averaged_as_those_of_a_mixture(
    tmp_path: Path, bundles: Callable[..., Bundle]
) -> None:
    bundle = bundles("train")
    weights = read_weights(bundle.file(WEIGHTS))
    updates = [local_round(bundle, tmp_path, f"c{n}", seed=n, shift=3.0 * n) for n in range(3)]
    changes = [change_of(update, weights) for update in updates]
    done = aggregate(updates, weights)
    for layer in (1, 4, 8):
        mean, variance = f"{layer}.running_mean", f"{layer}.running_var"
        means = [weights.tensors[mean].astype(float) + change[mean] for change in changes]
        variances = [weights.tensors[variance].astype(float) + change[variance] for change in changes]
        average = np.mean(means, axis=0)
        expected = np.mean([v + m**2 for v, m in zip(variances, means, strict=True)], axis=0) - average**2
        np.testing.assert_allclose(done.weights.tensors[mean], average, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(done.weights.tensors[variance], expected, rtol=1e-5)
        if layer == 1:  # whose inputs have another mean on every client
            assert (expected > 1.1 * np.mean(variances, axis=0)).any()


NORM = Layout(
    (),
    tuple(
        small_round.tensor(f"{name}.{suffix}", (3,), name, part)
        for name in ("b", "a")
        for suffix, part in (("weight", "norm"), ("running_mean", "mean"), ("running_var", "variance"))
    ),
)


@pytest.mark.parametrize("name", SERVER)
def test_no_server_algorithm_steps_statistics(name: str, tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, NORM, number=0)
    given = "scaffold:clients=9" if name == "scaffold" else "feddyn:clients=9" if name == "feddyn" else name
    algorithm = find_server(given)
    metrics = {"learning_rate_sum": 0.1, "alpha": getattr(algorithm, "alpha", 0.0)}
    updates = [small_round.send(tmp_path, weights, client, metrics=metrics) for client in "abc"]
    plain = aggregate(updates, weights, algorithm=FedAvgServer(), weighting="equal").weights.tensors
    done = aggregate(updates, weights, algorithm=algorithm, weighting="equal")
    for tensor in NORM.statistics:
        np.testing.assert_array_equal(done.weights.tensors[tensor.name], plain[tensor.name])
        for group, kept in (done.state.groups if done.state else {}).items():
            assert np.unique(kept[tensor.name]) == np.float32(algorithm.start(group))


def test_an_average_of_variances_is_never_negative(tmp_path: Path) -> None:
    weights = small_round.start_round(tmp_path, NORM, number=0)
    change = {t.name: np.full(t.shape, -1e3 * (t.part == "variance"), np.float32) for t in NORM.shared}
    done = aggregate([small_round.send(tmp_path, weights, "a", change=change)], weights)
    for layer in "ab":
        np.testing.assert_array_equal(done.weights.tensors[f"{layer}.running_var"], 0)


@pytest.mark.parametrize("codec", ENCODERS)
def test_a_round_with_any_codec_evaluates(codec: str, tmp_path: Path, bundles: Callable[..., Bundle]) -> None:
    bundle = bundles("train")
    codec = {"adaptive": "adaptive:error=0.3"}.get(codec, codec)
    updates = [local_round(bundle, tmp_path, f"c{n}", seed=n, shift=4.0, codec=codec) for n in range(2)]
    done = aggregate(updates, read_weights(bundle.file(WEIGHTS)))
    engine = open_engine(bundle, "onnxruntime")
    engine.load(done.weights.tensors)
    (x, y), *_ = batches(1)
    assert np.isfinite(engine.evaluate(x, y).loss)
    assert not np.array_equal(done.weights.tensors["1.running_mean"], np.zeros(6))


@pytest.mark.parametrize("algorithm", ["fedprox:mu=0.1", "scaffold", "feddyn"])
def test_algorithms_train_beside_statistics(algorithm: str, tmp_path: Path, bundles: Callable[..., Bundle]) -> None:
    bundle = bundles("train")
    weights = read_weights(bundle.file(WEIGHTS))
    server = {"scaffold": "scaffold:clients=2", "feddyn": "feddyn:clients=2"}.get(algorithm, "fedavg")
    plain = change_of(local_round(bundle, tmp_path, "plain"), weights)
    found = local_round(bundle, tmp_path, "own", algorithm=algorithm)
    assert aggregate([found], weights, algorithm=find_server(server)).accepted
    # The first batch is that of the plain training, and so are the statistics after it; the others differ a little.
    assert change_of(found, weights)["1.running_mean"] == pytest.approx(plain["1.running_mean"], rel=1e-2, abs=1e-3)


def test_a_local_batchnorm_stays_on_the_device(tmp_path: Path, bundles: Callable[..., Bundle]) -> None:
    bundle = bundles("local")
    layout = bundle.manifest.layout
    assert [tensor.name for tensor in layout.with_role("shared")] == [
        *("0.weight", "3.weight", "7.weight", "10.weight", "10.bias")
    ]
    assert {tensor.layer for tensor in layout.with_role("personal")} == {"1", "4", "8"}
    assert [tensor.name for tensor in layout.statistics] == STATISTICS
    states = []
    for seed, (client, shift) in enumerate((("a", 0.0), ("b", 5.0))):
        update = local_round(bundle, tmp_path, client, seed=seed, shift=shift)
        with TensorFile(update, format="fedpara-edge/update", error=InputError) as file:
            assert set(file.entries) == {tensor.name for tensor in layout.shared}
        with TensorFile(
            tmp_path / client / "lasting.safetensors", format="fedpara-edge/device-state", error=InputError
        ) as file:
            states.append({name: file.read(f"after/personal/{name}") for name in ("1.running_mean", "1.weight")})
    assert np.abs(states[0]["1.running_mean"] - states[1]["1.running_mean"]).max() > 1
    assert not np.array_equal(states[0]["1.weight"], states[1]["1.weight"])


@pytest.mark.parametrize("engines", [("onnxruntime",), ENGINES])
def test_a_folded_model_normalizes_by_the_running_statistics(engines: tuple[str, ...], tmp_path: Path) -> None:
    converted, _ = convert(net(), Factorization(kind="dense", batchnorm="train"))
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32", engines=tuple(engines))
    with without_verification():
        bundle, _ = export_bundle(converted, tmp_path / "bundle", config)
    update = local_round(bundle, tmp_path, "a", shift=4.0)
    moved = aggregate([update], read_weights(bundle.file(WEIGHTS))).weights
    engine = open_engine(bundle, "onnxruntime")
    engine.load(moved.tensors)
    (x, y), *_ = batches(1)
    fold(bundle, moved, tmp_path / "model.onnx")
    outputs = InferenceSession(tmp_path / "model.onnx").run(None, {"x": x})[0]
    assert relative_error(outputs, engine.evaluate(x, y).outputs["logits"]) < 1e-5


@pytest.mark.slow
def test_verification_knows_the_modes(tmp_path: Path) -> None:
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32")
    for choice in ("train", "local"):
        converted, _ = convert(net(), Factorization(kind="dense", batchnorm=choice))
        _, verification = export_bundle(converted, tmp_path / choice, config)
        assert verification.keys() == set(ENGINES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "found"), [("momentum", "statistic '[148].running_"), ("eps", "loss|outputs|gradient")]
)
def test_verification_notices_a_wrong_batchnorm(
    broken: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Reference._run

    def wrong(self: Reference, model: Deployed, *arguments: Any) -> Results:
        norms = [module for module in model.modules() if isinstance(module, batchnorm.RunningNorm)]
        before = [getattr(norm, broken) for norm in norms]
        for norm, value in zip(norms, before, strict=True):
            setattr(norm, broken, value * 1.1)
        try:
            return run(self, model, *arguments)
        finally:
            for norm, value in zip(norms, before, strict=True):
                setattr(norm, broken, value)

    monkeypatch.setattr(Reference, "_run", wrong)
    converted, _ = convert(net(), Factorization(kind="dense", batchnorm="train"))
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32", engines=("onnxruntime",))
    with pytest.raises(FedparaError, match=rf"onnxruntime: ({found})"):
        export_bundle(converted, tmp_path / "bundle", config)


def test_a_release_that_knows_no_statistics_refuses_the_bundle_by_name(
    bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles("train")
    monkeypatch.setattr("fedpara_edge.factors.layout.PARTS", ("weight", "bias", "norm", "other"))
    with pytest.raises(WrongBundleError, match=r"tensor '1.running_mean': .*found 'shared' and 'mean'"):
        open_bundle(bundle.path)


def test_a_bundle_without_statistics_knows_nothing_of_them(small_bundle: SmallBundle) -> None:
    bundle = small_bundle()
    parts = {tensor["part"] for tensor in json.loads(bundle.file(MANIFEST).read_text())["layout"]["tensors"]}
    assert not parts & {"mean", "variance"}
    assert "statistics" not in open_engine(bundle, "onnxruntime").state()


def test_a_batchnorm_without_a_momentum_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None))
    with pytest.raises(InputError, match=r"module '1': expected a momentum of the running statistics, found None"):
        convert(model, Factorization(batchnorm="train"))


def test_a_batchnorm_in_two_places_is_refused(tmp_path: Path) -> None:
    model = net()
    model.add_module("again", nn.Sequential(nn.Linear(CLASSES, 7), model[8], nn.Linear(7, CLASSES)))
    converted, _ = convert(model, Factorization(kind="dense", batchnorm="train"))
    config = ExportConfig(name="test", input_shape=SHAPE, input_dtype="float32")
    with pytest.raises(InputError, match=r"module 'again.1': expected a BatchNorm that is called in one place"):
        export_bundle(copy.deepcopy(converted), tmp_path / "bundle", config)
