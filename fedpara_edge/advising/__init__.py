"""Advice on a federation: the cheapest setting for an accuracy, found by small runs on the user's own data."""
