"""Files on disk: written whole or not at all, and the container of tensors that every format shares."""
