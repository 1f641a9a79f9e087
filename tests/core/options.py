"""Options for tests of what holds whatever they are."""

import pytest

OPTIONS = [
    {},
    {"pair_steps": 4},
    {"pair_steps": 1, "density": 0.1},
    {"adjust_every": 3, "min_k": 20, "density": 0.05},
    {"strategy": "layerwise"},
    {"prior": "paper", "tail": "pareto", "density": 0.3},
    {"density": 1.0},
    {"bucket_bytes": 50_000, "index_code": "plain"},
    {"strategy": "global"},
    {"strategy": "norm", "bucket_bytes": 50_000},
    {"strategy": "hard", "threshold": 6.0},
    {"dense_steps": 2, "warmup_steps": 3, "bucket_bytes": 50_000},
    {"strategy": "norm", "warmup_steps": 4, "warmup_density": 0.5},
    {"prior": "measured", "warmup_steps": 2},
    {"layer_density": {"conv1*": 0.2, "conv3*": "dense"}, "warmup_steps": 4},
    {"layer_density": {"*.weight": 0.03}, "strategy": "global"},
    {"momentum": 0.5},
    {"momentum": 0.5, "nesterov": True, "momentum_masking": False, "dense_steps": 1},
    {"momentum": 0.5, "strategy": "hard", "threshold": 6.0, "dense_steps": 1},
    {"adam": (0.0, 0.0), "adam_eps": 1e-30, "bucket_bytes": 50_000},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
