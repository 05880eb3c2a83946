"""Engines that run the training steps of a bundle, and the arithmetic that they share."""
