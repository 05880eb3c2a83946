"""`LSTM` and `GRU` with factored input and recurrent weights, in place of torch's.

Both take torch's arguments and, by keyword, the parameterization of the weights. Where torch has a parameter
`weight_ih_l0` [G H, I], there is a module of that name with the factors of that weight, as for a linear layer:
`weight_ih_l0.x1`, and so on; G is 4 for an LSTM and 3 for a GRU. Biases are parameters as in torch. The forward pass
composes all weights and calls torch's own operator once, so that ONNX has one LSTM or GRU for every layer.

Composed weights start with the variance 1 / (3 H) of torch's, which draws from U(-1/√H, 1/√H), unless another `init` is
requested, and so do the biases.
Source: FedPara (arXiv 2108.06098v3), Proposition 1, and section 3 for the LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fedpara_edge.errors import InputError
from fedpara_edge.factors.choice import choose_layer
from fedpara_edge.factors.factorization import Init
from fedpara_edge.factors.layout import Kind
from fedpara_edge.factors.rank import UpdateOptions, layer_spec
from fedpara_edge.nn.layers import FactoredWeight


class FactoredRecurrent(nn.Module):
    """Base of `LSTM` and `GRU`: weights and biases, under torch's names."""

    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kind: Kind = "fedpara",
        gamma: float = 0.0,
        rank: int | Mapping[str, int] | None = None,
        tanh: bool = False,
        update: UpdateOptions = UpdateOptions(),
        init: Init = "composed",
        name: str = "",
    ) -> None:
        super().__init__()
        what = f"layer {name!r}" if name else type(self).__name__
        if min(input_size, hidden_size, num_layers) < 1 or not 0 <= dropout <= 1:
            raise InputError(
                f"{what}: expected sizes and layers of at least 1 and a dropout from 0 to 1, found input size "
                f"{input_size}, hidden size {hidden_size}, {num_layers} layers and dropout {dropout}"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        for weight, shape in self._weight_shapes().items():
            full_name = f"{name}.{weight}" if name else weight
            if rank is None:
                spec = choose_layer(
                    full_name,
                    shape,
                    kind=kind,
                    gamma=gamma,
                    tanh=tanh,
                    update=update,
                ).spec
            else:
                own = self._rank_of(weight, rank, what)
                spec = layer_spec(
                    shape,
                    name=full_name,
                    kind=kind if own else "dense",
                    form="matrix",
                    rank=own,
                    tanh=tanh and own > 0,
                    update=update,
                )
            std = 1 / math.sqrt(3 * hidden_size)
            made = FactoredWeight(spec, initial_std=std, device=device, dtype=dtype, init=init)
            self.add_module(weight, made)
        for bias_name in self._bias_names():
            empty = torch.empty(self.gates * hidden_size, device=device, dtype=dtype)
            self.register_parameter(bias_name, nn.Parameter(empty))
        self._reset_biases()

    def weights(self) -> dict[str, FactoredWeight]:
        """Modules of all weights by name, in torch's order."""
        return {name: module for name, module in self.named_children() if isinstance(module, FactoredWeight)}

    def reset_parameters(self) -> None:
        """Redraw all factors and biases."""
        for weight in self.weights().values():
            weight.reset_parameters()
        self._reset_biases()

    def flatten_parameters(self) -> None:
        """Do nothing: there is nothing to lay out in one block of memory, as every pass composes the weights."""

    def extra_repr(self) -> str:
        options = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        given = [f"{name}={getattr(self, name)}" for name, value in options.items() if getattr(self, name) != value]
        return ", ".join([str(self.input_size), str(self.hidden_size), *given])

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of every weight by name, in torch's order."""
        rows, directions = self.gates * self.hidden_size, 1 + self.bidirectional
        shapes = {}
        for place in self._places():
            inputs = self.input_size if place.startswith("l0") else self.hidden_size * directions
            shapes[f"weight_ih_{place}"] = rows, inputs
            shapes[f"weight_hh_{place}"] = rows, self.hidden_size
        return shapes

    def _rank_of(self, weight: str, rank: int | Mapping[str, int], what: str) -> int:
        if isinstance(rank, int):
            return rank
        expected = self._weight_shapes().keys()
        if rank.keys() != expected:
            found = ", ".join(rank) or "none"
            raise InputError(f"{what}: expected a rank for each of {', '.join(expected)}, found one for {found}")
        return rank[weight]

    def _bias_names(self) -> list[str]:
        return [f"bias_{source}_{place}" for place in self._places() for source in ("ih", "hh")] if self.bias else []

    def _places(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _reset_biases(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._bias_names():
            nn.init.uniform_(self.get_parameter(name), -bound, bound)

    def _flat_weights(self) -> list[Tensor]:
        """Composed weights and biases, in the order in which torch's operators take them."""
        weights = self.weights()
        flat: list[Tensor] = []
        for place in self._places():
            flat += [weights[f"weight_{source}_{place}"]() for source in ("ih", "hh")]
            flat += [self.get_parameter(f"bias_{source}_{place}") for source in ("ih", "hh") if self.bias]
        return flat

    def _settings(self) -> tuple[bool, int, float, bool, bool, bool]:
        """Arguments that torch's operators take after the weights."""
        return self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first

    def _batched(self, x: Tensor) -> Tensor:
        if isinstance(x, PackedSequence):
            raise InputError(
                f"{type(self).__name__}: expected a tensor of sequences of one length, found a PackedSequence; pad them"
            )
        return x if x.dim() == 3 else x.unsqueeze(self._batch_axis)

    @property
    def _batch_axis(self) -> int:
        return 0 if self.batch_first else 1

    def _state(self, steps: Tensor, given: Tensor | None) -> Tensor:
        """State before the first step, [layers · directions, B, H]."""
        if given is not None:
            return given if given.dim() == 3 else given.unsqueeze(1)
        count = self.num_layers * (1 + self.bidirectional)
        return torch.zeros(
            count, steps.shape[self._batch_axis], self.hidden_size, dtype=steps.dtype, device=steps.device
        )


class LSTM(FactoredRecurrent):
    """`torch.nn.LSTM` with every weight composed of factors; torch's formulas and order of gates.

    Args:
        input_size: Number I of input features.
        hidden_size: Number H of features of the state.
        num_layers: Number of layers, one on top of the other.
        bias: Whether the layer has biases.
        batch_first: Whether x is [B, T, I].
        dropout: Probability of dropout on the outputs of every layer but the last, in training.
        bidirectional: Whether every layer also reads from the last step to the first.
        proj_size: Size of the projected state, which must be 0; projection is not supported.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        kind: `fedpara`, `pfedpara`, `lowrank`, `dense` or `update`.
        gamma: Parameter γ of the rank schedule; a weight that factors would not make smaller is dense.
        rank: Inner rank R of all weights, or of each by its name with 0 for a dense one, instead of the schedule's.
        tanh: Whether W = tanh(W1) ⊙ tanh(W2), for `fedpara` only.
        update: Options of the kind `update`.
        init: Initialization of the factors (`fedpara_edge.nn.init`).
        name: Name of the layer in its specs and in errors.

    Shapes: x float [T, B, I], or [T, I] for one sequence; the states before the first step and after the last,
    (h, c) of [layers · directions, B, H] each, zeros if not given; outputs [T, B, directions · H].

    Raises:
        InputError: A size is not positive, a rank does not fit or is missing, `proj_size` is not 0, or `tanh` is
            requested for a kind other than `fedpara`.

    >>> layer = LSTM(64, 256, num_layers=2, batch_first=True)
    >>> {name: (m.spec.shape, m.spec.rank) for name, m in layer.named_children()}  # doctest: +NORMALIZE_WHITESPACE
    {'weight_ih_l0': ((1024, 64), 8), 'weight_hh_l0': ((1024, 256), 16),
     'weight_ih_l1': ((1024, 256), 16), 'weight_hh_l1': ((1024, 256), 16)}
    >>> outputs, (h, c) = layer(torch.zeros(3, 80, 64))
    >>> tuple(outputs.shape), tuple(h.shape)
    ((3, 80, 256), (2, 3, 256))
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kind: Kind = "fedpara",
        gamma: float = 0.0,
        rank: int | Mapping[str, int] | None = None,
        tanh: bool = False,
        update: UpdateOptions = UpdateOptions(),
        init: Init = "composed",
        name: str = "",
    ) -> None:
        if proj_size != 0:
            what = f"layer {name!r}" if name else "LSTM"
            raise InputError(f"{what}: expected proj_size=0, found {proj_size}; keep this layer dense (exclude it)")
        settings: Any = {
            "kind": kind,
            "gamma": gamma,
            "rank": rank,
            "tanh": tanh,
            "update": update,
            "init": init,
            "name": name,
        }
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, **settings
        )

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        steps = self._batched(x)
        first = [self._state(steps, given) for given in hx or (None, None)]
        outputs, h, c = torch.lstm(steps, first, self._flat_weights(), *self._settings())
        if x.dim() == 3:
            return outputs, (h, c)
        return outputs.squeeze(self._batch_axis), (h.squeeze(1), c.squeeze(1))


class GRU(FactoredRecurrent):
    """`torch.nn.GRU` with every weight composed of factors; torch's formulas and order of gates.

    Args and errors are those of `LSTM`, without `proj_size`; the state is h alone.

    >>> outputs, h = GRU(20, 64, kind="lowrank", rank=4)(torch.zeros(7, 3, 20))
    >>> tuple(outputs.shape), tuple(h.shape)
    ((7, 3, 64), (1, 3, 64))
    """

    gates = 3

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = self._batched(x)
        outputs, h = torch.gru(steps, self._state(steps, hx), self._flat_weights(), *self._settings())
        return (outputs, h) if x.dim() == 3 else (outputs.squeeze(self._batch_axis), h.squeeze(1))
