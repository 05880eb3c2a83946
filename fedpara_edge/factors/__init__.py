"""Mathematics of the factors: the layout of a model, the weights that factors compose to, and the ranks they need."""
