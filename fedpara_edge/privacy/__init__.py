"""Differential privacy: a noisy sum that no client decides, and a ledger of what it costs."""
