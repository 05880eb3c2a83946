"""Local training: from a bundle, weights and local data to an update, and personal tensors that stay.

A call is deterministic: bundle, weights, data, config, engine, codec, client name, the content of the state folder
and, for scaffold, the server's control variate determine every tensor of the update, however often the call was
interrupted and resumed (`device_runtime.state`).

Error feedback: what a lossy codec leaves out of an update is kept in the state folder and added to the next change, so
that in the long run nothing is lost (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). Without a state folder,
codecs that can (`Encoder.unbiased`) encode without bias, right in expectation; what the others leave out is lost. So
they do for a model of kind `update`, whose factors have other directions the next time.

With noise on the change (`device_runtime.noising`), error feedback and algorithms go on from the noisy one.

What an algorithm keeps for the next round (`fedpara_edge.algorithms.client`) is a group in the state folder as well,
and refers to the change as readers of the update decode it.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.call import begin, identity_of, resume, run, save
from device_runtime.config import TrainConfig
from device_runtime.data import Dataset
from device_runtime.engines.protocol import Engine
from device_runtime.epochs import count_steps, sum_learning_rates, take_steps
from device_runtime.interrupts import holding_interrupts
from device_runtime.loading import PERSONAL, RESIDUAL, load_personal, load_weights, read_control, read_groups
from device_runtime.progress import OnStep
from device_runtime.result import TrainResult
from device_runtime.state import DeviceState, open_state
from device_runtime.statefiles import Committed, Groups, Progress
from fedpara_edge.algorithms import ClientAlgorithm
from fedpara_edge.algorithms.client import Start
from fedpara_edge.codecs import FLOAT32
from fedpara_edge.codecs.codec import Encoder
from fedpara_edge.codecs.statistics import left_out
from fedpara_edge.errors import DivergedError, InputError, InvalidUpdateError
from fedpara_edge.formats.bundle import Bundle
from fedpara_edge.formats.serverstate import Group
from fedpara_edge.formats.update import UpdateHeader, encode_update
from fedpara_edge.formats.weights import Weights
from fedpara_edge.privacy.budget import Budget
from fedpara_edge.privacy.local import LocalGaussian
from fedpara_edge.storage.atomic import Ready

if TYPE_CHECKING:
    from device_runtime.noising import Noising


def train(
    engine: Engine,
    dataset: Dataset,
    weights: Path | str,
    config: TrainConfig,
    *,
    output: Path | str,
    encoder: Encoder = FLOAT32,
    privacy: LocalGaussian | None = None,
    budget: Budget | None = None,
    state: Path | str | None = None,
    client: str | None = None,
    server_state: Path | str | None = None,
    seal: Ready | None = None,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train on local data and write the update; with a state folder, resumable and with personal tensors.

    On the first SIGINT or SIGTERM the step under way ends, the progress is saved and KeyboardInterrupt raised; when no
    step is left, the update is written all the same. The same call again goes on where that one stopped.

    Args:
        engine: New engine, which holds initial personal tensors and a fresh optimizer, of the bundle to train.
        dataset: Local examples, opened for that bundle.
        weights: Weights file to start from.
        config: Training configuration.
        output: Update file to write.
        encoder: Codec of the change (`fedpara_edge.codecs.find_encoder`).
        privacy: Noise on the change and its budget (`fedpara_edge.privacy.local`); None for none.
        budget: Budget that the update is paid from; None for the ledger in the state folder.
        state: State folder of the device; needed if the bundle has personal tensors, the algorithm keeps something, or
            there is noise.
        client: Name in the update; None for the one in the state folder, or a random one without it.
        server_state: Server state of the weights' round, where scaffold has its control variate; needed for it after
            round 0.
        seal: Function that signs the complete update, under a temporary name, before it appears as `output`.
        overwrite: Whether `output` may exist.
        on_step: Function called after each step with (steps taken, steps in all, mean loss of the batch).

    Raises:
        InputError: An argument does not fit, or the algorithm does not work with the bundle's optimizer.
        OutputExistsError: `output` exists.
        BusyError: Another process uses the state folder.
        WrongBundleError: The weights, the state folder or the server state belong to another bundle or round.
        DivergedError: The training diverged.
        BudgetError: The update would take more than what is left of the privacy budget.
        FedparaError: The disk refuses a write.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    weights, output = Path(weights), Path(output)
    state, server_state = (None if path is None else Path(path) for path in (state, server_state))
    bundle, algorithm = engine.bundle, config.client_algorithm
    _check_state_folder(bundle, algorithm, state)
    steps = count_steps(dataset, config)
    origin = load_weights(engine, weights)
    origin.refuse_keeping(algorithm.name, [] if algorithm.group is None else [algorithm.group])
    control = read_control(server_state, origin, algorithm)
    identity = identity_of(origin, dataset, engine, encoder, config, privacy, server_state)
    folder = nullcontext() if state is None else open_state(state, origin.fingerprint)
    with folder as kept, holding_interrupts() as interrupted:
        header = _header(origin, _name(client, kept), examples=dataset.examples, steps=steps)
        inputs = (weights, dataset.path, server_state)
        noising = None if privacy is None else _noising(privacy, budget, kept, origin, algorithm)
        begun = begin(kept, identity, steps=steps, output=output, inputs=inputs, overwrite=overwrite)
        before = {} if kept is None else read_groups(kept, identity, bundle)
        personal = load_personal(engine, before)
        begun = resume(engine, begun, kept, steps=steps, epochs=config.epochs)
        start = _start(origin, before, control, config, steps=steps)
        shared = frozenset(start.weights) if personal else None
        adjustment = config.adjustment(algorithm.term(start), shared=shared)
        taken = take_steps(
            engine,
            dataset,
            config,
            first=begun.step,
            round=origin.round,
            adjustment=adjustment,
            origin={**origin.tensors, **personal},
        )
        keep = partial(save, kept, engine)
        end = run(taken, begun, config, steps=steps, save=keep, interrupted=interrupted, on_step=on_step)
        trained = _read_finite(engine)
        keep(end)
        losses = _mean_losses(end, dataset, config)
        header = replace(header, metrics={**_in_six_digits(losses), **algorithm.metrics(start)})
        change = _change(trained, origin, before.get(RESIDUAL, {}))
        if noising is not None:
            header, change = noising.header(header, algorithm.metrics(start)), noising.add(change)
        is_fed_back = kept is not None and not origin.layout.held
        seed = None if is_fed_back else _rounding_seed(config, header)
        update = encode_update(header, bundle.manifest.layout, change, encoder=encoder, seed=seed)
        update = replace(update, seal=seal)
        if kept is None:
            update.write(output)
        else:
            left = left_out(bundle.manifest.layout.shared, change, update.change)
            after = _after(before, personal, trained, left, update.change, algorithm, start)
            kept.commit(Committed(call=identity, before={**before, PERSONAL: personal}, after=after), update, output)
            kept.remove_progress()
    return TrainResult(
        client=header.client,
        round=origin.round,
        examples=dataset.examples,
        steps=steps,
        resumed_from_step=begun.step,
        seconds=end.seconds,
        losses=losses,
        update_bytes=output.stat().st_size,
        spent=None if noising is None else noising.spent,
    )


def _check_state_folder(bundle: Bundle, algorithm: ClientAlgorithm, state: Path | None) -> None:
    try:
        algorithm.check_optimizer(bundle.manifest.optimizer)
    except InputError as error:
        raise InputError(f"{bundle.path}: {error}") from error
    personal = bundle.manifest.layout.with_role("personal")
    if personal and state is None:
        raise InputError(
            f"{bundle.path}: expected a folder for its personal tensors ({len(personal)}), found none; pass --state"
        )
    if algorithm.group is not None and state is None:
        raise InputError(
            f"algorithm {algorithm.name}: expected a folder for what the device keeps, found none; pass --state"
        )


def _noising(
    privacy: LocalGaussian,
    budget: Budget | None,
    kept: DeviceState | None,
    origin: Weights,
    algorithm: ClientAlgorithm,
) -> Noising:
    from device_runtime.noising import open_noising

    return open_noising(privacy, budget, kept, origin, algorithm)


def _start(origin: Weights, before: Groups, control: Group, config: TrainConfig, *, steps: int) -> Start:
    trained = {tensor.name for tensor in origin.layout.trained}
    return Start(
        weights={name: tensor for name, tensor in origin.tensors.items() if name in trained},
        kept=before.get(config.client_algorithm.group or "", {}),
        control=control,
        rate_sum=sum_learning_rates(config, steps=steps, round=origin.round),
    )


def _after(
    before: Groups,
    personal: Mapping[str, NDArray[Any]],
    trained: Mapping[str, NDArray[np.float32]],
    left: Mapping[str, NDArray[np.float32]],
    sent: Mapping[str, NDArray[np.float32]],
    algorithm: ClientAlgorithm,
    start: Start,
) -> dict[str, Mapping[str, NDArray[Any]]]:
    """Groups that the device keeps after a call.

    Those of other algorithms stay, as their servers still count on them.
    """
    after = {**before, PERSONAL: {name: trained[name] for name in personal}}
    after[RESIDUAL] = left
    if not any(tensor.any() for tensor in left.values()):
        del after[RESIDUAL]
    if algorithm.group is not None:
        after[algorithm.group] = algorithm.keep(start, {name: sent[name] for name in start.weights})
    return after


def _name(client: str | None, kept: DeviceState | None) -> str:
    if client is not None:
        return client
    return secrets.token_hex(8) if kept is None else kept.client()


def _header(origin: Weights, client: str, *, examples: int, steps: int) -> UpdateHeader:
    try:
        return UpdateHeader(
            fingerprint=origin.fingerprint,
            round=origin.round,
            base=origin.base,
            client=client,
            examples=examples,
            steps=steps,
            metrics={},
        )
    except InvalidUpdateError as error:
        raise InputError(f"{error}; choose another") from error


def _change(
    trained: Mapping[str, NDArray[np.float32]], origin: Weights, residual: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    change = {name: trained[name] - origin.tensors[name] for name in origin.tensors if name in trained}
    for name, left_over in residual.items():
        change[name] += left_over
    return change


def _rounding_seed(config: TrainConfig, header: UpdateHeader) -> int:
    # A different seed for every client, so that their errors average out.
    client = zlib.crc32(header.client.encode())
    return int(np.random.SeedSequence([config.seed, header.round, client], spawn_key=(2,)).generate_state(1)[0])


def _in_six_digits(losses: Sequence[float]) -> dict[str, float]:
    """Mean losses of the last epoch and, if there are several, of the first, in as many digits as anybody reads."""
    ends = {"loss": losses[-1], "first_epoch_loss": losses[0]} if len(losses) > 1 else {"loss": losses[0]}
    return {name: float(f"{loss:.6g}") for name, loss in ends.items()}


def _mean_losses(end: Progress, dataset: Dataset, config: TrainConfig) -> tuple[float, ...]:
    seen = dataset.examples - (dataset.examples % config.batch_size if config.drop_last else 0)
    return tuple(total / seen for total in end.loss_sums)


def _read_finite(engine: Engine) -> dict[str, NDArray[np.float32]]:
    trained = engine.read()
    for name, tensor in trained.items():
        if not np.isfinite(tensor).all():
            raise DivergedError(
                f"tensor {name!r}: expected finite values after the last step, found NaN or Inf: the training "
                "diverged; lower the learning rate"
            )
    return trained
