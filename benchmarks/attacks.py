"""Attacks against rules: accuracy of a federation in which some clients are hostile, for every rule and attack.

    make attacks                                         # writes benchmarks/attacks.md, from where it stopped
    python benchmarks/attacks.py --rules "mean;median" --rounds 2 --output attacks.md
    make attacks ATTACKS="--seeds 0,1,2"                 # means and standard deviations over three seeds

20 clients share the 10,000 Fashion-MNIST images of the demo, at 14x14 pixels, dealt by Dirichlet(0.5). Each round the
honest ones train a FedPara network of one hidden layer for an epoch with the device runtime, the hostile ones write
what their attack makes of that (`adversaries`), and `run_round` aggregates the files, with its screening, its bounds
and, in the last column, its signatures. A round that can't be aggregated leaves the weights as they are. The accuracy
is that of the weights after the last round on 2,000 other images. Everything random comes from the seed. Rules have
changes of up to two medians before them, so that it is they who are measured more than `--max-norm`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from adversaries import ATTACKS, Attack, Change, Scene
from attack_report import draw, report
from numpy.typing import NDArray
from parts import keep_options, machine, measure_parts

from device_runtime import Dataset, Engine, TrainConfig, evaluate, open_data, open_engine, train
from export import make_bundle
from fedpara_edge.aggregation import AggregateConfig, run_round
from fedpara_edge.aggregation.bounds import NAMES
from fedpara_edge.codecs import FLOAT32
from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import DivergedError, TooFewUpdatesError
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.formats.update import UpdateHeader, write_update
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.simulation.data.partition import dirichlet
from fedpara_edge.trust.clients import Clients, read_clients
from fedpara_edge.trust.envelope import write_envelope
from fedpara_edge.trust.keys import new_key, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.signatures import SignatureGate

HERE = Path(__file__).parent
CLIENTS, ALPHA, ROUNDS = 20, 0.5, 6
TRAINING = TrainConfig(epochs=1, batch_size=32, lr=0.2)
SHARES = (0.1, 0.2, 0.3)
"""Shares of the clients that are hostile."""
SIGNED = "impersonate, signed"
COLUMNS = (*ATTACKS, SIGNED)
RUN = "attacks"


MIXINGS = {"nnm": "nnm:share=0.3", "bucketing": "bucketing:size=2"}
LOOSE = {"max_norm": 2.0}
"""A bound that leaves the rules something to do."""


def _robust(name: str, *mixings: str, options: str = "") -> dict[str, dict[str, Any]]:
    """A rule as it is and behind mixings."""
    rule = {"rule": name + options, **LOOSE}
    return {name: rule, **{f"{mixing} + {name}": {**rule, "mixing": MIXINGS[mixing]} for mixing in mixings}}


RULES: Mapping[str, Mapping[str, Any]] = {
    "mean, unbounded": {"unbounded": NAMES},
    "mean, max-norm 2": LOOSE,
    "mean": {},
    **_robust("norm-bounded"),
    **_robust("centered-clipping", "nnm"),
    **_robust("geometric-median", "nnm"),
    **_robust("krum", "nnm", options=":share=0.3"),
    **_robust("multi-krum", "nnm", options=":share=0.3"),
    "multi-krum, composed": {"rule": "multi-krum:share=0.3", "space": "composed", **LOOSE},
    **_robust("median", "nnm", "bucketing"),
    **_robust("trimmed", "nnm", options=":share=0.3"),
}
"""Options of `AggregateConfig` for each row. Rules that take a share are told 0.3, whatever the share is."""


class Federation:
    """The clients, their data and an engine, in a folder.

    Args:
        folder: Folder for everything.
        rounds: Number of rounds.
        seed: Seed of the split, of the weights, of the order of the examples and of who is hostile.
    """

    def __init__(self, folder: Path, *, rounds: int = ROUNDS, seed: int = 0) -> None:
        self.folder, self.rounds, self.seed = folder, rounds, seed
        recipe = Recipe(name="mlp", gamma=0.1, input_shape=(1, 14, 14), mean=(0.286,), std=(0.353,), seed=seed)
        bundle = make_bundle(replace(recipe, engines=("onnxruntime",)), folder / "bundle").bundle
        self.start = bundle.file("weights.safetensors")
        self.engine: Engine = open_engine(bundle, "onnxruntime", threads=1)
        self.initial = self.engine.state()
        images = np.load(IMAGES)
        rows = dirichlet(images["y_train"], clients=CLIENTS, alpha=ALPHA, seed=seed, min_examples=64)
        x, y = _halved(images["x_train"]), images["y_train"]
        self.data = [self._dataset(x[own], y[own]) for own in rows]
        self.flipped = [self._dataset(x[own], 9 - y[own]) for own in rows]
        self.test = self._dataset(_halved(images["x_test"]), images["y_test"])
        self.order = np.random.default_rng([seed, 1]).permutation(CLIENTS)
        self.trained: dict[tuple[str, int, bool], tuple[Path, Change] | None] = {}
        (folder / "trained").mkdir()

    def hostile(self, share: float) -> list[int]:
        """Numbers of the hostile clients; those of a smaller share are among them."""
        return sorted(self.order[: round(share * CLIENTS)].tolist())

    def train(self, client: int, weights: Path, base: Weights, *, flipped: bool = False) -> tuple[Path, Change] | None:
        """The update of a client that trains, in a file, and its change; None if the training diverged.

        Runs that have the same weights share it.
        """
        key = (base.base, client, flipped)
        if key not in self.trained:
            self.engine.restore(self.initial)
            config = replace(TRAINING, seed=1000 * self.seed + client)
            path = self.folder / "trained" / f"{base.base[:16]}-{client:02}{'-flipped' * flipped}.update"
            data = (self.flipped if flipped else self.data)[client]
            try:
                train(self.engine, data, weights, config, output=path, client=name_of(client))
            except DivergedError:
                self.trained[key] = None
            else:
                found = self.engine.read()
                change = {name: found[name] - tensor for name, tensor in base.tensors.items()}
                self.trained[key] = path, change
        return self.trained[key]

    def forget(self) -> None:
        """Remove what was trained, but from the first weights."""
        first = read_weights(self.start).base
        for key, found in [*self.trained.items()]:
            if key[0] != first:
                del self.trained[key]
                if found is not None:
                    found[0].unlink()

    @cached_property
    def keys(self) -> Clients:
        """The list of clients with their keys, which lie in the folder."""
        lines = [f'run = "{RUN}"']
        for number in range(CLIENTS):
            lines += [f"[clients.{name_of(number)}]", f'key = "{new_key(self.folder / name_of(number))}"']
        path = self.folder / "clients.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return read_clients(path)

    def _dataset(self, x: NDArray[Any], y: NDArray[Any]) -> Dataset:
        path = self.folder / "data.npz"
        np.savez(path, x=x, y=y)
        return open_data(path, self.engine.bundle.manifest)


def name_of(client: int) -> str:
    """Name of a client."""
    return f"client-{client:02}"


def _halved(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2x2 pixels."""
    count, _, height, width = images.shape
    pairs = images.reshape(count, 1, height // 2, 2, width // 2, 2)
    return pairs.mean(axis=(3, 5)).round().astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A federation under an attack with a rule.

    Args:
        federation: The federation.
        folder: Folder for the updates and weights of the rounds.
        attack: Attack of the hostile clients; None if all are honest.
        hostile: Numbers of these.
        config: Options of the aggregation.
        signed: Whether updates are signed, and signed ones count alone.
    """

    federation: Federation
    folder: Path
    attack: Attack | None
    hostile: Sequence[int]
    config: AggregateConfig
    signed: bool

    def accuracy(self) -> float:
        """Accuracy after the last round; 0 if the weights give no finite loss."""
        path = self.federation.start
        for number in range(self.federation.rounds):
            path = self._round(number, path)
        try:
            found = evaluate(self.federation.engine, self.federation.test, weights=path).accuracy
        except DivergedError:
            return 0.0
        assert found is not None
        return found

    def _round(self, number: int, weights: Path) -> Path:
        """Path of the next weights, or of the same if nothing comes of the round."""
        base, output = read_weights(weights), self.folder / f"weights-{number}.safetensors"
        files = self._send(number, weights, base)
        opened = open_ledger(self.folder / "ledger", RUN) if self.signed else nullcontext()
        try:
            with opened as ledger:
                gate = SignatureGate(self.federation.keys, ledger) if ledger is not None else None
                run_round(files, weights, output, self.config, gate=gate)
        except (DivergedError, TooFewUpdatesError):
            return weights
        return output

    def _send(self, number: int, weights: Path, base: Weights) -> list[Path]:
        """The update files of a round."""
        federation, attack, files, honest = self.federation, self.attack, list[Path](), dict[int, Change]()
        for client in range(CLIENTS):
            if client not in self.hostile and (found := federation.train(client, weights, base)) is not None:
                path, honest[client] = found
                files.append(self._signed(path, client))
        for client in self.hostile if honest else ():
            assert attack is not None
            own: Change = {}
            if attack.own:
                found = federation.train(client, weights, base, flipped=attack.flips_labels)
                if found is None:
                    continue
                own = found[1]
            random = np.random.default_rng([federation.seed, 2, number, client])
            change = attack.craft(Scene(honest=[*honest.values()], own=own, weights=base, random=random))
            files.append(self._write(client, client, change, base))
            if attack.impersonates:
                files += [self._write(other, client, change, base) for other in honest]
        return files

    def _write(self, name: int, by: int, change: Change, base: Weights) -> Path:
        """Write what a hostile client sends under its own name or another."""
        header = UpdateHeader(
            fingerprint=base.fingerprint,
            round=base.round,
            base=base.base,
            client=name_of(name),
            examples=self.federation.data[name].examples,
            steps=10,
            metrics={"loss": 1.0},
        )
        path = self.folder / f"{name_of(name)}-by-{by:02}.update"
        write_update(path, header, base.layout, change, encoder=FLOAT32)
        return self._signed(path, by)

    def _signed(self, path: Path, by: int) -> Path:
        """The file, beside which a client's signature is if it has to."""
        if self.signed:
            assert self.federation.keys
            write_envelope(path, path, read_signer(self.federation.folder / name_of(by)), RUN)
        return path


def measure(federation: Callable[[], Federation], rule: str, share: float) -> dict[str, float]:
    """Accuracy by attack, or under `none` for a share of 0."""
    found, options = federation(), RULES[rule]
    found.forget()
    accuracies = {}
    for column in COLUMNS if share else ("none",):
        folder = Path(tempfile.mkdtemp(dir=found.folder))
        run = Run(
            federation=found,
            folder=folder,
            attack=ATTACKS["impersonate" if column == SIGNED else column] if share else None,
            hostile=found.hostile(share),
            config=AggregateConfig(**options),
            signed=column == SIGNED,
        )
        accuracies[column] = run.accuracy()
        shutil.rmtree(folder)
    return accuracies


def _federation(folder: Path, rounds: int, seed: int) -> Federation:
    own = folder / f"seed-{seed}"
    own.mkdir()
    return Federation(own, rounds=rounds, seed=seed)


@click.command()
@click.option("--rules", default=";".join(RULES), help="Rules, separated by semicolons.  [default: all]")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option(
    "--seeds", default="0", show_default=True, help="Seeds, separated by commas; one is done after the other."
)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder in which to make the temporary folder.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "attacks.md", help="Tables to write.")
@click.option("--figure", type=click.Path(path_type=Path), help="Figure to write.")
@keep_options
def main(
    rules: str,
    rounds: int,
    seeds: str,
    folder: Path | None,
    output: Path,
    figure: Path | None,
    kept: Path | None,
    again: bool,
) -> None:
    """Measure every rule under every attack; write the tables whenever a part is done, and the figure at the end."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        federations = {
            seed: cache(partial(_federation, Path(name), rounds, seed)) for seed in map(int, seeds.split(","))
        }
        parts = {
            f"{rule}, {share:.0%}, seed {seed}": partial(measure, federation, rule, share)
            for seed, federation in federations.items()
            for rule in rules.split(";")
            for share in (0.0, *SHARES)
        }

        def written(results: Mapping[str, Any]) -> str:
            text = report(results)
            several = f"seeds {seeds}, mean ± standard deviation" if len(federations) > 1 else f"seed {seeds}"
            about = f"{CLIENTS} clients, {rounds} rounds, {several}; rules but the mean behind `--max-norm 2`"
            output.write_text(f"# Results of `make attacks`\n\n{machine()}\n\n{about}\n\n{text}\n", encoding="utf-8")
            return text

        settings = {"rounds": rounds, "alpha": ALPHA, "training": asdict(TRAINING)}
        kept = kept or HERE / ".kept" / "attacks.json"
        results = measure_parts(parts, written, settings=settings, kept=kept, again=again)
    written(results)
    if figure is not None:
        draw(results, figure)


if __name__ == "__main__":
    main()
