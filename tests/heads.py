"""Heads and deployed models of tests, without an export."""

from torch import nn

from export.forward.outputs import OUTPUT, Chosen
from export.forward.preprocess import Argument, Deployed, Preprocessing
from fedpara_edge.formats.interface import ArraySpec, Head
from fedpara_edge.losses import Loss, find_loss


def deployed(model: nn.Module, *shape: int, outputs: tuple[str, ...] = ()) -> Deployed:
    """Model of one float32 input as it is deployed."""
    return Deployed(model, [Argument(None, Preprocessing("float32", shape))], Chosen(outputs))


def head(loss: Loss | str, *shape: int, output: str = OUTPUT) -> Head:
    """Head of an output of that shape, whose label goes by the name of it."""
    loss = find_loss(loss) if isinstance(loss, str) else loss
    if loss.labels == "classes":
        label = ArraySpec(f"y_{output}", shape[1:], "int64", shape[0])
    else:
        label = ArraySpec(f"y_{output}", shape, "float32")
    return Head(ArraySpec(output, shape, "float32"), label, loss)
