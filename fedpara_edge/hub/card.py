"""The model card of a bundle: a README.md with the metadata that the Hub reads."""

from __future__ import annotations

import json

from fedpara_edge.formats.bundle import Manifest

MARK = "<!-- Written by fedpara-edge push; remove this line to keep changes of your own. -->"

_CARD = """\
---
library_name: fedpara-edge
tags:
- federated-learning
- on-device-training
- fedpara
- onnx
---
{mark}

# {model}

A bundle of fedpara-edge: a model as [FedPara](https://arxiv.org/abs/2108.06098) factors, with its training step as
ONNX, that devices train without PyTorch. An update sends {shared:,} parameters; the dense model has {dense:,}.

    fedpara-edge pull {repository} -o bundle
    fedpara-edge train bundle --data mine.npz --state state -o update.safetensors

| | |
|---|---|
| inputs | {inputs} |
| outputs | {outputs} |
| optimizer | `{optimizer}` |
| engines | {engines} |
| parameters that travel | {shared:,} |
| parameters that stay on the device | {personal:,} |
| parameters of the dense model | {dense:,} |
| fingerprint | `{fingerprint}` |

| layer | kind | shape | rank |
|---|---|---|---|
{layers}

Weights of rounds, if there are any, are in `weights/`:

    fedpara-edge pull {repository} --weights -o weights.safetensors
"""


def model_card(manifest: Manifest, repository: str) -> str:
    """Text of the card.

    Args:
        manifest: Manifest of the bundle.
        repository: Name of the repository.
    """
    layout, interface = manifest.layout, manifest.interface
    rows = (
        f"| {_code(layer.name)} | {layer.kind} | {' × '.join(map(str, layer.shape))} | {layer.rank or '–'} |"
        for layer in layout.layers
    )
    return _CARD.format(
        mark=MARK,
        model=_plain(manifest.model),
        repository=repository,
        inputs=", ".join(_tensor(each.name, each.shape, each.dtype) for each in interface.inputs),
        outputs=", ".join(f"{_code(head.output.name)} ({_plain(str(head.loss))})" for head in interface.heads),
        optimizer=json.dumps(dict(manifest.optimizer)).replace("`", "'"),
        engines=", ".join(map(_plain, manifest.engines)),
        shared=layout.shared_parameters,
        personal=sum(tensor.size for tensor in layout.with_role("personal")),
        dense=layout.dense_parameters,
        fingerprint=manifest.fingerprint,
        layers="\n".join(rows),
    )


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{_code(name)} {dtype} [{', '.join(map(str, ('N', *shape)))}]"


def _code(name: str) -> str:
    return f"`{_plain(name)}`"


def _plain(text: str) -> str:
    """A name in a line of a table, in which it ends no cell and no code."""
    return "".join(each for each in text if each.isprintable()).translate({ord(each): "" for each in "`|<>"})
