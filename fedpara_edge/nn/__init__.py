"""FedPara for PyTorch: the layers, the conversion of a model, and a model zoo. Needs torch."""

from fedpara_edge.nn.attention import MultiheadAttention
from fedpara_edge.nn.convert import convert
from fedpara_edge.nn.embedding import Embedding
from fedpara_edge.nn.fit import Fit, fit_factors
from fedpara_edge.nn.groupnorm import group_count, group_norm_like
from fedpara_edge.nn.init import he_std, initialize
from fedpara_edge.nn.layers import Conv2d, FactoredLayer, Linear
from fedpara_edge.nn.layout_of import layout_of
from fedpara_edge.nn.load import load_model
from fedpara_edge.nn.pretrained import Pretrained, load_pretrained
from fedpara_edge.nn.recurrent import GRU, LSTM
from fedpara_edge.nn.report import ConversionReport, LayerReport
from fedpara_edge.nn.wrapped import Wrapped
from fedpara_edge.nn.zoo import (
    ZOO,
    ZooEntry,
    char_lstm,
    cnn,
    har_transformer,
    mlp,
    mobilenet_v2,
    mobilenet_v3_small,
    resnet18,
    vgg16,
)

__all__ = [
    "GRU",
    "LSTM",
    "ZOO",
    "Conv2d",
    "ConversionReport",
    "Embedding",
    "FactoredLayer",
    "Fit",
    "LayerReport",
    "Linear",
    "MultiheadAttention",
    "Pretrained",
    "Wrapped",
    "ZooEntry",
    "char_lstm",
    "cnn",
    "convert",
    "fit_factors",
    "group_count",
    "group_norm_like",
    "har_transformer",
    "he_std",
    "initialize",
    "layout_of",
    "load_model",
    "load_pretrained",
    "mlp",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "vgg16",
]
