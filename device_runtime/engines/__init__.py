"""Engines: what runs the training steps of a bundle, and the arithmetic that both of them share."""
