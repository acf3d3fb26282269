"""Hugging Face models: what a `config.json` alone says of one."""

from __future__ import annotations

from .sizes import ConfigSizes, config_sizes, model_sizes, read_config

__all__ = ["ConfigSizes", "config_sizes", "model_sizes", "read_config"]
