"""Usage records on their way: made of Records, queued, spooled on disk, and sent to the control plane."""
