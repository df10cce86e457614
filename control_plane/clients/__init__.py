"""Other programs that the control plane asks."""
