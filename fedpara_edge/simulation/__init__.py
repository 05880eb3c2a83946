"""A whole federation on one machine, with the files and the device runtime of real ones."""
