"""The plan of a simulation: a TOML file, read and checked before anything is made."""
