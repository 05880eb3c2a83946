"""Training step of a forward graph: losses, dropout, the Jacobian correction and the update of the weights."""
