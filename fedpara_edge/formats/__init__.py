"""The files that travel or are kept, each specified byte by byte in the one module that reads and writes it."""
