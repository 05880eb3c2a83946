"""Train one model on many edge devices over thin links: FedPara factors, their files, and their aggregation."""

__version__ = "0.2.0"
