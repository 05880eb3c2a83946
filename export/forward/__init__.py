"""From a PyTorch model to the ONNX graph of its forward pass, with what running it tells."""
