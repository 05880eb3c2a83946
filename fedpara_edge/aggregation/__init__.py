"""From updates to the next weights: what is taken in, how it is averaged, and what the mean of factors leaves out."""

from fedpara_edge.aggregation.aggregation import aggregate
from fedpara_edge.aggregation.bounds import Bounds
from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.aggregation.gap import Gap, LayerGap
from fedpara_edge.aggregation.result import Accepted, Aggregation
from fedpara_edge.aggregation.round import Round, run_round
from fedpara_edge.aggregation.screening import Rejected

__all__ = [
    "Accepted",
    "AggregateConfig",
    "Aggregation",
    "Bounds",
    "Gap",
    "LayerGap",
    "Rejected",
    "Round",
    "aggregate",
    "run_round",
]
