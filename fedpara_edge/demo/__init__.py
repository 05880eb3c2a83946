"""One federation on real images, and the images: a subset of Fashion-MNIST, under the licence beside it."""

from pathlib import Path

IMAGES = Path(__file__).with_name("fashion_mnist_12k.npz")
"""10,000 training and 2,000 test images: x_train uint8 [10000, 1, 28, 28], y_train int64 [10000], x_test, y_test."""
