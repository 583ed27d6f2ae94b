"""A folder of transformers with the first layers of another's decoder: small enough to see that everything runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

source, folder, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
config = AutoConfig.from_pretrained(source)
config.num_hidden_layers = layers
if getattr(config, "layer_types", None):
    config.layer_types = config.layer_types[:layers]
AutoModelForCausalLM.from_pretrained(source, config=config).save_pretrained(folder)
