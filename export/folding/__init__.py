"""Folding of a bundle and weights into one inference model with every weight composed."""
