"""Any frozen network as a function from images to features: loading, preprocessing and extraction."""

from tailscope.encoders.encoder import Encoder
from tailscope.encoders.extraction import Extraction, Options, extract_to_file
from tailscope.encoders.loading import load
from tailscope.encoders.run import FeaturesResult, run_features

__all__ = ["Encoder", "Extraction", "FeaturesResult", "Options", "extract_to_file", "load", "run_features"]
