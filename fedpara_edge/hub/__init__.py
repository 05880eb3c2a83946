"""Bundles and weights in repositories of the Hugging Face Hub, or of a server with its interface.

A repository holds one bundle, with its files as they are; beside them weights of rounds, as
`weights/round-<n>.safetensors`; and a model card made from the manifest. What comes back is verified as every other
bundle and weights file is.
"""
