"""What results depend on: tasks' targets, networks, scores, removal, training and its checkpoints.

In the order of docs/code.md. `pruner`, `pretrained` and `interop` are for networks and loops of
your own.
"""
