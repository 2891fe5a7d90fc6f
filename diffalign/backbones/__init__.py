"""Model families. `load_policy` recognises the family from a pipeline's `model_index.json`."""

from diffalign.backbones.loading import LoRA, ModelSource, inspect_model, load_policy

__all__ = ["LoRA", "ModelSource", "inspect_model", "load_policy"]
