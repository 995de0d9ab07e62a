"""Adaptive-length image tokenization: each image becomes 16 to 256 tokens, as many as it needs.

Example:
    from alit import load_weights
    weights = load_weights()
    encoded = weights.model.encode(images_u8, "l1:0.1")
    reconstructions = weights.model.decode(encoded.split())
"""

from alit.encoding.criteria import Candidate, Criterion, parse
from alit.encoding.results import Encoded
from alit.images.decode import decode_image
from alit.images.encode import encode_image, to_uint8
from alit.images.formats import ImageError, Limits
from alit.model.config import AlitConfig, KLConfig, VQGANConfig
from alit.tokenizer import Alit
from alit.weights import Weights, WeightsError, load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "Alit",
    "AlitConfig",
    "Candidate",
    "Criterion",
    "Encoded",
    "ImageError",
    "KLConfig",
    "Limits",
    "VQGANConfig",
    "Weights",
    "WeightsError",
    "__version__",
    "decode_image",
    "encode_image",
    "load_weights",
    "parse",
    "save_weights",
    "to_uint8",
]
