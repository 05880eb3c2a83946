"""The mathematics of the factors: what a model consists of, what factors compose to, and which rank they need."""
