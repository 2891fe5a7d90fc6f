"""The embedded world: scenes of coloured shapes, an exact judge, and tiny models trained on them.

`scenes` has prompts, renderer and the split; `judge` reads pictures back; `networks` and `build` make the shipped
models in `assets/`, which are used as `diffalign://shapes` (pipeline) and as the reward model `shapes`.
"""
