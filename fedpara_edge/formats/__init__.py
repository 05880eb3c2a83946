"""File formats: what travels and what is kept, each specified byte by byte in the module that reads and writes it."""
