"""The engine `torch`: training and evaluation of bundles in torch, on a CPU or a GPU, for simulations alone."""
