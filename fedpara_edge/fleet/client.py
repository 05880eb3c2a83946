"""The ClientApp: `app` trains a round on a SuperNode (`device`)."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpara_edge.errors import FedparaError
from fedpara_edge.fleet.device import answer
from fedpara_edge.fleet.messages import Answer, read_call
from fedpara_edge.fleet.settings import NodeConfig, from_flower

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a call to train."""
    try:
        node = from_flower(NodeConfig, context.node_config)
        found = answer(read_call(message.content), node)
    except FedparaError as error:
        found = Answer(code=error.code, message=f"--node-config: {error}")
    return Message(found.content(), reply_to=message)
