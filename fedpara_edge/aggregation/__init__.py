"""From updates to the next weights: what is taken in, how it is averaged, and what the mean of factors leaves out."""

from fedpara_edge.aggregation.fedavg import Accepted, Aggregation, aggregate
from fedpara_edge.aggregation.gap import Gap, LayerGap
from fedpara_edge.aggregation.screening import Rejected

__all__ = ["Accepted", "Aggregation", "Gap", "LayerGap", "Rejected", "aggregate"]
