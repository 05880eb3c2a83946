"""Forward pass of a PyTorch model as an ONNX graph, with what is learned by running it."""
