"""Rounds on Flower, for when one machine is not enough: Flower brings transport, nodes and keys, this project the rest.

A device is a SuperNode that runs `client`, a thin shell around `device_runtime.train`; the server is a ServerApp that
runs `server`, one around `fedpara_edge.aggregation.run_round`. What travels is the bytes of this project's files
(`messages`). `app` writes the Flower app that names both, and `up` runs one on this machine.
"""
