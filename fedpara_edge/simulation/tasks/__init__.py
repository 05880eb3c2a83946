"""The tasks of a simulated round, each a function that a worker process runs on real files."""
