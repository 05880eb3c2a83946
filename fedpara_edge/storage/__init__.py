"""Files on disk: writing them whole or not at all, and the tensor file that all formats share."""
