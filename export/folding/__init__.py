"""From a bundle and weights to one inference model with every weight composed."""
