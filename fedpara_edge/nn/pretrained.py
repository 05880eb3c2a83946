"""Pretrained weights of a dense model, loaded before its conversion."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fedpara_edge.errors import InputError, counted
from fedpara_edge.factors.roles import is_named
from fedpara_edge.nn.names import Prefixes, match_names

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
"""Keys of a checkpoint under which its state dict may be, the first ones preferred."""
_COUNTER = "num_batches_tracked"  # of BatchNorm, which older files lack and nothing here uses


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What became of the tensors of a file and of a model.

    Args:
        loaded: Names of the model's tensors that come from the file.
        new: Names of the model's tensors that keep their initialization, as they were asked to.
        unused: Names of the tensors in the file that the model has no place for.
        prefixes: Prefixes that were left out to match the names.
    """

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    prefixes: Prefixes

    def __str__(self) -> str:
        lines = [f"pretrained: {counted(len(self.loaded), 'tensor')} loaded"]
        if self.prefixes.file:
            lines[0] += f", without the prefix {self.prefixes.file!r} of the file's names"
        if self.prefixes.model:
            lines[0] += f", under the prefix {self.prefixes.model!r} of the model's names"
        for names, what in ((self.new, "new, as initialized"), (self.unused, "in the file but not in use")):
            if names:
                lines.append(f"pretrained: {what}: {', '.join(names)}")
        return "\n".join(lines)


def load_pretrained(model: nn.Module, path: Path, *, new_head: Sequence[str] = ()) -> Pretrained:
    """Load pretrained weights into a model, in place, in the dtypes of the model.

    Names may have the prefixes that wrappers add, on either side (`fedpara_edge.nn.names`).

    Args:
        model: Dense model, before its conversion.
        path: State dict, or checkpoint that contains one, in the format `.safetensors` or of `torch.save`. Only tensors
            are read, never code.
        new_head: Patterns of tensors, or of modules that hold them, that keep their initialization.

    Raises:
        InputError: The file is missing or damaged; a tensor of the model is not in it, has another shape there, or is
            not finite; or a pattern matches none.
    """
    state = _read(path)
    wanted = model.state_dict()
    for pattern in new_head:
        if not any(is_named(name, pattern) for name in wanted):
            raise InputError(
                f"expected patterns of tensors or modules of the model, found {pattern!r}, which matches none",
                key="new_head",
            )
    new = [name for name in wanted if any(is_named(name, pattern) for pattern in new_head)]
    sources, prefixes = match_names(state, wanted)
    tied = _ties(model)
    loaded = {name: state[sources[name]] for name in wanted if name in sources and name not in new}
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in new
        and (loaded[name].shape != tensor.shape if name in loaded else not _is_optional(name, loaded, tied))
    ]
    if missing:
        raise _misfit(path, missing, wanted, loaded, state)
    for name, tensor in loaded.items():
        found = "NaN or Inf"
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            found = f"{tensor.dtype}".removeprefix("torch.")
        elif bool(torch.isfinite(tensor).all()):
            continue
        raise InputError(
            f"{path}: tensor {sources[name]!r}: expected finite floating-point numbers, found {found}; use another "
            "checkpoint"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            wanted[name].copy_(tensor)
    used = {sources[name] for name in loaded}
    return Pretrained(
        loaded=tuple(loaded),
        new=tuple(new),
        unused=tuple(name for name in state if name not in used),
        prefixes=prefixes,
    )


def _ties(model: nn.Module) -> dict[str, int]:
    """Identity of each tensor of a model by name; that of a tied one is its partner's."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: id(tensor) for name, tensor in named}


def _is_optional(name: str, loaded: Mapping[str, Tensor], ties: Mapping[str, int]) -> bool:
    partners = (other for other in loaded if ties.get(other) == ties.get(name))
    return name.rpartition(".")[2] == _COUNTER or any(partners)


def _misfit(
    path: Path,
    missing: Sequence[str],
    wanted: Mapping[str, Tensor],
    loaded: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> InputError:
    name, *others = sorted(missing)
    found = f"no such tensor among {', '.join(list(state)[:5])} …"
    if name in loaded:
        found = f"shape {tuple(loaded[name].shape)}"
    more = f" (and {len(others)} more: {', '.join(others[:3])}{' …' * (len(others) > 3)})" if others else ""
    module = name.rpartition(".")[0] or name
    return InputError(
        f"{path}: tensor {name!r}: expected shape {tuple(wanted[name].shape)}, found {found}{more}; use weights of "
        f"this model, or leave layers as they are initialized with --new-head, such as --new-head {module!r}"
    )


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name.

    Raises:
        InputError: The file is missing or damaged, or has no tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file with a state_dict, found none; check the path")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: expected a state_dict in .safetensors or of torch.save, found a damaged file or a whole pickled "
            "model; save model.state_dict()"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a state_dict, found {type(content).__name__}; save model.state_dict()")
    state = _state_dict(content)
    if not state:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise InputError(f"{path}: expected a state_dict, found no tensors in {keys}; save model.state_dict()")
    return state


def _read_checkpoint(path: Path) -> Any:
    """Content of a file of `torch.save`, with something inert in place of what is no tensor or plain data.

    Lightning's checkpoints, among others, hold objects of classes that need not be installed here. Nothing that a file
    names is imported or called.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before 1.6
        names = []
    with safe_globals([(_Inert if name.startswith("numpy") else _InertMapping, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Inert:
    """An object that takes any arguments and any state, and does nothing with them."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _InertMapping:
    """The like for classes that may be mappings, whose entries torch's loader sets in its own kinds only."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def _state_dict(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors of the state dict in a checkpoint, or of the checkpoint itself."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        return tensors
    for key in STATE_DICTS:
        if isinstance(content.get(key), Mapping) and (found := _state_dict(content[key])):
            return found
    return {}
