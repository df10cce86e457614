"""`inference-control`: the command line over /api/v1 of the control plane."""
