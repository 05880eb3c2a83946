"""Who may say what: keys, the signed repository that devices take bundles and weights from, and signed updates.

Standards by their libraries: The Update Framework (python-tuf) for what goes to devices, DSSE (securesystemslib) for
what comes back. Both are imported in this room only, and come with the extra `trust`.
"""
