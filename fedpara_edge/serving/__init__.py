"""A server for devices: rounds that open and close by themselves, over HTTP."""
