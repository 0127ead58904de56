"""Any frozen network as a function from images to features: loading, preprocessing and extraction."""

from tailscope.encoders.extract import Extraction, Options, extract_to_file
from tailscope.encoders.features import FeaturesResult, run_features
from tailscope.encoders.loading import load
from tailscope.encoders.networks import Encoder

__all__ = ["Encoder", "Extraction", "FeaturesResult", "Options", "extract_to_file", "load", "run_features"]
