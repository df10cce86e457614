"""How requests wait: whose turn it is, for how long, and what is counted of it."""
