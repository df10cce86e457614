"""The commands of `inference-api`: one module each."""
