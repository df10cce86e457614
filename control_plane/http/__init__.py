"""What the control plane answers: the machine side for routers, /api/v1 for people and programs."""
