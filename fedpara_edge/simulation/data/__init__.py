"""The data of a simulated federation: from the rows of one file to the files of each client."""
