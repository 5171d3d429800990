"""What a search draws its trials by: the name that it had before settings got the field's names.

Kept so that the committed study's searches repeat to the bit; it goes with the next study.
"""

import hashlib
import json

BEFORE = {
    "lr_schedule": "schedule",
    "prune_interval": "every",
    "filters_per_step": "filters",
    "min_filters": "floor",
    "pruning_schedule": "removal",
    "round_to": "multiple",
}


def stream_of(run) -> str:
    from mtprune_utils.core.task import channels
    from mtprune_utils.stages._training import architecture

    def renamed(value):
        if isinstance(value, dict):
            return {BEFORE.get(key, key): renamed(item) for key, item in value.items()}
        return value

    params = {key: value for key, value in run.params.items() if key != "tasks"}
    params = renamed(params) | {"inputs": [stream_of(source) for source in run.inputs]}
    del params["width"], params["least_width"]
    dense = architecture(run.profile, channels(run.experiment.tasks))
    params["widths"] = dense.width_list
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]
    level = None if run.level is None else f"rank{run.level}"
    parts = [run.criterion, f"seed{run.seed}", level, run.arm, digest]
    return "-".join(part for part in parts if part)
